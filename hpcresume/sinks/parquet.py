"""Read row groups that :mod:`hpcresume.sinks.packing` wrote; the only way back is pyarrow."""

from __future__ import annotations

from typing import Any

from hpcresume.errors import ConfigError, RowError
from hpcresume.sinks.rows import encode_row


def require_pyarrow(what: str) -> None:
    """Refuse Parquet where pyarrow is not installed.

    Args:
        what: What cannot be done, for the message.

    Raises:
        ConfigError: It is not.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"cannot {what}: pyarrow is not installed. Parquet is read and written with it. "
            "Install the extra: pip install 'hpcresume[parquet]', or use JSON lines.",
        ) from error


def read_table(data: bytes) -> Any:
    """Return a small Parquet file as a table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.read_table(pa.BufferReader(data), use_threads=False)


def read_schema(data: bytes) -> Any:
    """Return the schema that a small Parquet file's footer gives; its pages may be missing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.read_schema(pa.BufferReader(data))


def table_lines(table: Any, *, bytes_as_text: bool = False) -> list[bytes]:
    """Return a table's rows as lines of JSON, without newlines.

    Args:
        table: The rows.
        bytes_as_text: Show bytes as Python writes them, for people.

    Raises:
        RowError: JSON cannot hold a column's values.
    """
    names = [field.name for field in table.schema if _is_binary(field.type)]
    if names and not bytes_as_text:
        raise RowError(
            f"column {names[0]!r} holds bytes, and JSON has none. "
            "Results are written as JSON lines here. Collect to a .parquet file.",
            what=names[0],
        )
    return [encode_row(_plain(row)) for row in table.to_pylist()]


def _is_binary(kind: Any) -> bool:
    return "binary" in str(kind)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with what JSON has no form for as text: times, dates, decimals."""
    return {name: _plain_value(value) for name, value in row.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, dict):
        return _plain(value)
    if isinstance(value, list):
        return [_plain_value(inner) for inner in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
