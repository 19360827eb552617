"""Runs of a user who is not root: own files, own jobs, own limits of what Slurm permits."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import pytest

from tests.support.cli import attempt_pids, logs_of, wait_until
from tests.support.cluster import SlurmCluster, cluster
from tests.support.ordinary import NOBODY, OrdinaryCommand, open_nodes
from tests.support.pipelines import fan_result, write_fan

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes as another user"),
]


@pytest.fixture(scope="module")
def users_cluster() -> Iterator[SlurmCluster]:
    """Return a cluster whose nodes start Python for ordinary users."""
    with cluster(nodes=2, accounting=False) as made:
        open_nodes(made)
        yield made


class UsersRun:
    """A run that an ordinary user has submitted."""

    def __init__(self, cluster: SlurmCluster, *options: str, ms: int) -> None:
        self.cluster, directory = cluster, cluster.folder("user")
        write_fan(directory)
        self.command = OrdinaryCommand(directory, cluster.env)
        self.path = directory / "run"
        self.command.run(
            *("submit", "fan.py", "--run-dir", "run", "-c", "2", "--engine", "inline"),
            *("--sync-interval", "1", "--local-dir", str(cluster.scratch), f"-Pms={ms}"),
            *options,
        )

    def wait_begun(self) -> None:
        """Wait until task 0 has published something."""
        wait_until(
            lambda: [t for t in self.status()["tasks"] if t["task"] == 0 and t["completed"]],
            timeout_s=90,
            describe=lambda: self.cluster.evidence() + logs_of(self.path),
        )

    def status(self):
        """Return the run's status."""
        return self.command.status(self.path)

    def assert_right(self) -> None:
        """Wait for the end; every row must be there, and every file the user's own."""
        status = self.command.wait_ended(self.path)
        assert "complete" == status["state"], f"{status}\n{logs_of(self.path)}"
        self.command.run("collect", str(self.path), "-o", "out.jsonl")
        assert fan_result() == (self.path.parent / "out.jsonl").read_bytes()
        owners = {path.lstat().st_uid for path in [self.path, *self.path.rglob("*")]}
        assert {NOBODY.pw_uid} == owners

    def outcomes(self) -> list[dict[str, object]]:
        """Return how the attempts of task 0 in round 0 ended."""
        paths = sorted(self.path.glob("rounds/0000/tasks/00000/e*/outcome.json"))
        return [json.loads(path.read_bytes()) for path in paths]


def test_a_killed_task(users_cluster: SlurmCluster) -> None:
    """The merge job of an ordinary user submits the next round, as that user."""
    run = UsersRun(users_cluster, "--array", "2", ms=30)
    run.wait_begun()

    os.kill(attempt_pids(run.path, 0, 0)[-1], signal.SIGKILL)

    run.assert_right()
    assert 2 == len(run.status()["rounds"])


def test_a_preempted_task(users_cluster: SlurmCluster) -> None:
    """An ordinary user's task may requeue its own element, and goes on where it stopped."""
    run = UsersRun(users_cluster, ms=100)
    run.wait_begun()

    users_cluster.preempt(f"{run.status()['rounds'][0]['job_id']}_0", hold_s=5)

    run.assert_right()
    first, second = run.outcomes()
    assert ("saved", "done") == (first["state"], second["state"])
    assert 1 == len(run.status()["rounds"])


def test_a_private_run_directory(users_cluster: SlurmCluster) -> None:
    """Nobody else can read a run, and a directory that the user may not write is refused."""
    run = UsersRun(users_cluster, ms=0)
    run.assert_right()
    assert 0 == run.path.stat().st_mode & 0o077

    closed = users_cluster.folder("closed")
    closed.chmod(0o755)
    refused = run.command.start("submit", "fan.py", "--run-dir", str(closed / "run"))
    _, said = refused.communicate(timeout=60)
    assert 16 == refused.returncode, said
    assert str(closed / "run") in said
