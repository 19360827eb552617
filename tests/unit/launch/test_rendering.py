"""The batch scripts: what stands in them for which settings."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import msgspec
import pytest

from hpcresume.errors import ConfigError
from hpcresume.launch.rendering import array_directives, render_array, render_merge
from tests.unit.launch.jobs import array_job, bash_syntax, merge_job, sbatch_reads, settings

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "array.sh",
            lambda: render_array(
                array_job(throttle=8, environment={"HPCRESUME_ROUND": "0"}),
                settings({"request": {"account": "proj", "time": "02:00:00", "mem": "8G"}}),
            ),
        ),
        ("merge.sh", lambda: render_merge(merge_job(), settings())),
    ],
)
def test_a_plain_job_gives_the_script_on_record(name, text):
    """The scripts of a plain job are those kept beside the tests, and are valid bash."""
    assert (GOLDEN / name).read_text() == text()
    assert "" == bash_syntax(text())


def test_empty_requests_leave_their_options_out():
    """What nobody asked for is the partition's default, not an empty option."""
    options = dict(sbatch_reads(render_array(array_job(), settings())))
    assert {"time", "account", "partition", "qos", "constraint", "mem", "gres"}.isdisjoint(options)
    assert ("1", "1", "1") == (options["nodes"], options["ntasks"], options["cpus-per-task"])


def test_elements_are_numbered_through_the_round():
    """A second array of a round begins where the first one ends."""
    options = dict(sbatch_reads(render_array(array_job(first=64, tasks=3, throttle=2), settings())))
    assert "64-66%2" == options["array"]


def test_a_request_of_the_job_replaces_that_of_the_settings():
    """A round may ask for more memory than the settings do."""
    resolved = settings({"request": {"mem": "4G", "cpus_per_task": 3}})
    request = msgspec.structs.replace(resolved.settings.request, mem="6G")
    text = render_array(array_job(request=request), resolved)
    options = dict(sbatch_reads(text))
    assert ("6G", "3") == (options["mem"], options["cpus-per-task"])
    assert "srun --nodes=1 --ntasks=1 --cpus-per-task=3 " in text


@pytest.mark.parametrize(
    ("style", "mem", "cpus", "expected"),
    [
        ("mem", "4G", 3, {"mem": "4G"}),
        ("mem-per-cpu", "4G", 3, {"mem-per-cpu": "1366M"}),
        ("mem-per-cpu", "4000", 2, {"mem-per-cpu": "2000M"}),
        ("mem-per-cpu", "1T", 4, {"mem-per-cpu": "262144M"}),
        ("mem-per-cpu", "512K", 4, {"mem-per-cpu": "1M"}),
        ("none", "4G", 3, {}),
    ],
)
def test_memory_is_spelled_as_the_site_takes_it(style, mem, cpus, expected):
    """Per CPU it is rounded up, so that the task never gets less than it asked for."""
    resolved = settings(
        {"site": {"memory_style": style}, "request": {"mem": mem, "cpus_per_task": cpus}}
    )
    options = dict(sbatch_reads(render_array(array_job(), resolved)))
    assert expected == {name: value for name, value in options.items() if name.startswith("mem")}


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("gpus-per-task", {"gpus-per-task": "2"}),
        ("gpus-per-node", {"gpus-per-node": "2"}),
        ("gres", {"gres": "gpu:2"}),
        ("none", {}),
    ],
)
def test_gpus_are_spelled_as_the_site_takes_them(style, expected):
    """A site knows one of four spellings."""
    resolved = settings({"site": {"gpu_style": style}, "request": {"gpus_per_task": 2}})
    options = dict(sbatch_reads(render_array(array_job(), resolved)))
    assert expected == {name: value for name, value in options.items() if name.startswith("g")}


def test_forbidden_options_are_dropped_and_said():
    """A forbidden option is not in the script, and the script and the caller hear of it."""
    resolved = settings({"site": {"forbidden": ["mem", "requeue"]}, "request": {"mem": "4G"}})
    directives = array_directives(array_job(), resolved)
    assert (("requeue", None), ("mem", "4G")) == directives.dropped
    text = render_array(array_job(), resolved)
    assert {"mem", "requeue"}.isdisjoint(dict(sbatch_reads(text)))
    assert "# left out, as site generic forbids it: --mem=4G\n" in text


