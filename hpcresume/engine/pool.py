"""What the executor needs of the workers: the seam between scheduling and Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hpcresume.engine.calls import ChunkResult, Inputs
from hpcresume.engine.chain import Chain, ChainPlace, run_now
from hpcresume.engine.groups import Group
from hpcresume.errors import HpcResumeError
from hpcresume.pipeline.context import Worker
from hpcresume.pipeline.pipeline import Pipeline


class EngineDiedError(HpcResumeError):
    """Ray itself died under the driver; nobody is charged, the sources in flight are suspects."""

    exit_code = 75


@dataclass(frozen=True, slots=True)
class WorkerRef:
    """Names one worker: its group, its number in it, and how often it was started."""

    group: int
    index: int
    start: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A call returned."""

    call: int
    result: ChunkResult


@dataclass(frozen=True, slots=True)
class Died:
    """A worker died or was killed; its outstanding calls have no results.

    Attributes:
        worker: The worker.
        reason: What is known of its death, for people.
        source: Index of the source it was working on, None where it is not known.
        stage: Number of the stage it was running.
        overdue: Whether the driver killed it because that source ran past its timeout.
        out_of_memory: Whether the kernel killed it because the task's memory ran out.
    """

    worker: WorkerRef
    reason: str
    source: int | None
    stage: int
    overdue: bool = False
    out_of_memory: bool = False


@dataclass(frozen=True, slots=True)
class Started:
    """A worker is set up and takes calls."""

    worker: WorkerRef


@dataclass(frozen=True, slots=True)
class StartFailed:
    """A worker cannot be set up.

    Attributes:
        worker: The worker.
        reason: Why, with the user's traceback.
    """

    worker: WorkerRef
    reason: str


Event = Finished | Died | Started | StartFailed


class Pool(Protocol):
    """Workers of all groups; no method blocks longer than it says.

    Attributes:
        oom_deaths: Workers that the kernel has killed because memory ran out.
    """

    oom_deaths: int

    def start(self, worker: WorkerRef) -> None:
        """Begin to start a worker; ``Started`` or ``StartFailed`` follows."""

    def submit(self, worker: WorkerRef, call: int, inputs: Inputs, *, marked: bool) -> None:
        """Hand a worker a call; calls of one worker run in this order."""

    def retire(self, worker: WorkerRef) -> None:
        """End a worker; calls it still holds are not answered."""

    def wait(self, timeout_s: float) -> list[Event]:
        """Return what has happened, waiting up to ``timeout_s`` for the first event."""

    def close(self, timeout_s: float) -> None:
        """End all workers, in order where they answer in time."""


class InlinePool:
    """Runs every call in this process, one after another; for a debugger and for tests."""

    def __init__(
        self,
        pipeline: Pipeline,
        groups: list[Group],
        *,
        run_id: str,
        scratch: Path,
        outputs: Path | None,
        parts: str = "",
        seconds_left: Callable[[], float | None],
        on_error: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.oom_deaths = 0
        self._on_error = on_error
        self._parts = parts
        self._pipeline, self._groups, self._run_id = pipeline, groups, run_id
        self._scratch, self._outputs, self._seconds_left = scratch, outputs, seconds_left
        self._chains: dict[WorkerRef, Chain] = {}
        self._events: list[Event] = []
        self._queue: list[tuple[WorkerRef, int, Inputs]] = []
        self._loop = asyncio.Runner()

    def start(self, worker: WorkerRef) -> None:
        """Set up a worker's stages now."""
        group = self._groups[worker.group]
        place = ChainPlace(
            run_id=self._run_id,
            scratch=self._scratch,
            outputs=self._outputs,
            parts=self._parts,
            worker=Worker(
                index=worker.index,
                cpus=group.cpus,
                gpus=group.gpus,
                scratch=self._scratch / f"worker-{worker.group}-{worker.index}",
            ),
            seconds_left=self._seconds_left,
            on_error=self._on_error,
        )
        chain = Chain(self._pipeline, first=group.first, stages=group.stages, place=place)
        try:
            self._set_up(chain, group)
        except HpcResumeError as error:
            self._events.append(StartFailed(worker, str(error)))
            return
        self._chains[worker] = chain
        self._events.append(Started(worker))

    def _set_up(self, chain: Chain, group: Group) -> None:
        if not group.is_async:
            chain.setup()
            return

        async def on_the_loop() -> None:
            # A client that a stage makes may want the loop it is going to be used on.
            chain.setup()

        self._loop.run(on_the_loop())

    def submit(self, worker: WorkerRef, call: int, inputs: Inputs, *, marked: bool) -> None:
        """Queue a call; it runs in :meth:`wait`."""
        del marked  # a death of this process cannot be survived by it
        self._queue.append((worker, call, inputs))

    def retire(self, worker: WorkerRef) -> None:
        """Tear down a worker's stages."""
        self._queue = [entry for entry in self._queue if entry[0] != worker]
        chain = self._chains.pop(worker, None)
        if chain is not None:
            chain.teardown()

    def wait(self, timeout_s: float) -> list[Event]:
        """Return what has happened, running one queued call if nothing has."""
        if not self._events and not self._queue:
            # Nothing can happen by itself here; whoever waits may be told something else.
            time.sleep(timeout_s)
        if not self._events and self._queue:
            worker, call, inputs = self._queue.pop(0)
            chain = self._chains[worker]
            coroutine = chain.run(inputs, marked=False)
            start = time.perf_counter()
            result = (
                self._loop.run(coroutine)
                if self._groups[worker.group].is_async
                else run_now(coroutine)
            )
            result.seconds = time.perf_counter() - start
            self._events.append(Finished(call, result))
        events, self._events = self._events, []
        return events

    def close(self, timeout_s: float) -> None:
        """Tear everything down."""
        del timeout_s
        for worker in list(self._chains):
            self.retire(worker)
        self._loop.close()
