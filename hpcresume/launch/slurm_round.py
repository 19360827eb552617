"""A round on Slurm: a job array for each request, the merge job after them, and its twin.

Which array owns a round's tasks: its jobs have a name of their own, which is looked up before
a second sbatch, as a call that timed out may still take effect.  Where the look-up was blind,
the first array to start claims its tasks, and elements of any other end at once.

A merge job may therefore follow an array that has lost its round.  It sees the other at
work, and leaves only when another merge job waits in the queue: so as long as an array of
the round works, some merge job is still to run, whoever submitted what.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from hpcresume import slurm
from hpcresume.config import Request, Resolved
from hpcresume.errors import SlurmRefusedError, SlurmUnreachableError
from hpcresume.failpoints import failpoint
from hpcresume.launch.ladder import Ladder, make_ladder
from hpcresume.launch.packing import has_twin
from hpcresume.launch.rendering import ArrayJob, MergeJob, render_array
from hpcresume.merge.plan import (
    ArrayPlan,
    Launch,
    Plan,
    array_name,
    merge_name,
    share,
    twin_name,
)
from hpcresume.run.directory import CLOSED, JobRecord, RunDir
from hpcresume.task.allocation import CLAIM_VARIABLE
from hpcresume.task.supervisor import run_element

_STEP_OUT_OF_MEMORY = "0:125"


def make_array_jobs(run: RunDir, plan: Plan, resolved: Resolved) -> list[ArrayJob]:
    """Return the job arrays of a plan, in the order of their tasks."""
    arrays, throttle = plan.arrays, plan.footer.launch.throttle
    sizes = [array.tasks for array in arrays]
    throttles = share(throttle, sizes) if throttle else [0 for _ in arrays]
    return [
        _array_job(run, plan.footer.round, plan.footer.launch, array, resolved, throttle=most)
        for array, most in zip(arrays, throttles, strict=True)
    ]


def _array_job(
    run: RunDir,
    round_: int,
    launch: Launch,
    array: ArrayPlan,
    resolved: Resolved,
    *,
    throttle: int = 0,
) -> ArrayJob:
    folder = f"submit-{array.first:05d}" if array.first else "submit"
    return ArrayJob(
        name=array_name(run, round_),
        run_dir=Path(run.path),
        folder=Path(run.round_path(round_, folder)),
        log_dir=Path(run.logs_path(round_)),
        tasks=array.tasks,
        first=array.first,
        throttle=throttle,
        request=_request(resolved.settings.request, array.memory_mib),
        environment={"PYTHONDONTWRITEBYTECODE": "1"},
        chdir=launch.cwd,
    )


def _request(request: Request, memory_mib: int) -> Request:
    """Return the run's request, with more memory where an array asks for more."""
    if not memory_mib:
        return request
    # Slurm takes one of these options only.
    other = ("--mem=", "--mem-per-cpu=", "--mem-per-gpu=")
    extra = [option for option in request.extra if not option.startswith(other)]
    return msgspec.structs.replace(request, mem=f"{memory_mib}M", extra=extra)


def slurm_ladder(run: RunDir, launch: Launch, resolved: Resolved) -> Ladder:
    """Return how much memory the sources of a run are given after how much.

    What the site does not say is asked of the live Slurm, with the very script that would be
    submitted.
    """

    def takes(memory_mib: int) -> bool:
        job = _array_job(run, 0, launch, ArrayPlan(0, 1, memory_mib), resolved)
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder) / "job.sh"
            script.write_bytes(os.fsencode(render_array(job, resolved)))
            try:
                slurm.would_accept(script=script)
            except SlurmRefusedError:
                return False
        return True

    def is_granted(memory_mib: int) -> bool:
        # Where all nodes are down Slurm takes nothing now, which says nothing of memory.
        return takes(memory_mib) or not takes(0)

    return make_ladder(resolved.settings, is_granted)


def make_merge_job(run: RunDir, plan: Plan, dependency: str, *, twin: bool = False) -> MergeJob:
    """Return the merge job that follows a job."""
    name = twin_name if twin else merge_name
    return MergeJob(
        name=name(run, plan.footer.round),
        run_dir=Path(run.path),
        log_dir=Path(run.logs_path(plan.footer.round)),
        dependency=dependency,
        environment={"PYTHONDONTWRITEBYTECODE": "1"},
        chdir=plan.footer.launch.cwd,
    )


