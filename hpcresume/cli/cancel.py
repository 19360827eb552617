"""``hpcresume cancel``: stop a run."""

from __future__ import annotations

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
    from hpcresume.launch.stopping import stop_run

    stopped = stop_run(run)
    jobs, processes = stopped.jobs, stopped.processes
    if as_json:
        emit_json({"run": run.path, "jobs": jobs, "processes": processes})
        return
    what = [human_count(len(jobs), "Slurm job")] if jobs else []
    what += [human_count(len(processes), "local task")] if processes else []
    say(f"{run.path}: marked as stopped; asked {' and '.join(what) or 'nobody'} to end.")
    say(f"To go on with it: hpcresume submit {run.path}", err=True)
