"""``hpcresume submit``: start a run, or continue one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpcresume.cli.common import (
    emit_json,
    exit_code_of,
    finish,
    human_count,
    human_duration,
    human_rate,
    interrupted_code,
    json_option,
    on_terminal,
    say,
)

if TYPE_CHECKING:
    from hpcresume.launch.local import TaskProgress
    from hpcresume.launch.step import Step
    from hpcresume.launch.submit import Ready
    from hpcresume.merge.plan import Plan
    from hpcresume.observe.status import Status

_LOG_LINE_S = 10.0
_WATCH_S = 2.0


def request_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a request, spelled as sbatch does."""
    options = (
        click.option("-t", "--time", "time_limit", help="Time limit, as sbatch spells it."),
        click.option("-p", "--partition", help="Partition."),
        click.option("-A", "--account", help="Account to charge."),
        click.option("-q", "--qos", help="Quality of service."),
        click.option("-C", "--constraint", help="Node features."),
        click.option("-c", "--cpus-per-task", type=int, help="Cores per array task."),
        click.option("--mem", help="Memory per array task."),
        click.option("--gpus-per-task", type=int, help="GPUs per array task."),
        click.option("-x", "--exclude", help="Nodes to leave out."),
        click.option("-w", "--nodelist", help="Nodes to use."),
        click.option("-J", "--job-name", "job_name", hidden=True),
    )
    for option in reversed(options[:-1]):
        command = option(command)
    return command


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what is run and how; shared with `render`."""
    options = (
        click.option("-P", "param", multiple=True, metavar="KEY=VALUE", help="A parameter."),
        click.option(
            "--params",
            "params_file",
            type=click.Path(path_type=Path, dir_okay=False),
            help="Parameters from a JSON or TOML file.",
        ),
        click.option("--array", metavar="N[%M]", help="Array tasks (M of them at once)."),
        click.option(
            "--run-dir", type=click.Path(path_type=Path, file_okay=False), help="Run directory."
        ),
        click.option(
            "--cluster",
            type=click.Choice(["auto", "local", "slurm"]),
            default="auto",
            show_default=True,
            help="auto: Slurm where sbatch is.",
        ),
        click.option("--site", help="Site whose settings and templates are used."),
        click.option("--engine", type=click.Choice(["ray", "inline"]), help="How stages run."),
        click.option("--workers", type=int, help="Workers per group of stages."),
        click.option("--local-dir", help="Node-local directory for the ledger."),
        click.option(
            "--env-file",
            type=click.Path(path_type=Path, dir_okay=False),
            help="Variables for the stages; only its path is recorded.",
        ),
        click.option("--sync-interval", type=float, metavar="S", help="Publish every S seconds."),
        click.option("--signal-lead", type=int, metavar="S", help="Signal S s before the limit."),
        click.option("--max-attempts", type=int, metavar="N", help="Tries per source."),
        click.option("--max-rounds", type=int, metavar="N", help="Stop after N rounds."),
        click.option(
            "--on-end", metavar="COMMAND", help="Run once when the run has ended; JSON on stdin."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return request_options(command)


def make_submission(target: str, sbatch_options: tuple[str, ...], given: Mapping[str, Any]) -> Any:
    """Return the submission that the command line asks for.

    Raises:
        UsageError: An option cannot be right.
    """
    from hpcresume.launch.submit import Submission, parse_array

    array, throttle = parse_array(given["array"]) if given["array"] else (None, 0)
    return Submission(
        target=target,
        params=parameters(given["param"], given["params_file"]),
        flags=_flags(given, sbatch_options),
        run_dir=given["run_dir"],
        cluster=given["cluster"],
        site=given["site"],
        array=array,
        throttle=throttle,
        accept_changes=given.get("accept_changes", False),
        shared_group=given.get("shared_group") or "",
        retry_quarantined=given.get("retry_quarantined", False),
    )


def parameters(pairs: tuple[str, ...], path: Path | None) -> dict[str, Any]:
    """Return the parameters of -P and --params, as texts and values.

    Raises:
        UsageError: One is not KEY=VALUE, or the file cannot be read.
    """
    from hpcresume.errors import UsageError
    from hpcresume.pipeline.params import read_params_file

    params: dict[str, Any] = dict(read_params_file(path)) if path else {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"-P {pair!r}: give KEY=VALUE.")
        params[key] = value
    return params


def _flags(given: Mapping[str, Any], extra: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    interval = given["sync_interval"]
    request = {
        name: given[name]
        for name in (
            *("partition", "account", "qos", "constraint", "cpus_per_task", "mem"),
            *("gpus_per_task", "exclude", "nodelist"),
        )
    }
    return {
        "run": {name: given[name] for name in ("max_attempts", "max_rounds", "on_end")},
        "sync": {"max_age_s": interval},
        "task": {
            "local_dir": given["local_dir"],
            "env_file": str(given["env_file"].absolute()) if given["env_file"] else None,
            "workers": given["workers"],
            "signal_lead_s": given["signal_lead"],
            "engine": given["engine"],
        },
        "request": {**request, "time": given["time_limit"], "extra": list(extra) or None},
    }


@click.command()
@click.argument("target", metavar="PIPELINE|RUN")
@click.argument("sbatch_options", nargs=-1, type=click.UNPROCESSED)
@run_options
@click.option(
    "--collect",
    "collect_to",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the results here when the run ends; implies --wait.",
)
@click.option("--wait", is_flag=True, help="On Slurm, wait for the run's end.")
@click.option("--retry-quarantined", is_flag=True, help="Try quarantined sources again.")
@click.option("--shared-group", metavar="GROUP", help="Let a group read the new run.")
@click.option("--accept-changes", is_flag=True, help="Take changes that would be refused.")
@click.option("--dry-run", is_flag=True, help="Print the batch script; submit nothing.")
@json_option
def submit(
    target: str,
    sbatch_options: tuple[str, ...],
    *,
    collect_to: Path | None,
    wait: bool,
    dry_run: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Start a run of PIPELINE (file.py, file.py:attr, module:attr), or continue RUN.

    The same command again continues: finished sources are not run again.
    Options after -- go to sbatch.

    \b
    Example:
      hpcresume submit pipeline.py --array 64 -t 4:00:00 -c 8 -P root=/data/pages
      hpcresume submit pipeline.py --cluster local --collect out.jsonl
      hpcresume submit pipeline.py --array 64 -- --licenses=scratch
    """
    from hpcresume.errors import UsageError
    from hpcresume.launch.submit import make_ready, reopen_run

    submission = make_submission(target, sbatch_options, given)
    if dry_run:
        from hpcresume.cli.render import print_scripts

        print_scripts(submission, as_json=as_json, explain=False)
        return
    ready = make_ready(submission)
    if sbatch_options and ready.launch.cluster == "local":
        raise UsageError(
            f"{' '.join(sbatch_options)}: options after -- go to sbatch, and this run is local. "
            "Leave them out, or give --cluster slurm."
        )
    reopen_run(ready, retry_quarantined=submission.retry_quarantined)
    _announce(ready)
    if ready.launch.cluster == "local":
        step = _run_here(ready)
    else:
        step = _submit(ready)
        if (wait or collect_to) and step.state != "finished":
            step = _wait(ready)
    _end(ready, step, collect_to=collect_to, as_json=as_json)


