"""Whole runs on a real Slurm: arrays, merge jobs, rounds, with nobody watching."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
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
    remainder and submits the next round by itself, and the result is right.
    """
    command, run = submit(each_cluster, "--array", "8", "-c", "2", ms=600)
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


def attempts_of(command: Command, run: Path) -> list[dict[str, object]]:
    """Return the outcomes of all attempts of task 0 in round 0, oldest first."""
    paths = sorted(run.glob("rounds/0000/tasks/00000/e*/outcome.json"))
    return [json.loads(path.read_bytes()) for path in paths]


def test_preemption_with_grace(slurm_cluster: SlurmCluster) -> None:
    """
    A preempted task drains and publishes within the grace period, requeues itself, and its
    next attempt continues; no source is charged and none runs in vain.
    """
    command, run = submit(slurm_cluster, "--array", "1", "-c", "2", ms=250)
    wait_until(
        lambda: completed_by(command, run, 0),
        timeout_s=120,
        describe=lambda: slurm_cluster.evidence() + logs_of(run),
    )
    array = command.status(run)["rounds"][0]["job_id"]
    slurm_cluster.preempt(f"{array}_0", hold_s=5)

    status = command.wait_ended(run)

    first, second = attempts_of(command, run)
    assert ("saved", "terminated") == (first["state"], first["kind"])
    assert "done" == second["state"]
    assert "complete" == status["state"]
    assert 1 == len(status["rounds"])
    assert 200 == first["completed"] + second["completed"]
    assert [] == command.json("failures", str(run))["failures"]
    assert fan_result() == collected(command, run)


def test_cancelled_element_stays_out(slurm_cluster: SlurmCluster) -> None:
    """
    scancel of one element means stop: it publishes what it has, the merge job reports its
    shard and leaves it out, and submitting by hand takes it up again.
    """
    command, run = submit(slurm_cluster, "--array", "2", "-c", "2", ms=400)
    wait_until(
        lambda: completed_by(command, run, 1),
        timeout_s=120,
        describe=lambda: slurm_cluster.evidence() + logs_of(run),
    )
    array = command.status(run)["rounds"][0]["job_id"]
    slurm_cluster.run("scancel", f"{array}_1")

    stopped = command.wait_ended(run)
    command.run("submit", str(run))
    ended = command.wait_ended(run)

    assert "stopped" == stopped["state"]
    assert "were cancelled" in stopped["reason"]
    assert 100 < stopped["sources"]["completed"] < 200
    assert ("complete", 2) == (ended["state"], len(ended["rounds"]))
    assert fan_result() == collected(command, run)


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


def node_of(run: Path, attempt: int) -> str:
    """Return the node that an attempt of task 0 in round 0 runs on."""
    path = run / f"rounds/0000/tasks/00000/e{attempt:03d}/attempt.json"
    return str(json.loads(path.read_bytes())["node"])


def has_attempt(run: Path, attempt: int) -> bool:
    """Tell whether task 0 of round 0 has had so many attempts."""
    return (run / f"rounds/0000/tasks/00000/e{attempt:03d}/attempt.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("frozen", [False, True], ids=["alive", "frozen"])
def test_node_failure_with_a_zombie(slurm_cluster: SlurmCluster, frozen: bool) -> None:
    """
    After the death of a slurmd the task runs elsewhere while its old attempt is still alive,
    or is frozen and thawed after the run ended: the result holds every row once, and the old
    attempt stops by itself.
    """
    command, run = submit(slurm_cluster, "--array", "1", "-c", "2", ms=1000)
    wait_until(
        lambda: completed_by(command, run, 0),
        timeout_s=120,
        describe=lambda: slurm_cluster.evidence() + logs_of(run),
    )
    old = psutil.Process(attempt_pids(run, 0, 0)[0])
    family = [*old.children(recursive=True), old]
    slurm_cluster.kill_node(node_of(run, 1))
    if frozen:
        for process in family:
            process.suspend()
    wait_until(
        lambda: has_attempt(run, 2),
        timeout_s=150,
        describe=lambda: slurm_cluster.evidence() + logs_of(run),
    )
    status = command.wait_ended(run, timeout_s=300)
    if frozen:
        for process in family:
            process.resume()
    wait_until(lambda: not old.is_running(), timeout_s=90, describe=lambda: logs_of(run))

    first, second = attempts_of(command, run)
    assert ("superseded", "done") == (first["state"], second["state"])
    assert "complete" == status["state"]
    assert fan_result() == collected(command, run)
    command.run("merge", str(run))
    assert fan_result() == collected(command, run)


HUNGRY = '''
import hpcresume as hr


def pipeline() -> hr.Pipeline:
    """Source 7 of 40 asks for more memory than the array task has."""

    def work(i):
        if i == 7:
            block = bytearray(4 << 30)
            block[:: 4096] = b"x" * len(block[:: 4096])
        return {"i": i}

    return hr.Pipeline(name="hungry", sources=hr.indexed(40), stages=[work])
'''


def test_out_of_memory_in_a_worker(cgroup_cluster: SlurmCluster) -> None:
    """
    The kernel takes the worker, not the supervisor: the guilty source alone is charged and
    ends quarantined, all others complete in the same attempt.
    """
    directory = cgroup_cluster.folder("oom")
    (directory / "hungry.py").write_text(HUNGRY)
    command, run = Command(directory, cgroup_cluster.env), directory / "run"
    command.run(
        *("submit", "hungry.py", "--run-dir", "run", "-c", "2", "--mem", "2000"),
        *("--local-dir", str(cgroup_cluster.scratch)),
    )

    status = command.wait_ended(run)

    (failure,) = command.json("failures", str(run))["failures"]
    assert ("incomplete", 39) == (status["state"], status["sources"]["completed"])
    assert ("7", "death", 3) == (failure["source"], failure["kind"], failure["attempts"])
    assert [1] == [task["attempt"] for task in status["tasks"]]
