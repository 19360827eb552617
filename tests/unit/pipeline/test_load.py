"""Loading: targets, attributes, siblings, snapshots, and errors that point at the user's line."""

import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcresume.errors import CorruptDataError, PipelineError, StageStartError, UsageError
from hpcresume.pipeline.load import (
    LoadedPipeline,
    load_pipeline,
    load_snapshot,
    parse_target,
    write_snapshot,
)

PIPELINE = """
from pathlib import Path
import hpcresume as hr

def double(item):
    return 2 * item

def pipeline(n: int = 3, root: Path = Path(".")) -> hr.Pipeline:
    return hr.Pipeline("doubled", hr.indexed(n), [double])
"""


@pytest.fixture(autouse=True)
def _process_unchanged() -> Iterator[None]:
    """Give back sys.path and sys.modules as they were."""
    path, modules = list(sys.path), dict(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - set(modules):
        if str(getattr(sys.modules[name], "__file__", "")).startswith("/tmp"):
            del sys.modules[name]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def load(directory: Path, target: str, **params: Any) -> LoadedPipeline:
    return load_pipeline(parse_target(target, directory), params)


def call(loaded: LoadedPipeline, item: Any) -> Any:
    return loaded.pipeline.stages[0].process(item)


@pytest.mark.parametrize("target", ["flow_a.py", "./flow_a.py", "flow_a.py:pipeline"])
def test_a_file_is_loaded_under_its_stem(tmp_path: Path, target: str) -> None:
    """Relative files are looked up from the given directory."""
    path = write(tmp_path / "flow_a.py", PIPELINE)
    loaded = load(tmp_path, target, n="5")

    assert ("doubled", 5, {"n": 5}) == (
        loaded.pipeline.name,
        loaded.pipeline.sources.n,
        loaded.params,
    )
    assert ((path,), "flow_a", "pipeline") == (loaded.files, loaded.spec.module, loaded.spec.attr)


def test_what_a_file_defines_pickles_by_reference(tmp_path: Path) -> None:
    """Items of a user's own class travel between workers."""
    write(tmp_path / "flow_b.py", PIPELINE + "class Doc:\n    pass\n")
    load(tmp_path, "flow_b.py")
    doc = sys.modules["flow_b"].Doc()

    assert type(doc) is type(pickle.loads(pickle.dumps(doc)))


@pytest.mark.parametrize("target", ["flow_c", "flow_c:pipeline", "flow_pkg.inner:pipeline"])
def test_a_module_is_found_from_the_directory(tmp_path: Path, target: str) -> None:
    """What `python -m` would find, a target names."""
    write(tmp_path / "flow_c.py", PIPELINE)
    write(tmp_path / "flow_pkg/__init__.py", "")
    write(tmp_path / "flow_pkg/base.py", "FACTOR = 2\n")
    write(tmp_path / "flow_pkg/inner.py", "from .base import FACTOR\n" + PIPELINE)
    loaded = load(tmp_path, target)

    assert "doubled" == loaded.pipeline.name
    assert target.partition(":")[0] == loaded.spec.module


def test_parameters_are_recorded_as_json(tmp_path: Path) -> None:
    """Converted values go back to what JSON holds."""
    write(tmp_path / "flow_d.py", PIPELINE)
    loaded = load(tmp_path, "flow_d.py", n="7", root="data")

    assert {"n": 7, "root": "data"} == json.loads(json.dumps(loaded.params))


CHOSEN = """
def chosen() -> hr.Pipeline:
    return hr.Pipeline("p", [], [str])
"""


@pytest.mark.parametrize(
    "text",
    [
        'import hpcresume as hr\nchosen = hr.Pipeline("p", ["a"], [str])\n',
        "import hpcresume as hr\n" + CHOSEN,
        "from __future__ import annotations\nimport hpcresume as hr\n" + CHOSEN,
    ],
)
def test_the_only_pipeline_of_a_file_needs_no_name(tmp_path: Path, text: str) -> None:
    """A Pipeline object, or a function annotated to return one, is found."""
    write(tmp_path / "flow_e.py", text)

    assert "chosen" == load(tmp_path, "flow_e.py").spec.attr


TWO = """
import hpcresume as hr
first = hr.Pipeline("first", ["a"], [str])
def second() -> hr.Pipeline:
    return hr.Pipeline("second", ["a"], [str])
def _hidden() -> hr.Pipeline: ...
number = 3
"""


def test_several_pipelines_are_listed(tmp_path: Path) -> None:
    """Which one is meant is not guessed."""
    write(tmp_path / "flow_f.py", TWO)

    with pytest.raises(PipelineError) as caught:
        load(tmp_path, "flow_f.py")
    assert ["first", "second"] == caught.value.fields["candidates"]
    assert "flow_f.py:first" in str(caught.value)
    assert "second" == load(tmp_path, "flow_f.py:second").pipeline.name


@pytest.mark.parametrize(
    ("text", "target", "words"),
    [
        (TWO, "flow_g.py:secnd", ["'secnd'", "Did you mean 'second'?", "first, second"]),
        (TWO, "flow_g.py:number", ["number is 3", "int", "not a Pipeline"]),
        ("def pipeline():\n    return 3\n", "flow_g.py", ["pipeline() is 3"]),
        ("x = 1\n", "flow_g.py", ["there is none", "Define pipeline()"]),
        (TWO, "flow_h.py", ["no such file", "flow_g.py"]),
        (TWO, "flow_g.py:1x", ["'1x'"]),
        (TWO, ".:x", ["neither"]),
        (TWO, "flow_gg", ["no module flow_gg", "flow_g"]),
        (TWO, "json", ["package", "json.decoder"]),
        (TWO, "json.nothing", ["no module json.nothing"]),
        (TWO, "no_such_pkg.inner", ["no module no_such_pkg.inner"]),
        (TWO, "itertools", ["no Python file"]),
        (TWO, "./", ["is a directory"]),
    ],
)
def test_wrong_targets_say_what_is_there(
    tmp_path: Path, text: str, target: str, words: list[str]
) -> None:
    """Every wrong target is an error with the nearest right one."""
    write(tmp_path / "flow_g.py", text)
    with pytest.raises(PipelineError) as caught:
        load(tmp_path, target)
    assert [] == [word for word in words if word not in str(caught.value)]


def test_a_name_that_hides_a_module_is_refused(tmp_path: Path) -> None:
    """A pipeline in random.py would break everything that imports random."""
    write(tmp_path / "random.py", PIPELINE)
    with pytest.raises(PipelineError, match="Rename the file"):
        load(tmp_path, "random.py")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("x = 1\ndef broken(:\n", 2, ["SyntaxError"]),
        ("import json\njson.loads('{')\n", 2, ["JSONDecodeError", "json.loads('{')"]),
        ("x = 1\n\nimport no_such_library\n", 3, ["no_such_library"]),
        ("import sys\nsys.exit(3)\n", 2, ["SystemExit"]),
        ("def pipeline():\n    raise KeyError('model')\n", 2, ["pipeline() raised", "'model'"]),
    ],
)
def test_a_file_that_does_not_import_is_told_with_its_line(
    tmp_path: Path, text: str, line: int, words: list[str]
) -> None:
    """The message begins with file:line, and shows the user's frames and not ours."""
    path = write(tmp_path / "flow_i.py", text)
    with pytest.raises(PipelineError) as caught:
        load(tmp_path, "flow_i.py")

    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ")
    assert [] == [word for word in words if word not in message]
    assert "pipeline/load.py" not in message
    assert "<frozen" not in message


