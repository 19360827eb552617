"""What lives of a round: Slurm's queue, asked at most once, or the processes of this host."""

from __future__ import annotations

import os

import msgspec

from hpcresume import slurm
from hpcresume.errors import HpcResumeError, SlurmUnreachableError
from hpcresume.merge.plan import array_name, merge_name, twin_name
from hpcresume.observe.liveness import is_gone, submitter_runs
from hpcresume.observe.reading import AttemptFiles, RoundFiles
from hpcresume.run.directory import RunDir

_SQUEUE_TIMEOUT_S = 10.0
_NAMED = 3


class Queue(msgspec.Struct):
    """What squeue said of jobs that have not ended.

    Attributes:
        tasks: The newest round's array.
        merges: Its merge jobs and their twins.
        planners: Those of the round before, which planned it and may not have submitted it yet.
        unasked: Why squeue was not asked.
    """

    tasks: list[slurm.QueueEntry] = msgspec.field(default_factory=list)
    merges: list[slurm.QueueEntry] = msgspec.field(default_factory=list)
    planners: list[slurm.QueueEntry] = msgspec.field(default_factory=list)
    unasked: str = ""

    def waits_for(self) -> dict[int | None, str]:
        """Return why pending tasks wait, in Slurm's words; None stands for all unsplit ones."""
        return {
            entry.array_task: entry.reason or ""
            for entry in self.tasks
            if entry.state == "PENDING" and entry.reason
        }


class Life(msgspec.Struct):
    """What lives of the newest round.

    Attributes:
        waiting: Whether something of it is still to run, or to go on.
        unmerged: Whether its tasks are in Slurm's queue and no merge job is.
        held: Its jobs that Slurm holds.
        waits_for: Why pending tasks wait; None stands for all that Slurm lists together.
        unasked: What could not be asked, and why; empty when all could.
    """

    waiting: bool = False
    unmerged: bool = False
    held: list[slurm.QueueEntry] = msgspec.field(default_factory=list)
    waits_for: dict[int | None, str] = msgspec.field(default_factory=dict)
    unasked: str = ""


def look_for_life(newest: RoundFiles, queue: Queue | None) -> Life:
    """Find out which attempts of the newest round run, and note it in them.

    Args:
        newest: The newest round.
        queue: What Slurm's queue holds of it; None: it runs without Slurm.
    """
    by_job = None if queue is None or queue.unasked else _running_jobs(queue)
    for attempt in newest.newest.values():
        if attempt.outcome is None:
            attempt.alive = _is_alive(attempt, queue, by_job)
    if queue is not None:
        # Where Slurm was not asked, a first round that was never submitted still does not wait.
        in_doubt = bool(queue.unasked and (newest.number or newest.jobs or newest.tasks))
        return Life(
            waiting=bool(in_doubt or queue.tasks or queue.merges or queue.planners),
            unmerged=bool(newest.merges_itself and queue.tasks and not queue.merges),
            held=[entry for entry in queue.tasks if "held" in (entry.reason or "").lower()],
            waits_for=queue.waits_for(),
            unasked=queue.unasked,
        )
    attempts = newest.attempts
    unseen = {a.info.host for a in attempts if a.alive is None and a.info is not None}
    named = ", ".join(sorted(unseen)[:_NAMED])
    more = f" and {len(unseen) - _NAMED:,} more" if len(unseen) > _NAMED else ""
    ended = {(job.array, job.submitted_at) for job in newest.jobs if job.has_ended}
    drives = [
        submitter_runs(job) for job in newest.jobs if (job.array, job.submitted_at) not in ended
    ]
    return Life(
        waiting=any(drives) or (None in drives and not attempts),
        unasked=f"whether processes on {named}{more} still run" if unseen else "",
    )


def ask_queue(run: RunDir, round_: int) -> Queue:
    """Ask for the round's jobs by name, as an sbatch whose answer was lost left no record."""
    array, merges = array_name(run, round_), [merge_name(run, round_), twin_name(run, round_)]
    planners = [merge_name(run, round_ - 1), twin_name(run, round_ - 1)] if round_ else []
    try:
        entries = slurm.queue(
            name=",".join([array, *merges, *planners]),
            user=os.stat(run.path).st_uid,
            timeout_s=_SQUEUE_TIMEOUT_S,
        )
    except SlurmUnreachableError as error:
        complaint = error.fields.get("stderr", error)
        return Queue(unasked=f"Slurm's queue; Slurm did not answer: {complaint}")
    except HpcResumeError as error:
        return Queue(unasked=f"Slurm's queue: {error}")
    to_come = [entry for entry in entries if not (entry.ended or entry.waits_in_vain)]
    return Queue(
        tasks=[entry for entry in to_come if entry.name == array],
        merges=[entry for entry in to_come if entry.name in merges],
        planners=[entry for entry in to_come if entry.name in planners],
    )


def _running_jobs(queue: Queue) -> set[str | int | None]:
    """Return the ids of the array's jobs that have left the waiting line, and their tasks."""
    started = [entry for entry in queue.tasks if entry.state != "PENDING"]
    return {key for entry in started for key in (str(entry.job_id), entry.array_task)}


def _is_alive(
    attempt: AttemptFiles, queue: Queue | None, started: set[str | int | None] | None
) -> bool | None:
    if queue is None:
        gone = is_gone(attempt.info) if attempt.info is not None else True
        return None if gone is None else not gone
    if started is None:
        return None
    job = attempt.info.job_id if attempt.info is not None else None
    return job in started if job else bool({attempt.ref.task, None} & started)
