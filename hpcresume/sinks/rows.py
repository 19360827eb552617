"""Rows: JSON values, one line each, encoded in the worker that made them.

NaN and infinity have no JSON form and are errors; the encoder writes them as ``null``, so a
line that holds ``null`` is looked at again.  Integers beyond 64 bits take a slower path.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from hpcresume.errors import RowError

_OPTIONS = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME
_PLAIN = frozenset({str, int, bool, type(None)})
_PIECE_BYTES = 1 << 16
_LONG_LINE = 512
_WIDE_INTEGER = "Integer exceeds 64-bit range"


def encode_row(value: Any) -> bytes:
    """Return a value as one line of JSON, without the newline.

    Raises:
        RowError: JSON cannot hold the value; the message names the type or the number.
    """
    try:
        row = orjson.dumps(value, _from_numpy, _OPTIONS)
    except orjson.JSONEncodeError as error:
        if str(error) == _WIDE_INTEGER:
            return _encode_wide(value)
        raise _row_error(str(error.__cause__ or error)) from error
    if b"null" in row:
        refuse_non_finite(value)
    # The encoder leaves its working space, kilobytes, attached to what it returns.
    return bytes(memoryview(row))


def encode_lines(values: Sequence[Any]) -> list[bytes]:
    """Return values as lines of JSON, each with its newline: many at the cost of a few.

    Raises:
        RowError: JSON cannot hold one of them, or it has to be looked at by itself.
    """
    try:
        # Adding the newline also frees the encoder's working space; see above.
        lines = [orjson.dumps(value, _from_numpy, _OPTIONS) + b"\n" for value in values]
    except orjson.JSONEncodeError as error:
        raise _row_error(str(error.__cause__ or error)) from error
    # To look through long lines takes longer than to look at what they were made of.
    is_long = len(lines[0]) > _LONG_LINE if lines else False
    if is_long and all(map(_is_plain, values)):
        return lines
    if any(b"null" in piece for piece in joined(lines)):
        for value in values:
            refuse_non_finite(value)
    return lines


def _is_plain(value: Any) -> bool:
    """Tell whether a value is an object without numbers that JSON may not have."""
    return type(value) is dict and _PLAIN.issuperset(map(type, value.values()))


def joined(lines: Sequence[bytes]) -> Iterator[bytes]:
    """Yield lines joined to pieces, so small that memory is used again and not new each time."""
    step = max(1, _PIECE_BYTES * len(lines) // max(1, sum(map(len, lines))))
    return (b"".join(lines[at : at + step]) for at in range(0, len(lines), step))


def _encode_wide(value: Any) -> bytes:
    try:
        text = json.dumps(
            value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_from_numpy
        )
        return text.encode()
    except (TypeError, ValueError) as error:
        raise _row_error(str(error)) from error


def _from_numpy(value: Any) -> Any:
    """Convert a numpy scalar or array, without importing numpy."""
    if type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist"):
        converted = value.tolist()
        if type(converted).__module__ == "builtins":
            return converted
    raise TypeError(f"a value of type {type(value).__module__}.{type(value).__qualname__}")


def refuse_non_finite(value: Any) -> None:
    """Refuse NaN and infinity anywhere in a JSON value.

    Raises:
        RowError: There is one.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _row_error(f"the number {value}")
    elif isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            if type(inner) not in _PLAIN:
                refuse_non_finite(inner)
    elif hasattr(value, "tolist"):
        refuse_non_finite(value.tolist())


def _row_error(what: str) -> RowError:
    return RowError(
        f"a row holds what JSON cannot: {what}. Results are written as JSON lines. "
        "Convert it in the last stage, or write a file with ctx.output().",
        what=what,
    )