def test_required_options_that_are_missing_are_an_error():
    """What the site insists on is asked for before Slurm refuses the job."""
    site = {"site": {"required": ["account", "constraint"]}}
    with pytest.raises(ConfigError, match=r"requires --account and --constraint"):
        render_array(array_job(), settings(site))
    given = settings(site | {"request": {"account": "a", "constraint": "cpu"}})
    assert ("constraint", "cpu") in sbatch_reads(render_array(array_job(), given))
    assert ("constraint", "cpu") in sbatch_reads(render_merge(merge_job(), given))


def test_extra_options_replace_ours_and_add_to_them():
    """`-- --comment=x` reaches sbatch; an option that is there already is replaced."""
    extra = ["--comment=a b", "--exclusive", "--time=5"]
    resolved = settings({"request": {"time": "60", "extra": extra}})
    options = sbatch_reads(render_array(array_job(), resolved))
    assert [("comment", "a b")] == [option for option in options if option[0] == "comment"]
    assert [("time", "5")] == [option for option in options if option[0] == "time"]
    assert ("exclusive", None) in options


@pytest.mark.parametrize(
    "option", ["--array=0-3", "--wrap=ls", "--parsable", "--nodes=2", "--output=x"]
)
def test_extra_options_that_the_run_depends_on_are_refused(option):
    """A second --array would make it another job."""
    with pytest.raises(ConfigError, match=option.split("=", maxsplit=1)[0]):
        render_array(array_job(), settings({"request": {"extra": [option]}}))


def test_requeue_is_said_either_way():
    """Sites differ in the default, so the script always says it."""
    for allowed, option in ((True, "requeue"), (False, "no-requeue")):
        resolved = settings({"site": {"requeue": allowed}})
        assert (option, None) in sbatch_reads(render_array(array_job(), resolved))
        assert (option, None) in sbatch_reads(render_merge(merge_job(), resolved))


def test_an_array_of_one_is_an_array():
    """One task has an array id and an index like every other."""
    assert ("array", "0-0") in sbatch_reads(render_array(array_job(tasks=1), settings()))
    with pytest.raises(ConfigError, match="0 tasks"):
        render_array(array_job(tasks=0), settings())


def test_a_site_without_arrays_gets_single_jobs():
    """The job says which task it is, and its pickle has the job's own id."""
    text = render_array(array_job(index=3), settings())
    options = dict(sbatch_reads(text))
    assert "array" not in options
    assert "/scratch/me/run/logs/%j_3.out" == options["output"]
    assert "export HPCRESUME_TASK=3\n" in text
    assert 'element="$SLURM_JOB_ID"\n' in text
    assert "" == bash_syntax(text)


def test_the_merge_job_asks_for_its_own_or_what_the_tasks_do():
    """[merge] fills in from [request]; GPUs and node lists are not a merge job's."""
    resolved = settings(
        {
            "request": {"account": "a", "qos": "q", "gpus_per_task": 4, "nodelist": "n1"},
            "merge": {"qos": "short", "mem": "2G", "extra": ["--comment=m"]},
        }
    )
    options = dict(sbatch_reads(render_merge(merge_job(), resolved)))
    expected = {"account": "a", "qos": "short", "mem": "2G", "time": "01:00:00", "comment": "m"}
    assert expected.items() <= options.items()
    assert {"gpus-per-task", "nodelist", "array", "signal"}.isdisjoint(options)


@pytest.mark.parametrize("dependency", ["afterany:12", "afternotok:7", "afterany:1:2,afterok:3"])
def test_the_merge_job_waits_for_what_it_is_told(dependency):
    """A dependency that can never be met ends the job instead of leaving it queued."""
    options = dict(sbatch_reads(render_merge(merge_job(dependency=dependency), settings())))
    assert (dependency, "yes") == (options["dependency"], options["kill-on-invalid-dep"])
    with pytest.raises(ConfigError, match="dependency"):
        render_merge(merge_job(dependency="afterwards"), settings())


def test_python_may_be_a_command_of_several_words():
    """A container's Python is started as the site says; ours is quoted."""
    container = "apptainer exec 'my img.sif' python3"
    resolved = settings({"site": {"python": container, "setup": ["module load apptainer"]}})
    for text in (render_array(array_job(), resolved), render_merge(merge_job(), resolved)):
        assert f"{container} -u -P -m " in text
        assert text.index("\nmodule load apptainer\n") < text.index(container)
        assert "" == bash_syntax(text)
    plain = render_merge(merge_job(), settings({"site": {"python": ""}}))
    assert f"{shlex.quote(sys.executable)} -u -P -m hpcresume merge" in plain