def test_a_wrong_parameter_is_a_usage_error(tmp_path: Path) -> None:
    """Also where the pipeline is an object that takes none."""
    write(tmp_path / "flow_j.py", PIPELINE)
    write(tmp_path / "flow_k.py", 'import hpcresume as hr\np = hr.Pipeline("p", ["a"], [str])\n')

    for target in ("flow_j.py", "flow_k.py"):
        with pytest.raises(UsageError, match="'words'"):
            load(tmp_path, target, words="1")


def test_an_edited_file_is_loaded_anew(tmp_path: Path) -> None:
    """Neither the module before nor its cached code is used, nor is any cache written."""
    write(tmp_path / "flow_l.py", "import flow_helper\n" + PIPELINE)
    for factor in (2, 3):
        write(tmp_path / "flow_helper.py", f"FACTOR = {factor}\n")
        write(
            tmp_path / "flow_l.py", "import flow_helper\n" + PIPELINE.replace("2 *", f"{factor} *")
        )
        assert factor * 10 == call(load(tmp_path, "flow_l.py"), 10)
        assert factor == sys.modules["flow_helper"].FACTOR
    assert not (tmp_path / "__pycache__").exists()


def test_two_directories_do_not_mix(tmp_path: Path) -> None:
    """Files of one name, with helpers of one name, load side by side one after the other."""
    text = "import flow_names\n" + PIPELINE.replace('"doubled"', "flow_names.NAME")
    for name in ("one", "two", "one"):
        write(tmp_path / name / "flow_m.py", text)
        write(tmp_path / name / "flow_names.py", f"NAME = {name!r}\n")
        assert name == load(tmp_path / name, "flow_m.py").pipeline.name
    assert 1 == sum(str(tmp_path) in entry for entry in sys.path)


