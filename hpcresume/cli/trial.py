"""``hpcresume trial``: run a sample of the sources here and write nothing."""

from __future__ import annotations

import contextlib
import json
import os
import pdb  # noqa: T100  # what --pdb opens
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, TextIO

import click

from hpcresume.cli.common import (
    emit_json,
    finish,
    human_bytes,
    human_count,
    human_duration,
    json_option,
    say,
)
from hpcresume.errors import EXIT_COMPLETE, EXIT_INCOMPLETE, UsageError

if TYPE_CHECKING:
    from hpcresume.config import Settings
    from hpcresume.launch.estimate import Estimate
    from hpcresume.launch.trial_report import TrialReport

_PROGRESS_S = 10.0


@click.command()
@click.argument("target", metavar="PIPELINE")
@click.option("-n", "count", type=int, default=10, show_default=True, help="Sources to run.")
@click.option("--source", "sources", multiple=True, metavar="ID", help="Run this source.")
@click.option("--pdb", "debug", is_flag=True, help="Debug the first exception; implies inline.")
@click.option(
    "--engine",
    type=click.Choice(["ray", "inline"]),
    help="ray: as array tasks run; inline: in this process.",
)
@click.option("-P", "param", multiple=True, metavar="KEY=VALUE", help="A parameter.")
@click.option(
    "--params",
    "params_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Parameters from a JSON or TOML file.",
)
@click.option("-t", "--time", "time_limit", help="Longest time limit that the estimate may use.")
@click.option("-c", "--cpus-per-task", type=int, help="Cores per array task to estimate for.")
@click.option("--site", help="Site whose limits the estimate keeps to.")
@json_option
def trial(
    target: str,
    *,
    count: int,
    sources: tuple[str, ...],
    debug: bool,
    engine: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Run a sample of PIPELINE's sources here, and estimate what all of them would cost.

    Nothing is written. Rows go to stdout as JSON lines, everything else to stderr.
    Exits 1 if more of the sample fails than the pipeline tolerates.

    \b
    Example:
      hpcresume trial pipeline.py
      hpcresume trial pipeline.py --source pages/17.html --pdb
      hpcresume trial pipeline.py -n 100 -t 4:00:00 --json
    """
    from hpcresume.cli.submit import parameters
    from hpcresume.launch.trial import run_trial
    from hpcresume.pipeline.load import load_pipeline, parse_target

    if debug and engine == "ray":
        raise UsageError(
            "--pdb cannot follow an exception into Ray's worker processes. "
            "The debugger opens in this one. Leave --engine ray out."
        )
    debugger = _Debugger() if debug else None
    params = parameters(given["param"], given["params_file"])
    with _stdout_kept_for_data():
        loaded = load_pipeline(parse_target(target, Path.cwd()), params)
        settings = _settings(target, loaded.pipeline, given)
        report = run_trial(
            loaded,
            settings=settings,
            sources=list(sources) or None,
            n=count,
            engine="inline" if debug else engine or settings.task.engine,
            on_error=debugger,
            on_tick=_Progress(debugger),
        )
    if as_json:
        emit_json(report.to_dict())
    else:
        _print_rows(report)
    _summarise(report, target)
    finish(EXIT_COMPLETE if report.ok else EXIT_INCOMPLETE)


def _settings(target: str, pipeline: Any, given: dict[str, Any]) -> Settings:
    """Return the settings that a submission on Slurm would have."""
    from hpcresume.launch.submit import Submission, resolve, with_stage_needs

    request = {"time": given["time_limit"], "cpus_per_task": given["cpus_per_task"]}
    submission = Submission(target=target, flags={"request": request}, site=given["site"])
    return with_stage_needs(resolve(submission, "slurm"), pipeline, "slurm").settings


@contextlib.contextmanager
def _stdout_kept_for_data() -> Iterator[None]:
    """Send to stderr what the user's code and its children print; stdout is for rows."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


class _Progress:
    """Says now and then how far the trial is; ends it when the debugger was quit."""

    def __init__(self, debugger: _Debugger | None) -> None:
        self._debugger, self._said = debugger, time.monotonic()

    def __call__(self, done: int, total: int) -> bool:
        now = time.monotonic()
        if now - self._said >= _PROGRESS_S:
            self._said = now
            say(f"{done} of {human_count(total, 'source')} done", err=True)
        return self._debugger is None or not self._debugger.was_quit


class _Debugger:
    """Opens the debugger at the first exception, where the user's code raised it."""

    def __init__(self) -> None:
        self._opened = self.was_quit = False

    def __call__(self, error: BaseException) -> None:
        if self._opened:
            return
        self._opened = True
        say(f"{type(error).__name__}: {error}", err=True)
        say("the debugger opens where it was raised; c goes on, q ends the trial", err=True)
        with _console() as console:
            session = _UserPdb(stdout=console)
            session.reset()
            session.interaction(None, error.__traceback__)
        self.was_quit = session.was_quit


@contextlib.contextmanager
def _console() -> Iterator[TextIO | None]:
    """Yield where the debugger writes; None lets it edit lines on a terminal."""
    if sys.__stdin__ is not None and sys.__stdin__.isatty() and sys.stderr.isatty():
        # Line editing works only if sys.stdout is the terminal's file descriptor 1.
        with contextlib.redirect_stdout(sys.__stdout__):
            yield None
    else:
        yield sys.stderr


class _UserPdb(pdb.Pdb):
    """A debugger that starts in the innermost frame of the user's own code."""

    was_quit = False

    def get_stack(
        self, f: FrameType | None, t: TracebackType | None
    ) -> tuple[list[tuple[FrameType, int]], int]:
        """Return the stack, and which frame of it to start in."""
        stack, index = super().get_stack(f, t)
        users = [i for i, (frame, _) in enumerate(stack) if _is_users(frame)]
        return stack, users[-1] if users else index

    def do_quit(self, arg: str) -> bool | None:
        """Leave the debugger and end the trial."""
        self.was_quit = True
        return super().do_quit(arg)

    do_q = do_exit = do_quit


def _is_users(frame: FrameType) -> bool:
    import sysconfig

    from hpcresume.pipeline.siblings import is_users

    path = Path(frame.f_code.co_filename)
    stdlib = sysconfig.get_path("stdlib")
    return is_users(path) and path.is_absolute() and not path.is_relative_to(stdlib)


def _print_rows(report: TrialReport) -> None:
    for row in report.rows:
        values = {"source": row.source, "item": row.item, "row": row.row}
        click.echo(json.dumps(values, ensure_ascii=False))
    # Before people's text, where both go to one terminal.
    sys.stdout.flush()


def _summarise(report: TrialReport, target: str) -> None:
    for failure in report.failures:
        say(
            f"failed: {failure.item} in {failure.stage}: {failure.kind}: {failure.message}",
            err=True,
        )
        if failure.traceback:
            say(failure.traceback.rstrip("\n"), err=True)
    if report.stopped:
        say(f"stopped: {report.stopped}", err=True)
    if not report.total:
        say("the list of sources is empty: there is nothing to do", err=True)
        return
    failed = len(report.failures)
    tolerated = f" ({report.tolerated} tolerated)" if report.tolerated else ""
    say(
        f"{report.completed} of {human_count(len(report.sources), 'sampled source')} completed, "
        f"{failed} failed{tolerated}; {human_duration(report.start_s)} to start, "
        f"{human_duration(report.elapsed_s)} in all, engine {report.engine}",
        err=True,
    )
    _say_stages(report)
    if report.estimate is not None:
        _say_estimate(report.estimate, target)
    say("nothing was written", err=True)


def _say_stages(report: TrialReport) -> None:
    width = max(5, *(len(stage.name) for stage in report.stages))
    head = ("in", "out", "dropped", "failed", "s/item", "memory")
    say(f"{'stage':<{width}}" + "".join(f"{name:>11}" for name in head), err=True)
    for stage in report.stages:
        counts = (stage.items_in, stage.items_out, stage.dropped, stage.failed)
        per_item = "-" if stage.seconds_per_item is None else f"{stage.seconds_per_item:.3g}"
        memory = "?" if stage.peak_memory_bytes is None else human_bytes(stage.peak_memory_bytes)
        cells = (*(f"{count:,}" for count in counts), per_item, memory)
        say(f"{stage.name:<{width}}" + "".join(f"{cell:>11}" for cell in cells), err=True)
    say("memory: peak of the process, which fused stages share; best effort", err=True)


def _say_estimate(estimate: Estimate, target: str) -> None:
    gpus = f" and {estimate.gpu_hours:,.2f} GPU-hours" if estimate.gpu_hours else ""
    say(
        f"estimate: {estimate.core_hours:,.2f} core-hours{gpus} for "
        f"{human_count(estimate.sources, 'source')}, "
        f"{estimate.core_seconds_per_source:.3g} core-seconds each",
        err=True,
    )
    if estimate.rounds:
        say(
            f"  hpcresume submit {target} --array {estimate.array} -t {estimate.time}"
            f"        {human_count(estimate.rounds, 'round')}",
            err=True,
        )
    else:
        say(f"  a time limit of {estimate.time} leaves no time to work; give more", err=True)
    say(f"  assumed: {estimate.assumptions}", err=True)
