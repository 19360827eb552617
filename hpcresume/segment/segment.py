"""The segment: the immutable, sealed unit that an attempt publishes.

Blocks are chunk frames as the ledger held them, then one block of failure records if there
are any.  Where the sink is ``hr.Parts`` the rows of the frames lie in one part beside the
segment, which is published first: a source counts only with the part that holds its rows.
The footer carries what merging needs (the completion bitmap, who wrote it) and what watching
needs (counters per stage, progress), so both read the end of the file only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator

import google_crc32c
import msgspec
from pyroaring import BitMap

from hpcresume.errors import CorruptDataError, RunDirError
from hpcresume.fs import Readable, digest_of, read_exact, reading
from hpcresume.segment import bitmap as bitmaps
from hpcresume.segment.container import (
    DECODE_ERRORS,
    Container,
    encode_container,
    open_container,
)
from hpcresume.segment.frame import Frame, decode_frame, frame_bitmap

KIND = b"SEGM"
NEEDS_LONGER = 1.1
"""A source that ran so long without finishing is not started with less than 1.1 times as long."""


class Writer(msgspec.Struct, frozen=True, order=True, array_like=True):
    """Who wrote a segment, in the order in which winners are chosen."""

    round: int
    task: int
    epoch: int

    def __str__(self) -> str:
        return f"round {self.round}, task {self.task}, attempt {self.epoch}"


class Failure(msgspec.Struct, frozen=True, omit_defaults=True):
    """One failed try of one source.

    Attributes:
        source: Index in the manifest.
        source_id: Its id.
        item: Id of the item that failed.
        stage: Name of the stage.
        kind: Exception type, ``Failed``, ``timeout``, ``death`` or ``out-of-memory``.
        message: One line.
        traceback: The traceback, or the tail of the worker's output.
        attempt: Number of the try, from 1, over all writers.
        retry: Whether the source may be tried again.
        short_mib: Memory of the array task that was not enough for it, where a later round
            is to give it more; 0 otherwise.
    """

    source: int
    source_id: str
    item: str
    stage: str
    kind: str
    message: str
    attempt: int
    traceback: str = ""
    retry: bool = True
    short_mib: int = 0


class StageCount(msgspec.Struct, array_like=True):
    """What one stage did in one attempt: items in and out, dropped, failed; busy seconds.

    Attributes:
        memory_mib: Most memory that a worker of it had resident; 0 where that was not recorded.
        spread: Items by what one took: under ``k`` those between ``2**k`` and ``2**(k + 1)``
            seconds.  Of items that were given to a worker together each counts with the mean.
    """

    name: str
    items_in: int = 0
    items_out: int = 0
    dropped: int = 0
    failed: int = 0
    seconds: float = 0.0
    memory_mib: int = 0
    spread: dict[int, int] = {}

    def add(self, other: StageCount) -> None:
        """Add what another attempt, or another call, did in the same stage."""
        self.items_in += other.items_in
        self.items_out += other.items_out
        self.dropped += other.dropped
        self.failed += other.failed
        self.seconds += other.seconds
        self.memory_mib = max(self.memory_mib, other.memory_mib)
        for power, items in other.spread.items():
            self.spread[power] = self.spread.get(power, 0) + items

    def note_spread(self) -> None:
        """Note what one item took on average."""
        if self.items_in and self.seconds > 0:
            self.spread[math.frexp(self.seconds / self.items_in)[1] - 1] = self.items_in


class Progress(msgspec.Struct, frozen=True):
    """How an attempt stands when it seals a segment.

    Attributes:
        elapsed_s: Seconds since the attempt's engine started.
        written_at: Wall-clock seconds, for people only; nothing is decided by it.
        in_flight: Sources handed to workers.
        completed: Sources this attempt has committed so far.
        failing: Sources that failed and will be tried again by this attempt.
        left: Sources of the shard that are neither completed nor quarantined.
        note: What the attempt waits for, empty when it works.
    """

    elapsed_s: float = 0.0
    written_at: float = 0.0
    in_flight: int = 0
    completed: int = 0
    failing: int = 0
    left: int = 0
    note: str = ""


class PartEntry(msgspec.Struct, frozen=True, array_like=True):
    """The part that holds a segment's rows: a file beside it, published before it.

    Attributes:
        name: Its name.
        size_bytes: Its size.
        digest: SHA-256 of its content.
    """

    name: str
    size_bytes: int
    digest: bytes


class SegmentFooter(msgspec.Struct):
    """What a segment says of itself.

    Attributes:
        run_id: The run it belongs to.
        writer: Round, task and epoch.
        seq: Number of the segment within its attempt, from 1.
        completed: Bitmap of the completed sources.
        chunks: For every frame: first index, last index, number of sources.
        has_failures: Whether the last block holds failure records.
        suspects: Bitmaps of sources that were in flight when the driver died.
        stages: Counters of the attempt so far.
        stage_names: Names of the stages, for item ids.
        progress: How the attempt stands.
        code: Number of the code snapshot that ran.
        ran: Sources that were in work when the attempt had to stop, with the seconds that it
            had worked on them: they need longer than that, and nobody is charged.
        short_mib: Memory of the array task that was not enough for the suspects, where a later
            round is to give them more; 0 otherwise.
    """

    run_id: str
    writer: Writer
    seq: int
    completed: bytes
    chunks: list[tuple[int, int, int]]
    has_failures: bool
    suspects: list[bytes]
    stages: list[StageCount]
    stage_names: list[str]
    progress: Progress
    code: int
    ran: dict[int, float] = {}
    short_mib: int = 0
    part: PartEntry | None = None

    def sources(self) -> int:
        """Return how many sources the frames complete."""
        return sum(count for _, _, count in self.chunks)


_FAILURES = msgspec.msgpack.Decoder(list[Failure])


class Segment(msgspec.Struct, frozen=True):
    """An opened segment; its footer is verified, its body is not."""

    container: Container[SegmentFooter]
    completed: BitMap

    @property
    def footer(self) -> SegmentFooter:
        """The verified footer."""
        return self.container.footer

    def frame_numbers(self) -> range:
        """Return the block numbers that hold frames."""
        return range(len(self.footer.chunks))

    def frame(self, number: int) -> Frame:
        """Return a frame, verified.

        Raises:
            CorruptDataError: The block or the frame fails its CRC, or it is another frame than
                the footer says.
        """
        what = f"{self.container.path}, chunk {number}"
        frame = decode_frame(self.container.read_block(number), what=what)
        # A block that ends in its own CRC has the same CRC as every other such block.
        if chunk_entry(frame.completed) != tuple(self.footer.chunks[number]):
            raise CorruptDataError(
                f"{what}: it holds other sources than the footer says. "
                "It is set aside and its sources are computed again.",
                path=self.container.path,
            )
        return frame

    def part_path(self) -> str:
        """Return the path of the part that holds the rows."""
        assert self.footer.part is not None
        return os.path.join(os.path.dirname(self.container.path), self.footer.part.name)

    def read_blob(self, frame: Frame) -> bytes:
        """Return the bytes of a frame's rows, from the part.

        Raises:
            CorruptDataError: They are damaged, or the segment names no such part.
            FileNotFoundError: The part is gone.
            SharedStorageError: The file system refused.
        """
        blob, part = frame.blob, self.footer.part
        assert blob is not None
        path = os.path.join(os.path.dirname(self.container.path), blob.file)
        if part is None or part.name != blob.file:
            raise _bad_part(path, "the segment names another part")
        with reading(path):
            data = read_exact(self.container.fs, path, blob.offset, blob.length)
        if google_crc32c.value(data) != blob.crc:
            raise _bad_part(path, f"the rows from byte {blob.offset} on fail their CRC")
        return data

    def verify_part(self) -> None:
        """Read the part and compare its digest.

        Raises:
            CorruptDataError: It differs from the footer's.
            FileNotFoundError: The part is gone.
            SharedStorageError: The file system refused.
        """
        part = self.footer.part
        if part is None:
            return
        path = self.part_path()
        with reading(path):
            digest = digest_of(self.container.fs, path)
        if digest != part.digest:
            raise _bad_part(path, "it fails its digest")

    def failures(self) -> list[Failure]:
        """Return the failure records, in the order they happened."""
        if not self.footer.has_failures:
            return []
        data = self.container.read_block(len(self.container.blocks) - 1)
        try:
            return _FAILURES.decode(data)
        except DECODE_ERRORS as error:
            raise CorruptDataError(
                f"{self.container.path}: its failure records cannot be decoded ({error}). "
                "It is set aside and its sources are computed again.",
                path=self.container.path,
            ) from error

    def verify(self) -> None:
        """Read the whole body and prove that it holds what the footer says.

        Raises:
            CorruptDataError: It does not.
            SharedStorageError: The file system refused.
        """
        self.container.verify()
        self.verify_part()
        found = BitMap()
        for number in self.frame_numbers():
            frame = self.frame(number)
            frame.paths()
            frame.files()
            found |= frame.completed
        if found != self.completed:
            raise CorruptDataError(
                f"{self.container.path}: its chunks do not hold the sources that its footer "
                "lists. It is set aside and its sources are computed again.",
                path=self.container.path,
            )
        self.failures()


def _bad_part(path: str, why: str) -> CorruptDataError:
    return CorruptDataError(
        f"{path}: {why}. Its segment is set aside and its sources are computed again.",
        path=path,
    )


def chunk_entry(sources: BitMap) -> tuple[int, int, int]:
    """Return what the footer says of a frame: first and last source, and how many."""
    return (sources.min(), sources.max(), len(sources)) if sources else (0, 0, 0)


def encode_segment(
    footer: SegmentFooter, frames: Iterable[bytes], failures: list[Failure]
) -> Iterator[bytes]:
    """Yield a segment's bytes; fills ``footer``'s bitmap and chunk table on the way."""

    def blocks() -> Iterator[bytes]:
        completed = BitMap()
        for frame in frames:
            sources = frame_bitmap(frame, what="a frame to be published")
            footer.chunks.append(chunk_entry(sources))
            completed |= sources
            yield frame
        footer.completed = bitmaps.dump(completed)
        if failures:
            footer.has_failures = True
            yield msgspec.msgpack.encode(failures)

    return encode_container(KIND, blocks(), footer)


def open_segment(fs: Readable, path: str, *, run_id: str) -> Segment:
    """Open a segment of a run and verify its footer.

    Raises:
        CorruptDataError: Not a whole segment, or one of another run.
        FileNotFoundError: There is no such file.
        SharedStorageError: The file system refused.
    """
    try:
        container = open_container(fs, path, KIND, SegmentFooter)
    except RunDirError as error:
        # One segment of the future is set aside; a run of the future says so itself.
        raise CorruptDataError(str(error), path=path) from error
    footer = container.footer
    if footer.run_id != run_id:
        raise CorruptDataError(
            f"{path} belongs to run {footer.run_id}, not to {run_id}. "
            "A file of another run was copied here. It is set aside.",
            path=path,
        )
    frames = len(container.blocks) - int(footer.has_failures)
    if frames != len(footer.chunks):
        raise CorruptDataError(
            f"{path}: {frames} chunks, but its footer lists {len(footer.chunks)}. "
            "It is set aside and its sources are computed again.",
            path=path,
        )
    return Segment(container, bitmaps.load(footer.completed, what=path))
