"""Publishing a ledger, to a POSIX and to a simulated run directory."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest
from pyroaring import BitMap

from hpcresume.errors import InternalError, LocalStorageError, SharedStorageError
from hpcresume.fs import digest_of
from hpcresume.ids import ROOT, ItemPath
from hpcresume.ledger.publishing import Death, PublishReceipt, output_path, publish_pending
from hpcresume.ledger.store import Batch, InFlight, Ledger, LedgerIdentity, LedgerState
from hpcresume.merge.generation import read_union
from hpcresume.run.directory import AttemptRef, RunDir
from hpcresume.run.manifest import Listing, write_part
from hpcresume.segment.frame import FrameBuilder
from hpcresume.segment.segment import Progress, Segment, StageCount, Writer, open_segment
from tests.support.places import RUN_ID, Place, failure, frame, row


@pytest.fixture(params=["posix", "sim"])
def run(request, tmp_path: Path) -> RunDir:
    return Place.make(request.param, tmp_path).run()


@pytest.fixture
def sim(tmp_path: Path) -> RunDir:
    return Place.make("sim", tmp_path).run()


@pytest.fixture
def ledger(tmp_path: Path):
    identity = LedgerIdentity(RUN_ID, Writer(0, 3, 2), 4, ["a", "b"])
    opened = Ledger.create(str(tmp_path / "ledger"), identity)
    yield opened
    opened.close()


REF = AttemptRef(0, 3, 2)


def segment_of(run: RunDir, receipt: PublishReceipt) -> Segment:
    segment = open_segment(run.fs, run.attempt_path(REF, receipt.name), run_id=run.run_id)
    segment.container.verify()
    return segment


def test_everything_committed_is_published(run: RunDir, ledger: Ledger) -> None:
    """The segment holds the frames and failures of all commits, and says who wrote it."""
    state = LedgerState([StageCount("a", 5)], Progress(completed=3))
    ledger.commit(Batch(frames=[frame([1]), frame([2])], state=state))
    ledger.commit(Batch(frames=[frame([3])], failures=[failure(9)]))

    receipt = publish_pending(ledger, run, seq=7)

    segment = segment_of(run, receipt)
    assert (2, 7, 3) == (receipt.last, receipt.seq, receipt.sources)
    assert [1, 2, 3] == list(segment.completed)
    assert [(3, row(3))] == list(segment.frame(2).sources())
    assert [failure(9)] == segment.failures()
    footer = segment.footer
    assert (Writer(0, 3, 2), 7, 4, ["a", "b"], state.stages, state.progress) == (
        footer.writer, footer.seq, footer.code, footer.stage_names, footer.stages,
        footer.progress,
    )  # fmt: skip
    path = run.attempt_path(REF, receipt.name)
    assert (receipt.digest, receipt.size_bytes) == (digest_of(run.fs, path), run.fs.size(path))
    assert [receipt.name] == [name.name for name in run.segments(REF)]


def test_only_what_is_new_is_published(run: RunDir, ledger: Ledger) -> None:
    """Commits up to `after` are left out, whether they were released yet or not."""
    for source in (1, 2, 3):
        ledger.commit(Batch(frames=[frame([source])]))
    first = publish_pending(ledger, run, seq=1, max_bytes=1)
    second = publish_pending(ledger, run, seq=2, after=first.last)
    third = publish_pending(ledger, run, seq=3, after=second.last)
    assert [[1], [2, 3], []] == [list(segment_of(run, r).completed) for r in (first, second, third)]
    assert [1, 3, 3] == [r.last for r in (first, second, third)]


def test_publishing_twice_is_harmless(run: RunDir, ledger: Ledger) -> None:
    """After a lost receipt the same commits go out again: each source counts once."""
    ledger.commit(Batch(frames=[frame([1, 2])], failures=[failure(9)]))
    names = {publish_pending(ledger, run, seq=1).name for _ in range(2)}
    assert 2 == len(names)
    union = read_union(run, max_attempts=3)
    assert ([1, 2], {9: 1}) == (list(union.completed), union.attempts())
    assert [0, 2] == sorted(map(len, union.won.values()))


def test_what_was_in_flight_at_a_death(run: RunDir, ledger: Ledger) -> None:
    """
    Only on request: calls are suspects, and the source of a call alone is charged, but not
    those of calls that ended before it and whose marks are still there.
    """
    write_part(run, 1, first=0, listing=Listing((f"s{n}", b"", 1.0) for n in range(10)))
    marks = {call: InFlight(BitMap([call]), alone=True).encode() for call in (4, 5, 7)}
    ledger.commit(Batch(mark=marks))
    assert [] == segment_of(run, publish_pending(ledger, run, seq=1)).footer.suspects

    for seq in (2, 3):
        publish_pending(ledger, run, seq=seq, death=Death())

    union = read_union(run, max_attempts=3)
    assert [BitMap([7])] == union.open_suspects()
    assert {7: 1} == union.attempts()
    assert ("death", "s7") == (union.failures[7].last.kind, union.failures[7].last.source_id)


def test_how_long_interrupted_sources_ran(run: RunDir, ledger: Ledger) -> None:
    """
    Only on request: a source has run since its call began, and those of one call share its
    time; calls that waited behind another and calls of a moment say nothing; nobody is charged.
    """
    marks = {1: InFlight(BitMap([4]), since=100.0), 2: InFlight(BitMap([5, 6]), since=80.0),
             3: InFlight(BitMap([7])), 4: InFlight(BitMap([8]), since=138.0)}  # fmt: skip
    ledger.commit(Batch(mark={call: mark.encode() for call, mark in marks.items()}))
    assert {} == segment_of(run, publish_pending(ledger, run, seq=1)).footer.ran

    footer = segment_of(run, publish_pending(ledger, run, seq=2, interrupted_at=140.0)).footer

    assert {4: 40.0, 5: 30.0, 6: 30.0} == footer.ran
    union = read_union(run, max_attempts=3)
    assert ([], {}, footer.ran) == (union.open_suspects(), union.attempts(), union.interrupted())


def test_few_interrupted_sources_are_told(run: RunDir, ledger: Ledger) -> None:
    """Of very many only the longest are told, so that a footer stays small."""
    marks = {1: InFlight(BitMap(range(10_000)), since=1.0), 2: InFlight(BitMap([20_000]), since=90)}
    ledger.commit(Batch(mark={call: mark.encode() for call, mark in marks.items()}))

    footer = segment_of(run, publish_pending(ledger, run, seq=1, interrupted_at=100.0)).footer

    assert (4096, 10.0) == (len(footer.ran), footer.ran[20_000])


def test_everything_in_flight_at_a_death_is_suspect(run: RunDir, ledger: Ledger) -> None:
    """With several calls in flight nobody is charged, and all of them want more memory."""
    marks = {1: InFlight(BitMap([7]), alone=True), 2: InFlight(BitMap([4, 5]))}
    ledger.commit(Batch(mark={call: mark.encode() for call, mark in marks.items()}))

    publish_pending(ledger, run, seq=1, death=Death("out-of-memory", "why", short_mib=900))

    union = read_union(run, max_attempts=3)
    assert [BitMap([7]), BitMap([4, 5])] == union.open_suspects()
    assert ({}, {900: BitMap([4, 5, 7])}) == (union.attempts(), union.short)


def test_a_source_that_memory_ran_out_for_alone(run: RunDir, ledger: Ledger) -> None:
    """It is charged, with the reason, and wants more than it had."""
    write_part(run, 1, first=0, listing=Listing((f"s{n}", b"", 1.0) for n in range(10)))
    ledger.commit(Batch(mark={1: InFlight(BitMap([7]), alone=True).encode()}))

    publish_pending(ledger, run, seq=1, death=Death("out-of-memory", "why", short_mib=900))

    union = read_union(run, max_attempts=3)
    last = union.failures[7].last
    assert ("out-of-memory", "why", 900) == (last.kind, last.message, last.short_mib)
    assert ({7: 1}, {900: BitMap([7])}) == (union.attempts(), union.short)


# -- files of sources -------------------------------------------------------------------------


def commit_with_file(ledger: Ledger, outputs: Path, data: bytes = b"image") -> str:
    builder = FrameBuilder()
    builder.add(1, [(ROOT, b"1\n")])
    builder.add_files("s1", [(ItemPath((0, 2)), "x.png")])
    ledger.commit(Batch(frames=[builder.build()]))
    local = Path(output_path(str(outputs), "s1", "0.2", "x.png"))
    local.parent.mkdir(parents=True)
    local.write_bytes(data)
    return str(local)


def test_files_are_published_before_the_completion(run: RunDir, ledger: Ledger, tmp_path) -> None:
    """A source's file lies in its attempt when the segment names the source complete."""
    local = commit_with_file(ledger, tmp_path / "out", b"x" * 3_000_000)
    publish_pending(ledger, run, seq=1, outputs_root=str(tmp_path / "out"))
    target = output_path(run.attempt_path(REF, "files"), "s1", "0.2", "x.png")
    assert b"x" * 3_000_000 == run.fs.read(target)
    os.unlink(local)
    publish_pending(ledger, run, seq=2, outputs_root=str(tmp_path / "out"))
    assert b"x" * 3_000_000 == run.fs.read(target)


