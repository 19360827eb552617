"""Time limits on a real Slurm: hit, raised, lowered, too short for a source."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hpcresume.slurm import update
from tests.support.cli import Command, logs_of, wait_until
from tests.support.cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(420)]

PIPELINE = '''
import json
import os
import time
from pathlib import Path

import hpcresume as hr


def pipeline(plan: Path) -> hr.Pipeline:
    """Sources that take the seconds, and have the weight, that a file says.

    Every start is written down.  A source without seconds ends when a file named after it
    appears.
    """

    def sources():
        for name, (seconds, weight) in json.loads(plan.read_text()).items():
            yield hr.Source(name, payload=[name, seconds], weight=weight)

    def work(item):
        name, seconds = item
        fd = os.open(f"{plan}.starts", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, name.encode() + b"\\n")
        os.close(fd)
        if seconds is None:
            while not os.path.exists(f"{plan}.{name}"):
                time.sleep(0.1)
        else:
            time.sleep(seconds)
        return {"name": name}

    return hr.Pipeline(name="timed", sources=sources, stages=[work])
'''


class Timed:
    """A run of sources of known duration."""

    def __init__(
        self,
        cluster: SlurmCluster,
        plan: dict[str, tuple[float | None, float]],
        *options: str,
        drain_s: float = 3,
        engine: str = "inline",
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Submit it; the drain budget decides how long before its limit a task stops."""
        self.cluster, self.directory = cluster, cluster.folder("timed")
        (self.directory / "timed.py").write_text(PIPELINE)
        self.plan, self.names = self.directory / "plan.json", list(plan)
        self.plan.write_text(json.dumps(plan))
        self.run = self.directory / "run"
        settings = {"HPCRESUME_TASK__DRAIN_S": str(drain_s), **(env or {})}
        self.command = Command(self.directory, {**cluster.env, **settings})
        self.command.run(
            *("submit", "timed.py", "--run-dir", "run", "--sync-interval", "1", "-c", "1"),
            *("-P", f"plan={self.plan}", "--local-dir", str(cluster.scratch)),
            *("--engine", engine, *options),
        )

    @property
    def array(self) -> str:
        """The id of the first round's job array."""
        return str(self.command.status(self.run)["rounds"][0]["job_id"])

    def starts(self) -> list[str]:
        """Return the sources in the order in which they were started, again if so."""
        path = Path(f"{self.plan}.starts")
        return path.read_text().split() if path.exists() else []

    def wait_published(self) -> None:
        """Wait until something has been published."""
        wait_until(
            lambda: self.command.status(self.run)["sources"]["completed"],
            timeout_s=120,
            describe=self.evidence,
        )

    def evidence(self) -> str:
        """Return what there is to be seen."""
        return self.cluster.evidence() + logs_of(self.run)

    def set_limit(self, minutes: int) -> None:
        """Change the time limit of the first array task."""
        fields = [f"JobId={self.array}_0", f"TimeLimit={minutes}"]
        update(fields, conf=self.cluster.conf)

    def ended(self) -> dict[str, Any]:
        """Wait for the end of the run and return its status."""
        return self.command.wait_ended(self.run, timeout_s=300)

    def outcomes(self, task: int = 0, round_: int = 0) -> list[dict[str, Any]]:
        """Return how the attempts of a task ended, oldest first."""
        pattern = f"rounds/{round_:04d}/tasks/{task:05d}/e*/outcome.json"
        return [json.loads(path.read_bytes()) for path in sorted(self.run.glob(pattern))]

    def rows(self) -> list[str]:
        """Return the names of the rows that are collected."""
        self.command.run("collect", str(self.run), "-o", "out.jsonl")
        lines = (self.directory / "out.jsonl").read_text().splitlines()
        return [json.loads(line)["name"] for line in lines]

    def failures(self) -> list[Any]:
        """Return the sources that somebody was charged for."""
        found: list[Any] = self.command.json("failures", str(self.run))["failures"]
        return found


def equal(count: int, seconds: float) -> dict[str, tuple[float | None, float]]:
    """Return sources that take equally long."""
    return {f"s{i}": (seconds, 1.0) for i in range(count)}


@pytest.mark.parametrize(
    ("engine", "minutes", "drain_s", "seconds"),
    [
        pytest.param("inline", 1, 40, 0.6, id="inline"),
        # A Ray head may take half a minute to come up.
        pytest.param("ray", 2, 70, 2.0, id="ray", marks=[pytest.mark.slow, pytest.mark.ray]),
    ],
)
def test_time_limit(
    slurm_cluster: SlurmCluster, engine: str, minutes: int, drain_s: float, seconds: float
) -> None:
    """
    Near its time limit a task stops taking sources, publishes and requeues exactly itself,
    not its neighbour; no source is charged and every row is there once.
    """
    plan = {**equal(30, seconds), **{f"quick{i}": (0.0, 1.0) for i in range(30)}}
    limits = ["--array", "2", "-t", str(minutes)]
    timed = Timed(slurm_cluster, plan, *limits, drain_s=drain_s, engine=engine)

    status = timed.ended()

    outcomes = timed.outcomes()
    assert {("saved", "time-limit")} == {(o["state"], o["kind"]) for o in outcomes[:-1]}
    assert all(o["elapsed_s"] < 60 * minutes and o["completed"] for o in outcomes[:-1])
    assert len(outcomes) > 1
    assert "done" == outcomes[-1]["state"]
    assert ["done"] == [o["state"] for o in timed.outcomes(task=1)]
    assert ("complete", 1) == (status["state"], len(status["rounds"]))
    assert [] == timed.failures()
    assert timed.names == timed.rows()


