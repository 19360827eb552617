"""Calls that an array task makes on the run directory, counted by the kernel: exact, no times."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from hpcresume.errors import TestbedError

PIPELINE = """
import importlib

import hpcresume as hr


def double(i):
    return {"i": i, "y": 2 * i}


def pipeline(n: int, modules: str = "") -> hr.Pipeline:
    for name in modules.split():
        importlib.import_module(name)
    return hr.Pipeline(name="counts", sources=hr.indexed(n), stages=[double])
"""
KINDS = {
    "stat": "stat", "newfstatat": "stat", "lstat": "stat", "statx": "stat", "access": "stat",
    "faccessat2": "stat", "readlink": "stat", "readlinkat": "stat", "statfs": "stat",
    "open": "open", "openat": "open", "creat": "open",
    "mkdir": "make", "mkdirat": "make", "rename": "rename", "renameat": "rename",
    "renameat2": "rename", "link": "link", "linkat": "link", "unlink": "remove",
    "unlinkat": "remove", "rmdir": "remove", "chmod": "mode", "fchmodat": "mode",
    "chown": "mode", "fchownat": "mode", "fsync": "sync", "fdatasync": "sync",
}  # fmt: skip
"""System calls that ask the server of a shared file system, by what they ask of it."""

_LINE = re.compile(r"^(?P<pid>\d+) +(?P<call>\w+)\((?P<rest>.*)$")
_CHILD = re.compile(r"^(\d+) +(?:<\.\.\. )?(?:v?fork|clone3?)\b.* = (\d+)$")
_LISTING = "O_NONBLOCK|O_CLOEXEC|O_DIRECTORY"
_PROCESSES = "execve,clone,clone3,vfork,fork"


def count(
    directory: Path,
    sources: int,
    *,
    engine: str = "inline",
    workers: int = 1,
    modules: str = "",
    max_records: int = 0,
) -> Counter[str]:
    """Run an array task of trivial sources and return its calls on the run directory by kind.

    The calls of all its processes count, from the start of the supervisor on.  It publishes
    once, at its end, however long it takes; or after so many records, where that is given.
    The pipeline imports the modules named.

    Raises:
        RuntimeError: The run failed, or strace cannot trace here.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "counts.py").write_text(PIPELINE)
    sync = f"first_age_s = 1e6\nmax_age_s = 1e6\nmax_records = {max_records}\n"
    (directory / "hpcresume.toml").write_text(f"[sync]\n{sync}")
    run, log = directory / "run", directory / "calls"
    command = [
        *("strace", "-f", "-y", "--seccomp-bpf", "-s", "512", "-o", str(log)),
        *("-e", f"trace={_PROCESSES},%file,fsync,fdatasync"),
        *(sys.executable, "-m", "hpcresume", "submit", "counts.py", "--cluster", "local"),
        *("-P", f"n={sources}", "--run-dir", str(run), "--local-dir", str(directory)),
        *("--engine", engine, "-c", str(workers), "-P", f"modules={modules}"),
    ]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr[-2000:]}")
    lines = log.read_text(errors="replace").splitlines()
    return Counter(_kinds(lines, str(run), _task(lines)))


def attempt_files(run: Path) -> list[Path]:
    """Return the files that attempts left in a run directory."""
    return [path for path in run.glob("rounds/*/tasks/*/e*/**/*") if path.is_file()]


def _task(lines: list[str]) -> set[str]:
    """Return the processes of the array task: its supervisor and what it started."""
    children: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        if found := _CHILD.match(line):
            children[found[1]].append(found[2])
    left = [line.split()[0] for line in lines if " execve(" in line and "task.supervisor" in line]
    task: set[str] = set()
    while left:
        task.add(pid := left.pop())
        left += children[pid]
    return task


def _kinds(lines: list[str], run: str, task: set[str]) -> Iterator[str]:
    for line in lines:
        call = _LINE.match(line)
        if call is None or call["pid"] not in task or run not in call["rest"]:
            continue
        kind = KINDS.get(call["call"])
        if kind == "open" and _LISTING in call["rest"]:
            yield "list"
        # What is asked of an open file, with no name, its client knows.
        elif kind is not None and '>, "", ' not in call["rest"]:
            yield kind


def install() -> None:
    """Install strace with apt, unless it is there.

    Raises:
        TestbedError: apt failed.
    """
    if shutil.which("strace"):
        return
    line = ["apt-get", "install", "-y", "--no-install-recommends", "strace"]
    done = subprocess.run(line, check=False)
    if done.returncode:
        raise TestbedError(f"{' '.join(line)} exited with {done.returncode}")


def can_trace() -> bool:
    """Tell whether strace is here and may trace."""
    try:
        done = subprocess.run(
            ["strace", "--seccomp-bpf", "-f", "-o", os.devnull, "true"], capture_output=True,
            check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return False
    return done.returncode == 0
