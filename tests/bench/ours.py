"""Run hpcresume as a user does, and time the work of its array task.

The clock runs from the moment the first worker is set up until the attempt has published its
outcome: everything is in it but the start of Ray and the command's own start and end.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PIPELINE = '''
import os
import time
from pathlib import Path

import hpcresume as hr

FAN, REACHED = 10, 1_000_000
HERE = Path(os.environ["BENCH_DIRECTORY"])


class First(hr.Stage):
    """Stage 1; its set-up marks the beginning of the work."""

    def setup(self, worker):
        mark = HERE / "began"
        if not mark.exists():
            mark.write_text(repr(time.time()))

    def process(self, i):
        return i + 1


class FirstCall(First):
    """As above, and notes when the first source is done."""

    def process(self, i):
        mark = HERE / "first"
        if not mark.exists():
            mark.write_text(repr(time.time()))
        return i + 1


class Reaching(First):
    """As above, and marks that a source was reached."""

    def process(self, i):
        if i == REACHED:
            (HERE / "reached").touch()
        return i + 1


def second(x):
    return x * 2


def third(y):
    return {"i": y // 2 - 1, "y": y}


def fan(y):
    for k in range(FAN):
        yield {"i": y // 2 - 1, "y": y, "k": k}


def slow(x):
    until = time.thread_time() + 0.01
    while time.thread_time() < until:
        pass
    return x * 2


def text_of(kb):
    def text(y):
        return {"i": y // 2 - 1, "text": "x" * (kb * 1024 - 30)}
    return text


def batch_of(rows):
    def batch(y):
        import numpy as np
        import pyarrow as pa
        start = (y // 2 - 1) * rows
        ids = np.arange(start, start + rows)
        return pa.record_batch({"id": ids, "x": np.sqrt(ids), "s": pa.array(ids).cast("string")})
    return batch


def pipeline(n: int, form: str = "fused", sink: str = "rows", kb: int = 2, rows: int = 20000):
    last = {"fan": fan, "text": text_of(kb), "batch": batch_of(rows)}.get(form, third)
    if form == "unfused":
        last = hr.stage(third, workers=1)
    begin = {"first": FirstCall, "reaching": Reaching}.get(form, First)()
    stages = [begin, slow if form == "slow" else second, last]
    return hr.Pipeline(
        name="bench",
        sources=hr.indexed(n),
        stages=stages,
        sink=hr.Rows() if sink == "rows" else hr.Parts(sink),
    )
'''

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>
#define SLOW(name) int name(int fd) { \
    static int (*real)(int); \
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, #name); \
    usleep(10000); \
    return real(fd); }
SLOW(fsync)
SLOW(fdatasync)
"""
"""Adds 10 ms to every sync of a process and its children."""


@dataclass
class Ended:
    """A run that ended.

    Attributes:
        run: Its directory.
        work_s: Seconds of work, as the module says.
        first_s: Seconds from the start of the array task's process to the first source.
    """

    run: Path
    work_s: float
    first_s: float = 0.0


def start(
    directory: Path, cores: int, *options: str, slow_sync: bool = False, **params: Any
) -> subprocess.Popen[bytes]:
    """Start the pipeline on this machine."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "bench.py").write_text(PIPELINE)
    environment = {**os.environ, "BENCH_DIRECTORY": str(directory)}
    if slow_sync:
        environment["LD_PRELOAD"] = str(_shim(directory))
    command = [
        *(sys.executable, "-m", "hpcresume", "submit", "bench.py", "--cluster", "local"),
        *("-c", str(cores), "--run-dir", str(directory / "run"), "--local-dir", str(directory)),
        *options,
    ]
    for name, value in params.items():
        command += ["-P", f"{name}={value}"]
    with (directory / "log").open("w") as log:
        return subprocess.Popen(command, cwd=directory, env=environment, stderr=log)


def submit(directory: Path, cores: int, *options: str, **params: Any) -> Ended:
    """Run the pipeline on this machine and return how long the work took."""
    with start(directory, cores, *options, **params) as process:
        process.wait()
    return ended(directory, process)


def ended(directory: Path, process: subprocess.Popen[bytes]) -> Ended:
    """Return how long the work of a run took that has ended.

    Raises:
        RuntimeError: It failed.
    """
    run = directory / "run"
    if process.returncode:
        raise RuntimeError(
            f"{process.args} ended with {process.returncode}: {(directory / 'log').read_text()}"
        )
    (outcome,) = run.glob("rounds/*/tasks/*/e*/outcome.json")
    work_s = outcome.stat().st_mtime - float((directory / "began").read_text())
    first = directory / "first"
    since = _task_start(outcome.parent) if first.exists() else 0.0
    return Ended(run, work_s, float(first.read_text()) - since if since else 0.0)


def _task_start(attempt: Path) -> float:
    """Return when the array task's process started, as its log was created."""
    logs = attempt.parents[2] / "logs"
    return min(map(_birth, logs.iterdir()))


def _birth(path: Path) -> float:
    """Return when a file was made."""
    done = subprocess.run(["stat", "-c", "%.9W", path], capture_output=True, text=True, check=True)
    return float(done.stdout)


def collect(ended: Ended, *options: str, name: str = "out.jsonl") -> float:
    """Collect a run and return the seconds it took."""
    start = time.perf_counter()
    target = ended.run.parent / name
    command = [sys.executable, "-m", "hpcresume", "collect", ended.run, "-o", target, *options]
    subprocess.run(list(map(str, command)), check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def _shim(directory: Path) -> Path:
    source, library = directory / "slow_sync.c", directory / "slow_sync.so"
    source.write_text(SHIM)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    ctypes.CDLL(str(library))
    return library
