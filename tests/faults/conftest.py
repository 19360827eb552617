"""Fixtures of the fault matrix."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.faults.rig")

from tests.faults.rig import Rig, make_rig  # noqa: E402
from tests.support.sharedfs import SharedFs, shared_fs  # noqa: E402
from tests.support.stranger import Stranger  # noqa: E402


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A run on this machine's own disk."""
    with make_rig(tmp_path) as made:
        yield made


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[SharedFs]:
    """A file system whose faults can be switched."""
    with shared_fs(tmp_path) as mounted:
        yield mounted


@pytest.fixture
def shared_rig(tmp_path: Path, shared: SharedFs) -> Iterator[Rig]:
    """A run on such a file system."""
    with make_rig(tmp_path, run=shared.path / "run", shared=shared) as made:
        yield made


@pytest.fixture
def stranger() -> Stranger:
    """Another user of this machine."""
    return Stranger.make()


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory in which everybody may make files, like /tmp."""
    path = Path(tempfile.mkdtemp(prefix="hrp", dir="/tmp"))
    path.chmod(0o1777)
    try:
        yield path
    finally:
        shutil.rmtree(path)
