"""Pools of stateful workers inside an array task, on a real Slurm."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from hpcresume.observe.status import read_status
from hpcresume.run.directory import RunDir
from tests.support.cli import Command, logs_of, wait_until
from tests.support.cluster import SlurmCluster
from tests.support.serving_pipeline import serve_result, write_push, write_serve

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(420)]


class Serving:
    """A run of one of the pipelines that serve from a pool, in a directory of its own."""

    def __init__(
        self,
        cluster: SlurmCluster,
        pipeline: str,
        *options: str,
        engine: str,
        drain_s: float = 20,
        **params: object,
    ) -> None:
        """Submit it."""
        self.cluster, self.place = cluster, cluster.folder("serve")
        write_serve(self.place)
        write_push(self.place)
        env = {**cluster.env, "HPCRESUME_TASK__DRAIN_S": str(drain_s)}
        self.command, self.run = Command(self.place, env), self.place / "run"
        given = {"place": self.place, **params}
        self.command.run(
            *("submit", pipeline, "--run-dir", "run", "-c", "2", "--sync-interval", "1"),
            *("--local-dir", str(cluster.scratch), "--engine", engine, *options),
            *(word for key, value in given.items() for word in ("-P", f"{key}={value}")),
        )

    @property
    def element(self) -> str:
        """The job's one element."""
        return f"{self.command.status(self.run)['rounds'][-1]['job_id']}_0"

    def wait(self, condition: Any, timeout_s: float = 120) -> None:
        """Wait for a condition."""
        wait_until(condition, timeout_s=timeout_s, describe=self.evidence)

    def evidence(self) -> str:
        """Return what there is to be seen."""
        return f"{self.words('events')}\n{self.cluster.evidence()}\n{logs_of(self.run)}"

    def wait_state(self, state: str) -> dict[str, Any]:
        """Wait until the run has ended in a state, and return its status."""
        run = RunDir.open(str(self.run))
        self.wait(lambda: read_status(run, ask_slurm=False).ended, 360)
        status = self.command.status(self.run)
        assert state == status["state"], f"{status}\n{self.evidence()}"
        return status

    def outcomes(self) -> list[dict[str, Any]]:
        """Return how the run's attempts ended, in order."""
        paths = sorted(self.run.glob("rounds/*/tasks/*/e*/outcome.json"))
        return [json.loads(path.read_bytes()) for path in paths]

    def words(self, name: str) -> list[str]:
        """Return what the workers wrote down: ``calls`` or ``events``."""
        path = self.place / name
        return path.read_text().split() if path.exists() else []

    def rows(self) -> bytes:
        """Return what collecting the run gives."""
        self.command.run("collect", str(self.run), "-o", "out.jsonl")
        return (self.place / "out.jsonl").read_bytes()

    def failures(self) -> list[Any]:
        """Return the failures that were charged to sources."""
        found: list[Any] = self.command.json("failures", str(self.run))["failures"]
        return found


@pytest.mark.ray
def test_an_unrecoverable_pool_requeues_its_own_element(slurm_cluster: SlurmCluster) -> None:
    """
    All workers die of a push: the array task stops admission, publishes, writes its
    outcome, stops Ray and requeues its own element; the next attempt finishes in the same
    round, nobody is charged, and nothing that was completed is done twice.
    """
    serving = Serving(slurm_cluster, "serve.py", engine="ray")

    status = serving.wait_state("complete")

    first, second = serving.outcomes()
    assert ("saved", "pool-unrecoverable") == (first["state"], first["kind"]), serving.evidence()
    assert ("done", 60) == (second["state"], first["completed"] + second["completed"])
    assert 1 == len(status["rounds"])
    assert "requeued" in logs_of(serving.run)
    assert (serve_result(), []) == (serving.rows(), serving.failures())
    assert {1} == set(Counter(serving.words("calls")).values())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["inline", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_pool_that_never_recovers_stops_the_run(slurm_cluster: SlurmCluster, engine: str) -> None:
    """Attempts that complete nothing do not requeue; the run ends with the pool's reason."""
    dies = str(engine == "ray").lower()
    params = {"always": "true", "fatal": 0, "n": 5, "dies": dies}
    serving = Serving(slurm_cluster, "serve.py", engine=engine, **params)

    status = serving.wait_state("stopped")

    assert "completed nothing" in status["reason"]
    assert "too few workers" in status["reason"]
    assert {"pool-unrecoverable"} == {one["kind"] for one in serving.outcomes()}
    assert "it published no completion" in logs_of(serving.run)


STOPS = [
    pytest.param("preempted", 20, (), id="SIGTERM"),
    # A Ray head may take half a minute to come up.
    pytest.param("time-limit", 70, ("-t", "2"), id="USR2", marks=pytest.mark.slow),
]


@pytest.mark.ray
@pytest.mark.parametrize(("kind", "drain_s", "options"), STOPS)
def test_a_task_is_stopped_in_the_middle_of_an_update(
    slurm_cluster: SlurmCluster, kind: str, drain_s: float, options: tuple[str, ...]
) -> None:
    """
    A push hangs when the task is preempted, or its time limit is near: within the grace the
    update is wound up, the exporter and the worker that is left clean up, what was parked is
    answered by the old version, and the task requeues itself.  The next attempt serves the new
    version and finishes; nothing is done twice and nobody is charged.
    """
    serving = Serving(slurm_cluster, "push.py", *options, engine="ray", drain_s=drain_s)
    serving.wait((serving.place / "hangs").exists)
    begun = len(serving.words("calls"))
    if kind == "preempted":
        slurm_cluster.preempt(serving.element, hold_s=5)

    status = serving.wait_state("complete")

    first, second = serving.outcomes()
    evidence = serving.evidence()
    assert ("saved", kind, "done") == (first["state"], first["kind"], second["state"]), evidence
    assert ("complete", 1) == (status["state"], len(status["rounds"])), evidence
    assert 200 == first["completed"] + second["completed"], evidence
    rows = [json.loads(line) for line in serving.rows().splitlines()]
    assert list(range(200)) == [row["i"] for row in rows]
    assert {f"version {row['version']}" for row in rows} == {row["made_by"] for row in rows}
    assert ({1, 2}, []) == ({row["version"] for row in rows}, serving.failures())
    if slurm_cluster.bed.proctrack == "cgroup":
        # Where the signal reaches the workers, too, there is nothing left to be cleaned up.
        assert begun < first["completed"], evidence
        assert {1} == set(Counter(serving.words("calls")).values()), evidence
        events = Counter(serving.words("events"))
        assert (3, 2) == (events["finalize-2"], events["trainer-2"]), evidence
        assert events["resume-1"] > 2, evidence
