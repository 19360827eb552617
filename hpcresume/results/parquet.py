"""Results as Parquet: one schema for all rows, found while they are spooled.

Rows are JSON values of any shape, so the schema is known only after the last one.  They
are spooled beside the output as they come, and written as columns in a second pass; memory
holds one batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from hpcresume.errors import ConfigError, UsageError

BATCH_ROWS = 16_384


def require_pyarrow(output: Path) -> None:
    """Refuse Parquet where pyarrow is not installed.

    Raises:
        ConfigError: It is not.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"cannot write {output}: pyarrow is not installed. Parquet is written with it. "
            "Install the extra: pip install 'hpcresume[parquet]', or collect to a .jsonl file.",
            path=str(output),
        ) from error


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
