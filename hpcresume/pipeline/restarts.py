"""Restart points of a gzip file: where decompression can begin, and the 32 KiB before it.

``indexed_gzip`` finds them when the file is listed.  They are kept in the run directory, in
one container per file: its footer says where the points are, each block is one point's
window.  A reader opens one point, whatever the file's size.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import io
import itertools
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from hpcresume.errors import CorruptDataError
from hpcresume.fs import POSIX, FileSystem, list_names, publish
from hpcresume.pipeline.streams import Stream, import_for
from hpcresume.segment.container import Container, encode_container, open_container

KIND = b"GZPT"
SPACING_MIN, SPACING_MAX = 4 << 20, 32 << 20
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
        points: The points after the file's start, ascending; block i is the window of point i.
    """

    size_bytes: int
    digest: str
    spacing: int
    points: list[Point]


def spacing_of(size_bytes: int) -> int:
    """Return the distance of restart points for a gzip file of some size."""
    return min(SPACING_MAX, max(SPACING_MIN, size_bytes // 1024))


def directory_of(restarts: str | Path, path: Path) -> str:
    """Return the directory that holds a file's restart points."""
    name = hashlib.blake2b(os.fsencode(path), digest_size=12).hexdigest()
    return os.path.join(restarts, name)


class RestartStore(msgspec.Struct, frozen=True):
    """Where a listing keeps the restart points of the gzip files it reads."""

    fs: FileSystem
    directory: str

    def keep(self, path: Path, digest: str) -> list[Point]:
        """Find and publish a file's restart points, unless those of this content are there.

        Args:
            path: The gzip file.
            digest: Of its uncompressed content.

        Returns:
            The restart points.

        Raises:
            SourcesError: ``indexed_gzip`` is not installed.
            SharedStorageError: The file system refused.
        """
        import tempfile

        directory = directory_of(self.directory, path)
        names = list_names(self.fs, directory)
        footer = PointsFooter(path.stat().st_size, digest, spacing_of(path.stat().st_size), [])
        held = self._held(os.path.join(directory, names[-1])) if names else None
        if held and (held.size_bytes, held.digest) == (footer.size_bytes, digest):
            return held.points
        number = int(names[-1]) + 1 if names else 1
        for missing in (self.directory, directory):
            if not self.fs.exists(missing):
                self.fs.mkdir(missing)
        with tempfile.TemporaryDirectory() as temporary:
            exported = _export(path, footer.spacing, os.path.join(temporary, "index"))
            parts = encode_container(KIND, _windows(exported, footer), footer)
            publish(self.fs, os.path.join(directory, f"{number:04d}"), parts, label="restarts")
        return footer.points

    def _held(self, path: str) -> PointsFooter | None:
        try:
            return open_container(self.fs, path, KIND, PointsFooter).footer
        except (CorruptDataError, FileNotFoundError):
            return None


def furthest_apart(points: list[Point], size_bytes: int) -> int:
    """Return the most bytes of a file's content that lie between two places to read from."""
    places = [0, *(point.uncompressed for point in points), size_bytes]
    return max(after - before for before, after in itertools.pairwise(places))


def _export(path: Path, spacing: int, target: str) -> str:
    indexed_gzip = import_for(path, "indexed_gzip")
    # Given a name that is no text it crashes; an open file has none.
    with path.open("rb") as raw, indexed_gzip.IndexedGzipFile(raw, spacing=spacing) as file:
        file.build_full_index()
        file.export_index(target)
    return target


def _windows(exported: str, footer: PointsFooter) -> Iterator[bytes]:
    with open(exported, "rb") as file:
        *_, content_bytes, _, _, count = _HEAD.unpack(file.read(_HEAD.size))
        entries = [_POINT.unpack(file.read(_POINT.size)) for _ in range(count)]
        for compressed, uncompressed, bits, has_window in entries:
            # The index ends with a point at the content's end, where nothing is read from.
            if has_window and uncompressed < content_bytes:
                footer.points.append(Point(compressed, uncompressed, bits))
                yield file.read(_WINDOW)


@functools.lru_cache(maxsize=8)
def _opened(path: str) -> Container[PointsFooter]:
    return open_container(POSIX, path, KIND, PointsFooter)


class _Gzip:
    """A gzip file from a restart point."""

    def __init__(self, raw: IO[bytes], file: Any, offset: int, end: int, piece: int) -> None:
        self._raw, self._file, self._end, self._piece = raw, file, end, piece
        self.position, self._ready = offset, memoryview(b"")
        file.seek(offset)

    def read(self, size: int) -> bytes:
        if not self._ready:
            # Each read begins at a restart point again, so few large ones are made.
            wanted = min(self._piece, max(self._end - self.position, size))
            self._ready = memoryview(self._file.read(wanted))
        data, self._ready = bytes(self._ready[:size]), self._ready[size:]
        self.position += len(data)
        return data

    def restart_before(self, offset: int) -> tuple[int, int]:
        del offset
        return (0, 0)

    def close(self) -> None:
        self._file.close()
        self._raw.close()


def open_gzip_at(path: Path, offset: int, size_bytes: int, restarts: Path) -> Stream | None:
    """Open a gzip file at an uncompressed offset; None where no point is nearer than its start.

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
    if number < 0:
        return None
    spacing = container.footer.spacing
    index = _index_of(points[number], container.read_block(number), path, spacing)
    module = import_for(path, "indexed_gzip")
    # The unbuffered class: a buffer of its own would be filled beyond what is wanted.
    raw = path.open("rb")
    file = module.indexed_gzip._IndexedGzipFile(fileobj=raw, spacing=spacing)
    file.import_index(fileobj=io.BytesIO(index))
    return _Gzip(raw, file, offset, offset + size_bytes, 2 * spacing)


def _index_of(point: Point, window: bytes, path: Path, spacing: int) -> bytes:
    """Return an index of two points, the file's start and the one that is wanted."""
    head = _HEAD.pack(b"GZIDX", 1, 0, path.stat().st_size, 0, spacing, _WINDOW, 2)
    start = _POINT.pack(0, 0, 0, 0)
    return head + start + _POINT.pack(*msgspec.to_builtins(point), 1) + window
