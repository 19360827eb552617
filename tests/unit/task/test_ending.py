"""How an attempt ended, how Slurm sees it, and the table by which it requeues itself."""

from __future__ import annotations

import pytest

from hpcresume import slurm
from hpcresume.run.directory import Outcome
from hpcresume.task.allocation import Allocation
from hpcresume.task.ending import View, kind_of_sigterm, look, make_outcome, view_of, why_not
from hpcresume.task.messages import Ended

MINUTE = 60.0


def record(state: str, **fields: float) -> slurm.JobInfo:
    """Return a record of ``scontrol show job`` of an attempt that ran for ten seconds."""
    shown = {"restarts": 0, "run_time_s": 10.0, "time_limit_s": MINUTE, **fields}
    return slurm.JobInfo(job_id=slurm.JobId("7_0"), state=state, **shown)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("job", "view"),
    [
        (record("RUNNING"), View.RUNNING),
        (record("RUNNING", preempt_time=1000.0), View.PREEMPTED),
        (record("SIGNALING"), View.RUNNING),
        (record("SIGNALING", preempt_time=1000.0), View.PREEMPTED),
        (record("COMPLETING"), View.CANCELLED),
        (record("CANCELLED"), View.CANCELLED),
        (record("COMPLETING", preempt_time=1000.0), View.ENDED),
        (record("PREEMPTED"), View.ENDED),
        (record("COMPLETING", run_time_s=MINUTE), View.ENDED),
        (record("TIMEOUT"), View.ENDED),
        (record("COMPLETING", restarts=1), View.REQUEUED),
        (record("PENDING", restarts=1), View.REQUEUED),
        (record("RUNNING", restarts=1), View.REQUEUED),
        (record("NODE_FAIL"), View.UNKNOWN),
        (record("FAILED"), View.UNKNOWN),
    ],
    ids=lambda value: value.state + str(value.restarts) if isinstance(value, slurm.JobInfo) else "",
)
def test_what_a_record_tells(job: slurm.JobInfo, view: View) -> None:
    """Preemption, time limit, cancellation and requeue are told apart as Slurm shows them."""
    assert view == view_of(job, restart_count=0)


def test_an_attempt_compares_its_own_restart_count() -> None:
    """A third attempt is not taken for a requeued first one."""
    assert View.RUNNING == view_of(record("RUNNING", restarts=2), restart_count=2)
    assert View.REQUEUED == view_of(record("RUNNING", restarts=3), restart_count=2)


def saved(kind: str = "preempted", *, state: str = "saved", completed: int = 5) -> Outcome:
    """Return an outcome of an attempt that stopped early."""
    return Outcome(state, "", kind, completed=completed)


YES = ""


@pytest.mark.parametrize(
    ("outcome", "view", "stop_mark", "allowed", "refused"),
    [
        # What Slurm will not restart by itself comes back.
        (saved("preempted"), View.PREEMPTED, False, True, YES),
        (saved("terminated"), View.RUNNING, False, True, YES),
        (saved("time-limit"), View.RUNNING, False, True, YES),
        (saved("driver-died"), View.RUNNING, False, True, YES),
        (saved("preempted", state="lost"), View.PREEMPTED, False, True, YES),
        (saved("pool-unrecoverable"), View.RUNNING, False, True, YES),
        # Slurm has decided otherwise, or is doing it already.
        (saved("cancelled"), View.CANCELLED, False, True, "it ended as cancelled"),
        (saved("requeued"), View.REQUEUED, False, True, "it ended as requeued"),
        (saved("preempted"), View.CANCELLED, False, True, "it was cancelled"),
        (saved("preempted"), View.REQUEUED, False, True, "Slurm or an administrator has requeued"),
        (saved("time-limit"), View.ENDED, False, True, "its grace period or its time is over"),
        (saved("time-limit"), View.REQUEUED, False, True, "has requeued it"),
        (saved("driver-died"), View.CANCELLED, False, True, "it was cancelled"),
        (saved("terminated"), View.UNKNOWN, False, True, "Slurm does not say"),
        # Without progress it could go on for ever.
        (saved("pool-unrecoverable", completed=0), View.RUNNING, False, True, "no completion"),
        (saved("preempted", completed=0), View.PREEMPTED, False, True, "published no completion"),
        (saved("time-limit", completed=0), View.RUNNING, False, True, "published no completion"),
        # The user or the site says no.
        (saved("preempted"), View.PREEMPTED, True, True, "stop mark"),
        (saved("time-limit"), View.RUNNING, True, True, "stop mark"),
        (saved("preempted"), View.PREEMPTED, None, True, "run directory does not answer"),
        (saved("preempted"), View.PREEMPTED, False, False, "site.requeue is off"),
        # Not ended early, or with nothing to gain from another start.
        (saved("finished", state="done"), View.RUNNING, False, True, "it ended as finished"),
        (saved("finished", state="lost"), View.RUNNING, False, True, "it ended as finished"),
        (saved("stopped"), View.RUNNING, False, True, "it ended as stopped"),
        (saved("superseded", state="superseded"), View.RUNNING, False, True, "superseded"),
        (saved("stage-broken", state="broken"), View.RUNNING, False, True, "stage-broken"),
        (saved("ray-start", state="broken"), View.RUNNING, False, True, "ray-start"),
    ],
)
def test_the_table_of_requeues(
    outcome: Outcome, view: View, stop_mark: bool | None, allowed: bool, refused: str
) -> None:
    """An element comes back only if Slurm still runs it, it got somewhere, and nobody said stop."""
    why = why_not(outcome, allowed=allowed, stop_mark=stop_mark, view=lambda: view)
    assert (refused == YES) == (why == YES), why
    assert refused in why


