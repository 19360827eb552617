"""What holds for every test: its tier, and that the shell's own settings do not reach it."""

from __future__ import annotations

import json
import os
import signal

import pytest

# Settings of the person or the batch job that runs the tests would change what they see.
_FOREIGN = ("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "RAY_", "HPCRESUME_")
_OURS = "HPCRESUME_TEST_"


def pytest_configure() -> None:
    """Drop what the surrounding shell says about Slurm, Ray, hpcresume and Ctrl-C."""
    for name in list(os.environ):
        if name.startswith(_FOREIGN) and not name.startswith(_OURS):
            del os.environ[name]
    # A shell lets what it runs in the background ignore Ctrl-C, and children inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Record how each test ended where the run is to report it by row of the fault matrix."""
    path = os.environ.get("HPCRESUME_TEST_RESULTS")
    if path and (report.when == "call" or report.outcome != "passed"):
        line = json.dumps({"id": report.nodeid, "outcome": report.outcome})
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests marked ``slow`` except in the tier ``all``."""
    if os.environ.get("HPCRESUME_TEST_TIER", "ci") == "all":
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
