"""Rows 6 to 21 and 50: processes of an attempt die, stop or live on; its clock jumps."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from hpcresume.errors import EXIT_SAVED
from tests.faults.rig import DRAIN_S, EXIT_S, LOAD_S, Attempt, Rig
from tests.support.cli import wait_until

slow = pytest.mark.slow
LATE = {"max_age_s": 600.0, "first_age_s": 600.0}
"""Nothing is published before the end."""
STEPS = (
    "after_create", "after_write", "after_sync", "after_close", "after_rename",
    "after_directory_sync", "after_read_back",
)  # fmt: skip


def armed(point: str) -> dict[str, str]:
    """Return the environment in which a failpoint strikes."""
    return {"HPCRESUME_TESTING": "1", "HPCRESUME_FAILPOINTS": point}


def child(attempt: Attempt, module: str) -> psutil.Process:
    """Return the driver or the publisher of an attempt."""
    found = psutil.Process(attempt.process.pid).children()
    return next(p for p in found if f"hpcresume.task.{module}" in p.cmdline())


@pytest.mark.parametrize("after", [pytest.param(4, id="6-driver-killed-after-commit")])
def test_row_driver(rig: Rig, after: int) -> None:
    """
    The driver dies right after a commit, before anything is published: the supervisor
    publishes what it had committed and says saved.
    """
    attempt = rig.prepare(sync=LATE).start(env=armed(f"ledger.after_commit=kill:{after}"))

    assert EXIT_SAVED == attempt.wait()

    outcome = rig.outcome()
    assert outcome is not None
    assert ("saved", "driver-died") == (outcome.state, outcome.kind)
    assert len(rig.union().completed) == outcome.completed >= attempt.committed()
    rig.verdict(executions=2)


def test_row_7_driver_stopped(rig: Rig) -> None:
    """A driver that is stopped cannot drain: it is killed in time, its ledger published."""
    attempt = rig.prepare(sync=LATE).begin()
    child(attempt, "driver").suspend()
    committed = attempt.committed()

    assert EXIT_SAVED == attempt.stop()

    assert committed <= len(rig.union().completed)
    rig.verdict(executions=2)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(step, id=f"8-publisher-{step}", marks=[] if step == "after_rename" else slow)
        for step in STEPS
    ],
)
def test_row_publisher(rig: Rig, step: str) -> None:
    """
    Every publisher dies at the same step of its third publication: another takes over,
    and the attempt ends as if none had.
    """
    rig.n = 120
    attempt = rig.prepare().start(env=armed(f"segment.{step}=kill:3"))

    assert 0 == attempt.wait()

    assert "was killed by signal 9; another one is started" in attempt.log.read_text()
    assert rig.n == len(rig.union().completed)
    rig.verdict(executions=1)


def test_row_9_supervisor_killed(rig: Rig) -> None:
    """Driver and publisher end with their supervisor; the next attempt here publishes the rest."""
    attempt = rig.prepare(sync=LATE).begin()
    children = psutil.Process(attempt.process.pid).children(recursive=True)
    committed = attempt.committed()

    attempt.process.kill()

    assert children
    assert [] == psutil.wait_procs(children, timeout=20)[1]
    assert len(rig.pending()) >= committed
    rig.verdict(executions=2)


@pytest.mark.parametrize(
    "node_lost",
    [
        pytest.param(False, id="10-task-killed"),
        pytest.param(True, id="10-task-killed-and-node-lost", marks=slow),
    ],
)
def test_row_task(rig: Rig, node_lost: bool) -> None:
    """
    Everything of an attempt is killed: what had a receipt is available; what was only
    committed is published by the next attempt on this node, or computed again on another.
    """
    attempt = rig.prepare().start()
    promised = rig.wait_published(attempt, 5)
    attempt.kill()
    kept = rig.pending()
    if node_lost:
        rig.lose_node()

    assert promised <= len(rig.union().completed)
    assert 0 == rig.start().wait()

    again = {source for source, count in rig.executions().items() if count > 1}
    assert node_lost or not again & kept
    rig.verdict(executions=2)


def test_row_15_signals_again_and_again(rig: Rig) -> None:
    """SIGTERM and SIGUSR2 in a loop are one order to stop: one drain, saved, within the grace."""
    attempt = rig.prepare(sync=LATE).begin()

    def poke() -> bool:
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT):
            with contextlib.suppress(ProcessLookupError):
                attempt.process.send_signal(number)
        return attempt.process.poll() is not None

    wait_until(poke, timeout_s=DRAIN_S + EXIT_S + LOAD_S, describe=attempt.describe)

    assert EXIT_SAVED == attempt.process.returncode
    assert 1 == attempt.log.read_text().count("no more sources are admitted")
    assert attempt.committed() <= len(rig.union().completed)
    rig.verdict(executions=2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2], ids=["16-term", "16-usr2"])
def test_row_signal_while_starting(rig: Rig, number: signal.Signals) -> None:
    """
    A signal at any moment of the start ends the attempt in time: before its handlers stand
    by the signal itself, later in order; nothing is lost or left.
    """
    rig.prepare()
    for moments in range(8):
        attempt = rig.start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            attempt.process.wait(0.25 * moments)
        with contextlib.suppress(ProcessLookupError):
            attempt.process.send_signal(number)
        status = attempt.wait(timeout_s=DRAIN_S + EXIT_S + LOAD_S)
        assert status in {-number, 0, EXIT_SAVED}, attempt.describe()
    rig.verdict()


@pytest.mark.parametrize(
    "zombies",
    [
        pytest.param(1, id="19-20-frozen-attempt"),
        pytest.param(2, id="21-three-attempts", marks=slow),
    ],
)
def test_row_zombies(shared_rig: Rig, zombies: int) -> None:
    """
    Attempts frozen in the middle wake up when a later one has done it all: its sweep left
    them alone, they stop, and nothing that was published has changed.
    """
    frozen = []
    shared_rig.prepare()
    for _ in range(zombies):
        attempt = shared_rig.start()
        attempt.wait_committed(2)
        attempt.freeze()
        frozen.append(attempt)
    directories = list(shared_rig.local.glob("hpcresume-*/*/*/lock"))

    assert 0 == shared_rig.start().wait()

    assert zombies == len(directories)
    assert all(path.exists() for path in directories)
    winners = shared_rig.union()
    for attempt in frozen:
        attempt.thaw()
        assert 0 == attempt.wait(), attempt.describe()
    later = shared_rig.union()
    assert winners.completed <= later.completed
    assert {o.state for e in range(1, zombies + 1) if (o := shared_rig.outcome(e))} <= {
        "superseded",
        "done",
    }
    shared_rig.verdict()


CLOCK = """
import time
_real, _calls = time.time, iter(range(10**9))
def _jumping():
    return _real() + (-3600, 3600, 0)[next(_calls) % 3]
time.time = _jumping
"""


def test_row_50_clock_jumps(rig: Rig, tmp_path: Path) -> None:
    """A clock that jumps by an hour at every look decides nothing."""
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(CLOCK)
    rig.prepare()
    first = rig.start(env={"PYTHONPATH": str(tmp_path / "clock")})
    first.wait_committed(5)
    first.kill()

    assert 0 == rig.start(env={"PYTHONPATH": str(tmp_path / "clock")}).wait()
    rig.verdict(executions=2)
