"""The control groups of a testbed's nodes.

Slurm keeps the jobs of a node in ``/slurm_<node>``, with ``/uid_U/job_J`` below it, when
several nodes share a host.  The names of a testbed's nodes are therefore unique on the
machine: two testbeds, or an attempt and the zombie of the attempt before it, would otherwise
be in one group, and the end of one would kill the other.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from hpcresume.testbed.processes import wait_until

ROOT = Path("/sys/fs/cgroup")
_NEEDED = ("memory", "freezer")


def usable() -> bool:
    """Return whether cgroup v1 with what Slurm needs is mounted and may be written to."""
    return all(
        (ROOT / controller / "release_agent").exists() and os.access(ROOT / controller, os.W_OK)
        for controller in _NEEDED
    )


def remove(nodes: Sequence[str]) -> bool:
    """Remove the groups of nodes whose processes are gone; return whether all went."""
    tops = [top for node in nodes for top in ROOT.glob(f"*/slurm_{node}")]
    # The kernel may call a group busy for a moment after its last process is gone.
    return wait_until(lambda: all([_removed(top) for top in tops]), 10)  # noqa: C419 - try each


def _removed(top: Path) -> bool:
    for directory, _, _ in os.walk(top, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(directory)
    return not top.exists()
