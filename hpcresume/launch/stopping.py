"""Stopping a run on Slurm: the stop mark first, then its jobs, wherever they are.

Who submits a round looks at the mark before and after.  So of a `cancel` and a submission at
one moment, either the one finds the jobs in the queue, or the other finds the mark; and jobs
that escape both, since their submitter died, read the mark at their start and end.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from hpcresume import slurm
from hpcresume.merge.plan import array_name
from hpcresume.run.directory import JobRecord, RunDir

_LOOK_AGAIN_S = 0.5
_MERGE_END_S = 60.0


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
