"""A run on a real Slurm as a test sees it: its attempts, what they published and executed."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from hpcresume.observe.status import Status, read_status
from hpcresume.run.directory import RunDir
from tests.support.cli import Command, logs_of, wait_until
from tests.support.cluster import SlurmCluster
from tests.support.pipelines import fan_result, write_fan


@dataclass
class SlurmRun:
    """The fan-out pipeline, submitted to a cluster from a directory of its own."""

    cluster: SlurmCluster
    command: Command
    path: Path
    sources: int

    @classmethod
    def submit(
        cls,
        cluster: SlurmCluster,
        *options: str,
        sources: int = 60,
        ms: int = 250,
        engine: str = "inline",
        env: dict[str, str] | None = None,
    ) -> SlurmRun:
        """Submit it; every source takes ``ms`` and is counted when it is executed."""
        directory = cluster.folder("run")
        write_fan(directory)
        made = cls(
            cluster,
            Command(directory, {**cluster.env, **(env or {})}),
            directory / "run",
            sources,
        )
        given = {"n": sources, "ms": ms, "calls": made.calls}
        made.command.run(
            *("submit", "fan.py", "--run-dir", "run", "-c", "2", "--engine", engine),
            *(option for key, value in given.items() for option in ("-P", f"{key}={value}")),
            *("--local-dir", str(cluster.scratch), "--sync-interval", "1"),
            *options,
        )
        return made

    @property
    def calls(self) -> Path:
        """Where every execution of a source is counted."""
        return self.command.directory / "calls"

    @property
    def array(self) -> str:
        """Id of the newest round's job array."""
        return self._glance().rounds[-1].job_id

    def executed(self) -> list[int]:
        """Return the sources in the order in which their execution began."""
        return [int(line) for line in self.calls.read_text().split()] if self.calls.exists() else []

    def executions(self) -> Counter[int]:
        """Return how often each source was executed."""
        return Counter(self.executed())

    def status(self) -> dict[str, Any]:
        """Return the run's status."""
        return self.command.status(self.path)

    def _glance(self) -> Status:
        """Return the run's status from its files alone: cheap enough for waiting."""
        return read_status(RunDir.open(str(self.path)), ask_slurm=False)

    def published(self, task: int = 0) -> int:
        """Return how many sources a task of the newest round has published."""
        status = self._glance()
        newest = status.rounds[-1].round
        found = [t for t in status.tasks if (t.round, t.task) == (newest, task)]
        return found[0].completed if found else 0

    def wait(self, condition: Any, what: str, timeout_s: float = 120) -> Any:
        """Wait for a condition; return its value."""
        return wait_until(condition, timeout_s=timeout_s, describe=lambda: self._evidence(what))

    def wait_published(self, task: int = 0) -> int:
        """Wait until a task has published something; return how many sources."""
        return int(self.wait(lambda: self.published(task), f"task {task} publishes"))

    def wait_executed(self, count: int) -> None:
        """Wait until so many executions have begun."""
        self.wait(lambda: len(self.executed()) >= count, f"{count} executions")

    def wait_log(self, text: str, task: int = 0) -> None:
        """Wait until the array task's log holds a text."""
        self.wait(lambda: text in self.log(task), f"{text!r} in the log of task {task}")

    def wait_state(self, state: str, task: int = 0, timeout_s: float = 60) -> None:
        """Wait until squeue shows an element of the newest array in a state."""
        job = f"{self.array}_{task}"

        def shown() -> bool:
            return [state] == [entry.state for entry in self.cluster.queue(job)]

        self.wait(shown, f"{job} is {state}", timeout_s)

    def wait_ended(self, timeout_s: float = 240) -> dict[str, Any]:
        """Wait for the run's end and return its status."""
        self.wait(lambda: self._glance().ended, "the run ends", timeout_s)
        return self.status()

    def _evidence(self, what: str) -> str:
        return f"{what}\n{self.cluster.evidence()}\n{logs_of(self.path)}"

    def log(self, task: int = 0) -> str:
        """Return what the attempts of an array task of any round have logged."""
        paths = sorted(self.path.glob(f"rounds/*/logs/[0-9]*_{task}.err"))
        return "".join(path.read_text(errors="replace") for path in paths)

    def merge_log(self) -> str:
        """Return what the merge jobs have printed."""
        paths = sorted(self.path.glob("rounds/*/logs/merge_*.out"))
        return "".join(path.read_text(errors="replace") for path in paths)

    def attempts(self, task: int = 0) -> list[dict[str, Any]]:
        """Return who ran the attempts of a task of any round, oldest first."""
        return self._records("attempt", task)

    def outcomes(self, task: int = 0) -> list[dict[str, Any]]:
        """Return how the attempts of a task of any round ended, oldest first."""
        return self._records("outcome", task)

    def record(self) -> dict[str, Any]:
        """Return what was submitted for the newest round."""
        path = max(self.path.glob("rounds/*/jobs/*.json"))
        found: dict[str, Any] = json.loads(path.read_bytes())
        return found

    def has_ended(self, attempt: int, task: int = 0) -> bool:
        """Tell whether an attempt of a task in round 0 has written its outcome."""
        return (self.path / f"rounds/0000/tasks/{task:05d}/e{attempt:03d}/outcome.json").exists()

    def _records(self, name: str, task: int) -> list[dict[str, Any]]:
        paths = sorted(self.path.glob(f"rounds/*/tasks/{task:05d}/e*/{name}.json"))
        return [json.loads(path.read_bytes()) for path in paths]

    def family(self, task: int = 0) -> list[psutil.Process]:
        """Return the living processes of a task's newest attempt, its supervisor first."""
        supervisor = psutil.Process(self.attempts(task)[-1]["pid"])
        return [supervisor, *supervisor.children(recursive=True)]

    def freeze(self, task: int = 0) -> list[psutil.Process]:
        """Stop all processes of a task's newest attempt; return them."""
        family = self.family(task)
        for process in family:
            process.suspend()
        return family

    def stay_on(self, node: str) -> None:
        """Let nothing start on any other node."""
        for other in self.cluster.nodes:
            if other != node:
                self.cluster.drain(other)

    def failures(self) -> list[dict[str, Any]]:
        """Return the failures that were charged to sources."""
        found: list[dict[str, Any]] = self.command.json("failures", str(self.path))["failures"]
        return found

    def is_right(self) -> bool:
        """Tell whether collecting gives the result of an undisturbed run, nothing charged."""
        self.command.run("collect", str(self.path), "-o", "out.jsonl")
        collected = (self.command.directory / "out.jsonl").read_bytes()
        return (fan_result(self.sources), []) == (collected, self.failures())


def resume(family: list[psutil.Process]) -> None:
    """Let frozen processes go on, those that still exist."""
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
