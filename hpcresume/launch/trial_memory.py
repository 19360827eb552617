"""How much memory the stages of a trial take."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

from hpcresume.engine.groups import Group

_MEMORY_S = 1.0


class Memory:
    """Peak resident memory of the processes that run the stages; best effort.

    The kernel's own high-water mark of a process is read while it lives.  ``ru_maxrss``
    would not do: on Linux a child inherits its parent's through exec.
    """

    def __init__(self, groups: Sequence[Group], marks: Path | None) -> None:
        self._marks = marks
        self._group_of = [group.number for group in groups for _ in group.stages]
        self._workers: dict[int, int] = {}
        self._peaks: dict[int, int] = {}
        self._next = 0.0

    def look(self, *, now: bool = False) -> None:
        """Read the marks, at most once a second unless it must be ``now``."""
        clock = time.monotonic()
        if clock < self._next and not now:
            return
        self._next = clock + _MEMORY_S
        if self._marks is None:
            self._note(os.getpid(), set(self._group_of))
            return
        self._find_workers(str(self._marks) + os.sep)
        for pid, group in self._workers.items():
            self._note(pid, {group})

    def _find_workers(self, marks: str) -> None:
        """Find Ray's workers by the file that each keeps open for its last words."""
        for process in psutil.Process().children(recursive=True):
            if process.pid in self._workers:
                continue
            try:
                names = os.listdir(f"/proc/{process.pid}/fd")
                links = [os.readlink(f"/proc/{process.pid}/fd/{name}") for name in names]
            except OSError:
                continue
            for link in links:
                if link.startswith(marks) and link.endswith(".fault"):
                    number = link.removeprefix(marks).partition("-")[0]
                    self._workers[process.pid] = int(number)

    def _note(self, pid: int, groups: Iterable[int]) -> None:
        peak = _high_water_bytes(pid)
        for group in groups if peak else ():
            self._peaks[group] = max(self._peaks.get(group, 0), peak)

    def of(self, stage: int) -> int | None:
        """Return the peak of the processes that ran stage number ``stage``."""
        return self._peaks.get(self._group_of[stage])


def _high_water_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) << 10
    except OSError:
        return 0
    return 0
