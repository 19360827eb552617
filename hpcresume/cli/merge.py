"""``hpcresume merge``: unite what the tasks of a run completed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hpcresume.cli.common import emit_json, finish, human_count, json_option, run_argument, say

if TYPE_CHECKING:
    from hpcresume.launch.drive import Step
    from hpcresume.run.directory import RunDir


@click.command()
@run_argument()
@click.option("--requeue", is_flag=True, help="Submit what is left as the next round on Slurm.")
@json_option
def merge(run: RunDir, requeue: bool, as_json: bool) -> None:
    """Unite what RUN's tasks published; with --requeue submit the rest as the next round.

    This is what the merge job runs.  It may be killed anywhere and run twice at once.

    \b
    Example:
      hpcresume merge runs/paragraphs-1f2e3d4c
      hpcresume merge runs/paragraphs-1f2e3d4c --requeue
    """
    step = _step(run, requeue=requeue)
    union, remainder = step.standing.union, step.standing.remainder
    line = (
        f"generation {union.number}: {human_count(len(union.completed), 'source')} completed, "
        f"{len(union.quarantined()):,} quarantined, {len(remainder):,} left"
    )
    say(line, err=as_json)
    for text in union.bad.values():
        say(f"set aside: {text}", err=True)
    if union.withheld:
        say(
            f"{human_count(len(union.withheld), 'source')} of cancelled array tasks stay out; "
            f"to go on with them: hpcresume submit {run.path}",
            err=True,
        )
    if step.job is not None:
        say(f"round {step.round}: array {step.job.array}, merge {step.job.merge}", err=as_json)
    if union.stopped:
        say(f"stopped: {union.stopped}", err=True)
    if as_json:
        emit_json(
            {
                "state": step.state,
                "generation": union.number,
                "completed": len(union.completed),
                "quarantined": len(union.quarantined()),
                "remaining": len(remainder),
                "withheld": len(union.withheld),
                "round": step.round,
                "array": step.job.array if step.job else None,
            }
        )
    finish(0)


def _step(run: RunDir, *, requeue: bool) -> Step:
    from hpcresume.errors import RunDirError
    from hpcresume.launch.drive import Step as DriveStep
    from hpcresume.launch.drive import merge_step
    from hpcresume.launch.rounds import newest_plan, plan_settings, settle
    from hpcresume.run.manifest import Manifest

    if requeue:
        return merge_step(run)
    plan = newest_plan(run)
    if plan is None:
        raise RunDirError(
            f"{run.path} has no round yet. Nothing was submitted. Run: hpcresume submit PIPELINE",
            path=run.path,
        )
    return DriveStep("merged", settle(run, Manifest.open(run), plan_settings(plan)))
