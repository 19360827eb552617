"""What of a command's flags the run remembers, and parameters from files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpcresume.merge.plan import newest_plan, open_plan
from hpcresume.run.directory import RunDir
from hpcresume.run.manifest import Manifest

PIPELINE = """
import os, pathlib, signal
import hpcresume as hr

def process(line: str):
    killed = pathlib.Path("killed")
    if line == "kill" and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return hr.Failed("bad", retry=False) if line == "bad" else line

pipeline = hr.Pipeline(name="lines", sources=hr.lines("lines.txt"), stages=[process])
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A directory that holds pipeline.py and its input, as the current one."""
    (tmp_path / "pipeline.py").write_text(PIPELINE)
    (tmp_path / "lines.txt").write_text("bad\nkill\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPCRESUME_TASK__LOCAL_DIR", str(tmp_path))
    monkeypatch.setenv("HPCRESUME_TASK__ENGINE", "inline")
    return tmp_path


def planned(run: RunDir) -> list[tuple[int, float, str]]:
    """Return of each round the tries, the interval, and the array that was asked for."""
    footers = [open_plan(run, number).footer for number in run.rounds()]
    return [
        (
            footer.settings["run"]["max_attempts"],
            footer.settings["sync"]["max_age_s"],
            f"{footer.launch.array}%{footer.launch.throttle}",
        )
        for footer in footers
    ]


@pytest.mark.parametrize(("again", "sources"), [("pipeline.py", 3), ("run", 2)])
def test_flags_hold_for_the_rounds_of_their_command(written, hpcresume, again, sources):
    """
    The round that follows a driver's death has them; a later submit has the settings' own
    values, but the array as before, and of a run directory where it ran.  Only the pipeline
    is asked for its sources again.
    """
    where = ("--run-dir", "run", "--cluster", "local")
    flags = ("--max-attempts", "7", "--sync-interval", "3", "--array", "2%1")
    first = hpcresume("submit", "pipeline.py", *where, *flags)
    run = RunDir.open(str(written / "run"))
    assert (1, [(7, 3.0, "2%1")] * 2) == (first.exit_code, planned(run)), first.stderr

    with (written / "lines.txt").open("a") as file:
        file.write("b\n")
    more = where if again == "pipeline.py" else ()
    later = hpcresume("submit", again, *more, "--retry-quarantined")

    assert (1, (3, 60.0, "2%1")) == (later.exit_code, planned(run)[-1]), later.stderr
    assert "local" == newest_plan(run).footer.launch.cluster
    assert sources == Manifest.open(run).total


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.json", json.dumps({"n": 2, "root": "data", "words": ["a"]})),
        ("p.toml", 'n = 2\nroot = "data"\nwords = ["a"]\n'),
    ],
)
def test_parameters_are_read_from_json_and_toml(written, hpcresume, name, text):
    """They are converted by their annotations like those of -P, which count over the file's."""
    (written / "pipeline.py").write_text(
        "from pathlib import Path\n"
        "import hpcresume as hr\n"
        "def pipeline(n: int, root: Path, words: list[str], more: int = 0):\n"
        "    sources = [f'{n + 1} {root / \"x\"} {words} {more + 1}']\n"
        "    return hr.Pipeline(name='p', sources=sources, stages=[str])\n"
    )
    (written / name).write_text(text)
    result = hpcresume("submit", "pipeline.py", "--params", name, "-P", "n=4", "-P", "more=5",
                       "--cluster", "local", "--collect", "out.jsonl")  # fmt: skip

    assert 0 == result.exit_code, result.stderr
    assert f"5 {Path('data/x')} ['a'] 6" == json.loads((written / "out.jsonl").read_text())
