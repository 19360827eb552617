"""A node that Slurm has lost while its task works on: a zombie beside the next attempt."""

from __future__ import annotations

import signal

import pytest

from tests.support.cluster import SlurmCluster
from tests.support.slurm_runs import SlurmRun, resume

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]
RESTART_S = 180


@pytest.mark.parametrize("zombie", ["alive", "signalled", "thawed-before-merge", "thawed-after"])
def test_zombie(slurm_cluster: SlurmCluster, zombie: str) -> None:
    """
    After the death of a slurmd the task runs elsewhere while its old attempt is alive, or
    frozen and thawed later: every row counts once, the old attempt stops by itself at its next
    look, and even when it is signalled it does not requeue the newer one.
    """
    run = SlurmRun.submit(slurm_cluster, sources=100, ms=1000)
    run.wait_published()
    old = run.family()
    slurm_cluster.kill_node(run.attempts()[0]["node"])
    if zombie != "alive":
        run.freeze()
    merge = run.record()["merge"]
    slurm_cluster.run("scontrol", "hold", merge)
    run.wait(lambda: len(run.attempts()) == 2, "the second attempt starts", RESTART_S)
    if zombie == "signalled":
        old[0].send_signal(signal.SIGTERM)
        resume(old)
        run.wait(lambda: not old[0].is_running(), "the zombie ends")
    run.wait(lambda: run.has_ended(2), "the second attempt ends", RESTART_S)
    if zombie == "thawed-before-merge":
        resume(old)
    if zombie in {"alive", "thawed-before-merge"}:
        run.wait(lambda: not old[0].is_running(), "the zombie ends")
    slurm_cluster.run("scontrol", "release", merge)
    status = run.wait_ended()
    if zombie == "thawed-after":
        resume(old)
        run.wait(lambda: not old[0].is_running(), "the zombie ends")

    assert ("complete", 1) == (status["state"], len(status["rounds"]))
    assert [0, 1] == [attempt["restart_count"] for attempt in run.attempts()]
    assert "done" == run.outcomes()[1]["state"]
    expected = ("saved", "requeued") if zombie == "signalled" else ("superseded", "superseded")
    assert expected == (run.outcomes()[0]["state"], run.outcomes()[0]["kind"])
    assert "hpcresume: requeued" not in run.log()
    assert run.is_right()
    run.command.run("merge", str(run.path))
    assert run.is_right()