def active_jobs(run: RunDir, round_: int) -> list[slurm.QueueEntry]:
    """Return the elements of a round's array that Slurm has not ended.

    Raises:
        SlurmUnreachableError: The controller does not answer, so nobody knows.
    """
    return [entry for entry in slurm.queue(name=array_name(run, round_)) if not entry.ended]


def submit_round(run: RunDir, plan: Plan, resolved: Resolved) -> JobRecord:
    """Submit a round's arrays and merge jobs, or take up what was submitted before.

    Where jobs may not submit jobs there is no merge job: `hpcresume drive` does its work.

    Raises:
        SlurmUnreachableError: The controller does not answer.  Submitting again is safe.
        SlurmRefusedError: Slurm refused a job.
    """
    known = active_jobs(run, plan.footer.round)
    if known:
        return take_up(run, plan, resolved, known)
    with _in_doubt(f"The array of round {plan.footer.round}"):
        jobs = _submit_tasks(run, plan, resolved, make_array_jobs(run, plan, resolved))
    failpoint("round.after_array")
    return _follow(run, plan, resolved, jobs)


@contextlib.contextmanager
def _in_doubt(what: str) -> Iterator[None]:
    """Say of an answer that did not come what may have happened, and what to do."""
    try:
        yield
    except SlurmUnreachableError as error:
        raise SlurmUnreachableError(
            f"{what} may or may not be submitted. {error.fields.get('stderr', error)}. "
            "Run the same command again: it looks for what is there before it submits more.",
            **error.fields,
        ) from error


def take_up(
    run: RunDir, plan: Plan, resolved: Resolved, active: list[slurm.QueueEntry]
) -> JobRecord:
    """See to it that all arrays of a round are submitted, and that a merge job follows them.

    Args:
        run: The run.
        plan: The round's plan.
        resolved: Settings of the run.
        active: The elements in the queue, at least one.

    Raises:
        SlurmUnreachableError: The controller does not answer.  Doing it again is safe.
        SlurmRefusedError: Slurm refused a job.
    """
    jobs = sorted({entry.array_job_id for entry in active}, key=int)
    missing = _missing_arrays(run, plan, resolved, active)
    with _in_doubt(f"Another array of round {plan.footer.round}"):
        jobs += _submit_tasks(run, plan, resolved, missing)
    return _follow(run, plan, resolved, jobs)


def _missing_arrays(
    run: RunDir, plan: Plan, resolved: Resolved, active: list[slurm.QueueEntry]
) -> list[ArrayJob]:
    """Return the arrays that whoever submitted the others died before submitting."""
    round_, arrays = plan.footer.round, make_array_jobs(run, plan, resolved)
    records = [record.array.split(",") for record in run.job_records(round_)]
    # Without arrays the jobs do not tell which tasks they are of.
    if not resolved.settings.site.arrays or any(len(jobs) >= len(arrays) for jobs in records):
        return []
    queued = {entry.array_task for entry in active}
    return [
        job
        for job in arrays
        if queued.isdisjoint(range(job.first, job.first + job.tasks))
        and run.round_owner(round_, first=job.first) is None
    ]


def close_round(run: RunDir, plan: Plan) -> None:
    """Claim what nobody has claimed of a round: an array that appears late ends at once.

    A lost sbatch may take effect after its round has been dealt anew.
    """
    for array in plan.arrays:
        run.claim_round(plan.footer.round, CLOSED, first=array.first)


def _submit_tasks(run: RunDir, plan: Plan, resolved: Resolved, arrays: list[ArrayJob]) -> list[str]:
    """Submit job arrays, or single jobs where the site has no arrays; return the ids."""
    from hpcresume.launch import submitit_executor

    elements = arrays
    if not resolved.settings.site.arrays:
        # Single jobs have no array id in common, so the submission names itself.
        claim = {CLAIM_VARIABLE: secrets.token_hex(8)}
        elements = [single for array in arrays for single in _single_jobs(array, claim)]
    return [
        submitit_executor.submit_round(
            job, resolved, function=run_element, argument=f"{plan.footer.round} {run.path}"
        )
        for job in elements
    ]


def _single_jobs(array: ArrayJob, claim: dict[str, str]) -> list[ArrayJob]:
    return [
        dataclasses.replace(
            array,
            tasks=1,
            index=task,
            environment={**array.environment, **claim},
            folder=array.folder / str(task),
        )
        for task in range(array.first, array.first + array.tasks)
    ]


