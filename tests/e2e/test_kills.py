"""A run under kill -9: of a Ray worker, the raylet, the GCS, the driver and the whole task."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.cli import Command, logs_of, wait_until
from tests.support.pipelines import fan_result, write_fan

KINDS = ("worker", "raylet", "gcs", "driver", "task")
SOURCES = 200


def supervisors(run: Path) -> Iterator[psutil.Process]:
    """Yield the living supervisors of a run's attempts."""
    for path in run.glob("rounds/*/tasks/*/e*/attempt.json"):
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(json.loads(path.read_bytes())["pid"])
            if str(run) in process.cmdline():
                yield process


def attempts_of(run: Path) -> list[list[psutil.Process]]:
    """Return the living processes of every attempt, its supervisor first."""
    found = []
    for supervisor in supervisors(run):
        with contextlib.suppress(psutil.Error):
            found.append([supervisor, *supervisor.children(recursive=True)])
    return found


def is_kind(process: psutil.Process, kind: str) -> bool:
    """Tell whether a process is of a kind that the test kills."""
    with contextlib.suppress(psutil.Error):
        command = " ".join(process.cmdline())
        return {
            "worker": "ray::" in command and "StageWorker" in command,
            "raylet": process.name() == "raylet",
            "gcs": process.name() == "gcs_server",
            "driver": "hpcresume.task.driver" in command,
        }.get(kind, False)
    return False


def kill_one(attempts: list[list[psutil.Process]], kind: str, chooser: random.Random) -> bool:
    """Kill one process of a kind, or everything of one attempt; tell whether there was one."""
    if kind == "task":
        # A task without workers yet would only repeat its start.
        ready = [found for found in attempts if any(is_kind(p, "worker") for p in found)]
        victims = chooser.choice(ready) if ready else []
    else:
        found = [p for attempt in attempts for p in attempt if is_kind(p, kind)]
        victims = [chooser.choice(found)] if found else []
    for victim in victims:
        with contextlib.suppress(psutil.Error):
            victim.send_signal(signal.SIGKILL)
    return bool(victims)


def executions(calls: Path) -> collections.Counter[int]:
    """Return how often each source was executed."""
    return collections.Counter(int(line) for line in calls.read_text().split())


def run_under_kills(
    command: Command, run: Path, calls: Path, *, kills: int, seed: int
) -> tuple[set[str], set[psutil.Process]]:
    """Submit again and again while kills are injected, until all of them are.

    Returns:
        The directories that the Ray heads used, and all processes that were seen.
    """
    chooser = random.Random(seed)
    temps: set[str] = set()
    seen: set[psutil.Process] = set()
    submit = (
        *("submit", "fan.py", "--cluster", "local", "--array", "4", "--run-dir", str(run)),
        *("-P", "ms=400", "-P", f"calls={calls}", "--sync-interval", "1"),
        *("--local-dir", str(command.directory)),
    )
    done = 0
    while done < kills:
        process = command.start(*submit)
        try:
            while process.poll() is None and done < kills:
                pause = time.monotonic() + chooser.uniform(0.2, 1.5)
                wait_until(
                    lambda p=process, t=pause: p.poll() is not None or time.monotonic() > t,
                    timeout_s=60,
                    describe=lambda: logs_of(run),
                )
                attempts = attempts_of(run)
                temps |= ray_temps(command.directory)
                seen |= {process for attempt in attempts for process in attempt}
                done += kill_one(attempts, KINDS[done % len(KINDS)], chooser)
        finally:
            process.communicate(timeout=400)
        left = command.status(run)["sources"]["remaining"]
        assert left or done == kills, f"the run ended after {done} of {kills} kills"
    command.run(*submit, timeout_s=400)
    return temps, seen


def ray_temps(local: Path) -> set[str]:
    """Return the directories of the Ray heads of the attempts that are on this node."""
    found = set()
    for path in local.glob("hpcresume-*/*/*/ray-temp"):
        with contextlib.suppress(FileNotFoundError):
            found.add(path.read_text())
    return found


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "kills", [5, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_run_survives_kills(tmp_path: Path, kills: int) -> None:
    """
    Whatever is killed, collecting gives the uninterrupted result byte for byte, no source is
    charged, executions exceed one only by deaths, and nothing is left running.
    """
    write_fan(tmp_path)
    command, run, calls = Command(tmp_path), tmp_path / "run", tmp_path / "calls"

    temps, seen = run_under_kills(command, run, calls, kills=kills, seed=kills)

    status = command.status(run)
    command.run("collect", str(run), "-o", "out.jsonl")
    counts = executions(calls)
    assert "complete" == status["state"]
    assert fan_result(SOURCES) == (tmp_path / "out.jsonl").read_bytes()
    assert [] == command.json("failures", str(run))["failures"]
    assert set(range(SOURCES)) == set(counts)
    assert max(counts.values()) <= 1 + kills
    # Ray's agents notice within seconds that their raylet is gone.
    wait_until(
        lambda: not any(process.is_running() for process in seen),
        timeout_s=60,
        describe=lambda: str([process for process in seen if process.is_running()]),
    )
    assert [] == [temp for temp in temps if os.path.exists(temp)]
    assert [] == list(tmp_path.glob("hpcresume-*/*/*"))
