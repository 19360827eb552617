"""What the executor needs of the workers: the seam between scheduling and Ray."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hpcresume.engine.calls import ChunkResult, Inputs
from hpcresume.engine.chain import Call, Chain, ChainPlace, run_now
from hpcresume.engine.groups import Group
from hpcresume.errors import HpcResumeError
from hpcresume.pipeline.context import Worker
from hpcresume.pipeline.pipeline import Pipeline

ResultT = TypeVar("ResultT")
_GATHER_S = 0.05
_BEGIN_MAX = 4
_FRAME_BYTES = 8 << 20


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
    """A call returned, or several of one worker together.

    Attributes:
        calls: Their numbers.
        result: What came of them; its slots count the items of all.
    """

    calls: Sequence[int]
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
        call_most_s: Most work that one call is to hold, whatever the settings say.
    """

    oom_deaths: int
    call_most_s: float

    def start(self, worker: WorkerRef) -> None:
        """Begin to start a worker; ``Started`` or ``StartFailed`` follows."""

    def submit(self, worker: WorkerRef, call: int, inputs: Inputs, *, marked: bool) -> None:
        """Hand a worker a call; calls of one worker run in this order."""

    def recall(self, worker: WorkerRef) -> None:
        """Have a worker answer soon, and hand back what it has not begun, from now on."""

    def retire(self, worker: WorkerRef) -> None:
        """End a worker; calls it still holds are not answered."""

    def wait(self, timeout_s: float) -> list[Event]:
        """Return what has happened, waiting up to ``timeout_s`` for the first event."""

    def close(self, timeout_s: float) -> None:
        """End all workers, in order where they answer in time."""


