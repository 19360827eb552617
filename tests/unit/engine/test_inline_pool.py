"""The pool in this process: async calls side by side, others one after another."""

from __future__ import annotations

import asyncio
import gc
import threading
from array import array
from pathlib import Path
from typing import Any

import pytest

import hpcresume as hr
from hpcresume.engine.calls import Inputs
from hpcresume.engine.executor import Executor, Limits
from hpcresume.engine.groups import make_groups
from hpcresume.engine.pool import Finished, InlinePool, Started, WorkerRef
from hpcresume.pipeline.sources import encode_payload
from hpcresume.segment.frame import blob_of
from tests.unit.engine.pools import ListFeed, Outcomes

DEADLINE_S = 20
WORKER = WorkerRef(0, 0, 1)


def pool_of(directory: Path, stage: Any, **options: Any) -> InlinePool:
    """Return a started pool of one stage."""
    pipeline = hr.Pipeline("p", ["unused"], [stage])
    pool = InlinePool(
        pipeline,
        make_groups(pipeline.stages, cpus=1),
        run_id="run",
        scratch=directory,
        outputs=None,
        seconds_left=lambda: None,
        **options,
    )
    pool.start(WORKER)
    assert [Started(WORKER)] == pool.wait(DEADLINE_S)
    return pool


def submit(pool: InlinePool, call: int) -> None:
    """Submit a call with one source, whose payload is its number."""
    records = [(str(call), encode_payload(call))]
    pool.submit(WORKER, call, Inputs(array("I", [call]), records), marked=False)


def finished(pool: InlinePool, count: int) -> list[int]:
    """Return the calls that finish next, in order."""
    found: list[int] = []
    while len(found) < count:
        events = pool.wait(DEADLINE_S)
        assert events, f"nothing more than {found} finished"
        found += [call for event in events if isinstance(event, Finished) for call in event.calls]
    return found


def test_async_calls_run_side_by_side(tmp_path: Path) -> None:
    """A call that waits for a later one finishes, and the later one's result comes first."""
    gate: list[asyncio.Event] = []

    @hr.stage(max_concurrency=2)
    async def meet(n: int) -> int:
        if not gate:
            gate.append(asyncio.Event())
            await gate[0].wait()
        gate[0].set()
        return n

    pool = pool_of(tmp_path, meet)
    submit(pool, 1)
    submit(pool, 2)
    assert [1, 2] == sorted(finished(pool, 2))
    pool.close(DEADLINE_S)


def test_a_call_that_hangs_does_not_block(tmp_path: Path) -> None:
    """Waiting ends in time, other calls finish, and closing cancels the one that hangs."""
    ended = threading.Event()

    @hr.stage(max_concurrency=2)
    async def hang(n: int) -> int:
        try:
            await asyncio.sleep(3600 if n == 1 else 0)
        finally:
            if n == 1:
                ended.set()
        return n

    pool = pool_of(tmp_path, hang)
    submit(pool, 1)
    submit(pool, 2)
    assert [2] == finished(pool, 1)
    assert [] == pool.wait(0.01)
    pool.close(DEADLINE_S)
    assert ended.wait(DEADLINE_S)


def test_a_blocked_loop_keeps_no_answer_back(tmp_path: Path) -> None:
    """
    Answers may come together while calls wait for their turn, but one that is there is told
    although a later call blocks the event loop.
    """
    release = threading.Event()

    @hr.stage(max_concurrency=1)
    async def block(n: int) -> int:
        if n == 2:
            release.wait(DEADLINE_S)
        return n

    pool = pool_of(tmp_path, block)
    for call in range(1, 6):
        submit(pool, call)
    assert [1] == finished(pool, 1)
    release.set()
    assert [2, 3, 4, 5] == finished(pool, 4)
    pool.close(DEADLINE_S)


def test_setup_and_calls_share_the_loop(tmp_path: Path) -> None:
    """A client made in setup belongs to the loop that its calls run on."""

    class Client(hr.Stage):
        def setup(self, worker: hr.Worker) -> None:
            self.loop = asyncio.get_running_loop()

        async def process(self, n: int) -> bool:
            return self.loop is asyncio.get_running_loop()

    pool = pool_of(tmp_path, Client())
    submit(pool, 1)
    (event,) = pool.wait(DEADLINE_S)
    assert isinstance(event, Finished)
    assert b"true" in (event.result.frame or b"")
    pool.close(DEADLINE_S)


