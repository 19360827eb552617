"""Faults of all kinds at once on a real Slurm, as ``python -m tests.soak`` does for hours."""

from __future__ import annotations

import pytest

from tests.soak import soak

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(3000)]


def test_a_short_soak() -> None:
    """Whatever goes wrong for two minutes, each result is there once and nothing is left."""
    tally = soak(minutes=2, seed=3, faults=60, pace_s=1.5, n=120)

    assert tally.is_right, tally.table()
    assert tally.faults
