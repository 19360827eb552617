"""An attempt that dies at the named points of its start: nothing is lost, nothing stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
