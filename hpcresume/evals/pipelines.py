"""The pipelines that an evaluation is: the workflow over items, and scorers over its rows."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import orjson

from hpcresume.evals.copies import located
from hpcresume.evals.dataset import EvalSources
from hpcresume.evals.layout import RETRIES
from hpcresume.evals.scoring import ScoringSources
from hpcresume.evals.settings import from_params
from hpcresume.evals.stages import ScoreStage, WorkflowStage
from hpcresume.evals.view import ItemObserver
from hpcresume.pipeline.pipeline import Pipeline

_ALMOST_ALL = 1 - 1e-9
"""An item whose worker died of it is an error row like any other, not a failure of the run."""


def workflow(settings: dict[str, Any], run: Path) -> Pipeline:
    """Return the pipeline whose sources are items times repetitions and whose rows are results.

    Args:
        settings: See :class:`hpcresume.evals.settings.EvalSettings`.
        run: Where it runs; holds which items are tried again.
    """
    made = located(from_params(settings), run)
    return Pipeline(
        name="eval",
        sources=EvalSources(made, _retries(run)),
        stages=[WorkflowStage(made)],
        tolerate=_ALMOST_ALL,
        observer=partial(_observe_rows, made),
    )


def _observe_rows(settings: Any, task: Any) -> ItemObserver:
    return ItemObserver(task, settings)


def _retries(run: Path) -> list[tuple[str, dict[str, Any]]]:
    path = run / RETRIES
    if not path.exists():
        return []
    return [tuple(orjson.loads(line)) for line in path.read_bytes().splitlines()]


def scoring(settings: dict[str, Any], of: Path) -> Pipeline:
    """Return the pipeline whose sources are good rows of an evaluation and whose rows are scores.

    Args:
        settings: Those of the evaluation.
        of: Its run directory.
    """
    made = located(from_params(settings), of)
    return Pipeline(
        name="scores",
        sources=ScoringSources(made, of),
        stages=[ScoreStage(made)],
        tolerate=_ALMOST_ALL,
    )
