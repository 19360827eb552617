"""From what a call made to the frame that the ledger keeps, for each kind of sink.

A packer is used in the worker that made the rows.  Only where a pipeline has stages of several
requests do whole sources come together in the driver, which then packs them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple, Protocol

import google_crc32c

from hpcresume.errors import LocalStorageError, RowError
from hpcresume.ids import ItemPath
from hpcresume.segment.frame import (
    BLOB_FILE_BYTES,
    JSONL,
    PARQUET,
    Blob,
    Columns,
    FrameBuilder,
)
from hpcresume.segment.parquet_footer import split
from hpcresume.sinks.rows import encode_lines, encode_row, joined

SCHEMA_NAME = "schema"
"""The schema that the first rows of an attempt had, beside its blobs."""

Rows = Sequence[tuple[ItemPath, Any]]
"""Rows of one source in item order, each as :meth:`Packer.row` returned it."""


class Packed(NamedTuple):
    """A completed source: index, id, its rows, and the item and name of its files."""

    source: int
    source_id: str
    rows: Rows
    files: Sequence[tuple[ItemPath, str]] = ()


@dataclass(slots=True)
class Fit:
    """Whether rows can be packed together.

    Attributes:
        misfits: Why not, by slot; everything else can.
        table: What was made of the rows on the way, if all fit.
    """

    misfits: dict[int, Exception] = field(default_factory=dict)
    table: Any = None


class Packer(Protocol):
    """How a sink packs rows.

    Attributes:
        frame_bytes: Completed sources that the driver puts together are packed at this size.
    """

    frame_bytes: int

    def row(self, value: Any) -> Any:
        """Return a row as it is kept until it is packed.

        Raises:
            RowError: The sink cannot hold the value.
        """

    def rows(self, values: Sequence[Any]) -> list[Any]:
        """Return many rows at once.

        Raises:
            RowError: One of them has to be taken by itself.
        """

    def fit(self, slots: Sequence[int], rows: Sequence[Any]) -> Fit:
        """Tell the rows of which slots cannot be packed; ``slots`` says whose each row is."""

    def pack(self, sources: Sequence[Packed], table: Any = None) -> bytes:
        """Return the frame of some sources, given in index order.

        Args:
            sources: They and their rows.
            table: What :meth:`fit` made of just these rows.

        Raises:
            LocalStorageError: The node-local disk is full or failing.
        """

    def pack_columns(self, columns: Columns, table: Any = None) -> bytes:
        """Return the frame of some sources, as :meth:`pack` does."""


class RowsPacker:
    """Rows of JSON, in the frame; also for a pipeline without a sink."""

    frame_bytes = 1 << 20

    def row(self, value: Any) -> bytes:
        """Return a row as a line of JSON, with its newline."""
        return encode_row(value) + b"\n"

    def rows(self, values: Sequence[Any]) -> list[Any]:
        """Return rows as lines of JSON, each with its newline."""
        return encode_lines(values)

    def fit(self, slots: Sequence[int], rows: Sequence[Any]) -> Fit:
        """All fit: each was encoded by itself."""
        del slots, rows
        return Fit()

    def pack(self, sources: Sequence[Packed], table: Any = None) -> bytes:
        """Return the frame of some sources."""
        del table
        frame = FrameBuilder()
        for source in sources:
            frame.add(source.source, source.rows)
            if source.files:
                frame.add_files(source.source_id, source.files)
        return self._build(frame)

    def pack_columns(self, columns: Columns, table: Any = None) -> bytes:
        """Return the frame of sources without files."""
        del table
        frame = FrameBuilder()
        frame.add_columns(columns)
        return self._build(frame)

    def _build(self, frame: FrameBuilder) -> bytes:
        return frame.build()


class JsonlPacker(RowsPacker):
    """Rows of JSON, in a blob.

    Args:
        directory: Node-local directory for blobs.
        writer: As of :class:`BlobFile`.
    """

    frame_bytes = 16 << 20

    def __init__(self, directory: str, writer: str = "") -> None:
        self._file = BlobFile(directory, writer)

    def _build(self, frame: FrameBuilder) -> bytes:
        if not frame.rows:
            return frame.build()
        name, offset, length, crc = self._file.append(joined(frame.rows))
        return frame.build(Blob(JSONL, name, offset, length, crc, len(frame.rows)))


class ParquetPacker:
    """Rows as a Parquet row group, in a blob.

    Args:
        schema: A ``pyarrow.Schema``, or a dict of column and type; None: as the first rows
            of this attempt have it.
        directory: Node-local directory for blobs and for that schema.
        writer: As of :class:`BlobFile`.
    """

    frame_bytes = 16 << 20

    def __init__(self, schema: Any, directory: str, writer: str = "") -> None:
        self._directory, self._file = directory, BlobFile(directory, writer)
        self._schema = _as_schema(schema)
        self._is_given = schema is not None

    def row(self, value: Any) -> Any:
        """Return a row as it is, if it has columns."""
        if isinstance(value, dict) or _is_table(value):
            return value
        raise RowError(
            f"a row for Parquet is a {type(value).__module__}.{type(value).__qualname__}. "
            "A row is a dict, or a pyarrow.RecordBatch or Table of several rows. "
            "Return one of these in the last stage.",
        )

    def rows(self, values: Sequence[Any]) -> list[Any]:
        """Return rows as they are, if they have columns."""
        return list(map(self.row, values))

    def fit(self, slots: Sequence[int], rows: Sequence[Any]) -> Fit:
        """Convert all rows together; where that fails, each slot's by themselves."""
        try:
            return Fit(table=self._table(rows))
        except RowError:
            return Fit(misfits=dict(self._misfits(slots, rows)))

    def _misfits(self, slots: Sequence[int], rows: Sequence[Any]) -> list[tuple[int, Exception]]:
        found: list[tuple[int, Exception]] = []
        made: dict[int, list[Any]] = {}
        for slot, row in zip(slots, rows, strict=True):
            made.setdefault(slot, []).append(row)
        for slot, values in made.items():
            try:
                self._table(values)
            except RowError as error:
                found.append((slot, error))
        return found

    def pack(self, sources: Sequence[Packed], table: Any = None) -> bytes:
        """Return the frame of some sources, whose rows lie in a blob."""
        frame = FrameBuilder()
        for source in sources:
            counted = ((path, _count(value)) for path, value in source.rows)
            frame.add_counted(source.source, [path for path, n in counted for _ in range(n)])
            if source.files:
                frame.add_files(source.source_id, source.files)
        if not frame.paths:
            return frame.build()
        if table is None:
            table = self._table([value for source in sources for _, value in source.rows])
        data = encode_row_group(table)
        pages, footer = split(data)
        name, offset, length, crc = self._file.append([pages])
        return frame.build(Blob(PARQUET, name, offset, length, crc, len(frame.paths), footer))

    def pack_columns(self, columns: Columns, table: Any = None) -> bytes:
        """Return the frame of sources without files."""
        columns.check()
        made: dict[int, list[tuple[ItemPath, Any]]] = {source: [] for source in columns.sources}
        for owner, path, row in zip(columns.owners, columns.paths, columns.rows, strict=True):
            made[owner].append((path, row))
        return self.pack([Packed(source, "", found) for source, found in made.items()], table)

    def _table(self, values: Sequence[Any]) -> Any:
        """Return values as one table of the attempt's schema.

        Raises:
            RowError: They do not fit it.
        """
        import pyarrow as pa

        try:
            if not values:
                return None
            schema = self._schema_for(values)
            tables = [_part_table(part, schema) for part in _alike(values)]
            return tables[0] if len(tables) == 1 else pa.concat_tables(tables)
        except (pa.ArrowException, TypeError, ValueError, OverflowError, KeyError) as error:
            origin = "the schema given" if self._is_given else "the schema of the first rows"
            raise RowError(
                f"rows do not fit {origin}: {error}. A column of Parquet has one type. "
                "Convert the value in the last stage, or give Parts('parquet', schema=...).",
            ) from error

    def _schema_for(self, values: Sequence[Any]) -> Any:
        if self._schema is None:
            self._schema = agree_on_schema(self._directory, _infer(values))
        return self._schema


