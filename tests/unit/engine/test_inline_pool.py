"""The pool in this process: async calls side by side, others one after another."""

from __future__ import annotations

import asyncio
import threading
from array import array
from pathlib import Path
from typing import Any

import pytest

import hpcresume as hr
from hpcresume.engine.calls import Inputs
from hpcresume.engine.groups import make_groups
from hpcresume.engine.pool import Finished, InlinePool, Started, WorkerRef
from hpcresume.pipeline.sources import encode_payload

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
        found += [event.call for event in events if isinstance(event, Finished)]
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
