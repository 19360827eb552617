"""Where the chunks of a file lie, and the rows of a chunk, format by format.

Listing reads a file once, in blocks; it counts lines or records and parses nothing it need
not.  Positions are those of lines for JSONL and text, so that an error can name the line,
and those of records for the other formats.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import itertools
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcresume.errors import SourcesError
from hpcresume.pipeline.chunk import Chunk
from hpcresume.pipeline.members import Members, MemberStream
from hpcresume.pipeline.records import (
    check_width,
    csv_error,
    dialect_of,
    file_size,
    json_row,
    line_text,
    open_file,
    parquet_file,
    read_lines,
    reading,
)
from hpcresume.pipeline.streams import (
    BLOCK_BYTES,
    Stream,
    Window,
    import_for,
    open_at,
    open_stream,
)


@dataclass(slots=True)
class Extent:
    """Where a chunk lies; see :class:`Chunk`."""

    first: int
    count: int
    offset: int = 0
    size_bytes: int = 0
    digest: str = ""
    columns: tuple[str, ...] = ()
    restart: tuple[int, int] = (0, 0)


@dataclass
class Listed:
    """What listing a file found besides its chunks; filled when the listing has ended.

    Attributes:
        size_bytes: Size of its content, uncompressed.
        digest: Of its content.
        single_frame: Whether it is one Zstandard frame, which can be read from its start only.
        members: Those of a gzip file.
    """

    size_bytes: int = 0
    digest: str = ""
    single_frame: bool = False
    members: Members | None = None


Lister = Callable[[Path, int, Listed], Iterator[Extent]]


def _new_digest() -> Any:
    return hashlib.blake2b(digest_size=8)


class _Range:
    """The range that a listing is in."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._whole = stream, _new_digest()
        self.first = self.count = self.offset = self.size = 0
        self._digest = _new_digest()

    def add(self, data: Any, count: int) -> None:
        self._digest.update(data)
        self._whole.update(data)
        self.size += len(data)
        self.count += count

    def skip(self, data: bytes) -> None:
        """Leave out bytes before the first row."""
        self._whole.update(data)
        self.offset += len(data)

    def close(self, columns: tuple[str, ...] = ()) -> Extent:
        extent = Extent(
            self.first,
            self.count,
            self.offset,
            self.size,
            self._digest.hexdigest(),
            columns,
            self._stream.restart_before(self.offset),
        )
        self.first += self.count
        self.offset += self.size
        self.count = self.size = 0
        self._digest = _new_digest()
        return extent

    def finish(self, listed: Listed, path: Path) -> None:
        listed.size_bytes, listed.digest = self.offset, self._whole.hexdigest()
        last = self._stream.restart_before(self.offset)
        listed.single_frame = path.suffix == ".zst" and last == (0, 0)
        if isinstance(self._stream, MemberStream):
            listed.members = self._stream.members


def _list_lines(path: Path, rows: int, listed: Listed) -> Iterator[Extent]:
    with _streamed(path) as stream:
        current = _Range(stream)
        while block := _read(stream, path):
            view, start = memoryview(block), 0
            left = block.count(b"\n")
            while left + current.count >= rows:
                wanted = rows - current.count
                end = _after_newlines(block, start, wanted)
                current.add(view[start:end], wanted)
                yield current.close()
                start, left = end, left - wanted
            current.add(view[start:], left)
            ended = block.endswith(b"\n")
        if current.size:
            current.count += not ended  # the last line has no end
            yield current.close()
        current.finish(listed, path)


def _after_newlines(block: bytes, at: int, count: int) -> int:
    for _ in range(count):
        at = block.index(b"\n", at) + 1
    return at


class _streamed:  # noqa: N801  # used as a function
    def __init__(self, path: Path) -> None:
        self._stream = open_stream(path)

    def __enter__(self) -> Stream:
        return self._stream

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def _read(stream: Stream, path: Path) -> bytes:
    with reading(path):
        return stream.read(BLOCK_BYTES)


