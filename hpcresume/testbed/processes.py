"""Start, recognise and end the processes of a testbed.

A daemon is known by its process id and start time.  What runs on a node (slurmd, its
slurmstepd, their jobs, and jobs that outlived a killed slurmd) is known by the node's mount
namespace: there the node's disk is mounted, and nowhere else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from hpcresume.errors import TestbedError
from hpcresume.testbed.state import Daemon

_POLL_S = 0.02


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Poll ``condition`` until it holds; return whether it did within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True


def start(
    name: str, command: Sequence[str], *, log: Path, environment: Mapping[str, str]
) -> Daemon:
    """Start a daemon in its own session, detached from this process, its output in ``log``."""
    # The shell exits at once, so that the daemon is nobody's child who must wait for it;
    # setsid and exec keep the process id that it prints.
    launcher = 'umask 022; setsid "$@" >>"$LOG" 2>&1 </dev/null & echo $!'
    done = subprocess.run(
        ["sh", "-c", launcher, "sh", *command],
        env={**environment, "LOG": str(log)},
        cwd="/",
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    pid = int(done.stdout)
    return Daemon(name, pid, start_ticks(pid) or 0)


def start_ticks(pid: int) -> int | None:
    """Return when a process started, in ticks since boot; None if it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def alive(daemon: Daemon) -> bool:
    """Return whether this very process still runs."""
    return start_ticks(daemon.pid) == daemon.start_ticks


def send(daemon: Daemon, number: signal.Signals) -> None:
    """Send a signal to a daemon unless it is gone."""
    if alive(daemon):
        with contextlib.suppress(ProcessLookupError):
            os.kill(daemon.pid, number)


def end(daemons: Iterable[Daemon], *, grace_s: float) -> None:
    """End daemons by SIGTERM, after ``grace_s`` by SIGKILL, and wait until they are gone.

    Raises:
        TestbedError: One survives SIGKILL (it hangs in the kernel).
    """
    wanted = list(daemons)
    for daemon in wanted:
        send(daemon, signal.SIGTERM)
    if wait_until(lambda: not any(map(alive, wanted)), grace_s):
        return
    for daemon in wanted:
        send(daemon, signal.SIGKILL)
    if not wait_until(lambda: not any(map(alive, wanted)), 10):
        left = ", ".join(f"{d.name} ({d.pid})" for d in wanted if alive(d))
        raise TestbedError(f"still there after SIGKILL: {left}. Look at dmesg", left=left)


def members(disks: Sequence[str]) -> list[int]:
    """Return the processes that see one of a testbed's disks mounted: those of its nodes.

    Args:
        disks: How their paths end; a node's name in it makes it unique on the machine, and
            a process in another root directory has another path before it.
    """
    verdicts: dict[str, bool] = {}
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace not in verdicts:
                verdicts[namespace] = _mounts(pid, disks)
            if verdicts[namespace]:
                found.append(pid)
    return found


def _mounts(pid: int, disks: Sequence[str]) -> bool:
    text = Path(f"/proc/{pid}/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    # The fourth field is the mounted directory within its file system (proc(5)).
    return any(line.split(" ", 4)[3].endswith(tuple(disks)) for line in text.splitlines())


def kill_members(disks: Sequence[str]) -> None:
    """Kill everything that runs on a testbed's nodes, and wait until it is gone.

    Raises:
        TestbedError: Something survives SIGKILL (it hangs in the kernel).
    """

    def none_left() -> bool:
        left = members(disks)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

    if not wait_until(none_left, 15):
        left = ", ".join(map(str, members(disks)))
        raise TestbedError(f"jobs still there after SIGKILL: {left}. Look at dmesg", left=left)
