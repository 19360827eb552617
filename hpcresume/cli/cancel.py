"""``hpcresume cancel``: stop a run."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import click

from hpcresume.cli.common import emit_json, human_count, json_option, run_argument, say

if TYPE_CHECKING:
    from hpcresume.run.directory import RunDir


@click.command()
@run_argument(required=True)
@json_option
def cancel(run: RunDir, as_json: bool) -> None:
    """Stop RUN: its tasks publish what they committed and end.

    The run stays; `hpcresume submit RUN` goes on with it.  Cancelling twice does no harm.

    \b
    Example:
      hpcresume cancel runs/paragraphs-1f2e3d4c
    """
    from hpcresume.run.directory import check_owner

    check_owner(run.path)
    # First the mark: a task that ends now reads it before it would requeue itself.
    run.set_mark("stop")
    jobs = _cancel_jobs(run)
    processes = _stop_processes(run)
    if as_json:
        emit_json({"run": run.path, "jobs": jobs, "processes": processes})
        return
    what = [human_count(len(jobs), "Slurm job")] if jobs else []
    what += [human_count(len(processes), "local task")] if processes else []
    say(f"{run.path}: marked as stopped; asked {' and '.join(what) or 'nobody'} to end.")
    say(f"To go on with it: hpcresume submit {run.path}", err=True)


def _cancel_jobs(run: RunDir) -> list[str]:
    from hpcresume.errors import SlurmUnreachableError
    from hpcresume.launch.stopping import cancel_run
    from hpcresume.merge.plan import open_plan

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
    from hpcresume.observe.liveness import is_here, is_running

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
