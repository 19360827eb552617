"""The rows of a run in manifest order, each source's once, read in constant memory.

Every source belongs to the one segment whose ``won`` bitmap holds it.  Segments are opened
when the merge reaches their first source and frames when it reaches theirs; a frame is left
as soon as its last source is out.  Where frames interleave, what is held open is bounded in
bytes: the frames needed last are dropped and read again.

A frame that fails its CRC raises :class:`BadSegmentError`, which names the segment;
:func:`take_back_segment` then reopens its sources.
"""

from __future__ import annotations

import heapq
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson
from pyroaring import BitMap

from hpcresume.errors import CorruptDataError, RunDirError
from hpcresume.ids import ItemPath
from hpcresume.merge.generation import (
    Union,
    find_elsewhere,
    find_segment,
    read_union,
    relative_name,
    take_back,
    write_generation,
)
from hpcresume.merge.packs import Key, Packs, name_of
from hpcresume.merge.plan import newest_plan
from hpcresume.run.directory import RunDir, SegmentName
from hpcresume.run.manifest import Manifest
from hpcresume.segment.frame import PARQUET, Frame, decode_frame
from hpcresume.segment.parquet_footer import whole
from hpcresume.segment.segment import Segment
from hpcresume.sinks.parquet import read_table, table_lines

OPEN_BYTES = 256 << 20
DEFAULT_MAX_ATTEMPTS = 3


class BadSegmentError(CorruptDataError):
    """A segment that a generation took in cannot give what its footer promises.

    ``fields["segment"]`` is its :class:`SegmentName`, ``fields["why"]`` the reason.
    """


class RowSlice(NamedTuple):
    """Where one source's rows lie within its frame: bytes, and lines before them."""

    start: int
    end: int
    line: int


@dataclass
class LoadedFrame:
    """A frame in memory, with the sources that are taken from it.

    Attributes:
        segment: The segment it is of.
        stage_names: Names of the stages, for item ids.
        columns: The frame; of Parquet its rows are in ``parquet``, and counted.
        kept: The sources that are taken from it.
        parquet: Its rows as a Parquet file by themselves; empty where they are JSON lines.
    """

    segment: SegmentName
    stage_names: list[str]
    columns: Frame
    kept: BitMap
    parquet: bytes = b""
    _lines: Frame | None = None
    _slices: dict[int, RowSlice] = field(default_factory=dict)
    _paths: list[ItemPath] | None = None
    _files: dict[str, list[tuple[str, str]]] | None = None

    @property
    def frame(self) -> Frame:
        """The frame with its rows as JSON lines."""
        if not self.parquet:
            return self.columns
        if self._lines is None:
            self._lines = as_lines(self.columns, table_lines(self.table()))
        return self._lines

    def table(self, sources: BitMap | None = None) -> Any:
        """Return the rows of some of its sources as a table; of all of them by default."""
        table = read_table(self.parquet)
        if sources is None or sources == self.columns.completed:
            return table
        keep = (range(start, end) for i, start, end in self.columns.extents() if i in sources)
        return table.take(list(itertools.chain.from_iterable(keep)))

    def slices(self) -> dict[int, RowSlice]:
        """Return where each source's rows lie."""
        if not self._slices:
            line = 0
            for index, start, end in self.frame.extents():
                self._slices[index] = RowSlice(start, end, line)
                line += self.frame.rows.count(b"\n", start, end)
        return self._slices

    def paths(self) -> list[ItemPath]:
        """Return the item path of every line of the frame."""
        if self._paths is None:
            self._paths = self.columns.paths()
        return self._paths

    def has_files(self) -> bool:
        """Tell whether any source of the frame has files."""
        if self._files is None:
            self._files = self.columns.files()
        return bool(self._files)

    def files(self, source_id: str) -> list[tuple[str, str]]:
        """Return the files of a source: item path as text, and name."""
        return (self._files or {}).get(source_id, []) if self.has_files() else []


