"""Runs whose processes are watched from outside: what they hold, and how long they take to stop."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from hpcresume.run.directory import RunDir
from hpcresume.segment.segment import open_segment
from tests.bench import ours

POLL_S = 0.05
_PATIENCE_S = 600.0
MB = 1e6


@dataclass
class Memory:
    """What a run of very many sources held.

    Attributes:
        after_start: Anonymous memory of the driver when the first worker was set up, in bytes.
        driver: The same later, as (completed sources, bytes); published counts in between.
        supervisor: Most resident memory of the supervisor, in bytes.
        resident: Most resident memory of the driver, in bytes.
        ended: The run.
    """

    after_start: int = 0
    driver: list[tuple[float, int]] = field(default_factory=list)
    supervisor: int = 0
    resident: int = 0
    ended: ours.Ended | None = None

    def at(self, sources: float) -> int:
        """Return what the driver held when it had completed so many sources."""
        return next((held for done, held in self.driver if done >= sources), self.driver[-1][1])

    @property
    def beyond_mb(self) -> float:
        """The most that the driver held beyond what it had at its start, in MB."""
        return (max(held for _, held in self.driver) - self.after_start) / MB


def memory(directory: Path, cores: int, sources: int, *options: str) -> Memory:
    """Run so many trivial sources and watch what the task's processes hold."""
    found, samples = Memory(), []
    with ours.start(directory, cores, "--sync-interval", "1", *options, n=sources) as process:
        while process.poll() is None:
            supervisor, driver = _task(process)
            found.supervisor = max(found.supervisor, resident(supervisor))
            found.resident = max(found.resident, resident(driver))
            if (directory / "began").exists() and (held := anonymous(driver)):
                samples.append((time.time(), held))
                found.after_start = found.after_start or held
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_S)
    found.ended = ours.ended(directory, process)
    progress = _progress(found.ended.run)
    found.driver = [(_done(progress, at), held) for at, held in samples]
    return found


def _progress(run: Path) -> list[tuple[float, int]]:
    """Return when how many sources were completed, as the segments tell."""
    opened = RunDir.open(str(run))
    footers = [
        open_segment(opened.fs, opened.segment_path(name), run_id=opened.run_id).footer
        for ref in opened.all_attempts()
        for name in opened.segments(ref)
    ]
    return sorted((f.progress.written_at, f.progress.completed) for f in footers)


def _done(progress: list[tuple[float, int]], at: float) -> float:
    """Return how many sources were completed at a moment, between what is known."""
    before = max((point for point in progress if point[0] <= at), default=None)
    after = min((point for point in progress if point[0] > at), default=None)
    if before is None or after is None:
        return float(before[1]) if before else 0.0
    part = (at - before[0]) / (after[0] - before[0])
    return before[1] + part * (after[1] - before[1])


def drain(
    directory: Path, cores: int, *options: str, published: bool
) -> tuple[float, dict[str, Any]]:
    """Return the seconds from SIGTERM to the end of a task with a million completed sources.

    Args:
        directory: Where.
        cores: Of the task.
        options: Of ``submit``.
        published: Whether it published every second; otherwise it has published nothing.

    Raises:
        RuntimeError: The task ended before, or not as one that was told to stop.
    """
    interval = "1" if published else "1000"
    (directory / "hpcresume.toml").write_text(f"[sync]\nfirst_age_s = {interval}.0\n")
    options = ("--sync-interval", interval, *options)
    with ours.start(directory, cores, *options, n=1 << 30, form="reaching") as process:
        try:
            _wait(process, (directory / "reached").exists)
            supervisor, _ = _task(process)
            if supervisor is None:
                raise RuntimeError(f"no array task: {(directory / 'log').read_text()}")
            before = _published(directory / "run")
            seconds = _stop(supervisor)
        finally:
            # Not SIGINT, which what a shell runs in the background ignores.
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE_S)
            process.kill()
    opened = RunDir.open(str(directory / "run"))
    outcome = opened.outcome(next(opened.all_attempts()))
    if outcome is None or outcome.state != "saved":
        raise RuntimeError(f"it ended as {outcome}")
    rest = _published(directory / "run") - before
    return seconds, {"completed": outcome.completed, "published_before": before, "rest": rest}


def _stop(supervisor: psutil.Process) -> float:
    fd = os.pidfd_open(supervisor.pid)
    try:
        start = time.perf_counter()
        signal.pidfd_send_signal(fd, signal.SIGTERM)
        if not select.select([fd], [], [], _PATIENCE_S)[0]:
            raise RuntimeError("it did not end")
        return time.perf_counter() - start
    finally:
        os.close(fd)


def _published(run: Path) -> int:
    return sum(path.stat().st_size for path in run.glob("rounds/*/tasks/*/e*/seg-*"))


def plain_copy_s(directory: Path, size_bytes: int) -> float:
    """Return the seconds that writing, syncing and reading back so many bytes take."""
    path, piece, left = directory / "plain", os.urandom(1 << 20), size_bytes
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        while left > 0:
            left -= file.write(piece[:left])
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
    return time.perf_counter() - start


def _wait(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{process.args} ended with {process.poll()}")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S / 5)


def _task(process: subprocess.Popen[bytes]) -> tuple[psutil.Process | None, psutil.Process | None]:
    """Return the supervisor and the driver below a submitting process, as far as they run."""
    found: dict[str, psutil.Process] = {}
    with contextlib.suppress(psutil.Error):
        for supervisor in psutil.Process(process.pid).children():
            for child in (supervisor, *supervisor.children()):
                with contextlib.suppress(psutil.Error):
                    command = child.cmdline()
                    for module in ("supervisor", "driver"):
                        if f"hpcresume.task.{module}" in command:
                            found[module] = child
    return found.get("supervisor"), found.get("driver")


def resident(process: psutil.Process | None) -> int:
    """Return a process's resident memory in bytes, 0 once it is gone."""
    if process is not None:
        with contextlib.suppress(psutil.Error):
            return int(process.memory_info().rss)
    return 0


def anonymous(process: psutil.Process | None) -> int:
    """Return what a process holds that no file backs, in bytes, 0 once it is gone."""
    if process is not None:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) << 10
    return 0
