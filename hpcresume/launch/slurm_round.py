"""A round on Slurm: one job array, the merge job after it, and that one's twin.

Which array owns a round: its job has a name of its own, which is looked up before a second
sbatch, as a call that timed out may still take effect.  Where the look-up was blind, the
first array to start claims the round, and elements of any other end at once.
"""

from __future__ import annotations

import dataclasses
import secrets
from datetime import UTC, datetime
from pathlib import Path

from hpcresume import slurm
from hpcresume.config import Resolved
from hpcresume.errors import SlurmUnreachableError
from hpcresume.launch.rendering import ArrayJob, MergeJob
from hpcresume.merge.plan import Plan
from hpcresume.run.directory import JobRecord, RunDir
from hpcresume.task.allocation import CLAIM_VARIABLE
from hpcresume.task.supervisor import run_element


def job_name(run: RunDir, round_: int) -> str:
    """Return the name of a round's job array, unique to run and round."""
    return f"hpcresume-{run.run_id}-{round_}"


def make_array_job(run: RunDir, plan: Plan) -> ArrayJob:
    """Return the job array of a plan."""
    footer = plan.footer
    return ArrayJob(
        name=job_name(run, footer.round),
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
    suffix = "twin" if twin else "merge"
    return MergeJob(
        name=f"{job_name(run, plan.footer.round)}-{suffix}",
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
    return [entry for entry in slurm.queue(name=job_name(run, round_)) if not entry.ended]


def submit_round(run: RunDir, plan: Plan, resolved: Resolved) -> JobRecord:
    """Submit a round's array and merge jobs, or take up what was submitted before.

    Where jobs may not submit jobs there is no merge job: `hpcresume drive` does its work.

    Raises:
        SlurmUnreachableError: The controller does not answer.  Submitting again is safe.
        SlurmRefusedError: Slurm refused a job.
    """
    footer = plan.footer
    known = active_jobs(run, footer.round)
    if known:
        jobs = sorted({entry.array_job_id for entry in known})
    else:
        try:
            jobs = _submit_tasks(run, plan, resolved)
        except SlurmUnreachableError as error:
            raise SlurmUnreachableError(
                f"{error} The array of round {footer.round} may or may not be submitted. "
                "Run the same command again: it looks for the array before submitting another.",
                **error.fields,
            ) from error
    merge = twin = ""
    if resolved.settings.site.submit_from_compute:
        merge = _follow(run, plan, resolved, "afterany:" + ":".join(jobs))
        twin = _follow(run, plan, resolved, f"afternotok:{merge}", twin=True)
    record = JobRecord(
        cluster="slurm",
        array=",".join(jobs),
        merge=merge,
        twin=twin,
        job_name=job_name(run, footer.round),
        tasks=footer.tasks,
        submitted_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    name = f"slurm-{jobs[0]}-{secrets.token_hex(4)}.json"
    run.write_record(run.round_path(footer.round, "jobs", name), record, label="jobs")
    return record


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


def _follow(
    run: RunDir, plan: Plan, resolved: Resolved, dependency: str, *, twin: bool = False
) -> str:
    from hpcresume.launch import submitit_executor

    job = make_merge_job(run, plan, dependency, twin=twin)
    # One that runs may have decided already, before what it should have seen.
    known = [entry for entry in slurm.queue(name=job.name) if entry.state == "PENDING"]
    if known:
        return known[0].job_id
    folder = Path(run.round_path(plan.footer.round, "submit"))
    script = folder / f"{'twin' if twin else 'merge'}-{secrets.token_hex(4)}.sh"
    return submitit_executor.submit_merge(job, resolved, script=script)