def _announce(ready: Ready) -> None:
    from hpcresume.launch.rounds import stand

    prepared = ready.prepared
    for note in prepared.notes:
        say(note, err=True)
    say(f"run directory  {_shown(prepared.run.path)}", err=True)
    standing = stand(prepared.run, prepared.manifest, ready.resolved.settings)
    left = len(standing.remainder)
    say(
        f"sources        {standing.total:,}: {prepared.added:,} new, "
        f"{standing.total - left:,} done, {left:,} left",
        err=True,
    )
    if not standing.total:
        say("the list of sources is empty: there is nothing to do", err=True)
    if prepared.loaded.pipeline.sink is None:
        say("no sink: side effects may happen more than once for a source", err=True)


def _shown(path: str) -> str:
    try:
        relative = Path(path).relative_to(Path.cwd())
    except ValueError:
        return path
    return str(relative)


def _run_here(ready: Ready) -> Step:
    from hpcresume.launch.local import share_cores
    from hpcresume.launch.submit import run_local

    def on_round(plan: Plan) -> None:
        footer = plan.footer
        cpus, parallel = share_cores(footer.tasks, ready.resolved.settings)
        say(
            f"round {footer.round}        {human_count(footer.sources, 'source')} in "
            f"{human_count(footer.tasks, 'task')}, {min(parallel, footer.tasks)} at once "
            f"with {human_count(cpus, 'core')} each",
            err=True,
        )

    def on_recovered(sources: int) -> None:
        say(f"recovered      {human_count(sources, 'source')} of a dead attempt", err=True)

    with _progress(ready.prepared.manifest.total) as on_progress:
        return run_local(
            ready, on_round=on_round, on_progress=on_progress, on_recovered=on_recovered
        )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[dict[int, TaskProgress]], None]]:
    if not on_terminal():
        yield _log_lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        TextColumn("{task.completed:,.0f} done in this round"),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=total, state="starting")

        def show(tasks: dict[int, TaskProgress]) -> None:
            done, left, state = _sum(tasks)
            progress.update(bar, completed=done, total=max(1, done + left), state=state)

        yield show


def _sum(tasks: Mapping[int, TaskProgress]) -> tuple[int, int, str]:
    values = list(tasks.values())
    done = sum(task.committed + task.quarantined for task in values)
    left = sum(task.left for task in values)
    running = sum(task.in_flight for task in values)
    failing = sum(task.failing for task in values)
    quarantined = sum(task.quarantined for task in values)
    parts = [f"{running:,} running"] if running else []
    if failing or quarantined:
        parts += [f"{failing:,} failing", f"{quarantined:,} quarantined"]
    return done, left, ", ".join(parts)


