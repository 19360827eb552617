"""Payloads as bytes: a Path, a chunk of a file, or a value that JSON can hold."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import Any

import orjson

from hpcresume.errors import CorruptDataError, SourcesError
from hpcresume.pipeline.chunk import Chunk, decode_chunk, encode_chunk


def encode_payload(payload: Any, *, source_id: str | None = None) -> bytes:
    """Return a payload as bytes: a Path, a Chunk, or a JSON value (tuples become lists).

    Args:
        payload: The value.
        source_id: Named in the error.

    Raises:
        SourcesError: The payload holds something that JSON cannot; names source and type.
    """
    if isinstance(payload, os.PathLike):
        return b"p" + os.fsencode(payload)
    if isinstance(payload, Chunk):
        return b"c" + encode_chunk(payload)
    problem = _json_problem(payload)
    if problem is None:
        try:
            return b"j" + orjson.dumps(payload)
        except TypeError as error:  # lone surrogates, integers beyond 64 bits
            problem = str(error)
    whose = "a source" if source_id is None else f"source {source_id!r}"
    raise SourcesError(
        f"{whose}: its payload cannot be stored: {problem}. "
        "A payload is a Path or a JSON value, because every attempt reads it again. "
        "Store a path or an id, and load the object in the first stage.",
        source=source_id,
    )


def decode_payload(data: bytes, *, restarts: Path | None = None) -> Any:
    """Return what :func:`encode_payload` was given.

    Args:
        data: The bytes.
        restarts: Directory of the run's restart points, for chunks.

    Raises:
        CorruptDataError: The bytes are not an encoded payload.
    """
    kind, body = data[:1], data[1:]
    if kind == b"p":
        return Path(os.fsdecode(body))
    if kind == b"c":
        with contextlib.suppress(ValueError, TypeError):
            return decode_chunk(body, restarts)
    if kind == b"j":
        with contextlib.suppress(orjson.JSONDecodeError):
            return orjson.loads(body)
    raise CorruptDataError(
        f"{data[:40]!r} is not an encoded payload. The manifest that holds it is damaged."
    )


_SCALARS = frozenset({str, int, bool, type(None)})


def _json_problem(value: Any) -> str | None:
    """Return what JSON cannot hold in ``value``; exact types, so that nothing changes by it."""
    kind = type(value)
    if kind in _SCALARS:
        return None
    if kind is float:
        return None if math.isfinite(value) else f"{value} (float)"
    if kind in (list, tuple):
        return next(filter(None, map(_json_problem, value)), None)
    if kind is dict:
        for key, inner in value.items():
            if type(key) is not str:
                return f"the key {key!r} ({type(key).__qualname__})"
            problem = _json_problem(inner)
            if problem is not None:
                return problem
        return None
    return f"a value of type {kind.__module__}.{kind.__qualname__}"