class InlinePool:
    """Runs every call in this process; for a debugger, for tests, and where Ray is not wanted.

    Calls of synchronous stages run one after another in the thread that waits for them.
    Those of async stages run side by side on an event loop in a thread of its own, unless
    somebody wants to look at errors where they happen.
    """

    # While a call runs nobody else is served.
    call_most_s = 0.1

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
        restarts: Path | None = None,
        attempt: Path | None = None,
    ) -> None:
        self.oom_deaths, self._attempt = 0, attempt
        self._parts = parts
        self._on_error, self._restarts = on_error, restarts
        self._pipeline, self._groups, self._run_id = pipeline, groups, run_id
        self._scratch, self._outputs, self._seconds_left = scratch, outputs, seconds_left
        self._chains: dict[WorkerRef, Chain] = {}
        self._events: list[Event] = []
        self._happened = threading.Condition()
        self._is_urgent = False
        self._failed: BaseException | None = None
        self._fresh: deque[tuple[WorkerRef, int, Inputs]] = deque()
        self._under_way: defaultdict[WorkerRef, set[asyncio.Task[None]]] = defaultdict(set)
        self._processed: defaultdict[WorkerRef, list[tuple[int, Call]]] = defaultdict(list)
        self._queue: list[tuple[WorkerRef, int, Inputs]] = []
        any_async = any(group.is_async for group in groups)
        self._loop: _LoopThread | _LoopHere | None = None
        if any_async:
            self._loop = _LoopThread() if on_error is None else _LoopHere()

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
                attempt=self._attempt,
            ),
            seconds_left=self._seconds_left,
            on_error=self._on_error,
            restarts=self._restarts,
            writer=f"{worker.group}-{worker.index}-{worker.start}",
        )
        chain = Chain(self._pipeline, first=group.first, stages=group.stages, place=place)
        try:
            self._set_up(chain, group)
        except HpcResumeError as error:
            self._tell(StartFailed(worker, str(error)))
            return
        self._chains[worker] = chain
        self._tell(Started(worker))

    def _set_up(self, chain: Chain, group: Group) -> None:
        if not group.is_async:
            chain.setup()
            return

        async def on_the_loop() -> None:
            # A client that a stage makes may want the loop it is going to be used on.
            chain.setup()

        assert self._loop is not None
        self._loop.run(on_the_loop())

    def submit(self, worker: WorkerRef, call: int, inputs: Inputs, *, marked: bool) -> None:
        """Start a call on the event loop, or queue it to be run in :meth:`wait`."""
        del marked  # a death of this process cannot be survived by it
        if not (self._groups[worker.group].is_async and isinstance(self._loop, _LoopThread)):
            self._queue.append((worker, call, inputs))
            return
        self._fresh.append((worker, call, inputs))
        if len(self._fresh) == 1:  # otherwise the loop is to look already
            self._loop.call(self._begin)

    def _begin(self) -> None:
        """Start calls that were submitted; runs on the event loop's thread.

        A few at a time: the loop has others to serve between them.
        """
        for _ in range(min(len(self._fresh), _BEGIN_MAX)):
            worker, call, inputs = self._fresh.popleft()
            under_way = self._under_way[worker]
            task = asyncio.ensure_future(self._run_call(worker, call, inputs))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        if self._fresh:
            asyncio.get_running_loop().call_soon(self._begin)

    async def _run_call(self, worker: WorkerRef, call: int, inputs: Inputs) -> None:
        chain = self._chains.get(worker)
        if chain is None:
            return  # it was retired before this call's turn came, and its calls run elsewhere
        try:
            if len(inputs) > 1:
                self._tell(Finished([call], await chain.run(inputs, marked=False)))
                return
            outcome = await chain.process(inputs)
            if isinstance(outcome, ChunkResult):
                self._tell(Finished([call], outcome))
                return
            # While calls wait for their turn here, nobody waits for the next one.
            others = len(self._under_way[worker]) - 1
            is_urgent = others <= self._groups[worker.group].concurrency
            with self._happened:
                self._processed[worker].append((call, outcome))
                if is_urgent:
                    self._is_urgent = True
                    self._happened.notify_all()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            with self._happened:
                self._failed = error
                self._happened.notify_all()

    def _tell(self, event: Event) -> None:
        with self._happened:
            self._events.append(event)
            self._is_urgent = True
            self._happened.notify_all()

    def recall(self, worker: WorkerRef) -> None:
        """Hand back the worker's calls that wait to be run in :meth:`wait`."""
        for entry in [entry for entry in self._queue if entry[0] == worker]:
            self._queue.remove(entry)
            self._tell(Finished([entry[1]], ChunkResult(unbegun=len(entry[2]))))

    def retire(self, worker: WorkerRef) -> None:
        """Tear down a worker's stages."""
        self._queue = [entry for entry in self._queue if entry[0] != worker]
        chain = self._chains.pop(worker, None)
        if chain is not None:
            chain.teardown()

    def wait(self, timeout_s: float) -> list[Event]:
        """Return what has happened, running one queued call if nothing has."""
        with self._happened:
            if not self._queue:
                self._await_events(time.monotonic() + timeout_s)
            if self._failed is not None:
                raise self._failed
            happened = bool(self._events or self._processed)
        if not happened and self._queue:
            self._tell(self._run_queued(*self._queue.pop(0)))
        with self._happened:
            events, self._events, self._is_urgent = self._events, [], False
            processed, self._processed = self._processed, defaultdict(list)
        # First: what a worker held is given up with it where it turns out to be broken.
        finished = [event for calls in processed.values() for event in self._finish(calls)]
        return [*finished, *events]

    def _await_events(self, deadline: float) -> None:
        """Wait for an event that is urgent, and a while for others to come together."""
        while (left := deadline - time.monotonic()) > 0:
            self._happened.wait_for(lambda: self._is_urgent or self._failed, min(left, _GATHER_S))
            if self._events or self._processed or self._failed:
                return

    @staticmethod
    def _finish(processed: list[tuple[int, Call]]) -> Iterator[Finished]:
        """Yield what came of items that were processed each by itself, of many together."""
        # Frames need the order of the sources.
        processed.sort(key=lambda entry: entry[1].inputs.sources[0])
        for part in _parts(processed):
            result = part[0][1].chain.finish([outcome for _, outcome in part])
            yield Finished([call for call, _ in part], result)

    def _run_queued(self, worker: WorkerRef, call: int, inputs: Inputs) -> Finished:
        coroutine = self._chains[worker].run(inputs, marked=False)
        if not self._groups[worker.group].is_async:
            return Finished([call], run_now(coroutine))
        assert self._loop is not None
        return Finished([call], self._loop.run(coroutine))

    def close(self, timeout_s: float) -> None:
        """Tear everything down."""
        if self._loop is not None:
            self._loop.close(timeout_s)
        for worker in list(self._chains):
            self.retire(worker)


def _parts(processed: list[tuple[int, Call]]) -> Iterator[list[tuple[int, Call]]]:
    """Yield processed items in parts whose rows one frame holds with ease."""
    part: list[tuple[int, Call]] = []
    size_bytes = 0
    for entry in processed:
        added = entry[1].made_bytes()
        if part and size_bytes + added > _FRAME_BYTES:
            yield part
            part, size_bytes = [], 0
        part.append(entry)
        size_bytes += added
    if part:
        yield part


class _LoopHere:
    """An event loop that runs in the calling thread while a call does."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()

    def run(self, coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
        return self._runner.run(coroutine)

    def close(self, timeout_s: float) -> None:
        del timeout_s
        self._runner.close()


class _LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="stages", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(function)

    def start(self, coroutine: Coroutine[Any, Any, ResultT]) -> Future[ResultT]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
        return self.start(coroutine).result()

    def close(self, timeout_s: float) -> None:
        """Cancel what runs; a coroutine that blocks the loop is left behind."""

        async def cancel_all() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=timeout_s / 2) if tasks else None

        with contextlib.suppress(TimeoutError):
            self.start(cancel_all()).result(timeout_s)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self._loop.close()
