"""A stage that serves from a pool, over a real Ray head, through the command line."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.cli import Command, logs_of, wait_until
from tests.support.serving_pipeline import serve_result, write_push, write_serve

pytestmark = [pytest.mark.ray, pytest.mark.timeout(280)]


def outcomes(run: Path) -> list[dict[str, Any]]:
    """Return how the run's attempts ended, in order."""
    paths = sorted(run.glob("rounds/*/tasks/*/e*/outcome.json"))
    return [json.loads(path.read_bytes()) for path in paths]


def rows_of(command: Command, run: Path) -> list[dict[str, Any]]:
    """Return what collecting the run gives."""
    command.run("collect", str(run), "-o", "out.jsonl")
    return [json.loads(line) for line in (command.directory / "out.jsonl").read_text().splitlines()]


def submit(tmp_path: Path, pipeline: str, *options: str, rc: int | None = 0) -> Command:
    """Run a pipeline on this machine to its end."""
    command = Command(tmp_path)
    (tmp_path / "local").mkdir()
    where = ("--cluster", "local", "--run-dir", "run", "--local-dir", str(tmp_path / "local"))
    command.run("submit", pipeline, *where, "-c", "2", *options, rc=rc)
    return command


@pytest.mark.slow
def test_an_unrecoverable_pool_restarts_the_task(tmp_path: Path) -> None:
    """
    All workers die of a push: the attempt publishes what it completed and ends as
    ``pool-unrecoverable``, nobody is charged; the next one finishes, and no source that was
    completed is done twice.
    """
    write_serve(tmp_path)
    command = submit(tmp_path, "serve.py", "-P", f"place={tmp_path}")

    run = tmp_path / "run"
    first, second = outcomes(run)
    evidence = logs_of(run)
    assert ("saved", "pool-unrecoverable", "serve") == (
        *(first[name] for name in ("state", "kind")),
        first["stage"],
    ), evidence
    assert "version 2" in first["reason"]
    assert ("done", 60) == (second["state"], first["completed"] + second["completed"]), evidence
    assert first["completed"] > 0
    command.run("collect", str(run), "-o", "out.jsonl")
    assert serve_result() == (tmp_path / "out.jsonl").read_bytes()
    calls = Counter(map(int, (tmp_path / "calls").read_text().split()))
    assert {1} == set(calls.values()), calls
    assert [] == command.json("failures", str(run))["failures"]


def test_a_pool_that_never_recovers_ends_the_run(tmp_path: Path) -> None:
    """
    Attempts that get nowhere are not made for ever: after ``max_no_progress_rounds``
    the run is stopped with the pool's reason.
    """
    write_serve(tmp_path)
    params = {"place": tmp_path, "always": "true", "fatal": 0, "n": 5, "dies": "false"}
    options = [word for key, value in params.items() for word in ("-P", f"{key}={value}")]
    # The verdict is the merge step's; whether workers or threads make up the pool is one to it.
    command = submit(tmp_path, "serve.py", "--engine", "inline", *options, rc=1)

    status = command.status(tmp_path / "run")
    assert "stopped" == status["state"], logs_of(tmp_path / "run")
    assert "completed nothing" in status["reason"]
    assert "too few workers" in status["reason"]
    ends = outcomes(tmp_path / "run")
    assert {("saved", "pool-unrecoverable")} == {(o["state"], o["kind"]) for o in ends}
    assert len(ends) == len((tmp_path / "flag").read_text())


def test_a_driver_that_dies_in_the_middle_of_an_update(tmp_path: Path) -> None:
    """
    The outcome names the update that the death interrupted; the next attempt makes its pool
    anew, and the run ends complete.
    """
    write_push(tmp_path)
    command = Command(tmp_path)
    (tmp_path / "local").mkdir()
    where = ("--cluster", "local", "--run-dir", "run", "--local-dir", str(tmp_path / "local"))
    params = ("-P", f"place={tmp_path}", "-P", "n=60", "--engine", "inline")
    process = command.start("submit", "push.py", *where, *params)
    run = tmp_path / "run"
    try:
        wait_until(
            (tmp_path / "hangs").exists, timeout_s=120, describe=lambda: logs_of(tmp_path / "run")
        )
        (driver,) = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "hpcresume.task.driver" in child.cmdline()
        ]
        driver.kill()
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()

    assert 0 == process.returncode, f"{out}\n{err}"
    first, *_ = outcomes(run)
    assert "driver-died" == first["kind"]
    told = "stage 'serve' was in the middle of its update from version 1 to 2, in phase 'transfer'"
    assert told in first["reason"], first
    assert list(range(60)) == [row["i"] for row in rows_of(command, run)]


def test_rollouts_under_fire(tmp_path: Path) -> None:
    """
    The example ends complete while workers and trainer are killed at random: every episode is
    there once and names one version, and no worker goes back to an older one.
    """
    options = ("-P", "episodes=600", "-P", "every_s=1", "-P", "chaos_s=4")
    command = submit(tmp_path, "hpcresume.examples.rollout", *options)

    rows = rows_of(command, tmp_path / "run")
    assert list(range(600)) == [row["episode"] for row in rows]
    by_worker = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["turn"]):
        by_worker[row["worker"]].append(row["version"])
    assert all(sorted(versions) == versions for versions in by_worker.values())
    assert len({row["version"] for row in rows}) > 1
