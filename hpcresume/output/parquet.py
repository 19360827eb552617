"""Results as Parquet: one schema for all rows, found while they are spooled.

Rows are JSON values of any shape, so the schema is known only after the last one.  They
are spooled beside the output as they come, and written as columns in a second pass; memory
holds one batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson

from hpcresume.errors import UsageError
from hpcresume.merge.generation import Union, find_segment
from hpcresume.merge.packs import Packs, name_of
from hpcresume.output.rows import BadSegments, Span
from hpcresume.run.directory import RunDir
from hpcresume.segment.frame import PARQUET
from hpcresume.segment.parquet_footer import whole
from hpcresume.sinks.parquet import read_schema

BATCH_ROWS = 16_384
_GROUP_ROWS = 1 << 17


class ParquetRows:
    """Writes rows as Parquet; a row that is no object becomes the column ``value``."""

    def __init__(self, path: str, file: BinaryIO) -> None:
        self._path, self._file = path, file
        # Unlinked at once: the spool ends with this process, however that ends.
        self._spool = open(f"{path}-spool", "x+b", buffering=1 << 20)  # noqa: SIM115
        os.unlink(f"{path}-spool")
        self._lines: list[bytes] = []
        self._batches: list[int] = []
        self._schema: Any = None

    def write(self, lines: bytes) -> None:
        """Spool rows and widen the schema by what they hold."""
        self._spool.write(lines)
        self._lines.extend(lines.splitlines())
        while len(self._lines) >= BATCH_ROWS:
            self._learn(self._lines[:BATCH_ROWS])
            del self._lines[:BATCH_ROWS]

    def _learn(self, lines: list[bytes]) -> None:
        import pyarrow as pa

        try:
            found = pa.schema(list(pa.array(_objects(lines)).type))
            known = self._schema if self._schema is not None else found
            self._schema = pa.unify_schemas([known, found], promote_options="permissive")
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise _no_schema(error) from error
        self._batches.append(len(lines))

    def close(self) -> None:
        """Write the spooled rows as columns."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._lines:
            self._learn(self._lines)
            self._lines = []
        schema = self._schema if self._schema is not None else pa.schema([])
        self._spool.seek(0)
        try:
            with pq.ParquetWriter(self._file, schema, compression="zstd") as writer:
                for batch in self._read():
                    writer.write_batch(_columns(batch, schema))
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise _no_schema(error) from error
        finally:
            self._spool.close()

    def _read(self) -> Iterator[list[bytes]]:
        for count in self._batches:
            yield [self._spool.readline() for _ in range(count)]


class ParquetTables:
    """Writes the rows of Parquet parts as Parquet, without making Python objects of them.

    Args:
        file: Where to.
        schema: Of all rows.
    """

    def __init__(self, file: BinaryIO, schema: Any) -> None:
        import pyarrow.parquet as pq

        self._schema = schema
        self._writer = pq.ParquetWriter(file, schema, compression="zstd")
        self._tables: list[Any] = []
        self._rows = 0

    def write_span(self, span: Span) -> int:
        """Write the rows of a span and return how many there were."""
        if not span.origin.parquet:
            return 0
        table = span.origin.table(span.sources)
        self._tables.append(fitted(table, self._schema))
        self._rows += table.num_rows
        if self._rows >= _GROUP_ROWS:
            self._flush()
        return int(table.num_rows)

    def _flush(self) -> None:
        import pyarrow as pa

        if self._tables:
            self._writer.write_table(pa.concat_tables(self._tables), row_group_size=_GROUP_ROWS)
        self._tables, self._rows = [], 0

    def close(self) -> None:
        """Write what is left; the file is whole afterwards."""
        self._flush()
        self._writer.close()


def fitted(table: Any, schema: Any) -> Any:
    """Return a table with a run's schema: columns that it lacks are null.

    Raises:
        UsageError: A column cannot be converted.
    """
    import pyarrow as pa

    if table.schema.equals(schema):
        return table
    try:
        columns = [
            table.column(field.name).cast(field.type)
            if field.name in table.column_names
            else pa.nulls(table.num_rows, field.type)
            for field in schema
        ]
    except pa.ArrowException as error:
        raise _no_schema(error) from error
    return pa.table(columns, schema=schema)


def schema_of(run: RunDir, union: Union) -> Any:
    """Return the schema of all parts of a run that hold results; an empty one without any.

    Raises:
        BadSegmentError: A segment is damaged.
        UsageError: Attempts inferred schemas that no common one holds.
    """
    import pyarrow as pa

    footers, packs = set[bytes](), Packs(run)
    for key, won in union.won.items():
        if won:
            with BadSegments(run, name_of(key)):
                segment = find_segment(packs, key, union.pack_of.get(key, 0))
                blobs = (segment.frame(number).blob for number in segment.frame_numbers())
                blob = next((blob for blob in blobs if blob is not None), None)
            if blob is not None and blob.format == PARQUET:
                footers.add(blob.footer)
    schemas = [read_schema(whole(b"", footer)) for footer in sorted(footers)]
    try:
        return pa.unify_schemas([pa.schema([]), *schemas], promote_options="permissive")
    except (pa.ArrowException, TypeError) as error:
        raise _no_schema(error) from error


def _objects(lines: list[bytes]) -> list[dict[str, Any]]:
    rows = map(orjson.loads, lines)
    return [row if isinstance(row, dict) else {"value": row} for row in rows]


def _columns(lines: list[bytes], schema: Any) -> Any:
    import pyarrow as pa

    rows = pa.array(_objects(lines), type=pa.struct(list(schema)))
    return pa.RecordBatch.from_struct_array(rows)


def _no_schema(error: Exception) -> UsageError:
    return UsageError(
        f"the rows fit no one Parquet schema: {error}. A Parquet column has one type. "
        "Collect to a .jsonl file, or give the column one type in the pipeline.",
    )
