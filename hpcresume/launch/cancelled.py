"""Which array tasks of a round somebody cancelled: their shards wait for the user.

squeue knows how an element ended for some minutes (Slurm's MinJobAge).  A merge job that waited
longer than that asks the accounting once, and where there is none goes by what the attempt
itself saw.  An element that was cancelled before it ever ran is forgotten at once, by both.
"""

from __future__ import annotations

import logging
import re

from pyroaring import BitMap

from hpcresume import slurm
from hpcresume.errors import HpcResumeError
from hpcresume.fs import list_names
from hpcresume.merge.plan import Plan, array_name
from hpcresume.run.directory import RunDir

log = logging.getLogger(__name__)
_LOG = re.compile(r"\d+_(\d+)\.out")
_CANCELLED, _UNKNOWN = "CANCELLED", "UNKNOWN"


def cancelled_tasks(run: RunDir, plan: Plan, remainder: BitMap) -> list[int]:
    """Return the array tasks of an ended round that were cancelled and still owe sources.

    Raises:
        SlurmUnreachableError: The controller does not answer.
    """
    owing = [t for t in range(plan.footer.tasks) if plan.shard(t).bitmap() & remainder]
    if not owing:
        return []
    ended = _ask_queue(run, plan)
    forgotten = [task for task in owing if task not in ended]
    if forgotten:
        ended |= _recall(run, plan, forgotten)
    return [task for task in owing if ended[task] == _CANCELLED]


def _ask_queue(run: RunDir, plan: Plan) -> dict[int, str]:
    """Return how array tasks ended, as far as squeue remembers."""
    round_ = plan.footer.round
    single = _single_jobs(run, plan)
    entries = slurm.queue(name=array_name(run, round_))
    present = {entry.array_job_id for entry in entries}
    owners = {array.first: run.round_owner(round_, first=array.first) for array in plan.arrays}
    states = {}
    for entry in entries:
        task = single.get(entry.job_id, entry.array_task)
        if task is None:
            continue
        # Of two arrays for the same tasks only the one that claimed them has worked on them.
        owner = owners[plan.array_of(task).first]
        if owner not in present or entry.array_job_id == owner:
            states[task] = entry.state.split(" ")[0]
    return states


def _single_jobs(run: RunDir, plan: Plan) -> dict[str, int]:
    """Return the array task of each job, where the site has no arrays."""
    for record in run.job_records(plan.footer.round):
        jobs = record.array.split(",")
        if len(jobs) == plan.footer.tasks > 1:
            return {job: task for task, job in enumerate(jobs)}
    return {}


def _recall(run: RunDir, plan: Plan, tasks: list[int]) -> dict[int, str]:
    """Return how array tasks ended that squeue does not remember."""
    known = _ask_accounting(run, plan)
    return {task: known.get(task) or _tell_by_files(run, plan, task) for task in tasks}


def _ask_accounting(run: RunDir, plan: Plan) -> dict[int, str]:
    single = _single_jobs(run, plan)
    arrays = sorted({record.array for record in run.job_records(plan.footer.round)} - {""})
    if not arrays:
        return {}
    try:
        entries = slurm.accounting(",".join(arrays))
    except HpcResumeError as error:
        log.warning("how array tasks ended is told by their own files: %s", error)
        return {}
    states = {}
    for entry in entries:  # a requeued element has several, oldest first
        index = entry.job_id.rpartition("_")[2]
        task = single.get(entry.job_id, int(index) if index.isdigit() else None)
        if task is not None:
            states[task] = entry.state
    return states


def _tell_by_files(run: RunDir, plan: Plan, task: int) -> str:
    """Return how an array task ended that nobody remembers."""
    round_ = plan.footer.round
    attempts = run.attempts(round_, task)
    if attempts:
        outcome = run.outcome(attempts[-1])
        return _CANCELLED if outcome is not None and outcome.kind == "cancelled" else _UNKNOWN
    if not run.job_records(round_):
        return _UNKNOWN
    names = list_names(run.fs, run.logs_path(round_))
    logs = {int(match[1]) for name in names if (match := _LOG.fullmatch(name))}
    # Nothing but a cancellation ends an element that was never launched.
    return _UNKNOWN if task in logs else _CANCELLED
