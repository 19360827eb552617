"""How an attempt ended, and whether its element of the job array requeues itself.

Slurm restarts an element after a node failure, or when it outlives the grace period of a
preemption, before 24.05 not when it ends early within that period; and an element that came back
after every SIGTERM would bring back what the user cancelled.  So it asks how Slurm sees it.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable

from hpcresume import slurm
from hpcresume.errors import HpcResumeError
from hpcresume.run.directory import Outcome
from hpcresume.task.allocation import Allocation
from hpcresume.task.messages import Ended

_BROKEN_KINDS = frozenset({"stage-broken", "stage-start", "ray-start", "storage"})
_RESTARTED_KINDS = frozenset(
    {
        "terminated",
        "preempted",
        "time-limit",
        "driver-died",
        "out-of-memory",
        "pool-unrecoverable",
    }
)
_ASK_S = 5.0
# The second is how a running element reads while the controller hands a signal on.
_RUNS = frozenset({"RUNNING", "SIGNALING"})


class View(enum.StrEnum):
    """How Slurm sees this attempt of an element."""

    RUNNING = "Slurm still runs it"
    PREEMPTED = "it is preempted, within its grace period"
    REQUEUED = "Slurm or an administrator has requeued it"
    CANCELLED = "it was cancelled"
    ENDED = "its grace period or its time is over"
    UNKNOWN = "Slurm does not say how it stands"


def view_of(job: slurm.JobInfo, restart_count: int) -> View:
    """Return how a record of ``scontrol show job`` sees the attempt with a restart count.

    COMPLETING is all that a record says of an element that is being ended; what else
    it holds tells why.  Near the edges it may be wrong, so it may stop a requeue and word a
    message, while the merge step goes by how the element has ended.
    """
    if (job.restarts or 0) > restart_count:
        return View.REQUEUED
    if job.state in _RUNS:
        return View.RUNNING if job.preempt_time is None else View.PREEMPTED
    if job.state == "PREEMPTED" or job.preempt_time is not None:
        return View.ENDED
    ran_s, limit_s = job.run_time_s, job.time_limit_s
    if job.state == "TIMEOUT" or (limit_s is not None and ran_s is not None and ran_s >= limit_s):
        return View.ENDED
    return View.CANCELLED if job.state in {"COMPLETING", "CANCELLED"} else View.UNKNOWN


def look(allocation: Allocation, *, timeout_s: float = _ASK_S) -> View:
    """Ask Slurm how it sees this attempt."""
    if allocation.element is None:
        return View.UNKNOWN
    try:
        jobs = slurm.show_job(allocation.element, timeout_s=min(timeout_s, _ASK_S))
    except HpcResumeError:
        return View.UNKNOWN
    return view_of(jobs[0], allocation.restart_count) if len(jobs) == 1 else View.UNKNOWN


def forbid_restart(allocation: Allocation, *, stopped: bool) -> None:
    """Tell Slurm that this element, which has done its work, is not to be requeued.

    From 24.05 on Slurm requeues what ends within the grace period of a preemption, and does
    not forget that period with a requeue: an element that was requeued in it would run once
    more after the attempt that finished.  Where Slurm does not answer it does, for nothing.

    Args:
        allocation: Says whether the element was restarted.
        stopped: Whether this attempt was told to stop.
    """
    if (allocation.restart_count or stopped) and look(allocation) in _STILL_RUNS:
        with contextlib.suppress(HpcResumeError):
            slurm.update([f"JobId={allocation.element}", "Requeue=0"], timeout_s=_ASK_S)


def kind_of_sigterm(view: View) -> str:
    """Return the kind of outcome of an attempt that was sent SIGTERM."""
    return _KIND_OF_VIEW.get(view, "terminated")


_STILL_RUNS = frozenset({View.RUNNING, View.PREEMPTED})
_KIND_OF_VIEW = {
    View.PREEMPTED: "preempted",
    View.REQUEUED: "requeued",
    View.CANCELLED: "cancelled",
}


def make_outcome(
    *,
    ended: Ended | None,
    died: tuple[str, str] | None,
    stop: tuple[str, str] | None,
    published: bool,
    completed: int,
    elapsed_s: float,
    usable_s: float = 0.0,
) -> Outcome:
    """Return how an attempt ended.

    Args:
        ended: What the driver said at its end, None where it could not.
        died: Kind and reason of its death, None where it did not die.
        stop: Kind and reason of a stop that the supervisor ordered.
        published: Whether everything committed is published.
        completed: Sources completed and published.
        elapsed_s: How long the attempt took.
        usable_s: How long a fresh attempt can work under the time limit.
    """
    kind, reason, stage = "terminated", "it did not drain in time", ""
    if ended is not None:
        kind, reason, stage = ended.kind, ended.reason, ended.stage
    elif died is not None:
        kind, reason = died
    if stop is not None and kind in {"terminated", "driver-died", "pool-unrecoverable"}:
        kind, reason = stop
    states = {"finished": "done", "superseded": "superseded"}
    state = "broken" if kind in _BROKEN_KINDS else states.get(kind, "saved")
    if not published:
        state, reason = "lost", f"{reason}; not everything could be published"
    return Outcome(state, reason, kind, stage, completed, elapsed_s, usable_s)


def why_not(
    outcome: Outcome, *, allowed: bool, stop_mark: bool | None, view: Callable[[], View]
) -> str:
    """Return why an element must not requeue itself, empty where it has to.

    Whatever is refused here is the merge step's to decide, so nothing is lost by a no.

    Args:
        outcome: How the attempt ended.
        allowed: Whether the site lets elements be restarted.
        stop_mark: Whether the run holds a stop mark; None: the run directory does not answer.
        view: How Slurm sees the attempt; asked only where everything else says yes.
    """
    if outcome.state not in {"saved", "lost"} or outcome.kind not in _RESTARTED_KINDS:
        return f"it ended as {outcome.kind}"
    if not allowed:
        return "site.requeue is off"
    if not outcome.completed:
        # Without any progress it might be requeued for ever.
        return "it published no completion"
    if stop_mark is None:
        return "the run directory does not answer"
    if stop_mark:
        return "the run holds a stop mark"
    seen = view()
    return "" if seen in {View.RUNNING, View.PREEMPTED} else str(seen)
