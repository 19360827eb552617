"""Soak: a pipeline of known answer on a real Slurm, under faults of all kinds at once.

``python -m tests.soak --minutes 30 --seed 1`` brings up a testbed whose shared file system
fails on demand, submits run after run, and lets something go wrong every few seconds:
processes killed or frozen at every level, preemptions, requeues, node failures, a controller
that hangs, a file system that is full, errs, hangs, loses replies or shows old listings, and
clocks that jump.  One seed decides what and when.  Each run is then left in peace, has to come
to its end, and is compared with its known answer.  Needs root and Slurm, as the tests do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from hpcresume import testbed
from hpcresume.errors import HpcResumeError
from hpcresume.merge.generation import load_newest
from hpcresume.run.directory import RunDir
from tests.support.cli import Command
from tests.support.cluster import SlurmCluster, cluster
from tests.support.local import family, held_shm, kill_family
from tests.support.pipelines import fan_result, write_fan
from tests.support.places import REPOSITORY
from tests.support.sharedfs import Rule, SharedFs, shared_fs

CLOCK = """
import time
_real, _calls = time.time, iter(range(10**9))
def _jumping():
    return _real() + (-3600, 3600, 0)[next(_calls) % 3]
time.time = _jumping
"""
RETIRE = """
import sys
from hpcresume.merge.retention import fold_rest, remove_held
from hpcresume.run.directory import RunDir
run = RunDir.open(sys.argv[1])
fold_rest(run)
remove_held(run)
"""
STRIKES = (
    Rule("write", "ENOSPC", ".tmp-*"), Rule("write", "EIO", ".tmp-*"), Rule("write", "short"),
    Rule("fsync", "EDQUOT", ".tmp-*"), Rule("fsync", "EIO", ".tmp-*"),
    Rule("flush", "EDQUOT", ".tmp-*"), Rule("create", "EACCES", ".tmp-*"),
    Rule("rename", "ESTALE", "seg-*"), Rule("rename", "ENOENT", "seg-*", after=True),
    Rule("link", "EEXIST", after=True), Rule("link", "EIO"), Rule("mkdir", "EEXIST", after=True),
    Rule("open", "ESTALE", "seg-*"), Rule("open", "EIO", "gen-*"), Rule("open", "EIO", "pack-*"),
    Rule("opendir", "ESTALE", "e0*"), Rule("fsyncdir", "EIO"), Rule("unlink", "EIO", "seg-*"),
    Rule("lookup", "old-size", "seg-*"), Rule("fsync", "hang"), Rule("write", "hang"),
    Rule("opendir", "hang"), Rule("rename", "hang"),
)  # fmt: skip
"""What a file system may do: for some seconds, or to the next calls only."""
LEVELS = {
    "Ray worker": "ray::", "raylet": "raylet/raylet", "GCS": "gcs_server",
    "driver": "hpcresume.task.driver", "publisher": "hpcresume.task.publisher",
}  # fmt: skip
"""Processes of an attempt by what their command line holds."""
CALM_S = 900.0
ORPHANS_S = 120.0
_REMOVAL = re.compile(r"^unlink .*/seg-[^/]*$")


@dataclass
class Tally:
    """What happened, and what came of it.

    Attributes:
        left_on_nodes: Directories of attempts that were killed whole, on nodes that their run
            did not use again; only an attempt of the same run sweeps them.
    """

    faults: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    sources: int = 0
    executed_again: int = 0
    rows_lost: int = 0
    rows_doubled: int = 0
    unfinished: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    left_on_nodes: int = 0

    @property
    def is_right(self) -> bool:
        """Whether nothing was lost, doubled or changed, and nothing runs on."""
        bad = (self.rows_lost, self.rows_doubled, self.unfinished, self.changed, self.orphans)
        return not any(bad)

    def to_dict(self) -> dict[str, Any]:
        """Return it for ``--json``."""
        return {
            "schema": 1,
            "faults": dict(sorted(self.faults.items())),
            "faults_total": self.faults.total(),
            "runs": self.runs,
            "sources_done": self.sources,
            "duplicates_executed": self.executed_again,
            "rows_lost": self.rows_lost,
            "rows_doubled": self.rows_doubled,
            "runs_unfinished": self.unfinished,
            "published_files_changed": self.changed,
            "orphans": self.orphans,
            "directories_left_on_nodes": self.left_on_nodes,
        }

    def table(self) -> str:
        """Return it as Markdown."""
        said = self.to_dict()
        lines = ["| fault | times |", "|---|---|"]
        lines += [f"| {kind} | {times} |" for kind, times in said.pop("faults").items()]
        lines += ["", "| | |", "|---|---|"]
        shown = {key: len(v) if isinstance(v, list) else v for key, v in said.items()}
        lines += [f"| {key.replace('_', ' ')} | {v} |" for key, v in shown.items()]
        return "\n".join([*lines, *self.unfinished, *self.changed, *self.orphans])


@dataclass
class Soaked:
    """A run of known answer on the faulty file system.

    Attributes:
        command: The user's directory, which is on a good one.
        path: The run directory.
        backing: The same where no fault reaches it.
        n: Number of its sources.
        options: How it is submitted.
    """

    command: Command
    path: Path
    backing: Path
    n: int
    options: tuple[str, ...]

    @property
    def calls(self) -> Path:
        """Where every execution of a source is counted."""
        return self.command.directory / "calls"

    def opened(self) -> RunDir:
        """Return it as its file server sees it."""
        return RunDir.open(str(self.backing))

    def is_finished(self) -> bool:
        """Tell whether nothing is left to do."""
        with contextlib.suppress(HpcResumeError, OSError):
            return load_newest(self.opened()).finished
        return False

    def submit(self) -> bool:
        """Submit it, or go on with it; tell whether that was taken."""
        target = str(self.path) if self.backing.exists() else "fan.py"
        with contextlib.suppress(AssertionError):
            self.command.run("submit", target, *self.options, timeout_s=120)
            return True
        return False

    def supervisors(self) -> list[psutil.Process]:
        """Return the living attempts, each by its first process."""
        found = []
        for path in self.backing.glob("rounds/*/tasks/*/e*/attempt.json"):
            with contextlib.suppress(psutil.Error, ValueError, KeyError, OSError):
                process = psutil.Process(json.loads(path.read_bytes())["pid"])
                if str(self.path) in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def counted(self) -> tuple[int, int, int]:
        """Collect; return rows lost, rows doubled, and executions beyond the first."""
        self.command.run("collect", str(self.path), "-o", "out.jsonl", rc=None)
        out = self.command.directory / "out.jsonl"
        found = Counter(out.read_bytes().splitlines() if out.exists() else [])
        expected = Counter(fan_result(self.n).splitlines())
        calls = Counter(self.calls.read_text().split() if self.calls.exists() else [])
        again = calls.total() - len(calls)
        return (expected - found).total(), (found - expected).total(), again


class Faults:
    """What goes wrong; every method says what it did, or nothing where there was nothing to hit."""

    def __init__(self, chance: random.Random, bed: SlurmCluster, shared: SharedFs) -> None:
        self._chance, self._bed, self._shared = chance, bed, shared
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._struck: Rule | None = None
        self._told: list[str] = []
        self._is_paused = False
        self._down = ""
        self._frozen: list[psutil.Process] = []

    def one(self, run: Soaked) -> str:
        """Let something go wrong; return what."""
        kinds: list[tuple[int, Callable[[Soaked], str]]] = [
            (6, self._kill), (1, self._kill_task), (1, self._freeze), (1, self._stop_driver),
            (2, self._preempt), (2, self._requeue), (1, self._fail_node), (1, self._pause),
            (2, self._kill_merge), (8, self._strike), (1, self._old_listings), (2, self._retire),
        ]  # fmt: skip
        weights, methods = zip(*kinds, strict=True)
        (method,) = self._chance.choices(methods, weights)
        with contextlib.suppress(psutil.Error, HpcResumeError, AssertionError, IndexError,
                                 subprocess.TimeoutExpired):  # fmt: skip
            return method(run)
        return ""

    def tend(self) -> Iterator[str]:
        """End what has lasted long enough, let requeued tasks start; yield what struck."""
        now = time.monotonic()
        due = [act for when, act in self._later if when <= now]
        self._later = [(when, act) for when, act in self._later if when > now]
        for act in due:
            try:
                act()
            except (HpcResumeError, AssertionError, subprocess.TimeoutExpired):
                # Slurm may not answer now, as something else lasts.
                self._lasts(3, 6, act)
        struck, self._told = self._told, []
        yield from struck
        if not self._is_paused:
            self._start_now()

    def calm(self) -> None:
        """End everything that lasts."""
        while self._later:
            self._later = [(0.0, act) for _, act in self._later]
            list(self.tend())
            time.sleep(1)

    def _lasts(self, least_s: float, most_s: float, act: Callable[[], None]) -> None:
        self._later.append((time.monotonic() + self._chance.uniform(least_s, most_s), act))

    def _start_now(self) -> None:
        """Spare requeued tasks the two minutes that Slurm lets them wait."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired, HpcResumeError):
            for line in self._bed.run("squeue", "-h", "-r", "-t", "PD", "-o", "%i %r").splitlines():
                job, _, reason = line.partition(" ")
                if reason == "BeginTime":
                    self._bed.change(f"JobId={job}", StartTime="now")

    def _attempt(self, run: Soaked) -> psutil.Process:
        return self._chance.choice(run.supervisors())

    def _kill(self, run: Soaked) -> str:
        supervisor = self._attempt(run)
        level = self._chance.choice([*LEVELS, "supervisor"])
        if level == "supervisor":
            supervisor.kill()
            return "kill -9 of a supervisor"
        process = self._chance.choice(_members(supervisor, LEVELS[level]))
        process.kill()
        return f"kill -9 of a {level}"

    def _kill_task(self, run: Soaked) -> str:
        kill_family(self._attempt(run).pid)
        return "kill -9 of a whole task"

    def _freeze(self, run: Soaked) -> str:
        self._frozen = family(self._attempt(run).pid)
        for process in self._frozen:
            with contextlib.suppress(psutil.Error):
                process.suspend()
        self._lasts(3, 30, self._thaw)
        return "a whole task frozen for a while"

    def _thaw(self) -> None:
        for process in self._frozen:
            with contextlib.suppress(psutil.Error):
                process.resume()

    def _stop_driver(self, run: Soaked) -> str:
        _members(self._attempt(run), LEVELS["driver"])[0].suspend()
        return "a driver stopped for good"

    def _running(self) -> str:
        lines = self._bed.run("squeue", "-h", "-r", "-t", "R", "-o", "%i %j %P").splitlines()
        jobs = [line.split()[0] for line in lines if "hpcresume" in line and "_" in line.split()[0]]
        return self._chance.choice(jobs)

    def _preempt(self, _run: Soaked) -> str:
        job = self._running()
        partition = self._bed.run("squeue", "-h", "-r", "-j", job, "-o", "%P").strip()
        self._bed.preempt(job, hold_s=2)
        return f"preemption {'without' if partition == 'nograce' else 'with'} grace"

    def _requeue(self, _run: Soaked) -> str:
        self._bed.run("scontrol", "requeue", self._running())
        return "scontrol requeue"

    def _fail_node(self, _run: Soaked) -> str:
        if self._down or self._is_paused:
            return ""
        self._down = self._chance.choice(self._bed.nodes)
        self._bed.kill_node(self._down)
        self._lasts(30, 70, self._restore)
        return "a node fails, its processes live on"

    def _restore(self) -> None:
        # Where Slurm did not answer after it was started it comes back by itself.
        if self._bed.is_killed(self._down):
            self._bed.restore_node(self._down)
        self._down = ""

    def _pause(self, _run: Soaked) -> str:
        if self._is_paused:
            return ""
        self._is_paused = True
        testbed.pause_controller(self._bed.directory)
        self._lasts(1, 6, self._go_on)
        return "slurmctld paused"

    def _go_on(self) -> None:
        self._is_paused = False
        testbed.continue_controller(self._bed.directory)

    def _kill_merge(self, run: Soaked) -> str:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if "merge" in words and str(run.path) in words:
                    process.kill()
                    return "kill -9 of a merge"
        return ""

    def _strike(self, _run: Soaked) -> str:
        if self._struck is not None:
            return ""
        rule = self._chance.choice(STRIKES)
        times = self._chance.choice((0, 1, 1, 2))
        self._struck = Rule(rule.op, rule.action, rule.names, rule.after, times)
        self._shared.fault(self._struck)
        self._lasts(2, 6, self._heal)
        return ""

    def _heal(self) -> None:
        if (rule := self._struck) is not None and self._shared.hits():
            after = " after its effect" if rule.after else ""
            self._told.append(f"file system: {rule.op} {rule.action}{after}")
        self._struck = None
        self._shared.fault()

    def _old_listings(self, _run: Soaked) -> str:
        self._shared.freeze_listings()
        self._lasts(2, 8, self._shared.heal)
        return "file system: old listings"

    def _retire(self, run: Soaked) -> str:
        """Fold and remove segments while everything works."""
        child = subprocess.Popen(
            [sys.executable, "-c", RETIRE, str(run.path)],
            cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        is_killed = self._chance.random() < 0.3
        self._lasts(3, 20, lambda: _end(child))
        return "segments removed while tasks work" + (", killed on the way" if is_killed else "")


def _end(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGKILL)
    child.wait()


def _members(supervisor: psutil.Process, mark: str) -> list[psutil.Process]:
    found = []
    for process in supervisor.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if mark in " ".join(process.cmdline()):
                found.append(process)
    return found


class Soak:
    """Run after run under faults, until the time or the number of faults is reached."""

    def __init__(
        self, chance: random.Random, bed: SlurmCluster, shared: SharedFs, *, pace_s: float, n: int
    ) -> None:
        self._chance, self._bed, self._shared = chance, bed, shared
        self._pace_s, self._n = pace_s, n
        self._faults = Faults(chance, bed, shared)
        self._shm = set(os.listdir("/dev/shm"))
        self.tally = Tally()

    def go_on(self, *, seconds: float, faults: int) -> None:
        """Soak for so long, or until there were so many faults."""
        end = time.monotonic() + seconds

        def is_over() -> bool:
            return time.monotonic() > end or self.tally.faults.total() >= faults

        while not is_over():
            run = self._begin()
            while not is_over() and not run.is_finished():
                self._note(*self._faults.tend())
                self._note(self._faults.one(run))
                self._keep_going(run)
                time.sleep(self._chance.expovariate(1 / self._pace_s))
            self._judge(run)
        self._count_orphans()

    def _note(self, *kinds: str) -> None:
        for kind in filter(None, kinds):
            self.tally.faults[kind] += 1
            print(f"{self.tally.faults.total():5d} {kind}", file=sys.stderr, flush=True)

    def _begin(self) -> Soaked:
        directory = self._bed.folder("soak")
        write_fan(directory)
        (directory / "clock").mkdir()
        (directory / "clock" / "sitecustomize.py").write_text(CLOCK)
        env = dict(self._bed.env)
        if self._chance.random() < 0.5:
            env["PYTHONPATH"] = str(directory / "clock")
            self._note("a clock that jumps by an hour at every look")
        name = f"run{self.tally.runs}"
        engine = self._chance.choice(("ray", "inline", "inline"))
        options = (
            *("--run-dir", str(self._shared.path / name), "--engine", engine, "--array", "3"),
            *("-c", "1", "-p", self._chance.choice(("low", "nograce"))),
            *("-P", f"n={self._n}", "-P", "ms=60", "-P", f"calls={directory / 'calls'}"),
            *("--local-dir", str(self._bed.scratch), "--sync-interval", "1"),
            *("--max-attempts", "1000"),
        )
        run = Soaked(
            Command(directory, env),
            self._shared.path / name,
            self._shared.backing / name,
            self._n,
            options,
        )
        while not run.submit():
            self._shared.heal()
        self.tally.runs += 1
        return run

    def _keep_going(self, run: Soaked) -> None:
        """Submit again a run that has stopped by itself, as its user would."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            if not self._bed.run("squeue", "-h", "-o", "%i").strip() and not run.is_finished():
                # While it hangs, a user's command would too, and so would this loop.
                self._shared.heal()
                run.submit()

    def _judge(self, run: Soaked) -> None:
        """Leave a run in peace until its end, and compare it with its answer."""
        self._faults.calm()
        self._shared.heal()
        deadline = time.monotonic() + CALM_S
        while not run.is_finished() and time.monotonic() < deadline:
            list(self._faults.tend())
            self._keep_going(run)
            time.sleep(1)
        if not run.is_finished():
            self.tally.unfinished.append(run.command.run("status", str(run.path), rc=None))
        lost, doubled, again = run.counted()
        self.tally.rows_lost += lost
        self.tally.rows_doubled += doubled
        self.tally.executed_again += again
        self.tally.sources += len(load_newest(run.opened()).completed)
        # The file server cannot know that a pack holds what a removal takes away.
        seen = [v for v in self._shared.violations() if not _REMOVAL.search(v)]
        self.tally.changed += [v for v in seen if v not in self.tally.changed]

    def _count_orphans(self) -> None:
        """Count what is left once everything has had the time to end."""
        deadline = time.monotonic() + ORPHANS_S
        while self._has_orphans() and time.monotonic() < deadline:
            time.sleep(1)
        disks = map(self._bed.disk, self._bed.nodes)
        self.tally.left_on_nodes = sum(
            len(list(disk.glob("hpcresume-*/*/*-*-*"))) for disk in disks
        )

    def _has_orphans(self) -> bool:
        self.tally.orphans = list(self._orphans())
        return bool(self.tally.orphans)

    def _orphans(self) -> Iterator[str]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                words = " ".join(process.cmdline())
                if str(self._shared.path) in words and "tests.support.sharedfs" not in words:
                    yield f"process {process.pid} {words}"
        held = held_shm()
        yield from (
            f"shared memory {name}"
            for name in set(os.listdir("/dev/shm")) - self._shm
            if name not in held
        )


def soak(*, minutes: float, seed: int, faults: int, pace_s: float, n: int) -> Tally:
    """Bring everything up, soak, and take it down."""
    place = Path(tempfile.mkdtemp(prefix="hrs-"))
    place.chmod(0o755)
    # The mount comes first: the testbed's nodes see what is mounted when they start.
    with shared_fs(place) as shared, cluster() as bed:
        made = Soak(random.Random(seed), bed, shared, pace_s=pace_s, n=n)
        try:
            made.go_on(seconds=60 * minutes, faults=faults)
        except KeyboardInterrupt:
            made.tally.unfinished.append("interrupted: the last run was not compared")
        return made.tally


def _interrupted(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Soak as the command line says; 1 where anything was lost, doubled or left."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="[default: 10]")
    parser.add_argument("--seed", type=int, default=0, help="[default: 0]")
    parser.add_argument("--faults", type=int, default=1 << 30, help="stop after so many")
    parser.add_argument("--pace", type=float, default=1.5, help="mean seconds between faults")
    parser.add_argument("--sources", type=int, default=400, help="of each run [default: 400]")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    # Also where a shell started it in the background, which lets it ignore Ctrl-C.
    signal.signal(signal.SIGINT, _interrupted)
    tally = soak(
        minutes=options.minutes, seed=options.seed, faults=options.faults, pace_s=options.pace,
        n=options.sources,
    )  # fmt: skip
    print(json.dumps(tally.to_dict()) if options.json else tally.table())
    return 0 if tally.is_right else 1


if __name__ == "__main__":
    sys.exit(main())
