"""Fixtures of the engine's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.engine.chains import ChainCase


@pytest.fixture
def case(tmp_path: Path) -> ChainCase:
    """Return a maker of chains in a directory of the test's own."""
    return ChainCase(tmp_path)
