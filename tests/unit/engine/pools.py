"""A pool without processes: real stages, scripted deaths, and what the executor did with it."""

from __future__ import annotations

import asyncio
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import orjson
from pyroaring import BitMap

import hpcresume as hr
from hpcresume.engine.calls import Inputs
from hpcresume.engine.chain import Chain, ChainPlace, run_now
from hpcresume.engine.executor import Executor, Limits
from hpcresume.engine.groups import Group, make_groups
from hpcresume.engine.pool import Died, Event, Finished, Started, StartFailed, WorkerRef
from hpcresume.pipeline.context import Worker
from hpcresume.pipeline.sources import encode_payload
from hpcresume.segment.frame import decode_frame
from hpcresume.segment.segment import Failure


@dataclass
class Death:
    """How a scripted worker dies: what its mark says, and whether the driver killed it."""

    source: int | None = None
    stage: int = 0
    overdue: bool = False
    out_of_memory: bool = False


@dataclass
class Submitted:
    """One call as the pool got it."""

    call: int
    worker: WorkerRef
    sources: list[int]
    marked: bool
    beside: int


@dataclass
class Clock:
    """A clock that a test moves on."""

    now: float = 1000.0

    def __call__(self) -> float:
        """Return what time it is."""
        return self.now


@dataclass
class ScriptedPool:
    """Runs calls in this process, oldest of a worker first.

    Attributes:
        kills: Asked before each call whether it kills its worker.
        fails_to_start: Asked at each start why it fails, if it does.
        seconds_per_item: What calls are said to have taken.
        takes: Asked what a call takes, instead; the clock is moved on by it.
        clock: What time it is.
        begins: Asked how many of its items a call begins, unless its worker was recalled.
        answers: How many calls run before their answers come, the newest first.
        rng: Chooses which worker goes next; without it the first that has a call.
    """

    pipeline: hr.Pipeline
    groups: list[Group]
    directory: Path
    kills: Callable[[WorkerRef, Inputs, bool], Death | None] = lambda _w, _i, _m: None
    fails_to_start: Callable[[WorkerRef], str | None] = lambda _w: None
    seconds_per_item: float | None = None
    takes: Callable[[Inputs], float] | None = None
    clock: Clock = field(default_factory=Clock)
    begins: Callable[[Inputs], int] = len
    answers: int = 1
    rng: Random | None = None
    log: list[Submitted] = field(default_factory=list)
    starts: list[WorkerRef] = field(default_factory=list)
    retired: list[WorkerRef] = field(default_factory=list)
    recalled: list[WorkerRef] = field(default_factory=list)
    oom_deaths: int = 0
    call_most_s: float = float("inf")
    _events: list[Event] = field(default_factory=list)
    _calls: dict[WorkerRef, deque[tuple[int, Inputs, bool]]] = field(
        default_factory=lambda: defaultdict(deque)
    )

    def __post_init__(self) -> None:
        self._chains = [self._chain(group) for group in self.groups]

    def _chain(self, group: Group) -> Chain:
        place = ChainPlace(
            run_id="run",
            scratch=self.directory / "scratch",
            outputs=self.directory / "outputs",
            worker=Worker(index=0, cpus=1, gpus=0, scratch=self.directory / "worker"),
            seconds_left=lambda: None,
        )
        return Chain(self.pipeline, first=group.first, stages=group.stages, place=place)

    def start(self, worker: WorkerRef) -> None:
        """Start a worker at once."""
        self.starts.append(worker)
        reason = self.fails_to_start(worker)
        self._events.append(StartFailed(worker, reason) if reason else Started(worker))

    def submit(self, worker: WorkerRef, call: int, inputs: Inputs, *, marked: bool) -> None:
        """Queue a call."""
        beside = sum(len(calls) for calls in self._calls.values())
        self.log.append(Submitted(call, worker, list(inputs.sources), marked, beside))
        self._calls[worker].append((call, inputs, marked))

    def waiting(self) -> list[Submitted]:
        """Return the calls that have not run."""
        calls = {call for held in self._calls.values() for call, _, _ in held}
        return [submitted for submitted in self.log if submitted.call in calls]

    def recall(self, worker: WorkerRef) -> None:
        """Have a worker begin nothing more."""
        self.recalled.append(worker)

    def retire(self, worker: WorkerRef) -> None:
        """Drop a worker and its calls."""
        self.retired.append(worker)
        self._calls.pop(worker, None)

    def wait(self, timeout_s: float) -> list[Event]:
        """Run calls, unless something has happened already."""
        del timeout_s
        if not self._events:
            for _ in range(self.answers):
                self._run_one()
            self._events.reverse()
        events, self._events = self._events, []
        return events

    def close(self, timeout_s: float) -> None:
        """Nothing lasts."""
        del timeout_s

    def _run_one(self) -> None:
        busy = sorted(
            (worker for worker, calls in self._calls.items() if calls),
            key=lambda ref: (ref.group, ref.index),
        )
        if not busy:
            return
        worker = self.rng.choice(busy) if self.rng else busy[0]
        call, inputs, marked = self._calls[worker][0]
        death = self.kills(worker, inputs, marked)
        if death is not None:
            del self._calls[worker]
            seen = (death.source, death.stage, death.overdue, death.out_of_memory)
            self._events.append(Died(worker, "dead", *seen))
            return
        self._calls[worker].popleft()
        chain = self._chains[worker.group]
        coroutine = chain.run(inputs, marked=marked)
        is_async = chain.stages[0].traits.is_async
        begun = len(inputs) if is_async else self.begins(inputs)
        begun = 0 if worker in self.recalled else begun
        if begun < len(inputs):
            coroutine.close()
            coroutine = chain.run(inputs.select(range(begun)), marked=marked)
        result = asyncio.run(coroutine) if is_async else run_now(coroutine)
        result.unbegun = len(inputs) - begun
        if self.seconds_per_item is not None:
            result.seconds = self.seconds_per_item * begun
        if self.takes is not None:
            result.seconds = self.takes(inputs)
            self.clock.now += result.seconds
        self._events.append(Finished([call], result))


