"""The chunk frame: what one chunk of sources completed, with its rows, as one byte string.

::

    u32 n | u32 bitmap length | u32 paths length | u32 files length |
    bitmap | n x u32 row end | paths | files | rows | u32 CRC-32C of all before it

``bitmap`` holds the indices of the ``n`` completed sources.  ``row end`` says, in index
order, where each source's rows end within ``rows``; rows are lines that end in a newline, in
item order within a source.  ``paths`` says which item each row is: ``=PATH`` where all rows
have one path, else ``z`` and the deflated paths, one per row.  ``files`` is empty, or JSON
``{source id: [[item path, name], ...]}`` of the files that belong to the sources.

A frame is built once, in the worker, and never taken apart on its way: the ledger, the
publisher and the merge step move it as bytes.  A segment is never merged in part, so rows
have no checksum of their own.

Where the sink is ``hr.Parts`` the rows lie in another file: the highest bit of ``n`` is set,
and in place of rows stands a :class:`Blob` that says where.  ``row end`` then counts bytes of
JSON lines, or rows of Parquet.  Publishing moves the rows into a part and makes the frame say
so; nothing else of it changes.
"""

from __future__ import annotations

import itertools
import operator
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import google_crc32c
import msgspec
import orjson
from pyroaring import BitMap

from hpcresume.errors import CorruptDataError, InternalError
from hpcresume.ids import ItemPath, decode_path, encode_path
from hpcresume.segment import bitmap as bitmaps
from hpcresume.segment.container import DECODE_ERRORS

_HEAD = struct.Struct("<IIII")
_CRC = struct.Struct("<I")
MAX_ROWS_BYTES = (1 << 32) - 1
_MAX_PATHS_BYTES = 1 << 30
_FILES = msgspec.json.Decoder(dict[str, list[tuple[str, str]]])
_ELSEWHERE = 1 << 31
JSONL, PARQUET = "jsonl", "parquet"
BLOB_FILE_BYTES = 4 << 20
"""A node-local file takes no further blob once it holds this many bytes."""


class Blob(msgspec.Struct, frozen=True, array_like=True):
    """Rows of one frame that lie in a node-local file, then in a part.

    Attributes:
        format: ``jsonl`` or ``parquet``.
        file: Name of the node-local file, then of the part beside the segment.
        offset: Where the rows begin in it, in bytes; of Parquet, its pages.
        length: Their bytes.
        crc: CRC-32C of these bytes.
        rows: How many rows they are.
        footer: Footer that makes the pages a Parquet file by themselves.
    """

    format: str
    file: str
    offset: int
    length: int
    crc: int
    rows: int
    footer: bytes = b""

    @property
    def end(self) -> int:
        """Where the last source's rows end, as the frame counts."""
        return self.length if self.format == JSONL else self.rows


_BLOB = msgspec.msgpack.Decoder(Blob)


class Columns(NamedTuple):
    """Completed sources without files, and their rows, column by column.

    Attributes:
        sources: Their indices, in order.
        owners: Index of the source of each row, in the same order.
        paths: Path of each row, in item order within a source.
        rows: The rows, as their sink has them.
    """

    sources: Sequence[int]
    owners: Sequence[int]
    paths: Sequence[ItemPath]
    rows: Sequence[Any]

    def check(self) -> None:
        """Refuse rows that would be given to the wrong sources.

        Raises:
            InternalError: They are not in the order of the sources.
        """
        if not all(map(operator.le, self.owners, itertools.islice(self.owners, 1, None))):
            raise InternalError("rows must be added to a frame in the order of their sources")


