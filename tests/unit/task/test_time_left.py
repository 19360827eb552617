"""How long a task has left: by Slurm's durations, so that no clock of ours decides it."""

from __future__ import annotations

import time

import pytest

from hpcresume.slurm import JobId, JobInfo
from hpcresume.task.allocation import _time_left


def job(**values: float | None) -> JobInfo:
    return JobInfo(JobId("7_0"), "RUNNING", **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "left_s"),
    [
        pytest.param({"time_limit_s": 3600.0}, 3500.0, id="limit"),
        pytest.param({"time_limit_s": 600.0, "end_time": 1600.0}, 500.0, id="lowered-limit"),
        pytest.param({"time_limit_s": 3600.0, "end_time": 1130.0}, 30.0, id="grace-period"),
        pytest.param({"time_limit_s": 3600.0, "end_time": 4900.0}, 3500.0, id="was-suspended"),
        pytest.param({"time_limit_s": None}, 3500.0, id="limit-not-told"),
        pytest.param({"end_time": None, "time_limit_s": None}, None, id="no-limit"),
    ],
)
def test_time_left(said, left_s, monkeypatch) -> None:
    """100 s into a job that began at 1000: what is left, wherever the node's clock stands."""
    monkeypatch.setattr(time, "time", lambda: 1e9)
    known = {"start_time": 1000.0, "end_time": 4600.0, "run_time_s": 100.0, **said}
    assert left_s == _time_left(job(**known))


def test_without_durations_the_clock_is_asked(monkeypatch) -> None:
    """A record that lacks the time a job ran is all that the end is compared with."""
    monkeypatch.setattr(time, "time", lambda: 4000.0)
    assert 600.0 == _time_left(job(start_time=1000.0, end_time=4600.0))
