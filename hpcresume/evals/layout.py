"""Names of what an evaluation keeps in its output directory, which is its run directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from hpcresume.errors import RunDirError, UsageError
from hpcresume.evals.settings import EvalSettings, from_params
from hpcresume.run.directory import RunDir

WORKFLOW_TARGET = "hpcresume.evals.pipelines:workflow"
SCORING_TARGET = "hpcresume.evals.pipelines:scoring"
ROWS = "workflow_output.jsonl"
RESULT = "workflow_output.json"
HIDDEN_ROWS = "eval/rows.jsonl"
SCORES = "scores.json"
SUMMARY = "summary.json"
RETRIES = "eval/retries.jsonl"
ORDER = "eval/order.json"
CODE = "eval/code"
SCORING = "scoring"


def rows_path(run: str, settings: EvalSettings) -> Path:
    """Return where rows are written as items finish: out of sight where nobody wants them."""
    return Path(run, ROWS if settings.write_output else HIDDEN_ROWS)


def is_evaluation(run: RunDir) -> bool:
    """Tell whether a run is one of a workflow over a dataset."""
    return run.info.target == WORKFLOW_TARGET


def stored_settings(run: RunDir) -> EvalSettings:
    """Return the settings that an evaluation was last started with.

    Raises:
        UsageError: The run is none.
        RunDirError: Its first start did not get so far.
    """
    if run.info.target not in (WORKFLOW_TARGET, SCORING_TARGET):
        raise UsageError(
            f"{run.path} is a run of {run.info.target}, not an evaluation. "
            "Continue it with: hpcresume submit " + run.path
        )
    numbers = run.code_numbers()
    if not numbers:
        raise RunDirError(
            f"{run.path} holds no settings yet: its first start did not get that far. "
            "Give the whole command again.",
            path=run.path,
        )
    from hpcresume.pipeline.load import SNAPSHOT_FILE

    path = os.path.join(run.code_path(numbers[-1]), SNAPSHOT_FILE)
    with open(path, "rb") as file:
        stored: dict[str, Any] = msgspec.json.decode(file.read(), type=dict[str, Any])
    return from_params(stored["params"]["settings"])
