"""Whether a run directory can live on a file system.

A file system that hangs takes whoever touches it along, beyond the reach of signals, so the
probes run in a child that is given up when its time is over:
``python -m hpcresume.doctor storage PATH``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from hpcresume import slurm
from hpcresume.doctor.check import Check, State, answer, last_line, read_back, show_size
from hpcresume.doctor.node import MEMORY_KINDS, mount_of
from hpcresume.errors import describe

STORAGE_TIMEOUT_S = 120.0

_RACERS = 4
_NAMES = 64
_RENAMES = 200
_LOW_BYTES = 1 << 30
_LOW_INODES = 10_000
_NODE_KINDS = (*MEMORY_KINDS, "ext", "xfs", "btrfs", "overlay", "zfs", "f2fs")
_OPTIONS = {
    "soft": "its errors may lose data that was acknowledged; mount it hard",
    "nolock": "locks hold on one node only; nothing that counts rests on them",
    "local_lock": "locks hold on one node only; nothing that counts rests on them",
    "localflock": "locks hold on one node only; nothing that counts rests on them",
    "noac": "every attribute is asked of the server, which is slow",
    "async": "the server may lose what it acknowledged; each file is read back for that",
}
"""Mount options worth naming, with what they mean for a run."""

# Each racer waits for its line and then tries to create every name.
_RACER = """
import os, sys
sys.stdin.readline()
won = []
for name in range(int(sys.argv[2])):
    try:
        os.close(os.open(f"{sys.argv[1]}/{name}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        continue
    won.append(name)
print(*won)
"""


def check_storage(path: str, *, timeout_s: float = STORAGE_TIMEOUT_S) -> Iterator[Check]:
    """Whether a run directory can live at ``path``, found out by a child that may hang.

    Args:
        path: The run directory, or where it would be made; need not exist.
        timeout_s: The child is given up after this many seconds.
    """
    command = [sys.executable, "-m", "hpcresume.doctor", "storage", os.path.abspath(path)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        late = False
        try:
            child.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            # Not waited for: it may be beyond the reach of the signal.
            child.kill()
            late = True
        answers = [json.loads(line) for line in read_back(out).splitlines() if line.endswith("}")]
        complaint = last_line(read_back(err))
    yield from (Check(**answer) for answer in answers if "state" in answer)
    begun = answers[-1].get("begin", "") if answers else "start"
    if late:
        found = f"no answer within {timeout_s:g} s (at: {begun})"
        remedy = f"the file system of {path} hangs; wait for it, or use another --run-dir"
        yield Check("storage", begun or "end", "wrong", found, remedy)
    elif child.returncode:
        yield Check("storage", begun, "wrong", complaint, "check owner, mode, space and quota")


def probe_storage(path: str) -> None:
    """Write one JSON line before each probe and one for each result."""
    for name, probe in _PROBES.items():
        answer({"begin": name})
        for check in probe(_existing(path)):
            answer(asdict(check))
    with contextlib.ExitStack() as stack:
        answer({"begin": "write"})
        try:
            folder = tempfile.mkdtemp(prefix=".hpcresume-doctor-", dir=_existing(path))
        except OSError as error:
            remedy = "check owner, mode, space and quota, or use another --run-dir"
            answer(asdict(Check("storage", "write", "wrong", str(error), remedy)))
            return
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for name, trial in _TRIALS.items():
            answer({"begin": name})
            answer(asdict(_tried(name, trial, folder)))


def _tried(name: str, trial: Callable[[str], Check], folder: str) -> Check:
    try:
        return trial(folder)
    except OSError as error:
        remedy = "results are published with this call; use another --run-dir"
        return Check("storage", name, "wrong", describe(error), remedy)


def _existing(path: str) -> str:
    """Return the path or its nearest parent that exists."""
    while not os.path.lexists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return path


def _owners(path: str) -> Iterator[Check]:
    """Owner and mode of the directory and of everything above it."""
    real = os.path.realpath(path)
    chain = [real, *map(str, Path(real).parents)]
    open_to = []
    for part in chain:
        status = os.stat(part)
        others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if status.st_uid not in {os.geteuid(), 0}:
            open_to.append(f"{part} is owned by user {status.st_uid}")
        elif others and not status.st_mode & stat.S_ISVTX:
            open_to.append(f"{part} has mode {stat.S_IMODE(status.st_mode):04o}")
    if open_to:
        remedy = "whoever can write there can replace your results and code: chmod go-w"
        yield Check("storage", "owners", "warning", "; ".join(open_to), remedy)
    else:
        found = f"{real} and its parents are yours or the system's"
        yield Check("storage", "owners", "ok", found)


def _space(path: str) -> Iterator[Check]:
    """Free bytes and inodes; a quota may be less."""
    space = os.statvfs(path)
    free = space.f_bavail * space.f_frsize
    state: State = "warning" if free < _LOW_BYTES else "ok"
    remedy = "results may not fit; free space or use another --run-dir" if state != "ok" else ""
    yield Check("storage", "space", state, f"{show_size(free)} free, a quota may be less", remedy)
    if space.f_files:
        scarce = space.f_favail < _LOW_INODES
        remedy = "a run makes a few files per attempt; remove files" if scarce else ""
        found = f"{space.f_favail:,} files can be made"
        yield Check("storage", "inodes", "warning" if scarce else "ok", found, remedy)


def _file_system(path: str) -> Iterator[Check]:
    """Type and mount options."""
    point, kind, options = mount_of(path)
    if kind.startswith(_NODE_KINDS):
        remedy = "on a cluster, put runs where every node sees them" if slurm.available() else ""
        state: State = "warning" if slurm.available() else "ok"
        found = f"{kind} at {point}, a file system of this node"
        yield Check("storage", "file system", state, found, remedy)
    else:
        yield Check("storage", "file system", "ok", f"{kind} at {point}")
    for option in sorted(options):
        meaning = _OPTIONS.get(option.partition("=")[0])
        if meaning and option != "local_lock=none":
            yield Check("storage", f"mount option {option}", "warning", "set", meaning)


_PROBES: dict[str, Callable[[str], Iterator[Check]]] = {
    "owners": _owners,
    "space": _space,
    "file system": _file_system,
}


def _exclusive(folder: str) -> Check:
    """Several processes create the same names; each name must have one winner."""
    race = os.path.join(folder, "race")
    os.mkdir(race)
    racers = [
        subprocess.Popen(
            [sys.executable, "-S", "-c", _RACER, race, str(_NAMES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(_RACERS)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = [int(name) for racer in racers for name in racer.communicate()[0].split()]
    if sorted(won) == list(range(_NAMES)):
        found = f"{_RACERS} processes, {_NAMES} names, one winner each"
        return Check("storage", "exclusive create", "ok", found)
    found = f"{_RACERS} processes won {len(won)} of {_NAMES} names"
    remedy = "attempts cannot be told apart here; use another --run-dir"
    return Check("storage", "exclusive create", "wrong", found, remedy)


def _rename(folder: str) -> Check:
    """A name that is replaced again and again is never absent and never half."""
    name, bad = os.path.join(folder, "name"), 0
    over = threading.Event()

    def replace() -> None:
        try:
            for number in range(_RENAMES):
                _write(f"{name}.new", bytes([number % 256]) * 4096, sync=False)
                os.rename(f"{name}.new", name)
        finally:
            over.set()

    _write(name, b"\0" * 4096, sync=False)
    writer = threading.Thread(target=replace)
    writer.start()
    while not over.is_set():
        try:
            data = Path(name).read_bytes()
        except OSError:
            bad += 1
        else:
            bad += len(data) != 4096 or len(set(data)) != 1
    writer.join()
    if bad or "name" not in os.listdir(folder) or os.path.exists(f"{name}.new"):
        remedy = "results could be seen half; use another --run-dir"
        return Check("storage", "rename", "wrong", f"{bad} reads saw none or half a file", remedy)
    return Check("storage", "rename", "ok", f"{_RENAMES} replacements, each whole and visible")


def _sync_file(folder: str) -> Check:
    """Write, fsync and read back."""
    path, data = os.path.join(folder, "sync"), os.urandom(1 << 20)
    took = _write(path, data, sync=True)
    if Path(path).read_bytes() != data:
        remedy = "this file system loses data; use another --run-dir"
        return Check("storage", "fsync", "wrong", "it reads back differently", remedy)
    return Check("storage", "fsync", "ok", f"1 MiB in {took * 1000:.0f} ms, reads back the same")


def _sync_directory(folder: str) -> Check:
    """Fsync a directory."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        found = f"fsync of a directory: {error.strerror}"
        remedy = "names are made sure of by reading back alone"
        return Check("storage", "fsync of a directory", "warning", found, remedy)
    finally:
        os.close(fd)
    return Check("storage", "fsync of a directory", "ok", "works")


def _hard_link(folder: str) -> Check:
    """A second name for a file, which must be new."""
    path = os.path.join(folder, "one")
    _write(path, b"x", sync=False)
    try:
        os.link(path, f"{path}.two")
    except OSError as error:
        found = f"{error.strerror}"
        remedy = "names that must be new are created instead; collect copies files"
        return Check("storage", "hard links", "warning", found, remedy)
    return Check("storage", "hard links", "ok", "work")


def _flock(folder: str) -> Check:
    """Whether a lock excludes another holder, on this node."""
    path = os.path.join(folder, "lock")
    with open(path, "wb") as first, open(path, "rb+") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            code = errno.errorcode.get(error.errno or 0, "?")
            remedy = "nothing that counts rests on locks; two merges at once may do work twice"
            return Check("storage", "flock", "warning", f"{code}: {error.strerror}", remedy)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Check("storage", "flock", "ok", "works on this node")
    return Check("storage", "flock", "warning", "a lock excludes nobody", "nothing rests on it")


_TRIALS: dict[str, Callable[[str], Check]] = {
    "exclusive create": _exclusive,
    "rename": _rename,
    "fsync": _sync_file,
    "fsync of a directory": _sync_directory,
    "hard links": _hard_link,
    "flock": _flock,
}


def _write(path: str, data: bytes, *, sync: bool) -> float:
    """Write a file and return the seconds it took."""
    started = time.monotonic()
    with open(path, "wb", buffering=0) as file:
        file.write(data)
        if sync:
            os.fsync(file.fileno())
    return time.monotonic() - started