def starved_tasks(run: RunDir, round_: int) -> list[int]:
    """Return the array tasks of an ended round that the kernel ended whole for want of memory.

    They are those that could not say how they ended.  A job's own state does not tell, since
    its batch script outlives the step; the step's exit code does.
    """
    silent: dict[str, int] = {}
    for task in run.tasks(round_):
        attempts = run.attempts(round_, task)
        info = run.attempt_info(attempts[-1]) if attempts else None
        if info is not None and info.job_id and run.outcome(attempts[-1]) is None:
            silent[info.job_id] = task
    jobs = sorted({job_id.partition("_")[0] for job_id in silent})
    shown = [info for job in jobs for info in slurm.show_job(job, details=True)]
    return [
        silent[info.job_id]
        for info in shown
        if info.job_id in silent and info.step_exit_code == _STEP_OUT_OF_MEMORY
    ]


def nodes_without_attempt(run: RunDir, round_: int) -> set[str]:
    """Return the nodes on which an element of a round failed before it had made an attempt.

    The run directory may not be mounted there, or Python not start.
    """
    begun = set(run.tasks(round_))
    return {
        entry.node
        for entry in slurm.queue(name=array_name(run, round_))
        if entry.state == "FAILED"
        and entry.node is not None
        and entry.array_task is not None
        and entry.array_task not in begun
    }


def _follow(run: RunDir, plan: Plan, resolved: Resolved, arrays: list[str]) -> JobRecord:
    """Submit the merge job and its twin where none waits; record what there is."""
    round_, merge, twin = plan.footer.round, "", ""
    try:
        if resolved.settings.site.submit_from_compute:
            with _in_doubt(f"Job {','.join(arrays)} is submitted; the merge job after it"):
                waiting = _waiting_merges(run, plan)
                merge = _find(waiting, merge_name(run, round_)) or _submit_merge(
                    run, plan, resolved, "afterany:" + ":".join(arrays)
                )
                failpoint("round.after_merge")
                if has_twin(resolved.settings.site):
                    # That of another merge job ends without having run if that one succeeds.
                    twins = [entry for entry in waiting if entry.waits_for(merge)]
                    twin = _find(twins, twin_name(run, round_)) or _submit_merge(
                        run, plan, resolved, f"afternotok:{merge}", twin=True
                    )
                    failpoint("round.after_twin")
    finally:
        record = _record(run, plan, arrays, merge, twin)
    return record


def _waiting_merges(run: RunDir, plan: Plan) -> list[slurm.QueueEntry]:
    """Return the merge jobs and twins that are still to run; one that runs may be past looking."""
    round_ = plan.footer.round
    names = f"{merge_name(run, round_)},{twin_name(run, round_)}"
    return [
        entry
        for entry in slurm.queue(name=names)
        if entry.state == "PENDING" and not entry.waits_in_vain
    ]


def _find(entries: list[slurm.QueueEntry], name: str) -> str:
    return next((entry.job_id for entry in entries if entry.name == name), "")


def _submit_merge(
    run: RunDir, plan: Plan, resolved: Resolved, dependency: str, *, twin: bool = False
) -> str:
    from hpcresume.launch import submitit_executor

    job = make_merge_job(run, plan, dependency, twin=twin)
    folder = Path(run.round_path(plan.footer.round, "submit"))
    script = folder / f"{'twin' if twin else 'merge'}-{secrets.token_hex(4)}.sh"
    return submitit_executor.submit_merge(job, resolved, script=script)


def _record(run: RunDir, plan: Plan, arrays: list[str], merge: str, twin: str) -> JobRecord:
    """Write down what was submitted, unless it stands there already."""
    round_ = plan.footer.round
    record = JobRecord(
        cluster="slurm",
        array=",".join(arrays),
        merge=merge,
        twin=twin,
        job_name=array_name(run, round_),
        tasks=plan.footer.tasks,
        submitted_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    known = {(job.array, job.merge, job.twin) for job in run.job_records(round_)}
    name = f"slurm-{arrays[0]}-{secrets.token_hex(4)}.json"
    if (record.array, record.merge, record.twin) not in known:
        run.write_record(run.round_path(round_, "jobs", name), record, label="jobs")
    return record
