"""A round on Slurm: one job array, the merge job after it, and that one's twin.

Which array owns a round: its job has a name of its own, which is looked up before a second
sbatch, as a call that timed out may still take effect.  Where the look-up was blind, the
first array to start claims the round, and elements of any other end at once.
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from pathlib import Path

from hpcresume import slurm
from hpcresume.config import Resolved
from hpcresume.errors import ConfigError, SlurmUnreachableError
from hpcresume.launch.rendering import ArrayJob, MergeJob
from hpcresume.merge.plan import Plan
from hpcresume.run.directory import JobRecord, RunDir
from hpcresume.task.supervisor import run_element

_ENDED = frozenset(
    {
        "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL",
        "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT",
    }
)  # fmt: skip


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
    name = job_name(run, round_)
    return [entry for entry in slurm.queue(name=name) if entry.state.split(" ")[0] not in _ENDED]


def check_submittable(run: RunDir, resolved: Resolved, tasks: int) -> None:
    """Refuse a round that the site cannot take, before anything is submitted.

    Raises:
        ConfigError: The array is longer than the site allows.
    """
    site = resolved.settings.site
    if site.arrays and tasks > site.max_array_size:
        raise ConfigError(
            f"{run.path}: {tasks} array tasks, but {site.name} takes indices below "
            f"{site.max_array_size}. Give a smaller --array.",
            tasks=tasks,
        )


def submit_round(run: RunDir, plan: Plan, resolved: Resolved) -> JobRecord:
    """Submit a round's array and merge jobs, or take up what was submitted before.

    Raises:
        SlurmUnreachableError: The controller does not answer.  Submitting again is safe.
        SlurmRefusedError: Slurm refused a job.
    """
    from hpcresume.launch import submitit_executor

    footer = plan.footer
    check_submittable(run, resolved, footer.tasks)
    known = active_jobs(run, footer.round)
    if known:
        array = known[0].array_job_id
    else:
        try:
            array = submitit_executor.submit_round(
                make_array_job(run, plan),
                resolved,
                function=run_element,
                argument=f"{footer.round} {run.path}",
            )
        except SlurmUnreachableError as error:
            raise SlurmUnreachableError(
                f"{error} The array of round {footer.round} may or may not be submitted. "
                "Run the same command again: it looks for the array before submitting another.",
                **error.fields,
            ) from error
    merge = _follow(run, plan, resolved, f"afterany:{array}")
    twin = _follow(run, plan, resolved, f"afternotok:{merge}", twin=True)
    record = JobRecord(
        cluster="slurm",
        array=array,
        merge=merge,
        twin=twin,
        job_name=job_name(run, footer.round),
        tasks=footer.tasks,
        submitted_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    name = f"slurm-{array}-{secrets.token_hex(4)}.json"
    run.write_record(run.round_path(footer.round, "jobs", name), record, label="jobs")
    return record


def _follow(
    run: RunDir, plan: Plan, resolved: Resolved, dependency: str, *, twin: bool = False
) -> str:
    from hpcresume.launch import submitit_executor

    job = make_merge_job(run, plan, dependency, twin=twin)
    known = [
        entry for entry in slurm.queue(name=job.name) if entry.state.split(" ")[0] not in _ENDED
    ]
    if known:
        return known[0].job_id
    folder = Path(run.round_path(plan.footer.round, "submit"))
    script = folder / f"{'twin' if twin else 'merge'}-{secrets.token_hex(4)}.sh"
    return submitit_executor.submit_merge(job, resolved, script=script)
