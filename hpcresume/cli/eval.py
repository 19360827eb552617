"""``hpcresume eval``: evaluate a dataset with a workflow or an endpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from hpcresume.cli.common import (
    emit_json,
    finish,
    human_count,
    human_duration,
    human_rate,
    interrupted_code,
    json_option,
    on_terminal,
    say,
)
from hpcresume.errors import EXIT_COMPLETE, EXIT_INCOMPLETE, UsageError

if TYPE_CHECKING:
    from hpcresume.evals.progress import Following
    from hpcresume.evals.run import Consolidated, Hooks, Launching
    from hpcresume.evals.settings import EvalSettings
    from hpcresume.evals.table import RowTable
    from hpcresume.evals.view import Repair
    from hpcresume.launch.local import TaskProgress
    from hpcresume.launch.step import Step
    from hpcresume.launch.submit import Ready
    from hpcresume.run.directory import RunDir

_LOG_LINE_S = 10.0
_LOOK_S = 0.5
_ENDPOINT_TRIES = 5


def _item_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        click.option("--dataset", help="JSON, JSONL, CSV, Parquet, or module:name."),
        click.option("--workflow", metavar="MODULE:NAME", help="What is run on each item."),
        click.option("--endpoint", metavar="URL", help="Where each item is posted to."),
        click.option("--scorer", "scorers", multiple=True, metavar="MODULE:NAME", help="Scorer."),
        click.option(
            "--snapshot",
            multiple=True,
            metavar="FILE",
            help="Further file of the workflow, copied with it.",
        ),
        click.option("-P", "param", multiple=True, metavar="KEY=VALUE", help="For the workflow."),
        click.option("--limit", type=click.IntRange(min=1), help="Only the first N items."),
        click.option("--sample-id", "sample_ids", multiple=True, help="Only the item of this id."),
        click.option("--reps", type=click.IntRange(min=1), help="Repetitions of each item."),
        click.option("--id-column", help="Column of the id."),
        click.option("--question", help="Column of the question."),
        click.option("--answer", help="Column of the expected answer."),
        click.option("--raw", is_flag=True, default=None, help="The whole row is the question."),
        click.option("--steps", help="Kinds of steps that rows keep, with commas."),
    )
    return _with(options, command)


def _call_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        click.option("--max-concurrency", type=click.IntRange(min=1), help="Items at once."),
        click.option("--item-timeout", type=click.FloatRange(min=0), metavar="S", help="0: none."),
        click.option("--max-attempts", type=click.IntRange(min=1), metavar="N", help="Tries."),
        click.option("--protocol", type=click.Choice(["json", "openai"]), help="Of the endpoint."),
        click.option("--request-key", help="Key of the question in a request."),
        click.option("--output-key", help="Key of the output in an answer, a.b.0."),
        click.option("--api-key-env", metavar="NAME", help="Variable that holds the key."),
        click.option("--on-item", metavar="MODULE:NAME", help="Called with each row."),
        click.option(
            "--write-output/--no-write-output", default=None, help="Leave rows and result as files."
        ),
        click.option("--fail-on-error", metavar="true|false|SHARE|N", help="End early."),
        click.option("--fsync-interval", type=click.FloatRange(min=0), metavar="S", hidden=True),
    )
    return _with(options, command)


def _launch_options(command: Callable[..., Any]) -> Callable[..., Any]:
    from hpcresume.cli.submit import request_options

    options = (
        click.option("--array", metavar="N[%M]", help="Array tasks (M of them at once)."),
        click.option("--cluster", type=click.Choice(["auto", "local", "slurm"]),
                     help="Where it runs; default: here, or where it last ran."),
        click.option("--site", help="Site whose settings and templates are used."),
        click.option("--engine", type=click.Choice(["ray", "inline"]), help="How items run."),
        click.option("--local-dir", help="Node-local directory for the ledger."),
        click.option("--env-file", type=click.Path(path_type=Path, dir_okay=False),
                     help="Variables for the workflow; only its path is recorded."),
        click.option("--sync-interval", type=float, metavar="S", help="Publish every S seconds."),
        click.option("--drain", type=float, metavar="S", help="When stopped, wait S seconds."),
    )  # fmt: skip
    return request_options(_with(options, command))


def _with(options: tuple[Any, ...], command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command


@click.command("eval")
@click.option("--output-dir", type=click.Path(path_type=Path, file_okay=False), help="Results.")
@click.option(
    "--resume",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Continue with the stored settings.",
)
@click.option("--rescore", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Only score what is stored.")  # fmt: skip
@click.option("--retry-errors", is_flag=True, help="Run items again whose row is an error.")
@click.option("--force", is_flag=True, help="Take changes that would be refused.")
@_item_options
@_call_options
@_launch_options
@json_option
def evaluate(
    output_dir: Path | None,
    resume: Path | None,
    rescore: Path | None,
    *,
    retry_errors: bool,
    force: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Evaluate a dataset with a workflow or an endpoint; each item is on disk as it finishes.

    The same command again continues: finished items are not run again.

    \b
    Example:
      hpcresume eval --dataset data.jsonl --workflow pkg.mod:answer \\
          --scorer pkg.mod:exact_match --output-dir out
      hpcresume eval --dataset data.csv --endpoint http://127.0.0.1:8000/generate --output-dir out
      hpcresume eval --resume out --retry-errors
      hpcresume eval --rescore out --scorer pkg.mod:judge
    """
    directories = [path for path in (output_dir, resume, rescore) if path is not None]
    if len(directories) != 1:
        raise UsageError("give one of --output-dir, --resume and --rescore.")
    launching = _launching(given, directories[0])
    if rescore is not None:
        _rescore(rescore, given, launching, as_json=as_json)
        return
    from hpcresume.evals.copies import with_copies
    from hpcresume.evals.run import prepare_evaluation

    settings = with_copies(_settings(given, resume))
    ready, changed = prepare_evaluation(
        settings, directories[0], launching, force=force, retry_errors=retry_errors
    )
    for name in changed:
        say(f"changed        {name}: what is still owed runs the new one", err=True)
    if ready.launch.cluster == "slurm":
        _submit(ready, as_json=as_json)
        return
    session = _Session(ready.prepared.run, settings, launching)
    session.run(ready, as_json=as_json)


