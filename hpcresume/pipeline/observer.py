"""Observers: told of results while a run is under way, once they are safe.

``Pipeline(observer=make)`` makes one in every array task.  What it is told of is durable in
the task's ledger, so whatever it shows is never taken back.  It works in a thread of its own:
one that is slow or fails holds nothing up and loses nothing but what it would have shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec


class ObservedTask(msgspec.Struct, frozen=True):
    """The array task that an observer is made in.

    Attributes:
        run: The run directory.
        round: Number of the round.
        task: Number of the task in it.
        cluster: ``local`` or ``slurm``: whether all tasks of the run are on this machine.
    """

    run: Path
    round: int
    task: int
    cluster: str


class GivenUp(msgspec.Struct, frozen=True):
    """A source that is not tried again.

    Attributes:
        source: Its index in the manifest.
        kind: Exception type, ``Failed``, ``timeout``, ``death`` or ``out-of-memory``.
        message: One line.
        traceback: The traceback, or the tail of the worker's output.
        attempts: How often it was tried.
    """

    source: int
    kind: str
    message: str
    traceback: str
    attempts: int


class Observer(Protocol):
    """Told of results in the order in which they were committed.

    Attributes:
        wants_stop: Why the task is to admit no more sources, empty where it is to go on.
    """

    wants_stop: str

    def completed(self, sources: Sequence[tuple[int, bytes]]) -> None:
        """These sources are complete: index in the manifest, and rows, each with a newline."""

    def given_up(self, failure: GivenUp) -> None:
        """This source failed and is not tried again."""

    def close(self) -> None:
        """The task ends."""


MakeObserver = Callable[[ObservedTask], Observer]
