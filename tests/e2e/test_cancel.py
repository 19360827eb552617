"""Cancelling: elements and arrays by ``scancel``, whole runs by ``hpcresume cancel``."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from hpcresume.run.directory import RunDir
from tests.support.cluster import SlurmCluster
from tests.support.slurm_runs import SlurmRun

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(420)]


def settled(run: SlurmRun) -> tuple[str, int]:
    """Wait for the run's end; return its state and its number of rounds."""
    status = run.wait_ended()
    return status["state"], len(status["rounds"])


def hold_nodes(cluster: SlurmCluster) -> None:
    """Let nothing start until the nodes are resumed."""
    for node in cluster.nodes:
        cluster.drain(node)


def release_nodes(cluster: SlurmCluster) -> None:
    """Let jobs start again."""
    for node in cluster.nodes:
        cluster.resume(node)


@pytest.mark.parametrize("options", [(), ("-s", "KILL")], ids=["plain", "kill"])
def test_one_element(slurm_cluster: SlurmCluster, options: tuple[str, ...]) -> None:
    """
    scancel of a running element, with SIGKILL or without, means stop: it publishes what it
    can, the merge job reports its shard and leaves it out, and `submit RUN` takes it up.
    """
    run = SlurmRun.submit(slurm_cluster, "--array", "2", sources=80)
    published = run.wait_published(1)
    slurm_cluster.run("scancel", *options, f"{run.array}_1")

    stopped = run.wait_ended()
    before = run.executed()
    run.command.run("submit", str(run.path))
    ended = settled(run)

    assert ("stopped", 1) == (stopped["state"], len(stopped["rounds"]))
    assert "were cancelled" in stopped["reason"]
    assert 40 + published <= stopped["sources"]["completed"] < 80
    assert "of cancelled array tasks stay out" in run.merge_log()
    assert ["finished", "cancelled"] == [run.outcomes(task)[0]["kind"] for task in (0, 1)]
    assert ("complete", 2) == ended
    assert 1 >= sum(run.executions().values()) - 80, (before, run.executed())
    assert run.is_right()


def test_whole_array(slurm_cluster: SlurmCluster) -> None:
    """
    scancel of an array stops its running element and those that wait; all shards stay out
    until the run is submitted again.
    """
    run = SlurmRun.submit(slurm_cluster, "--array", "3%1", sources=60)
    published = run.wait_published()
    slurm_cluster.run("scancel", run.array)

    stopped = run.wait_ended()
    run.command.run("submit", str(run.path))

    assert ("stopped", 1) == (stopped["state"], len(stopped["rounds"]))
    assert published <= stopped["sources"]["completed"] < 20
    assert ("complete", 2) == settled(run)
    assert run.is_right()


def test_element_that_never_ran(slurm_cluster: SlurmCluster) -> None:
    """
    An element that is cancelled while it waits is forgotten by Slurm at once; its shard
    stays out all the same, and the other elements complete.
    """
    run = SlurmRun.submit(slurm_cluster, "--array", "3%1", sources=30, ms=700)
    run.wait_published()
    array = run.array
    slurm_cluster.run("scancel", f"{array}_2")

    stopped = run.wait_ended()
    known = {entry.array_task for entry in slurm_cluster.queue(array)}
    run.command.run("submit", str(run.path))

    assert {0, 1} == known
    assert ("stopped", 20) == (stopped["state"], stopped["sources"]["completed"])
    assert ("complete", 2) == settled(run)
    assert {1} == set(run.executions().values())
    assert run.is_right()


@contextlib.contextmanager
def forgetful(cluster: SlurmCluster) -> Iterator[None]:
    """Make slurmctld forget ended jobs within seconds, as it does after minutes."""
    text = cluster.conf.read_text()
    cluster.conf.write_text(f"{text}MinJobAge=2\n")
    cluster.run("scontrol", "reconfigure")
    try:
        yield
    finally:
        cluster.conf.write_text(text)
        cluster.run("scontrol", "reconfigure")


def test_elements_that_squeue_has_forgotten(slurm_cluster: SlurmCluster) -> None:
    """A merge job that starts after Slurm has forgotten the array asks the accounting."""
    run = SlurmRun.submit(slurm_cluster, "--array", "3%2", sources=60)
    array, merge = run.array, run.record()["merge"]
    slurm_cluster.run("scontrol", "hold", merge)
    run.wait_published(1)
    slurm_cluster.run("scancel", f"{array}_1", f"{array}_2")
    run.wait(lambda: run.has_ended(1, task=0) and run.has_ended(1, task=1), "both have ended")
    with forgetful(slurm_cluster):
        run.wait(lambda: slurm_cluster.queue(array) == [], "squeue has forgotten the array")
        slurm_cluster.run("scontrol", "release", merge)
        stopped = run.wait_ended()

    assert ("stopped", 1) == (stopped["state"], len(stopped["rounds"]))
    assert 20 < stopped["sources"]["completed"] < 40
    run.command.run("submit", str(run.path))
    assert ("complete", 2) == settled(run)
    assert run.is_right()


def test_element_that_waits_for_its_restart(slurm_cluster: SlurmCluster) -> None:
    """An element that requeued itself and is cancelled before it restarts stays out."""
    run = SlurmRun.submit(slurm_cluster)
    run.wait_published()
    slurm_cluster.preempt(f"{run.array}_0", hold_s=20)
    run.wait_log("requeued ")
    run.wait_state("PENDING")
    slurm_cluster.run("scancel", f"{run.array}_0")

    stopped = run.wait_ended()
    run.command.run("submit", str(run.path))

    assert ("stopped", 1) == (stopped["state"], len(stopped["rounds"]))
    assert ("complete", 2) == settled(run)
    assert {1} == set(run.executions().values())
    assert run.is_right()


