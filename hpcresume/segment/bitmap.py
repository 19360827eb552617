"""Sets of source indices as compressed bitmaps (32-bit Roaring, portable serialisation)."""

from __future__ import annotations

from collections.abc import Iterable

from pyroaring import BitMap

from hpcresume.errors import CorruptDataError

MAX_SOURCES = 1 << 32


def dump(bitmap: BitMap) -> bytes:
    """Return a bitmap's bytes, runs compressed."""
    bitmap.run_optimize()
    data: bytes = bitmap.serialize()
    return data


def load(data: bytes, *, what: str) -> BitMap:
    """Return the bitmap that :func:`dump` wrote.

    Raises:
        CorruptDataError: The bytes are no bitmap; ``what`` names where they came from.
    """
    try:
        bitmap = BitMap.deserialize(data)
    except (ValueError, TypeError, MemoryError, IndexError) as error:
        raise CorruptDataError(
            f"{what}: not a bitmap of source indices ({error}). "
            "It is set aside; what only it held is computed again.",
            what=what,
        ) from error
    return bitmap


def span(start: int, stop: int) -> BitMap:
    """Return the bitmap of ``start <= index < stop``."""
    bitmap = BitMap()
    if stop > start:
        bitmap.add_range(start, stop)
    return bitmap


def refine(groups: Iterable[BitMap], group: BitMap) -> list[BitMap]:
    """Return disjoint groups cut along the borders of one more.

    Of suspects this keeps what each death has told: a source that two deaths name stays in
    the smaller group, so that each death leaves smaller ones.
    """
    refined: list[BitMap] = []
    for known in groups:
        refined += [part for part in (known & group, known - group) if part]
        group = group - known
    return [*refined, group] if group else refined


def union(bitmaps: Iterable[BitMap]) -> BitMap:
    """Return the union of any number of bitmaps."""
    result = BitMap()
    for bitmap in bitmaps:
        result |= bitmap
    return result