def test_limit_raised(slurm_cluster: SlurmCluster) -> None:
    """A limit that is raised in the middle is used: the task does not stop near the old one."""
    timed = Timed(slurm_cluster, equal(45, 0.6), "-t", "1", drain_s=30)
    timed.wait_published()
    timed.set_limit(10)

    status = timed.ended()

    (outcome,) = timed.outcomes()
    # 36 s before the end of the first limit would have been 24 s.
    assert ("done", 45) == (outcome["state"], outcome["completed"])
    assert outcome["elapsed_s"] > 45 * 0.6
    assert "complete" == status["state"]


@pytest.mark.slow
def test_limit_lowered(slurm_cluster: SlurmCluster) -> None:
    """
    A limit that is lowered in the middle is honoured: the task drains before the new one
    ends it, and nothing that it committed is lost.
    """
    timed = Timed(slurm_cluster, equal(110, 0.5), "-t", "10", drain_s=10)
    timed.wait_published()
    timed.set_limit(1)

    status = timed.ended()

    first, *_, last = timed.outcomes()
    assert ("saved", "time-limit", "done") == (first["state"], first["kind"], last["state"])
    assert first["elapsed_s"] < 60
    assert ("complete", 1) == (status["state"], len(status["rounds"]))
    assert sorted(timed.names) == sorted(timed.starts())
    assert timed.names == timed.rows()


def test_a_source_that_would_not_finish_is_not_started(slurm_cluster: SlurmCluster) -> None:
    """
    With little time left only sources are started that are expected to finish, from what
    others took and from their weights; the others get a fresh attempt, and are started once.
    """
    # By its weight it takes 75 s, which no attempt under this limit has left.
    plan = {"long": (10.0, 150.0), **equal(20, 0.5)}
    plan = {"s": (0.5, 1.0), **plan}
    timed = Timed(slurm_cluster, plan, "-t", "1")

    status = timed.ended()

    first, second = timed.outcomes()
    assert ("saved", "time-limit", 21) == (first["state"], first["kind"], first["completed"])
    assert ("done", 1) == (second["state"], second["completed"])
    assert first["elapsed_s"] < 45
    assert sorted(timed.names) == sorted(timed.starts())
    assert "long" == timed.starts()[-1]
    assert ("complete", 1) == (status["state"], len(status["rounds"]))


@pytest.mark.slow
def test_a_source_longer_than_the_limit(slurm_cluster: SlurmCluster) -> None:
    """
    A source that runs for a whole time limit and is not finished is not tried again under
    this limit, and not charged: the run stops and names it, and goes on with a longer limit.
    """
    timed = Timed(
        slurm_cluster, {"endless": (None, 1.0), "short": (0.1, 1.0)}, "-t", "1", drain_s=40
    )

    status = timed.ended()

    assert "stopped" == status["state"]
    assert "1 source needs longer than the time limit" in status["reason"]
    assert "'endless' (" in status["reason"]
    assert 1 == status["sources"]["completed"]
    assert 1 == timed.starts().count("endless")
    assert [] == timed.failures()
    timed.command.run("status", str(timed.run), "--watch", rc=1)

    Path(f"{timed.plan}.endless").touch()
    timed.command.run("submit", str(timed.run), "-t", "5", "--wait")

    assert 2 == timed.starts().count("endless")
    assert timed.names == timed.rows()


SIGNALLED = """#!/bin/sh
case "$*" in
    *submitit*) kill -USR2 $$ ;;
esac
exec {python} "$@"
"""


def test_a_signal_before_python_has_a_handler(slurm_cluster: SlurmCluster) -> None:
    """
    Under a limit shorter than its lead SIGUSR2 comes while Python starts; the attempt lives,
    and works until its limit is near.
    """
    wrapper = slurm_cluster.folder("python") / "python"
    wrapper.write_text(SIGNALLED.format(python=sys.executable))
    wrapper.chmod(0o755)
    timed = Timed(
        slurm_cluster, equal(4, 0.1), "-t", "2", env={"HPCRESUME_SITE__PYTHON": str(wrapper)}
    )

    status = timed.ended()

    assert [("done", 4)] == [(o["state"], o["completed"]) for o in timed.outcomes()]
    assert ("complete", 1) == (status["state"], len(status["rounds"]))


LEFT = '''
import hpcresume as hr


def pipeline() -> hr.Pipeline:
    """How long the second of two slow items may still take."""

    def left(i, ctx):
        import time

        while i and ctx.seconds_left() is None:
            time.sleep(0.1)
        return ctx.seconds_left() if i else 0

    return hr.Pipeline(name="left", sources=hr.indexed(2), stages=[left])
'''


def test_stages_know_their_time_limit(slurm_cluster: SlurmCluster) -> None:
    """`ctx.seconds_left()` is the rest of the array task's time limit."""
    directory = slurm_cluster.folder("left")
    (directory / "left.py").write_text(LEFT)
    command, run = Command(directory, slurm_cluster.env), directory / "run"
    command.run(
        *("submit", "left.py", "--run-dir", "run", "-t", "5", "--engine", "inline"),
        *("--local-dir", str(slurm_cluster.scratch)),
    )

    command.wait_ended(run)

    command.run("collect", str(run), "-o", "out.jsonl")
    first, second = (directory / "out.jsonl").read_text().split()
    assert "0" == first
    assert 200 < float(second) <= 300