def test_a_file_that_is_gone_stops_publishing(run: RunDir, ledger: Ledger, tmp_path) -> None:
    """Without its file the source must not count as complete; the local disk is named."""
    local = commit_with_file(ledger, tmp_path / "out")
    os.unlink(local)
    with pytest.raises(LocalStorageError, match=r"x\.png"):
        publish_pending(ledger, run, seq=1, outputs_root=str(tmp_path / "out"))
    assert [] == run.segments(REF)


def test_files_that_nobody_can_find_are_a_bug(run: RunDir, ledger: Ledger, tmp_path) -> None:
    """Completions are never published without their files in silence."""
    commit_with_file(ledger, tmp_path / "out")
    with pytest.raises(InternalError, match="files"):
        publish_pending(ledger, run, seq=1)
    assert [] == run.segments(REF)


# -- faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "when"),
    [(op, when)
     for op in ("mkdir", "create", "write", "sync", "close", "rename", "sync_directory", "read")
     for when in ("before", "after")],
)  # fmt: skip
def test_a_refused_publish_can_be_tried_again(
    sim: RunDir, ledger: Ledger, op: str, when: str
) -> None:
    """Whatever call fails: a typed error or a receipt, local data intact, and the retry works."""
    sim.fs.server.ordered = True
    ledger.commit(Batch(frames=[frame([1, 2])], failures=[failure(9)]))
    before = list(ledger.pending())
    sim.fs.fail(op, errno.ENOSPC, when=when, contains="seg-" if op == "read" else "")
    with contextlib.suppress(SharedStorageError):
        publish_pending(ledger, sim, seq=1)

    assert before == list(ledger.pending())
    receipt = publish_pending(ledger, sim, seq=1)
    sim.fs.server.restart()
    assert [1, 2] == list(segment_of(sim, receipt).completed)
    union = read_union(sim, max_attempts=3)
    assert ([1, 2], {9: 1}) == (list(union.completed), union.attempts())


@pytest.mark.parametrize("call", range(1, 25))
def test_a_receipt_outlives_the_server(sim: RunDir, ledger: Ledger, call: int) -> None:
    """The server restarts before each call in turn: what has a receipt is in the union."""
    ledger.commit(Batch(frames=[frame([1, 2])]))
    countdown = [call]

    def tick() -> None:
        countdown[0] -= 1
        if countdown[0] == 0:
            sim.fs.server.restart()

    for op in ("mkdir", "create", "write", "sync", "close", "rename", "sync_directory", "read"):
        sim.fs.on(op, tick, times=999)
    for _ in range(3):
        try:
            receipt = publish_pending(ledger, sim, seq=1)
            break
        except SharedStorageError:
            continue
    sim.fs.server.restart()
    assert [1, 2] == list(segment_of(sim, receipt).completed)
    assert [1, 2] == list(read_union(sim, max_attempts=3).completed)
