"""What all sources of a pipeline would cost, judged by a few, and how to ask Slurm for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hpcresume.config import Settings
from hpcresume.engine.groups import Group, make_groups
from hpcresume.pipeline.pipeline import Pipeline

_TASK_GOAL_S = 3600.0
_MARGIN = 1.5
_STEP_S = 600


@dataclass(frozen=True, slots=True)
class Estimate:
    """What all sources would cost, and how to ask Slurm for it.

    Attributes:
        sources: Number of all sources.
        core_seconds_per_source: Measured core-seconds per source.
        core_hours: The same for all sources, in hours.
        gpu_hours: GPU-hours for all sources.
        cpus_per_task: Cores of an array task that this is for.
        array: Suggested array tasks.
        time: Suggested time limit, as sbatch spells it.
        rounds: Rounds needed; 0: the time limit is too short for any work.
        assumptions: What this rests on, one line.
    """

    sources: int
    core_seconds_per_source: float
    core_hours: float
    gpu_hours: float
    cpus_per_task: int
    array: int
    time: str
    rounds: int
    assumptions: str


def estimate_run(
    pipeline: Pipeline,
    stage_seconds: Sequence[float],
    *,
    settings: Settings,
    sources: int,
    start_s: float,
) -> Estimate:
    """Return what all sources cost if each costs what the sampled ones did on average.

    Args:
        pipeline: The pipeline.
        stage_seconds: Measured seconds per source of every stage.
        settings: Say what an array task asks for and what the site allows.
        sources: Number of all sources.
        start_s: Seconds that every array task spends before its first source.
    """
    request, task, site = settings.request, settings.task, settings.site
    cpus = max(1, request.cpus_per_task)
    groups = make_groups(pipeline.stages, cpus=cpus, workers=task.workers)
    busy = [_busy_seconds(group, stage_seconds) for group in groups]
    cores = sum(seconds * group.cpus for seconds, group in zip(busy, groups, strict=True))
    gpus = sum(seconds * group.gpus for seconds, group in zip(busy, groups, strict=True))
    slowest = max(seconds / group.workers for seconds, group in zip(busy, groups, strict=True))
    limit_s = limit_seconds(request.time)
    array, time_s, rounds = suggest(
        max(slowest, cores / cpus) * sources,
        sources=sources,
        fixed_s=start_s + task.signal_lead_s,
        limit_s=limit_s,
        most=site.max_array_size,
    )
    return Estimate(
        sources=sources,
        core_seconds_per_source=cores,
        core_hours=cores * sources / 3600,
        gpu_hours=gpus * sources / 3600,
        cpus_per_task=cpus,
        array=array,
        time=spell_time(time_s),
        rounds=rounds,
        assumptions=(
            f"all sources cost what these did, on cores like these; {cpus} "
            f"core{'' if cpus == 1 else 's'} per array task, about an hour of work each, "
            f"{_MARGIN:g} times the time for slow ones, and {start_s:.0f} s to start"
        ),
    )


def _busy_seconds(group: Group, stage_seconds: Sequence[float]) -> float:
    """Return for how many seconds one source keeps a worker of a group busy."""
    measured = stage_seconds[group.first : group.first + len(group.stages)]
    # Items in flight together share their worker; each stage has its own bound on them.
    return sum(
        seconds / (stage.max_concurrency if stage.traits.is_async else 1)
        for seconds, stage in zip(measured, group.stages, strict=True)
    )


def suggest(
    work_s: float, *, sources: int, fixed_s: float, limit_s: float | None, most: int
) -> tuple[int, int, int]:
    """Return array tasks, their time limit in seconds, and rounds.

    Args:
        work_s: Seconds that one array task alone would need for all sources.
        sources: Number of sources, at least 1.
        fixed_s: Seconds of every task that are not work: start-up, and what the signal
            comes before the limit.
        limit_s: Longest time limit; None: not known.
        most: Most array tasks.

    Returns:
        Tasks of about an hour, or of the limit where that is shorter; fewer and longer
        ones where ``most`` says so.  Rounds are 0 where the limit leaves no time to work.
    """
    needed = work_s * _MARGIN
    usable = math.inf if limit_s is None else limit_s - fixed_s
    if usable <= 0:
        return min(most, sources), int(limit_s or 0), 0
    array = max(1, min(math.ceil(needed / min(_TASK_GOAL_S, usable)), most, sources))
    task_s = needed / array
    time_s = _STEP_S * math.ceil((task_s + fixed_s) / _STEP_S)
    if limit_s is None or time_s <= limit_s:
        return array, time_s, 1
    return array, int(limit_s), max(1, math.ceil(task_s / usable))


def limit_seconds(text: str) -> float | None:
    """Return the seconds of a time limit as sbatch spells it, None without a limit.

    sbatch takes ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``, ``days-hours``,
    ``days-hours:minutes`` and ``days-hours:minutes:seconds``.
    """
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in parts):
        return None
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return float(((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds)
    if len(numbers) == 3:
        return float((numbers[0] * 60 + numbers[1]) * 60 + numbers[2])
    return float(numbers[0] * 60 + (numbers[1] if len(numbers) == 2 else 0))


def spell_time(seconds: int) -> str:
    """Return a time limit as sbatch spells it, ``4:00:00`` or ``2-12:00:00``."""
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    text = f"{hour}:{minute:02d}:{second:02d}"
    return f"{days}-{text}" if days else text
