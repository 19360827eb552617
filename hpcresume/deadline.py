"""When the attempt must be done, and whether it is stopping: node-local files.

Time limits can be raised and lowered while a job runs, and a signal to stop comes without
warning.  The supervisor writes the files; stages that ask read them.
"""

from __future__ import annotations

import contextlib
import os
import time

FILE_NAME = "deadline"
STOPPING = "stopping"


def write_deadline(directory: str, deadline: float) -> None:
    """Write the monotonic time by which the attempt must be done, in place of the last one."""
    temporary = os.path.join(directory, f".{FILE_NAME}")
    with open(temporary, "w", encoding="ascii") as file:
        file.write(repr(deadline))
    os.replace(temporary, os.path.join(directory, FILE_NAME))


def seconds_left(directory: str) -> float | None:
    """Return the seconds until the deadline; None where there is none."""
    path = os.path.join(directory, FILE_NAME)
    with contextlib.suppress(FileNotFoundError), open(path, encoding="ascii") as file:
        return float(file.read()) - time.monotonic()
    return None


def note_stopping(directory: str) -> None:
    """Note that no more sources are admitted: the attempt ends when what runs is done."""
    with open(os.path.join(directory, STOPPING), "w", encoding="ascii"):
        pass


def is_stopping(directory: str) -> bool:
    """Return whether that has been noted."""
    return os.path.exists(os.path.join(directory, STOPPING))
