"""A real Slurm on one machine: nodes with their own disks, preemption, accounting, failures.

It is made of the distribution's own daemons, needs root, and touches nothing outside its
directory but ``/sys/fs/cgroup``.  Any number of testbeds run side by side.
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
    restore_controller,
    restore_node,
    status,
    up,
)
from hpcresume.testbed.packages import install, require
from hpcresume.testbed.state import Settings

__all__ = [
    "NodeStatus",
    "Settings",
    "Testbed",
    "continue_controller",
    "down",
    "fail_controller",
    "fail_node",
    "install",
    "pause_controller",
    "preempt",
    "require",
    "restore_controller",
    "restore_node",
    "status",
    "up",
]
