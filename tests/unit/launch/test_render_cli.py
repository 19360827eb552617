"""`hpcresume render` and `submit --dry-run`: the scripts, and that nothing is made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from pyroaring import BitMap

from hpcresume.cli import cli
from hpcresume.merge.generation import load_newest, write_generation
from hpcresume.run.directory import RunDir
from tests.support.places import child_environment
from tests.unit.launch.jobs import bash_syntax, sbatch_reads

PIPELINE = """
import hpcresume as hr


class Heavy(hr.Stage):
    cpus = 3
    gpus = 1

    def process(self, item):
        return item


def pipeline(n: int = 100, heavy: bool = False):
    return hr.Pipeline("figures", [str(i) for i in range(n)], [Heavy() if heavy else str])
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with a pipeline, on a machine without Slurm and without settings."""
    (tmp_path / "figures.py").write_text(PIPELINE)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files_of(place):
    """Return every path below a directory."""
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*"))


def call(*args):
    """Call the command line in this process."""
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def rendered(*args):
    """Return what --json says; the command has to succeed."""
    result = call(args[0], "--json", *args[1:])
    assert 0 == result.exit_code, result.stderr
    return json.loads(result.stdout)


def test_the_scripts_are_rendered_without_slurm_and_nothing_is_made(place):
    """No sbatch on the path, no run directory, no bytecode: only text."""
    before = files_of(place)
    found = rendered("render", "figures.py", "--array", "8%2", "-t", "2:00:00", "--", "--comment=x")
    options = dict(sbatch_reads(found["array"]))

    assert before == files_of(place)
    assert "0-7%2" == options["array"]
    assert ("2:00:00", "x") == (options["time"], options["comment"])
    assert str(place) == options["chdir"]
    assert "afterany:<array>" == dict(sbatch_reads(found["merge"]))["dependency"]
    assert (8, 0, "generic") == (found["tasks"], found["round"], found["site"])


def test_the_run_directory_is_the_one_that_submit_would_use(place, monkeypatch):
    """A local submission of the same command makes the directory that render named."""
    path = rendered("render", "figures.py", "-P", "n=3")["run"]
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    local = ("--cluster", "local", "--engine", "inline", "-P", "n=3")
    result = call("submit", "figures.py", *local)

    assert 0 == result.exit_code, result.stderr
    assert [path] == [str(run) for run in (place / "runs").iterdir()]


def test_both_scripts_are_printed_and_are_valid_bash(place, monkeypatch):
    """Without --json stdout holds the two scripts, and no other lines than comments."""
    result = call("render", "figures.py")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")

    assert 0 == result.exit_code, result.stderr
    assert 2 == result.stdout.count("#!/bin/bash")
    assert "" == bash_syntax(result.stdout.replace("#!/bin/bash", ""))
    assert "figures" in result.stderr


def test_requests_default_to_what_the_stages_need(place):
    """Cores and GPUs of the stages, unless something else was asked for."""
    found = dict(sbatch_reads(rendered("render", "figures.py", "-P", "heavy=true")["array"]))
    assert ("3", "1") == (found["cpus-per-task"], found["gpus-per-task"])

    asked = ("render", "figures.py", "-P", "heavy=true", "-c", "7")
    assert "7" == dict(sbatch_reads(rendered(*asked)["array"]))["cpus-per-task"]


def test_there_are_no_more_tasks_than_sources(place):
    """--array is the most; fewer sources make fewer tasks."""
    assert 3 == rendered("render", "figures.py", "-P", "n=3", "--array", "64")["tasks"]


def test_dry_run_prints_the_same(place):
    """`submit --dry-run` is `render`, and submits and makes nothing."""
    before = files_of(place)
    options = ("figures.py", "--array", "4", "-c", "2", "--run-dir", "my run")

    assert rendered("render", *options) == rendered("submit", *options, "--dry-run")
    assert before == files_of(place)


def test_explain_prints_every_setting_with_its_origin(place, monkeypatch):
    """Value and layer of each setting, before the scripts; in JSON as a list."""
    (place / "hpcresume.toml").write_text('[request]\naccount = "proj"\n')
    monkeypatch.setenv("SBATCH_PARTITION", "fast")
    options = ("render", "figures.py", "-P", "heavy=true", "-t", "60", "--explain")
    origins = {row["key"]: (row["value"], row["origin"]) for row in rendered(*options)["settings"]}

    assert ("proj", str(place / "hpcresume.toml")) == origins["request.account"]
    assert "fast" == origins["request.partition"][0]
    assert "SBATCH_PARTITION" in origins["request.partition"][1]
    assert ("60", "command line") == origins["request.time"]
    assert (3, "the stages") == origins["request.cpus_per_task"]
    text = call(*options).stdout
    assert all(f"# {key} = " in text for key in origins)
    assert text.index("# request.time") < text.index("#!/bin/bash")


def test_an_unknown_variable_in_a_template_names_template_and_line(place, monkeypatch):
    """A site's mistake ends with exit code 15; --explain still lists the settings."""
    folder = place / "sites" / "mine"
    folder.mkdir(parents=True)
    (folder / "site.toml").write_text("")
    lines = ('{% extends "job.sh.j2" %}', "{% block before %}", "{{ acount }}", "{% endblock %}")
    (folder / "job.sh.j2").write_text("\n".join(lines))
    monkeypatch.setenv("HPCRESUME_SITE_PATH", str(place / "sites"))
    result = call("render", "figures.py", "--site", "mine", "--explain")

    assert 15 == result.exit_code
    assert f"{folder / 'job.sh.j2'}:3: 'acount' is undefined" in result.stderr
    assert "# request.account = " in result.stdout


