"""Servers that a worker spawned in its set-up, ended when the worker dies without a word.

They lead process groups of their own and would live until the attempt ends, holding the
memory, the GPU or the port that the worker's successor needs.
"""

from __future__ import annotations

import contextlib
import os
import signal

import msgspec
import psutil


def record(mark: str) -> None:
    """Write beside the worker's mark which children this process has."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append((child.pid, child.create_time()))
    with open(mark + ".children", "wb") as file:
        file.write(msgspec.json.encode(found))


def end(mark: str) -> None:
    """Kill the children that a dead worker had recorded, each with its group."""
    with contextlib.suppress(FileNotFoundError), open(mark + ".children", "rb") as file:
        for pid, created in msgspec.json.decode(file.read(), type=list[tuple[int, float]]):
            # The number may belong to another process by now.
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if psutil.Process(pid).create_time() == created:
                    kill = os.killpg if os.getpgid(pid) == pid else os.kill
                    kill(pid, signal.SIGKILL)
