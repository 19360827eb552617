"""Identifiers: the integers that must not be mixed, and the ids of items.

An item's id is its source's id followed by one ``stage.n`` step for each stage that has
produced it, ``n`` counting what one input of that stage produced: ``a.py/parse.0/functions.3``.
Inside the engine the same id is a path of those ``n``, built and
parsed here and nowhere else.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from typing import NewType

SourceIndex = NewType("SourceIndex", int)
"""Position of a source in the run's manifest; dense, never changes."""
TaskIndex = NewType("TaskIndex", int)
"""Array task within a round, from 0."""
Epoch = NewType("Epoch", int)
"""Attempt of an array task, from 1, unique per (round, task)."""
RoundIndex = NewType("RoundIndex", int)
"""Round of a run, from 0."""
ItemPath = NewType("ItemPath", tuple[int, ...])
"""What each stage's output number was, from the first stage on; () is the source itself."""

ROOT = ItemPath(())
_STEP = re.compile(r"(?P<stage>.*)\.(?P<n>\d+)", re.DOTALL)


def child(parent: ItemPath, n: int) -> ItemPath:
    """Return the path of the ``n``-th item (from 0) that a stage made from ``parent``."""
    return ItemPath((*parent, n))


def item_id(source_id: str, stages: Sequence[str], path: ItemPath) -> str:
    """Return the public id of an item, for example ``a.py/parse.0/functions.3``."""
    steps = [f"{stage}.{n}" for stage, n in zip(stages, path, strict=False)]
    return "/".join([source_id, *steps])


def parse_item_id(item: str, *, depth: int) -> tuple[str, ItemPath]:
    """Split an item id with ``depth`` steps into its source's id and its path.

    Raises:
        ValueError: The text has fewer steps than ``depth`` or a step without a number.
    """
    source_id, *steps = item.rsplit("/", depth) if depth else [item]
    if len(steps) != depth:
        raise ValueError(f"item id {item!r} has {len(steps)} steps, not {depth}")
    numbers = []
    for step in steps:
        match = _STEP.fullmatch(step)
        if match is None:
            raise ValueError(f"item id {item!r}: step {step!r} is not <stage>.<n>")
        numbers.append(int(match["n"]))
    return source_id, ItemPath(tuple(numbers))


def encode_path(path: ItemPath) -> str:
    """Return a path as text, ``0.3.1``; the root is the empty string."""
    return ".".join(map(str, path))


def decode_path(text: str) -> ItemPath:
    """Parse what :func:`encode_path` wrote."""
    return ItemPath(tuple(map(int, text.split(".")))) if text else ROOT


def source_digest(source_id: str) -> bytes:
    """Return the 16-byte digest under which a source's id is compared and named on disk."""
    return hashlib.blake2b(source_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def new_run_id() -> str:
    """Return a random run id, 16 hexadecimal digits."""
    return os.urandom(8).hex()