def _settings(given: Mapping[str, Any], resume: Path | None) -> EvalSettings:
    """Return the settings asked for: stored ones, and what the command line gives over them."""
    import msgspec

    from hpcresume.evals.layout import stored_settings
    from hpcresume.evals.run import run_of
    from hpcresume.evals.settings import EvalSettings, to_params

    changed = _changed(given)
    if resume is not None:
        stored = to_params(stored_settings(run_of(resume)))
        changed = {**stored, **changed, "columns": {**stored["columns"], **changed["columns"]}}
    else:
        changed["cwd"] = str(Path.cwd())
        if not changed.get("dataset"):
            raise UsageError("give --dataset FILE, or --resume DIR of an earlier evaluation.")
        if bool(changed.get("workflow")) == bool(changed.get("endpoint")):
            raise UsageError("give one of --workflow and --endpoint.")
        if changed.get("endpoint") and "max_attempts" not in changed:
            changed["max_attempts"] = _ENDPOINT_TRIES
        if changed.get("endpoint", "").rstrip("/").endswith("/chat/completions"):
            changed.setdefault("protocol", "openai")
    return msgspec.convert(changed, EvalSettings)


def _changed(given: Mapping[str, Any]) -> dict[str, Any]:
    from hpcresume.cli.submit import parameters

    steps = given["steps"]
    named = {
        **{name: given[name] for name in ("dataset", "workflow", "endpoint", "limit", "protocol",
                                          "max_concurrency", "max_attempts", "request_key",
                                          "output_key", "api_key_env", "on_item",
                                          "write_output")},
        "scorers": list(given["scorers"]) or None,
        "sample_ids": list(given["sample_ids"]) or None,
        "snapshot": list(given["snapshot"]) or None,
        "params": _values(parameters(given["param"], None), given) or None,
        "repetitions": given["reps"],
        "item_timeout_s": given["item_timeout"],
        "fsync_s": given["fsync_interval"],
        "steps": [kind for kind in steps.split(",") if kind] if steps is not None else None,
        "fail_on_error": _threshold(given["fail_on_error"]),
    }  # fmt: skip
    columns = {"id": given["id_column"], "question": given["question"],
               "answer": given["answer"], "raw": given["raw"]}  # fmt: skip
    kept = {name: value for name, value in named.items() if value is not None}
    return {**kept, "columns": {k: v for k, v in columns.items() if v is not None}}


