"""Observers are told of commits in order, and can neither fail nor hold up a task."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from hpcresume.pipeline.observer import GivenUp, ObservedTask
from hpcresume.task import observing
from hpcresume.task.observing import Observing
from tests.support.places import failure, frame, row

TASK = ObservedTask(Path("run"), 0, 1, "local")
DEADLINE_S = 20


class Recorder:
    """Remembers what it is told."""

    def __init__(self, task: ObservedTask) -> None:
        self.task, self.told, self.wants_stop = task, [], ""

    def completed(self, sources: Sequence[tuple[int, bytes]]) -> None:
        self.told.append(sources)

    def given_up(self, failure: GivenUp) -> None:
        self.told.append(failure)
        self.wants_stop = "enough"

    def close(self) -> None:
        self.told.append("closed")


def record(made: list[Recorder]):
    """Return what makes a recorder and keeps it."""

    def make(task: ObservedTask) -> Recorder:
        made.append(Recorder(task))
        return made[-1]

    return make


def test_commits_are_told_in_order() -> None:
    """Rows come by source, and of failures those that are not tried again."""
    made: list[Recorder] = []
    told = Observing(record(made), TASK, max_attempts=3)
    told.committed([frame([1, 2])], [failure(7, 1)])
    told.committed([], [failure(7, 3), failure(8, 1, retry=False)])
    told.committed([frame([3])], [])
    told.close(DEADLINE_S)

    (recorder,) = made
    assert TASK == recorder.task
    first, seven, eight, last, closed = recorder.told
    assert [(1, row(1)), (2, row(2))] == first
    assert [(7, 3), (8, 1)] == [(f.source, f.attempts) for f in (seven, eight)]
    assert ([(3, row(3))], "closed") == (last, closed)
    assert "enough" == told.wants_stop


def test_an_observer_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """One that raises is told of the next commit all the same; one that cannot start of none."""
    made: list[Recorder] = []

    class Failing(Recorder):
        def completed(self, sources: Sequence[tuple[int, bytes]]) -> None:
            super().completed(sources)
            raise OSError("disk full")

    def make(task: ObservedTask) -> Recorder:
        made.append(Failing(task))
        return made[-1]

    told = Observing(make, TASK, max_attempts=1)
    for source in (1, 2):
        told.committed([frame([source])], [])
    told.close(DEADLINE_S)
    assert 3 == len(made[0].told)
    assert 2 == caplog.text.count("OSError: disk full")

    def refuse(_task: ObservedTask) -> Recorder:
        raise ValueError("cannot start")

    without = Observing(refuse, TASK, max_attempts=1)
    without.committed([frame([1])], [])
    without.close(DEADLINE_S)
    assert "goes on without it" in caplog.text


def test_an_observer_that_hangs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What waits for it is bounded in bytes; commits beyond that are passed over, and said so."""
    monkeypatch.setattr(observing, "_WAITING_MAX", 200)
    entered, release = threading.Event(), threading.Event()
    made: list[Recorder] = []

    class Slow(Recorder):
        def completed(self, sources: Sequence[tuple[int, bytes]]) -> None:
            entered.set()
            assert release.wait(DEADLINE_S)
            super().completed(sources)

    def make(task: ObservedTask) -> Recorder:
        made.append(Slow(task))
        return made[-1]

    told = Observing(make, TASK, max_attempts=1)
    told.committed([frame([0])], [])
    assert entered.wait(DEADLINE_S)
    for source in range(1, 50):
        told.committed([frame([source])], [])
    told.close(0.01)
    release.set()
    told.close(DEADLINE_S)
    assert 2 <= len(made[0].told) < 20
    assert 1 == caplog.text.count("too slow")
