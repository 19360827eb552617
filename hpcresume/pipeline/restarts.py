"""Restart points of a gzip file: where decompression can begin, and the 32 KiB before it.

They are found when the file is listed: within its members by ``indexed_gzip``, and where a
member starts, which needs no bytes before it, by reading.  They are kept in the run
directory, in one container per file: its footer says where the points are, each block is
one point's window.  A reader opens one point, whatever the file's size.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import heapq
import io
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from hpcresume.errors import CorruptDataError
from hpcresume.fs import POSIX, FileSystem, list_names, publish
from hpcresume.pipeline.members import Members, MemberStream, spacing_of
from hpcresume.pipeline.streams import Stream, import_for
from hpcresume.segment.container import Container, encode_container, open_container

KIND = b"GZPT"
_WINDOW = 32768
# The layout of an index that indexed_gzip exports and imports, version 1 (its zran.c).
_HEAD = struct.Struct("<5sBBQQIII")
_POINT = struct.Struct("<QQBB")


class Point(msgspec.Struct, array_like=True):
    """A restart point: offsets in bytes, and bits of the byte before that belong to it."""

    compressed: int
    uncompressed: int
    bits: int


class PointsFooter(msgspec.Struct):
    """What a file's restart points are.

    Attributes:
        size_bytes: Size of the gzip file.
        digest: Of its uncompressed content.
        spacing: Uncompressed bytes from point to point.
        points: The points after the file's start, ascending; block i is the window of point i,
            empty where a gzip member starts.
    """

    size_bytes: int
    digest: str
    spacing: int
    points: list[Point]


def directory_of(restarts: str | Path, path: Path) -> str:
    """Return the directory that holds a file's restart points."""
    name = hashlib.blake2b(os.fsencode(path), digest_size=12).hexdigest()
    return os.path.join(restarts, name)


class RestartStore(msgspec.Struct, frozen=True):
    """Where a listing keeps the restart points of the gzip files it reads."""

    fs: FileSystem
    directory: str

    def keep(self, path: Path, digest: str, members: Members) -> None:
        """Find and publish a file's restart points, unless those of this content are there.

        Args:
            path: The gzip file.
            digest: Of its uncompressed content.
            members: Where its members start.

        Raises:
            SourcesError: ``indexed_gzip`` is not installed.
            SharedStorageError: The file system refused.
        """
        import tempfile

        directory = directory_of(self.directory, path)
        names = list_names(self.fs, directory)
        footer = PointsFooter(path.stat().st_size, digest, spacing_of(path.stat().st_size), [])
        if names and self._holds(os.path.join(directory, names[-1]), footer, members):
            return
        number = int(names[-1]) + 1 if names else 1
        for missing in (self.directory, directory):
            if not self.fs.exists(missing):
                self.fs.mkdir(missing)
        with tempfile.TemporaryDirectory() as temporary:
            windows: Iterator[tuple[Point, bytes]] = iter(())
            # indexed_gzip finds nothing in a member of less than one spacing.
            if members.longest_bytes > footer.spacing:
                exported = _export(path, footer.spacing, os.path.join(temporary, "index"))
                windows = _windows(exported)
            parts = encode_container(KIND, _blocks(windows, members, footer), footer)
            publish(self.fs, os.path.join(directory, f"{number:04d}"), parts, label="restarts")

    def _holds(self, path: str, wanted: PointsFooter, members: Members) -> bool:
        try:
            held = open_container(self.fs, path, KIND, PointsFooter).footer
        except (CorruptDataError, FileNotFoundError):
            return False
        places = {(point.compressed, point.uncompressed) for point in held.points}
        # Earlier versions looked for points within members only.
        same = (held.size_bytes, held.digest) == (wanted.size_bytes, wanted.digest)
        return same and places.issuperset(members.starts)


def _export(path: Path, spacing: int, target: str) -> str:
    indexed_gzip = import_for(path, "indexed_gzip")
    # Given a name that is no text it crashes; an open file has none.
    with path.open("rb") as raw, indexed_gzip.IndexedGzipFile(raw, spacing=spacing) as file:
        file.build_full_index()
        file.export_index(target)
    return target


def _windows(exported: str) -> Iterator[tuple[Point, bytes]]:
    with open(exported, "rb") as file:
        *_, content_bytes, _, _, count = _HEAD.unpack(file.read(_HEAD.size))
        entries = [_POINT.unpack(file.read(_POINT.size)) for _ in range(count)]
        for compressed, uncompressed, bits, has_window in entries:
            # The index ends with a point at the content's end, where nothing is read from.
            if has_window and uncompressed < content_bytes:
                yield Point(compressed, uncompressed, bits), file.read(_WINDOW)