def _values(params: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return an endpoint's parameters as JSON values where they are any; ``0.2`` is a number."""
    import json

    if not given["endpoint"]:
        return params
    values = {}
    for key, text in params.items():
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = text
    return values


def _threshold(text: str | None) -> float | None:
    if text is None:
        return None
    word = text.strip().lower()
    if word in ("true", "false"):
        return float(word == "true")
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not value >= 0 or (value > 1 and not value.is_integer()):
        raise UsageError(f"--fail-on-error {text!r}: give true, false, a share below 1 or a count.")
    return value


def _last_cluster(output: Path) -> str:
    """Return where an evaluation last ran, ``local`` for a new one."""
    from hpcresume.merge.plan import newest_plan
    from hpcresume.run.directory import RunDir as Directory

    if not (output / "run.json").exists():
        return "local"
    last = newest_plan(Directory.open(str(output.absolute())))
    return last.footer.launch.cluster if last else "local"


def _launching(given: Mapping[str, Any], output: Path) -> Launching:
    from hpcresume.evals.run import Launching as EvalLaunching
    from hpcresume.launch.submit import parse_array

    array, throttle = parse_array(given["array"]) if given["array"] else (None, 0)
    env_file = given["env_file"]
    # On one machine an event loop in the task itself does what a Ray worker would.
    cluster = given["cluster"] or _last_cluster(output)
    engine = given["engine"] or ("inline" if cluster == "local" else None)
    names = ("partition", "account", "qos", "constraint", "cpus_per_task", "mem",
             "gpus_per_task", "exclude", "nodelist")  # fmt: skip
    request = {name: given[name] for name in names}
    flags = {
        "sync": {"max_age_s": given["sync_interval"]},
        "task": {
            "engine": engine,
            "local_dir": given["local_dir"],
            "drain_s": given["drain"],
            "env_file": str(env_file.absolute()) if env_file else None,
        },
        "request": {**request, "time": given["time_limit"]},
    }
    return EvalLaunching(cluster, array, throttle, given["site"], flags)


def _submit(ready: Ready, *, as_json: bool) -> None:
    from hpcresume.evals.run import submit_evaluation

    run = ready.prepared.run
    _announce(ready)
    step = submit_evaluation(ready)
    if step.state in ("finished", "stopped"):
        _end_merged(run, step, as_json=as_json)
    job = step.job
    if job is not None:
        say(f"array          {job.array}, merge {job.merge or 'none'}", err=True)
    say("the merge job writes rows, result and scores; next:", err=True)
    for command in ("status --watch", "logs -f", "cancel"):
        name, _, option = command.partition(" ")
        say(f"  hpcresume {name} {_shown(run.path)} {option}".rstrip(), err=True)
    if as_json:
        emit_json({"run": run.path, "state": step.state, "array": job.array if job else None})
    finish(EXIT_COMPLETE)


def _end_merged(run: RunDir, step: Step, *, as_json: bool) -> NoReturn:
    """Write and print what a run on Slurm with nothing left to submit came to."""
    from hpcresume.evals.layout import stored_settings
    from hpcresume.evals.run import after_merge

    settings = stored_settings(run)
    written = after_merge(run, step.state)
    assert written is not None
    say_summary(run, written)
    if as_json:
        emit_json({"run": run.path, **written.summary})
    finish(exit_code(settings, step, written))


def _announce(ready: Ready) -> None:
    prepared = ready.prepared
    say(f"output         {_shown(prepared.run.path)}", err=True)
    total = prepared.manifest.total - len(prepared.manifest.withdrawn())
    say(f"sources        {total:,}: {prepared.added:,} new", err=True)


def _shown(path: str) -> str:
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path


@dataclass
class _Session:
    """One evaluation on this machine, as people see it."""

    run_dir: RunDir
    settings: EvalSettings
    launching: Launching
    expected: int = 0
    failed_early: bool = False
    following: Following = field(init=False)

    def __post_init__(self) -> None:
        from hpcresume.evals.layout import rows_path
        from hpcresume.evals.progress import Following as Follower

        self.following = Follower(rows_path(self.run_dir.path, self.settings))

    def run(self, ready: Ready, *, as_json: bool) -> None:
        """Run both passes and end the command."""
        from hpcresume.evals.run import consolidate, run_here

        with self._hooks() as hooks:
            step = run_here(ready, self.settings, hooks)
        if self.failed_early:
            say("stopped: more items failed than --fail-on-error allows", err=True)
        if step.forced:
            say("left at once; the result is written when it is resumed:", err=True)
            say(f"  hpcresume eval --resume {_shown(self.run_dir.path)}", err=True)
            finish(interrupted_code(step.signal))
        status = self._status(step)
        ended = consolidate(self.run_dir, self.settings, status=status)
        say_summary(self.run_dir, ended)
        if step.state == "interrupted" and not self.failed_early:
            code = interrupted_code(step.signal)
        else:
            code = exit_code(self.settings, step, ended)
        scores = None
        if self.settings.scorers and step.state == "finished":
            scored, scores = self.score()
            code = max(code, scored)
        if code not in (EXIT_COMPLETE, EXIT_INCOMPLETE):
            say(f"  hpcresume eval --resume {_shown(self.run_dir.path)}        go on", err=True)
        if as_json:
            emit_json({"run": self.run_dir.path, **ended.summary, **(scores or {})})
        finish(code)

    def _status(self, step: Step) -> str:
        if self.failed_early:
            return "failed"
        return "complete" if step.state == "finished" else step.state

    def _exceeds(self, errors: int) -> bool:
        from hpcresume.evals.progress import exceeds

        return exceeds(errors, self.settings.fail_on_error, self.expected)

    def score(self) -> tuple[int, dict[str, Any]]:
        """Run the scoring pass, print the scores, and return its exit code and them."""
        from hpcresume.evals.run import QUIET, score

        step, found = score(self.run_dir, self.settings, self.launching, QUIET)
        say_scores(found)
        if step.state == "interrupted":
            return interrupted_code(step.signal), found
        broken = step.state != "finished" or any(found["scorer_errors"].values())
        return (EXIT_INCOMPLETE if broken else EXIT_COMPLETE), found

    @contextmanager
    def _hooks(self) -> Iterator[Hooks]:
        from hpcresume.evals.run import Hooks as EvalHooks

        def on_recovered(count: int) -> None:
            say(f"recovered      {human_count(count, 'item')} of a dead attempt", err=True)

        with _progress(self) as show:

            def on_progress(tasks: dict[int, TaskProgress]) -> bool:
                self.following.look()
                show(sum(task.in_flight for task in tasks.values()))
                self.failed_early = self._exceeds(len(self.following.failed))
                return self.failed_early

            yield EvalHooks(_announce, self._on_repair, on_progress, on_recovered)

    def _on_repair(self, repair: Repair, table: RowTable) -> None:
        self.expected = len(table.bases)
        self.following.begin(table)
        if table.slots:
            left = human_count(len(table.bases) - len(table.slots), "item")
            say(f"resuming       {len(table.slots):,} have a row, {left} left", err=True)
        if repair.foreign:
            say(f"mended         {human_count(repair.foreign, 'line')} did not belong", err=True)


def exit_code(settings: EvalSettings, step: Step, ended: Consolidated) -> int:
    """Return 0 where every item has a good row, or as many as ``--fail-on-error`` asks for."""
    from hpcresume.evals.progress import exceeds

    values, limit = ended.summary, settings.fail_on_error
    errors = values["error"] + values["timeout"]
    accepted = limit is not None and not exceeds(errors, limit, values["expected"])
    short = values["missing"] or step.state != "finished"
    return EXIT_INCOMPLETE if short or (errors and not accepted) else EXIT_COMPLETE


@contextmanager
def _progress(session: _Session) -> Iterator[Callable[[int], None]]:
    start, looked = time.monotonic(), 0.0
    before: int | None = None

    def text(running: int) -> tuple[int, str]:
        nonlocal before
        seen = session.following
        done = len(seen.done)
        before = done if before is None else before
        rate = (done - before) / max(time.monotonic() - start, 1e-9)
        left = (session.expected - done) / rate if rate > 0 else None
        return done, (
            f"{done:,} of {session.expected:,} done, {len(seen.failed):,} errors, "
            f"{running:,} running, {human_rate(rate)}, {human_duration(left)} left, "
            f"{seen.tokens:,} tokens"
        )

    if not on_terminal():

        def line(running: int) -> None:
            nonlocal looked
            if time.monotonic() - max(looked, start) >= _LOG_LINE_S:
                looked = time.monotonic()
                say(text(running)[1], err=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("starting", total=None)

        def show(running: int) -> None:
            done, said = text(running)
            progress.update(bar, completed=done, total=session.expected or 1, description=said)

        yield show


def say_summary(run: RunDir, ended: Consolidated) -> None:
    """Print coverage, tokens and latencies for people."""
    values = ended.summary
    say(
        f"{values['status']}: {values['ok']:,} ok, {values['error']:,} errors, "
        f"{values['timeout']:,} timeouts, {values['missing']:,} missing of "
        f"{values['expected']:,}",
        err=True,
    )
    seconds = values["seconds"]
    if seconds["p50"] is not None:
        told = ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items())
        say(f"latency        {told}", err=True)
    if values["usage"]:
        told = ", ".join(f"{amount:,} {name}" for name, amount in values["usage"].items())
        say(f"usage          {told}", err=True)
    if values["checkpoint_degraded"]:
        told = human_count(values["checkpoint_degraded"], "row")
        say(f"mended         {told} could not be written when the items had finished", err=True)
    for item_id, repetition, error in ended.errors:
        say(f"failed         {item_id} (repetition {repetition}): {error[:200]}", err=True)
    result = run.join("workflow_output.json")
    where = _shown(result) if Path(result).exists() else f"hpcresume collect {_shown(run.path)}"
    say(f"rows           {where}", err=True)


def say_scores(found: Mapping[str, Any]) -> None:
    """Print each score for people."""
    if found["scores"]:
        say(f"{'score':<24} {'mean':>10} {'stderr':>10} {'items':>8}", err=True)
    for name, value in found["scores"].items():
        stderr = "-" if value["stderr"] is None else f"{value['stderr']:.4f}"
        say(f"{name:<24} {value['mean']:>10.4f} {stderr:>10} {value['items']:>8,}", err=True)
    for name, count in found["scorer_errors"].items():
        if count:
            say(f"scorer {name} failed for {human_count(count, 'item')}", err=True)


def _rescore(
    output: Path, given: Mapping[str, Any], launching: Launching, *, as_json: bool
) -> None:
    """Score stored rows; the workflow is not run."""
    import msgspec

    from hpcresume.evals.copies import with_copies, write_copies
    from hpcresume.evals.layout import stored_settings
    from hpcresume.evals.run import run_of

    run = run_of(output)
    settings = stored_settings(run)
    changes: dict[str, Any] = {"cwd": str(Path.cwd())} if given["scorers"] else {}
    if given["scorers"]:
        changes["scorers"] = list(given["scorers"])
    if given["max_concurrency"]:
        changes["max_concurrency"] = given["max_concurrency"]
    settings = msgspec.structs.replace(settings, **changes)
    if not settings.scorers:
        raise UsageError("give --scorer module:name; the evaluation was started without one.")
    settings = with_copies(settings)
    write_copies(run, settings, None)
    code, found = _Session(run, settings, launching).score()
    if as_json:
        emit_json({"run": run.path, **found})
    finish(code)
