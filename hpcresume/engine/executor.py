"""The streaming executor: sources through groups of workers, deepest items first.

Sources are admitted while earlier ones drain, bounded by what may wait between groups.
Calls are sized by time, since one call costs the driver a fraction of a millisecond.  The
executor is the only one that decides what a source's outcome is; it hands completed chunks
and failures to its listener, and asks its pool for events.

Who is charged when something dies: the call that a dead worker was working on is suspect.
If the worker's mark names a source, that source is run alone; otherwise the call is run
again in halves, and then alone.  Only a death while alone is charged, to that source.

When memory runs out the kernel takes the largest worker, which may be innocent: what it was
working on runs again at the end of the shard with nothing beside it.  Only if it does not fit
even then it is charged, and goes to a later round that gives it more where there is more.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pyroaring import BitMap

from hpcresume.engine.admission import Admission, Feed
from hpcresume.engine.assembly import Assembly
from hpcresume.engine.calls import OUT_OF_MEMORY, ChunkResult, Inputs, SlotFailure
from hpcresume.engine.groups import Group
from hpcresume.engine.judge import Judge, StageBrokenError
from hpcresume.engine.pool import (
    Died,
    Event,
    Finished,
    Pool,
    Started,
    StartFailed,
    WorkerRef,
)
from hpcresume.engine.queues import Chunk, GroupState, WorkerState
from hpcresume.errors import LocalStorageError
from hpcresume.ids import item_id
from hpcresume.segment.segment import Failure, StageCount
from hpcresume.sinks.packing import Packer, RowsPacker

__all__ = ["Executor", "Feed", "Limits", "Listener", "StageBrokenError"]

log = logging.getLogger(__name__)

MAX_STARTS_WITHOUT_WORK = 3
_CALL_BYTES = 1 << 20
_ROWS = RowsPacker()
_QUEUE_AHEAD_S = 0.05
_BROKEN_PARTS = 4
_ASYNC_CALL_S = 0.02
"""Items that wait for an answer beside each other are told together: one may wait for ever."""


class Listener(Protocol):
    """Who is told what became of the sources."""

    def started(self, call: int, sources: BitMap, *, alone: bool, begins: bool) -> None:
        """A call with these sources is handed to a worker.

        Args:
            call: Its number.
            sources: Its sources.
            alone: Nothing else runs.
            begins: The worker begins with it; otherwise it waits behind another one.
        """

    def began(self, call: int) -> None:
        """A worker begins with a call that had to wait."""

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
        memory_mib: Memory of the array task, for messages; 0: not known.
        memory_limit: Why a source that needs more cannot be given it; empty: it can.
    """

    max_attempts: int = 3
    chunk_target_s: float = 0.01
    chunk_max: int = 4096
    waiting_max: int = 8192
    waiting_max_bytes: int = 128 << 20
    memory_mib: int = 0
    memory_limit: str = ""


