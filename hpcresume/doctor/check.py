"""What a probe finds, and how a child that probes says it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Literal

State = Literal["ok", "warning", "wrong"]


@dataclass(frozen=True, slots=True)
class Check:
    """What one probe found.

    Attributes:
        section: ``software``, ``node``, ``storage``, ``slurm`` or ``ray``.
        name: What was probed.
        state: ``ok``, ``warning`` or ``wrong``.
        found: What came of it.
        remedy: What to do; empty where all is well.
    """

    section: str
    name: str
    state: State
    found: str
    remedy: str = ""


def answer(values: Mapping[str, object]) -> None:
    """Write one line for whoever started this process."""
    os.write(1, json.dumps(values).encode() + b"\n")


def read_back(file: IO[bytes]) -> str:
    """Return all that a file holds."""
    file.seek(0)
    return file.read().decode(errors="replace")


def last_line(text: str) -> str:
    """Return the last line that is not blank, empty where all are."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def show_size(size_bytes: float) -> str:
    """Return a size for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"
