"""Which log files a run's array tasks wrote."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hpcresume.fs import list_names
from hpcresume.run.directory import RunDir

_SLURM = re.compile(r"\d+_(\d+)(\.\w+)*")
_LOCAL = re.compile(r"task-0*(\d+)(\.\w+)*")


@dataclass(frozen=True, slots=True)
class LogFile:
    """One log file; ``task`` is None for the merge job's and others."""

    path: str
    name: str
    round: int
    task: int | None


def log_files(run: RunDir, *, round_: int | None = None, task: int | None = None) -> list[LogFile]:
    """Return log files by array task, then name.

    Args:
        run: The run.
        round_: The round; by default the newest that has logs.
        task: Only this array task's files.
    """
    rounds = reversed(run.rounds()) if round_ is None else [round_]
    for number in rounds:
        names = list_names(run.fs, run.logs_path(number))
        files = [LogFile(run.logs_path(number, n), n, number, _task_of(n)) for n in names]
        found = [file for file in files if task is None or file.task == task]
        if found:
            return sorted(found, key=lambda f: (f.task is None, f.task or 0, f.name))
    return []


def _task_of(name: str) -> int | None:
    match = _LOCAL.fullmatch(name) or _SLURM.fullmatch(name)
    return int(match[1]) if match else None
