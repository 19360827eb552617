"""How far the updates of a serving pool have come: a node-local file that outlives the pool.

A line is written before every step and at the end.  Whoever comes after a process that died
in the middle reads the last one: the stage's next worker, which goes on from the newest
version that may have been served, and the supervisor, which names the update in the outcome.

A line outlives every process of the node as soon as it is written.  It is not synced: after
the node itself nobody reads it, and a sync would lengthen the pause of every update.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from urllib.parse import quote, unquote

DIRECTORY = "updates"
_FINAL = frozenset({"committed", "rolled_back", "unrecoverable"})


@dataclass(frozen=True, slots=True)
class UpdateStep:
    """How far an update has come.

    Attributes:
        session: The update's name.
        step: The phase that was about to begin, or the outcome.
        from_version: Version that was served before, None where none was.
        to_version: Version that was asked for.
        version: The one of them that the step is about.
    """

    session: str
    step: str
    from_version: int | None
    to_version: int
    version: int | None

    @property
    def is_over(self) -> bool:
        """Whether the update has ended."""
        return self.step in _FINAL

    @property
    def served(self) -> int | None:
        """Newest version that a request may have been answered with."""
        return self.version if self.is_over or self.step == "resume" else self.from_version

    def __str__(self) -> str:
        where = self.step.replace("_", " ") if self.is_over else f"in phase {self.step!r}"
        return f"update from version {self.from_version} to {self.to_version}, {where}"


class Journal:
    """Writes the steps of a pool's updates.

    Args:
        path: The file; its directory is made.
    """

    def __init__(self, path: str) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.path = path

    def write(self, step: UpdateStep) -> None:
        """Add a line."""
        line = json.dumps(asdict(step), separators=(",", ":")) + "\n"
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, line.encode("ascii"))
        finally:
            os.close(fd)

    def last(self) -> UpdateStep | None:
        """Return the newest whole line, None where there is none."""
        return _last(self.path)


def journal_path(attempt: str, stage: str) -> str:
    """Return where the pool of a stage keeps its journal, given the attempt's directory."""
    return os.path.join(attempt, DIRECTORY, quote(stage, safe=""))


def interrupted(attempt: str) -> dict[str, UpdateStep]:
    """Return the updates that an attempt's processes left in the middle, by stage."""
    found = {}
    directory = os.path.join(attempt, DIRECTORY)
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(directory)):
            step = _last(os.path.join(directory, name))
            if step is not None and not step.is_over:
                found[unquote(name)] = step
    return found


def _last(path: str) -> UpdateStep | None:
    with contextlib.suppress(OSError), open(path, encoding="ascii", errors="replace") as file:
        for line in reversed(file.read().split("\n")[:-1]):
            with contextlib.suppress(ValueError, TypeError):  # torn by the death that it tells of
                return UpdateStep(**json.loads(line))
    return None
