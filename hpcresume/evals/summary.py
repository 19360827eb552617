"""What an evaluation came to: coverage, scores, tokens, latencies."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from hpcresume.evals.rows import whole
from hpcresume.evals.table import RowTable

_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class Score:
    """One score over all items.

    Attributes:
        mean: Mean over items of the mean over their repetitions.
        stderr: Standard error of that mean; over repetitions where there are several, else
            over items.  None where there is one value only.
        items: Items that have this score.
        rows: Rows that have it.
    """

    mean: float
    stderr: float | None
    items: int
    rows: int


def summarise(table: RowTable) -> dict[str, Any]:
    """Return coverage, usage and latencies as JSON values.

    ``expected`` are repetitions of items; each is ``ok``, ``error``, ``timeout`` or ``missing``.
    """
    counts = table.counts()
    usage: dict[str, float] = defaultdict(float)
    seconds = []
    for slot in table.slots.values():
        row = orjson.loads(table.row(slot))
        seconds.append(row.get("seconds", 0.0))
        for name, amount in row.get("usage", {}).items():
            if isinstance(amount, int | float):
                usage[name] += amount
    return {
        "expected": len(table.bases),
        **{name: counts[name] for name in ("ok", "error", "timeout", "missing")},
        "usage": {name: whole(amount) for name, amount in usage.items()},
        "seconds": {name: quantile(seconds, q) for name, q in _QUANTILES.items()},
    }


def quantile(values: Sequence[float], q: float) -> float | None:
    """Return the smallest value that a share of ``q`` does not exceed, None without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)] if ordered else None


def summarise_scores(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Score]:
    """Return each score over all items, from scoring rows by base id."""
    by_name: dict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    for base, row in rows.items():
        item = base.rpartition("-r")[0]
        for name, value in row["scores"].items():
            by_name[name][item, row["repetition"]] = value
    return {name: _score(values) for name, values in sorted(by_name.items())}


def _score(values: Mapping[tuple[str, int], float]) -> Score:
    items: dict[str, list[float]] = defaultdict(list)
    repetitions: dict[int, list[float]] = defaultdict(list)
    for (item, repetition), value in values.items():
        items[item].append(value)
        repetitions[repetition].append(value)
    item_means = [statistics.fmean(found) for found in items.values()]
    repetition_means = [statistics.fmean(found) for found in repetitions.values()]
    spread = repetition_means if len(repetition_means) > 1 else item_means
    return Score(statistics.fmean(item_means), _stderr(spread), len(items), len(values))


def _stderr(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