@pytest.mark.parametrize("watched", [False, True])
def test_where_calls_run(tmp_path: Path, watched: bool) -> None:
    """
    Plain stages run in the thread that waits; async ones beside it, unless somebody looks at
    errors where they happen.
    """
    threads: dict[str, int] = {}

    def plain(n: int) -> int:
        threads["plain"] = threading.get_ident()
        return n

    async def beside(n: int) -> int:
        threads["async"] = threading.get_ident()
        return n

    for stage in (plain, beside):
        pool = pool_of(tmp_path, stage, on_error=(lambda _error: None) if watched else None)
        submit(pool, 1)
        assert [1] == finished(pool, 1)
        pool.close(DEADLINE_S)
    here = threading.get_ident()
    assert (True, watched) == (threads["plain"] == here, threads["async"] == here)


def test_what_was_processed_is_told_before_its_worker_is_broken(tmp_path: Path) -> None:
    """Answers that wait to be told together come before what ends their worker."""

    @hr.stage(max_concurrency=1)
    async def work(n: int) -> Any:
        return hr.WorkerBroken("no more") if n == 3 else n

    pool = pool_of(tmp_path, work)
    for call in range(1, 4):
        submit(pool, call)
    told: list[tuple[list[int], str | None]] = []
    while not told or told[-1][1] is None:
        for event in pool.wait(DEADLINE_S):
            assert isinstance(event, Finished)
            told.append((list(event.calls), event.result.broken))
    assert [1, 2, 3] == [call for calls, _ in told for call in calls]
    assert ([3], "no more") == told[-1]
    pool.close(DEADLINE_S)


def test_large_rows_are_told_in_several_frames(tmp_path: Path) -> None:
    """Answers are joined up to what one frame holds with ease, in the order of their sources."""
    processed, release, others = threading.Event(), threading.Event(), asyncio.Event()
    left = 5

    @hr.stage(max_concurrency=6)
    async def work(n: int) -> str:
        nonlocal left
        await asyncio.sleep(0.001 * (5 - n % 5))
        if n == 6:
            await others.wait()
            processed.set()
            release.wait(DEADLINE_S)
        left -= 1
        if not left:
            others.set()
        return "x" * (3 << 20)

    pool = pool_of(tmp_path, work)
    for call in range(1, 7):
        submit(pool, call)
    assert processed.wait(DEADLINE_S)
    told = [event for event in pool.wait(DEADLINE_S) if isinstance(event, Finished)]
    assert [[1, 2], [3, 4], [5]] == [list(event.calls) for event in told]
    release.set()
    assert [6] == finished(pool, 1)
    pool.close(DEADLINE_S)


def test_blobs_say_which_start_of_a_worker_wrote_them(tmp_path: Path) -> None:
    """By the names of their files it is known which of them take no more."""
    broken = []

    def work(source: int) -> Any:
        if source == 5 and not broken:
            broken.append(source)
            return hr.WorkerBroken("once")
        return source

    class Names(Outcomes):
        def completed(self, frame: bytes, sources: int) -> None:
            files.append(blob_of(frame, what="test").file)

    files: list[str] = []
    pipeline = hr.Pipeline("p", ["unused"], [work], sink=hr.Parts("jsonl"))
    groups = make_groups(pipeline.stages, cpus=1)
    pool = InlinePool(
        pipeline, groups, run_id="run", scratch=tmp_path, outputs=None, seconds_left=lambda: None,
        parts=str(tmp_path),
    )  # fmt: skip
    executor = Executor(groups, pool, ListFeed(list(range(9))), Names(), Limits(chunk_max=1))
    executor.start()
    assert executor.run(lambda: True)
    assert ["0-0-1", "0-0-2"] == sorted({name.rpartition("-")[0] for name in files})


def test_calls_that_begin_after_their_worker_was_retired(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They run in the next worker, and the event loop has nothing to complain of."""
    retired = threading.Event()

    class Work(hr.Stage):
        max_concurrency = 40

        async def process(self, source: int) -> Any:
            if source == 0 and not retired.is_set():
                return hr.WorkerBroken("once")
            # The event loop stands still until then, and the calls behind this one wait.
            retired.wait(DEADLINE_S)
            return source

        def teardown(self) -> None:
            retired.set()

    pipeline = hr.Pipeline("p", ["unused"], [Work()])
    groups = make_groups(pipeline.stages, cpus=1)
    pool = InlinePool(
        pipeline, groups, run_id="run", scratch=tmp_path, outputs=None, seconds_left=lambda: None
    )
    executor = Executor(groups, pool, ListFeed(list(range(40))), Outcomes(), Limits(chunk_max=1))
    executor.start()
    assert executor.run(lambda: True)
    pool.close(DEADLINE_S)
    gc.collect()
    assert 40 == executor.completed
    assert [] == [record for record in caplog.records if record.name == "asyncio"]
