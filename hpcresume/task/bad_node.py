"""Nodes on which attempts cannot start: told from what is wrong everywhere, and avoided.

A broken node is free again a second after it was given work, so the scheduler would hand it
one element of the array after the other.  The first attempt that finds it broken takes it out
of the pending elements' nodes.  Where that cannot be, or not yet, the attempt first holds its
node for a while, so that nothing starts and fails over and over.

At least one node is never taken out.  Who takes a node out has seen another node with an
attempt that is not broken, and its own outcome was written before it looked: so the last one
to look finds no other.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterable

from hpcresume import slurm
from hpcresume.config.settings import Request
from hpcresume.errors import HpcResumeError
from hpcresume.run.directory import Outcome, RunDir
from hpcresume.task.allocation import Allocation

FAULTS = frozenset({"storage", "ray-start"})
"""Kinds of outcome that are a node's fault, unless every node has them."""


def is_nodes_fault(outcome: Outcome) -> bool:
    """Tell whether an attempt ended because of its node, before it had done anything."""
    return outcome.kind in FAULTS and not outcome.completed


def bad_nodes(run: RunDir, round_: int, *, suspects: Iterable[str] = ()) -> set[str]:
    """Return the nodes on which no attempt of a round could start, while one could elsewhere.

    Empty where none could start anywhere: then the fault is not a node's.

    Args:
        run: The run.
        round_: Number of the round.
        suspects: Nodes on which tasks ended without even making an attempt.
    """
    bad, good = set(suspects), set[str]()
    for task in run.tasks(round_):
        for ref in run.attempts(round_, task):
            info, outcome = run.attempt_info(ref), run.outcome(ref)
            if info is not None and info.node is not None:
                broken = outcome is not None and is_nodes_fault(outcome)
                (bad if broken else good).add(info.node)
    return bad - good if good else set()


def excluding(request: Request, nodes: set[str]) -> str:
    """Return what ``--exclude`` is to be, so that jobs keep away from further nodes.

    A user who named the nodes to use knows them; leaving some out could leave none.
    """
    if request.nodelist:
        return request.exclude
    return ",".join(sorted(nodes | set(filter(None, request.exclude.split(",")))))


def keep_away(run: RunDir, round_: int, allocation: Allocation, request: Request) -> str:
    """Have Slurm start no more elements of this array on this node.

    Returns:
        All nodes that pending elements keep away from; empty where nothing could be done:
        no other node is known to be better, the task is no array's, or Slurm refused.
    """
    if allocation.array is None or allocation.node is None:
        return ""
    nodes = bad_nodes(run, round_)
    if allocation.node not in nodes or request.nodelist:
        return ""
    exclude = excluding(request, nodes)
    try:
        slurm.exclude_nodes(allocation.array, exclude)
    except HpcResumeError:
        return ""
    return exclude


def hold(seconds: float, *, wake_fd: int, until: Callable[[], bool]) -> None:
    """Stay on the node for a while, or until a signal says to leave.

    Args:
        seconds: How long.
        wake_fd: Becomes readable when a signal arrives.
        until: Whether the signal was one to leave for.
    """
    deadline = time.monotonic() + seconds
    while not until():
        left = deadline - time.monotonic()
        if left <= 0:
            return
        if select.select([wake_fd], [], [], left)[0]:
            os.read(wake_fd, 4096)
