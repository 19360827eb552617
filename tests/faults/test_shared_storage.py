"""Rows 27 to 42: the file system that holds the run directory fails, lies, lags or hangs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hpcresume.errors import EXIT_SAVED
from tests.faults.rig import Rig, make_rig
from tests.support.local import Desk
from tests.support.sharedfs import Rule, shared_fs

slow = pytest.mark.slow
EVERYTHING = (
    "lookup", "getattr", "create", "open", "read", "write", "fsync", "flush", "opendir",
    "readdir", "mkdir", "rename", "link", "fsyncdir",
)  # fmt: skip


def hits(rig: Rig) -> int:
    """Return how often faults struck."""
    assert rig.shared is not None
    return sum(rig.shared.hits().values())


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(Rule("write", "ENOSPC", ".tmp-*", times=1), id="27-full-at-write"),
        pytest.param(Rule("fsync", "EDQUOT", ".tmp-*", times=1), id="28-quota-at-fsync"),
        pytest.param(Rule("flush", "EDQUOT", ".tmp-*", times=1), id="29-quota-at-close"),
        pytest.param(Rule("write", "short", ".tmp-*"), id="30-short-writes", marks=slow),
        pytest.param(Rule("fsync", "EIO", ".tmp-*", times=1), id="31-eio-at-fsync", marks=slow),
        pytest.param(Rule("rename", "ESTALE", "seg-*", times=2), id="32-stale-rename", marks=slow),
        pytest.param(Rule("open", "ESTALE", "seg-*", times=2), id="32-stale-open", marks=slow),
        pytest.param(Rule("opendir", "ESTALE", "e0*", times=2), id="32-stale-readdir", marks=slow),
        pytest.param(Rule("rename", "ENOENT", "seg-*", after=True), id="33-rename-reply-lost"),
        pytest.param(Rule("fsyncdir", "EINVAL"), id="35-no-directory-sync", marks=slow),
        pytest.param(Rule("lookup", "old-size", "seg-*", times=2), id="39-old-size", marks=slow),
    ],
)
def test_row(shared_rig: Rig, rule: Rule) -> None:
    """
    The attempt goes on through it, publishes under a new name, and ends as if nothing had
    happened: each source executed once, the result exact.
    """
    assert shared_rig.shared is not None
    attempt = shared_rig.prepare().begin()
    shared_rig.shared.fault(rule)

    assert 0 == attempt.wait(), attempt.describe()

    assert hits(shared_rig)
    outcome = shared_rig.outcome()
    assert outcome is not None
    assert ("done", shared_rig.n) == (outcome.state, outcome.completed)
    shared_rig.verdict(executions=1)


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(Rule("write", "ENOSPC"), id="27-full-for-long"),
        pytest.param(Rule("fsync", "EDQUOT"), id="28-quota-for-long", marks=slow),
        pytest.param(Rule("flush", "EDQUOT"), id="29-quota-at-close-for-long", marks=slow),
        pytest.param(Rule("create", "EROFS"), id="42-read-only", marks=slow),
        pytest.param(Rule("create", "EACCES"), id="42-not-permitted", marks=slow),
    ],
)
def test_row_for_long(shared_rig: Rig, rule: Rule) -> None:
    """
    While nothing can be published the attempt takes no more sources than it may risk; told to
    stop it leaves within its grace, keeps its ledger, and what it had committed is not done
    again.
    """
    assert shared_rig.shared is not None
    shared_rig.n = 400
    attempt = shared_rig.prepare().begin()
    shared_rig.shared.fault(rule)
    attempt.wait_for(lambda: "no sources are taken" in attempt.log.read_text())
    attempt.wait_for(lambda: not attempt.said_last()["in_flight"])
    committed = attempt.committed()

    assert EXIT_SAVED == attempt.stop()

    assert "not everything could be published" in attempt.log.read_text()
    assert committed < shared_rig.n
    shared_rig.shared.heal()
    kept = set(shared_rig.union().completed) | shared_rig.pending()
    assert len(kept) >= committed
    shared_rig.verdict(executions=1)


def test_row_34_epoch_reply_lost(shared_rig: Rig) -> None:
    """The reply to the creation of an attempt's directory is lost: it takes the next number."""
    assert shared_rig.shared is not None
    shared_rig.prepare(ms=0)
    shared_rig.shared.fault(Rule("mkdir", "EEXIST", "e001", after=True))

    assert 0 == shared_rig.start().wait()

    assert 1 == hits(shared_rig)
    assert "done" == getattr(shared_rig.outcome(epoch=2), "state", None)
    assert [] == list(shared_rig.shared.backing.glob("run/rounds/*/tasks/*/e001/*"))
    shared_rig.verdict(executions=1)


def test_row_36_hang_and_recovery(shared_rig: Rig) -> None:
    """
    The work goes on while the file system does not answer; when it answers again everything
    is published, and no source ran twice.
    """
    assert shared_rig.shared is not None
    shared_rig.n = 100
    attempt = shared_rig.prepare().begin()
    shared_rig.shared.fault(Rule("fsync", "hang"))
    attempt.wait_for(lambda: hits(shared_rig))
    before = attempt.committed()
    attempt.wait_committed(before + 10)
    shared_rig.shared.heal()

    assert 0 == attempt.wait(), attempt.describe()
    shared_rig.verdict(executions=1)


