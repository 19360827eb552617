"""Rounds: how many tasks, when a run is stopped, and which submission a round belongs to."""

from __future__ import annotations

import tempfile

import pytest

from hpcresume.errors import RunDirError
from hpcresume.launch.drive import merge_step, one_at_a_time
from hpcresume.launch.rounds import plan_round, seconds_per_weight, settle, stand, tasks_needed
from hpcresume.launch.slurm_round import close_round
from hpcresume.merge.plan import Launch, open_plan
from hpcresume.run.directory import CLOSED
from hpcresume.run.manifest import Listing, Manifest, write_part
from hpcresume.segment.segment import Progress
from tests.support.runs import make_run
from tests.unit.launch.jobs import settings

RESOLVED = settings({"run": {"max_no_progress_rounds": 1}}).settings


def measured(tmp_path, *, total: int, completed: int, elapsed_s: float):
    """A run of which one task completed some sources in so many seconds."""
    made = make_run(tmp_path, sources=total)
    ref = made.attempt()
    progress = Progress(elapsed_s=elapsed_s, completed=completed)
    made.publish(ref, [range(completed)], progress=progress)
    made.end(ref, "saved")
    return made


def needed(made, *, min_task_s: float = 60.0, weight_of=None) -> int | None:
    standing = stand(made.run, Manifest.open(made.run), RESOLVED)
    per_weight_s = seconds_per_weight(made.run, standing, weight_of)
    return tasks_needed(standing, weight_of, per_weight_s, min_task_s=min_task_s)


@pytest.mark.parametrize(
    ("completed", "elapsed_s", "tasks"),
    [(90, 9.0, 1), (90, 540.0, 1), (90, 549.0, 2), (90, 90 * 60.0, 10), (90, 90 * 600.0, 100)],
)
def test_a_task_is_worth_a_minute_of_measured_work(tmp_path, completed, elapsed_s, tasks):
    """Ten sources are left: as many tasks as they keep busy for a minute each, at least one."""
    made = measured(tmp_path, total=100, completed=completed, elapsed_s=elapsed_s)

    assert tasks == needed(made)


def test_what_was_never_measured_is_dealt_as_asked(tmp_path):
    """Without a completed source nothing is known of the cost; nor is it asked for with 0."""
    made = make_run(tmp_path, sources=10)
    before = needed(made)
    ref = made.attempt()
    made.publish(ref, [], progress=Progress(elapsed_s=50.0, completed=0))

    assert (None, None) == (before, needed(made))
    assert needed(measured(tmp_path / "x", total=9, completed=8, elapsed_s=1), min_task_s=0) is None


def test_the_newest_round_that_completed_any_is_the_measure(tmp_path):
    """Quick sources come first and slow ones remain: a later round tells what those take."""
    made = measured(tmp_path, total=100, completed=90, elapsed_s=9.0)
    made.plan(round_=1)
    slow = made.attempt(round_=1)
    made.publish(slow, [[90]], progress=Progress(elapsed_s=600.0, completed=1))
    made.plan(round_=2)
    made.publish(made.attempt(round_=2), [], progress=Progress(elapsed_s=7.0))

    assert 90 == needed(made)


def test_interrupted_sources_take_longer_than_they_ran(tmp_path):
    """Quick ones were done; one of the two that are left had worked for ten minutes in vain."""
    made = measured(tmp_path, total=100, completed=98, elapsed_s=9.8)
    manifest = Manifest.open(made.run)
    standing = stand(made.run, manifest, RESOLVED)
    standing.union.ran = {99: 600.0, 3: 6000.0}

    assert 12 == tasks_needed(standing, None, 0.1, min_task_s=60.0)


@pytest.mark.parametrize(("weight", "tasks"), [(1.0, 1), (600.0, 10), (0.0, 1)])
def test_weights_scale_what_was_measured(tmp_path, weight, tasks):
    """Sources were done in a second per unit of weight; the one left weighs more."""
    made = measured(tmp_path, total=91, completed=90, elapsed_s=90.0)

    assert tasks == needed(made, weight_of=lambda index: weight if index == 90 else 1.0)


def test_without_weights_that_say_anything_nothing_is_measured(tmp_path):
    """Where all that was done weighs nothing, a unit of weight has no cost."""
    made = measured(tmp_path, total=91, completed=90, elapsed_s=90.0)

    assert needed(made, weight_of=lambda _: 0.0) is None


def plan_next(made, *, after: int | None, array: int = 64, ran: dict[int, float] | None = None):
    manifest = Manifest.open(made.run)
    standing = stand(made.run, manifest, RESOLVED)
    standing.union.ran = ran or {}
    return plan_round(
        made.run,
        manifest,
        standing,
        after=None if after is None else open_plan(made.run, after),
        settings=settings().settings,
        code=1,
        launch=Launch(cluster="slurm", array=array),
    )


