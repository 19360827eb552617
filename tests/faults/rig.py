"""One array task under a fault: started as Slurm starts it, watched, and judged afterwards.

:class:`Rig` prepares a run of known answer and starts attempts of its one array task.
:meth:`Rig.verdict` is the check that every row of the fault matrix shares: the result is
exact, nobody is charged, no published name changed, modes are private, no database lies in
the run directory, and nothing of any attempt remains on this machine.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from hpcresume.launch.rounds import plan_round, settle
from hpcresume.launch.submit import Submission, make_ready
from hpcresume.ledger.store import Ledger
from hpcresume.merge.generation import Union, read_union
from hpcresume.run.directory import Outcome, RunDir
from hpcresume.segment.frame import decode_frame
from tests.support.cli import Command, wait_until
from tests.support.local import family, held_shm, kill_family, living
from tests.support.pipelines import fan_result, write_fan
from tests.support.sharedfs import SharedFs

DRAIN_S = 4.0
EXIT_S = 10.0
"""What an attempt may take beyond its drain time: KillWait is 30 s, drain_s 20 s by default."""
LOAD_S = 10.0
"""What a busy machine may add."""


@dataclass
class Attempt:
    """A running attempt of the array task."""

    process: subprocess.Popen[bytes]
    log: Path
    progress_fd: int
    said: list[dict[str, Any]] = field(default_factory=list)
    _buffer: bytes = b""

    def said_last(self) -> dict[str, Any]:
        """Return the last progress that the supervisor reported, empty before the first."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.progress_fd, 1 << 16):
                *lines, self._buffer = (self._buffer + data).split(b"\n")
                self.said += map(json.loads, lines)
        return self.said[-1] if self.said else {}

    def committed(self) -> int:
        """Return how many sources the attempt has said are committed."""
        return int(self.said_last().get("committed", 0))

    def describe(self) -> str:
        """Return evidence for a failure."""
        return f"ended: {self.process.poll()}\n{self.said_last()}\n{self.log.read_text()}"

    def wait_for(self, condition: Any, *, timeout_s: float = 60) -> None:
        """Wait until something is so, or fail with the attempt's log."""
        wait_until(condition, timeout_s=timeout_s, describe=self.describe)

    def wait_committed(self, sources: int) -> None:
        """Wait until so many sources are committed."""
        self.wait_for(lambda: self.committed() >= sources)

    def wait(self, *, timeout_s: float = 90) -> int:
        """Wait for the end and return the exit status."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not over within {timeout_s:g} s:\n{self.describe()}") from None

    def stop(self, *, drain_s: float = DRAIN_S) -> int:
        """Send SIGTERM; the attempt leaves within its grace, whatever else is broken."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait(timeout_s=drain_s + EXIT_S + LOAD_S)

    def freeze(self) -> None:
        """Stop every process of the attempt where it is."""
        for process in family(self.process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()

    def thaw(self) -> None:
        """Let the processes go on."""
        for process in family(self.process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def kill(self) -> None:
        """Kill every process of the attempt at once, as the end of a grace period does."""
        kill_family(self.process.pid)
        self.process.wait(30)


@dataclass
class Rig:
    """A run of the fan-out pipeline and its one array task.

    Attributes:
        desk: The user's directory.
        run: The run directory.
        local: The node-local directory, with a short name so that Ray's sockets fit below.
        shared: The file system that the run directory is on, where it is one with faults.
        n: Number of sources.
    """

    desk: Path
    run: Path
    local: Path
    shared: SharedFs | None = None
    n: int = 40
    engine: str = "inline"
    attempts: list[Attempt] = field(default_factory=list)
    _shm: set[str] = field(default_factory=lambda: set(os.listdir("/dev/shm")))

    @property
    def calls(self) -> Path:
        """The file that holds a line per execution."""
        return self.desk / "calls"

    def prepare(self, *, ms: int = 30, **settings: Mapping[str, Any]) -> Rig:
        """Create the run and plan its first round; nothing is started.

        Args:
            ms: What each source takes.
            settings: Sections of the settings, over those that the rows share.
        """
        flags: dict[str, dict[str, Any]] = {
            "task": {"engine": self.engine, "local_dir": str(self.local), "drain_s": DRAIN_S},
            "sync": {"max_age_s": 0.5, "first_age_s": 0.2},
        }
        for section, values in settings.items():
            flags.setdefault(section, {}).update(values)
        ready = make_ready(
            Submission(
                target=str(write_fan(self.desk)),
                params={"n": self.n, "ms": ms, "calls": str(self.calls)},
                flags=flags,
                run_dir=self.run,
                cluster="local",
                array=1,
                cwd=self.desk,
            )
        )
        prepared = ready.prepared
        plan_round(
            prepared.run,
            prepared.manifest,
            settle(prepared.run, prepared.manifest, ready.resolved.settings),
            after=None,
            settings=ready.resolved.settings,
            code=prepared.code,
            launch=ready.launch,
        )
        return self

    def start(self, *, env: Mapping[str, str] | None = None, **popen: Any) -> Attempt:
        """Start an attempt of the array task; its log is not on the faulty file system."""
        read, write = os.pipe()
        os.set_blocking(read, False)
        log = self.desk / f"attempt-{len(self.attempts)}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-u", "-P", "-m", "hpcresume.task.supervisor"),
                    *(str(self.run), "0", "0"),
                ],
                env={
                    **os.environ,
                    "HPCRESUME_PROGRESS_FD": str(write),
                    "HPCRESUME_CPUS": "1",
                    "PYTHONDONTWRITEBYTECODE": "1",
                    **(env or {}),
                },
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                pass_fds=(write,),
                start_new_session=True,
                **popen,
            )
        os.close(write)
        self.attempts.append(Attempt(process, log, read))
        return self.attempts[-1]

    def begin(self, *, committed: int = 3) -> Attempt:
        """Start an attempt and wait until it has committed its first sources."""
        attempt = self.start()
        attempt.wait_committed(committed)
        return attempt

    def executions(self) -> collections.Counter[int]:
        """Return how often each source was executed."""
        lines = self.calls.read_text().split() if self.calls.exists() else []
        return collections.Counter(map(int, lines))

    def union(self) -> Union:
        """Return what the run directory holds, as a merge here would find it."""
        return read_union(RunDir.open(str(self.run)), max_attempts=3)

    def stored(self) -> Union:
        """Return what the run directory holds, as its file server sees it."""
        path = self.shared.backing / "run" if self.shared is not None else self.run
        return read_union(RunDir.open(str(path)), max_attempts=3)

    def wait_published(self, attempt: Attempt, sources: int) -> int:
        """Freeze an attempt that has receipts for so many sources; return for how many."""

        def promised() -> int:
            attempt.freeze()
            # What was committed and is not in the ledger any more had a receipt.
            found = attempt.committed() - len(self.pending())
            if found < sources:
                attempt.thaw()
            return max(0, found - sources + 1)

        attempt.wait_for(promised)
        return attempt.committed() - len(self.pending())

    def outcome(self, epoch: int = 1) -> Outcome | None:
        """Return how an attempt ended."""
        path = self.run / f"rounds/0000/tasks/00000/e{epoch:03d}/outcome.json"
        run = RunDir.open(str(self.run))
        return run.read_record(str(path), Outcome)

    def pending(self) -> set[int]:
        """Return the sources that dead attempts' ledgers on this node hold."""
        found: set[int] = set()
        for path in self.local.glob("hpcresume-*/*/*/ledger"):
            with contextlib.closing(Ledger.open_verified(str(path))) as ledger:
                for _, commit in ledger.pending():
                    for frame in commit.frames:
                        found |= set(decode_frame(frame, what=str(path)).completed)
        return found

    def lose_node(self) -> None:
        """Remove everything node-local, as where the next attempt runs on another node."""
        for path in self.local.iterdir():
            shutil.rmtree(path)

    def finish(self, *, rc: int = 0) -> None:
        """Complete the run with one ordinary command, and collect it."""
        Command(self.desk).run(
            *("submit", str(self.run), "--cluster", "local", "--engine", "inline"),
            *("--local-dir", str(self.local), "--collect", "out.jsonl"),
            rc=rc,
            timeout_s=120,
        )

    def verdict(self, *, executions: int | None = None) -> None:
        """Complete the run and check all that holds for every row.

        Args:
            executions: How often a source may have been executed at most; by default once
                for every attempt that was started.
        """
        if self.shared is not None:
            self.shared.heal()
        published = set(self.union().completed) if (self.run / "run.json").exists() else set()
        self.finish()
        most = len(self.attempts) + 1 if executions is None else executions
        counts = self.executions()
        assert fan_result(self.n) == (self.desk / "out.jsonl").read_bytes()
        assert published <= set(self.union().completed)
        assert {} == self.union().failures
        assert set(range(self.n)) == set(counts)
        assert max(counts.values()) <= most
        self.check_nothing_remains()
        self.check_private()
        if self.shared is not None:
            assert [] == self.shared.violations()

    def check_private(self) -> None:
        """Nothing in the run directory or on the node is open to others, or a database."""
        open_to_others, databases = [], []
        for top in (self.run, *self.local.iterdir()):
            for directory, _, names in os.walk(top):
                for path in (directory, *(os.path.join(directory, name) for name in names)):
                    status = os.lstat(path)
                    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
                        open_to_others.append(f"{path} {stat.filemode(status.st_mode)}")
                    if top == self.run and path.endswith(".mdb"):
                        databases.append(path)
        assert [] == open_to_others
        assert [] == databases

    def check_nothing_remains(self, *, timeout_s: float = 30) -> None:
        """No process, socket, shared memory or directory of any attempt is left here."""
        wait_until(
            lambda: not self.remains(),
            timeout_s=timeout_s,
            describe=lambda: "\n".join(self.remains()),
        )

    def remains(self) -> list[str]:
        """Return what attempts have left on this machine."""
        marks = [f"HPCRESUME_ATTEMPT={self._run_id()}".encode(), os.fsencode(self.local)]
        found = [f"process {line}" for line in living(marks)]
        found += [f"directory {path}" for path in self.local.glob("hpcresume-*/*/*")]
        found += [f"directory {path}" for path in self.local.glob("hr-*")]
        with open("/proc/net/unix", encoding="utf-8") as sockets:
            found += [f"socket {line.strip()}" for line in sockets if str(self.local) in line]
        fresh = set(os.listdir("/dev/shm")) - self._shm
        return found + [f"shared memory {name}" for name in fresh - held_shm()]

    def _run_id(self) -> str:
        path = self.run / "run.json"
        return str(json.loads(path.read_bytes())["run_id"]) if path.exists() else "no run"

    def close(self) -> None:
        """End what a failed test left running, by its pid."""
        for attempt in self.attempts:
            kill_family(attempt.process.pid)
            os.close(attempt.progress_fd)


@contextlib.contextmanager
def make_rig(desk: Path, *, run: Path | None = None, **values: Any) -> Iterator[Rig]:
    """Yield a rig with a node-local directory of its own, removed afterwards.

    Whatever the row: at its end every attempt has left, and nothing of one remains.
    """
    local = Path(tempfile.mkdtemp(prefix="hrf", dir="/tmp"))
    rig = Rig(desk, run or desk / "run", local, **values)
    try:
        yield rig
        rig.check_nothing_remains()
    finally:
        if rig.shared is not None:
            with contextlib.suppress(AssertionError, OSError):
                rig.shared.heal()
        rig.close()
        shutil.rmtree(local, ignore_errors=True)


def seconds_since(start: float) -> float:
    """Return the seconds since a moment of the monotonic clock."""
    return time.monotonic() - start
