"""What Slurm, or the local launcher, has given this array task."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from hpcresume import slurm
from hpcresume.errors import HpcResumeError
from hpcresume.memory import MemoryGroup

CLAIM_VARIABLE = "HPCRESUME_CLAIM"
"""Names a submission of single jobs, which claim their round together."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """Cores, memory and identity of this array task.

    Attributes:
        cpus: Cores it may use.
        gpus: GPUs it may use.
        memory_bytes: Memory of all its processes together.
        memory_mib: The same as Slurm confines it; 0: off Slurm, or nobody knows.
        element: How Slurm names it, ``<array>_<index>`` or ``<job>``; None off Slurm.
        claim: In whose name it claims its round: the array's id, or the submission's
            where the site has no arrays; None off Slurm.
        array: Id of its job array; None off Slurm and where the site has no arrays.
        node: Slurm's name of the node; None off Slurm.
        restart_count: How often Slurm restarted it.
    """

    cpus: int
    gpus: int
    memory_bytes: int
    memory_mib: int = 0
    element: str | None = None
    claim: str | None = None
    array: str | None = None
    node: str | None = None
    restart_count: int = 0


def read_allocation(environ: Mapping[str, str]) -> Allocation:
    """Return this task's allocation from its environment.

    A node's size is not a job's: what Slurm says comes first, then the cores that this
    process may run on.
    """
    cores = len(os.sched_getaffinity(0))
    wanted = environ.get("HPCRESUME_CPUS") or environ.get("SLURM_CPUS_PER_TASK")
    cpus = min(cores, int(wanted)) if wanted else cores
    job = environ.get("SLURM_JOB_ID")
    array, index = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    memory_mib = _memory_mib(environ, cpus) if job else 0
    return Allocation(
        cpus=max(1, cpus),
        gpus=_gpus(environ),
        memory_bytes=_memory_bytes(environ, cpus, memory_mib),
        memory_mib=memory_mib,
        element=f"{array}_{index}" if array and index else job,
        claim=environ.get(CLAIM_VARIABLE) or array or job,
        array=array,
        node=environ.get("SLURMD_NODENAME"),
        restart_count=int(environ.get("SLURM_RESTART_COUNT", "0")),
    )


def _gpus(environ: Mapping[str, str]) -> int:
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    listed = [device for device in visible.split(",") if device.strip() not in {"", "-1"}]
    numbers = re.findall(r"\d+$", environ.get("SLURM_GPUS_ON_NODE", ""))
    return len(listed) or (int(numbers[0]) if numbers else 0)


def _memory_mib(environ: Mapping[str, str], cpus: int) -> int:
    node, per_cpu = environ.get("SLURM_MEM_PER_NODE"), environ.get("SLURM_MEM_PER_CPU")
    allocated = int(environ.get("SLURM_CPUS_ON_NODE") or cpus)
    given = int(node or 0) or int(per_cpu or 0) * allocated
    # Whoever asks for a whole node's memory is not told how much that is.
    return given or MemoryGroup.of_this_process().limit_mib()


def _memory_bytes(environ: Mapping[str, str], cpus: int, slurm_mib: int) -> int:
    total = int(psutil.virtual_memory().total)
    given = environ.get("HPCRESUME_MEMORY_BYTES")
    if given:
        return int(given)
    if slurm_mib:
        return min(total, slurm_mib << 20)
    return max(1 << 30, total * cpus // max(1, os.cpu_count() or 1))


def read_end_time(allocation: Allocation, environ: Mapping[str, str]) -> float | None:
    """Return when the time limit ends this task, in monotonic seconds; None if unknown.

    Slurm is asked first, since limits can be changed while the job runs.
    """
    left_s = _ask_time_left(allocation.element)
    if left_s is None and environ.get("SLURM_JOB_END_TIME"):
        left_s = float(environ["SLURM_JOB_END_TIME"]) - time.time()
    return None if left_s is None else time.monotonic() + left_s


def _ask_time_left(element: str | None) -> float | None:
    if element is None:
        return None
    try:
        jobs = slurm.show_job(element)
    except HpcResumeError:
        return None
    return next((left_s for job in jobs if (left_s := _time_left(job)) is not None), None)


def _time_left(job: slurm.JobInfo) -> float | None:
    """Return the seconds that a job has left, by Slurm's durations: a clock may jump.

    A grace period ends before the limit, and a job that was suspended ends after its end less
    the time that it ran, so the shorter of the two counts.
    """
    if job.end_time is None:
        return None
    if job.start_time is None or job.run_time_s is None:
        return job.end_time - time.time()
    least_s = job.end_time - job.start_time
    if job.time_limit_s is not None:
        least_s = min(least_s, job.time_limit_s)
    return least_s - job.run_time_s
