"""A round on Slurm: one job array, the merge job after it, and that one's twin.

Which array owns a round: its job has a name of its own, which is looked up before a second
sbatch, as a call that timed out may still take effect.  Where the look-up was blind, the
first array to start claims the round, and elements of any other end at once.

A merge job may therefore follow an array that has lost its round.  It sees the other at
work, and leaves only when another merge job waits in the queue: so as long as an array of
the round works, some merge job is still to run, whoever submitted what.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from hpcresume import slurm
from hpcresume.config import Resolved
from hpcresume.errors import SlurmUnreachableError
from hpcresume.failpoints import failpoint
from hpcresume.launch.packing import has_twin
from hpcresume.launch.rendering import ArrayJob, MergeJob
from hpcresume.merge.plan import Plan, array_name, merge_name, twin_name
from hpcresume.run.directory import JobRecord, RunDir
from hpcresume.task.allocation import CLAIM_VARIABLE
from hpcresume.task.supervisor import run_element


def make_array_job(run: RunDir, plan: Plan) -> ArrayJob:
    """Return the job array of a plan."""
    footer = plan.footer
    return ArrayJob(
        name=array_name(run, footer.round),
        run_dir=Path(run.path),
        folder=Path(run.round_path(footer.round, "submit")),
        log_dir=Path(run.logs_path(footer.round)),
        tasks=footer.tasks,
        throttle=footer.launch.throttle,
        environment={"PYTHONDONTWRITEBYTECODE": "1"},
        chdir=footer.launch.cwd,
    )


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
    """Submit a round's array and merge jobs, or take up what was submitted before.

    Where jobs may not submit jobs there is no merge job: `hpcresume drive` does its work.

    Raises:
        SlurmUnreachableError: The controller does not answer.  Submitting again is safe.
        SlurmRefusedError: Slurm refused a job.
    """
    known = active_jobs(run, plan.footer.round)
    if known:
        return take_up(run, plan, resolved, known)
    with _in_doubt(f"The array of round {plan.footer.round}"):
        jobs = _submit_tasks(run, plan, resolved)
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
    """See to it that a merge job is to follow what is in the queue of a round.

    Args:
        run: The run.
        plan: The round's plan.
        resolved: Settings of the run.
        active: The elements in the queue, at least one.

    Raises:
        SlurmUnreachableError: The controller does not answer.  Doing it again is safe.
        SlurmRefusedError: Slurm refused a job.
    """
    return _follow(run, plan, resolved, sorted({entry.array_job_id for entry in active}, key=int))


def _submit_tasks(run: RunDir, plan: Plan, resolved: Resolved) -> list[str]:
    """Submit the round's array, or single jobs where the site has no arrays; return the ids."""
    from hpcresume.launch import submitit_executor

    array, round_ = make_array_job(run, plan), plan.footer.round
    if resolved.settings.site.arrays:
        elements = [array]
    else:
        # Single jobs have no array id in common, so the submission names itself.
        claim = {**array.environment, CLAIM_VARIABLE: secrets.token_hex(8)}
        elements = [
            dataclasses.replace(
                array, tasks=1, index=task, environment=claim, folder=array.folder / str(task)
            )
            for task in range(array.tasks)
        ]
    return [
        submitit_executor.submit_round(
            job, resolved, function=run_element, argument=f"{round_} {run.path}"
        )
        for job in elements
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
