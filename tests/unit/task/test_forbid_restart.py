"""An element that has done its work is not started again by Slurm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcresume.task.allocation import Allocation
from hpcresume.task.ending import forbid_restart

SCONTROL = """#!/bin/sh
echo "$*" >> {log}
case "$1" in show) echo "JobId=8 ArrayJobId=7 ArrayTaskId=3 JobState={state} Restarts=1" ;; esac
"""


@pytest.mark.parametrize(
    ("restart_count", "stopped", "state", "asked"),
    [
        (1, False, "RUNNING", ["show job -o 7_3", "update JobId=7_3 Requeue=0"]),
        (1, True, "COMPLETING", ["show job -o 7_3"]),
        (0, False, "RUNNING", []),
    ],
    ids=["restarted", "cancelled", "first"],
)
def test_only_the_running_restart_forbids_another(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    restart_count: int,
    stopped: bool,
    state: str,
    asked: list[str],
) -> None:
    """An attempt that Slurm has restarted, and still runs, is not requeued after its end."""
    log, command = tmp_path / "log", tmp_path / "scontrol"
    command.write_text(SCONTROL.format(log=log, state=state))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_CONF", raising=False)

    forbid_restart(
        Allocation(cpus=1, gpus=0, memory_bytes=1, element="7_3", restart_count=restart_count),
        stopped=stopped,
    )

    assert asked == (log.read_text().splitlines() if log.exists() else [])


def test_a_newer_attempt_keeps_its_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zombie, whose element Slurm has restarted since, changes nothing of it."""
    log, command = tmp_path / "log", tmp_path / "scontrol"
    command.write_text(SCONTROL.format(log=log, state="RUNNING").replace("=1", "=2"))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_CONF", raising=False)

    forbid_restart(
        Allocation(cpus=1, gpus=0, memory_bytes=1, element="7_3", restart_count=1), stopped=False
    )

    assert ["show job -o 7_3"] == log.read_text().splitlines()
