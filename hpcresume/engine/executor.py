"""The streaming executor: sources through groups of workers, deepest items first.

Sources are admitted while earlier ones drain, bounded by what may wait between groups.
Calls are sized by time, since one call costs the driver a fraction of a millisecond.  The
executor is the only one that decides what a source's outcome is; it hands completed chunks
and failures to its listener, and asks its pool for events.

Who is charged when something dies: the call that a dead worker was working on is suspect.
If the worker's mark names a source, that source is run alone; otherwise the call is run
again in halves, and then alone.  Only a death while alone is charged, to that source.
"""

from __future__ import annotations

import itertools
import logging
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pyroaring import BitMap

from hpcresume.engine.calls import ChunkResult, Inputs, SlotFailure
from hpcresume.engine.groups import Group
from hpcresume.engine.pool import (
    Died,
    Event,
    Finished,
    Pool,
    Started,
    StartFailed,
    WorkerRef,
)
from hpcresume.errors import HpcResumeError
from hpcresume.ids import ItemPath
from hpcresume.ledger.accounting import Accounting, Ack, Verdict
from hpcresume.segment.frame import FrameBuilder
from hpcresume.segment.segment import Failure, StageCount

log = logging.getLogger(__name__)

MAX_LIKE_FAILURES = 50
MAX_STARTS_WITHOUT_WORK = 3
_FRAME_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 20


class StageBrokenError(HpcResumeError):
    """One stage fails every source in the same way, or cannot start; nobody is charged."""

    exit_code = 76

    def __init__(self, stage: str, reason: str, *, kind: str) -> None:
        super().__init__(reason, stage=stage, kind=kind)


class Feed(Protocol):
    """Where the executor takes fresh sources from."""

    def take(self, count: int, size_bytes: int) -> Inputs | None:
        """Return up to ``count`` sources in index order, None when there are no more."""

    def give(self, sources: Sequence[int]) -> Inputs:
        """Return sources that were taken before, by index, once more."""

    def left(self) -> int:
        """Return how many sources have not been taken."""


class Listener(Protocol):
    """Who is told what became of the sources."""

    def started(self, call: int, sources: BitMap, *, alone: bool) -> None:
        """A call with these sources is handed to a worker; ``alone``: nothing else runs."""

    def ended(self, call: int) -> None:
        """That call is over, one way or another."""

    def completed(self, frame: bytes, sources: int) -> None:
        """These sources are complete."""

    def failed(self, failure: Failure) -> None:
        """A try of a source failed and is charged."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the executor.

    Attributes:
        max_attempts: Tries after which a source is quarantined.
        chunk_target_s: Work that one call is to hold.
        chunk_max: Most items in one call.
        waiting_max: Most items that wait between groups before sources are held back.
        waiting_max_bytes: The same in bytes.
    """

    max_attempts: int = 3
    chunk_target_s: float = 0.01
    chunk_max: int = 4096
    waiting_max: int = 8192
    waiting_max_bytes: int = 128 << 20


@dataclass(slots=True)
class _Chunk:
    """A call that waits or runs."""

    inputs: Inputs
    group: int
    isolated: bool = False
    exclusive: bool = False
    tainted: bool = False


@dataclass(slots=True)
class _Worker:
    ref: WorkerRef
    ready: bool = False
    calls: deque[int] = field(default_factory=deque)


@dataclass(slots=True)
class _GroupState:
    group: Group
    workers: list[_Worker]
    queue: deque[_Chunk] = field(default_factory=deque)
    waiting: int = 0
    waiting_bytes: int = 0
    seconds_per_item: float = 0.0
    fruitless_starts: int = 0
    counts: list[StageCount] = field(default_factory=list)


@dataclass(slots=True)
class _Streak:
    """Consecutive failures of one stage by sources that never failed before."""

    kind: str = ""
    failures: list[Failure] = field(default_factory=list)


