"""Nodes on which nothing can start: found out in seconds, charged to nobody, avoided."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcresume.testbed.state import load
from tests.support.cli import Command, logs_of
from tests.support.cluster import SlurmCluster
from tests.support.pipelines import fan_result, write_fan

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(420)]


@contextlib.contextmanager
def read_only(cluster: SlurmCluster, path: Path | str, *nodes: str) -> Iterator[None]:
    """Make a mount of some nodes read-only, as a disk does that has failed."""
    pids = {daemon.name: daemon.pid for daemon in _daemons(cluster)}

    def remount(node: str, options: str) -> None:
        enter = ["nsenter", "--mount", f"--target={pids[f'slurmd-{node}']}"]
        subprocess.run([*enter, "mount", "-o", options, str(path)], check=True)

    bind = "bind," if str(path) == str(cluster.scratch) else ""
    for node in nodes:
        remount(node, f"remount,{bind}ro")
    try:
        yield
    finally:
        for node in nodes:
            remount(node, f"remount,{bind}rw")


def _daemons(cluster: SlurmCluster) -> list[Any]:
    state = load(cluster.directory)
    assert state is not None
    return list(state.daemons)


def submit(
    cluster: SlurmCluster, *options: str, env: dict[str, str] | None = None, **params: object
) -> tuple[Command, Path]:
    """Submit the fan-out pipeline from a fresh directory and return the command and the run."""
    directory = cluster.folder("run")
    write_fan(directory)
    command = Command(directory, {**cluster.env, **(env or {})})
    given = [f"-P{key}={value}" for key, value in params.items()]
    command.run(
        *("submit", "fan.py", "--run-dir", "run", "--local-dir", str(cluster.scratch)),
        *given,
        *options,
    )
    return command, directory / "run"


def collected(command: Command, run: Path) -> bytes:
    """Return the run's results."""
    command.run("collect", str(run), "-o", "out.jsonl")
    return (command.directory / "out.jsonl").read_bytes()


def attempts(run: Path) -> list[dict[str, Any]]:
    """Return what every attempt recorded of itself, with its outcome; in order of rounds."""
    found = []
    for path in sorted(run.glob("rounds/*/tasks/*/e*")):
        info = json.loads((path / "attempt.json").read_bytes())
        outcome = path / "outcome.json"
        ended = json.loads(outcome.read_bytes()) if outcome.exists() else {}
        found.append({"round": int(path.parts[-4]), **info, **ended})
    return found


def test_a_node_with_a_failed_disk_takes_one_task(slurm_cluster: SlurmCluster) -> None:
    """
    The first attempt on a node whose disk is read-only says so within seconds, charges no
    source, and takes the node out of the array: no second task starts there, in this round or
    in the next, and the run completes.
    """
    bad = slurm_cluster.nodes[0]
    with read_only(slurm_cluster, slurm_cluster.scratch, bad):
        command, run = submit(
            *(slurm_cluster, "--array", "8", "-c", "2", "--engine", "inline"),
            env={"HPCRESUME_TASK__BACKOFF_S": "8"},
            ms=50,
        )
        status = command.wait_ended(run)

    found = [a for a in attempts(run) if a["node"] == bad]
    assert 1 == len(found), f"{attempts(run)}\n{logs_of(run)}"
    (broken,) = found
    assert ("broken", "storage", 0) == (broken["state"], broken["kind"], broken["completed"])
    assert "Read-only file system" in broken["reason"]
    assert broken["elapsed_s"] < 8
    assert f"keep away from {bad}" in logs_of(run)
    assert ("complete", 2) == (status["state"], len(status["rounds"])), logs_of(run)
    assert [] == command.json("failures", str(run))["failures"]
    assert f"#SBATCH --exclude={bad}" in (run / "rounds/0001/submit/job.sh").read_text()
    assert fan_result() == collected(command, run)


@pytest.mark.ray
def test_a_node_on_which_ray_cannot_start(slurm_cluster: SlurmCluster) -> None:
    """Without shared memory the attempt ends before Ray is started, with the reason."""
    bad = slurm_cluster.nodes[0]
    with read_only(slurm_cluster, "/dev/shm", bad):
        command, run = submit(slurm_cluster, "--array", "2", "-c", "2", ms=0)
        status = command.wait_ended(run)

    (broken,) = [a for a in attempts(run) if a["node"] == bad]
    assert "broken" == broken["state"]
    assert "/dev/shm cannot be used: Read-only file system" in broken["reason"]
    assert broken["elapsed_s"] < 10
    assert "complete" == status["state"], logs_of(run)
    assert bad not in {a["node"] for a in attempts(run) if a["round"] > 0}
    assert fan_result() == collected(command, run)


def test_all_nodes_bad_stops_the_run(slurm_cluster: SlurmCluster) -> None:
    """
    Where no node is better than another none is left out; each attempt holds its node for
    the back-off, and after two rounds without a completion the run stops with the reason.
    """
    with read_only(slurm_cluster, slurm_cluster.scratch, *slurm_cluster.nodes):
        command, run = submit(slurm_cluster, "--array", "5", "-c", "2", "--engine", "inline", ms=0)
        status = command.wait_ended(run)

    assert ("stopped", 2) == (status["state"], len(status["rounds"])), logs_of(run)
    assert "2 rounds in a row completed nothing" in status["reason"]
    assert "Read-only file system" in status["reason"]
    assert 10 == len(attempts(run))
    assert "this node is held for" in logs_of(run)
    assert [] == command.json("failures", str(run))["failures"]

    command.run("submit", str(run))
    assert "complete" == command.wait_ended(run)["state"]
    assert fan_result() == collected(command, run)


def test_a_node_without_the_run_directory(slurm_cluster: SlurmCluster) -> None:
    """
    A node without the shared file system leaves no attempt behind; Slurm knows where the
    element failed, and the next round leaves that node out.  (The merge job is kept off it.)
    """
    bad = slurm_cluster.nodes[0]
    directory = slurm_cluster.folder("mount")
    write_fan(directory)
    own = ["nsenter", "--mount", f"--target={_pid(slurm_cluster, bad)}"]
    merge = {"HPCRESUME_MERGE__EXTRA": f"--exclude={bad}"}
    command, run = Command(directory, {**slurm_cluster.env, **merge}), directory / "run"
    subprocess.run([*own, "mount", "-t", "tmpfs", "-o", "ro", "none", directory], check=True)
    try:
        command.run(
            *("submit", "fan.py", "--run-dir", "run", "--array", "4", "-c", "2", "-Pms=0"),
            *("--engine", "inline", "--local-dir", str(slurm_cluster.scratch)),
        )
        status = command.wait_ended(run)
    finally:
        subprocess.run([*own, "umount", directory], check=True)

    assert ("complete", 2) == (status["state"], len(status["rounds"])), logs_of(run)
    assert bad not in {a["node"] for a in attempts(run)}
    assert f"#SBATCH --exclude={bad}" in (run / "rounds/0001/submit/job.sh").read_text()
    assert fan_result() == collected(command, run)


def _pid(cluster: SlurmCluster, node: str) -> int:
    return next(int(d.pid) for d in _daemons(cluster) if d.name == f"slurmd-{node}")
