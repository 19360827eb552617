"""Limits of a real Slurm: the shards are packed into what it takes, and the run completes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from hpcresume import slurm
from tests.support.cli import Command, attempt_pids, logs_of, wait_until
from tests.support.cluster import SlurmCluster
from tests.support.pipelines import fan_result, write_fan

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(420)]


@pytest.fixture
def limited(limited_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """Return that cluster, idle; it is cleared after the test."""
    yield limited_cluster
    limited_cluster.clear()
    allow_jobs(limited_cluster, 12)


def allow_jobs(cluster: SlurmCluster, count: int) -> None:
    """Let every user have so many jobs in the queue."""
    words = ["modify", "qos", "normal", "set", f"MaxSubmitJobsPerUser={count}"]
    slurm.change_accounting(words, conf=cluster.conf)


class Limited:
    """A run of 64 tasks on a cluster with limits."""

    def __init__(self, cluster: SlurmCluster, **env: str) -> None:
        self.cluster, directory = cluster, cluster.folder("limits")
        write_fan(directory)
        self.command = Command(directory, {**cluster.env, **env})
        self.run = directory / "run"

    def submit(self, *options: str, array: int = 64, rc: int = 0) -> str:
        """Submit the fan-out pipeline and return what was said about it."""
        process = self.command.start(
            *("submit", "fan.py", "--run-dir", "run", "--array", str(array), "-c", "1"),
            *("--engine", "inline", "--local-dir", str(self.cluster.scratch)),
            *options,
        )
        _, said = process.communicate(timeout=120)
        assert rc == process.returncode, said
        return said

    def kill_first_task(self) -> None:
        """Kill the supervisor of task 0 in the round that was submitted."""
        round_ = self.command.status(self.run)["rounds"][-1]["round"]
        (pid,) = wait_until(
            lambda: attempt_pids(self.run, round_, 0),
            timeout_s=60,
            describe=lambda: self.cluster.evidence() + logs_of(self.run),
        )
        os.kill(pid, signal.SIGKILL)

    def tasks(self) -> list[int]:
        """Wait for the end of the run, which must be complete; return the tasks of each round."""
        status = self.command.wait_ended(self.run)
        assert "complete" == status["state"], f"{status}\n{logs_of(self.run)}"
        self.command.run("collect", str(self.run), "-o", "out.jsonl")
        assert fan_result() == (self.run.parent / "out.jsonl").read_bytes()
        return [r["tasks"] for r in status["rounds"] if r["job_id"]]


@pytest.mark.parametrize(("array", "tasks"), [(64, 8), (1, 1)])
def test_an_array_is_no_larger_than_slurm_takes(
    limited: SlurmCluster, array: int, tasks: int
) -> None:
    """MaxArraySize is asked of the live Slurm: 64 shards become an array of 8; one stays one."""
    run = Limited(limited)

    run.submit("-Pms=0", array=array)

    assert [tasks] == run.tasks()


@pytest.mark.parametrize("arrays", [True, False], ids=["array", "jobs"])
def test_a_submit_limit_that_no_site_file_knows(limited: SlurmCluster, *, arrays: bool) -> None:
    """
    A QOS lets a user have 4 jobs.  The refusal is looked up in the accounting, the round is
    dealt anew to leave room for the merge jobs, and what to write into the site file is said;
    the next round, which the merge job submits, fits as well.  Single jobs likewise, and those
    that were taken before the refusal are cancelled.
    """
    allow_jobs(limited, 4)
    site = {"HPCRESUME_SITE__ARRAYS": str(arrays).lower()}
    run = Limited(limited, HPCRESUME_RUN__MIN_TASK_S="0", **site)

    said = run.submit("-Pms=30")
    run.kill_first_task()

    assert "QOS normal takes 4 jobs" in said
    assert "site.max_submit = 4" in said
    assert [2, 2] == run.tasks()


def test_a_limit_that_leaves_no_room_is_an_error(limited: SlurmCluster) -> None:
    """
    Where other jobs of the user fill the queue the submission is refused with the limit and
    what to do, nothing of it stays in the queue, and the same command works later.
    """
    allow_jobs(limited, 4)
    sleeping = ["--array=0-2", f"--chdir={limited.root}", "--output=/dev/null", "--wrap=sleep 600"]
    others = limited.run_as_user("sbatch", "--parsable", *sleeping)
    run = Limited(limited)

    said = run.submit(rc=32)

    assert "QOS normal takes 4 jobs, 3 are queued" in said
    assert "hpcresume drive" in said
    left = {entry.array_job_id for entry in limited.jobs() if not entry.ended}
    assert {others} == left

    slurm.cancel([others], conf=limited.conf)
    limited.wait_ended(others)
    run.submit()
    assert [2] == run.tasks()