def test_submitted_again_while_others_run(slurm_cluster: SlurmCluster) -> None:
    """
    `submit RUN` while other elements run takes back a cancellation: the merge that follows
    deals the cancelled shard anew.
    """
    run = SlurmRun.submit(slurm_cluster, "--array", "2", sources=80)
    run.wait_published(1)
    slurm_cluster.run("scancel", f"{run.array}_1")
    run.wait_state("CANCELLED", 1)
    run.command.run("submit", str(run.path))

    assert ("complete", 2) == settled(run)
    assert run.is_right()


def test_cancel_a_run(slurm_cluster: SlurmCluster) -> None:
    """
    `cancel` stops running and waiting elements, the merge job and its twin; what was
    committed is published.  A second one is harmless, and `submit RUN` goes on at once.
    """
    run = SlurmRun.submit(slurm_cluster, "--array", "3%1", sources=60, ms=600)
    published = run.wait_published()
    first = run.command.json("cancel", str(run.path))
    second = run.command.json("cancel", str(run.path))
    cancelled = run.status()
    run.command.run("submit", str(run.path))

    assert 3 == len(first["jobs"])
    assert set(second["jobs"]) <= set(first["jobs"])
    assert "cancelled" == cancelled["state"]
    assert ("complete", 2) == settled(run)
    # It may have read the mark before the signal came.
    assert run.outcomes()[0]["kind"] in {"cancelled", "stopped"}
    assert published <= run.outcomes()[0]["completed"]
    assert {1} == set(run.executions().values())
    assert run.is_right()


def test_cancel_before_anything_runs(slurm_cluster: SlurmCluster) -> None:
    """A run whose jobs all wait leaves the queue, and nothing of it was executed."""
    hold_nodes(slurm_cluster)
    run = SlurmRun.submit(slurm_cluster, "--array", "2", sources=4, ms=0)
    jobs = run.command.json("cancel", str(run.path))["jobs"]
    release_nodes(slurm_cluster)

    assert 3 == len(jobs)
    assert [["CANCELLED"]] * 3 == [list({e.state for e in slurm_cluster.queue(j)}) for j in jobs]
    assert [] == run.command.json("cancel", str(run.path))["jobs"]
    assert [] == run.executed()
    run.command.run("submit", str(run.path))
    assert ("complete", 2) == settled(run)
    assert run.is_right()


def failing(name: str, action: str) -> dict[str, str]:
    """Return the environment in which a command acts at a failpoint."""
    return {"HPCRESUME_TESTING": "1", "HPCRESUME_FAILPOINTS": f"{name}={action}"}


def cut_short(cluster: SlurmCluster) -> SlurmRun:
    """Return a run whose only round has died without a merge job."""
    site = {"HPCRESUME_SITE__SUBMIT_FROM_COMPUTE": "false"}
    dying = failing("supervisor.before_driver", "kill")
    run = SlurmRun.submit(cluster, sources=4, ms=0, env={**site, **dying})
    cluster.wait_ended(run.array)
    run.command.env = cluster.env
    return run


def test_cancel_while_a_merge_submits(slurm_cluster: SlurmCluster) -> None:
    """
    A merge that had found no stop mark and submits while the run is cancelled sees the mark
    afterwards, and takes back what it submitted.
    """
    run = cut_short(slurm_cluster)
    run.command.env = {**slurm_cluster.env, **failing("round_script.after_read_back", "stop")}
    hold_nodes(slurm_cluster)
    merge = run.command.start("merge", str(run.path), "--requeue")
    run.wait(lambda: psutil.Process(merge.pid).status() == psutil.STATUS_STOPPED, "it stops")
    run.command.env = slurm_cluster.env
    assert [] == run.command.json("cancel", str(run.path))["jobs"]
    merge.send_signal(signal.SIGCONT)
    _, errors = merge.communicate(timeout=120)
    release_nodes(slurm_cluster)

    assert 0 == merge.returncode, errors
    (entry,) = slurm_cluster.jobs(f"hpcresume-{_run_id(run.path)}-1")
    assert "CANCELLED" == entry.state
    assert "cancelled" == run.status()["state"]
    assert [] == run.executed()


def test_array_that_nobody_took_back(slurm_cluster: SlurmCluster) -> None:
    """
    Elements of an array that was submitted behind the back of `cancel`, by a merge that died
    then, read the stop mark at their start and end at once; `submit RUN` goes on.
    """
    run = cut_short(slurm_cluster)
    run.command.env = {**slurm_cluster.env, **failing("jobs.after_create", "stop")}
    hold_nodes(slurm_cluster)
    merge = run.command.start("merge", str(run.path), "--requeue")
    run.wait(lambda: psutil.Process(merge.pid).status() == psutil.STATUS_STOPPED, "it stops")
    (run.path / "control" / "0001-stop").write_text("stop")
    merge.kill()
    merge.communicate(timeout=60)
    name = f"hpcresume-{_run_id(run.path)}-1"
    (array,) = {e.array_job_id for e in slurm_cluster.jobs(name)}
    release_nodes(slurm_cluster)

    assert ["COMPLETED"] == slurm_cluster.wait_ended(array)
    assert [] == run.executed()
    run.command.env = slurm_cluster.env
    run.command.run("submit", str(run.path))
    assert "complete" == settled(run)[0]
    assert run.is_right()


def _run_id(path: Path) -> str:
    return RunDir.open(str(path)).run_id
