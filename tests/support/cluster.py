"""A real Slurm for tests: brought up once per session and process tracker, broken on purpose.

The fixtures reach the tests through ``tests/e2e/conftest.py``: imported by each module, a
session's fixture would be brought up once per module.  Where Slurm cannot be brought up the
tests are skipped with the reason, or fail if ``HPCRESUME_TEST_REQUIRE_SLURM=1``.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from hpcresume import slurm, testbed
from hpcresume.errors import TestbedError
from hpcresume.testbed import cgroups
from tests.support.cli import as_user, user_id
from tests.support.local import living

Proctrack = Literal["auto", "cgroup", "linuxproc"]
POLL_S = 0.1


class SlurmCluster:
    """A testbed in a directory of its own, with what a test wants to do to it."""

    def __init__(self, **options: Any) -> None:
        """Bring it up; ``options`` are the fields of :class:`hpcresume.testbed.Settings`."""
        # Not pytest's tmp_path: it is too long for Slurm's sockets and closed to other users.
        self.root = Path(tempfile.mkdtemp(prefix="hpcr-"))
        self.root.chmod(0o755)
        self.directory = self.root / "t"
        try:
            self.bed = testbed.up(self.directory, testbed.Settings(**options))
        except BaseException:
            shutil.rmtree(self.root, ignore_errors=True)
            raise
        self.conf = self.bed.conf
        self.scratch = self.bed.scratch
        self.nodes = [node.name for node in self.bed.nodes]
        self._killed: set[str] = set()

    @property
    def env(self) -> dict[str, str]:
        """Environment for subprocesses: Slurm's commands in it talk to this cluster."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        return {**kept, "SLURM_CONF": str(self.conf)}

    def folder(self, name: str) -> Path:
        """Return a fresh directory that every node sees and every user may write to."""
        path = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.root))
        path.chmod(0o1777)
        return path

    def home(self, name: str) -> Path:
        """Return a fresh directory that every node sees, of the user that the tests are about."""
        path = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.root))
        os.chown(path, user_id(), -1)
        path.chmod(0o755)
        return path

    def run(self, *argv: str, timeout_s: float = 60) -> str:
        """Run a command against this cluster; it must succeed; return what it printed."""
        done = subprocess.run(
            argv, env=self.env, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert done.returncode == 0, f"{argv} ended {done.returncode}:\n{done.stderr}"
        return done.stdout

    def run_as_user(self, *argv: str) -> str:
        """Run a command as the user that the tests are about; return what it printed."""
        return self.run(*as_user(self.root), *argv).strip()

    def jobs(self, name: str | None = None) -> list[slurm.QueueEntry]:
        """Return all jobs, or those of a name, of the user that the tests are about."""
        return slurm.queue(name=name, user=user_id(), conf=self.conf)

    def submit(self, body: str, *options: str) -> slurm.JobId:
        """Submit a batch script (given without its first line) and return its job id."""
        folder = self.folder("job")
        script = folder / "job.sh"
        script.write_text(f"#!/bin/bash\n{body}\n")
        defaults = ["-D", str(folder), "-o", f"{folder}/%A_%a.log", "--open-mode=append"]
        return slurm.sbatch([*defaults, *options], script=script, conf=self.conf)

    def queue(self, job: str) -> list[slurm.QueueEntry]:
        """Return what squeue says of a job."""
        return slurm.queue([job], conf=self.conf)

    def show(self, job: str) -> slurm.JobInfo:
        """Return the one record that scontrol has of a job or element."""
        (info,) = slurm.show_job(job, conf=self.conf)
        return info

    def wait_until(
        self,
        predicate: Callable[[], bool],
        timeout_s: float,
        describe: Callable[[], object] | str,
    ) -> None:
        """Wait for a condition; on time-out fail with ``describe`` and what Slurm shows."""
        deadline = time.monotonic() + timeout_s
        while not predicate():
            if time.monotonic() >= deadline:
                what = describe if isinstance(describe, str) else describe()
                pytest.fail(f"not within {timeout_s:g} s: {what}\n{self.evidence()}")
            time.sleep(POLL_S)

    def wait_ended(self, job: str, timeout_s: float = 60) -> list[str]:
        """Wait until every element of a job has ended; return their states in index order."""
        entries: list[slurm.QueueEntry] = []

        def ended() -> bool:
            entries[:] = self.queue(job)
            return bool(entries) and all(entry.ended for entry in entries)

        self.wait_until(ended, timeout_s, lambda: f"job {job} ended: {entries}")
        return [entry.state for entry in sorted(entries, key=lambda entry: entry.array_task or 0)]

    def wait_running(self, job: str, timeout_s: float = 30) -> None:
        """Wait until a job, or every element of it, runs."""

        def running() -> bool:
            entries = self.queue(job)
            return bool(entries) and all(entry.state == "RUNNING" for entry in entries)

        self.wait_until(running, timeout_s, lambda: f"job {job} runs: {self.queue(job)}")

    def preempt(self, job: str, *, hold_s: int = 30) -> slurm.JobId:
        """Preempt a running low job; return the preemptor's id."""
        return testbed.preempt(self.directory, job, hold_s=hold_s)

    def change(self, entity: str, **fields: object) -> None:
        """Change a partition or node by ``scontrol update``: ``change("NodeName=n1", State=...)``.

        What a test changes of a partition it changes back; nodes are resumed by ``clear``.
        """
        slurm.update([entity, *(f"{k}={v}" for k, v in fields.items())], conf=self.conf)

    def drain(self, node: str) -> None:
        """Let no further job start on a node; what runs there goes on."""
        self.change(f"NodeName={node}", State="DRAIN", Reason="test")

    def resume(self, node: str) -> None:
        """Take a drained node into use again."""
        self.change(f"NodeName={node}", State="RESUME")

    def set_time_limit(self, job: str, limit: str) -> None:
        """Change the time limit of a job or element: minutes, or ``MM:SS``."""
        self.change(f"JobId={job}", TimeLimit=limit)

    @contextlib.contextmanager
    def paused_controller(self) -> Iterator[None]:
        """Freeze slurmctld: no command gets an answer, and what was asked may happen later."""
        testbed.pause_controller(self.directory)
        try:
            yield
        finally:
            testbed.continue_controller(self.directory)
            self.wait_until(lambda: slurm.ping(conf=self.conf), 60, "slurmctld answers")

    @contextlib.contextmanager
    def killed_controller(self) -> Iterator[None]:
        """Kill slurmctld and start it again afterwards; it forgets nothing that happened before."""
        self._wait_saved()
        testbed.fail_controller(self.directory)
        try:
            yield
        finally:
            testbed.restore_controller(self.directory)

    def _wait_saved(self) -> None:
        # slurmctld saves some seconds after a change; a held job's name shows that it did.
        name = f"saved-{secrets.token_hex(4)}"
        job = self.submit("true", "--hold", "-J", name)
        saved = self.directory / "save" / "job_state"
        self.wait_until(
            lambda: saved.exists() and name.encode() in saved.read_bytes(),
            30,
            "slurmctld saves its state",
        )
        slurm.cancel([job], conf=self.conf)

    def kill_node(self, node: str) -> None:
        """Kill a node's slurmd; its jobs run on as zombies."""
        testbed.fail_node(self.directory, node)
        self._killed.add(node)

    def is_killed(self, node: str) -> bool:
        """Tell whether a node's slurmd was killed and not started again."""
        return node in self._killed

    def restore_node(self, node: str) -> None:
        """Start a killed node again and wait until Slurm uses it."""
        testbed.restore_node(self.directory, node)
        self._killed.discard(node)
        self.wait_until(
            lambda: not self.node_state(node).startswith("down") and self._responds(node),
            60,
            lambda: f"{node} is back: {self.node_state(node)}",
        )

    def node_state(self, node: str) -> str:
        """Return Slurm's word for a node's state; a trailing ``*`` means it does not respond."""
        return next(n.state for n in slurm.nodes(conf=self.conf) if n.name == node)

    def _responds(self, node: str) -> bool:
        return not self.node_state(node).endswith("*")

    def wait_idle(self, timeout_s: float = 90) -> None:
        """Wait until every node that was not killed is idle."""

        def idle() -> bool:
            states = {node.name: node.state for node in slurm.nodes(conf=self.conf)}
            return all(states[name] == "idle" for name in self.nodes if name not in self._killed)

        self.wait_until(idle, timeout_s, "the nodes are idle")

    def disk(self, node: str) -> Path:
        """Return a node's scratch as seen from outside."""
        return next(n.disk for n in self.bed.nodes if n.name == node)

    def clear(self) -> None:
        """Cancel all jobs, bring killed and drained nodes back, empty the scratch.

        Whatever the test did: by then no process of any attempt lives.
        """
        for partition in slurm.partitions(conf=self.conf):
            self.run("scancel", "-p", partition.name)  # by its filter: every user's jobs
        for node in sorted(self._killed):
            self.restore_node(node)
        for entry in slurm.nodes(conf=self.conf):
            if entry.state.startswith(("drain", "down")):
                slurm.update([f"NodeName={entry.name}", "State=RESUME"], conf=self.conf)
        self.wait_idle()
        self.wait_until(lambda: not self.left_running(), 60, self.left_running)
        for node in self.bed.nodes:
            for path in node.disk.iterdir():
                _remove(path)

    def left_running(self) -> list[str]:
        """Return the living processes of attempts of every run on this cluster."""
        runs = [json.loads(path.read_bytes())["run_id"] for path in self.root.glob("*/*/run.json")]
        marks = [f"HPCRESUME_ATTEMPT={run}".encode() for run in runs]
        return list(living([*marks, os.fsencode(self.scratch / "hpcresume-")]))

    def evidence(self) -> str:
        """Return the nodes, the queue and the end of the controller's log."""
        parts = []
        for argv in (["sinfo", "-N", "-l"], ["squeue", "-t", "all"]):
            with contextlib.suppress(subprocess.TimeoutExpired):
                done = subprocess.run(
                    argv, env=self.env, capture_output=True, text=True, timeout=20, check=False
                )
                parts.append(done.stdout + done.stderr)
        log = self.directory / "log" / "slurmctld.log"
        parts += log.read_text(errors="replace").splitlines()[-15:] if log.exists() else []
        return "\n".join(parts)

    def close(self) -> None:
        """Take it down; fail if one of its daemons died without having been killed."""
        bed = testbed.status(self.directory)
        evidence = self.evidence()
        testbed.down(self.directory)
        shutil.rmtree(self.root, ignore_errors=True)
        assert bed is not None, "the testbed was taken down by somebody else"
        assert bed.dead == (), f"daemons that died by themselves\n{evidence}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def cluster(**options: Any) -> Iterator[SlurmCluster]:
    """Bring a cluster up and take it down; skip (or fail) where that cannot be done."""
    require_slurm(accounting=options.get("accounting", True))
    made = SlurmCluster(**options)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def bare_directory() -> Iterator[Path]:
    """Return a short path for a testbed that the test itself brings up and down."""
    require_slurm()
    root = Path(tempfile.mkdtemp(prefix="hpcr-"))
    root.chmod(0o755)
    try:
        yield root / "t"
    finally:
        shutil.rmtree(root, ignore_errors=True)


def require_slurm(*, accounting: bool = True) -> None:
    """Skip the test where no testbed can be brought up, or fail if one is required."""
    try:
        testbed.require(accounting=accounting)
    except TestbedError as error:
        give_up(str(error))


def require_cgroups() -> None:
    """Skip the test where Slurm cannot use control groups, or fail if it must."""
    if not cgroups.usable():
        give_up("cgroup v1 with memory and freezer is not usable here")


def give_up(reason: str) -> None:
    """Skip with a reason, or fail with it if ``HPCRESUME_TEST_REQUIRE_SLURM=1``."""
    if os.environ.get("HPCRESUME_TEST_REQUIRE_SLURM") == "1":
        pytest.fail(f"HPCRESUME_TEST_REQUIRE_SLURM=1, but: {reason}")
    pytest.skip(reason)


def _shared(proctrack: Proctrack) -> Iterator[SlurmCluster]:
    if proctrack == "cgroup":
        require_cgroups()
    with cluster(proctrack=proctrack) as made:
        yield made


@pytest.fixture(scope="session")
def shared_cgroup_cluster() -> Iterator[SlurmCluster]:
    """Return the session's cluster with proctrack/cgroup."""
    yield from _shared("cgroup")


@pytest.fixture(scope="session")
def shared_linuxproc_cluster() -> Iterator[SlurmCluster]:
    """Return the session's cluster with proctrack/linuxproc."""
    yield from _shared("linuxproc")


@pytest.fixture(scope="session")
def limited_cluster() -> Iterator[SlurmCluster]:
    """Return a cluster whose arrays have at most 8 tasks and whose users at most 12 jobs."""
    with cluster(max_array_size=8, max_submit=12) as made:
        yield made


@pytest.fixture
def cgroup_cluster(shared_cgroup_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """Return an idle cluster with proctrack/cgroup; it is cleared after the test."""
    yield shared_cgroup_cluster
    shared_cgroup_cluster.clear()


@pytest.fixture
def linuxproc_cluster(shared_linuxproc_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """Return an idle cluster with proctrack/linuxproc; it is cleared after the test."""
    yield shared_linuxproc_cluster
    shared_linuxproc_cluster.clear()


@pytest.fixture
def slurm_cluster(request: pytest.FixtureRequest) -> SlurmCluster:
    """Return the session's cluster with proctrack/cgroup, or without it where it cannot be."""
    name = "cgroup_cluster" if cgroups.usable() else "linuxproc_cluster"
    made: SlurmCluster = request.getfixturevalue(name)
    return made


@pytest.fixture(params=["cgroup", "linuxproc"])
def each_cluster(request: pytest.FixtureRequest) -> SlurmCluster:
    """Return the session's cluster of each process tracker in turn."""
    made: SlurmCluster = request.getfixturevalue(f"{request.param}_cluster")
    return made