class Place(NamedTuple):
    """Where a blob was written: name of its file, offset and length in it, and its CRC."""

    file: str
    offset: int
    length: int
    crc: int


class BlobFile:
    """Appends the blobs of one worker to a node-local file, and to another where it is full.

    What a commit names has to be synced before it: of many small blobs in few files that is
    one sync, not many.  Who has seen blobs that fill a file, up to
    :data:`~hpcresume.segment.frame.BLOB_FILE_BYTES`, knows that no other one comes.

    Threads may share it: of async stages that run in the driver, both the event loop's thread
    and the driver's own make frames.

    Args:
        directory: Node-local directory.
        writer: Group, index and start of the worker, as ``0-3-2``, for the names of its files:
            those of an earlier start take no further blob; empty where nothing starts again.
    """

    def __init__(self, directory: str, writer: str = "") -> None:
        self._directory, self._prefix = directory, f"{writer}-" if writer else ""
        self._file: IO[bytes] | None = None
        self._name, self._end, self._pid = "", 0, os.getpid()
        self._lock = threading.Lock()

    def append(self, pieces: Iterable[bytes]) -> Place:
        """Write a blob's bytes and return where they are.

        They are synced by whoever commits the frame that names them.

        Raises:
            LocalStorageError: The disk refused; nothing of the blob is left.
        """
        with self._lock:
            return self._append(pieces)

    def _append(self, pieces: Iterable[bytes]) -> Place:
        if self._end >= BLOB_FILE_BYTES or self._pid != os.getpid():
            # A process that a stage forked, and that comes back from it, has the same file.
            self.close()
        start, crc = self._end, 0
        try:
            file = self._file or self._open()
            for piece in pieces:
                crc = google_crc32c.extend(crc, piece)
                _write_all(file, piece)
                self._end += len(piece)
        except BaseException as error:
            # However far it came: what the next blob says of its place must be true.
            path = os.path.join(self._directory, self._name)
            self._give_up(path, start)
            if not isinstance(error, OSError):
                raise
            raise LocalStorageError(
                f"the node-local disk refused {path}: {error.strerror or error}. It is full or "
                "failing. What was committed is published and this task stops. "
                "Free space on the node, or give another directory with --local-dir.",
                path=path,
            ) from error
        return Place(self._name, start, self._end - start, crc)

    def _open(self) -> IO[bytes]:
        self._pid = os.getpid()
        self._name = self._prefix + secrets.token_hex(8)
        path = os.path.join(self._directory, self._name)
        self._file = open(path, "xb", buffering=0, opener=_private)  # noqa: SIM115  # kept open
        return self._file

    def _give_up(self, path: str, end: int) -> None:
        """Leave a file that holds half a blob, with those that it held before."""
        with contextlib.suppress(OSError):
            if end:
                os.truncate(path, end)
            else:
                os.unlink(path)
        self.close()

    def close(self) -> None:
        """Close the file; the next blob begins another one."""
        file, self._file, self._name, self._end = self._file, None, "", 0
        if file is not None:
            # What the disk did not take, the sync before the commit says, too.
            with contextlib.suppress(OSError):
                file.close()