def test_slurm_is_not_asked_in_vain() -> None:
    """Where the answer would change nothing, Slurm is not asked."""

    def ask() -> View:
        raise AssertionError

    for outcome in (saved("finished", state="done"), saved(completed=0)):
        assert why_not(outcome, allowed=True, stop_mark=False, view=ask)


def test_slurm_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an answer, or off Slurm, nobody knows."""
    monkeypatch.setenv("PATH", "/nonexistent")
    assert View.UNKNOWN == look(Allocation(1, 0, 1, element="7_0"))
    assert View.UNKNOWN == look(Allocation(1, 0, 1))


@pytest.mark.parametrize(
    ("view", "kind"),
    [
        (View.PREEMPTED, "preempted"),
        (View.REQUEUED, "requeued"),
        (View.CANCELLED, "cancelled"),
        (View.RUNNING, "terminated"),
        (View.ENDED, "terminated"),
        (View.UNKNOWN, "terminated"),
    ],
)
def test_a_sigterm_is_named(view: View, kind: str) -> None:
    """The outcome says why the signal came, as far as Slurm told."""
    assert kind == kind_of_sigterm(view)


STOP = ("preempted", "SIGTERM")


DEATH = "was killed by signal 9"


@pytest.mark.parametrize(
    ("end", "stop", "published", "outcome"),
    [
        ("finished", None, True, ("done", "finished")),
        ("finished", STOP, True, ("done", "finished")),
        ("finished", None, False, ("lost", "finished")),
        ("terminated", STOP, True, ("saved", "preempted")),
        ("terminated", STOP, False, ("lost", "preempted")),
        ("terminated", ("superseded", ""), True, ("superseded", "superseded")),
        ("stage-broken", STOP, True, ("broken", "stage-broken")),
        ("ray-start", None, True, ("broken", "ray-start")),
        ("storage", None, True, ("broken", "storage")),
        (DEATH, None, True, ("saved", "driver-died")),
        (DEATH, STOP, True, ("saved", "preempted")),
        (None, STOP, True, ("saved", "preempted")),
        (None, None, True, ("saved", "terminated")),
    ],
)
def test_how_an_attempt_ended(
    end: str | None, stop: tuple[str, str] | None, published: bool, outcome: tuple[str, str]
) -> None:
    """A finished shard is done whatever was signalled; what is not published is lost to the run."""
    made = make_outcome(
        ended=Ended(end, "", 3) if end and end != DEATH else None,
        died=("driver-died", DEATH) if end == DEATH else None,
        stop=stop,
        published=published,
        completed=3,
        elapsed_s=1.5,
    )
    assert (*outcome, 3, 1.5) == (made.state, made.kind, made.completed, made.elapsed_s)
