"""An attempt that dies at the named points of its start: nothing is lost, nothing stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcresume.run.directory import RunDir
from tests.support.cli import Command
from tests.support.pipelines import fan_result, write_fan


@pytest.mark.ray
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("failpoint", "engine"),
    [("supervisor.before_driver", "inline"), ("driver.after_ray_init", "ray")],
)
def test_death_while_starting(tmp_path: Path, failpoint: str, engine: str) -> None:
    """
    Killed there on every attempt, the run stops with the reason and charges nobody; without
    the fault the same command completes it; what the dead attempts left is swept.
    """
    write_fan(tmp_path)
    fault = {"HPCRESUME_TESTING": "1", "HPCRESUME_FAILPOINTS": f"{failpoint}=kill"}
    arguments = (
        *("submit", "fan.py", "--cluster", "local", "--run-dir", "run", "--engine", engine),
        *("--local-dir", str(tmp_path), "-P", "n=40", "-P", "ms=0"),
    )
    run = tmp_path / "run"

    Command(tmp_path, {**os.environ, **fault}).run(*arguments, rc=1)
    stopped = Command(tmp_path).status(run)
    left_behind = list(tmp_path.glob("hpcresume-*/*/*"))
    Command(tmp_path).run(*arguments, "--collect", "out.jsonl")

    assert ("stopped", 40) == (stopped["state"], stopped["sources"]["remaining"])
    assert "completed nothing" in stopped["reason"]
    assert [] == left_behind
    assert [] == Command(tmp_path).json("failures", str(run))["failures"]
    assert fan_result(40) == (tmp_path / "out.jsonl").read_bytes()
    assert [] == list(tmp_path.glob("hpcresume-*/*/*"))


@pytest.mark.timeout(200)
def test_a_refused_publication_after_the_drivers_death(tmp_path: Path) -> None:
    """
    The driver dies, and the file system refuses the publication after it once: it is tried
    again, and what was committed is published before the node-local directory is removed.
    """
    write_fan(tmp_path)
    faults = "ledger.after_commit=kill:4,segment.after_write=raise"
    fault = {"HPCRESUME_TESTING": "1", "HPCRESUME_FAILPOINTS": faults}
    arguments = (
        *("submit", "fan.py", "--cluster", "local", "--run-dir", "run", "--engine", "inline"),
        *("--local-dir", str(tmp_path), "-P", "n=12", "-P", "ms=60"),
    )

    Command(tmp_path, {**os.environ, **fault}).run(*arguments, rc=None)

    run = RunDir.open(str(tmp_path / "run"))
    (first,) = [ref for ref in run.attempts(0, 0) if ref.epoch == 1]
    outcome = run.outcome(first)
    assert outcome is not None
    assert "driver-died" == outcome.kind
    assert outcome.completed > 0