def _log_lines() -> Callable[[dict[int, TaskProgress]], None]:
    said = start = time.monotonic()

    def line(tasks: dict[int, TaskProgress]) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said < _LOG_LINE_S:
            return
        said = now
        done, left, state = _sum(tasks)
        rate = human_rate(done / max(now - start, 1e-9))
        parts = [f"{done:,} done", f"{left:,} left", state, rate]
        say(", ".join(filter(None, parts)), err=True)

    return line


def _submit(ready: Ready) -> Step:
    from hpcresume.launch.drive import submit_to_slurm

    step = submit_to_slurm(ready)
    for note in step.notes:
        say(f"packed         {note}", err=True)
    if step.job is not None:
        request = ready.resolved.settings.request
        asks = [human_count(request.cpus_per_task or 1, "core")]
        asks += [request.mem] if request.mem else []
        asks += [f"{request.gpus_per_task} GPUs"] if request.gpus_per_task else []
        asks += [request.time] if request.time else []
        verb = "already at work" if step.state == "running" else "submitted"
        tasks = human_count(step.job.tasks, "task")
        say(f"array          {step.job.array} {verb}: {tasks} of {', '.join(asks)}", err=True)
        if step.job.merge:
            twin = f", and {step.job.twin} if that one dies" if step.job.twin else ""
            say(f"merge          {step.job.merge}{twin}", err=True)
        else:
            path = _shown(ready.prepared.run.path)
            say(
                "jobs may not submit jobs at this site; what goes on from round to round is",
                err=True,
            )
            say(f"  hpcresume drive {path}", err=True)
    return step


def _wait(ready: Ready) -> Step:
    """Wait for a run on Slurm by its files; Ctrl-C leaves the jobs running."""
    from hpcresume.launch.rounds import stand
    from hpcresume.launch.step import Step as MergeStep
    from hpcresume.observe.status import readings

    run, manifest = ready.prepared.run, ready.prepared.manifest
    said = 0.0
    try:
        for status in readings(run, pause_s=_WATCH_S):
            if time.monotonic() - said > _LOG_LINE_S:
                said = time.monotonic()
                say(_status_line(status), err=True)
        return MergeStep(status.state, stand(run, manifest, ready.resolved.settings))
    except KeyboardInterrupt:
        say("detached; the jobs run on", err=True)
        _say_next(ready)
        raise


def _status_line(status: Status) -> str:
    values = status.to_dict()
    sources = values["sources"]
    return (
        f"{values['state']}: {sources['completed']:,} of {sources['total']:,} done, "
        f"{human_rate(values['rate_per_s'])}, {human_duration(values['eta_s'])} left"
    )


def _say_next(ready: Ready) -> None:
    path = _shown(ready.prepared.run.path)
    say("next:", err=True)
    for command in ("status --watch", "logs -f", "cancel"):
        name, _, option = command.partition(" ")
        say(f"  hpcresume {name} {path}{f' {option}' if option else ''}", err=True)


def _end(ready: Ready, step: Step, *, collect_to: Path | None, as_json: bool) -> None:
    from hpcresume.observe.status import read_status

    run = ready.prepared.run
    ended = step.state not in {"submitted", "running"}
    status = read_status(run, ask_slurm=not ended)
    code = 0
    if ended:
        code = _summarise(ready, status, step)
        if collect_to is not None:
            code = max(code, _collect(ready, collect_to))
        if step.state == "interrupted":
            code = interrupted_code(step.signal)
    else:
        _say_next(ready)
    if as_json:
        job = step.job
        emit_json(
            {
                **status.to_dict(),
                "run": run.path,
                "array": job.array if job else None,
                "merge": job.merge if job else None,
            }
        )
    finish(code)


def _summarise(ready: Ready, status: Status, step: Step) -> int:
    values, path = status.to_dict(), _shown(ready.prepared.run.path)
    sources = values["sources"]
    state = "interrupted" if step.state == "interrupted" else values["state"]
    reason = f": {values['reason']}" if values["reason"] and state != "interrupted" else ""
    say(f"{state}{reason}", err=True)
    say(
        f"               {sources['completed']:,} completed, {sources['quarantined']:,} "
        f"quarantined, {sources['remaining']:,} left",
        err=True,
    )
    if sources["quarantined"]:
        say(f"  hpcresume failures {path}        why they failed", err=True)
    if sources["remaining"] or state == "interrupted":
        say(f"  hpcresume submit {path}        go on", err=True)
    say(f"  hpcresume collect {path} -o out.jsonl        the results", err=True)
    finish_path = Path(ready.prepared.run.join("finish"))
    if finish_path.exists():
        say(f"  {_shown(str(finish_path))}        what finish made", err=True)
    return exit_code_of(state)


def _collect(ready: Ready, output: Path) -> int:
    from hpcresume.output.collect import collect

    report = collect(ready.prepared.run, output)
    say(
        f"results        {output}: {human_count(report.rows, 'row')} of "
        f"{human_count(report.sources, 'source')}",
        err=True,
    )
    sys.stderr.flush()
    return 0 if report.complete else 1
