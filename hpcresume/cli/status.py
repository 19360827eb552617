"""``hpcresume status``: what is done, left, failing and at risk."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpcresume.cli.common import (
    emit_json,
    exit_code_of,
    finish,
    human_count,
    human_duration,
    human_rate,
    json_option,
    run_argument,
    say,
)
from hpcresume.observe.words import human_share

if TYPE_CHECKING:
    from hpcresume.observe.status import Status
    from hpcresume.run.directory import RunDir

REDRAW_S = 2.0
LOG_LINE_S = 60.0
# Reading stops here and goes on at the next redraw, so that keys are answered.
BUDGET_S = 0.5
_MOST_TASKS = 20


@click.command()
@run_argument()
@click.option("--watch", is_flag=True, help="Go on until the run ends; exit with its code.")
@click.option(
    "--metrics",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write OpenMetrics text to a file, replaced at once; for a node exporter.",
)
@json_option
def status(run: RunDir, watch: bool, metrics: Path | None, as_json: bool) -> None:
    """Show how RUN stands: done, left, failing, at risk; per task and per stage.

    RUN defaults to the last run of this directory.  Exits with 1 if it ended incomplete,
    with 0 if it is complete or goes on.  On a terminal --watch is a live view with keys to
    sort, filter and scroll; elsewhere it prints a line a minute.

    \b
    Example:
      hpcresume status
      hpcresume status runs/paragraphs-1f2e3d4c --watch
      hpcresume status --json | jq .sources
      hpcresume status --metrics /var/lib/node_exporter/run.prom
    """
    from hpcresume.observe.status import read_status

    if watch:
        finish(_watch(run, metrics, as_json=as_json))
    found = read_status(run)
    _write_metrics(found, metrics)
    if as_json:
        emit_json(found.to_dict())
    else:
        say("\n".join(status_lines(found)))
    finish(exit_code_of(found.state) if found.ended else 0)


def _write_metrics(found: Status, path: Path | None) -> None:
    if path is not None:
        from hpcresume.observe.metrics import write_metrics

        write_metrics(found, path)


def _watch(run: RunDir, metrics: Path | None, *, as_json: bool) -> int:
    from hpcresume.observe.status import readings

    if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not as_json:
        return _watch_terminal(run, metrics)
    for found in readings(run, pause_s=REDRAW_S if as_json else LOG_LINE_S):
        _write_metrics(found, metrics)
        if as_json:
            emit_json(found.to_dict())
        else:
            say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {status_line(found)}")
        sys.stdout.flush()
    return exit_code_of(found.state)


def _watch_terminal(run: RunDir, metrics: Path | None) -> int:
    from hpcresume.cli.watch import watch_terminal
    from hpcresume.observe.status import readings

    def all_written() -> Iterator[Status]:
        # The view itself waits between two readings, for keys.
        for found in readings(run, pause_s=0.0, budget_s=BUDGET_S):
            _write_metrics(found, metrics)
            yield found

    found = watch_terminal(all_written(), pause_s=REDRAW_S)
    if found is None:
        say("left; the run goes on. To watch it again: hpcresume status --watch")
        return 0
    say("\n".join(status_lines(found)))
    return exit_code_of(found.state)


def status_line(found: Status) -> str:
    """Return how a run stands in one line."""
    sources = found.sources
    parts = [
        found.state,
        f"{sources.completed:,} of {human_count(sources.total, 'source')} done",
        f"{sources.failing:,} failing",
        f"{sources.quarantined:,} quarantined",
        f"{sources.at_risk:,} at risk",
    ]
    if found.rate_per_s is not None:
        parts.append(f"{human_rate(found.rate_per_s)}, {human_duration(found.eta_s)} left")
    return ", ".join(parts) + (f" ({found.reason})" if found.reason else "")


def status_lines(found: Status) -> list[str]:
    """Return how a run stands as lines for people."""
    lines = [
        f"{found.name}: {found.state}" + (f" ({found.reason})" if found.reason else ""),
        f"  {found.run}",
        *_source_lines(found),
        *_task_lines(found),
        *_stage_lines(found),
    ]
    if found.unasked:
        lines.append(f"not asked: {found.unasked}")
    return lines


def _source_lines(found: Status) -> list[str]:
    sources = found.sources
    share = human_share(sources.completed, sources.total)
    done = f"{sources.completed:,} of {sources.total:,} completed ({share})"
    quarantined = f"{sources.quarantined:,} quarantined ({found.tolerated:,} tolerated)"
    lines = [
        f"sources   {done}, {sources.remaining:,} remaining",
        f"          {sources.failing:,} failing, {quarantined}, {sources.at_risk:,} at risk",
    ]
    if found.rate_per_s is not None:
        eta = human_duration(found.eta_s)
        lines.append(f"rate      {human_rate(found.rate_per_s)}, about {eta} left")
    return lines


def _task_lines(found: Status) -> list[str]:
    if not found.rounds:
        return []
    newest = found.rounds[-1]
    tasks = [task for task in found.tasks if task.round == newest.round]
    by_state = ", ".join(
        f"{sum(task.state == state for task in tasks):,} {state}"
        for state in dict.fromkeys(task.state for task in tasks)
    )
    job = f", job {newest.job_id}" if newest.job_id else ""
    lines = [f"round {newest.round:<3} {human_count(newest.tasks, 'task')}{job}: {by_state}"]
    rows = [
        (str(t.task), str(t.attempt), t.state, t.host, f"{t.completed:,}", f"{t.in_flight:,}")
        for t in sorted(tasks, key=lambda t: t.state != "running")
        if t.attempt
    ]
    head = ("task", "attempt", "state", "host", "completed", "in flight")
    lines += table(head, rows[:_MOST_TASKS])
    if len(rows) > _MOST_TASKS:
        lines.append(f"  and {len(rows) - _MOST_TASKS:,} more; all of them: --json")
    return lines


def _stage_lines(found: Status) -> list[str]:
    head = ("stage", "in", "out", "dropped", "failed", "seconds")
    rows = [
        (
            stage.name,
            f"{stage.items_in:,}",
            f"{stage.items_out:,}",
            f"{stage.dropped:,}",
            f"{stage.failed:,}",
            f"{stage.seconds:,.1f}",
        )
        for stage in found.stages
    ]
    return table(head, rows)


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return aligned lines, indented by two; none where there are no rows."""
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = (
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        for row in (head, *rows)
    )
    return [f"  {line.rstrip()}" for line in lines]
