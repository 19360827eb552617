"""Publish what a ledger holds to the shared run directory.

Contract: when :func:`publish_pending` returns a :class:`PublishReceipt`, every commit up to
its ``last`` can be read by any node after this process, this node or the file server
restarts.  Before that the commits survive the death of processes, not of the node.

The promise to the user, clause by clause:

1. A worker, Ray or the driver is killed: every committed record is in the ledger, and the
   supervisor has it published before it exits, unless the grace period ends first.
2. The whole task is killed: what was published is available.  What was committed only is
   lost with the node-local directory, unless the next attempt runs on that node and finds it.
3. The node is lost: as 2.
4. Preemption or a time limit with warning: everything committed is published before exit.
5. Shared storage is full or failing: nothing is lost while the node lives; publishing is
   tried again under new names, and the task stops taking sources when too much is at risk.
6. Shared storage hangs: the process that hangs is abandoned; the task leaves in time.
7. A stale listing: sources may run again; nothing is lost, and no result changes hands.
8. The file server restarts and loses unsynced data: published records are available,
   provided the server honours fsync.
9. Two live attempts of one task: both may publish, neither can change or remove what the
   other published.
10. Clocks may jump: nothing is decided by wall-clock time.
11. A damaged ledger: set aside, never opened by the engine; published records are kept.
12. A damaged segment: set aside, never merged in part; its sources are computed again.
13. A half-written line never appears in a published file.
14. Not promised: exactly-once execution, protection from the user's own account, from root,
    from a file server that lies about fsync, or from loss of the run directory.

Order within one call: the part that holds the rows, where the sink is ``hr.Parts``, then files
that belong to sources, each published on its own, then the segment that says the sources are
complete.  A kill in between leaves files that no segment mentions.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec

from hpcresume.errors import InternalError, LocalStorageError
from hpcresume.fs import POSIX, FileSystem, Receipt, publish, storage_errors
from hpcresume.ids import Epoch, RoundIndex, TaskIndex, source_digest
from hpcresume.ledger.parts import Part
from hpcresume.ledger.store import Commit, InFlight, Ledger
from hpcresume.run.directory import AttemptRef, RunDir
from hpcresume.run.manifest import Manifest
from hpcresume.segment import bitmap as bitmaps
from hpcresume.segment.frame import check_frame, decode_frame, has_files
from hpcresume.segment.segment import Failure, SegmentFooter, encode_segment

_COPY_BYTES = 1 << 20
_WORTH_TELLING_S = 5.0
_MOST_TOLD = 4096


@dataclass(frozen=True, slots=True)
class PublishReceipt:
    """Proof that commits are published.

    Attributes:
        last: Sequence number of the last commit covered.
        seq: Number of the segment.
        name: Name of the segment.
        sources: Completed sources in it.
        size_bytes: Its size.
        digest: SHA-256 of its content.
    """

    last: int
    seq: int
    name: str
    sources: int
    size_bytes: int
    digest: bytes


class Death(msgspec.Struct, frozen=True):
    """How a driver died, for the source that it worked on alone, if it did.

    Attributes:
        kind: As in :class:`~hpcresume.segment.segment.Failure`.
        message: For people.
        short_mib: Memory that was not enough for what was in flight, where a later round is
            to give it more; 0 otherwise.
        charges: Whether it is a try of that source; what was in flight is suspect either way.
    """

    kind: str = "death"
    message: str = "the driver died while it worked on this source alone"
    short_mib: int = 0
    charges: bool = True


def publish_pending(
    ledger: Ledger,
    run: RunDir,
    *,
    seq: int,
    after: int = 0,
    max_bytes: int = 256 << 20,
    outputs_root: str | None = None,
    parts_root: str | None = None,
    death: Death | None = None,
    interrupted_at: float | None = None,
) -> PublishReceipt:
    """Publish unpublished commits as one segment and return proof of it.

    Args:
        ledger: The attempt's ledger; only its pending commits are read.
        run: The shared run directory.
        seq: Number of the segment within the attempt; names are unique, so it may be repeated.
        after: Commits up to this one are published already.
        max_bytes: Start no further commit beyond this size; call again for the rest.
        outputs_root: Node-local directory with the files of ``ctx.output``.
        parts_root: Node-local directory with the blobs of ``hr.Parts``.
        death: How the ledger's driver died: what was in flight is recorded; None: it did not.
        interrupted_at: When the attempt had to stop, on the node's monotonic clock: how long the
            sources in flight had been worked on is recorded.

    Returns:
        The receipt; with nothing pending the segment carries progress alone.

    Raises:
        SharedStorageError: The file system refused.  Local data is intact; call again later.
        LocalStorageError: A file of ``ctx.output`` is gone from the node-local disk.
        CorruptDataError: The ledger is damaged.
    """
    footer, failures = _footer(ledger, run, seq=seq, death=death)
    if interrupted_at is not None:
        footer.ran = _seconds_run(ledger.in_flight(), interrupted_at)
    writer = footer.writer
    ref = AttemptRef(RoundIndex(writer.round), TaskIndex(writer.task), Epoch(writer.epoch))
    covered = after
    run.ensure(run.attempt_path(ref))
    commits: Iterable[tuple[int, Commit]] = ledger.pending(after=after, limit_bytes=max_bytes)
    if parts_root is not None and ledger.identity().has_parts:
        part = Part(commits, parts_root, max_bytes=max_bytes)
        footer.part, commits = part.publish(run, ref, seq=seq), part.commits

    def frames() -> Iterator[bytes]:
        nonlocal covered
        for sequence, commit in commits:
            for frame in commit.frames:
                _publish_files(run, ref, frame, outputs_root)
                yield frame
            failures.extend(commit.failures)
            covered = sequence

    name = f"seg-{seq:06d}-{secrets.token_hex(8)}"
    pieces = encode_segment(footer, frames(), failures)
    receipt = publish(run.fs, run.attempt_path(ref, name), pieces, label="segment")
    return PublishReceipt(covered, seq, name, footer.sources(), receipt.size_bytes, receipt.digest)


def _suspects(ledger: Ledger) -> list[InFlight]:
    """Return the calls that a driver may have died of.

    A call's mark stays until its results are on disk, so the marks of calls that ended just
    before are still there.  But a call that ran alone began after all others had ended.
    """
    calls = ledger.in_flight()
    return calls[-1:] if calls and calls[-1].alone else calls


def _footer(
    ledger: Ledger, run: RunDir, *, seq: int, death: Death | None
) -> tuple[SegmentFooter, list[Failure]]:
    """Return a segment's footer, and the failure that a death of its driver is."""
    identity, state = ledger.identity(), ledger.state()
    suspects = _suspects(ledger) if death is not None else []
    footer = SegmentFooter(
        run_id=run.run_id,
        writer=identity.writer,
        seq=seq,
        completed=b"",
        chunks=[],
        has_failures=False,
        suspects=[bitmaps.dump(call.sources) for call in suspects],
        stages=state.stages,
        stage_names=identity.stage_names,
        progress=state.progress,
        code=identity.code,
        short_mib=death.short_mib if death is not None else 0,
    )
    if death is None or not death.charges or len(suspects) != 1:
        return footer, []
    return footer, [_failure(run, call.sources[0], death) for call in suspects if call.alone]