@dataclass(frozen=True, slots=True)
class SourceRows:
    """What one source produced.

    Attributes:
        source: Its index in the manifest.
        rows: Its rows without newlines, in item order.
        paths: The item each row is.
        origin: The frame that they come from.
    """

    source: int
    rows: list[bytes]
    paths: list[ItemPath]
    origin: LoadedFrame


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive sources of the result that come from one frame.

    Attributes:
        sources: Their indices, ascending.
        origin: The frame.
    """

    sources: BitMap
    origin: LoadedFrame

    @property
    def rows(self) -> bytes:
        """All their rows, each ending in a newline."""
        frame = self.origin.frame
        if len(self.sources) == len(frame.completed):
            return frame.rows
        return _rows_of(self.origin, self.sources)

    def objects(self) -> Iterator[Any]:
        """Yield their rows, decoded."""
        if self.origin.parquet:
            return iter(self.origin.table(self.sources).to_pylist())
        return map(orjson.loads, self.rows.splitlines())

    def by_source(self) -> Iterator[tuple[int, list[ItemPath]]]:
        """Yield each source with the item that each of its rows is."""
        origin, paths, line = self.origin, self.origin.paths(), 0
        for index, start, end in origin.columns.extents():
            rows = end - start if origin.parquet else origin.columns.rows.count(b"\n", start, end)
            if index in self.sources:
                yield index, paths[line : line + rows]
            line += rows

    def each(self) -> Iterator[SourceRows]:
        """Yield the sources one by one."""
        slices, data = self.origin.slices(), self.origin.frame.rows
        paths = self.origin.paths()
        for index in self.sources:
            at = slices[index]
            rows = data[at.start : at.end].split(b"\n")[:-1]
            yield SourceRows(index, rows, paths[at.line : at.line + len(rows)], self.origin)


@dataclass
class _SegmentCursor:
    """A segment that wins some of the result's sources; ``won`` shrinks as frames claim them.

    It may lie in two places, under its own name and in a pack, and may be moved while it is
    read: what one place does not give is taken from the other.
    """

    packs: Packs
    key: Key
    pack: int
    won: BitMap
    opened: Segment | None = None

    @property
    def name(self) -> SegmentName:
        return name_of(self.key)

    def open(self) -> Segment:
        if self.opened is None:
            with BadSegments(self.packs.run, self.name):
                self.opened = find_segment(self.packs, self.key, self.pack)
        return self.opened

    def read(self, number: int, kept: BitMap | None) -> LoadedFrame:
        segment = self.open()
        try:
            frame, parquet = read_frame(segment, number)
        except (CorruptDataError, FileNotFoundError) as error:
            with BadSegments(self.packs.run, self.name):
                segment = self.opened = find_elsewhere(self.packs, self.key, self.pack, error)
                frame, parquet = read_frame(segment, number)
        if kept is None:
            kept = frame.completed & self.won
            self.won -= kept
        return LoadedFrame(self.name, segment.footer.stage_names, frame, kept, parquet)


@dataclass
class _FrameCursor:
    """One frame; ``rest`` is what is still to be yielded, None before it is first read."""

    owner: _SegmentCursor
    number: int
    rest: BitMap | None = None
    kept: BitMap | None = None
    loaded: LoadedFrame | None = None

    @property
    def size_bytes(self) -> int:
        if self.loaded is None:
            return self.owner.open().container.blocks[self.number].length
        return len(self.loaded.columns.rows) + len(self.loaded.parquet)

    def load(self) -> LoadedFrame:
        if self.loaded is None:
            self.loaded = self.owner.read(self.number, self.kept)
            if self.kept is None:
                self.kept = self.loaded.kept
                self.rest = self.kept.copy()
        return self.loaded

    def take(self, limit: int | None) -> Span:
        """Return the next sources below ``limit`` (all of them for None), at least one."""
        loaded, rest = self.load(), self.rest
        assert rest
        taken = rest if limit is None else rest & BitMap(range(rest[0], max(limit, rest[0] + 1)))
        self.rest = rest - taken
        return Span(taken, loaded)


def _rows_of(loaded: LoadedFrame, sources: BitMap) -> bytes:
    slices, rows = loaded.slices(), loaded.frame.rows
    return b"".join([rows[slices[i].start : slices[i].end] for i in sources])


def as_lines(frame: Frame, rows: list[bytes]) -> Frame:
    """Return a frame of counted rows with these rows as JSON lines."""
    bounds = [0, *itertools.accumulate(len(row) + 1 for row in rows)]
    ends = [bounds[end] for _, _, end in frame.extents()]
    return frame.with_lines(b"".join([row + b"\n" for row in rows]), ends)


def frame_of_blob(data: bytes, root: str) -> Frame:
    """Return a worker's frame with its rows as JSON lines for people, wherever they lie.

    Args:
        data: The frame.
        root: Directory of the blobs.
    """
    frame = decode_frame(data, what="a worker's frame")
    if frame.blob is None:
        return frame
    with open(os.path.join(root, frame.blob.file), "rb") as file:
        file.seek(frame.blob.offset)
        rows = file.read(frame.blob.length)
    if frame.blob.format == PARQUET:
        table = read_table(whole(rows, frame.blob.footer))
        return as_lines(frame, table_lines(table, bytes_as_text=True))
    return frame.with_lines(rows)


def read_frame(segment: Segment, number: int) -> tuple[Frame, bytes]:
    """Return a frame with its rows, and these as a Parquet file where that is their format.

    Raises:
        CorruptDataError: The frame or its rows are damaged.
        FileNotFoundError: The part with its rows is gone.
    """
    frame = segment.frame(number)
    if frame.blob is None:
        return frame, b""
    data = segment.read_blob(frame)
    if frame.blob.format == PARQUET:
        return frame, whole(data, frame.blob.footer)
    return frame.with_lines(data), b""


class BadSegments:
    """Turns damage found while reading a segment into an error that names it."""

    def __init__(self, run: RunDir, name: SegmentName) -> None:
        self._run, self._name = run, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, CorruptDataError | FileNotFoundError):
            raise bad_segment(self._run, self._name, str(error)) from error


def bad_segment(run: RunDir, name: SegmentName, why: str) -> BadSegmentError:
    """Return the error for a segment that cannot give what its footer promises."""
    return BadSegmentError(
        f"{relative_name(run, name)}: {why} Its sources are open again. Run: hpcresume submit RUN",
        segment=name,
        why=why,
    )


def union_of(run: RunDir) -> Union:
    """Return what is done in a run as of now, under the settings of its newest round."""
    plan = newest_plan(run)
    settings = plan.footer.settings if plan is not None else {}
    max_attempts = settings.get("run", {}).get("max_attempts", DEFAULT_MAX_ATTEMPTS)
    return read_union(run, max_attempts=max_attempts)


def spans(run: RunDir, union: Union, manifest: Manifest) -> Iterator[Span]:
    """Yield the completed sources' rows in manifest order; withdrawn sources are left out.

    Raises:
        BadSegmentError: A segment's body is damaged or lacks a source that it won.
        SharedStorageError: A segment cannot be read.
    """
    withdrawn, packs = manifest.withdrawn(), Packs(run)
    segments = [
        _SegmentCursor(packs, key, union.pack_of.get(key, 0), won)
        for key, all_won in union.won.items()
        if (won := all_won - withdrawn)
    ]
    yield from _merge(segments)
    for segment in segments:
        if segment.won:
            why = f"its footer lists source {segment.won[0]}, which none of its chunks holds."
            raise bad_segment(run, segment.name, why)


# Position in the result; 0 for what must be read before sources of that position may leave;
# a tie-breaker; the cursor.
_Entry = tuple[int, int, int, "_SegmentCursor | _FrameCursor"]


def _merge(segments: list[_SegmentCursor]) -> Iterator[Span]:
    heap: list[_Entry] = [(s.won[0], 0, n, s) for n, s in enumerate(segments)]
    heapq.heapify(heap)
    serial = len(heap)
    opened = _OpenFrames()
    while heap:
        _, _, _, cursor = heapq.heappop(heap)
        if isinstance(cursor, _SegmentCursor):
            for entry in _frame_entries(cursor, serial):
                heapq.heappush(heap, entry)
                serial = entry[2] + 1
            continue
        is_new = cursor.rest is None
        opened.admit(cursor)
        if not is_new:
            yield cursor.take(heap[0][0] if heap else None)
        if cursor.rest:
            heapq.heappush(heap, (cursor.rest[0], 1, serial, cursor))
            serial += 1
        else:
            opened.leave(cursor)


def _frame_entries(segment: _SegmentCursor, serial: int) -> Iterator[_Entry]:
    chunks = segment.open().footer.chunks
    for number, (first, last, count) in enumerate(chunks):
        if count and segment.won.range_cardinality(first, last + 1):
            yield first, 0, serial + number, _FrameCursor(segment, number)


class _OpenFrames:
    """The frames in memory, bounded in bytes."""

    def __init__(self) -> None:
        self._open: list[_FrameCursor] = []
        self._size_bytes = 0

    def admit(self, cursor: _FrameCursor) -> None:
        if cursor.loaded is not None:
            return
        # How much a frame holds is known once it is read, where its rows lie in a part.
        cursor.load()
        while self._open and self._size_bytes + cursor.size_bytes > OPEN_BYTES:
            furthest = max(self._open, key=lambda c: c.rest[0] if c.rest else 0)
            self.leave(furthest)
        self._open.append(cursor)
        self._size_bytes += cursor.size_bytes

    def leave(self, cursor: _FrameCursor) -> None:
        self._open.remove(cursor)
        self._size_bytes -= cursor.size_bytes
        cursor.loaded = None


def take_back_segment(run: RunDir, error: BadSegmentError) -> Union:
    """Record that a segment is bad, which reopens its sources, and return what is done now.

    Raises:
        SharedStorageError: The run directory refused the new generation.
    """
    while True:
        union = union_of(run)
        try:
            take_back(run, union, error.fields["segment"], error.fields["why"])
            write_generation(run, union)
        except RunDirError:
            # Another process took it back first.
            return union
        except FileExistsError:
            # Another merge published this number first; its generation is taken up.
            continue
        return union
