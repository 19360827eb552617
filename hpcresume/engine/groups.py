"""Groups: adjacent stages with the same resources, fused in one worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from hpcresume.pipeline.stage import Stage


@dataclass(frozen=True)
class Group:
    """Stages that run fused, and how many workers run them.

    Attributes:
        number: Position of the group in the pipeline.
        first: Position of its first stage in the pipeline.
        stages: Its stages.
        workers: Number of workers in this array task.
    """

    number: int
    first: int
    stages: tuple[Stage, ...]
    workers: int

    @cached_property
    def is_async(self) -> bool:
        """Whether its stages run on an event loop."""
        return self.stages[0].traits.is_async

    @property
    def cpus(self) -> float:
        """Cores of one worker."""
        return self.stages[0].cpus

    @property
    def gpus(self) -> float:
        """GPUs of one worker."""
        return self.stages[0].gpus

    @property
    def setup_timeout_s(self) -> float:
        """Seconds that the set-up of all its stages may take."""
        return sum(stage.setup_timeout_s for stage in self.stages)

    @cached_property
    def batch_size(self) -> int:
        """The largest batch that a stage of the group takes."""
        return max(stage.batch_size for stage in self.stages)

    @cached_property
    def concurrency(self) -> int:
        """Items that one worker can have in flight."""
        return max(stage.max_concurrency * stage.batch_size for stage in self.stages)

    @property
    def name(self) -> str:
        """Its stages' names."""
        return "+".join(stage.name for stage in self.stages)


def _resources(stage: Stage) -> tuple[float, float, int | None, bool]:
    return (stage.cpus, stage.gpus, stage.workers, stage.traits.is_async)


def make_groups(stages: Sequence[Stage], *, cpus: int, workers: int = 0) -> list[Group]:
    """Fuse adjacent stages of equal resources and share the cores out among the groups.

    Args:
        stages: The pipeline's stages.
        cpus: Cores of the array task.
        workers: Number of workers where a stage does not say; 0: as many as the cores allow.

    Returns:
        The groups; each has at least one worker.
    """
    fused: list[list[Stage]] = []
    for stage in stages:
        if fused and _resources(fused[-1][-1]) == _resources(stage):
            fused[-1].append(stage)
        else:
            fused.append([stage])
    claimed = sum((group[0].workers or 0) * group[0].cpus for group in fused)
    sharing = sum(1 for group in fused if group[0].workers is None)
    share = max(0.0, cpus - claimed) / max(1, sharing)
    groups, first = [], 0
    for number, group in enumerate(fused):
        count = group[0].workers or _default_workers(group[0], share, workers)
        groups.append(Group(number, first, tuple(group), count))
        first += len(group)
    return groups


def _default_workers(stage: Stage, share: float, workers: int) -> int:
    if workers:
        return workers
    if stage.gpus or stage.traits.is_async:
        # A GPU or an event loop is served by one process unless the stage asks for more.
        return 1
    return max(1, int(share / max(stage.cpus, 0.1)))