class FrameBuilder(msgspec.Struct):
    """Collects completed sources; :meth:`build` gives the frame.

    Sources must be added in increasing index order.
    """

    indices: list[int] = msgspec.field(default_factory=list)
    ends: list[int] = msgspec.field(default_factory=list)
    rows: list[bytes] = msgspec.field(default_factory=list)
    paths: list[ItemPath] = msgspec.field(default_factory=list)
    files: dict[str, list[tuple[str, str]]] = msgspec.field(default_factory=dict)
    size_bytes: int = 0

    def add(self, index: int, rows: Sequence[tuple[ItemPath, bytes]]) -> None:
        """Add a completed source with its rows, in item order, each ending in a newline."""
        for path, row in rows:
            self.rows.append(row)
            self.paths.append(path)
            self.size_bytes += len(row)
        self.indices.append(index)
        self.ends.append(self.size_bytes)

    def add_columns(self, columns: Columns) -> None:
        """Add completed sources with their rows.

        Raises:
            InternalError: The rows are not in the order of the sources.
        """
        columns.check()
        indices, owners, paths, rows = columns
        ends = list(itertools.accumulate(map(len, rows), initial=self.size_bytes))
        if list(owners) == list(indices):
            self.ends += ends[1:]
        else:
            self.ends += [ends[bisect_right(owners, index)] for index in indices]
        self.indices += indices
        self.rows += rows
        self.paths += paths
        self.size_bytes = ends[-1]

    def add_counted(self, index: int, paths: Sequence[ItemPath]) -> None:
        """Add a completed source whose rows lie elsewhere and are counted, one path for each."""
        self.paths += paths
        self.indices.append(index)
        self.ends.append(len(self.paths))

    def add_files(self, source_id: str, files: Sequence[tuple[ItemPath, str]]) -> None:
        """Record the files that belong to a source, by item and name."""
        self.files[source_id] = [(encode_path(path), name) for path, name in files]

    def lines(self) -> bytes:
        """Return all rows, each ending in a newline."""
        return b"".join(self.rows)

    def build(self, blob: Blob | None = None) -> bytes:
        """Return the frame.

        Args:
            blob: Where its rows lie; None: in the frame.

        Raises:
            CorruptDataError: The rows exceed what one frame can address (4 GiB).
            InternalError: The sources were not added in increasing index order, so that
                rows would be given to the wrong ones.
        """
        if not all(map(operator.lt, self.indices, itertools.islice(self.indices, 1, None))):
            raise InternalError("sources must be added to a frame in increasing index order")
        if self.size_bytes > MAX_ROWS_BYTES:
            raise CorruptDataError(
                f"{self.size_bytes} bytes of rows do not fit one chunk frame (4 GiB). "
                "One source made more rows than can be recorded together. "
                "Split it into several sources, or write files with ctx.output().",
                size_bytes=self.size_bytes,
            )
        bitmap = bitmaps.dump(BitMap(self.indices))
        paths = _encode_paths(self.paths)
        files = orjson.dumps(self.files) if self.files else b""
        n = len(self.indices)
        flag = _ELSEWHERE if blob is not None else 0
        head = _HEAD.pack(n | flag, len(bitmap), len(paths), len(files))
        ends = struct.pack(f"<{n}I", *self.ends)
        rows = self.lines() if blob is None else msgspec.msgpack.encode(blob)
        return _sealed(b"".join((head, bitmap, ends, paths, files, rows)))


def _sealed(body: bytes) -> bytes:
    return body + _CRC.pack(google_crc32c.value(body))


def _encode_paths(paths: Sequence[ItemPath]) -> bytes:
    if not paths:
        return b""
    first = paths[0]
    if paths.count(first) == len(paths):
        return b"=" + encode_path(first).encode()
    # A few paths stand again and again, mostly as the same objects: those compare fastest.
    keys = list(map(id, paths))
    objects = dict(zip(keys, paths, strict=True))
    encoded = {path: encode_path(path) for path in set(objects.values())}
    texts = {key: encoded[path] for key, path in objects.items()}
    return b"z" + zlib.compress("\n".join(map(texts.__getitem__, keys)).encode(), 1)


class Frame(msgspec.Struct, frozen=True):
    """A verified frame.

    Attributes:
        completed: Indices of the completed sources.
        rows: All rows, each ending in a newline; none where they lie elsewhere.
        blob: Where the rows lie; None: here.
    """

    completed: BitMap
    rows: bytes
    _ends: tuple[int, ...]
    _paths: bytes
    _files: bytes
    blob: Blob | None = None

    def sources(self) -> Iterator[tuple[int, bytes]]:
        """Yield each completed source's index and its rows, in index order."""
        for index, start, end in self.extents():
            yield index, self.rows[start:end]

    def extents(self) -> Iterator[tuple[int, int, int]]:
        """Yield each completed source's index and where its rows begin and end."""
        start = 0
        for index, end in zip(self.completed, self._ends, strict=True):
            yield index, start, end
            start = end

    def with_lines(self, rows: bytes, ends: Sequence[int] | None = None) -> Frame:
        """Return the frame with its rows as JSON lines, which lay elsewhere.

        Args:
            rows: All rows, each ending in a newline.
            ends: Where each source's rows end within them; None: as the frame says.
        """
        ends = self._ends if ends is None else tuple(ends)
        return Frame(self.completed, rows, ends, self._paths, self._files)

    def paths(self) -> list[ItemPath]:
        """Return the item path of every row, in the order of ``rows``.

        Raises:
            CorruptDataError: There are none, or not one for each row.
        """
        count = self.rows.count(b"\n") if self.blob is None else self.blob.rows
        try:
            found = _decode_paths(self._paths, count)
        except (ValueError, zlib.error) as error:
            raise _corrupt("item paths", str(error)) from error
        if len(found) != count:
            raise _corrupt("item paths", f"{len(found)} for {count} rows")
        return found

    def files(self) -> dict[str, list[tuple[str, str]]]:
        """Return ``{source id: [(item path, name), ...]}``.

        Raises:
            CorruptDataError: They cannot be decoded.
        """
        if not self._files:
            return {}
        try:
            return _FILES.decode(self._files)
        except DECODE_ERRORS as error:
            raise _corrupt("files of sources", str(error)) from error


