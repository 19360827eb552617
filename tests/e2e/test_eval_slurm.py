"""Evaluations over array tasks of a real Slurm: rows by union, remainder requeued, retries."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Command, attempt_pids, logs_of, wait_until
from tests.support.cluster import SlurmCluster
from tests.support.evals import EvalDesk, items
from tests.support.local import kill_family

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


@dataclass(frozen=True)
class OnSlurm:
    """An evaluation submitted from a directory that all nodes see."""

    desk: EvalDesk
    command: Command
    cluster: SlurmCluster

    @classmethod
    def make(cls, cluster: SlurmCluster) -> OnSlurm:
        """Return one in a directory of its own."""
        directory = cluster.folder("eval")
        return cls(EvalDesk.make(directory), Command(directory, cluster.env), cluster)

    def submit(self, *more: object, rc: int = 0) -> None:
        """Submit it over two array tasks."""
        self.command.run(
            *("eval", "--dataset", "data.jsonl", "--workflow", "flow.py:answer"),
            *("--output-dir", "out", "--cluster", "slurm", "--array", "2", "-c", "1"),
            *("--engine", "inline", "--local-dir", str(self.cluster.scratch)),
            *("--sync-interval", "1", *map(str, more)),
            rc=rc,
        )

    def wait(self, status: str) -> dict[str, Any]:
        """Wait until the merge job has written a summary with this status; return it."""
        path = self.desk.out / "summary.json"

        def written() -> Any:
            found = json.loads(path.read_bytes()) if path.exists() else {}
            return found if found.get("status") == status else None

        found: dict[str, Any] = wait_until(
            written,
            timeout_s=200,
            describe=lambda: f"{self.cluster.evidence()}\n{logs_of(self.desk.out)}",
        )
        return found

    def wait_for_scores(self) -> dict[str, Any]:
        """Wait until the merge job has written the scores."""
        path: Path = self.desk.out / "scores.json"
        wait_until(path.exists, timeout_s=120, describe=lambda: logs_of(self.desk.out))
        return self.desk.json("scores.json")


def test_array_tasks(slurm_cluster: SlurmCluster) -> None:
    """
    E13, E12: two array tasks share the items; one is killed and the merge requeues its
    remainder; the merge job writes the union of the rows, the result and the scores; what was
    published ran once.  --retry-errors then runs the failed item alone, in a round of its own.
    """
    run = OnSlurm.make(slurm_cluster)
    run.desk.dataset([*items(39, ms=400), {"id": "b", "question": "?", "do": "raise"}])
    run.submit("--scorer", "flow.py:exact", "--max-concurrency", 2)
    out = run.desk.out
    published = wait_until(
        lambda: list(out.glob("rounds/0000/tasks/00000/e*/seg-*")),
        timeout_s=120,
        describe=lambda: f"{slurm_cluster.evidence()}\n{logs_of(out)}",
    )
    assert published
    kill_family(attempt_pids(out, 0, 0)[-1])

    summary = run.wait("complete")
    assert (40, 39, 1, 0) == tuple(summary[k] for k in ("expected", "ok", "error", "missing"))
    assert (out / "rounds/0001").is_dir()
    assert {f"Q{n}" for n in range(39)} == {
        row["output"] for row in run.desk.rows() if row["status"] == "ok"
    }
    assert [*(f"i{n}" for n in range(39)), "b"] == [row["id"] for row in run.desk.result()]
    assert 1.0 == run.wait_for_scores()["scores"]["exact"]["mean"]
    # Only what the killed task had not published is run again.
    assert {1, 2} >= set(run.desk.calls().values())
    assert len([n for n in run.desk.calls().values() if n == 2]) < 20

    before = run.desk.calls()
    (run.desk.path / "repaired").touch()
    run.command.run("eval", "--resume", "out", "--retry-errors")
    wait_until(
        lambda: 40 == run.desk.json("summary.json")["ok"],
        timeout_s=200,
        describe=lambda: f"{slurm_cluster.evidence()}\n{logs_of(out)}",
    )
    assert {"b 0": 1} == run.desk.calls() - before
    assert 40 == len(run.desk.rows())
    assert 2 == run.desk.by_id()["b"]["attempts"]


def test_too_many_errors_end_the_run(slurm_cluster: SlurmCluster) -> None:
    """E15: a task that alone has more errors than allowed stops the run; no round follows."""
    run = OnSlurm.make(slurm_cluster)
    bad = [{"id": f"b{n}", "question": "?", "do": "raise", "n": n} for n in range(8)]
    run.desk.dataset([*bad, *items(32, ms=5000)])
    run.submit("--fail-on-error", 3, "--max-concurrency", 2)
    summary = run.wait("cancelled")
    assert summary["missing"] > 8
    assert 3 <= summary["error"]
    assert not (run.desk.out / "rounds/0001").exists()