def _blocks(
    windows: Iterator[tuple[Point, bytes]], members: Members, footer: PointsFooter
) -> Iterator[bytes]:
    starts = ((Point(*start, 0), b"") for start in members.starts)
    for point, window in heapq.merge(windows, starts, key=lambda found: found[0].uncompressed):
        footer.points.append(point)
        yield window


@functools.lru_cache(maxsize=8)
def _opened(path: str) -> Container[PointsFooter]:
    return open_container(POSIX, path, KIND, PointsFooter)


class Place(msgspec.Struct, frozen=True):
    """One of a file's restart points."""

    path: Path
    container: Container[PointsFooter]
    number: int

    @property
    def point(self) -> Point:
        """Where it lies."""
        return self.container.footer.points[self.number]

    @property
    def is_member(self) -> bool:
        """Whether a gzip member starts there."""
        return self.container.blocks[self.number].length == 0

    def open(self, offset: int) -> Stream:
        """Open the file to be read from an offset soon after this one.

        Raises:
            CorruptDataError: The point's window is damaged.
        """
        if self.is_member:
            return MemberStream(self.path, (self.point.compressed, self.point.uncompressed))
        return _WindowStream(self, offset)

    def next_member(self) -> Place | None:
        """Return the next point where a member starts."""
        blocks = self.container.blocks
        later = range(self.number + 1, len(blocks))
        number = next((number for number in later if blocks[number].length == 0), None)
        return None if number is None else Place(self.path, self.container, number)


def place_before(path: Path, offset: int, restarts: Path) -> Place | None:
    """Return the last restart point up to an uncompressed offset; None for the file's start.

    Raises:
        CorruptDataError: The restart points are damaged.
    """
    directory = directory_of(restarts, path)
    names = list_names(POSIX, directory)
    if not names:
        return None
    container = _opened(os.path.join(directory, names[-1]))
    points = container.footer.points
    number = bisect.bisect_right(points, offset, key=lambda point: point.uncompressed) - 1
    return Place(path, container, number) if number >= 0 else None


class _WindowStream(Stream):
    """A gzip file from within a member up to the next point at a member's start, and on."""

    def __init__(self, place: Place, offset: int) -> None:
        spacing = place.container.footer.spacing
        window = place.container.read_block(place.number)
        index = _index_of(place.point, window, place.path, spacing)
        module = import_for(place.path, "indexed_gzip")
        # The unbuffered class: a buffer of its own would be filled beyond what is wanted.
        self._raw = place.path.open("rb")
        self._file = module.indexed_gzip._IndexedGzipFile(fileobj=self._raw, spacing=spacing)
        self._file.import_index(fileobj=io.BytesIO(index))
        self._file.seek(offset)
        self.position = self._end = offset
        self._piece = 2 * spacing
        self._ready = memoryview(b"")
        self._next = place.next_member()
        self._rest: Stream | None = None

    def read(self, size: int) -> bytes:
        if self._next and self.position == self._next.point.uncompressed:
            self._rest, self._next = self._next.open(self.position), None
        data = self._rest.read(size) if self._rest else self._read_member(size)
        self.position += len(data)
        return data

    def _read_member(self, size: int) -> bytes:
        if not self._ready:
            # Each read begins at a restart point again, so few large ones are made.
            left = self._next.point.uncompressed - self.position if self._next else sys.maxsize
            wanted = min(self._piece, max(self._end - self.position, size), left)
            self._ready = memoryview(self._file.read(wanted))
        data, self._ready = bytes(self._ready[:size]), self._ready[size:]
        return data

    def expect(self, end: int) -> None:
        self._end = end

    def close(self) -> None:
        self._file.close()
        self._raw.close()
        if self._rest:
            self._rest.close()


def _index_of(point: Point, window: bytes, path: Path, spacing: int) -> bytes:
    """Return an index of two points, the file's start and the one that is wanted."""
    head = _HEAD.pack(b"GZIDX", 1, 0, path.stat().st_size, 0, spacing, _WINDOW, 2)
    start = _POINT.pack(0, 0, 0, 0)
    return head + start + _POINT.pack(*msgspec.to_builtins(point), 1) + window
