"""Node-local directories of attempts that start, end and sweep side by side."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from hpcresume.errors import LocalStorageError
from hpcresume.task.scratch import dead_attempts, has_attempts, make_scratch, sweep

RUN = "0123456789abcdef"


def make(local: Path, number: int):
    """Make the directories of an attempt."""
    return make_scratch(str(local), run_id=RUN, name=f"0-{number}-1", attempt=f"{RUN}-{number}")


def test_a_sweep_never_takes_an_attempt_that_starts(tmp_path: Path) -> None:
    """
    While attempts start and end on a node, others sweep what dead ones left there: no living
    attempt is taken for dead, and none fails to start because another one ends.
    """
    over, swept = threading.Event(), list[str]()

    def keep_sweeping() -> None:
        while not over.is_set():
            for path in dead_attempts(str(tmp_path), run_id=RUN):
                swept.append(path)
                sweep(path)

    sweeper = threading.Thread(target=keep_sweeping)
    sweeper.start()
    try:
        for number in range(200):
            scratch = make(tmp_path, number)
            assert os.path.isdir(scratch.path)
            scratch.remove()
            os.close(scratch.lock_fd)
    finally:
        over.set()
        sweeper.join()
    living = [path for path in swept if not os.path.exists(path)]
    assert [] == list(tmp_path.glob("hpcresume-*/*"))
    assert swept == living


def test_what_an_attempt_left_is_dead_once_its_lock_is_free(tmp_path: Path) -> None:
    """A directory whose owner lives is left alone; that of a dead one is found and removed."""
    assert not has_attempts(str(tmp_path), run_id=RUN)
    scratch = make(tmp_path, 1)
    assert has_attempts(str(tmp_path), run_id=RUN)
    assert [] == list(dead_attempts(str(tmp_path), run_id=RUN))

    os.close(scratch.lock_fd)

    assert [scratch.path] == list(dead_attempts(str(tmp_path), run_id=RUN))
    sweep(scratch.path)
    assert (False, False) == (os.path.exists(scratch.path), os.path.exists(scratch.ray_temp))


def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """Where the directory cannot be put in place, neither it nor Ray's stays behind."""
    (tmp_path / f"hpcresume-{os.geteuid()}").mkdir(mode=0o700)
    (tmp_path / f"hpcresume-{os.geteuid()}" / RUN).write_text("in the way")

    with pytest.raises(LocalStorageError, match="cannot create"):
        make(tmp_path, 1)

    assert [RUN] == os.listdir(tmp_path / f"hpcresume-{os.geteuid()}")
    assert [f"hpcresume-{os.geteuid()}"] == os.listdir(tmp_path)
