"""A chain in this process, fed with sources, for tests of what stages may do."""

from __future__ import annotations

import asyncio
import pickle
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

import hpcresume as hr
from hpcresume.engine.calls import ChunkResult, Inputs, SlotFailure
from hpcresume.engine.chain import Chain, ChainPlace, run_now
from hpcresume.engine.mark import Mark
from hpcresume.ids import ItemPath
from hpcresume.pipeline.context import Worker
from hpcresume.pipeline.sources import encode_payload
from hpcresume.segment.frame import decode_frame


@dataclass
class ChainCase:
    """Builds chains whose files lie in one directory."""

    directory: Path

    def make(
        self,
        stages: Sequence[Any],
        *,
        first: int = 0,
        count: int | None = None,
        sources: Any = None,
        sink: Any = "rows",
        mark: Mark | None = None,
        call_max_s: float = float("inf"),
    ) -> Chain:
        """Return the chain of ``count`` stages from ``first`` on."""
        pipeline = hr.Pipeline(
            name="p",
            sources=sources if sources is not None else ["unused"],
            stages=list(stages),
            sink=hr.Rows() if sink == "rows" else sink,
        )
        worker = Worker(index=0, cpus=1, gpus=0, scratch=self.directory / "worker")
        place = ChainPlace(
            run_id="run",
            scratch=self.directory / "scratch",
            outputs=self.directory / "outputs",
            parts=str(self.directory),
            worker=worker,
            seconds_left=lambda: 60.0,
            mark=mark,
            call_max_s=call_max_s,
        )
        end = len(pipeline.stages) if count is None else first + count
        return Chain(pipeline, first=first, stages=pipeline.stages[first:end], place=place)

    def run(self, stages: Sequence[Any], payloads: Sequence[Any], **options: Any) -> ChunkResult:
        """Run sources ``s0``, ``s1``, ... with these payloads through all stages."""
        marked = options.pop("marked", False)
        attempts = options.pop("attempts", {})
        return call(
            self.make(stages, **options), records(payloads, attempts=attempts), marked=marked
        )


def records(payloads: Sequence[Any], *, attempts: dict[int, int] | None = None) -> Inputs:
    """Return sources as the first group gets them."""
    return Inputs(
        array("I", range(len(payloads))),
        records=[(f"s{i}", encode_payload(payload)) for i, payload in enumerate(payloads)],
        attempts=attempts or {},
    )


def items(values: Sequence[tuple[int, tuple[int, ...], Any]]) -> Inputs:
    """Return ``(source, path, item)`` as a later group gets them."""
    return Inputs(
        array("I", [source for source, _, _ in values]),
        ids=[f"s{source}" for source, _, _ in values],
        paths=[ItemPath(path) for _, path, _ in values],
        items=[pickle.dumps(item) for _, _, item in values],
    )


def call(chain: Chain, inputs: Inputs, *, marked: bool = False) -> ChunkResult:
    """Run a call as a worker does."""
    coroutine = chain.run(inputs, marked=marked)
    return asyncio.run(coroutine) if chain.stages[0].traits.is_async else run_now(coroutine)


def rows(result: ChunkResult) -> dict[int, list[Any]]:
    """Return the rows of each completed source of a whole pipeline's call."""
    if result.frame is None:
        return {}
    frame = decode_frame(result.frame, what="test")
    return {
        index: [orjson.loads(line) for line in data.splitlines()] for index, data in frame.sources()
    }


def paths(result: ChunkResult) -> list[tuple[int, ...]]:
    """Return the item path of every row."""
    assert result.frame is not None
    return [tuple(path) for path in decode_frame(result.frame, what="test").paths()]


def failed(result: ChunkResult) -> dict[int, SlotFailure]:
    """Return the failures by slot."""
    return {failure.slot: failure for failure in result.failures}


def counters(result: ChunkResult) -> list[tuple[int, int, int, int]]:
    """Return in, out, dropped and failed of every stage."""
    return [(c.items_in, c.items_out, c.dropped, c.failed) for c in result.counts]
