"""When an attempt publishes: intervals, refusals, hanging storage, and the end."""

from __future__ import annotations

import pytest

from hpcresume.config.settings import SyncSettings
from hpcresume.task.messages import Ended, Receipt, Report
from hpcresume.task.schedule import Schedule

SYNC = SyncSettings(max_age_s=60.0, max_records=0, max_bytes=1000, first_age_s=5.0)


def report(last: int, *, committed: int = 0, size: int = 0) -> Report:
    """Return what a driver says after ``last`` commits."""
    return Report(
        last=last,
        committed=committed,
        unpublished_bytes=size,
        in_flight=0,
        failing=0,
        quarantined=0,
        left=0,
        ready=True,
        lacks_time=False,
    )


def receipt(last: int, sources: int = 0) -> Receipt:
    """Return what a publisher says of commits up to ``last``."""
    return Receipt(last, sources, newest_epoch=1, stop=False)


@pytest.fixture
def published() -> Schedule:
    """Return a schedule that published commit 1 at the moment 100."""
    schedule = Schedule(SYNC)
    schedule.note_commits(report(1), 95.0)
    schedule.begin(99.0)
    schedule.take_receipt(receipt(1, 10), report(1), 100.0)
    return schedule


@pytest.mark.parametrize(
    ("committed_at", "now", "due"), [(None, 50.0, False), (10.0, 14.9, False), (10.0, 15.0, True)]
)
def test_the_first_publication(committed_at: float | None, now: float, due: bool) -> None:
    """The first one comes ``first_age_s`` after the first commit, and not without one."""
    schedule = Schedule(SYNC)
    if committed_at is not None:
        schedule.note_commits(report(1), committed_at)
    assert due == schedule.is_due(report(1), now)


def test_the_first_publication_with_a_short_interval() -> None:
    """An interval shorter than ``first_age_s`` counts for the first one as well."""
    schedule = Schedule(SyncSettings(max_age_s=1, max_records=0, max_bytes=1000, first_age_s=5))
    schedule.note_commits(report(1), 10.0)
    assert schedule.is_due(report(1), 11.0)


@pytest.mark.parametrize(("now", "due"), [(69.9, False), (70.0, True)])
def test_a_driver_that_reports_no_more(now: float, due: bool) -> None:
    """What it committed since is published ``max_age_s`` after it began."""
    schedule = Schedule(SYNC)
    schedule.note_commits(report(0), 10.0)
    assert due == schedule.is_due(report(0), now)


@pytest.mark.parametrize(("now", "due"), [(159.9, False), (160.0, True)])
def test_later_publications(published: Schedule, now: float, due: bool) -> None:
    """The next one comes ``max_age_s`` after the receipt."""
    assert due == published.is_due(report(2), now)


def test_many_bytes_are_published_at_once(published: Schedule) -> None:
    """``max_bytes`` unpublished do not wait for the interval."""
    assert [False, True] == [published.is_due(report(2, size=n), 101.0) for n in (999, 1000)]


def test_many_records_are_published_at_once() -> None:
    """``max_records`` counts what is committed and not published."""
    schedule = Schedule(SyncSettings(max_age_s=60, max_records=5, max_bytes=1000, first_age_s=5))
    schedule.begin(99.0)
    schedule.take_receipt(receipt(1, 10), None, 100.0)
    assert [False, True] == [schedule.is_due(report(2, committed=n), 101.0) for n in (14, 15)]


def test_one_at_a_time(published: Schedule) -> None:
    """While a publication is under way no other is due."""
    assert 2 == published.begin(160.0)
    assert not published.is_due(report(9, size=5000), 300.0)


def test_refusals_back_off(published: Schedule) -> None:
    """After each refusal the next try comes later, up to 30 s, and a receipt ends that."""
    waits = []
    for _ in range(7):
        published.begin(200.0)
        published.take_refusal(200.0)
        waits.append(published.retry_at - 200.0)
    assert [1, 2, 4, 8, 16, 30, 30] == waits
    assert not published.is_due(report(2), 229.9)
    assert published.is_due(report(2), 230.0)
    published.begin(230.0)
    published.take_receipt(receipt(2), report(2), 231.0)
    assert 0 == published.failures


def test_storage_that_hangs(published: Schedule) -> None:
    """A publication without an answer for a minute hangs."""
    published.begin(200.0)
    assert [False, True] == [published.is_hung(now) for now in (260.0, 260.1)]


def test_hold_only_when_late_and_in_trouble(published: Schedule) -> None:
    """No sources are taken while old commits cannot be published; a late one alone is no reason."""
    published.note_commits(report(2), 110.0)
    late = 110.0 + 2 * SYNC.max_age_s + 1
    assert not published.must_hold(late)
    published.begin(late)
    published.take_refusal(late)
    assert not published.must_hold(late - 2)
    assert published.must_hold(late)
    published.begin(late)
    published.take_receipt(receipt(2), report(2), late + 1)
    assert not published.must_hold(late + 1)


def test_what_is_committed_meanwhile_stays_unpublished(published: Schedule) -> None:
    """A receipt that covers less than the driver has committed leaves the rest waiting."""
    published.begin(200.0)
    published.take_receipt(receipt(2), report(3), 201.0)
    published.begin(202.0)
    published.take_refusal(202.0)
    assert published.must_hold(201.0 + 2 * SYNC.max_age_s + 1)


def test_rest_of_a_driver_that_ended(published: Schedule) -> None:
    """At least one more publication, for its last counts, and as many as its commits need."""
    ended = Ended("finished", "", last=3)
    found = []
    for last in (2, 3):
        found.append(published.is_rest_published(ended))
        published.begin(300.0)
        published.take_receipt(receipt(last), None, 301.0)
    assert [False, False] == found
    assert published.is_rest_published(ended)


def test_last_counts_are_published(published: Schedule) -> None:
    """A driver whose every commit is published still gets a last publication."""
    ended = Ended("finished", "", last=1)
    assert not published.is_rest_published(ended)
    published.begin(300.0)
    published.take_receipt(receipt(1), None, 301.0)
    assert published.is_rest_published(ended)


def test_rest_of_a_driver_that_died(published: Schedule) -> None:
    """It cannot say how much it committed: a publication that adds nothing is the end."""
    found = []
    for last in (4, 4):
        found.append(published.is_rest_published(None))
        published.begin(300.0)
        published.take_receipt(receipt(last), None, 301.0)
    assert [False, False] == found
    assert published.is_rest_published(None)


def test_rest_after_a_refusal(published: Schedule) -> None:
    """What was refused is ordered again, also where nothing new seems to be left."""
    ended = Ended("finished", "", last=1)
    assert not published.is_rest_published(ended)
    published.begin(300.0)
    published.take_refusal(300.0)
    assert not published.is_rest_published(ended)
    published.begin(302.0)
    published.take_receipt(receipt(1), None, 303.0)
    assert not published.is_rest_published(ended)
    published.begin(304.0)
    published.take_receipt(receipt(1), None, 305.0)
    assert published.is_rest_published(ended)
