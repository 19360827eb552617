"""Whole runs on a real Slurm: arrays, merge jobs, rounds, with nobody watching."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.support.cli import Command, attempt_pids, logs_of, wait_until
from tests.support.cluster import SlurmCluster
from tests.support.pipelines import fan_result, write_fan

pytestmark = [pytest.mark.slurm, pytest.mark.ray, pytest.mark.timeout(420)]


def submit(cluster: SlurmCluster, *options: str, **params: object) -> tuple[Command, Path]:
    """Submit the fan-out pipeline from a fresh directory and return the command and the run."""
    directory = cluster.folder("run")
    write_fan(directory)
    command = Command(directory, cluster.env)
    given = [f"-P{key}={value}" for key, value in params.items()]
    command.run(
        *("submit", "fan.py", "--run-dir", "run", "--sync-interval", "1"),
        *("--local-dir", str(cluster.scratch), *given, *options),
    )
    return command, directory / "run"


def collected(command: Command, run: Path) -> bytes:
    """Return the run's results."""
    command.run("collect", str(run), "-o", "out.jsonl")
    return (command.directory / "out.jsonl").read_bytes()


def completed_by(command: Command, run: Path, task: int) -> int:
    """Return how many sources a task of round 0 has published."""
    tasks = command.status(run)["tasks"]
    return max((t["completed"] for t in tasks if (t["round"], t["task"]) == (0, task)), default=0)


def test_two_tasks_killed(each_cluster: SlurmCluster) -> None:
    """
    Of 8 array tasks on 4 nodes with private scratch two are killed; the merge job finds the
    remainder and submits the next round by itself, and the result is right.  When all is
    done the merge job tells the command of --on-end, once.
    """
    on_end = ("--on-end", "sh -c 'cat >> ended.json'")
    command, run = submit(each_cluster, "--array", "8", "-c", "2", *on_end, ms=600)
    for task in (0, 1):
        wait_until(
            lambda task=task: completed_by(command, run, task),
            timeout_s=120,
            describe=lambda: each_cluster.evidence() + logs_of(run),
        )
        os.kill(attempt_pids(run, 0, task)[-1], signal.SIGKILL)

    status = command.wait_ended(run)

    assert "complete" == status["state"], status
    assert 2 == len(status["rounds"]), status
    assert fan_result() == collected(command, run)
    ended = command.directory / "ended.json"
    wait_until(
        lambda: ended.exists() and ended.read_text().endswith("}"),
        timeout_s=60,
        describe=lambda: logs_of(run),
    )
    told = json.loads(ended.read_text())
    assert ("complete", status["sources"]) == (told["state"], told["sources"])


@pytest.mark.parametrize(
    ("setting", "tasks"),
    [("MAX_ARRAY_SIZE=3", 3), ("MAX_SUBMIT=4", 2), ("ARRAYS=false", 4)],
)
def test_shards_are_packed(slurm_cluster: SlurmCluster, setting: str, tasks: int) -> None:
    """Where the site takes fewer elements than asked for, or no arrays, the run completes."""
    name, _, value = setting.partition("=")
    directory = slurm_cluster.folder("packed")
    write_fan(directory)
    command = Command(directory, {**slurm_cluster.env, f"HPCRESUME_SITE__{name}": value})
    run = directory / "run"
    command.run(
        *("submit", "fan.py", "--run-dir", "run", "--array", "4", "-c", "1", "-P", "ms=0"),
        *("--engine", "inline", "--local-dir", str(slurm_cluster.scratch)),
    )

    status = command.wait_ended(run)

    assert ("complete", [tasks]) == (status["state"], [r["tasks"] for r in status["rounds"]])
    assert fan_result() == collected(command, run)
