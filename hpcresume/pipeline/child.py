"""Child processes of stages: their environment, their group, their last words."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpcresume.memory import MemoryGroup

_LAUNCHER_PREFIXES = ("SLURM_", "PMI", "OMPI_")
_TAIL_BYTES = 4096
_TAIL_LINES = 20
_PIPES_CLOSE_S = 5.0
# A shell says 128 and the signal of what it ran.
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)

Argument = str | os.PathLike[str]


class CommandFailedError(subprocess.CalledProcessError):
    """A command ended with a status other than 0; the message holds its last words."""

    def __str__(self) -> str:
        return _with_tail(super().__str__(), self.stderr)


class CommandOutOfMemoryError(CommandFailedError):
    """The kernel killed a command because the array task's memory ran out."""

    def __str__(self) -> str:
        return f"memory ran out, and the kernel killed it: {super().__str__()}"


class CommandTimeoutError(subprocess.TimeoutExpired):
    """A command was killed at its time limit; the message holds its last words."""

    def __reduce__(self) -> tuple[type[CommandTimeoutError], tuple[Any, ...]]:
        return type(self), (self.cmd, self.timeout, self.output, self.stderr)

    def __str__(self) -> str:
        return _with_tail(super().__str__(), self.stderr)


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this environment without what makes a child believe Slurm or MPI started it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHER_PREFIXES)}
    return {**kept, **(extra or {})}


def run_command(
    argv: Sequence[Argument], *, timeout_s: float | None, check: bool, popen: dict[str, Any]
) -> subprocess.CompletedProcess[Any]:
    """Run a command in a process group of its own and wait for it.

    Args:
        argv: Program and arguments; no shell.
        timeout_s: Kill the group after this many seconds.
        check: Raise when the command ends with a status other than 0.
        popen: Arguments for ``subprocess.Popen``, and ``input`` for its standard input.

    Raises:
        CommandFailedError: ``check``, and the status is not 0.
        CommandOutOfMemoryError: ``check``, and the kernel killed it for want of memory.
        CommandTimeoutError: It ran past ``timeout_s``.
    """
    arguments = _popen_defaults(popen)
    data = arguments.pop("input", None)
    command = [os.fspath(part) for part in argv]
    memory = MemoryGroup.of_this_process()
    kills = memory.kills()
    with subprocess.Popen(command, process_group=0, **arguments) as process:
        try:
            stdout, stderr = process.communicate(data, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            stdout, stderr = _kill_and_drain(process)
            assert timeout_s is not None
            raise CommandTimeoutError(command, timeout_s, stdout, stderr) from None
        except BaseException:
            _kill_and_drain(process)
            raise
    if check and process.returncode:
        starved = process.returncode in _KILLED and memory.kills() > kills
        error = CommandOutOfMemoryError if starved else CommandFailedError
        raise error(process.returncode, command, stdout, stderr)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def signal_group(process: subprocess.Popen[Any], number: signal.Signals) -> None:
    """Send a signal to the group that ``process`` leads; nothing when the group is gone."""
    # Reaped: the number may belong to others by now.
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def exit_status(process: subprocess.Popen[Any]) -> int | None:
    """Return how a child ended, or None while it runs; leaves it unreaped.

    An unreaped leader keeps the group's number taken, so that the group can be signalled.
    """
    if process.returncode is not None:
        return process.returncode
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    found = os.waitid(os.P_PID, process.pid, flags)
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def status_text(status: int) -> str:
    """Return an exit status in words."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"


def command_text(argv: Sequence[Argument]) -> str:
    """Return a command as a shell would be given it, shortened."""
    text = shlex.join(os.fspath(part) for part in argv)
    return text if len(text) <= 200 else f"{text[:197]}..."


def file_tail(path: Path) -> str:
    """Return the last lines of a file of output."""
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - _TAIL_BYTES))
        return _tail(file.read())


def _popen_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the caller's arguments over ours: text, captured, nothing to read."""
    pipe = subprocess.PIPE
    arguments: dict[str, Any] = {"stdout": pipe, "stderr": pipe, **given}
    if arguments.get("input") is not None:
        arguments["stdin"] = pipe
    arguments.setdefault("stdin", subprocess.DEVNULL)
    if arguments.setdefault("text", not isinstance(arguments.get("input"), bytes)):
        arguments.setdefault("errors", "replace")
    if arguments.get("env") is None:
        arguments["env"] = child_environment()
    return arguments


def _kill_and_drain(process: subprocess.Popen[Any]) -> tuple[Any, Any]:
    signal_group(process, signal.SIGKILL)
    try:
        return process.communicate(timeout=_PIPES_CLOSE_S)
    except subprocess.TimeoutExpired as left_open:
        # A descendant in another group holds the pipes; it ends with the attempt.
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        return left_open.output, left_open.stderr


def _with_tail(message: str, output: Any) -> str:
    tail = _tail(output) if isinstance(output, str | bytes) else ""
    return f"{message} Its last words:\n{tail}" if tail else message


def _tail(output: str | bytes) -> str:
    text = output.decode("utf-8", "replace") if isinstance(output, bytes) else output
    return "\n".join(text[-_TAIL_BYTES:].strip().splitlines()[-_TAIL_LINES:])
