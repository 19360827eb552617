"""Stopping a run on Slurm: the stop mark first, then its jobs, wherever they are.

Who submits a round looks at the mark before and after.  So of a `cancel` and a submission at
one moment, either the one finds the jobs in the queue, or the other finds the mark; and jobs
that escape both, since their submitter died, read the mark at their start and end.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from hpcresume import slurm
from hpcresume.errors import SlurmUnreachableError
from hpcresume.merge.plan import array_name, open_plan
from hpcresume.observe.liveness import is_here, is_running
from hpcresume.run.directory import JobRecord, RunDir, check_owner

_LOOK_AGAIN_S = 0.5
_MERGE_END_S = 60.0


@dataclass(frozen=True)
class Stopped:
    """What was asked to end: ids of Slurm jobs, and of processes of this machine."""

    jobs: list[str]
    processes: list[int]


def stop_run(run: RunDir) -> Stopped:
    """Stop a run: its tasks publish what they committed and end.

    Raises:
        RunDirError: It belongs to somebody else.
        SlurmUnreachableError: The stop mark is set, but its jobs are still in the queue.
    """
    check_owner(run.path)
    # First the mark: a task that ends now reads it before it would requeue itself.
    run.set_mark("stop")
    return Stopped(_cancel_jobs(run), _stop_processes(run))


def _cancel_jobs(run: RunDir) -> list[str]:
    clusters = {open_plan(run, number).footer.launch.cluster for number in run.rounds()}
    if "slurm" not in clusters:
        return []
    try:
        return cancel_run(run)
    except SlurmUnreachableError as error:
        raise SlurmUnreachableError(
            f"{error} The stop mark is set all the same: no task of this run starts to work "
            "or requeues itself. Run the same command again to take its jobs out of the queue.",
            **error.fields,
        ) from error


def _stop_processes(run: RunDir) -> list[int]:
    stopped = []
    for ref in run.all_attempts():
        info = run.attempt_info(ref)
        if info is None or info.array_job_id or run.outcome(ref) is not None:
            continue
        if is_here(info) and is_running(info):
            try:
                os.kill(info.pid, signal.SIGTERM)
            except ProcessLookupError:
                continue
            stopped.append(info.pid)
    return stopped


def cancel_run(run: RunDir) -> list[str]:
    """Cancel every job of a run that holds a stop mark; return the ids of these jobs.

    Jobs are found by their names, since one whose sbatch got no answer is in no record.  A
    merge job may be submitting the next round at this moment, so where one runs, the queue is
    looked at again until it is gone.

    Raises:
        SlurmUnreachableError: The controller does not answer.
        SlurmRefusedError: Slurm refused.
    """
    asked: list[str] = []
    deadline = time.monotonic() + _MERGE_END_S
    while True:
        active = _active_jobs(run)
        merging = [entry for entry in active if entry.name.endswith(("-merge", "-twin"))]
        # The merge jobs first: the end of the array would start them.
        jobs = dict.fromkeys(entry.array_job_id for entry in [*merging, *active])
        fresh = [job for job in jobs if job not in asked]
        slurm.cancel(fresh)
        asked += fresh
        if not any(entry.state != "PENDING" for entry in merging) or time.monotonic() > deadline:
            return asked
        time.sleep(_LOOK_AGAIN_S)


def _active_jobs(run: RunDir) -> list[slurm.QueueEntry]:
    """Return the jobs of every round of a run that Slurm has not ended."""
    prefix = array_name(run, 0).removesuffix("0")
    return [e for e in slurm.queue() if e.name.startswith(prefix) and not e.ended]


def unless_stopped(run: RunDir, submit: Callable[[], JobRecord]) -> JobRecord | None:
    """Submit jobs of a run, unless it holds a stop mark.

    Returns:
        What was submitted; None where there is a stop mark, and then nothing of it is left in
        the queue.
    """
    if run.stop_requested():
        return None
    record = submit()
    if run.stop_requested():
        slurm.cancel(job for job in [record.merge, record.twin, *record.array.split(",")] if job)
        return None
    return record
