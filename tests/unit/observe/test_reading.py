"""Reading a run again and again costs what has changed."""

from __future__ import annotations

from collections import Counter

import pytest

from hpcresume.fs import POSIX
from hpcresume.merge.generation import read_union, write_generation
from hpcresume.merge.retention import fold_small, remove_held
from hpcresume.observe.reading import Reader
from hpcresume.observe.status import Watcher, read_status
from hpcresume.run.directory import RunDir
from hpcresume.segment.segment import Progress
from tests.support.local import flip
from tests.support.many import make_many
from tests.support.runs import make_run


class Counting:
    """The machine's file system, which counts what is asked of it."""

    def __init__(self):
        self.calls = Counter()

    def __getattr__(self, name):
        found = getattr(POSIX, name)

        def call(*arguments, **options):
            self.calls[name] += 1
            return found(*arguments, **options)

        return call


def test_a_second_reading_opens_nothing_that_was_read(tmp_path):
    """Two listings and one look for an outcome for each task that is not done, and no segment."""
    make_many(tmp_path / "run", tasks=100, segments=2)
    fs = Counting()
    reader = Reader(RunDir.open(str(tmp_path / "run"), fs))
    reader.refresh()
    fs.calls.clear()
    reader.refresh()

    started, done = 90, 2
    # The round's list of tasks, the rounds, the generations, and the round's job records.
    assert 2 * (started - done) + 5 >= fs.calls["listdir"]
    assert started - done + 10 >= fs.calls["read"]
    assert 0 == fs.calls["size"]


def test_without_its_generation_a_pack_still_counts(tmp_path):
    """What was moved into packs stays done when the newest generation cannot be read."""
    run = make_many(tmp_path / "run", tasks=4, segments=5)
    union = read_union(run, max_attempts=3)
    fold_small(run, union, at_least=1)
    write_generation(run, union)
    assert remove_held(run)
    before = read_status(run).sources
    (path,) = (tmp_path / "run").glob("**/gen-*")
    flip(path, [20])

    assert before == read_status(run).sources


def test_readings_in_pieces_come_to_the_same(tmp_path):
    """With no time at all each reading goes on where the last one stopped, and ends up equal."""
    run = make_many(tmp_path / "run", tasks=40, segments=1)
    watcher, seen = Watcher(run), []
    while not seen or seen[-1] < 1:
        found = watcher.read(budget_s=1e-4)
        seen.append(found.seen)

    assert sorted(seen) == seen
    assert read_status(run).sources == found.sources


def test_what_happens_between_two_readings_is_seen(tmp_path):
    """Segments, outcomes, a merge and a new round: a watcher ends with what a first look finds."""
    made = make_run(tmp_path, sources=10, tasks=2)
    watcher = Watcher(made.run)
    found = [watcher.read().sources.completed]
    ref = made.attempt(0)
    made.publish(ref, [[0, 1]], failures=[made.failure(4)])
    found.append(watcher.read().sources.completed)
    made.publish(ref, [[2]], seq=2)
    made.end(ref, "saved", kind="preempted", completed=3)
    union = made.merge()
    found.append(watcher.read().sources.completed)
    made.plan(round_=1, generation=union.number)
    again = made.attempt(0, round_=1)
    made.publish(again, [[3, 4]])
    last = watcher.read()
    found.append(last.sources.completed)

    assert [0, 2, 3, 5] == found
    fresh = read_status(made.run)
    assert (fresh.sources, fresh.rounds, fresh.endings) == (last.sources, last.rounds, last.endings)
    assert 0 == last.sources.failing


def test_a_restarted_task_is_followed(tmp_path):
    """A later attempt of a task replaces the one before, whose end is counted."""
    made = make_run(tmp_path, sources=4)
    watcher = Watcher(made.run)
    first = made.attempt(0)
    watcher.read()
    made.end(first, "saved", kind="preempted")
    watcher.read()
    made.attempt(0)
    found = watcher.read()

    assert (2, "running") == (found.tasks[0].attempt, found.tasks[0].state)
    assert {"preempted": 1} == found.endings


def points(made, ref, *progress):
    """Publish a segment for each progress."""
    for seq, one in enumerate(progress, start=1):
        made.publish(ref, [[seq - 1]], seq=seq, progress=one)


@pytest.mark.parametrize(
    ("told", "rate"),
    [
        ([(100, 50)], 0.5),
        ([(100, 50), (200, 250)], 2.0),
        # What was done more than five minutes ago no longer counts.
        ([(100, 1000), (1000, 1100), (1100, 1200)], 1.0),
    ],
)
def test_the_rate_is_that_of_the_last_minutes(tmp_path, told, rate):
    """A run that became slower shows it, and one publication is better than nothing."""
    made = make_run(tmp_path, sources=5000)
    points(
        made,
        made.attempt(),
        *(Progress(elapsed_s=elapsed, completed=done, left=600) for elapsed, done in told),
    )
    found = read_status(made.run)

    assert rate == found.rate_per_s
    assert (600 / rate, 0) == (found.slowest_s, found.slowest_task)


def test_failures_are_grouped_and_core_hours_counted(tmp_path):
    """Sources that failed alike are one group; the price of the rest is that of what is done."""
    made = make_run(tmp_path, sources=8, tasks=1)
    ref = made.attempt()
    failures = [made.failure(4), made.failure(5), made.failure(6, message="other", retry=False)]
    made.publish(ref, [range(4)], failures=failures)
    made.end(ref, "saved", kind="time-limit", completed=4, elapsed_s=1800.0)
    found = read_status(made.run)

    assert [("split", "bad input", 2), ("split", "other", 1)] == [
        (one.stage, one.message, one.sources) for one in found.failures
    ]
    assert (0.5, 0.5 / 4 * 3) == (found.core_hours.used, found.core_hours.left)
    assert {"time-limit": 1} == found.endings
