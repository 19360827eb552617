"""Processes of an attempt: how they start, and how none of them is left."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

import psutil

from hpcresume.task.messages import Channel

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_END_S = 1.0
_ORDERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ATTEMPT_VARIABLE = "HPCRESUME_ATTEMPT"
"""Set for every process of an attempt, so that what outlives it is found, by no name."""


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def adopt_orphans() -> None:
    """Make this process the parent of every descendant that loses its own."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Ask for SIGKILL when the parent dies, and end now if it is dead already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def ignore_job_signals() -> None:
    """Take no notice of the signals that Slurm sends to the job; orders come over the pipe.

    SIGUSR2 stays ignored across exec, since under some process trackers it reaches Ray's
    own processes, which it would end.  The others are handled by doing nothing, so that a
    program that a stage starts, and a process that it forks, has their default again: a
    multiprocessing pool ends its workers with SIGTERM and waits for them.
    """
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    for number in _ORDERS:
        signal.signal(number, do_nothing)
    os.register_at_fork(after_in_child=_take_default_signals)


def _take_default_signals() -> None:
    for number in _ORDERS:
        if signal.getsignal(number) is do_nothing:
            signal.signal(number, signal.SIG_DFL)


def do_nothing(_number: int, _frame: FrameType | None) -> None:
    """Handle a signal by going on."""


@dataclass(slots=True)
class Child:
    """A child process with a channel to it."""

    process: subprocess.Popen[bytes]
    channel: Channel

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def kill(self) -> None:
        """Send SIGKILL; a process blocked in the kernel dies when it returns."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    def describe_end(self) -> str:
        """Return how it ended, for people."""
        # Its pipe closes a moment before it can be waited for.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=_END_S)
        code = self.process.returncode
        if code is None:
            return "is still there"
        return f"was killed by signal {-code}" if code < 0 else f"exited with status {code}"


def start_child(module: str, spec_path: str, *, oom_score: int) -> Child:
    """Start ``python -m module spec_path`` with a channel, in this process's session.

    Args:
        module: The module to run; reads orders from, and reports to, the fds in its argv.
        spec_path: File with the attempt's specification.
        oom_score: Raised ``oom_score_adj``: the kernel is to take it before this process.
    """
    orders_read, orders_write = os.pipe()
    reports_read, reports_write = os.pipe()
    process = subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", module),
            *(spec_path, str(orders_read), str(reports_write), str(os.getpid())),
        ],
        pass_fds=(orders_read, reports_write),
        stdin=subprocess.DEVNULL,
    )
    os.close(orders_read)
    os.close(reports_write)
    score = f"/proc/{process.pid}/oom_score_adj"
    with contextlib.suppress(OSError), open(score, "w", encoding="ascii") as file:
        file.write(str(oom_score))
    return Child(process, Channel(reports_read, orders_write))


def end_descendants(timeout_s: float) -> list[int]:
    """SIGKILL every descendant of this process and wait for them.

    Returns:
        The pids that are still there after ``timeout_s``, blocked in the kernel.
    """
    deadline = time.monotonic() + timeout_s
    me = psutil.Process()
    while True:
        living = [p for p in me.children(recursive=True) if _is_living(p)]
        for process in living:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _reap()
        if not living:
            return []
        left = deadline - time.monotonic()
        if left <= 0:
            return [process.pid for process in living]
        psutil.wait_procs(living, timeout=min(0.5, left))


def _is_living(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def _reap() -> None:
    """Collect the orphans that this process adopted and that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def processes_of(attempt: str, directories: Sequence[str]) -> Iterator[psutil.Process]:
    """Yield this user's processes that belong to an attempt.

    They are known by their environment, or by an open file below the attempt's directories:
    Ray's workers write their title over the memory that their environment is read from.
    """
    marker = f"{ATTEMPT_VARIABLE}={attempt}".encode()
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        with contextlib.suppress(OSError):
            with open(f"/proc/{process.pid}/environ", "rb") as file:
                found = marker in file.read().split(b"\0")
            if found or _has_open(process.pid, directories):
                yield process


def _has_open(pid: int, directories: Sequence[str]) -> bool:
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/{fd}").startswith(tuple(directories)):
                return True
    return False