def _seconds_run(calls: list[InFlight], until: float) -> dict[int, float]:
    """Return how long the sources in flight have been worked on, the longest of them.

    Nobody knows which source of a call the time went to, so each gets an equal part: one of
    them needs longer than that, and the next attempt works on them one by one.
    """
    ran: dict[int, float] = {}
    for call in calls:
        seconds = until - call.since
        if call.since and seconds >= _WORTH_TELLING_S:
            part = round(seconds / len(call.sources), 3)
            ran.update((source, max(part, ran.get(source, 0.0))) for source in call.sources)
    longest = sorted(ran, key=lambda source: (-ran[source], source))[:_MOST_TOLD]
    return {source: ran[source] for source in longest}


def _failure(run: RunDir, index: int, death: Death) -> Failure:
    """Return the failure of a source whose task died while it alone was being worked on."""
    source_id = Manifest.open(run).entry(index).source_id
    return Failure(
        source=index,
        source_id=source_id,
        item=source_id,
        stage="",
        kind=death.kind,
        message=death.message,
        attempt=0,
        short_mib=death.short_mib,
    )


def _publish_files(run: RunDir, ref: AttemptRef, frame: bytes, outputs_root: str | None) -> None:
    check_frame(frame, what="a committed frame")
    if not has_files(frame):
        return
    files = decode_frame(frame, what="a committed frame").files()
    if outputs_root is None:
        raise InternalError("sources have files, and nobody said where they are")
    for source_id, entries in files.items():
        for path, name in entries:
            local = output_path(outputs_root, source_id, path, name)
            target = output_path(run.attempt_path(ref, "files"), source_id, path, name)
            run.ensure(os.path.dirname(target))
            with storage_errors("look for", target):
                published = run.fs.exists(target)
            if not published or os.path.exists(local):
                _publish_file(run.fs, local, target)


def _publish_file(fs: FileSystem, local: str, target: str) -> Receipt:
    def pieces() -> Iterator[bytes]:
        offset = 0
        while piece := _read_local(local, offset):
            yield piece
            offset += len(piece)

    return publish(fs, target, pieces(), label="file")


def _read_local(path: str, offset: int) -> bytes:
    try:
        return POSIX.read(path, offset, _COPY_BYTES)
    except OSError as error:
        raise LocalStorageError(
            f"cannot read {path}: {error.strerror or error}. A stage wrote it with ctx.output() "
            "and its source counts as done only with it. "
            "Find out what removes files from the node-local disk, then submit again.",
            path=path,
        ) from error


def output_path(root: str, source_id: str, path: str, name: str) -> str:
    """Return where a file of ``ctx.output`` lies, below the node-local or the published root."""
    return os.path.join(root, source_digest(source_id).hex(), path or "root", name)
