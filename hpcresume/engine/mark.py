"""A worker's mark: which source it is working on and until when, readable after its death.

32 bytes in a node-local file that worker and driver both map: the source's index plus one
(0: not known), the number of the stage, the deadline in microseconds of the system-wide
monotonic clock (0: none), and, written by the driver, whether the worker is to hand back
what it has not begun.  Writing one field is one machine store, so a marked item costs
tens of nanoseconds, and a reader needs no cooperation from a process that hangs in C code.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

ItemT = TypeVar("ItemT")
_FIELDS, _RECALLED = 4, 3


@dataclass(frozen=True, slots=True)
class Sight:
    """What a mark said at one moment.

    Attributes:
        source: Index of the source being worked on, None where it is not known.
        stage: Number of the stage being run, within its pipeline.
        overdue_s: Seconds since its deadline; negative before it, or without one.
    """

    source: int | None
    stage: int
    overdue_s: float


class Mark:
    """A mapped mark; the worker writes it, the driver reads it, but for the recall."""

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # Who writes to a page that a full disk has no room for is killed.
            os.posix_fallocate(fd, 0, 8 * _FIELDS)
            self._map = mmap.mmap(fd, 8 * _FIELDS)
        finally:
            os.close(fd)
        self.fields = memoryview(self._map).cast("Q")

    def clear(self) -> None:
        """Say that nothing in particular is being worked on."""
        # Writing to a file's page may wait for the disk.
        fields = self.fields
        if fields[0] or fields[1] or fields[2]:
            fields[0] = fields[1] = fields[2] = 0

    def over(self, items: Iterable[ItemT], sources: Iterable[int], stage: int) -> Iterator[ItemT]:
        """Yield items, and say of each that its source is being worked on, until it is closed."""
        fields = self.fields
        fields[1], fields[2] = stage, 0
        try:
            for item, source in zip(items, sources, strict=True):
                fields[0] = source + 1
                yield item
        finally:
            self.clear()

    def recall(self) -> None:
        """Ask the worker to hand back what it has not begun, now and from now on."""
        self.fields[_RECALLED] = 1

    @property
    def is_recalled(self) -> bool:
        """Whether the worker is to hand back what it has not begun."""
        return bool(self.fields[_RECALLED])

    def set(self, source: int | None, stage: int, timeout_s: float | None) -> None:
        """Say what is being worked on, and how long it may take."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self.set_until(source, stage, deadline)

    def set_until(self, source: int | None, stage: int, deadline: float | None) -> None:
        """Say what is being worked on, and until when on the monotonic clock."""
        self.fields[0] = 0 if source is None else source + 1
        self.fields[1], self.fields[2] = stage, 0 if deadline is None else int(deadline * 1e6)

    def look(self) -> Sight:
        """Return what the worker is on, all of it from one moment."""
        while True:
            source, stage, deadline, _ = before = tuple(self.fields)
            if before == tuple(self.fields):
                break
        overdue_s = time.monotonic() - deadline / 1e6 if deadline else float("-inf")
        return Sight(source - 1 if source else None, stage, overdue_s)
