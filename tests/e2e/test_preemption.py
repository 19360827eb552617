"""Preemption and requeue by an administrator: the next attempt goes on from what was saved."""

from __future__ import annotations

import pytest

from tests.support.cluster import SlurmCluster
from tests.support.slurm_runs import SlurmRun

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(420)]


@pytest.mark.ray
def test_same_node(each_cluster: SlurmCluster) -> None:
    """
    A preempted task drains and publishes within the grace period, stops Ray and requeues
    itself; its next attempt, on the same node, continues.  No source is charged, and none runs
    twice but what Ray's workers held where Slurm's signal reaches these, too.
    """
    run = SlurmRun.submit(each_cluster, sources=100, engine="ray")
    run.wait_published()
    node = run.attempts()[0]["node"]
    run.stay_on(node)
    family = run.family()
    each_cluster.preempt(f"{run.array}_0", hold_s=5)

    status = run.wait_ended()

    first, second = run.outcomes()
    assert ("saved", "preempted", "done") == (first["state"], first["kind"], second["state"])
    assert [node, node] == [attempt["node"] for attempt in run.attempts()]
    assert 100 == first["completed"] + second["completed"]
    assert ("complete", 1) == (status["state"], len(status["rounds"]))
    again = {"cgroup": 0, "linuxproc": 2}[each_cluster.bed.proctrack]
    assert sum(run.executions().values()) <= 100 + again
    assert run.is_right()
    assert [] == [process for process in family if process.is_running()]


def test_another_node(slurm_cluster: SlurmCluster) -> None:
    """A preempted task that restarts on another node continues from what was published."""
    run = SlurmRun.submit(slurm_cluster)
    run.wait_published()
    node = run.attempts()[0]["node"]
    slurm_cluster.preempt(f"{run.array}_0", hold_s=5)
    run.wait(run.outcomes, "the first attempt ends")
    slurm_cluster.drain(node)

    status = run.wait_ended()

    first, second = run.outcomes()
    assert ("saved", "preempted", "done") == (first["state"], first["kind"], second["state"])
    assert 1 == slurm_cluster.show(f"{run.array}_0").restarts
    assert node != run.attempts()[1]["node"]
    assert ("complete", 1) == (status["state"], len(status["rounds"]))
    assert {1} == set(run.executions().values())
    assert run.is_right()


def test_driver_killed_in_the_grace(slurm_cluster: SlurmCluster) -> None:
    """
    A driver that dies while it drains costs what was in flight: what it committed is
    published for it, the task requeues itself, and nobody is charged.
    """
    run = SlurmRun.submit(slurm_cluster, sources=12, ms=4000)
    run.wait_published()
    slurm_cluster.preempt(f"{run.array}_0", hold_s=5)
    run.wait_log("no more sources are admitted")
    (driver,) = [p for p in run.family() if "hpcresume.task.driver" in " ".join(p.cmdline())]
    driver.kill()

    status = run.wait_ended()

    first, second = run.outcomes()
    assert ("saved", "preempted", "done") == (first["state"], first["kind"], second["state"])
    assert 12 == first["completed"] + second["completed"]
    assert ("complete", 1) == (status["state"], len(status["rounds"]))
    assert sum(run.executions().values()) <= 13
    assert run.is_right()


@pytest.mark.parametrize("end", ["frozen", "killed"])
def test_ledger_left_unpublished(slurm_cluster: SlurmCluster, end: str) -> None:
    """
    When the supervisor is killed or frozen in the grace, so that nothing more is published,
    the next attempt on that node publishes what the ledger holds: it is not computed again.
    """
    run = SlurmRun.submit(slurm_cluster, "--sync-interval", "3600", sources=120)
    published = run.wait_published()
    node = run.attempts()[0]["node"]
    run.stay_on(node)
    run.wait_executed(published + 15)
    family = run.freeze()
    slurm_cluster.preempt(f"{run.array}_0", hold_s=5)
    if end == "killed":
        run.wait(lambda: slurm_cluster.show(f"{run.array}_0").preempt_time, "the grace begins")
        family[0].kill()

    status = run.wait_ended()

    # A task that ends in its grace is requeued by Slurm from 24.05 on, by the merge job before.
    restarts = slurm_cluster.show(f"{run.array}_0").restarts or 0
    assert ("complete", 2 - restarts) == (status["state"], len(status["rounds"]))
    assert [node, node] == [attempt["node"] for attempt in run.attempts()]
    assert "sources of a dead attempt" in run.log()
    # In flight when it was frozen: one source that ran, one whose commit waited for its group.
    assert sum(run.executions().values()) <= 122
    assert run.is_right()


