"""A pool that becomes unrecoverable inside an array task, on a real Slurm."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hpcresume.observe.status import read_status
from hpcresume.run.directory import RunDir
from tests.support.cli import Command, logs_of, wait_until
from tests.support.cluster import SlurmCluster
from tests.support.serving_pipeline import serve_result, write_serve

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(420)]


def submit(cluster: SlurmCluster, **params: object) -> tuple[Command, Path]:
    """Submit the pipeline from a fresh directory; return the command and the run."""
    directory = cluster.folder("serve")
    write_serve(directory)
    command = Command(directory, cluster.env)
    # Without Ray, as the workers need not die here: the job is what is looked at.
    given = {"place": directory, "dies": "false", **params}
    command.run(
        *("submit", "serve.py", "--run-dir", "run", "-c", "2", "--sync-interval", "1"),
        *("--local-dir", str(cluster.scratch), "--engine", "inline"),
        *(word for key, value in given.items() for word in ("-P", f"{key}={value}")),
    )
    return command, directory / "run"


def wait_state(command: Command, run: Path, state: str) -> dict[str, Any]:
    """Wait until the run has ended in a state, and return its status."""
    wait_until(
        lambda: read_status(RunDir.open(str(run)), ask_slurm=False).ended,
        timeout_s=360,
        describe=lambda: f"{command.status(run)}\n{logs_of(run)}",
    )
    status = command.status(run)
    assert state == status["state"], f"{status}\n{logs_of(run)}"
    return status


def outcomes(run: Path) -> list[dict[str, Any]]:
    """Return how the run's attempts ended, in order."""
    paths = sorted(run.glob("rounds/*/tasks/*/e*/outcome.json"))
    return [json.loads(path.read_bytes()) for path in paths]


def test_an_unrecoverable_pool_requeues_its_own_element(slurm_cluster: SlurmCluster) -> None:
    """
    No worker proves a commit: the array task stops admission, publishes, writes its
    outcome and requeues its own element; the next attempt finishes in the same round, and
    nothing that was completed is done twice.
    """
    command, run = submit(slurm_cluster)

    status = wait_state(command, run, "complete")

    first, second = outcomes(run)
    assert ("saved", "pool-unrecoverable") == (first["state"], first["kind"]), logs_of(run)
    assert ("done", 60) == (second["state"], first["completed"] + second["completed"])
    assert 1 == len(status["rounds"])
    assert "requeued" in logs_of(run)
    command.run("collect", str(run), "-o", "out.jsonl")
    assert serve_result() == (command.directory / "out.jsonl").read_bytes()
    calls = Counter(map(int, (command.directory / "calls").read_text().split()))
    assert {1} == set(calls.values()), calls


@pytest.mark.slow
def test_a_pool_that_never_recovers_stops_the_run(slurm_cluster: SlurmCluster) -> None:
    """Attempts that complete nothing do not requeue; the run ends with the pool's reason."""
    command, run = submit(slurm_cluster, always="true", fatal=0, n=5)

    status = wait_state(command, run, "stopped")

    assert "completed nothing" in status["reason"]
    assert "too few workers" in status["reason"]
    assert {"pool-unrecoverable"} == {one["kind"] for one in outcomes(run)}
    assert "it published no completion" in logs_of(run)