class Executor:
    """Runs the sources of one shard.

    Args:
        groups: The pipeline's groups, in order.
        pool: Their workers.
        feed: Fresh sources.
        listener: Told what became of them.
        limits: What bounds the executor.
        attempts: Tries that were charged before, by source.
        suspects: Groups of sources that were in flight when a driver died.
        ran: How long earlier attempts ran on a source without finishing it, in seconds.
        has_sink: Whether the last stage's items are rows.
        packer: Packs whole sources that come together here.
        clock: Monotonic seconds.
    """

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
        ran: Mapping[int, float] | None = None,
        has_sink: bool = True,
        packer: Packer = _ROWS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool, self._listener, self._limits = pool, listener, limits
        self._has_sink = has_sink
        self._groups = [
            GroupState(
                group,
                [WorkerState(WorkerRef(group.number, i, 1)) for i in range(group.workers)],
                counts=[StageCount(stage.name) for stage in group.stages],
            )
            for group in groups
        ]
        self._names = [stage.name for group in groups for stage in group.stages]
        self._judge = Judge(
            limits.max_attempts,
            attempts or {},
            charge=listener.failed,
            give_up=self._give_up,
        )
        self._admission = Admission(
            feed, self._judge, suspects=suspects, ran=ran or {}, clock=clock
        )
        # With one group its workers build the frames, and nothing travels.
        self._assembly = (
            Assembly(
                limits.chunk_max,
                listener.completed,
                self._admission.pace,
                clock,
                packer,
            )
            if len(groups) > 1
            else None
        )
        self._framed = 0
        self._calls: dict[int, WorkerState] = {}
        self._numbers = itertools.count(1)
        self._exclusive_call = 0
        self._stopping = self._holding = False

    def stop(self) -> None:
        """Admit no more sources; what is being worked on may finish."""
        if self._stopping:
            return
        self._stopping = True
        for worker in self._groups[0].workers:
            self._pool.recall(worker.ref)

    def hold(self, holding: bool) -> None:  # noqa: FBT001  # a state, set as such
        """Admit no sources for now, or admit them again."""
        self._holding = holding

    def finish_by(self, deadline: float | None) -> None:
        """Start no source that is not expected to finish by then, on the clock; None: no limit."""
        self._admission.set_limit(deadline)

    @property
    def lacks_time(self) -> bool:
        """Whether nothing runs because no source that is left is expected to finish in time."""
        waiting = any(state.queue for state in self._groups)
        return self._admission.lacks_time and not (self._calls or waiting)

    @property
    def ready(self) -> bool:
        """Whether every group has a worker that takes calls."""
        return all(any(worker.ready for worker in state.workers) for state in self._groups)

    @property
    def completed(self) -> int:
        """Sources that are complete."""
        return self._framed if self._assembly is None else self._assembly.completed

    @property
    def quarantined(self) -> int:
        """Sources that are not tried again."""
        return self._judge.quarantined

    @property
    def in_flight(self) -> int:
        """Sources that workers hold or that wait between groups."""
        calls = sum(worker.items for state in self._groups for worker in state.workers)
        return calls if self._assembly is None else max(calls, len(self._assembly))

    @property
    def failing(self) -> int:
        """Sources that failed and are to be tried again by this attempt."""
        return self._judge.failing + self._admission.failing

    @property
    def deferred(self) -> int:
        """Sources that wait for a round that gives them more memory."""
        return self._judge.deferred

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
        while tick():
            self._dispatch()
            if not self._calls and self._stopping:
                self.flush_completed()
                return self._is_idle() and not self.failing
            if not self._calls and (self._is_idle() or self.lacks_time):
                if self._admission.try_again():
                    continue
                if self._is_idle():
                    self.flush_completed()
                    return True
            for event in self._pool.wait(tick_s):
                self._handle(event)
        return False

    def flush_completed(self) -> None:
        """Hand on what has completed so far; called from ``tick`` to bound its age."""
        if self._assembly is not None:
            self._assembly.flush()

    def _is_idle(self) -> bool:
        waiting = any(state.queue for state in self._groups)
        return not waiting and self._admission.is_done()

    def _dispatch(self) -> None:
        while self._dispatch_once():
            pass

    def _dispatch_once(self) -> bool:
        """Give every worker with room one call, deepest group and least busy worker first."""
        given = False
        for state in reversed(self._groups):
            for worker in sorted(state.workers, key=lambda worker: len(worker.calls)):
                if self._exclusive_call in self._calls:
                    return False
                if not worker.ready or not self._has_room(state, worker):
                    continue
                chunk = self._next_chunk(state, worker)
                if chunk is not None:
                    self._submit(worker, chunk)
                    given = True
        return given

    def _has_room(self, state: GroupState, worker: WorkerState) -> bool:
        if not worker.calls:
            return True
        if worker.isolated:
            return False
        if state.group.is_async:
            return worker.items < state.group.concurrency * 3 // 2 + 1
        # A call waits behind another only where that costs less than a round trip to the
        # driver; a slow one is better off with the next free worker, a batch better full.
        is_quick = 0 < state.seconds_per_item < _QUEUE_AHEAD_S
        is_full = state.group.number == 0 or state.waiting >= state.group.batch_size
        return len(worker.calls) < 2 and is_quick and is_full

    def _next_chunk(self, state: GroupState, worker: WorkerState) -> Chunk | None:
        is_first = state.group.number == 0
        if is_first and not self._may_admit():
            return None
        while (found := self._next_waiting(state, worker)) is not None:
            if self._assembly is not None and not is_first:
                found.inputs = self._assembly.living(found.inputs)
            if len(found):
                return found
        return self._admit(state, worker) if is_first else None

    def _next_waiting(self, state: GroupState, worker: WorkerState) -> Chunk | None:
        for position, chunk in enumerate(state.queue):
            if chunk.is_plain:
                return self._gather(state, position)
            if not (chunk.isolated and worker.calls) and not (chunk.exclusive and self._calls):
                return state.unqueue(position)
        return None

    def _gather(self, state: GroupState, position: int) -> Chunk:
        """Make a call of plain chunks that wait one after another."""
        room, size_bytes, parts = self._chunk_size(state), 0, []
        while room > 0 and size_bytes < _CALL_BYTES and position < len(state.queue):
            if not state.queue[position].is_plain:
                break
            part = state.cut(position, room)
            parts.append(part)
            room -= len(part)
            size_bytes += part.size_bytes()
        inputs = Inputs.concat(parts)
        # Frames need the order of the sources; what comes back after a death has its own.
        return Chunk(inputs.in_order() if state.group.number == 0 else inputs, state.group.number)

    def _may_admit(self) -> bool:
        if self._stopping or self._holding:
            return False
        limits = self._limits
        return all(
            later.waiting < limits.waiting_max and later.waiting_bytes < limits.waiting_max_bytes
            for later in self._groups[1:]
        )

    def _admit(self, state: GroupState, worker: WorkerState) -> Chunk | None:
        waiting = any(later.queue for later in self._groups)
        if waiting and any(chunk.exclusive for later in self._groups for chunk in later.queue):
            return None
        return self._admission.next(
            self._chunk_size(state),
            batch=state.group.batch_size,
            is_free=not worker.calls,
            is_idle=not (self._calls or waiting),
        )

    def _chunk_size(self, state: GroupState) -> int:
        limits, per_item = self._limits, state.seconds_per_item
        # Small calls at the end keep all workers busy until it.
        reaching = self._groups[1 : state.group.number + 1]
        left = self._admission.left() + sum(before.waiting for before in reaching)
        spread = -(-left // (4 * len(state.workers)))
        most_s = _ASYNC_CALL_S if state.group.is_async else self._pool.call_most_s
        size = int(min(most_s, limits.chunk_target_s) / per_item) if per_item else 1
        size = min(size, state.items_max or size)
        return max(
            1, min(size, spread, limits.chunk_max), min(state.group.batch_size, limits.chunk_max)
        )

    def _submit(self, worker: WorkerState, chunk: Chunk) -> None:
        call, state = next(self._numbers), self._groups[chunk.group]
        if self._assembly is not None and chunk.group == 0:
            self._assembly.admit(chunk.inputs)
        begins = state.group.is_async or not worker.calls
        self._calls[call] = worker
        worker.hold(call, chunk)
        worker.begun = call if begins else worker.begun
        if chunk.exclusive:
            self._exclusive_call = call
        sources = BitMap(chunk.inputs.sources)
        alone = chunk.exclusive and len(sources) == 1
        self._listener.started(call, sources, alone=alone, begins=begins)
        slow = state.seconds_per_item > 2e-4
        self._pool.submit(worker.ref, call, chunk.inputs, marked=chunk.isolated or slow)

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
        # What a worker held is taken from it as a whole, so all of them are known, or none.
        workers = [self._calls.pop(call, None) for call in event.calls]
        worker = workers[0]
        if worker is None:
            return
        chunks = [worker.drop(call) for call in event.calls]
        chunk = chunks[0]
        if len(chunks) > 1:
            chunk = Chunk(Inputs.concat([part.inputs for part in chunks]), chunk.group)
        if event.result.refused is not None:
            raise LocalStorageError(event.result.refused)
        state, result = self._groups[chunk.group], event.result
        if result.unbegun:
            chunks = [chunk] = [self._take_back(state, chunk, result.unbegun)]
            state.items_max = len(chunk)
        elif state.items_max:
            doubled = 2 * state.items_max
            state.items_max = doubled if doubled < self._limits.chunk_max else 0
        if result.unrecoverable is not None:
            raise StageBrokenError(
                state.group.name,
                f"stage {state.group.name!r}: {result.unrecoverable}",
                kind="pool-unrecoverable",
            )
        if result.broken is not None:
            self._broken(state, worker, chunk, result.broken)
        elif len(chunk):
            worker.fruitless = 0
            self._learn(state, chunks, result)
            self._account(chunk, result)
            # Last, since a broken stage ends the run here and what succeeded must stay.
            failures = self._without_starved(chunk, result.failures)
            self._judge.judge(chunk.inputs, failures, worked=result.worked)
        for call in event.calls:
            self._listener.ended(call)
        # An answer may overtake the one before it.
        oldest = next(iter(worker.calls), 0)
        if oldest > worker.begun:
            worker.begun = oldest
            self._listener.began(oldest)

    def _take_back(self, state: GroupState, chunk: Chunk, unbegun: int) -> Chunk:
        """Queue what a call did not begin, and return the call of what it did."""
        at = len(chunk) - unbegun
        begun, rest = (
            dataclasses.replace(chunk, inputs=chunk.inputs.select(part))
            for part in (range(at), range(at, len(chunk)))
        )
        if self._assembly is not None and chunk.group == 0:
            self._assembly.hand_back(begun.inputs, rest.inputs)
        state.enqueue(rest, front=True)
        return begun

    def _learn(self, state: GroupState, chunks: Sequence[Chunk], result: ChunkResult) -> None:
        self._note_pace(state, chunks, result)
        per_item = result.seconds / max(1, sum(map(len, chunks)))
        known = state.seconds_per_item
        state.seconds_per_item = per_item if not known else 0.7 * known + 0.3 * per_item
        for total, part in zip(state.counts, result.counts, strict=True):
            total.add(part)

    def _note_pace(self, state: GroupState, chunks: Sequence[Chunk], result: ChunkResult) -> None:
        if self._assembly is not None or not result.completed:
            return
        pace, failed = self._admission.pace, {failure.slot for failure in result.failures}
        if len(chunks) > 1:
            # Each of one item, and as long as it took by itself.
            for slot, (chunk, seconds) in enumerate(zip(chunks, result.took, strict=True)):
                weight = chunk.inputs.total_weight()
                if slot not in failed and weight > 0:
                    pace.note(seconds / weight, 1)
            return
        (chunk,) = chunks
        weight = chunk.inputs.total_weight()
        if weight > 0:
            # Of a batch, every source takes as long as all of it; a call may hold many.
            shared = min(len(chunk), state.group.batch_size)
            pace.note(result.seconds * shared / weight, result.completed)

    def _account(self, chunk: Chunk, result: ChunkResult) -> None:
        if self._assembly is None:
            if result.frame is not None:
                self._framed += result.completed
                self._listener.completed(result.frame, result.completed)
            return
        is_last = chunk.group == len(self._groups) - 1
        onward = self._assembly.take(chunk.inputs, result, has_rows=is_last and self._has_sink)
        if not is_last:
            # What may kill the driver stays alone in every group.
            state = self._groups[chunk.group + 1]
            flags = {"isolated": chunk.exclusive, "exclusive": chunk.exclusive}
            state.enqueue(Chunk(onward, state.group.number, **flags))

    def _give_up(self, source: int) -> None:
        if self._assembly is not None:
            self._assembly.forget(source)

    def _broken(self, state: GroupState, worker: WorkerState, chunk: Chunk, reason: str) -> None:
        for call, other in reversed(self._take_calls(worker)):
            self._listener.ended(call)
            state.enqueue(other, front=True)
        for part in reversed(self._in_parts(state, chunk)):
            state.enqueue(part, front=True)
        self._pool.retire(worker.ref)
        self._restart(state, worker, reason)

    def _in_parts(self, state: GroupState, chunk: Chunk) -> list[Chunk]:
        """Cut the call of a broken worker: what breaks often would never finish it whole."""
        if state.group.is_async:
            return [chunk]
        size = max(-(-len(chunk) // _BROKEN_PARTS), state.group.batch_size)
        parts = [range(len(chunk))[at : at + size] for at in range(0, len(chunk), size)]
        return [
            dataclasses.replace(chunk, inputs=chunk.inputs.select(part), isolated=True)
            for part in parts
        ]

    def _take_calls(self, worker: WorkerState) -> list[tuple[int, Chunk]]:
        """Take all its calls from a worker, and return them, oldest first."""
        for call in worker.calls:
            del self._calls[call]
        return [(call, worker.drop(call)) for call in list(worker.calls)]

    def _restart(self, state: GroupState, worker: WorkerState, reason: str | None) -> None:
        worker.ready = False
        worker.ref = WorkerRef(worker.ref.group, worker.ref.index, worker.ref.start + 1)
        if reason is not None:
            worker.fruitless += 1
            summary, _, traceback = reason.partition("\n")
            log.warning("a worker of %s is broken: %s", state.group.name, summary)
            # For the log of a task; what ends the attempt tells it once more.
            log.info("%s", traceback)
        if worker.fruitless < MAX_STARTS_WITHOUT_WORK:
            self._pool.start(worker.ref)
        elif any(other.ready for other in state.workers):
            log.error("a worker of %s is given up; others go on without it", state.group.name)
        else:
            raise StageBrokenError(
                state.group.name,
                f"stage {state.group.name!r} broke its worker "
                f"{worker.fruitless} times without finishing a source: {reason}",
                kind="stage-start",
            )

    def _died(self, state: GroupState, worker: WorkerState, event: Died) -> None:
        log.warning("a worker of %s died: %s", state.group.name, event.reason)
        held = self._take_calls(worker)
        self._restart(state, worker, None)
        suspects = self._suspect_calls(state, [chunk for _, chunk in held], event.source)
        for number, (call, chunk) in reversed(list(enumerate(held))):
            if number not in suspects:
                self._listener.ended(call)
                state.enqueue(chunk, front=True)
        for number in suspects:
            call, chunk = held[number]
            self._suspect(state, chunk, event)
            self._listener.ended(call)

    def _suspect_calls(
        self, state: GroupState, held: Sequence[Chunk], source: int | None
    ) -> list[int]:
        """Return which calls of a dead worker it was working on."""
        if state.group.is_async:
            return list(range(len(held)))
        # A synchronous worker runs its calls in order: the oldest, unless the mark knows
        # that its result was only not yet on its way.
        named = (n for n, chunk in enumerate(held) if source in chunk.inputs.sources)
        first = 0 if source is None else next(named, 0)
        return [first] if held else []

    def _suspect(self, state: GroupState, chunk: Chunk, event: Died) -> None:
        inputs = chunk.inputs
        slots = [s for s, source in enumerate(inputs.sources) if source == event.source]
        if event.out_of_memory and (slots or len(set(inputs.sources)) == 1):
            self._starved(state, chunk, slots or [0], event)
        elif event.overdue and slots:
            rest = [slot for slot in range(len(inputs)) if slot not in set(slots)]
            state.enqueue(Chunk(inputs.select(rest), chunk.group), front=True)
            self._charge(chunk, slots, event, kind="timeout")
        elif len(inputs) == 1 and chunk.isolated:
            self._charge(chunk, [0], event, kind="timeout" if event.overdue else "death")
        elif len(inputs) == 1:
            state.enqueue(self._isolated(chunk, [0]), front=True)
        elif len(slots) == 1 and not chunk.tainted:
            rest = [slot for slot in range(len(inputs)) if slot != slots[0]]
            others = self._isolated(chunk, rest)
            others.isolated, others.tainted = chunk.isolated, True
            state.enqueue(others, front=True)
            state.enqueue(self._isolated(chunk, slots), front=True)
        else:
            middle = len(inputs) // 2
            state.enqueue(self._isolated(chunk, range(middle, len(inputs))), front=True)
            state.enqueue(self._isolated(chunk, range(middle)), front=True)

    def _starved(self, state: GroupState, chunk: Chunk, slots: Sequence[int], event: Died) -> None:
        """Put a source off that memory ran out for, or charge it where nothing ran beside it."""
        source = chunk.inputs.sources[slots[0]]
        self._admission.note_hungry([source])
        if self._has_all_memory(chunk):
            self._charge(chunk, slots[:1], event, kind=OUT_OF_MEMORY)
            return
        self._put_off(source)
        rest = [slot for slot, other in enumerate(chunk.inputs.sources) if other != source]
        others = self._isolated(chunk, rest)
        others.isolated = chunk.isolated
        state.enqueue(others, front=True)

    def _without_starved(
        self, chunk: Chunk, failures: Sequence[SlotFailure]
    ) -> Sequence[SlotFailure]:
        """Return a call's failures without those for which other calls' memory may be why."""
        if not any(failed.kind == OUT_OF_MEMORY for failed in failures):
            return failures
        starved = [failed for failed in failures if failed.kind == OUT_OF_MEMORY]
        sources = {chunk.inputs.sources[failed.slot] for failed in starved}
        self._admission.note_hungry(sources)
        if self._has_all_memory(chunk):
            return [self._short(failed) for failed in failures]
        for source in sorted(sources):
            self._put_off(source)
        return [failed for failed in failures if failed.kind != OUT_OF_MEMORY]

    @staticmethod
    def _has_all_memory(chunk: Chunk) -> bool:
        return chunk.exclusive and len(set(chunk.inputs.sources)) == 1

    def _put_off(self, source: int) -> None:
        """Run a source again from its beginning, alone, when nothing else is left."""
        if self._assembly is not None:
            self._assembly.forget(source)
        self._admission.put_off(source)

    def _short(self, failed: SlotFailure) -> SlotFailure:
        """Return a failure for want of memory with what comes next."""
        if failed.kind != OUT_OF_MEMORY:
            return failed
        mib, limit = self._limits.memory_mib, self._limits.memory_limit
        size = f"{mib} MiB were" if mib else "The memory of the task was"
        message = f"{failed.message}; {size} not enough for it alone. "
        message += limit or "It is tried again with more"
        return dataclasses.replace(failed, message=message, short_mib=0 if limit else mib)

    def _isolated(self, chunk: Chunk, slots: Sequence[int]) -> Chunk:
        inputs = chunk.inputs.select(slots)
        return Chunk(inputs, chunk.group, isolated=True, exclusive=chunk.exclusive)

    def _charge(self, chunk: Chunk, slots: Sequence[int], event: Died, *, kind: str) -> None:
        """Charge the source that a worker died of."""
        state, inputs, is_known = self._groups[chunk.group], chunk.inputs, event.source is not None
        stage = self._names[event.stage] if is_known else state.group.name
        for count in state.counts:
            count.failed += len(slots) if count.name == stage else 0
        failures = [
            SlotFailure(
                slot,
                stage,
                item_id(inputs.source_id(slot), self._names, inputs.path(slot)),
                kind,
                event.reason,
            )
            for slot in slots
        ]
        failures = [self._short(failed) for failed in failures]
        self._admission.note_deadly(inputs.sources[slot] for slot in slots)
        if self._assembly is not None:
            self._assembly.fail(inputs, slots)
        self._judge.judge(inputs, failures, may_wait=is_known and not event.out_of_memory)
