"""What a trial reports."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from hpcresume.launch.estimate import Estimate
from hpcresume.segment.segment import Failure


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One row: its source's id, its item's id, and the value that the sink would get."""

    source: str
    item: str
    row: Any


@dataclass(frozen=True, slots=True)
class TrialSource:
    """What became of one source.

    Attributes:
        source: Its id.
        state: ``completed``, ``failed``, or ``not run`` where the trial ended before.
        rows: How many rows it made.
    """

    source: str
    state: str
    rows: int


@dataclass(frozen=True, slots=True)
class StageMeasure:
    """What one stage did.

    Attributes:
        name: The stage.
        items_in: Items it was given.
        items_out: Items it made.
        dropped: Items it dropped.
        failed: Items it failed.
        seconds: Seconds in its code; of an async stage the sum over items in flight together.
        seconds_per_item: The same per item given, None without any.
        peak_memory_bytes: Most resident memory of the process that ran it, which it shares
            with the stages fused with it and, inline, with everything else; None if unknown.
    """

    name: str
    items_in: int
    items_out: int
    dropped: int
    failed: int
    seconds: float
    seconds_per_item: float | None
    peak_memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class TrialReport:
    """What a trial found.

    Attributes:
        pipeline: The pipeline's name.
        engine: ``ray`` or ``inline``.
        total: Number of all sources.
        sources: The sampled sources, in the order of the listing.
        rows: The first rows of each.
        failures: Every failure, with the user's traceback.
        stages: What each stage did.
        start_s: Seconds from the start of the engine until all stages were set up.
        elapsed_s: Seconds of the whole.
        stopped: Why it ended before every sampled source was run, empty otherwise.
        tolerated: Failures that the pipeline tolerates in a sample of this size.
        estimate: What all sources would cost; None where no source completed.
    """

    pipeline: str
    engine: str
    total: int
    sources: list[TrialSource]
    rows: list[TrialRow]
    failures: list[Failure]
    stages: list[StageMeasure]
    start_s: float
    elapsed_s: float
    stopped: str
    tolerated: int
    estimate: Estimate | None

    @property
    def completed(self) -> int:
        """Number of sampled sources that completed."""
        return sum(source.state == "completed" for source in self.sources)

    @property
    def ok(self) -> bool:
        """Whether every sampled source completed, but for as many as the pipeline tolerates."""
        return not self.stopped and len(self.sources) - self.completed <= self.tolerated

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "pipeline": self.pipeline,
            "engine": self.engine,
            "ok": self.ok,
            "stopped": self.stopped,
            "total": self.total,
            "sampled": len(self.sources),
            "completed": self.completed,
            "tolerated": self.tolerated,
            "start_s": self.start_s,
            "elapsed_s": self.elapsed_s,
            "sources": [dataclasses.asdict(source) for source in self.sources],
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "failures": [_failure_values(failure) for failure in self.failures],
            "stages": [_stage_values(stage) for stage in self.stages],
            "estimate": None if self.estimate is None else dataclasses.asdict(self.estimate),
        }


def _failure_values(failure: Failure) -> dict[str, Any]:
    values = {"source": failure.source_id}
    names = ("item", "stage", "kind", "message", "traceback")
    return {**values, **{name: getattr(failure, name) for name in names}}


def _stage_values(stage: StageMeasure) -> dict[str, Any]:
    values = dataclasses.asdict(stage)
    return {"name": values.pop("name"), "in": values.pop("items_in"),
            "out": values.pop("items_out"), **values}  # fmt: skip
