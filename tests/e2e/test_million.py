"""A million trivial sources on this machine: rate, memory and files stay within bounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.measure import WARM_UP, measure


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_million_sources(tmp_path: Path) -> None:
    """
    They complete at 20,000 a second or more beyond start-up, the driver stays below 300 MB,
    and the attempt leaves at most 6 files and one for each minute in the run directory.
    """
    start = measure(tmp_path, WARM_UP)
    full = measure(tmp_path, 1_000_000)

    assert full.seconds - start.seconds <= (full.sources - start.sources) / 20_000
    assert 0 < full.driver_bytes < 300_000_000
    assert full.attempt_files <= 6 + full.seconds / 60
