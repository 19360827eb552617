"""Rows: what is written of an item, whatever ran it and however it ended."""

from __future__ import annotations

import asyncio
import logging
import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from hpcresume.errors import RowError, describe
from hpcresume.evals.item import EvalItem
from hpcresume.sinks.rows import encode_row

log = logging.getLogger(__name__)

OK, ERROR, TIMEOUT = "ok", "error", "timeout"
RESERVED = ("id", "repetition", "question", "answer", "output", "status", "error", "traceback",
            "attempts", "seconds", "steps", "usage", "lossy", "fields")  # fmt: skip
_TRACEBACK_CHARS = 8000
_OURS = (os.path.dirname(__file__) + os.sep, os.path.dirname(asyncio.__file__) + os.sep)


@dataclass(slots=True)
class Ending:
    """How an item ended.

    Attributes:
        status: ``ok``, ``error`` or ``timeout``.
        output: What the workflow returned; None unless it is ``ok``.
        error: Type and message, None where it is ``ok``.
        traceback: The user's traceback, None where there is none.
        attempts: Tries so far, over all runs.
        seconds: How long it took, all tries of this run together.
    """

    status: str
    output: Any = None
    error: str | None = None
    traceback: str | None = None
    attempts: int = 1
    seconds: float = 0.0


def failed(error: BaseException, *, attempts: int, seconds: float) -> Ending:
    """Return how an item ended that raised."""
    status = TIMEOUT if isinstance(error, TimeoutError) else ERROR
    return Ending(status, None, describe(error), user_traceback(error), attempts, seconds)


def user_traceback(error: BaseException) -> str:
    """Return an exception's traceback without the frames that called the user's code."""
    shown = traceback.TracebackException.from_exception(error)
    users = [n for n, frame in enumerate(shown.stack) if not frame.filename.startswith(_OURS)]
    if users:
        shown.stack[:] = shown.stack[users[0] :]
    return "".join(shown.format())[-_TRACEBACK_CHARS:]


def make_row(item: EvalItem, ending: Ending, steps: frozenset[str] | None) -> dict[str, Any]:
    """Return the row of an item.

    The dataset's other columns keep their names; those that have the name of one of the row's
    own keys are below ``fields``.

    Args:
        item: The item, with what it recorded.
        ending: How it ended.
        steps: Kinds of steps to keep; None: all.
    """
    own = {
        "id": item.id,
        "repetition": item.repetition,
        "question": item.question,
        "answer": item.answer,
        "output": ending.output,
        "status": ending.status,
        "error": ending.error,
        "traceback": ending.traceback,
        "attempts": ending.attempts,
        "seconds": round(ending.seconds, 6),
        "steps": [s for s in item.steps if steps is None or s.get("kind") in steps],
        "usage": {name: whole(amount) for name, amount in item.usage_total.items()},
    }
    custom = {key: value for key, value in item.fields.items() if key not in RESERVED}
    hidden = {
        key: value
        for key, value in item.fields.items()
        if key in RESERVED and value != own.get(key, _NOTHING)
    }
    return {**own, **custom, **({"fields": hidden} if hidden else {})}


_NOTHING = object()


def whole(amount: float) -> float:
    """Return an amount as an integer where it is one."""
    return int(amount) if isinstance(amount, float) and amount.is_integer() else amount


def encode(row: Mapping[str, Any], item_id: str) -> bytes:
    """Return a row as JSON; what JSON cannot hold makes it the item's error.

    The output is then kept as text, and marked ``lossy``.
    """
    try:
        return encode_row(row)
    except RowError as error:
        log.exception("item %s: its row cannot be written as it is", item_id)
        text = "".join(traceback.format_exception(error))[-_TRACEBACK_CHARS:]
    lossy = {
        **row,
        "status": ERROR if row["status"] == OK else row["status"],
        "error": row["error"] or f"RowError: {error_text(text)}",
        "traceback": row["traceback"] or text,
        "lossy": True,
    }
    try:
        return orjson.dumps(lossy, default=repr, option=orjson.OPT_NON_STR_KEYS)
    except orjson.JSONEncodeError:
        # Nested too deep, a number too wide, a text that is no UTF-8: its text form is left.
        kept = {key: lossy[key] for key in ("id", "repetition", "status", "error", "attempts",
                                            "seconds", "traceback", "lossy")}  # fmt: skip
        texts = {key: ascii(lossy[key]) for key in ("question", "answer", "output")}
        return orjson.dumps({**kept, **texts, "steps": [], "usage": {}})


def error_text(trace: str) -> str:
    """Return the message in the last line of a traceback."""
    return trace.strip().splitlines()[-1].partition(": ")[2]