def _decode_paths(data: bytes, count: int) -> list[ItemPath]:
    if not data:
        return []
    if data[:1] == b"=":
        return [decode_path(data[1:].decode())] * count
    inflate = zlib.decompressobj()
    text = inflate.decompress(data[1:], _MAX_PATHS_BYTES).decode()
    if data[:1] != b"z" or not inflate.eof:
        raise ValueError("neither one path nor a whole list of them")
    return [decode_path(line) for line in text.split("\n")]


def check_frame(data: bytes, *, what: str) -> int:
    """Verify a frame's CRC and lengths and return how many sources it completes.

    Raises:
        CorruptDataError: It is not a whole frame; ``what`` names where it came from.
    """
    if len(data) < _HEAD.size + _CRC.size:
        raise _corrupt(what, f"{len(data)} bytes are too few")
    if google_crc32c.value(data[: -_CRC.size]) != _CRC.unpack(data[-_CRC.size :])[0]:
        raise _corrupt(what, "it fails its CRC")
    n, bitmap_length, paths_length, files_length = _HEAD.unpack_from(data)
    n &= ~_ELSEWHERE
    if _HEAD.size + bitmap_length + 4 * n + paths_length + files_length > len(data) - _CRC.size:
        raise _corrupt(what, "its parts are longer than the frame")
    return int(n)


def decode_frame(data: bytes, *, what: str) -> Frame:
    """Return a verified frame.

    Raises:
        CorruptDataError: It is not a whole frame; ``what`` names where it came from.
    """
    n = check_frame(data, what=what)
    flagged, bitmap_length, paths_length, files_length = _HEAD.unpack_from(data)
    at = _HEAD.size
    completed = bitmaps.load(data[at : at + bitmap_length], what=what)
    at += bitmap_length
    ends = struct.unpack_from(f"<{n}I", data, at)
    at += 4 * n
    paths = data[at : at + paths_length]
    at += paths_length
    files = data[at : at + files_length]
    rows = data[at + files_length : -_CRC.size]
    blob = _decode_blob(rows, what) if flagged & _ELSEWHERE else None
    rows, last = (rows, len(rows)) if blob is None else (b"", blob.end)
    increasing = all(map(operator.le, ends, itertools.islice(ends, 1, None)))
    if len(completed) != n or not increasing or (ends[-1] if ends else 0) != last:
        raise _corrupt(what, "its row table does not match its rows")
    return Frame(completed, rows, ends, paths, files, blob)


def _decode_blob(data: bytes, what: str) -> Blob:
    try:
        blob = _BLOB.decode(data)
    except DECODE_ERRORS as error:
        raise _corrupt(what, f"it does not say where its rows lie ({error})") from error
    if blob.format not in (JSONL, PARQUET) or "/" in blob.file or min(blob.offset, blob.length) < 0:
        raise _corrupt(what, "it says of its rows what cannot be")
    return blob


def blob_of(data: bytes, *, what: str) -> Blob | None:
    """Return where the rows of a frame that was verified before lie; None: in the frame."""
    flagged, *lengths = _HEAD.unpack_from(data)
    if not flagged & _ELSEWHERE:
        return None
    at = _HEAD.size + 4 * (flagged & ~_ELSEWHERE) + sum(lengths)
    return _decode_blob(data[at : -_CRC.size], what)


def moved(data: bytes, blob: Blob) -> bytes:
    """Return a frame whose rows have come to lie in another place."""
    flagged, *lengths = _HEAD.unpack_from(data)
    at = _HEAD.size + 4 * (flagged & ~_ELSEWHERE) + sum(lengths)
    return _sealed(data[:at] + msgspec.msgpack.encode(blob))


def has_files(data: bytes) -> bool:
    """Tell whether files belong to sources of a frame that was verified before."""
    return bool(_HEAD.unpack_from(data)[3])


def frame_bitmap(data: bytes, *, what: str) -> BitMap:
    """Return the completed sources of a frame that was verified before."""
    _, length, _, _ = _HEAD.unpack_from(data)
    return bitmaps.load(data[_HEAD.size : _HEAD.size + length], what=what)


def _corrupt(what: str, why: str) -> CorruptDataError:
    return CorruptDataError(
        f"{what}: not a whole chunk frame: {why}. "
        "It is set aside and its sources are computed again.",
        what=what,
        why=why,
    )
