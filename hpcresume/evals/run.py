"""Running an evaluation: workflow pass, view, result, scoring pass."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import orjson

from hpcresume.errors import ChangedRunError, RunDirError, UsageError
from hpcresume.evals.copies import write_copies
from hpcresume.evals.dataset import list_items
from hpcresume.evals.item import split_id, try_id
from hpcresume.evals.layout import (
    HIDDEN_ROWS,
    ORDER,
    RESULT,
    RETRIES,
    ROWS,
    SCORES,
    SCORING_TARGET,
    SUMMARY,
    WORKFLOW_TARGET,
    is_evaluation,
    rows_path,
    stored_settings,
)
from hpcresume.evals.progress import exceeds
from hpcresume.evals.rows import OK
from hpcresume.evals.scoring import read_scores, scoring_directory
from hpcresume.evals.settings import EvalSettings, refuse_changes, to_params
from hpcresume.evals.stages import check_settings
from hpcresume.evals.summary import summarise, summarise_scores
from hpcresume.evals.table import RowTable, in_order, read_table
from hpcresume.evals.view import TOO_MANY, Repair, repair, write_atomically, write_result
from hpcresume.launch.drive import submit_to_slurm
from hpcresume.launch.foreground import LocalRun, recover_dead
from hpcresume.launch.local import TaskProgress, living_attempts
from hpcresume.launch.rounds import plan_settings
from hpcresume.launch.step import Step
from hpcresume.launch.submit import Ready, Submission, make_ready, reopen_run
from hpcresume.merge.plan import Plan, newest_plan
from hpcresume.pipeline.payload import decode_payload
from hpcresume.run.directory import RunDir
from hpcresume.run.manifest import Manifest


@dataclass(frozen=True)
class Launching:
    """How an evaluation is launched.

    Attributes:
        cluster: ``auto``, ``local`` or ``slurm``.
        array: Most array tasks; None: as the last time, or 1.
        throttle: Most array tasks at once, 0: all.
        site: Name of the site; None: found.
        flags: Settings from the command line by section and key.
    """

    cluster: str = "auto"
    array: int | None = None
    throttle: int = 0
    site: str | None = None
    flags: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Hooks:
    """What is told while an evaluation runs.

    Attributes:
        on_ready: Before anything runs.
        on_repair: When the JSONL file has been compared with the ledger, with its rows.
        on_progress: During a round; True: stop, as on a signal.
        on_recovered: Items that a dead attempt had committed.
    """

    on_ready: Callable[[Ready], None]
    on_repair: Callable[[Repair, RowTable], None]
    on_progress: Callable[[dict[int, TaskProgress]], bool]
    on_recovered: Callable[[int], None]


QUIET = Hooks(
    on_ready=lambda _ready: None,
    on_repair=lambda _repair, _table: None,
    on_progress=lambda _tasks: False,
    on_recovered=lambda _count: None,
)
"""Hooks that tell nobody."""


def prepare_evaluation(
    settings: EvalSettings,
    output: Path,
    launching: Launching,
    *,
    force: bool = False,
    retry_errors: bool = False,
) -> tuple[Ready, list[str]]:
    """Create an evaluation's run, or open it and take what has changed.

    Args:
        settings: What it is, as :func:`~hpcresume.evals.copies.with_copies` returned it.
        output: Its directory, which is its run directory.
        launching: How it is launched.
        force: Take changed settings, and items that are gone.
        retry_errors: Make items owed again whose row is an error.

    Returns:
        What is run, and names of the user's files that have changed since it ran last.

    Raises:
        ChangedRunError: It was made with something else.
        HpcResumeError: As :func:`~hpcresume.launch.submit.make_ready`.
    """
    check_settings(settings)
    if not settings.endpoint and not settings.workflow:
        raise UsageError("give --workflow module:name, or --endpoint URL.")
    bases = [base for base, _ in list_items(settings)]
    before: EvalSettings | None = None
    if (output / "run.json").exists():
        run = RunDir.open(str(output.absolute()))
        if not is_evaluation(run):
            raise RunDirError(
                f"{output} is a run of {run.info.target}, not an evaluation. "
                "Give another --output-dir.",
                path=str(output),
            )
        if run.code_numbers():
            before = stored_settings(run)
            if not force:
                refuse_changes(run.path, before, settings)
                _refuse_lost(run, bases)
            if retry_errors:
                _owe_errors(run, settings)
    submission = Submission(
        target=WORKFLOW_TARGET,
        params={"settings": to_params(settings), "run": str(output.absolute())},
        flags=_flags(launching),
        run_dir=output.absolute(),
        cluster=launching.cluster,
        site=launching.site,
        array=launching.array,
        throttle=launching.throttle,
        accept_changes=True,  # what matters was compared above
        cwd=Path(settings.cwd),
    )
    ready = make_ready(submission)
    _write_order(ready.prepared.run, ready.prepared.manifest, bases)
    return ready, write_copies(ready.prepared.run, settings, before)


def _flags(launching: Launching) -> dict[str, dict[str, Any]]:
    flags = {section: dict(values) for section, values in launching.flags.items()}
    # One item per call: a finished one never waits for another.
    flags.setdefault("task", {})["chunk_max_sources"] = 1
    # Of exceptions and time-outs the stage makes rows; what is left are deaths.
    flags.setdefault("run", {})["max_attempts"] = 3
    return flags


def _refuse_lost(run: RunDir, bases: Sequence[str]) -> None:
    """Refuse a dataset that lacks items of the run which no changed ones have replaced.

    Raises:
        ChangedRunError: Their rows would leave the results.
    """
    manifest = Manifest.open(run)
    withdrawn = manifest.withdrawn()
    indices = (index for index in range(manifest.total) if index not in withdrawn)
    known = {split_id(entry.source_id)[0] for entry in manifest.entries(indices)}
    listed = set(bases)
    gone, fresh = known - listed, listed - known
    if not gone or (len(gone) <= len(fresh) and known & listed):
        return
    raise ChangedRunError(
        f"{run.path} was made with other settings:\n"
        f"  dataset: {len(gone)} of {len(known)} items of the run are not in it\n"
        "Their rows would leave the results. Restore the dataset and the selection "
        "(--limit, --sample-id, --reps), use another --output-dir, or drop them with --force.",
        gone=len(gone),
    )


def _owe_errors(run: RunDir, settings: EvalSettings) -> None:
    """Give every item whose row is an error another try; the row stays until that is recorded."""
    if living_attempts(run):
        return  # refused in a moment, with the reason
    plan = newest_plan(run)
    if plan is not None:
        # What a killed attempt had committed is no error any more.
        recover_dead(run, plan_settings(plan))
    manifest = Manifest.open(run)
    path = Path(run.join(RETRIES))
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    with read_table(run, settings) as table:
        for base, slot in table.slots.items():
            if slot.status == OK or base in table.owed:
                continue
            row = orjson.loads(table.row(slot))
            payload = decode_payload(manifest.entry(slot.source).payload)
            payload["attempts"] = row["attempts"]
            lines.append(orjson.dumps([try_id(base, slot.number + 1), payload]) + b"\n")
    path.parent.mkdir(mode=0o700, exist_ok=True)
    write_atomically(path, iter(lines))


def _write_order(run: RunDir, manifest: Manifest, bases: Sequence[str]) -> None:
    path = Path(run.join(ORDER))
    withdrawn = manifest.withdrawn()
    known = [
        base
        for index in range(manifest.total)
        if index not in withdrawn
        for base, number in [split_id(manifest.entry(index).source_id)]
        if number == 1
    ]
    if known == list(bases) and not path.exists():
        return
    path.parent.mkdir(mode=0o700, exist_ok=True)
    write_atomically(path, iter([orjson.dumps(list(bases))]))


def run_here(ready: Ready, settings: EvalSettings, hooks: Hooks) -> Step:
    """Run the workflow pass in the foreground of this machine."""
    run = ready.prepared.run

    def on_round(_plan: Plan) -> None:
        # After dead attempts were recovered and before anything is added.
        with read_table(run, settings) as table:
            mended = repair(rows_path(run.path, settings), table, is_whole=True)
            hooks.on_repair(mended, table)

    hooks.on_ready(ready)
    reopen_run(ready, retry_quarantined=False)
    return LocalRun(
        run=run,
        manifest=ready.prepared.manifest,
        pipeline=ready.prepared.loaded.pipeline,
        resolved=ready.resolved,
        launch=ready.launch,
        on_round=on_round,
        on_progress=hooks.on_progress,
        on_recovered=hooks.on_recovered,
    ).execute()


def submit_evaluation(ready: Ready) -> Step:
    """Submit the workflow pass to Slurm; the merge job writes the rows."""
    reopen_run(ready, retry_quarantined=False)
    return submit_to_slurm(ready)


def stop_where_too_many_failed(run: RunDir) -> str:
    """Stop a run on Slurm that has more errors than allowed, before its next round; say why."""
    settings = stored_settings(run)
    if not settings.fail_on_error or run.stop_requested():
        return ""
    with read_table(run, settings) as table:
        counts = table.counts()
        if not exceeds(counts["error"] + counts["timeout"], settings.fail_on_error,
                       len(table.bases)):  # fmt: skip
            return ""
    run.set_mark("stop")
    return TOO_MANY


def after_merge(run: RunDir, state: str) -> Consolidated | None:
    """Write rows, result and, once the run has finished, scores of a run whose tasks are merged.

    Args:
        run: The run.
        state: What the merge led to.

    Returns:
        What was written; None for a run of this machine, whose command writes it.
    """
    plan = newest_plan(run)
    if plan is None or plan.footer.launch.cluster == "local":
        return None
    settings = stored_settings(run)
    status = "complete" if state == "finished" else state
    written = consolidate(run, settings, status=status, is_whole=True)
    if state == "finished" and settings.scorers:
        score(run, settings, Launching(flags={"task": {"engine": "inline"}}), QUIET)
    return written


@dataclass(frozen=True)
class Consolidated:
    """What was written at the end.

    Attributes:
        summary: See :func:`~hpcresume.evals.summary.summarise`.
        repair: What was wrong with the JSONL file.
        errors: Some of the items that failed: id, repetition, error.
    """

    summary: dict[str, Any]
    repair: Repair
    errors: list[tuple[str, int, str]]


def consolidate(
    run: RunDir, settings: EvalSettings, *, status: str, is_whole: bool = False
) -> Consolidated:
    """Mend the JSONL file and write result and summary; also of a run that has not ended.

    Args:
        run: The run.
        settings: Its settings.
        status: How it stands: ``complete``, ``interrupted`` or another word.
        is_whole: See :func:`~hpcresume.evals.view.repair`.

    Raises:
        SharedStorageError: Something cannot be written; the results are safe.
    """
    with read_table(run, settings) as table:
        mended = _write_output(run, settings, table, is_whole=is_whole)
        # Rows that a task of this machine could not write when their items had finished.
        degraded = 0 if is_whole else mended.missing
        summary = {"status": status, **summarise(table), "checkpoint_degraded": degraded}
        errors = list[tuple[str, int, str]]()
        for slot in table.slots.values():
            if slot.status != OK and len(errors) < 3:
                row = orjson.loads(table.row(slot))
                errors.append((row["id"], row["repetition"], str(row["error"])))
    _write_json(Path(run.join(SUMMARY)), summary)
    return Consolidated(summary, mended, errors)


def _write_output(
    run: RunDir, settings: EvalSettings, table: RowTable, *, is_whole: bool
) -> Repair:
    """Write the rows in both forms, or leave neither, as the settings say."""
    if settings.write_output:
        mended = repair(Path(run.join(ROWS)), table, is_whole=is_whole)
        write_result(run, table, in_order(run, table))
        return mended
    for name in (ROWS, RESULT, HIDDEN_ROWS):
        Path(run.join(name)).unlink(missing_ok=True)
    return Repair()


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, iter([orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n"]))


def score(
    run: RunDir, settings: EvalSettings, launching: Launching, hooks: Hooks
) -> tuple[Step, dict[str, Any]]:
    """Run the scorers over the good rows, as far as these have no scores yet; write the scores.

    Returns:
        How the pass ended, and each score with mean, standard error and coverage.
    """
    directory = scoring_directory(run, settings)
    submission = Submission(
        target=SCORING_TARGET,
        params={"settings": to_params(settings), "of": run.path},
        flags=_flags(launching),
        run_dir=directory,
        cluster="local",
        accept_changes=True,  # rows that have changed are scored anew
        cwd=Path(settings.cwd),
    )
    ready = make_ready(submission)
    reopen_run(ready, retry_quarantined=False)
    step = LocalRun(
        run=ready.prepared.run,
        manifest=ready.prepared.manifest,
        pipeline=ready.prepared.loaded.pipeline,
        resolved=ready.resolved,
        launch=ready.launch,
        on_round=lambda _plan: None,
        on_progress=hooks.on_progress,
        on_recovered=hooks.on_recovered,
    ).execute()
    return step, write_scores(run, settings, directory)


def write_scores(run: RunDir, settings: EvalSettings, directory: Path) -> dict[str, Any]:
    """Write the scores of a scoring's rows, in the dataset's order; return the summary."""
    rows = read_scores(directory)
    with read_table(run, settings) as table:
        order = in_order(run, table)
        good = {base for base, slot in table.slots.items() if slot.status == OK}
    found = {base: rows[base] for base in order if base in rows and base in good}
    summary: dict[str, Any] = {
        name: msgspec.to_builtins(value) for name, value in summarise_scores(found).items()
    }
    failed = {
        name: sum(1 for row in found.values() if name in row["errors"])
        for name in (target.rpartition(":")[2] for target in settings.scorers)
    }
    _write_json(
        Path(run.join(SCORES)),
        {
            "scorers": settings.scorers,
            "scores": summary,
            "scorer_errors": failed,
            "rows": {"expected": len(order), "good": len(good), "scored": len(found)},
            "items": list(found.values()),
        },
    )
    return {"scores": summary, "scorer_errors": failed}


def run_of(output: Path) -> RunDir:
    """Open the run of an evaluation that exists.

    Raises:
        UsageError: There is none.
    """
    if not os.path.exists(output / "run.json"):
        raise UsageError(f"{output} holds no evaluation. Give the directory of an earlier one.")
    run = RunDir.open(str(output.absolute()))
    stored_settings(run)
    return run
