"""A worker's mark: which source it is working on and until when, readable after its death.

24 bytes in a node-local file that worker and driver both map: the source's index plus one
(0: not known), the number of the stage, and the deadline in microseconds of the system-wide
monotonic clock (0: none).  Writing one field is one machine store, so a marked item costs
tens of nanoseconds, and a reader needs no cooperation from a process that hangs in C code.
"""

from __future__ import annotations

import mmap
import os
import time

_FIELDS = 3


class Mark:
    """A mapped mark; the worker writes it, the driver reads it."""

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, 8 * _FIELDS)
            self._map = mmap.mmap(fd, 8 * _FIELDS)
        finally:
            os.close(fd)
        self.fields = memoryview(self._map).cast("Q")

    def clear(self) -> None:
        """Say that nothing in particular is being worked on."""
        self.fields[0] = self.fields[1] = self.fields[2] = 0

    def set(self, source: int | None, stage: int, timeout_s: float | None) -> None:
        """Say what is being worked on."""
        deadline = 0 if timeout_s is None else int((time.monotonic() + timeout_s) * 1e6)
        self.fields[0] = 0 if source is None else source + 1
        self.fields[1], self.fields[2] = stage, deadline

    @property
    def source(self) -> int | None:
        """Index of the source being worked on, None where it is not known."""
        return int(self.fields[0]) - 1 if self.fields[0] else None

    @property
    def stage(self) -> int:
        """Number of the stage being run, within its pipeline."""
        return int(self.fields[1])

    def overdue_s(self) -> float:
        """Return by how many seconds the deadline has passed; negative before it."""
        deadline = self.fields[2]
        return time.monotonic() - deadline / 1e6 if deadline else float("-inf")
