"""A site of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def site_file(tmp_path: Path) -> Callable[[str, str], str]:
    """Write a file of the user's site ``mine`` and return the folder of sites."""

    def write(name: str, text: str) -> str:
        path = tmp_path / "sites" / "mine" / name
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o644)
        return str(tmp_path / "sites")

    return write
