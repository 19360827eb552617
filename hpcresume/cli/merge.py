"""``hpcresume merge``: unite what the tasks of a run completed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from hpcresume.cli.common import (
    emit_json,
    finish,
    human_count,
    human_duration,
    json_option,
    run_argument,
    say,
)
from hpcresume.errors import SlurmUnreachableError

if TYPE_CHECKING:
    from hpcresume.launch.step import Step
    from hpcresume.run.directory import RunDir

# Every user of the cluster may be waiting for the same controller.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 60.0


@click.command()
@run_argument()
@click.option("--requeue", is_flag=True, help="Submit what is left as the next round on Slurm.")
@click.option(
    "--patience",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="S",
    help="With --requeue: go on asking a Slurm that does not answer for S seconds.",
)
@json_option
def merge(run: RunDir, requeue: bool, patience: float, as_json: bool) -> None:
    """Unite what RUN's tasks published; with --requeue submit the rest as the next round.

    This is what the merge job runs.  It may be killed anywhere, run twice at once, and run
    while the tasks work: then it submits no tasks.

    \b
    Example:
      hpcresume merge runs/paragraphs-1f2e3d4c
      hpcresume merge runs/paragraphs-1f2e3d4c --requeue
    """
    evaluation = _is_evaluation(run)
    if evaluation and requeue:
        _stop_failed(run)
    step = _requeue(run, patience_s=patience) if requeue else _unite(run)
    union, remainder = step.standing.union, step.standing.remainder
    line = (
        f"generation {union.number}: {human_count(len(union.completed), 'source')} completed, "
        f"{len(union.quarantined()):,} quarantined, {len(remainder):,} left"
    )
    say(line, err=as_json)
    for text in union.bad.values():
        say(f"set aside: {text}", err=True)
    for note in step.notes:
        say(f"packed: {note}", err=True)
    if union.withheld:
        say(
            f"{human_count(len(union.withheld), 'source')} of cancelled array tasks stay out; "
            f"to go on with them: hpcresume submit {run.path}",
            err=True,
        )
    if step.job is not None:
        verb = "is still at work; no tasks were submitted" if step.state == "running" else ""
        after = f"merge {step.job.merge} follows" if step.job.merge else ""
        parts = [f"round {step.round}: array {step.job.array} {verb}".rstrip(), after]
        say(", ".join(filter(None, parts)), err=as_json)
    if step.state == "cancelled":
        say(f"cancelled; to go on with it: hpcresume submit {run.path}", err=True)
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
    if evaluation:
        _write_evaluation(run, step)
    finish(0)


def _is_evaluation(run: RunDir) -> bool:
    from hpcresume.evals.layout import is_evaluation

    return is_evaluation(run)


def _stop_failed(run: RunDir) -> None:
    from hpcresume.evals.run import stop_where_too_many_failed

    why = stop_where_too_many_failed(run)
    if why:
        say(f"stopped: {why}", err=True)


def _write_evaluation(run: RunDir, step: Step) -> None:
    """Write what an evaluation's people read: rows, result, scores."""
    from hpcresume.cli.eval import say_summary
    from hpcresume.evals.run import after_merge

    written = after_merge(run, step.state)
    if written is not None:
        say_summary(run, written)


def _requeue(run: RunDir, *, patience_s: float) -> Step:
    """Do the merge step, again and again while Slurm does not answer and patience lasts."""
    from hpcresume.launch.drive import merge_step

    deadline, pause = time.monotonic() + patience_s, _FIRST_PAUSE_S
    while True:
        try:
            return merge_step(run)
        except SlurmUnreachableError as error:
            left = deadline - time.monotonic()
            if left <= 0:
                raise
            say(f"{error}\nTrying again for another {human_duration(left)}.", err=True)
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE_S)


def _unite(run: RunDir) -> Step:
    from hpcresume.launch.step import Step as MergeStep
    from hpcresume.launch.step import unite

    return MergeStep("merged", unite(run))