def _write_all(file: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def agree_on_schema(directory: str, inferred: Any) -> Any:
    """Return the schema of an attempt: the first that one of its workers wrote down."""
    import pyarrow as pa

    path = os.path.join(directory, SCHEMA_NAME)
    if not os.path.exists(path):
        own = BlobFile(directory)
        temporary = os.path.join(directory, own.append([bytes(inferred.serialize())]).file)
        own.close()
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
        os.unlink(temporary)
    with open(path, "rb") as file:
        return pa.ipc.read_schema(pa.py_buffer(file.read()))


def encode_row_group(table: Any) -> bytes:
    """Return a table as a Parquet file of one row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        writer.write_table(table, row_group_size=table.num_rows)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _as_schema(given: Any) -> Any:
    if given is None or not isinstance(given, Mapping):
        return given
    import pyarrow as pa

    def kind(value: Any) -> Any:
        return pa.type_for_alias(value) if isinstance(value, str) else value

    return pa.schema([(str(name), kind(value)) for name, value in given.items()])


def _is_table(value: Any) -> bool:
    # Not by import: whoever returns none need not have pyarrow loaded.
    return type(value).__name__ in ("RecordBatch", "Table") and hasattr(value, "num_rows")


def _count(value: Any) -> int:
    return int(value.num_rows) if _is_table(value) else 1


def _alike(values: Sequence[Any]) -> list[Any]:
    """Return values with consecutive dicts gathered in lists."""
    parts: list[Any] = []
    for value in values:
        if _is_table(value):
            parts.append(value)
        elif parts and isinstance(parts[-1], list):
            parts[-1].append(value)
        else:
            parts.append([value])
    return parts


def _infer(values: Sequence[Any]) -> Any:
    import pyarrow as pa

    first = _alike(values)[0]
    return pa.schema(list(pa.array(first).type)) if isinstance(first, list) else first.schema


def _part_table(part: Any, schema: Any) -> Any:
    import pyarrow as pa

    names = schema.names
    if isinstance(part, list):
        known = set(names)
        for row in part:
            if not known.issuperset(row):
                extra = ", ".join(map(repr, row.keys() - known))
                raise ValueError(f"column {extra} is not in it")
        columns = [[row.get(name) for row in part] for name in names]
        for field, values in zip(schema, columns, strict=True):
            _check_whole(values, field.type)
        arrays = [pa.array(v, type=f.type) for v, f in zip(columns, schema, strict=True)]
        return pa.Table.from_arrays(arrays, schema=schema)
    table = pa.Table.from_batches([part]) if isinstance(part, pa.RecordBatch) else part
    wrong = set(names) ^ set(table.column_names)
    if wrong:
        raise ValueError(f"column {', '.join(map(repr, sorted(wrong)))} is in one of them only")
    return table.select(names).cast(schema)


def _check_whole(values: Sequence[Any], kind: Any) -> None:
    """Refuse fractions for integers, which pyarrow would cut off.

    Raises:
        ValueError: There is one.
    """
    import pyarrow as pa

    if pa.types.is_integer(kind):
        suspect = {made for made in set(map(type, values)) if "float" in made.__name__}
        for value in values if suspect else ():
            if type(value) in suspect and value != int(value):
                raise ValueError(f"{value} is no {kind}")
    elif pa.types.is_struct(kind):
        present = [value for value in values if value is not None]
        for field in kind:
            _check_whole([value.get(field.name) for value in present], field.type)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        for value in values:
            if value is not None and getattr(getattr(value, "dtype", None), "kind", "f") == "f":
                _check_whole(value, kind.value_type)