@pytest.mark.slow
def test_row_36_publisher_left_behind(shared_rig: Rig) -> None:
    """
    A publisher that hangs for a minute is left behind, and another one publishes what it
    could not, once the file system answers new calls; the old one changes nothing.
    """
    assert shared_rig.shared is not None
    shared_rig.n = 100
    attempt = shared_rig.prepare().begin()
    shared_rig.shared.fault(Rule("fsync", "hang", times=1))
    attempt.wait_for(lambda: "left behind" in attempt.log.read_text(), timeout_s=120)
    assert 0 == attempt.wait(), attempt.describe()
    assert shared_rig.n == len(shared_rig.union().completed)
    shared_rig.verdict(executions=1)


@pytest.mark.parametrize("published", [True, False], ids=["37-after-publishing", "37-before"])
def test_row_hang_for_good(shared_rig: Rig, published: bool) -> None:
    """
    The file system answers nothing at all when the task is told to stop: the supervisor
    leaves within its grace and keeps the ledger, and the next attempt on this node publishes
    what was committed.
    """
    assert shared_rig.shared is not None
    shared_rig.n = 400
    sync = {} if published else {"max_age_s": 600.0, "first_age_s": 600.0}
    attempt = shared_rig.prepare(sync=sync).start()
    if published:
        shared_rig.wait_published(attempt, 3)
        attempt.thaw()
    committed = attempt.committed()
    attempt.wait_committed(committed + 3)
    shared_rig.shared.fault(*(Rule(op, "hang") for op in EVERYTHING))
    attempt.wait_for(lambda: attempt.committed() > committed + 6)

    assert EXIT_SAVED == attempt.stop()

    committed = attempt.committed()
    shared_rig.shared.heal()
    assert len(set(shared_rig.union().completed) | shared_rig.pending()) >= committed
    shared_rig.verdict(executions=2)


def test_row_38_stale_listing(shared_rig: Rig) -> None:
    """
    Attempt and merge on a node whose listings are old: sources run again, a merge gives a
    part of what there is, a later one more, and no value changes.
    """
    assert shared_rig.shared is not None
    shared_rig.n = 60
    shared_rig.prepare()
    shared_rig.shared.freeze_listings()
    assert not shared_rig.union().completed
    first = shared_rig.start()
    shared_rig.wait_published(first, 10)
    first.kill()
    shared_rig.lose_node()

    assert not shared_rig.union().completed
    assert 0 == shared_rig.start().wait()
    stale = set(shared_rig.union().completed)
    assert stale < set(shared_rig.stored().completed)
    assert 2 == max(shared_rig.executions().values())
    shared_rig.verdict(executions=2)


def test_row_40_server_loses_what_was_not_synced(shared_rig: Rig) -> None:
    """
    The file server restarts without what was never synced, and the node is lost: everything
    that had a receipt is still there.
    """
    assert shared_rig.shared is not None
    shared_rig.prepare()
    shared_rig.shared.make_volatile()
    attempt = shared_rig.start()
    promised = shared_rig.wait_published(attempt, 10)
    attempt.kill()
    shared_rig.shared.restart()
    shared_rig.lose_node()

    assert promised <= len(shared_rig.union().completed)
    shared_rig.verdict(executions=2)


@pytest.mark.slow
@pytest.mark.parametrize("locks", ["enosys", "noop"], ids=["41-flock-enosys", "41-flock-noop"])
def test_row_locks(tmp_path: Path, locks: str) -> None:
    """A run does not need locks of the shared file system, and ``doctor`` says how they are."""
    with (
        shared_fs(tmp_path, locks=locks) as shared,
        make_rig(tmp_path, run=shared.path / "run", shared=shared) as rig,
    ):
        assert 0 == rig.prepare(ms=0).start().wait()
        ended = Desk(tmp_path).call("doctor", shared.path)
        assert "lock" in ended.out + ended.err, ended
        rig.verdict(executions=1)


@pytest.mark.slow
def test_row_42_run_directory_removed(shared_rig: Rig) -> None:
    """
    Somebody removes the run directory under a task: it says so, leaves with what it holds,
    and makes no directory that looks like a run.
    """
    assert shared_rig.shared is not None
    shared_rig.n = 400
    attempt = shared_rig.prepare().begin()
    (shared_rig.shared.backing / "run").rename(shared_rig.shared.backing / "gone")
    attempt.wait_for(lambda: "cannot publish" in attempt.log.read_text())
    start = time.monotonic()

    assert EXIT_SAVED == attempt.stop()

    assert time.monotonic() - start < 30
    assert not shared_rig.run.exists()
    assert shared_rig.pending()
    (shared_rig.shared.backing / "gone").rename(shared_rig.shared.backing / "run")
    shared_rig.verdict(executions=1)
