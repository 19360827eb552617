"""Async stages in a chain."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hpcresume as hr
from hpcresume.engine.calls import ChunkResult, Inputs
from hpcresume.engine.chain import Chain
from hpcresume.engine.mark import Mark
from hpcresume.errors import PoolUnrecoverable
from tests.unit.engine.chains import ChainCase, call, counters, failed, records, rows


def test_items_run_side_by_side_up_to_the_limit(case: ChainCase) -> None:
    """``max_concurrency`` items are in flight, not more, and answers keep their slots."""
    running, most = 0, 0

    @hr.stage(max_concurrency=4)
    async def work(x: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001 * (5 - x % 5))
        running -= 1
        return x * 2

    result = case.run([work], list(range(20)))
    assert 4 == most
    assert {i: [i * 2] for i in range(20)} == rows(result)


def test_async_outcomes(case: ChainCase) -> None:
    """Failures, drops, Failed and time-outs are each their own item's."""

    @hr.stage(max_concurrency=8, timeout_s=0.05)
    async def work(x: int, ctx: hr.Context) -> Any:
        if x == 1:
            raise ValueError("one")
        if x == 2:
            await asyncio.sleep(1000)
        if x == 3:
            return None
        if x == 4:
            return hr.Failed("four", retry=False)
        return ctx.item_id

    result = case.run([work], [0, 1, 2, 3, 4, 5])
    assert {0: ["s0"], 3: [], 5: ["s5"]} == rows(result)
    kinds = {slot: (f.kind, f.retry) for slot, f in failed(result).items()}
    assert {1: ("ValueError", True), 2: ("timeout", True), 4: ("Failed", False)} == kinds
    assert [(6, 2, 1, 3)] == counters(result)


def test_cancellation_of_the_stages_own_is_a_failure(case: ChainCase) -> None:
    """A stage that cancels a task of its own fails its item and nothing else."""

    async def work(x: int) -> int:
        if x:
            task = asyncio.ensure_future(asyncio.sleep(10))
            task.cancel()
            await task
        return x

    result = case.run([work], [0, 1])
    assert ({0: [0]}, "CancelledError") == (rows(result), failed(result)[1].kind)


def test_async_generator_fans_out(case: ChainCase) -> None:
    """An async generator fans out; one that raises fails its source."""

    async def fan(n: int) -> AsyncIterator[int]:
        for k in range(n):
            await asyncio.sleep(0)
            yield k
        if n == 2:
            raise ValueError("two")

    result = case.run([fan], [1, 2, 0, 3])
    assert {0: [0], 2: [], 3: [0, 1, 2]} == rows(result)
    assert [1] == list(failed(result))


def test_async_batch(case: ChainCase) -> None:
    """An async batch answers by slot; one that raises as a whole is taken singly."""

    class Batch(hr.Stage):
        batch_size = 3

        async def process_batch(self, batch: Sequence[int]) -> list[int]:
            await asyncio.sleep(0)
            if 4 in batch:
                raise ValueError("four")
            return [x * 2 for x in batch]

    result = case.run([Batch()], [0, 1, 2, 3, 4, 5])
    assert {0: [0], 1: [2], 2: [4], 3: [6], 5: [10]} == rows(result)
    assert [4] == list(failed(result))


def test_worker_broken_ends_the_call(case: ChainCase) -> None:
    """The others in flight are cancelled and nobody is charged."""
    cancelled = []

    @hr.stage(max_concurrency=8)
    async def work(x: int) -> int:
        if x == 0:
            raise hr.WorkerBroken("gone")
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            cancelled.append(x)
            raise
        return x

    result = case.run([work], [0, 1, 2])
    assert ("gone", []) == (result.broken, result.failures)
    assert [1, 2] == cancelled


def test_two_async_stages_are_fused(case: ChainCase) -> None:
    """Items pass from one async stage to the next in one call."""

    async def add(x: int) -> int:
        return x + 1

    assert {0: [3], 1: [4]} == rows(case.run([add, add], [1, 2]))


def test_mark_has_the_earliest_deadline(case: ChainCase, tmp_path: Path) -> None:
    """While items with a time limit run the driver sees the first deadline, and who, if alone."""
    mark, seen = Mark(str(tmp_path / "mark")), []

    @hr.stage(max_concurrency=2, timeout_s=50)
    async def work(x: int) -> int:
        await asyncio.sleep(0.002 * x)
        seen.append(mark.look())
        return x

    call(case.make([work], mark=mark), records([1, 9]))
    assert [None, 1] == [sight.source for sight in seen]
    assert all(-50 < sight.overdue_s < -40 for sight in seen)
    assert float("-inf") == mark.look().overdue_s


def test_an_unrecoverable_pool_ends_the_attempt(case: ChainCase) -> None:
    """What says nothing of the item charges nobody, wherever a stage raises it."""

    async def ask(x: int) -> int:
        raise PoolUnrecoverable("two versions at once")

    def fan(x: int) -> Iterator[int]:
        yield x
        raise PoolUnrecoverable("two versions at once")

    class Batch(hr.Stage):
        batch_size = 2

        def process_batch(self, items: Sequence[int]) -> list[int]:
            raise PoolUnrecoverable("two versions at once")

    for stage in (ask, fan, Batch):
        result = case.run([stage], [0, 1])
        assert ("two versions at once", [], None) == (
            result.unrecoverable,
            result.failures,
            result.frame,
        )


@hr.stage(max_concurrency=4)
async def _any_way(kind: str, ctx: hr.Context) -> Any:
    """Do what a source's payload says, in an order of its own."""
    await asyncio.sleep(0.001 * (len(kind) % 3))
    if kind == "fails":
        raise ValueError(ctx.item_id)
    if kind == "refused":
        return hr.Failed("no", retry=False)
    if kind == "files":
        ctx.output("a.txt").write_text(kind)
    if kind == "lost file":
        ctx.output("b.txt")
    if kind == "no row":
        return float("nan")
    return {"dropped": None, "fan": hr.Many([1, 2, None, 3]), "none": hr.Many([])}.get(kind, kind)


_KINDS = ["plain", "fails", "refused", "files", "lost file", "no row", "dropped", "fan", "none"]


@settings(max_examples=60, deadline=None)
@given(kinds=st.lists(st.sampled_from(_KINDS), min_size=1, max_size=8), again=st.booleans())
@pytest.mark.parametrize("count", [1, 2])
def test_items_processed_by_themselves_are_finished_as_one_call(
    count: int, kinds: list[str], again: bool
) -> None:
    """What was processed one by one and finished together is what one call makes of it."""

    async def one_by_one(chain: Chain, inputs: Inputs) -> ChunkResult:
        parts = [chain.process(inputs.select([slot])) for slot in range(len(inputs))]
        return chain.finish(await asyncio.gather(*parts))  # type: ignore[arg-type]

    with tempfile.TemporaryDirectory() as name:
        case = ChainCase(Path(name))
        inputs = records(kinds, attempts={0: 2} if again else {})
        stages = [_any_way, hr.stage(_same, max_concurrency=2, workers=2)][:count]
        together = asyncio.run(case.make(stages, count=1).run(inputs, marked=False))
        joined = asyncio.run(one_by_one(case.make(stages, count=1), inputs))
    assert len(kinds) == len(joined.took)
    for result in (together, joined):
        result.seconds, result.took = 0.0, []
        for stage in result.counts:
            stage.seconds, stage.memory_mib, stage.spread = 0.0, 0, {}
    assert together == joined


async def _same(x: Any) -> Any:
    return x
