"""A real Slurm on one machine: nodes with their own disks, preemption, accounting, failures.

It is made of the distribution's own daemons, or of those of another release of Debian in a
folder; it needs root, and touches nothing outside its directory but ``/sys/fs/cgroup``.  Any
number of testbeds run side by side.
"""

from hpcresume.testbed.lifecycle import (
    NodeStatus,
    Testbed,
    continue_controller,
    down,
    fail_controller,
    fail_node,
    pause_controller,
    preempt,
    release_of,
    restore_controller,
    restore_node,
    status,
    up,
)
from hpcresume.testbed.packages import install, install_release_tools, require
from hpcresume.testbed.state import Release, Settings

__all__ = [
    "NodeStatus",
    "Release",
    "Settings",
    "Testbed",
    "continue_controller",
    "down",
    "fail_controller",
    "fail_node",
    "install",
    "install_release_tools",
    "pause_controller",
    "preempt",
    "release_of",
    "require",
    "restore_controller",
    "restore_node",
    "status",
    "up",
]