def test_siblings_belong_to_the_snapshot(tmp_path: Path) -> None:
    """Modules beside the file do, directly, through others, or imported late; others do not."""
    write(
        tmp_path / "flow_n.py",
        "import flow_x, json\n"
        + PIPELINE.replace("return 2 * item", "import flow_late; return flow_late.F * item"),
    )
    write(tmp_path / "flow_x.py", "from flow_deep.inside import Y\n")
    write(tmp_path / "flow_deep/__init__.py", "")
    write(tmp_path / "flow_deep/inside.py", "from . import other\nY = other.Z\n")
    write(tmp_path / "flow_deep/other.py", "Z = 1\n")
    write(tmp_path / "flow_late.py", "F = 5\n")
    write(tmp_path / "unrelated.py", "")
    loaded = load(tmp_path, "flow_n.py")
    names = [path.relative_to(tmp_path).as_posix() for path in loaded.files]

    assert "flow_n.py" == names[0]
    assert {
        "flow_n.py",
        "flow_x.py",
        "flow_late.py",
        "flow_deep/__init__.py",
        "flow_deep/inside.py",
        "flow_deep/other.py",
    } == set(names)
    assert len(names) == len(set(names))
    assert 10 == call(loaded, 2)


def test_named_files_belong_to_the_snapshot(tmp_path: Path) -> None:
    """Pipeline(snapshot=[...]) names files and whole directories beside the file."""
    write(
        tmp_path / "flow_o.py",
        PIPELINE.replace("[double])", '[double], snapshot=["words.txt", "data"])'),
    )
    write(tmp_path / "words.txt", "a")
    write(tmp_path / "data/deep/b.txt", "b")
    write(tmp_path / "data/__pycache__/c.pyc", "c")
    files = load(tmp_path, "flow_o.py").files

    assert [tmp_path / n for n in ("flow_o.py", "words.txt", "data/deep/b.txt")] == list(files)


@pytest.mark.parametrize("named", ["missing.txt", "../outside.txt"])
def test_named_files_lie_below_the_pipelines_directory(tmp_path: Path, named: str) -> None:
    """What cannot be copied beside the file is refused by name."""
    write(tmp_path / "outside.txt", "x")
    text = PIPELINE.replace("[double])", f"[double], snapshot=[{named!r}])")
    write(tmp_path / "in" / "flow_p.py", text)
    with pytest.raises(PipelineError, match=named.replace(".", r"\.")):
        load(tmp_path / "in", "flow_p.py")


IN_ANOTHER_PROCESS = """
import json, pathlib, sys
from hpcresume.pipeline.load import load_snapshot
loaded = load_snapshot(pathlib.Path(sys.argv[1]))
module = sys.modules[loaded.spec.module]
print(json.dumps([loaded.pipeline.sources.n, loaded.pipeline.stages[0].process(10),
                  module.__file__, loaded.spec.module, loaded.params]))
"""