def test_no_grace(slurm_cluster: SlurmCluster) -> None:
    """Without a grace period Slurm restarts the task: what was published is not done again."""
    run = SlurmRun.submit(slurm_cluster, "-p", "nograce")
    published = run.wait_published()
    slurm_cluster.preempt(f"{run.array}_0", hold_s=5)

    status = run.wait_ended()

    counts = run.executions()
    assert ("complete", 1) == (status["state"], len(status["rounds"]))
    assert [0, 1] == [attempt["restart_count"] for attempt in run.attempts()]
    assert {1} == {counts[source] for source in run.executed()[:published]}
    assert run.is_right()


@pytest.mark.parametrize("end", ["drained", "frozen"])
def test_preempt_mode_cancel(slurm_cluster: SlurmCluster, end: str) -> None:
    """
    Where preemption cancels, a task that drains within its grace requeues itself, and one
    that does not ends PREEMPTED: the merge job submits its remainder, as nobody cancelled it.
    """
    # Slurm thaws what it signals: the supervisor then waits for its frozen driver.
    patient = {"HPCRESUME_TASK__DRAIN_S": "120"}
    run = SlurmRun.submit(slurm_cluster, "-p", "cancel", env=patient)
    published, array = run.wait_published(), run.array
    if end == "frozen":
        run.freeze()
    slurm_cluster.preempt(f"{array}_0", hold_s=5)

    status = run.wait_ended()

    counts = run.executions()
    # From 24.05 on Slurm does not forget a preemption with a requeue.
    rounds, ended = (1, {"COMPLETED", "PREEMPTED"}) if end == "drained" else (2, {"PREEMPTED"})
    assert ("complete", rounds) == (status["state"], len(status["rounds"]))
    assert slurm_cluster.show(f"{array}_0").state in ended
    assert {1} == {counts[source] for source in run.executed()[:published]}
    assert run.is_right()


@pytest.mark.parametrize("what", ["element", "array"])
def test_requeue_by_an_administrator(slurm_cluster: SlurmCluster, what: str) -> None:
    """
    An element, or an array, that somebody requeues drains, publishes and does not requeue
    itself a second time; its next attempt continues.
    """
    run = SlurmRun.submit(slurm_cluster, "--array", "2", sources=80)
    for task in (0, 1):
        run.wait_published(task)
    slurm_cluster.run("scontrol", "requeue", f"{run.array}_0" if what == "element" else run.array)

    status = run.wait_ended()

    requeued = [0] if what == "element" else [0, 1]
    for task in (0, 1):
        kinds = ["requeued", "finished"] if task in requeued else ["finished"]
        assert kinds == [outcome["kind"] for outcome in run.outcomes(task)]
        restarts = [0, 1] if task in requeued else [0]
        assert restarts == [attempt["restart_count"] for attempt in run.attempts(task)]
    assert ("complete", 1) == (status["state"], len(status["rounds"]))
    assert {1} == set(run.executions().values())
    assert run.is_right()


def test_cancelled_in_the_grace(slurm_cluster: SlurmCluster) -> None:
    """
    A user who cancels a task in the grace of its preemption means stop: it does not come
    back, and its shard waits until the run is submitted again.
    """
    run = SlurmRun.submit(slurm_cluster, sources=12, ms=4000)
    run.wait_published()
    slurm_cluster.preempt(f"{run.array}_0", hold_s=5)
    run.wait_log("no more sources are admitted")
    slurm_cluster.run("scancel", f"{run.array}_0")

    stopped = run.wait_ended()
    run.command.run("submit", str(run.path))
    ended = run.wait_ended()

    assert ("stopped", 1) == (stopped["state"], len(stopped["rounds"]))
    assert "were cancelled" in stopped["reason"]
    assert ("complete", 2) == (ended["state"], len(ended["rounds"]))
    assert [0, 0] == [attempt["restart_count"] for attempt in run.attempts()]
    assert run.is_right()