@pytest.fixture
def run(place, monkeypatch):
    """A finished run of three sources."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    options = ("--cluster", "local", "--engine", "inline", "--run-dir", "r", "-P", "n=3")
    result = call("submit", "figures.py", *options)
    assert 0 == result.exit_code, result.stderr
    monkeypatch.setenv("PATH", str(place / "home"))
    return place / "r"


def test_a_run_is_rendered_for_its_next_round(run):
    """RUN shows the round after the last one; reading it writes nothing."""
    before = files_of(run)
    found = rendered("render", run)

    assert before == files_of(run)
    assert (str(run), 1, 1) == (found["run"], found["round"], found["tasks"])
    assert (
        f"hpcresume-{json.loads((run / 'run.json').read_bytes())['run_id']}-1"
        == (dict(sbatch_reads(found["array"]))["job-name"])
    )
    assert ["no source is left: submit would submit nothing"] == found["notes"]


def test_a_grown_listing_counts_towards_the_next_round(run):
    """Sources that a run does not know yet are left to do; a change of parameters is said."""
    options = ("figures.py", "--run-dir", "r", "-P", "n=5", "--array", "9")
    found = rendered("render", *options)

    assert 2 == found["tasks"]
    assert ["params.n"] == [note.split(": ")[1].split(" ")[0] for note in found["notes"]]


def test_both_numbers_of_an_array_are_those_of_the_last_time(run, place, monkeypatch):
    """`--array 8%2` is one wish: a later submit without it runs no more tasks at once."""
    options = ("figures.py", "--run-dir", "r", "-P", "n=9")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    local = ("--cluster", "local", "--engine", "inline", "--accept-changes")
    assert 0 == call("submit", *options, *local, "--array", "8%2").exit_code
    monkeypatch.setenv("PATH", str(place / "home"))
    options = ("figures.py", "--run-dir", "r", "-P", "n=99")
    shown = [rendered("render", *options, *more) for more in ((), ("--array", "4"))]

    assert ["0-7%2", "0-3"] == [dict(sbatch_reads(one["array"]))["array"] for one in shown]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nowhere.py",), 10, "no such file"),
        (("figures.py", "--cluster", "local"), 2, "submits no batch script"),
        (("figures.py", "--", "--array=3"), 15, "--array=3"),
        (("figures.py", "--site", "nowhere"), 15, "nowhere"),
        (("figures.py", "--array", "many"), 2, "many"),
    ],
)
def test_mistakes_end_as_those_of_submit(place, arguments, code, message):
    """What submit would refuse is refused, with the same code."""
    result = call("render", *arguments)

    assert code == result.exit_code, result.stderr
    assert message in result.stderr
    assert ["figures.py", "home"] == files_of(place)


def test_the_real_command_renders_where_there_is_no_slurm(place):
    """As a process with an empty path: scripts on stdout, exit code 0, nothing made."""
    done = subprocess.run(
        [sys.executable, "-m", "hpcresume", "render", "figures.py", "--array", "2"],
        cwd=place,
        env=child_environment({"PATH": str(place / "home"), "PYTHONDONTWRITEBYTECODE": "1"}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert 0 == done.returncode, done.stderr
    assert "#SBATCH --array=0-1\n" in done.stdout
    assert ["figures.py", "home"] == files_of(place)


def test_sources_that_need_more_memory_have_a_script_of_their_own(place):
    """Both arrays are shown, without Slurm, as the next round would submit them."""
    (place / "lines.txt").write_text("a\nb\nc\n")
    (place / "lines.py").write_text(
        "import hpcresume as hr\n"
        "def pipeline(): return hr.Pipeline('lines', hr.lines('lines.txt'), [str])\n"
    )
    run = place / "run"
    submit = ("submit", "lines.py", "--run-dir", run, "--cluster", "local", "--engine", "inline")
    assert 0 == call(*submit).exit_code
    with (place / "lines.txt").open("a") as file:
        file.write("d\ne\nf\n")
    opened = RunDir.open(str(run))
    union = load_newest(opened)
    union.note_short(BitMap([4]), 1000)
    write_generation(opened, union)

    shown = rendered(*("render", "lines.py", "--run-dir", run, "--mem", "1000M", "--array", "2"))

    texts = list(shown["arrays"].values())
    options = [dict(sbatch_reads(text)) for text in texts]
    assert [("0-0", "1000M"), ("1-1", "1500M")] == [(o["array"], o["mem"]) for o in options]
    assert (2, texts[0]) == (shown["tasks"], shown["array"])
    assert ["submit", "submit-00001"] == [Path(path).parent.name for path in shown["arrays"]]