class Executor:
    """Runs the sources of one shard."""

    def __init__(
        self,
        groups: Sequence[Group],
        pool: Pool,
        feed: Feed,
        listener: Listener,
        limits: Limits,
        *,
        attempts: Mapping[int, int] | None = None,
        suspects: Sequence[BitMap] = (),
        has_sink: bool = True,
    ) -> None:
        self._pool, self._feed, self._listener, self._limits = pool, feed, listener, limits
        self._charged: dict[int, int] = dict(attempts or {})
        self._has_sink = has_sink
        self._groups = [
            _GroupState(
                group,
                [_Worker(WorkerRef(group.number, i, 1)) for i in range(group.workers)],
                counts=[StageCount(stage.name) for stage in group.stages],
            )
            for group in groups
        ]
        self._stage_names = [s.name for group in groups for s in group.stages]
        self._calls: dict[int, tuple[_Chunk, _Worker]] = {}
        self._numbers = itertools.count(1)
        self._accounting = Accounting()
        self._ids: dict[int, str] = {}
        self._rows: dict[int, list[tuple[ItemPath, bytes]]] = defaultdict(list)
        self._files: dict[int, list[tuple[ItemPath, str]]] = defaultdict(list)
        self._done: dict[int, str] = {}
        self._done_bytes = 0
        self._streaks: dict[str, _Streak] = defaultdict(_Streak)
        self._retries: list[int] = []
        self._solo = deque(half for group in suspects for half in _halves(group))
        self._deadly: set[int] = set()
        self._held: set[int] = set()
        self._stopping = self._holding = False
        self.quarantined = 0
        self.completed = 0


    def stop(self) -> None:
        """Admit no more sources; what is in flight may finish."""
        self._stopping = True

    def hold(self, holding: bool) -> None:  # noqa: FBT001  # a state, set as such
        """Admit no sources for now, or admit them again."""
        self._holding = holding

    @property
    def ready(self) -> bool:
        """Whether every group has a worker that takes calls."""
        return all(any(worker.ready for worker in state.workers) for state in self._groups)

    @property
    def in_flight(self) -> int:
        """Sources that workers hold or that wait between groups."""
        calls = sum(len(chunk.inputs) for chunk, _ in self._calls.values())
        return max(calls, len(self._accounting))

    @property
    def failing(self) -> int:
        """Sources that failed and are to be tried again by this attempt."""
        return len(self._retries) + sum(len(s.failures) for s in self._streaks.values())

    def counts(self) -> list[StageCount]:
        """Return the counters of every stage, in order."""
        return [count for state in self._groups for count in state.counts]


    def start(self) -> None:
        """Begin to start all workers."""
        for state in self._groups:
            for worker in state.workers:
                self._pool.start(worker.ref)

    def run(self, tick: Callable[[], bool], *, tick_s: float = 0.2) -> bool:
        """Run until nothing is left, or until stopped and drained, or ``tick`` says so.

        Args:
            tick: Called at least every ``tick_s`` seconds; False ends the run at once.
            tick_s: Longest wait for an event.

        Returns:
            Whether every source of the shard is settled.

        Raises:
            StageBrokenError: A stage fails everything in one way, or cannot start.
        """
        while True:
            if not tick():
                return False
            self._dispatch()
            if not self._calls and self._stopping:
                self._flush()
                return self._is_settled()
            if not self._calls and self._is_idle():
                if self._retry_failed():
                    continue
                self._flush()
                return True
            for event in self._pool.wait(tick_s):
                self._handle(event)

    def _is_idle(self) -> bool:
        waiting = any(state.queue for state in self._groups)
        return not waiting and not self._solo and self._feed.left() == 0

    def _is_settled(self) -> bool:
        return self._is_idle() and not self._calls and not self.failing

    def _retry_failed(self) -> bool:
        """At the end of the shard, take the failed sources once more."""
        for streak in self._streaks.values():
            self._settle_streak(streak)
        if not self._retries:
            return False
        sources, self._retries = sorted(self._retries), []
        first = self._groups[0]
        size = self._chunk_size(first)
        ordinary = [source for source in sources if source not in self._deadly]
        chunks = [ordinary[i : i + size] for i in range(0, len(ordinary), size)]
        chunks += [[source] for source in sources if source in self._deadly]
        for chunk in chunks:
            inputs = self._feed.give(chunk)
            self._set_attempts(inputs)
            self._enqueue(first, _Chunk(inputs, 0, isolated=chunk[0] in self._deadly))
        return True

    def _set_attempts(self, inputs: Inputs) -> None:
        if not self._charged:
            return
        for slot, source in enumerate(inputs.sources):
            charged = self._charged.get(source)
            if charged:
                inputs.attempts[slot] = charged + 1


    def _dispatch(self) -> None:
        if any(chunk.exclusive for chunk, _ in self._calls.values()):
            return
        for state in reversed(self._groups):
            for worker in sorted(state.workers, key=lambda w: len(w.calls)):
                while worker.ready and self._has_room(state, worker):
                    chunk = self._next_chunk(state, worker)
                    if chunk is None:
                        break
                    self._submit(worker, chunk)
                    if chunk.exclusive:
                        return

    def _has_room(self, state: _GroupState, worker: _Worker) -> bool:
        if any(self._calls[call][0].isolated for call in worker.calls):
            return False
        if not state.group.is_async:
            return len(worker.calls) < 2
        held = sum(len(self._calls[call][0].inputs) for call in worker.calls)
        return held < state.group.concurrency * 3 // 2 + 1

    def _next_chunk(self, state: _GroupState, worker: _Worker) -> _Chunk | None:
        for position, chunk in enumerate(state.queue):
            if chunk.isolated and worker.calls:
                continue
            if chunk.exclusive and self._calls:
                continue
            del state.queue[position]
            state.waiting -= len(chunk.inputs)
            state.waiting_bytes -= chunk.inputs.size_bytes()
            return chunk
        if state.group.number == 0 and self._may_admit():
            return self._admit(state, worker)
        return None

    def _may_admit(self) -> bool:
        if self._stopping or self._holding:
            return False
        limits = self._limits
        return all(
            later.waiting < limits.waiting_max and later.waiting_bytes < limits.waiting_max_bytes
            for later in self._groups[1:]
        )

    def _admit(self, state: _GroupState, worker: _Worker) -> _Chunk | None:
        if self._solo:
            if self._calls or worker.calls:
                return None
            return self._suspects_of_a_death(self._solo.popleft())
        inputs = self._feed.take(self._chunk_size(state), _CHUNK_BYTES)
        if inputs is None:
            return None
        self._set_attempts(inputs)
        return _Chunk(inputs, 0)

    def _suspects_of_a_death(self, sources: BitMap) -> _Chunk:
        inputs = self._feed.give(list(sources))
        self._set_attempts(inputs)
        return _Chunk(inputs, 0, isolated=True, exclusive=True)

    def _chunk_size(self, state: _GroupState) -> int:
        limits = self._limits
        per_item = state.seconds_per_item
        size = int(limits.chunk_target_s / per_item) if per_item else 1
        spread = -(-(self._feed.left() or 1) // (4 * len(state.workers)))
        size = min(size, limits.chunk_max, max(1, spread))
        return max(1, size, min(state.group.batch_size, limits.chunk_max))

    def _submit(self, worker: _Worker, chunk: _Chunk) -> None:
        call = next(self._numbers)
        if len(self._groups) > 1 and chunk.group == 0:
            self._admit_pending(chunk.inputs)
        self._calls[call] = (chunk, worker)
        worker.calls.append(call)
        sources = BitMap(chunk.inputs.sources)
        self._listener.started(call, sources, alone=chunk.exclusive and len(sources) == 1)
        slow = self._groups[chunk.group].seconds_per_item > 2e-4
        self._pool.submit(worker.ref, call, chunk.inputs, marked=chunk.isolated or slow)

    def _admit_pending(self, inputs: Inputs) -> None:
        for slot, source in enumerate(inputs.sources):
            self._ids[source] = inputs.source_id(slot)
            self._accounting.admit(source, inputs.attempt(slot))

    def _enqueue(self, state: _GroupState, chunk: _Chunk, *, front: bool = False) -> None:
        (state.queue.appendleft if front else state.queue.append)(chunk)
        state.waiting += len(chunk.inputs)
        state.waiting_bytes += chunk.inputs.size_bytes()


    def _handle(self, event: Event) -> None:
        if isinstance(event, Finished):
            self._finished(event)
            return
        state = self._groups[event.worker.group]
        worker = state.workers[event.worker.index]
        if worker.ref != event.worker:
            return
        if isinstance(event, Started):
            worker.ready = True
        elif isinstance(event, StartFailed):
            self._restart(state, worker, event.reason)
        else:
            self._died(state, worker, event)

    def _finished(self, event: Finished) -> None:
        entry = self._calls.pop(event.call, None)
        if entry is None:
            return
        chunk, worker = entry
        worker.calls.remove(event.call)
        state, result = self._groups[chunk.group], event.result
        if result.broken is not None:
            self._broken(state, worker, chunk, result.broken)
            self._listener.ended(event.call)
            return
        state.fruitless_starts = 0
        self._learn(state, chunk, result)
        if len(self._groups) > 1:
            self._account(chunk, result)
        elif result.frame is not None:
            self.completed += result.completed
            self._listener.completed(result.frame, result.completed)
        # Last, since a broken stage ends the run here and what succeeded must stay.
        self._judge(chunk, result)
        self._listener.ended(event.call)

    def _learn(self, state: _GroupState, chunk: _Chunk, result: ChunkResult) -> None:
        per_item = result.seconds / max(1, len(chunk.inputs))
        known = state.seconds_per_item
        state.seconds_per_item = per_item if not known else 0.7 * known + 0.3 * per_item
        for total, part in zip(state.counts, result.counts, strict=True):
            total.items_in += part.items_in
            total.items_out += part.items_out
            total.dropped += part.dropped
            total.failed += part.failed
            total.seconds += part.seconds

    def _broken(self, state: _GroupState, worker: _Worker, chunk: _Chunk, reason: str) -> None:
        self._requeue_calls(state, worker)
        self._enqueue(state, chunk, front=True)
        self._pool.retire(worker.ref)
        self._restart(state, worker, reason)

    def _requeue_calls(self, state: _GroupState, worker: _Worker) -> None:
        for call in reversed(worker.calls):
            chunk, _ = self._calls.pop(call)
            self._listener.ended(call)
            self._enqueue(state, chunk, front=True)
        worker.calls.clear()

    def _restart(self, state: _GroupState, worker: _Worker, reason: str | None) -> None:
        if reason is not None:
            state.fruitless_starts += 1
            log.warning("a worker of %s is broken: %s", state.group.name, reason)
            if state.fruitless_starts >= MAX_STARTS_WITHOUT_WORK:
                raise StageBrokenError(
                    state.group.name,
                    f"stage {state.group.name!r} broke its worker "
                    f"{state.fruitless_starts} times without finishing a source: {reason}",
                    kind="stage-start",
                )
        worker.ref = WorkerRef(worker.ref.group, worker.ref.index, worker.ref.start + 1)
        worker.ready = False
        self._pool.start(worker.ref)


    def _died(self, state: _GroupState, worker: _Worker, event: Died) -> None:
        log.warning("a worker of %s died: %s", state.group.name, event.reason)
        calls, worker.calls = list(worker.calls), deque()
        held = [(call, self._calls.pop(call)[0]) for call in calls]
        self._restart(state, worker, None)
        # A synchronous worker runs its calls in order, so only the oldest was being worked on.
        suspect_count = len(held) if state.group.is_async else 1
        for call, chunk in reversed(held[suspect_count:]):
            self._listener.ended(call)
            self._enqueue(state, chunk, front=True)
        for call, chunk in held[:suspect_count]:
            self._suspect(state, chunk, event)
            self._listener.ended(call)

    def _suspect(self, state: _GroupState, chunk: _Chunk, event: Died) -> None:
        inputs = chunk.inputs
        slots = [s for s, source in enumerate(inputs.sources) if source == event.source]
        if event.overdue and slots:
            self._charge_slots(chunk, slots, event, kind="timeout")
            rest = [slot for slot in range(len(inputs)) if slot not in set(slots)]
            if rest:
                self._enqueue(state, _Chunk(inputs.select(rest), chunk.group), front=True)
        elif len(inputs) == 1:
            if chunk.isolated:
                self._charge_slots(chunk, [0], event, kind="death")
            else:
                self._enqueue(state, self._isolated(chunk, [0]), front=True)
        elif len(slots) == 1 and not chunk.tainted:
            rest = [slot for slot in range(len(inputs)) if slot != slots[0]]
            others = _Chunk(
                inputs.select(rest), chunk.group, chunk.isolated, chunk.exclusive, tainted=True
            )
            self._enqueue(state, others, front=True)
            self._enqueue(state, self._isolated(chunk, slots), front=True)
        else:
            middle = len(inputs) // 2
            self._enqueue(state, self._isolated(chunk, range(middle, len(inputs))), front=True)
            self._enqueue(state, self._isolated(chunk, range(middle)), front=True)

    def _isolated(self, chunk: _Chunk, slots: Sequence[int]) -> _Chunk:
        return _Chunk(
            chunk.inputs.select(slots), chunk.group, isolated=True, exclusive=chunk.exclusive
        )

    def _charge_slots(self, chunk: _Chunk, slots: Sequence[int], event: Died, *, kind: str) -> None:
        stage = self._stage_names[event.stage] if event.source is not None else ""
        stage = stage or self._groups[chunk.group].group.name
        result = ChunkResult(
            failures=[
                SlotFailure(slot, stage, chunk.inputs.source_id(slot), kind, event.reason)
                for slot in slots
            ]
        )
        self._deadly.update(chunk.inputs.sources[slot] for slot in slots)
        self._judge(chunk, result, streaks=False)
        if len(self._groups) > 1:
            self._acknowledge_failures(chunk, result)


    def _judge(self, chunk: _Chunk, result: ChunkResult, *, streaks: bool = True) -> None:
        """Charge the failures of a call, holding back those that may be a broken stage's."""
        inputs = chunk.inputs
        for failed in result.failures:
            source = inputs.sources[failed.slot]
            attempt = inputs.attempt(failed.slot)
            if source in self._held or self._charged.get(source, 0) >= attempt:
                continue
            failure = Failure(
                source=source,
                source_id=inputs.source_id(failed.slot),
                item=failed.item,
                stage=failed.stage,
                kind=failed.kind,
                message=failed.message,
                traceback=failed.traceback,
                attempt=attempt,
                retry=failed.retry,
            )
            if not streaks or attempt > 1 or not failed.retry:
                self._charge(failure)
                continue
            self._extend_streak(failed, failure)
        for stage in result.worked:
            if stage in self._streaks:
                self._settle_streak(self._streaks[stage])

    def _extend_streak(self, failed: SlotFailure, failure: Failure) -> None:
        streak = self._streaks[failed.stage]
        if failed.after_success or streak.kind != failed.kind:
            self._settle_streak(streak)
        streak.kind = failed.kind
        streak.failures.append(failure)
        self._held.add(failure.source)
        if len(streak.failures) >= MAX_LIKE_FAILURES:
            raise StageBrokenError(
                failed.stage,
                f"stage {failed.stage!r} failed {len(streak.failures)} consecutive sources "
                f"with {failed.kind}: {failed.message}",
                kind="stage-broken",
            )

    def _settle_streak(self, streak: _Streak) -> None:
        failures, streak.failures, streak.kind = streak.failures, [], ""
        for failure in failures:
            self._held.discard(failure.source)
            self._charge(failure)

    def _charge(self, failure: Failure) -> None:
        source = failure.source
        self._charged[source] = max(self._charged.get(source, 0), failure.attempt)
        self._listener.failed(failure)
        if failure.retry and failure.attempt < self._limits.max_attempts:
            self._retries.append(source)
        else:
            self.quarantined += 1
            self._forget(source)

    def _forget(self, source: int) -> None:
        self._accounting.forget(source)
        self._rows.pop(source, None)
        self._files.pop(source, None)
        self._ids.pop(source, None)


    def _acknowledge_failures(self, chunk: _Chunk, result: ChunkResult) -> None:
        inputs = chunk.inputs
        for failed in result.failures:
            source = inputs.sources[failed.slot]
            ack = Ack(source, inputs.attempt(failed.slot), inputs.path(failed.slot), failed=True)
            if source in self._accounting:
                self._accounting.acknowledge(ack)
            self._rows.pop(source, None)
            self._files.pop(source, None)

    def _account(self, chunk: _Chunk, result: ChunkResult) -> None:
        self._acknowledge_failures(chunk, result)
        inputs, last = chunk.inputs, chunk.group == len(self._groups) - 1
        onward = Inputs(array("I"), ids=[], paths=[], items=[])
        failed = {failure.slot for failure in result.failures}
        for slot, source in enumerate(inputs.sources):
            attempt = inputs.attempt(slot)
            if slot in failed or not self._is_current(source, attempt):
                continue
            if slot in result.files:
                self._files[source] += result.files[slot]
            emitted = () if last else result.emitted[slot]
            if last and self._has_sink:
                self._rows[source] += result.rows[slot]
            for path, item in emitted:
                _append(
                    onward, source, inputs.source_id(slot), attempt=attempt, path=path, item=item
                )
            paths = tuple(path for path, _ in emitted)
            verdict = self._accounting.acknowledge(Ack(source, attempt, inputs.path(slot), paths))
            if verdict is Verdict.COMPLETE:
                self._complete(source)
        if len(onward):
            self._hand_over(self._groups[chunk.group + 1], onward)

    def _is_current(self, source: int, attempt: int) -> bool:
        return source in self._accounting and self._accounting.attempt(source) == attempt

    def _hand_over(self, state: _GroupState, onward: Inputs) -> None:
        size = self._chunk_size(state)
        for start in range(0, len(onward), size):
            slots = range(start, min(start + size, len(onward)))
            part = onward if len(slots) == len(onward) else onward.select(slots)
            self._enqueue(state, _Chunk(part, state.group.number))

    def _complete(self, source: int) -> None:
        self._done[source] = self._ids.pop(source)
        self._done_bytes += sum(len(row) for _, row in self._rows[source])
        self.completed += 1
        if self._done_bytes >= _FRAME_BYTES or len(self._done) >= self._limits.chunk_max:
            self._flush()

    def flush_completed(self) -> None:
        """Hand on what has completed so far; called from ``tick`` to bound its age."""
        self._flush()

    def _flush(self) -> None:
        if not self._done:
            return
        frame = FrameBuilder()
        for source in sorted(self._done):
            # Items arrive in any order; within a source rows are in item order.
            frame.add(source, sorted(self._rows.pop(source, ())))
            files = self._files.pop(source, None)
            if files:
                frame.add_files(self._done[source], sorted(files))
        count = len(self._done)
        self._done, self._done_bytes = {}, 0
        self._listener.completed(frame.build(), count)


def _append(
    onward: Inputs, source: int, source_id: str, *, attempt: int, path: ItemPath, item: bytes
) -> None:
    assert onward.ids is not None
    assert onward.paths is not None
    assert onward.items is not None
    if attempt > 1:
        onward.attempts[len(onward)] = attempt
    onward.sources.append(source)
    onward.ids.append(source_id)
    onward.paths.append(path)
    onward.items.append(item)


def _halves(group: BitMap) -> Iterator[BitMap]:
    """Yield the halves of a group of suspects: each death of a driver halves them again."""
    middle = len(group) // 2
    for half in (group[:middle], group[middle:]):
        if half:
            yield half