def test_the_next_round_has_as_many_tasks_as_the_remainder_needs(tmp_path):
    """Never more than the array, never more than sources, never more than worthwhile."""
    slow = measured(tmp_path, total=100, completed=97, elapsed_s=97 * 600.0)
    quick = measured(tmp_path / "quick", total=100, completed=97, elapsed_s=97.0)
    many = measured(tmp_path / "many", total=1000, completed=1, elapsed_s=600.0)
    rounds = [plan_next(made, after=0) for made in (slow, quick, many)]

    assert [1, 1, 1] == rounds
    tasks = [open_plan(made.run, 1).footer.tasks for made in (slow, quick, many)]
    assert [3, 1, 64] == tasks


def test_weighted_sources_are_dealt_longest_first(tmp_path):
    """The weight of a source decides where it goes, its measured cost how many tasks there are."""
    made = make_run(tmp_path, sources=[], tasks=None)
    listing = Listing((f"s{i}", b"j1", float(w)) for i, w in enumerate([1, 1, 1, 1, 4]))
    write_part(made.run, 2, first=0, listing=listing)
    made.ids = [f"s{i}" for i in range(5)]
    made.plan()
    plan_next(made, after=0, array=2)
    plan = open_plan(made.run, 1)

    assert [[4], [0, 1, 2, 3]] == sorted((list(plan.shard(t).bitmap()) for t in (0, 1)), key=len)


def test_a_round_is_planned_once_after_the_one_that_was_seen(tmp_path):
    """Whoever is late with its view of a run does not plan a round after the next one."""
    made = make_run(tmp_path)
    first = plan_next(made, after=0, array=2)
    same = plan_next(made, after=0, array=2)

    with pytest.raises(FileExistsError):
        plan_next(made, after=0, array=3)
    assert (1, 1, [0, 1]) == (first, same, made.run.rounds())


def test_a_round_at_work_is_no_reason_to_stop(tmp_path):
    """Uniting by hand early in a round finds no progress yet; only its end says there was none."""
    made = make_run(tmp_path)
    made.job(cluster="slurm", array="7")
    manifest = Manifest.open(made.run)

    at_work = settle(made.run, manifest, RESOLVED)
    ended = settle(made.run, manifest, RESOLVED, judge=True)

    assert ("", True) == (at_work.stopped, "completed nothing" in ended.stopped)


def test_rounds_that_were_never_submitted_do_not_count(tmp_path):
    """A round whose sbatch was lost and which was dealt anew has not failed."""
    made = make_run(tmp_path)
    close_round(made.run, open_plan(made.run, 0))
    made.plan(round_=1)

    assert "" == settle(made.run, Manifest.open(made.run), RESOLVED, judge=True).stopped


def test_a_closed_round_belongs_to_no_array(tmp_path):
    """An array that comes late to a closed round finds it taken; one that was first keeps it."""
    made = make_run(tmp_path, tasks=1)
    made.plan(round_=1)
    close_round(made.run, open_plan(made.run, 0))
    first = made.run.claim_round(1, "12")
    close_round(made.run, open_plan(made.run, 1))

    assert (CLOSED, "12") == (made.run.claim_round(0, "11"), first)
    assert [CLOSED, "12", None] == [made.run.round_owner(round_) for round_ in (0, 1, 2)]


def test_a_run_without_slurm_has_no_next_round_there(tmp_path):
    """`merge --requeue` of a run in the foreground names the command that goes on with it."""
    made = make_run(tmp_path)

    with pytest.raises(RunDirError, match=f"hpcresume submit {made.path}"):
        merge_step(made.run)


def test_interrupted_sources_are_dealt_by_how_long_they_ran(tmp_path):
    """Two of twenty worked for ten minutes in vain: each has a task of its own."""
    made = measured(tmp_path, total=110, completed=90, elapsed_s=90.0)
    plan_next(made, after=0, array=3, ran={95: 600.0, 96: 600.0})

    plan = open_plan(made.run, 1)
    dealt = [list(plan.shard(task).bitmap()) for task in range(3)]
    assert [[95], [96], [i for i in range(90, 110) if i not in {95, 96}]] == sorted(
        dealt, key=lambda one: (len(one), one)
    )


def test_the_lock_of_a_submission_is_gone_with_it(tmp_path, monkeypatch):
    """Nothing is left in the node's temporary directory, where every run would leave a file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with one_at_a_time(make_run(tmp_path, sources=1).run):
        held = list((tmp_path / "tmp").iterdir())

    assert (1, []) == (len(held), list((tmp_path / "tmp").iterdir()))
