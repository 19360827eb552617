"""How long sources take, told by those that completed.

Seconds are counted in steps of a quarter, so that a million sources cost a few numbers, and
what is asked for is a quantile: the mean of a few long sources among many short ones is the
time of neither.
"""

from __future__ import annotations

import math

_STEP = math.log(1.25)
_LIKELY = 0.8


class Pace:
    """Seconds per unit of weight of the sources that this attempt completed.

    An attempt learns anew.  What it believes can only put a source off to the next attempt,
    which starts knowing nothing, so a weight that says little of the time costs one delay.
    """

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._total = 0
        self._likely: float | None = 0.0

    def note(self, seconds: float, count: int) -> None:
        """Count sources that took so long per unit of their weight."""
        step = math.ceil(math.log(max(seconds, 1e-9)) / _STEP)
        self._counts[step] = self._counts.get(step, 0) + count
        self._total += count
        self._likely = None

    def likely(self) -> float:
        """Return the seconds within which four of five sources of weight 1 completed.

        0 where none has.
        """
        if self._likely is None:
            self._likely = self._quantile()
        return self._likely

    def _quantile(self) -> float:
        below = 0
        for step in sorted(self._counts):
            below += self._counts[step]
            if below >= _LIKELY * self._total:
                return math.exp(step * _STEP)
        return 0.0
