"""Group commit: what was flushed is on disk, what failed is told, nobody waits forever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pyroaring import BitMap

from hpcresume.errors import InternalError, LocalStorageError
from hpcresume.ledger.group_commit import GroupCommitter
from hpcresume.ledger.store import Batch, InFlight, Ledger, LedgerIdentity, LedgerState
from hpcresume.segment.segment import Progress, Writer
from tests.support.places import RUN_ID, failure, frame

DEADLINE_S = 20


@pytest.fixture
def ledger(tmp_path: Path):
    identity = LedgerIdentity(RUN_ID, Writer(0, 0, 1), 1, ["a"])
    opened = Ledger.create(str(tmp_path / "ledger"), identity)
    yield opened
    opened.close()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not come about in {DEADLINE_S} s"
        threading.Event().wait(0.005)


class Gate:
    """Holds the commits of a ledger until it is opened, and counts them."""

    def __init__(self, ledger: Ledger) -> None:
        self.entered, self.opened, self.batches = threading.Event(), threading.Event(), []
        commit = ledger.commit

        def gated(batch: Batch) -> int:
            self.batches.append(batch)
            self.entered.set()
            assert self.opened.wait(DEADLINE_S)
            return commit(batch)

        ledger.commit = gated


def test_what_was_flushed_is_in_the_ledger(ledger: Ledger) -> None:
    """After a flush every frame, failure, mark and counter added before is committed."""
    committer = GroupCommitter(ledger, max_delay_s=3600)
    state = LedgerState(progress=Progress(completed=9))
    committer.mark(1, InFlight(BitMap([5])).encode())
    for source in range(9):
        committer.add(frame=frame([source]), sources=1)
    committer.add(failures=[failure(50)], state=state)

    assert ledger.last_sequence() <= committer.flush() == ledger.last_sequence()

    commits = [commit for _, commit in ledger.pending()]
    assert [frame([s]) for s in range(9)] == [f for c in commits for f in c.frames]
    assert [failure(50)] == [f for c in commits for f in c.failures]
    assert ([InFlight(BitMap([5]))], state, 9) == (
        ledger.in_flight(), ledger.state(), committer.committed_sources,
    )  # fmt: skip
    committer.close()


def test_results_do_not_wait_for_a_flush(ledger: Ledger) -> None:
    """After the delay they are committed by themselves."""
    committer = GroupCommitter(ledger, max_delay_s=0.01)
    committer.add(frame=frame([1]), sources=1)
    wait_until(lambda: committer.committed_sources == 1, "the commit")
    assert 1 == committer.committed_seq
    committer.close()


def test_many_results_share_a_commit(ledger: Ledger) -> None:
    """What comes while a commit is under way goes into the next one, together."""
    gate = Gate(ledger)
    committer = GroupCommitter(ledger, max_delay_s=3600)
    committer.mark(0, b"")
    assert gate.entered.wait(DEADLINE_S)
    for source in range(100):
        committer.add(frame=frame([source]), sources=1)
    gate.opened.set()
    assert 1 == committer.flush()
    assert 100 == len(gate.batches[-1].frames)
    committer.close()


def test_a_full_queue_holds_back_who_adds(ledger: Ledger) -> None:
    """While two commits' worth wait, adding blocks; when they are written it goes on."""
    gate = Gate(ledger)
    committer = GroupCommitter(ledger, max_bytes=1000, max_delay_s=3600)
    added = []

    def work() -> None:
        for n in range(12):
            committer.add(frame=b"x" * 500, sources=1)
            added.append(n)

    thread = threading.Thread(target=work)
    thread.start()
    assert gate.entered.wait(DEADLINE_S)
    # Two frames at the least are being written; four more fill the queue.
    wait_until(lambda: committer._batch_bytes >= 2000, "a full queue")
    count = len(added)
    assert count < 12
    assert thread.is_alive()
    gate.opened.set()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    committer.flush()
    assert 12 == committer.committed_sources
    committer.close()


def test_release_deletes_what_is_published(ledger: Ledger) -> None:
    """Released commits are gone after the next flush; later ones stay."""
    committer = GroupCommitter(ledger)
    committer.add(frame=frame([1]))
    first = committer.flush()
    committer.add(frame=frame([2]))
    second = committer.flush()
    committer.release(first)
    committer.flush()
    assert [second] == [sequence for sequence, _ in ledger.pending()]
    committer.close()