def test_python_with_an_open_quote_is_refused():
    """It would swallow the rest of the script."""
    with pytest.raises(ConfigError, match=r"site\.python.*command line.*quotation"):
        render_array(array_job(), settings({"site": {"python": "python '"}}))


@pytest.mark.parametrize("name", ["100%", "a\\b", "a\nb"])
def test_paths_that_slurm_would_change_are_refused(name):
    """Slurm and submitit replace %A and the like in paths."""
    for changes in ({"run_dir": Path("/s", name)}, {"log_dir": Path("/s", name)}):
        with pytest.raises(ConfigError, match=r"--run-dir|control character"):
            render_array(array_job(**changes), settings())


def test_variables_that_a_shell_does_not_take_are_refused():
    """A variable's name is checked, its value quoted."""
    value = "a 'b' $c"
    text = render_merge(merge_job(environment={"HPCRESUME_X": value}), settings())
    assert f"export HPCRESUME_X={shlex.quote(value)}\n" in text
    with pytest.raises(ConfigError, match="not a name"):
        render_merge(merge_job(environment={"A B": "x"}), settings())


def test_a_site_replaces_one_block(site_file):
    """A site's job.sh.j2 extends the shipped one of the same name and keeps the rest."""
    site_file("site.toml", "extends = 'generic'\n")
    path = site_file(
        "job.sh.j2",
        '{% extends "job.sh.j2" %}\n{% block before %}\nmodule load mine\n{% endblock %}\n',
    )
    text = render_array(array_job(), settings(site="mine", HPCRESUME_SITE_PATH=path))
    plain = render_array(array_job(), settings())
    assert plain.replace("\n\nrun=", "\nmodule load mine\n\nrun=", 1) == text
    assert "module load mine" not in render_merge(
        merge_job(), settings(site="mine", HPCRESUME_SITE_PATH=path)
    )


def test_a_template_can_use_the_settings_and_super(site_file):
    """A block has the settings at hand, and what it replaces through super()."""
    site_file("site.toml", "")
    path = site_file(
        "merge.sh.j2",
        '{% extends "merge.sh.j2" %}{% block directives %}{{ super() }}'
        "#SBATCH --comment={{ settings.site.name }}\n{% endblock %}",
    )
    text = render_merge(merge_job(), settings(site="mine", HPCRESUME_SITE_PATH=path))
    assert ("comment", "mine") == sbatch_reads(text)[-1]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("\n\n{{ acount }}", r"job\.sh\.j2:4: 'acount' is undefined"),
        ("\n{{ settings.sync.max_age }}", r"job\.sh\.j2:3: .*max_age"),
        ("\n{{ oops", r"job\.sh\.j2:\d+: .*Correct the template"),
    ],
)
def test_an_unknown_option_in_a_template_names_the_line(site_file, body, message):
    """The template, the line and the variable: everything needed to correct it."""
    site_file("site.toml", "")
    text = f'{{% extends "job.sh.j2" %}}\n{{% block before %}}{body}\n{{% endblock %}}\n'
    path = site_file("job.sh.j2", text)
    with pytest.raises(ConfigError, match=message):
        render_array(array_job(), settings(site="mine", HPCRESUME_SITE_PATH=path))


def test_a_template_that_is_not_there_is_an_error(site_file):
    """Extending a template that no folder has is named."""
    site_file("site.toml", "")
    path = site_file("job.sh.j2", '{% extends "base.sh.j2" %}')
    with pytest.raises(ConfigError, match=r"base\.sh\.j2"):
        render_array(array_job(), settings(site="mine", HPCRESUME_SITE_PATH=path))


def test_a_template_that_others_can_write_is_refused(site_file):
    """A template is a script that runs as us."""
    site_file("site.toml", "")
    path = site_file("job.sh.j2", '{% extends "job.sh.j2" %}')
    Path(path, "mine", "job.sh.j2").chmod(0o664)
    with pytest.raises(ConfigError, match="can be written by other users"):
        render_array(array_job(), settings(site="mine", HPCRESUME_SITE_PATH=path))
