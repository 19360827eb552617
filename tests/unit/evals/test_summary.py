"""Summaries: means over items, standard errors over repetitions, thresholds."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hpcresume.evals.progress import exceeds, tokens_of
from hpcresume.evals.summary import Score, quantile, summarise_scores


def rows(*values: tuple[str, int, float]) -> dict[str, dict[str, Any]]:
    """Return scoring rows of (item, repetition, score)."""
    return {
        f"{item}-r{repetition}": {"repetition": repetition, "scores": {"s": value}}
        for item, repetition, value in values
    }


def test_one_repetition() -> None:
    """With one repetition the standard error is over items."""
    found = summarise_scores(rows(("a", 0, 1.0), ("b", 0, 0.0), ("c", 0, 1.0), ("d", 0, 1.0)))
    assert {"s": Score(0.75, 0.25, 4, 4)} == found


def test_several_repetitions() -> None:
    """With several, each item counts once, and the standard error is over repetitions."""
    found = summarise_scores(
        rows(("a", 0, 1.0), ("a", 1, 0.0), ("b", 0, 1.0), ("b", 1, 1.0), ("c", 0, 0.0))
    )["s"]
    assert (0.5, 3, 5) == (found.mean, found.items, found.rows)
    means = [2 / 3, 1 / 2]
    spread = abs(means[0] - means[1]) / math.sqrt(2) / math.sqrt(2)
    assert spread == pytest.approx(found.stderr)


def test_one_value() -> None:
    """A single value has no standard error."""
    assert {"s": Score(1.0, None, 1, 1)} == summarise_scores(rows(("a", 0, 1.0)))


def test_quantiles() -> None:
    """A quantile is one of the values; without any there is none."""
    assert [1, 2, 4] == [quantile([4, 1, 3, 2], q) for q in (0.25, 0.5, 0.99)]
    assert quantile([], 0.5) is None


@pytest.mark.parametrize(
    ("failed", "limit", "ends"),
    [(5, None, False), (5, 0, False), (1, 1, True), (0, 1, False), (2, 3, False), (3, 3, True),
     (9, 0.1, False), (10, 0.1, True)],
)  # fmt: skip
def test_thresholds(failed: int, limit: float | None, ends: bool) -> None:
    """--fail-on-error is a count, a share of 100 items, never (false), or not given."""
    assert ends == exceeds(failed, limit, 100)


def test_tokens_are_counted_once() -> None:
    """The total counts where it is told, else the sum of what names tokens."""
    assert 9 == tokens_of({"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9})
    assert 9 == tokens_of({"prompt_tokens": 7, "completion_tokens": 2, "cost": 0.5})