def _list_csv(path: Path, rows: int, listed: Listed) -> Iterator[Extent]:
    with _streamed(path) as stream:
        current, columns, taken = _Range(stream), None, list[bytes]()
        file = io.BufferedReader(Window(stream, sys.maxsize, _new_digest()), BLOCK_BYTES)
        reader = csv.reader(_noted_lines(file, path, taken), dialect_of(path), strict=True)
        with csv_error(path, reader):
            for row in reader:
                data = b"".join(taken)
                taken.clear()
                if columns is None:
                    columns = tuple(row) or None
                    current.skip(data)
                    continue
                current.add(data, bool(row))
                if current.count == rows:
                    yield current.close(columns)
        if current.count:
            yield current.close(columns or ())
        current.finish(listed, path)


def _noted_lines(file: Any, path: Path, taken: list[bytes]) -> Iterator[str]:
    n = 0
    while True:
        with reading(path):
            raw = file.readline()
        if not raw:
            return
        taken.append(raw)
        yield line_text(raw, path, n)
        n += 1


def _list_parquet(path: Path, rows: int, listed: Listed) -> Iterator[Extent]:
    del listed
    with parquet_file(path) as file:
        digest, total = _parquet_digest(path, file), file.metadata.num_rows
    for first in range(0, total, rows):
        yield Extent(first, min(rows, total - first), digest=digest)


def _parquet_digest(path: Path, file: Any) -> str:
    with reading(path), path.open("rb") as raw:
        size = raw.seek(0, io.SEEK_END)
        raw.seek(max(0, size - 8 - file.metadata.serialized_size))
        return hashlib.blake2b(b"%d:" % size + raw.read(), digest_size=8).hexdigest()


def _list_warc(path: Path, rows: int, listed: Listed) -> Iterator[Extent]:
    del listed
    first = start = at = number = 0
    for number, at in enumerate(_record_offsets(path), 1):  # used below
        if number - first > rows:
            yield _warc_extent(path, first, rows, start, at)
            first, start = first + rows, at
    if number:
        size = _check_last_record(path, at)
        yield _warc_extent(path, first, number - first, start, size)


def _record_offsets(path: Path) -> Iterator[int]:
    with _warc_file(path, 0) as records:
        for _ in records:
            yield records.get_record_offset()


@contextlib.contextmanager
def _warc_file(path: Path, offset: int, *, parse_http: bool = False) -> Iterator[Any]:
    """Give the records from an offset in the file as it is, which is where one begins."""
    if not file_size(path):
        yield iter(())
        return
    iterator = import_for(path, "warcio.archiveiterator").ArchiveIterator
    broken = import_for(path, "warcio.exceptions").ArchiveLoadFailed
    try:
        with reading(path), open_file(path) as file:
            file.seek(offset)
            yield iterator(file, no_record_parse=not parse_http)
    except broken as error:
        why = " ".join(str(error).split())
        raise SourcesError(
            f"{path} cannot be read as WARC: {why}. It holds the sources.", path=str(path)
        ) from error


def _check_last_record(path: Path, offset: int) -> int:
    """Return the file's size; refuse a file whose last record is not whole."""
    with _warc_file(path, offset) as records:
        record = next(records)
        length = record.rec_headers.get_header("Content-Length")
        found = len(record.raw_stream.read())
    with reading(path), path.open("rb") as file:
        file.seek(offset)
        member, ended = zlib.decompressobj(31), path.suffix != ".gz"
        while not ended and (block := file.read(BLOCK_BYTES)):
            member.decompress(block)
            ended = member.eof
        size = file.seek(0, io.SEEK_END)
    if length is None or found != int(length) or not ended:
        raise SourcesError(
            f"{path}: its last record, at byte {offset}, is not whole. "
            "The file is still being written, or was cut. Submit when it is whole.",
            path=str(path),
        )
    return size


def _warc_extent(path: Path, first: int, count: int, start: int, end: int) -> Extent:
    digest = _new_digest()
    with reading(path), path.open("rb") as file:
        file.seek(start)
        while file.tell() < end and (block := file.read(min(BLOCK_BYTES, end - file.tell()))):
            digest.update(block)
    return Extent(first, count, start, end - start, digest.hexdigest())


LISTERS: dict[str, Lister] = {
    "jsonl": _list_lines,
    "lines": _list_lines,
    "csv": _list_csv,
    "tsv": _list_csv,
    "parquet": _list_parquet,
    "warc": _list_warc,
}


