"""Whether the process of an attempt still runs, as far as this host can tell."""

from __future__ import annotations

import contextlib
import os
from datetime import datetime
from pathlib import Path

from hpcresume.run.directory import AttemptInfo, JobRecord

# The wall clock may have been set since; within this a process counts as the one named.
_CLOCK_SLACK_S = 60.0


def boot_id() -> str:
    """Return the id of this host's current boot; empty where the kernel gives none."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def is_here(info: AttemptInfo) -> bool:
    """Tell whether an attempt started on this host during its current boot."""
    return info.host == os.uname().nodename and info.boot_id == boot_id()


def is_gone(info: AttemptInfo) -> bool | None:
    """Tell whether an attempt's process has ended; None where it cannot be seen from here."""
    if is_here(info):
        return not is_running(info)
    # The same host after another boot: nothing of before survived.
    return True if info.host == os.uname().nodename else None


def is_running(info: AttemptInfo) -> bool:
    """Tell whether the process with an attempt's id on this host is the attempt's."""
    return _runs(info.pid, info.started_at)


def submitter_runs(job: JobRecord) -> bool | None:
    """Tell whether the process that drives a local round still runs.

    Returns:
        None where the record does not name it as ``host:pid``, or names another host.
    """
    host, _, pid = job.array.rpartition(":")
    if host != os.uname().nodename or not pid.isdigit():
        return None
    return _runs(int(pid), job.submitted_at)


def _runs(pid: int, started_at: str) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        # The second field, the command in parentheses, may itself hold blanks and parentheses.
        fields = stat.rpartition(")")[2].split()
        state, start_ticks = fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return False
    return state not in ("Z", "X") and not _started_later(start_ticks, started_at)


def _started_later(start_ticks: int, started_at: str) -> bool:
    """Tell whether a process is younger than what names it: its id was used again."""
    try:
        named = datetime.fromisoformat(started_at).timestamp()
    except ValueError:
        return False
    return _boot_time() + start_ticks / os.sysconf("SC_CLK_TCK") > named + _CLOCK_SLACK_S


def _boot_time() -> float:
    lines = Path("/proc/stat").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("btime "))
