"""Fixtures of the end-to-end tests: real Slurm clusters, shared by the session."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import (
    cgroup_cluster,
    each_cluster,
    limited_cluster,
    linuxproc_cluster,
    shared_cgroup_cluster,
    shared_linuxproc_cluster,
    slurm_cluster,
)

__all__ = [
    "cgroup_cluster",
    "each_cluster",
    "limited_cluster",
    "linuxproc_cluster",
    "shared_cgroup_cluster",
    "shared_linuxproc_cluster",
    "slurm_cluster",
]


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """Return pytest's directory, or one that ``HPCRESUME_TEST_USER`` may use as well."""
    if "HPCRESUME_TEST_USER" not in os.environ:
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(prefix="hpcr-"))
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path)