def read_chunk(chunk: Chunk) -> Iterator[Any]:
    """Yield a chunk's rows.

    Raises:
        SourcesError: The file cannot be read, is no longer what was listed, or a row is not
            of its format.
    """
    if chunk.format == "parquet":
        return _parquet_rows(chunk)
    if chunk.format == "warc":
        return _warc_rows(chunk)
    return _stream_rows(chunk)


def _stream_rows(chunk: Chunk) -> Iterator[Any]:
    digest = _new_digest()
    with open_at(
        chunk.path,
        chunk.offset,
        chunk.size_bytes,
        restart=chunk.restart,
        restarts=chunk.restarts,
    ) as stream:
        window = Window(stream, chunk.size_bytes, digest)
        yield from _PARSERS[chunk.format](io.BufferedReader(window, BLOCK_BYTES), chunk)
        if window.left:
            raise chunk.changed(f"{window.left} bytes of them are missing")
        if digest.hexdigest() != chunk.digest:
            raise chunk.changed("their digest differs")


def _json_lines(file: io.BufferedReader, chunk: Chunk) -> Iterator[Any]:
    for n, raw in enumerate(read_lines(file, chunk.path), chunk.first):
        if raw.strip():
            yield json_row(raw, chunk.path, n)


def _text_lines(file: io.BufferedReader, chunk: Chunk) -> Iterator[str]:
    for n, raw in enumerate(read_lines(file, chunk.path), chunk.first):
        yield line_text(raw, chunk.path, n)


def _csv_rows(file: io.BufferedReader, chunk: Chunk) -> Iterator[dict[str, Any]]:
    texts = _noted_lines(file, chunk.path, [])
    reader = csv.DictReader(
        texts, fieldnames=chunk.columns, dialect=dialect_of(chunk.path), strict=True
    )
    with csv_error(chunk.path, reader):
        for row in reader:
            check_width(row, chunk.columns)
            yield row


_PARSERS: dict[str, Callable[[io.BufferedReader, Chunk], Iterator[Any]]] = {
    "jsonl": _json_lines,
    "lines": _text_lines,
    "csv": _csv_rows,
    "tsv": _csv_rows,
}


def _parquet_rows(chunk: Chunk) -> Iterator[dict[str, Any]]:
    with parquet_file(chunk.path) as file:
        if _parquet_digest(chunk.path, file) != chunk.digest:
            raise chunk.changed("the file's size or footer differs")
        groups, skip = _row_groups(file.metadata, chunk.first, chunk.count)
        left = chunk.count
        for batch in file.iter_batches(batch_size=1024, row_groups=groups):
            rows = batch.slice(skip, left)
            skip = max(0, skip - batch.num_rows)
            left -= rows.num_rows
            yield from rows.to_pylist()
            if not left:
                return


def _row_groups(metadata: Any, first: int, count: int) -> tuple[list[int], int]:
    """Return the row groups that hold a range, and how many of their rows lie before it."""
    groups: list[int] = []
    skip = at = 0
    for number in range(metadata.num_row_groups):
        size = metadata.row_group(number).num_rows
        if at < first + count and at + size > first:
            skip = skip if groups else first - at
            groups.append(number)
        at += size
    return groups, skip


def _warc_rows(chunk: Chunk) -> Iterator[dict[str, Any]]:
    extent = _warc_extent(
        chunk.path, chunk.first, chunk.count, chunk.offset, chunk.offset + chunk.size_bytes
    )
    if extent.digest != chunk.digest:
        raise chunk.changed("their digest differs")
    with _warc_file(chunk.path, chunk.offset, parse_http=True) as records:
        for record in itertools.islice(records, chunk.count):
            yield _warc_row(record)


def _warc_row(record: Any) -> dict[str, Any]:
    headers, http = dict(record.rec_headers.headers), record.http_headers
    return {
        "type": record.rec_type,
        "id": headers.get("WARC-Record-ID"),
        "uri": headers.get("WARC-Target-URI"),
        "date": headers.get("WARC-Date"),
        "headers": headers,
        "http_status": None if http is None else http.get_statuscode(),
        "http_headers": None if http is None else dict(http.headers),
        "content": record.content_stream().read(),
    }