def load_elsewhere(snapshot: Path, cwd: Path) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, str(snapshot)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "" == done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("original", ["deleted", "edited"])
def test_another_process_uses_only_the_copy(tmp_path: Path, original: str) -> None:
    """After submit the original may change or vanish; tasks run what was submitted."""
    home, snapshot = tmp_path / "home", tmp_path / "run" / "code"
    helper = write(home / "flow_factor.py", "FACTOR = 4\n")
    text = PIPELINE.replace(
        "return 2 * item", "import flow_factor; return flow_factor.FACTOR * item"
    )
    main = write(home / "flow_q.py", text)
    digests = write_snapshot(load(home, "flow_q.py", n="9"), snapshot)
    for path in (main, helper):
        if original == "deleted":
            path.unlink()
        else:
            path.write_text("raise RuntimeError('the original was used')\n")

    assert {"flow_q.py", "flow_factor.py"} == set(digests)
    assert [9, 40, str(snapshot / "flow_q.py"), "flow_q", {"n": 9}] == load_elsewhere(
        snapshot, home
    )
    assert {"flow_q.py", "flow_factor.py", "pipeline.json"} == {p.name for p in snapshot.iterdir()}


def test_a_dotted_module_comes_from_the_copy_and_its_package_does_not(tmp_path: Path) -> None:
    """Relative imports find the package that is installed, the module is the copy."""
    snapshot = tmp_path / "code"
    write(tmp_path / "flow_dotted/__init__.py", "")
    write(tmp_path / "flow_dotted/base.py", "FACTOR = 6\n")
    text = "from .base import FACTOR\n" + PIPELINE.replace("2 *", "FACTOR *")
    main = write(tmp_path / "flow_dotted/inner.py", text)
    digests = write_snapshot(load(tmp_path, "flow_dotted.inner"), snapshot)
    main.write_text("raise RuntimeError('the original was used')\n")

    assert {"inner.py"} == set(digests)
    assert [3, 60, str(snapshot / "inner.py"), "flow_dotted.inner", {}] == load_elsewhere(
        snapshot, snapshot
    )


def test_a_target_is_the_original_also_after_its_copy_was_loaded(tmp_path: Path) -> None:
    """What a process has imported does not decide what a module's name means."""
    write(tmp_path / "flow_u/__init__.py", "")
    write(tmp_path / "flow_u/inner.py", PIPELINE)
    path, modules = list(sys.path), tmp_path / "flow_u" / "inner.py"
    write_snapshot(load(tmp_path, "flow_u.inner"), tmp_path / "code")
    load_snapshot(tmp_path / "code")

    assert modules == parse_target("flow_u.inner", tmp_path).path
    assert [*path, str(tmp_path)] == sys.path


def test_a_snapshot_may_be_loaded_with_other_parameters(tmp_path: Path) -> None:
    """load_pipeline takes a snapshot's directory too."""
    write(tmp_path / "flow_r.py", PIPELINE)
    write_snapshot(load(tmp_path, "flow_r.py", n="2"), tmp_path / "code")

    assert 2 == load_snapshot(tmp_path / "code").pipeline.sources.n
    assert 8 == load_pipeline(tmp_path / "code", {"n": "8"}).pipeline.sources.n


@pytest.mark.parametrize("damage", ["changed", "missing", "no manifest"])
def test_a_copy_that_is_not_what_was_written_is_refused(tmp_path: Path, damage: str) -> None:
    """The digests are looked at before anything is imported."""
    write(tmp_path / "flow_s.py", PIPELINE)
    write_snapshot(load(tmp_path, "flow_s.py"), tmp_path / "code")
    copy = tmp_path / "code" / "flow_s.py"
    if damage == "changed":
        copy.write_text("raise RuntimeError('imported')\n")
    elif damage == "missing":
        copy.unlink()
    else:
        (tmp_path / "code" / "pipeline.json").unlink()

    with pytest.raises(CorruptDataError, match=r"[Ss]ubmit"):
        load_snapshot(tmp_path / "code")


def test_a_copy_that_does_not_import_here_is_a_start_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What imports on the login node and not on this one is told as such, with the line."""
    text = "import os\nassert os.environ['FLOW_MODEL']\n" + PIPELINE
    write(tmp_path / "flow_t.py", text)
    monkeypatch.setenv("FLOW_MODEL", "there")
    write_snapshot(load(tmp_path, "flow_t.py"), tmp_path / "code")
    monkeypatch.delenv("FLOW_MODEL")

    with pytest.raises(StageStartError, match=r"code/flow_t\.py:2: KeyError: 'FLOW_MODEL'"):
        load_snapshot(tmp_path / "code")
