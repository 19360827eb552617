"""Which log files a run's array tasks wrote, and which lines of them tell of a source."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hpcresume.errors import UsageError
from hpcresume.fs import list_names
from hpcresume.merge.plan import whole_plans
from hpcresume.run.directory import RunDir
from hpcresume.run.manifest import Manifest

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


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of a log file; ``number`` counts from 1."""

    file: LogFile
    number: int
    text: str

    def __str__(self) -> str:
        return f"{self.file.path}:{self.number}:{self.text}"


def lines_of_source(run: RunDir, source_id: str) -> Iterator[LogLine]:
    """Yield the lines that name a source, from the logs of every task that was given it.

    Lines that a stage writes through ``ctx.log`` do; what it prints itself may not.

    Raises:
        UsageError: The run has no source of this id.
    """
    try:
        index = Manifest.open(run).find(source_id)
    except KeyError as error:
        raise UsageError(
            f"{run.path} has no source {source_id!r}. Ids are as in the pipeline: paths below "
            "the root, or what id= named. `hpcresume collect --with-source` and "
            "`hpcresume failures` show them.",
            source=source_id,
        ) from error
    # What follows is the rest of an item's id, or the end of a word; not a longer id.
    named = re.compile(rf"(?<![\w./-]){re.escape(source_id)}(?![\w.-])")
    for plan in sorted(whole_plans(run), key=lambda plan: plan.footer.round):
        for task in range(plan.footer.tasks):
            if index in plan.shard(task).bitmap():
                for file in log_files(run, round_=plan.footer.round, task=task):
                    yield from _matching(file, named)


def _matching(file: LogFile, named: re.Pattern[str]) -> Iterator[LogLine]:
    with open(file.path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if named.search(line):
                yield LogLine(file, number, line.rstrip("\n"))


def _task_of(name: str) -> int | None:
    match = _LOCAL.fullmatch(name) or _SLURM.fullmatch(name)
    return int(match[1]) if match else None
