"""``hpcresume logs``: what a run's array tasks wrote."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, BinaryIO

import click

from hpcresume.cli.common import run_argument, say
from hpcresume.errors import RunDirError

if TYPE_CHECKING:
    from hpcresume.observe.logs import LogFile
    from hpcresume.run.directory import RunDir

POLL_S = 0.5
_READ_BYTES = 1 << 20


@click.command()
@run_argument()
@click.option("--task", type=click.IntRange(min=0), metavar="I", help="Only array task I.")
@click.option("--source", metavar="ID", help="Only the lines that name this source.")
@click.option("-f", "--follow", is_flag=True, help="Go on as the files grow, until Ctrl-C.")
def logs(run: RunDir, task: int | None, source: str | None, follow: bool) -> None:
    """Print the logs of RUN's newest round, or the lines of all rounds that name a source.

    \b
    Example:
      hpcresume logs
      hpcresume logs runs/paragraphs-1f2e3d4c --task 3 -f
      hpcresume logs --source pages/0017.html
    """
    from hpcresume.observe.logs import log_files

    if source is not None:
        _print_lines(run, source)
        return

    files = log_files(run, task=task)
    if not files and not follow:
        which = f"array task {task} of {run.path}" if task is not None else run.path
        raise RunDirError(
            f"there are no logs of {which} yet. A task writes its log from its start on. "
            "To see whether it has started: hpcresume status",
            path=run.path,
        )
    tails: dict[str, Tail] = {}
    _print_new(files, tails)
    pause = threading.Event()
    while follow:
        pause.wait(POLL_S)
        _print_new(log_files(run, task=task), tails)


def _print_lines(run: RunDir, source: str) -> None:
    from hpcresume.observe.logs import lines_of_source

    is_named = False
    for line in lines_of_source(run, source):
        is_named = True
        say(str(line))
    if not is_named:
        say(
            f"no line of the logs names {source}. What a stage writes with ctx.log does. "
            "Why a source failed: hpcresume failures",
            err=True,
        )


def _print_new(files: list[LogFile], tails: dict[str, Tail]) -> None:
    for file in files:
        tail = tails.setdefault(file.path, Tail(file.path))
        first = True
        while data := tail.read():
            if first and len(files) > 1:
                say(f"==> {file.name} <==")
            first = False
            sys.stdout.flush()
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
    for path in set(tails) - {file.path for file in files}:
        tails.pop(path).close()


class Tail:
    """Reads a file as it grows; begins again where another file took its name."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def read(self) -> bytes:
        """Return what came since the last call, up to 1 MiB."""
        if self._file is None:
            self._file = self._open()
        if self._file is None:
            return b""
        data = self._file.read(_READ_BYTES)
        if not data and self._replaced():
            self.close()
            return self.read()
        return data

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> BinaryIO | None:
        try:
            return open(self._path, "rb", buffering=0)
        except FileNotFoundError:
            return None

    def _replaced(self) -> bool:
        assert self._file is not None
        mine = os.fstat(self._file.fileno())
        try:
            named = os.stat(self._path)
        except FileNotFoundError:
            return False
        cut = named.st_size < self._file.tell()
        return cut or (mine.st_dev, mine.st_ino) != (named.st_dev, named.st_ino)