class ListFeed:
    """Sources ``s0``, ``s1``, ... with payloads."""

    def __init__(self, payloads: Sequence[Any]) -> None:
        self._records = [(f"s{i}", encode_payload(payload)) for i, payload in enumerate(payloads)]
        self.taken = BitMap()
        self.weights: dict[int, float] = {}

    def _fresh(self) -> list[int]:
        return [i for i in range(len(self._records)) if i not in self.taken]

    def left(self) -> int:
        """Return how many sources have not been taken."""
        return len(self._fresh())

    def take(self, count: int, size_bytes: int, *, weight_max: float) -> Inputs | None:
        """Return the next sources that are not too heavy."""
        del size_bytes
        fresh = [i for i in self._fresh() if self.weight(i) <= weight_max][:count]
        self.taken |= BitMap(fresh)
        return self.give(fresh) if fresh else None

    def weight(self, source: int) -> float:
        """Return a source's weight."""
        return self.weights.get(source, 1.0)

    def give(self, sources: Sequence[int]) -> Inputs:
        """Return given sources."""
        return Inputs(
            array("I", sources),
            records=[self._records[i] for i in sources],
            weight=sum(map(self.weight, sources)),
        )


@dataclass
class Outcomes:
    """What the executor told its listener."""

    rows: dict[int, list[Any]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    open: dict[int, list[int]] = field(default_factory=dict)
    alone: list[list[int]] = field(default_factory=list)
    begun: set[int] = field(default_factory=set)
    events: list[tuple[str, list[int]]] = field(default_factory=list)

    def started(self, call: int, sources: BitMap, *, alone: bool, begins: bool) -> None:
        """Note a call in flight."""
        assert call not in self.open
        if begins:
            self.begun.add(call)
        self.open[call] = list(sources)
        self.events.append(("started", list(sources)))
        if alone:
            self.alone.append(list(sources))

    def began(self, call: int) -> None:
        """Note that a call which waited is worked on."""
        assert call in self.open
        assert call not in self.begun
        self.begun.add(call)

    def ended(self, call: int) -> None:
        """Note its end."""
        del self.open[call]

    def completed(self, frame: bytes, sources: int) -> None:
        """Keep the rows; a source must complete once."""
        decoded = decode_frame(frame, what="test")
        found = {i: [orjson.loads(line) for line in d.splitlines()] for i, d in decoded.sources()}
        assert sources == len(found)
        assert not self.rows.keys() & found.keys()
        self.rows |= found
        self.events.append(("completed", sorted(found)))

    def failed(self, failure: Failure) -> None:
        """Keep a charge."""
        self.failures.append(failure)
        self.events.append(("failed", [failure.source]))

    def charged(self) -> list[tuple[int, int, str]]:
        """Return source, attempt and kind of every charge, in order."""
        return [(f.source, f.attempt, f.kind) for f in self.failures]


class Bench:
    """An executor over a scripted pool."""

    def __init__(
        self,
        directory: Path,
        stages: Sequence[Any],
        payloads: Sequence[Any],
        *,
        workers: int = 1,
        limits: Limits | None = None,
        sink: Any = "rows",
        suspects: Sequence[BitMap] = (),
        attempts: dict[int, int] | None = None,
        ran: dict[int, float] | None = None,
        weights: dict[int, float] | None = None,
        **pool: Any,
    ) -> None:
        pipeline = hr.Pipeline(
            name="p",
            sources=["unused"],
            stages=list(stages),
            sink=hr.Rows() if sink == "rows" else sink,
        )
        self.groups = make_groups(pipeline.stages, cpus=workers)
        self.pool = ScriptedPool(pipeline, self.groups, directory, **pool)
        self.feed, self.outcomes = ListFeed(payloads), Outcomes()
        self.feed.taken = BitMap(ran or {}).union(*suspects)
        self.feed.weights = weights or {}
        self.executor = Executor(
            self.groups,
            self.pool,
            self.feed,
            self.outcomes,
            limits or Limits(),
            attempts=attempts,
            suspects=suspects,
            ran=ran,
            has_sink=pipeline.sink is not None,
            clock=self.pool.clock,
        )

    def run(self, tick: Callable[[], bool] = lambda: True) -> bool:
        """Run to the end."""
        self.executor.start()
        return self.executor.run(tick, tick_s=0)

    def sizes(self, group: int = 0) -> list[int]:
        """Return how many items each call of a group had."""
        return [len(s.sources) for s in self.pool.log if s.worker.group == group]