def test_a_chunk_that_came_back_is_not_in_flight(ledger: Ledger) -> None:
    """Marked and unmarked, in one commit or in two."""
    committer = GroupCommitter(ledger)
    sources = InFlight(BitMap([1])).encode()
    committer.mark(1, sources)
    committer.add(unmark=1)
    committer.flush()
    assert [] == ledger.in_flight()
    committer.mark(2, sources)
    committer.flush()
    assert [InFlight(BitMap([1]))] == ledger.in_flight()
    committer.add(unmark=2)
    committer.flush()
    assert [] == ledger.in_flight()
    committer.close()


def test_a_mark_can_be_waited_for(ledger: Ledger) -> None:
    """Before the call runs, what it holds would survive this process; results still wait."""
    committer = GroupCommitter(ledger, max_delay_s=3600)
    committer.add(frame=frame([1]), sources=1)
    for call in range(1, 50):
        committer.mark(call, InFlight(BitMap([call])).encode(), wait=True)
        assert BitMap([call]) == ledger.in_flight()[-1].sources
    assert [] == list(ledger.pending())
    committer.close()


def test_a_mark_that_fails_is_told(ledger: Ledger) -> None:
    """Nobody waits for a mark that cannot be written."""
    committer = GroupCommitter(ledger)

    def full(_batch: Batch) -> int:
        raise LocalStorageError("full")

    ledger.commit = full
    with pytest.raises(LocalStorageError, match="full"):
        committer.mark(1, InFlight(BitMap([1])).encode(), wait=True)


def test_a_mark_does_not_commit_results(ledger: Ledger) -> None:
    """A mark is written at once and alone: it costs no sync of the results that wait."""
    committer = GroupCommitter(ledger, max_delay_s=3600)
    committer.add(frame=frame([1]), sources=1)
    committer.mark(1, InFlight(BitMap([2])).encode())
    wait_until(ledger.in_flight, "the mark")

    assert [] == list(ledger.pending())
    assert 1 == committer.flush()
    committer.close()


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(LocalStorageError("full"), LocalStorageError), (RuntimeError("bug"), InternalError)],
)
def test_a_failed_commit_is_told_to_everybody(ledger: Ledger, raised, expected) -> None:
    """Whatever goes wrong in the thread: whoever adds, marks, flushes or closes learns of it."""
    committer = GroupCommitter(ledger, max_delay_s=3600)

    def commit(_: Batch) -> int:
        raise raised

    ledger.commit = commit
    committer.add(frame=frame([1]))
    for call in (
        committer.flush,
        committer.flush,
        lambda: committer.add(frame=frame([2])),
        lambda: committer.mark(1, b""),
        committer.close,
    ):
        with pytest.raises(expected, match=str(raised)):
            call()
    assert 0 == committer.committed_sources


def test_an_error_frees_who_is_held_back(ledger: Ledger) -> None:
    """A thread blocked by a full queue is woken when the commit fails."""
    gate = Gate(ledger)
    gated = ledger.commit

    def fail(batch: Batch) -> int:
        gated(batch)
        raise LocalStorageError("full")

    ledger.commit = fail
    committer = GroupCommitter(ledger, max_bytes=100, max_delay_s=3600)
    errors = []

    def work() -> None:
        try:
            for _ in range(10):
                committer.add(frame=b"x" * 100)
        except LocalStorageError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: committer._batch_bytes >= 200, "a full queue")
    gate.opened.set()
    thread.join(DEADLINE_S)
    assert 1 == len(errors)


def test_closing_commits_what_is_left(ledger: Ledger) -> None:
    """What was added before the end is in the ledger; nothing is taken after it."""
    committer = GroupCommitter(ledger, max_delay_s=3600)
    committer.add(frame=frame([1]), sources=1)
    committer.close()
    assert [1] == [sequence for sequence, _ in ledger.pending()]
    with pytest.raises(InternalError, match="closed"):
        committer.add(frame=frame([2]))
    assert 1 == committer.flush()
    committer.close()


def test_numbers_go_on_after_a_restart(ledger: Ledger) -> None:
    """A committer on a ledger that holds commits begins where they end."""
    ledger.commit(Batch(frames=[frame([1])]))
    committer = GroupCommitter(ledger)
    assert 1 == committer.committed_seq
    committer.add(frame=frame([2]))
    assert 2 == committer.flush()
    committer.close()


def test_adding_from_several_threads(ledger: Ledger) -> None:
    """Four threads, five hundred results each: every one is committed once."""
    committer = GroupCommitter(ledger, max_delay_s=0.001)

    def work(thread: int) -> None:
        for n in range(500):
            committer.add(frame=frame([thread * 500 + n]), sources=1)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    committer.flush()
    frames = sorted(f for _, commit in ledger.pending() for f in commit.frames)
    assert sorted(frame([n]) for n in range(2000)) == frames
    assert 2000 == committer.committed_sources
    committer.close()
