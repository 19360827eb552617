"""An item of a dataset, as workflows and scorers see it, and the names it goes by.

What an item is, is told by its content: the digest of all its columns, its number among equal
items, and the repetition.  A reordered or grown dataset therefore holds the same items, and a
changed item is another one.  Trying an item again makes a further source of it, so that what
was recorded first stays until the new try is recorded.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

_SOURCE = re.compile(r"(?P<base>[0-9a-f]{20}(?:\.\d+)?-r\d+)(?:-t(?P<number>\d+))?")


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of the dataset are what; None: the whole row is the question.

    Attributes:
        question: Column of the question.
        answer: Column of the expected answer.
        id: Column of the id; empty: ``id`` where there is one, else the content's digest.
        raw: The row as a whole is the question.
    """

    question: str = "question"
    answer: str = "answer"
    id: str = ""
    raw: bool = False


@dataclass(slots=True)
class EvalItem:
    """One repetition of one item.

    Attributes:
        id: The id column's value, or the beginning of the content's digest.
        question: What is asked.
        answer: The expected answer, None where the dataset has none.
        fields: All columns of the row; empty where the row is not an object.
        repetition: From 0.
        steps: What :meth:`step` recorded.
        usage_total: Sums of what :meth:`usage` recorded, by name.
    """

    id: str
    question: Any
    answer: Any = None
    fields: dict[str, Any] = field(default_factory=dict)
    repetition: int = 0
    steps: list[dict[str, Any]] = field(default_factory=list)
    usage_total: dict[str, float] = field(default_factory=dict)

    def step(self, kind: str, data: Any = None, **more: Any) -> None:
        """Record an intermediate step, in order.

        Args:
            kind: What ``--steps`` selects by, for example ``LLM_END``.
            data: Any JSON value.
            **more: Further keys of the step.
        """
        self.steps.append({"kind": kind, **({} if data is None else {"data": data}), **more})

    def usage(self, **amounts: float) -> None:
        """Add to the item's usage, for example ``usage(prompt_tokens=12, completion_tokens=3)``."""
        for name, amount in amounts.items():
            self.usage_total[name] = self.usage_total.get(name, 0) + amount


def content_digest(row: Any) -> str:
    """Return 20 hexadecimal digits of a row's content; the order of its keys does not matter."""
    data = orjson.dumps(row, option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(data, digest_size=10).hexdigest()


def base_id(digest: str, occurrence: int, repetition: int) -> str:
    """Return the id that an item's repetition keeps over all its tries."""
    number = f".{occurrence}" if occurrence else ""
    return f"{digest}{number}-r{repetition}"


def try_id(base: str, number: int) -> str:
    """Return the id of the source that is try ``number`` of an item, from 1."""
    return base if number == 1 else f"{base}-t{number}"


def split_id(source_id: str) -> tuple[str, int]:
    """Return what :func:`try_id` made an id of.

    Raises:
        ValueError: It made no such id.
    """
    match = _SOURCE.fullmatch(source_id)
    if match is None:
        raise ValueError(f"{source_id!r} is not an id of an evaluation's source")
    return match["base"], int(match["number"] or 1)


def make_item(payload: Mapping[str, Any], columns: Columns) -> EvalItem:
    """Return the item of a source's payload.

    Raises:
        KeyError: The row lacks the question's column.
    """
    row = payload["row"]
    fields = dict(row) if isinstance(row, dict) else {}
    if columns.raw or not isinstance(row, dict):
        question, answer = row, None
    else:
        question, answer = row[columns.question], row.get(columns.answer)
    return EvalItem(payload["id"], question, answer, fields, payload["repetition"])
