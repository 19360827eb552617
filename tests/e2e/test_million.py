"""A million trivial sources on this machine: rate, memory and files stay within bounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.counts import attempt_files
from tests.bench.watched import memory


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_million_sources(tmp_path: Path) -> None:
    """
    They complete at 20,000 a second or more, the driver stays below 300 MB and the supervisor
    below 100, and the attempt leaves at most 6 files and one for each interval.
    """
    found = memory(tmp_path, 1, 1_000_000)

    assert found.ended is not None
    assert found.ended.work_s <= 1_000_000 / 20_000
    assert 0 < found.resident < 300_000_000
    assert 0 < found.supervisor < 100_000_000
    assert len(attempt_files(found.ended.run)) <= 6 + found.ended.work_s / 1
