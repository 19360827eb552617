"""Items on their way to the next group: each pickled by itself, or small ones in blocks.

A pickle of its own costs a small item more than the work of a trivial stage.  Blocks hold only
what they can without a difference that a stage could see: values of Python's own plain types,
and dicts, lists and tuples of such values.  Unpickling those runs no code of the user, so it
cannot fail for one item and take the others along, and the driver may do it, too; and nothing
in them that can be changed belongs to two items.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

_PLAIN = {bool, bytes, complex, float, int, str, type(None)}
_SHALLOW = ({dict}, {list}, {tuple})
_ITEMS = 64
_BYTES = 1 << 14
_WORTH_IT = 4


class _Block(NamedTuple):
    """Items ``start`` to ``stop`` of the ``of`` in a pickled list."""

    data: bytes
    of: int
    start: int
    stop: int

    def load(self) -> list[Any]:
        items: list[Any] = pickle.loads(self.data)
        return items[self.start : self.stop]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Items in blocks; a slice of them costs nothing, and is a little larger than it need be."""

    parts: list[_Block]

    def __len__(self) -> int:
        """Return the number of items."""
        return sum(part.stop - part.start for part in self.parts)

    def __getitem__(self, slots: slice) -> Blocks:
        """Return the items from one slot up to another."""
        start, stop, _ = slots.indices(len(self))
        found, at = [], 0
        for part in self.parts:
            first, last = max(start, at), min(stop, at + part.stop - part.start)
            if first < last:
                skipped = part.start - at
                found.append(part._replace(start=first + skipped, stop=last + skipped))
            at += part.stop - part.start
        return Blocks(found)

    def load(self) -> list[Any]:
        """Return the items."""
        return [item for part in self.parts for item in part.load()]

    def pickled(self) -> list[bytes]:
        """Return the items, each pickled by itself."""
        return [pickle.dumps(item, protocol=5) for item in self.load()]

    def size_bytes(self) -> int:
        """Return about how many bytes the items take; slices add up to what they are cut from."""
        return sum(
            len(part.data) * part.stop // part.of - len(part.data) * part.start // part.of
            for part in self.parts
        )


Items = list[bytes] | Blocks


def join(parts: Sequence[Items]) -> Items:
    """Return the items of several calls as one."""
    whole = [part for part in parts if isinstance(part, Blocks)]
    if len(whole) == len(parts):
        return Blocks([block for part in whole for block in part.parts])
    return [item for part in parts for item in singly(part)]


def singly(items: Items) -> list[bytes]:
    """Return items, each pickled by itself."""
    return items.pickled() if isinstance(items, Blocks) else items


def size_bytes(items: Items) -> int:
    """Return about how many bytes some items take."""
    return items.size_bytes() if isinstance(items, Blocks) else sum(map(len, items))


def in_blocks(items: Sequence[Any]) -> Blocks | None:
    """Return items in blocks; None where they are few, or large, or not plain throughout."""
    if len(items) < _WORTH_IT or not _are_plain(items):
        return None
    size = min(_ITEMS, _BYTES // len(pickle.dumps(items[0], protocol=5)))
    parts: list[_Block] = []
    start = 0
    while start < len(items):
        if size < _WORTH_IT:
            return None
        part = items[start : start + size]
        data = pickle.dumps(part, protocol=5)
        if len(data) > 2 * _BYTES:
            # Whoever gets one of its items gets all: a few large ones are not to travel along.
            size = len(part) * _BYTES // len(data)
            continue
        parts.append(_Block(data, len(part), 0, len(part)))
        start += len(part)
    return Blocks(parts)


def _are_plain(items: Sequence[Any]) -> bool:
    kinds = set(map(type, items))
    if kinds <= _PLAIN:
        return True
    if kinds not in _SHALLOW or len(set(map(id, items))) < len(items):
        return False
    inner = set(map(type, itertools.chain.from_iterable(items)))
    if kinds == {dict}:
        inner.update(map(type, itertools.chain.from_iterable(map(dict.values, items))))
    return inner <= _PLAIN
