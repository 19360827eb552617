"""When Slurm is asked for the end of the time limit, and what the answers change."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from hpcresume.task.time_limit import ASK_EVERY_S, RETRY_S, TimeLimit
from tests.support.cli import wait_until
from tests.unit.engine.pools import Clock

HOUR = 3600.0


class Slurm:
    """Answers when a test lets it, with what a test says."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self.end: float | None = None
        self.questions = 0
        self.reachable = threading.Event()
        self.reachable.set()

    def __call__(self) -> float | None:
        """Answer one question."""
        self.questions += 1
        self.reachable.wait()
        return self.end


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    """Return a Slurm that says the limit ends in an hour; no thread waits for it afterwards."""
    slurm = Slurm()
    slurm.end = 1000 + HOUR
    yield slurm
    slurm.reachable.set()


@pytest.fixture
def clock() -> Clock:
    """Return the clock."""
    return Clock()


@pytest.fixture
def limit(slurm: Slurm, clock: Clock) -> TimeLimit:
    """Return a limit that was asked for once."""
    limit = TimeLimit(slurm, near_s=30, clock=clock)
    limit.look()
    limit.wait(60)
    return limit


def pass_time(limit: TimeLimit, clock: Clock, seconds: float) -> None:
    """Let time pass in steps of half a second, every question being answered at once."""
    until = clock.now + seconds
    while clock.now < until:
        clock.now += 0.5
        limit.wait(60)


def test_the_first_answer(limit: TimeLimit, slurm: Slurm) -> None:
    """The end is what Slurm says."""
    assert (1000 + HOUR, 1000 + HOUR, 1) == (limit.end, limit.first_end, slurm.questions)


def test_questions_are_few(limit: TimeLimit, slurm: Slurm, clock: Clock) -> None:
    """An hour takes one question in ten minutes, and one more when the end is near."""
    pass_time(limit, clock, HOUR - 1)
    assert HOUR / ASK_EVERY_S + 1 == slurm.questions


def test_a_raise_is_seen_before_the_old_end(limit: TimeLimit, slurm: Slurm, clock: Clock) -> None:
    """A limit raised at any time is known 30 s before the old end, and again at the new one."""
    pass_time(limit, clock, HOUR - 60)
    slurm.end = 1000 + 2 * HOUR
    assert 1000 + HOUR == limit.end
    pass_time(limit, clock, 40)
    assert 1000 + 2 * HOUR == limit.end
    assert 1000 + HOUR == limit.first_end
    pass_time(limit, clock, HOUR - 20)
    slurm.end = 1000 + 3 * HOUR
    pass_time(limit, clock, 20)
    assert 1000 + 3 * HOUR == limit.end


def test_a_signal_shows_a_lower_limit(limit: TimeLimit, slurm: Slurm, clock: Clock) -> None:
    """A lowered limit is known once somebody asks to look, and without that in ten minutes."""
    slurm.end = 1000 + 900
    clock.now += 10
    limit.look()
    limit.wait(60)
    assert 1000 + 900 == limit.end
    slurm.end = 1000 + 800
    pass_time(limit, clock, ASK_EVERY_S)
    assert 1000 + 800 == limit.end


def test_no_answer_keeps_what_is_known(limit: TimeLimit, slurm: Slurm, clock: Clock) -> None:
    """Where Slurm cannot say, the end known so far counts, and it is asked again in a minute."""
    slurm.end = None
    limit.look()
    limit.wait(60)
    assert 1000 + HOUR == limit.end
    slurm.end = 1000 + 2 * HOUR
    pass_time(limit, clock, RETRY_S)
    assert (1000 + 2 * HOUR, 3) == (limit.end, slurm.questions)


def test_a_hanging_controller_is_given_up(limit: TimeLimit, slurm: Slurm, clock: Clock) -> None:
    """
    A question that is never answered blocks nobody, counts as tried after half a minute, and
    its late answer does not undo a newer one.
    """
    slurm.reachable.clear()
    slurm.end = 1000 + 100
    clock.now += 1
    asked = clock.now
    limit.look()
    limit.turn()
    assert not limit.is_newer_than(asked)
    clock.now += 31
    limit.turn()
    assert limit.is_newer_than(asked)
    assert 1000 + HOUR == limit.end
    clock.now += RETRY_S
    limit.turn()
    wait_until(
        lambda: slurm.questions == 3, timeout_s=60, describe=lambda: f"{slurm.questions} asked"
    )
    slurm.end = 1000 + 3 * HOUR
    slurm.reachable.set()
    # Both questions are answered now, in either order.
    wait_until(
        lambda: limit.turn() or limit.end == 1000 + 3 * HOUR,
        timeout_s=60,
        describe=lambda: f"the end is {limit.end}",
    )


def test_nothing_is_asked_off_slurm(slurm: Slurm, clock: Clock) -> None:
    """Nobody is asked until somebody says that there is somebody to ask."""
    limit = TimeLimit(slurm, near_s=30, clock=clock)
    pass_time(limit, clock, HOUR)
    assert (0, None) == (slurm.questions, limit.end)
