"""The control group in which Slurm confines this process's memory: its limit, what was killed.

The kernel counts in a group what it killed of the group's own processes because memory ran
out; those of a step's group are all processes of an attempt.  Where nothing can be read (no
control groups, a container that hides them) an out-of-memory kill cannot be told from any
other SIGKILL.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_SELF = Path("/proc/self/cgroup")


class MemoryGroup:
    """A control group's memory; cgroup v1 and v2 name the same things differently.

    Args:
        top: Where the hierarchy is mounted, None where there is none.
        path: The group below it.
        limit: Name of the file with a group's limit in bytes.
        events: Name of the file with its line ``oom_kill N``.
    """

    def __init__(
        self, top: Path | None = None, path: str = "", limit: str = "", events: str = ""
    ) -> None:
        self._top, self._path = top, path.strip("/")
        self._limit, self._events = limit, events

    @classmethod
    def of_this_process(cls, *, root: Path = _ROOT, membership: Path = _SELF) -> MemoryGroup:
        """Return the group that this process is in.

        Args:
            root: Where control groups are mounted.
            membership: The process's groups, as the kernel lists them.
        """
        lines: list[str] = []
        with contextlib.suppress(OSError, UnicodeDecodeError):
            lines = membership.read_text(encoding="ascii").splitlines()
        return next((group for line in lines for group in cls._found(line, root)), cls())

    @classmethod
    def _found(cls, line: str, root: Path) -> Iterator[MemoryGroup]:
        """Yield the group that a line ``number:controllers:/path`` leads to, if it is there."""
        controllers, _, path = line.partition(":")[2].partition(":")
        if "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.oom_control")
            group = cls(root / "memory", path, *names)
        elif not controllers:
            group = cls(root, path, "memory.max", "memory.events")
        else:
            return
        if group._is_there():
            yield group

    def _is_there(self) -> bool:
        return self._top is not None and (self._top / self._path / self._events).is_file()

    def kills(self) -> int:
        """Return how many of its processes were killed so far; 0 where nobody can tell."""
        if self._top is None:
            return 0
        with contextlib.suppress(OSError, ValueError):
            text = (self._top / self._path / self._events).read_text(encoding="ascii")
            for line in text.splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
        return 0

    def limit_mib(self) -> int:
        """Return the least limit of the group and those above it; 0 where there is none."""
        if self._top is None:
            return 0
        found: list[int] = []
        folder = self._top / self._path
        for place in (folder, *folder.parents):
            # A group without a limit says "max", or a number beyond any machine's memory.
            with contextlib.suppress(OSError, ValueError):
                size_bytes = int((place / self._limit).read_text(encoding="ascii"))
                found += [size_bytes >> 20] if size_bytes < 1 << 60 else []
            if place == self._top:
                break
        return min(found, default=0)
