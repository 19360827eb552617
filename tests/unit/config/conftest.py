"""A user without any settings of their own, and a way to write some."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from hpcresume.config import Resolved, load_settings


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write a file below the test's folder, as only its owner can."""

    def write_text(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o644)
        return path

    return write_text


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """Variables of a user whose home is the test's folder, on no known cluster."""
    return {
        "HOME": str(tmp_path / "home"),
        "SLURM_CLUSTER_NAME": "elsewhere",
        "HPCRESUME_SITE_PATH": str(tmp_path / "sites"),
    }


@pytest.fixture
def load(tmp_path: Path, environ: dict[str, str]) -> Callable[..., Resolved]:
    """Load settings from the test's folder."""

    def load_them(
        *,
        site: str | None = None,
        flags: Mapping[str, Mapping[str, Any]] | None = None,
        **more: str,
    ) -> Resolved:
        project = tmp_path / "project" / "deep"
        project.mkdir(parents=True, exist_ok=True)
        return load_settings(
            site=site, start_dir=project, environ=environ | more, flags=flags or {}
        )

    return load_them
