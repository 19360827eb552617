"""A quick pipeline whose array tasks die and wait as a test says, and Slurm's commands replaced."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.cli import Command, logs_of
from tests.support.cluster import SlurmCluster

QUICK = '''
import os
import signal
import time

import hpcresume as hr


def pipeline(
    n: int = 40, dies: str = "", gate: str = "", ms: int = 0, ends: bool = False
) -> hr.Pipeline:
    """Source i gives itself, after ``ms`` milliseconds.

    A source of ``dies`` takes its array task with it, the first time.  No source is worked on
    before the file ``gate`` is there.
    """
    deadly = [int(i) for i in dies.split()]

    def work(i):
        time.sleep(ms / 1000)
        while gate and not os.path.exists(gate):
            time.sleep(0.05)
        if i in deadly and not os.path.exists(f"died-{i}"):
            os.mkdir(f"died-{i}")
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        return {"i": i}

    def finish(rows, out):
        (out / "count").write_text(str(sum(1 for _ in rows)))

    return hr.Pipeline(
        name="quick", sources=hr.indexed(n), stages=[work], finish=finish if ends else None
    )
'''


def quick_result(n: int = 40) -> bytes:
    """Return what collecting the quick pipeline over ``n`` sources gives."""
    rows = ({"i": i} for i in range(n))
    return b"".join(json.dumps(row, separators=(",", ":")).encode() + b"\n" for row in rows)


class QuickRun:
    """A run of the quick pipeline on a cluster, in a directory of its own."""

    def __init__(self, cluster: SlurmCluster, **env: str) -> None:
        """Write the pipeline; ``env`` is given to every command and so to every job."""
        self.cluster = cluster
        self.directory = cluster.folder("quick")
        (self.directory / "quick.py").write_text(QUICK)
        self.run = self.directory / "run"
        self.gate = self.directory / "gate"
        self.env: Mapping[str, str] = {**cluster.env, **env}
        self.command = Command(self.directory, self.env)

    def arguments(self, *options: str, **params: object) -> list[str]:
        """Return the words that submit the pipeline."""
        given = [f"-P{key}={value}" for key, value in params.items()]
        return [
            *("submit", "quick.py", "--run-dir", "run", "--engine", "inline", "-c", "1"),
            *("--sync-interval", "1", "--local-dir", str(self.cluster.scratch)),
            *options,
            *given,
        ]

    def submit(self, *options: str, rc: int = 0, **params: object) -> None:
        """Submit the pipeline."""
        self.command.run(*self.arguments(*options, **params), rc=rc)

    def collected(self) -> bytes:
        """Return the run's results."""
        self.command.run("collect", "run", "-o", "out.jsonl")
        return (self.directory / "out.jsonl").read_bytes()

    def jobs(self) -> list[dict[str, str]]:
        """Return the records of what was submitted, in any round."""
        paths = sorted(self.run.glob("rounds/*/jobs/*.json"))
        return [json.loads(path.read_bytes()) for path in paths]

    def workers(self, round_: int) -> set[str]:
        """Return the job arrays whose elements started an attempt in a round."""
        paths = self.run.glob(f"rounds/{round_:04d}/tasks/*/e*/attempt.json")
        return {json.loads(path.read_bytes())["array_job_id"] for path in paths}

    def queued(self) -> list[tuple[str, str]]:
        """Return id and name of this run's jobs that Slurm has not ended."""
        mine = [entry for entry in self.cluster.jobs() if self.run_id in entry.name]
        return [(entry.job_id, entry.name) for entry in mine if not entry.ended]

    @property
    def run_id(self) -> str:
        """The run's id."""
        return str(json.loads((self.run / "run.json").read_bytes())["run_id"])

    def wait_complete(self, *, timeout_s: float = 240) -> dict[str, Any]:
        """Wait for the run's end, which must be complete with every row once."""
        status = self.command.wait_ended(self.run, timeout_s=timeout_s)
        assert "complete" == status["state"], f"{status}\n{logs_of(self.run)}"
        assert quick_result() == self.collected()
        return status


class Wrapped:
    """Slurm commands in front of the real ones on the path, each call of them noted."""

    def __init__(self, directory: Path) -> None:
        """Use a directory of the test's own; whoever runs the commands notes it there."""
        directory.chmod(0o777)
        self.directory = directory
        self._calls = directory / "calls"

    def wrap(self, name: str, body: str = 'exec "$real" "$@"') -> None:
        """Replace a command by a shell script, in which ``$real`` is the real one."""
        real = shutil.which(name)
        assert real, f"there is no {name} to wrap"
        path = self.directory / name
        path.write_text(f'#!/bin/bash\nreal={real}\necho "{name} $*" >> {self._calls}\n{body}\n')
        path.chmod(0o755)

    @property
    def path(self) -> str:
        """The search path that finds them first."""
        return f"{self.directory}{os.pathsep}{os.environ['PATH']}"

    def calls(self) -> list[str]:
        """Return how the commands were called, oldest first."""
        return self._calls.read_text().splitlines() if self._calls.exists() else []
