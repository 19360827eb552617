"""Named points at which a test can stop, delay or fail a process.

Inert unless ``HPCRESUME_TESTING=1``.  ``HPCRESUME_FAILPOINTS`` then holds a list such as
``segment.after_rename=kill:2,ledger.after_commit=raise``; the number is the hit at which
the action is taken (the first by default), ``+`` after it means from that hit on.

Actions: ``kill`` (SIGKILL to this process), ``exit`` (``os._exit(99)``),
``raise`` (OSError EIO), ``enospc`` (OSError ENOSPC), ``stop`` (SIGSTOP to this process).
"""

from __future__ import annotations

import errno
import os
import signal

import msgspec


class _Armed(msgspec.Struct):
    action: str
    first: int
    repeat: bool
    hits: int = 0

    def due(self) -> bool:
        self.hits += 1
        return self.hits == self.first or (self.repeat and self.hits > self.first)


def _parse(text: str) -> dict[str, _Armed]:
    armed: dict[str, _Armed] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, rest = entry.partition("=")
        action, _, count = rest.partition(":")
        armed[name] = _Armed(action, int(count.rstrip("+") or 1), repeat=count.endswith("+"))
    return armed


_armed: dict[str, _Armed] = (
    _parse(os.environ.get("HPCRESUME_FAILPOINTS", ""))
    if os.environ.get("HPCRESUME_TESTING") == "1"
    else {}
)


def failpoint(name: str) -> None:
    """Take the action armed under ``name``; one dict lookup when none is."""
    if not _armed:
        return
    point = _armed.get(name)
    if point is not None and point.due():
        _act(point.action, name)


def _act(action: str, name: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "exit":
        os._exit(99)
    elif action == "raise":
        raise OSError(errno.EIO, f"failpoint {name}")
    elif action == "enospc":
        raise OSError(errno.ENOSPC, f"failpoint {name}")
    else:
        raise ValueError(f"failpoint {name}: unknown action {action!r}")
