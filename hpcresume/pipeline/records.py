"""Reading the records of a file one by one, with errors that name the line."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import hashlib
import math
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, cast

import orjson

from hpcresume.errors import SourcesError

_BLOCK_BYTES = 1 << 20


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what reading a file raises into an error that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SourcesError(
            f"{path} cannot be read: {reason}. It holds the sources. "
            "Check the path and that the file is whole.",
            path=str(path),
        ) from error


def open_file(path: Path) -> IO[bytes]:
    """Open a file that can be read again."""
    _status(path)
    return path.open("rb")


def _status(path: Path) -> os.stat_result:
    status = path.stat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        # To open a pipe might take for ever.
        raise OSError("it is no regular file")
    return status


def file_size(path: Path) -> int:
    """Return the size of a file in bytes."""
    with reading(path):
        return _status(path).st_size


def file_digest(path: Path, *, size_bytes: int | None = None) -> str:
    """Return the digest of a file, or of its first ``size_bytes``."""
    digest = hashlib.blake2b(digest_size=16)
    left = math.inf if size_bytes is None else size_bytes
    with reading(path), open_file(path) as file:
        while left > 0 and (block := file.read(int(min(left, _BLOCK_BYTES)))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


@contextlib.contextmanager
def open_records(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed where its name ends in ``.gz``."""
    with reading(path):
        raw = open_file(path)
    with raw:
        yield cast("IO[bytes]", gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw


def read_lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """Yield the lines without their ends."""
    while True:
        with reading(path):
            raw = file.readline()
        if not raw:
            return
        yield raw.removesuffix(b"\n").removesuffix(b"\r")


def line_text(raw: bytes, path: Path, n: int) -> str:
    """Return line ``n`` (from 0) as text; a byte order mark at the beginning is no text."""
    try:
        return raw.decode("utf-8-sig" if n == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise SourcesError(
            f"{path}:{n + 1}: not UTF-8 text: {error.reason} at byte {error.start}. "
            "Sources are stored as JSON. Convert the file to UTF-8.",
            path=str(path),
            line=n + 1,
        ) from error


def _jsonl_rows(path: Path) -> Iterator[Any]:
    with open_records(path) as file:
        for n, raw in enumerate(read_lines(file, path)):
            if raw.strip():
                yield json_row(raw, path, n)


def json_row(raw: bytes, path: Path, n: int) -> Any:
    """Return the JSON value of line ``n`` (from 0)."""
    try:
        return orjson.loads(raw.removeprefix(codecs.BOM_UTF8) if n == 0 else raw)
    except orjson.JSONDecodeError as error:
        raise SourcesError(
            f"{path}:{n + 1}: not JSON: {error}. "
            "Every line of a JSONL file is one JSON value. Correct the line.",
            path=str(path),
            line=n + 1,
        ) from error


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    with open_records(path) as file:
        texts = (line_text(raw, path, n) + "\n" for n, raw in enumerate(read_lines(file, path)))
        reader = csv.DictReader(texts, dialect=dialect_of(path), strict=True)
        with csv_error(path, reader):
            for row in reader:
                check_width(row, reader.fieldnames)
                yield row


def dialect_of(path: Path) -> str:
    """Return how a file's columns are separated."""
    return "excel-tab" if ".tsv" in path.suffixes else "excel"


class _CsvReader(Protocol):
    @property
    def line_num(self) -> int: ...


@contextlib.contextmanager
def csv_error(path: Path, reader: _CsvReader, *, first: int = 0) -> Iterator[None]:
    """Turn errors of a CSV reader that began at line ``first`` into ones that name the line."""
    # The module's limit of 128 KiB is for guessing dialects; a document is longer.
    csv.field_size_limit(sys.maxsize)
    try:
        yield
    except csv.Error as error:
        line = first + reader.line_num
        raise SourcesError(
            f"{path}:{line}: not CSV: {error}. Correct the line.", path=str(path), line=line
        ) from error


def check_width(row: Mapping[Any, Any], columns: Sequence[str] | None) -> None:
    """Refuse a row that has more or fewer fields than there are columns."""
    if None in row or None in row.values():
        raise csv.Error(f"a row of other length than its {len(columns or ())} columns")


@contextlib.contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    """Open a Parquet file; what goes wrong while it is open names it."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise SourcesError(
            f"{path}: reading Parquet needs pyarrow, which is not installed. "
            "Install it: pip install 'hpcresume[parquet]'.",
            path=str(path),
        ) from error
    try:
        open_file(path).close()
        with parquet.ParquetFile(path) as file:
            yield file
    except (ArrowException, OSError) as error:
        raise SourcesError(
            f"{path} cannot be read as Parquet: {error}. It holds the sources.", path=str(path)
        ) from error


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    with parquet_file(path) as file:
        for batch in file.iter_batches(batch_size=4096):
            yield from batch.to_pylist()


READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    "jsonl": _jsonl_rows,
    "csv": _csv_rows,
    "tsv": _csv_rows,
    "parquet": _parquet_rows,
}
