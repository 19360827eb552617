"""A chain: the fused stages of one group, run over the items of one call.

Stages run one after another over the items of a slice of the call, so that a trivial stage
costs little more than the calls of its function, batches mix items of many sources, and a
fan-out of millions never lies in memory at once.  Between slices, a twentieth of a second apart,
a call may end early and hand back the items that it has not begun.  Attribution is exact:
every item knows the slot of the input it descends from, nothing is inferred from lengths.

The code is asynchronous throughout; for a group without async stages it never suspends, so
:func:`run_now` drives it without an event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import pickle
import resource
import time
from bisect import bisect
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from types import GeneratorType
from typing import Any, Self, TypeVar

import cloudpickle

from hpcresume.engine import blocks
from hpcresume.engine.calls import ChunkResult, Inputs, SlotFailure
from hpcresume.engine.guard import Alarm, Running, StageTimeoutError, reason, user_traceback
from hpcresume.engine.mark import Mark
from hpcresume.engine.packing import make_packer
from hpcresume.errors import LocalStorageError, PoolUnrecoverable, StageStartError, describe
from hpcresume.ids import ROOT, ItemPath, encode_path, item_id
from hpcresume.ledger.publishing import output_path
from hpcresume.pipeline.context import Context, Worker, item_seed
from hpcresume.pipeline.pipeline import Pipeline
from hpcresume.pipeline.sentinels import Failed, Many, WorkerBroken
from hpcresume.pipeline.sources import Indexed, decode_payload
from hpcresume.pipeline.stage import Stage
from hpcresume.segment.frame import Columns
from hpcresume.segment.segment import StageCount
from hpcresume.sinks.packing import Packed

log = logging.getLogger(__name__)

SLICE_ITEMS = 4096
_SLICE_S = 0.05
_MADE_BYTES = 8 << 20
_DRAW_ITEMS = 256
_PEAK_EACH_S = 0.1
_NOTHING = contextlib.nullcontext()
_SOURCES = "sources"
ResultT = TypeVar("ResultT")


class _Raised:
    """An exception in place of a stage's answer."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


_BEYOND_THE_ITEM = (WorkerBroken, PoolUnrecoverable)
"""What a stage raises that says nothing of the item."""

_SPECIAL = (type(None), Many, Failed, WorkerBroken, GeneratorType, _Raised)


@dataclass(slots=True)
class _Items:
    """Items between two stages, column by column."""

    items: list[Any] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    paths: list[ItemPath] = field(default_factory=list)

    def add(self, item: Any, slot: int, path: ItemPath) -> None:
        self.items.append(item)
        self.slots.append(slot)
        self.paths.append(path)

    def take(self) -> _Items:
        """Return what is here and start anew."""
        taken = _Items(self.items, self.slots, self.paths)
        self.items, self.slots, self.paths = [], [], []
        return taken

    def extend(self, items: list[Any], slots: list[int], paths: list[ItemPath]) -> None:
        self.items += items
        self.slots += slots
        self.paths += paths

    def by_slot(self, slots: Iterable[int]) -> dict[int, list[tuple[ItemPath, Any]]]:
        """Return what was made of each of some slots."""
        found: dict[int, list[tuple[ItemPath, Any]]] = {slot: [] for slot in slots}
        for item, slot, path in zip(self.items, self.slots, self.paths, strict=True):
            found[slot].append((path, item))
        return found

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True, slots=True)
class ChainPlace:
    """Where a chain runs.

    Attributes:
        run_id: The run, for seeds.
        scratch: Node-local directory for scratch directories of items.
        outputs: Node-local root for files of ``ctx.output``; None: they are not kept.
        worker: The worker that the stages' instances live in.
        seconds_left: Seconds until the attempt must be done, None without a limit.
        mark: The worker's mark; None where nobody reads it.
        parts: Node-local directory for blobs of ``hr.Parts``.
        on_error: Called with every exception of the user's code that fails a source, while
            its frames are there to be looked at.
        restarts: Directory of the run's restart points; None: there are none.
        writer: Group, index and start of the worker, for the names of its blobs.
        call_max_s: Seconds after which a call hands back what it has not begun.
    """

    run_id: str
    scratch: Path
    outputs: Path | None
    worker: Worker
    seconds_left: Callable[[], float | None]
    mark: Mark | None = None
    parts: str = ""
    on_error: Callable[[BaseException], None] | None = None
    restarts: Path | None = None
    writer: str = ""
    call_max_s: float = float("inf")


class _ItemContext(Context):
    """A context whose ids and seed are made when they are asked for; few stages do.

    Left as a context manager, it notes the files of its item and is closed.
    """

    __slots__ = ("_files", "_names", "_path", "_place", "_slot", "_stage")

    def __init__(self, call: Call, number: int, slot: int, path: ItemPath) -> None:
        self._place, self._names, self._files = call.place, call.chain.names, call.files
        self._stage, self._path, self._slot = call.stages[number].name, path, slot
        self.source_id, self.attempt = call.inputs.source_id(slot), call.inputs.attempt(slot)
        self._scratch_root, self._seconds_left = call.place.scratch, call.place.seconds_left
        self._scratch = self._outputs = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.outputs:
            self._files.setdefault(self._slot, []).append((self._path, name))
        self.close()

    def __getattr__(self, name: str) -> Any:
        """Fill a slot that has no value yet."""
        value: Any
        if name == "item_id":
            value = item_id(self.source_id, self._names, self._path)
        elif name == "seed":
            value = item_seed(self._place.run_id, self.source_id, self._stage, self._path)
        elif name == "_outputs_root":
            root, path = self._place.outputs, encode_path(self._path)
            value = None if root is None else output_path(str(root), self.source_id, path, "")
        else:
            raise AttributeError(f"a context has no {name!r}", name=name, obj=self)
        setattr(self, name, value)
        return value


class Chain:
    """The stages of one group, set up in one worker."""

    def __init__(
        self, pipeline: Pipeline, *, first: int, stages: Sequence[Stage], place: ChainPlace
    ) -> None:
        self.pipeline, self.first, self.stages, self.place = pipeline, first, stages, place
        self.names = [stage.name for stage in pipeline.stages]
        self.is_first = first == 0
        self.is_last = first + len(stages) == len(pipeline.stages)
        # Calls of async stages are of one item mostly; one of a block would take all along.
        self.in_blocks = not self.is_last and not any(
            stage.traits.is_async
            for stage in (stages[0], *pipeline.stages[first + len(stages) :][:1])
        )
        self._limits = {
            id(stage): asyncio.Semaphore(stage.max_concurrency)
            for stage in stages
            if stage.traits.is_async
        }
        self.running = Running(place.mark)
        self.packer = make_packer(pipeline.sink, place.parts, place.writer)
        self._peak_mib, self._peak_until = 0, 0.0
        self.alarm, self.has_limits = Alarm(), any(stage.timeout_s for stage in stages)
        self._batch = max(stage.batch_size for stage in stages)
        self._seconds_per_input = 0.0

    def slice_items(self) -> int:
        """Return how many inputs go through the stages together: full batches, if it can be."""
        if self.stages[0].traits.is_async:
            return SLICE_ITEMS
        if not self._seconds_per_input:
            # A worker that started late begins with a full call: other ones told how long it is.
            return self._batch
        size = min(SLICE_ITEMS, max(1, int(_SLICE_S / self._seconds_per_input)))
        return -(-size // self._batch) * self._batch

    def note_slice(self, inputs: int, seconds: float) -> None:
        """Learn how long a slice took."""
        known, seen = self._seconds_per_input, seconds / inputs
        self._seconds_per_input = (known + seen) / 2 if known else seen

    def peak_mib(self, now: float) -> int:
        """Return the most memory this process had resident, asked for now and then."""
        if now >= self._peak_until:
            self._peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            self._peak_until = now + _PEAK_EACH_S
        return self._peak_mib

    def setup(self) -> None:
        """Set up every stage.

        Raises:
            StageStartError: A stage's set-up raised; what had started is torn down.
        """
        for number, stage in enumerate(self.stages):
            try:
                stage.setup(self.place.worker)
            except (Exception, SystemExit) as error:
                if self.place.on_error is not None:
                    self.place.on_error(error)
                self._teardown(self.stages[:number])
                raise StageStartError(
                    f"stage {stage.name!r} cannot start: {describe(error)}\n"
                    f"{user_traceback(error)}",
                    stage=stage.name,
                ) from error

    def teardown(self) -> None:
        """Tear down every stage, last first, and end what the worker spawned.

        An error there is logged: what was computed is safe by then.
        """
        self._teardown(self.stages)

    def _teardown(self, stages: Sequence[Stage]) -> None:
        for stage in reversed(stages):
            try:
                stage.teardown()
            except (Exception, SystemExit):
                log.exception("stage %r: its teardown failed", stage.name)
        self.place.worker.close()

    async def run(self, inputs: Inputs, *, marked: bool) -> ChunkResult:
        """Run the stages over a call's items.

        Args:
            inputs: The items.
            marked: Write the worker's mark before every item, for a call that may kill it.
        """
        return await Call(self, inputs, marked=marked).run()

    async def process(self, inputs: Inputs) -> ChunkResult | Call:
        """Run the stages over an item; what comes of it is for :meth:`finish`, if not a result."""
        call = Call(self, inputs, marked=False)
        return await call.process() or call

    def finish(self, processed: Sequence[Call]) -> ChunkResult:
        """Return the result of items that were processed each by itself, as one of all.

        Args:
            processed: The items, in the order of their sources.
        """
        first, *others = processed
        first.join(others)
        return first.finish()


class Call:
    """One call of a chain: its stages run over the items, then what they made becomes a result."""

    def __init__(self, chain: Chain, inputs: Inputs, *, marked: bool) -> None:
        self.chain, self.inputs, self.marked = chain, inputs, marked
        self.stages, self.place = chain.stages, chain.place
        self._is_async = chain.stages[0].traits.is_async
        self._room = max(_DRAW_ITEMS, *(stage.batch_size for stage in chain.stages))
        self.counts = [StageCount(stage.name) for stage in chain.stages]
        self.failures: dict[int, SlotFailure] = {}
        # Slots that the sources (0) and each stage (from 1) worked for.
        self.passed: list[list[Sequence[int]]] = [[] for _ in range(len(chain.stages) + 1)]
        self.made = _Items()
        # What was made for the next group, as long as every slot made one item, in order.
        self._blocks = blocks.Blocks([]) if chain.in_blocks else None
        self._from_blocks: list[Any] | None = None
        self.took: list[float] = []
        self.files: dict[int, list[tuple[ItemPath, str]]] = {}
        self._begun = self._counted = self._counted_bytes = 0

    async def run(self) -> ChunkResult:
        return await self.process() or self.finish()

    async def process(self) -> ChunkResult | None:
        """Run the stages; return a result only where that is all there is to say of the call."""
        start = time.perf_counter()
        try:
            with self.chain.alarm if self.chain.has_limits else _NOTHING:
                for items in self._slices():
                    await self._push(0, items)
        except WorkerBroken as error:
            return ChunkResult(broken=error.reason, seconds=time.perf_counter() - start)
        except PoolUnrecoverable as error:
            return ChunkResult(unrecoverable=str(error), seconds=time.perf_counter() - start)
        finally:
            self.took = [time.perf_counter() - start]
            if self.place.mark is not None and not self._is_async:
                self.place.mark.clear()
        for count in self.counts:
            count.note_spread()
        return None

    def made_bytes(self) -> int:
        """Return about how many bytes the rows or items take that were made."""
        if self._blocks is not None and self._blocks.parts:
            return self._blocks.size_bytes()
        new = itertools.islice(self.made.items, self._counted, None)
        self._counted_bytes += sum(map(_size_bytes, new))
        self._counted = len(self.made)
        return self._counted_bytes

    def join(self, others: Sequence[Call]) -> None:
        """Take in other calls of one item each that are processed, as more items of this one."""
        self.inputs = Inputs.concat([self.inputs, *(call.inputs for call in others)])
        for slot, call in enumerate(others, len(self.inputs) - len(others)):
            self.made.extend(call.made.items, [slot] * len(call.made), call.made.paths)
            for failure in call.failures.values():
                self.failures[slot] = replace(failure, slot=slot)
            for passed, of_call in zip(self.passed, call.passed, strict=True):
                passed.extend([(slot,)] if of_call else [])
            for files in call.files.values():
                self.files[slot] = files
            for count, more_counts in zip(self.counts, call.counts, strict=True):
                count.add(more_counts)
            self.took += call.took
        self._begun = len(self.inputs)

    def finish(self) -> ChunkResult:
        """Return the result of what was processed."""
        start = time.perf_counter()
        unbegun = len(self.inputs) - self._begun
        if not self._begun:
            return ChunkResult(unbegun=unbegun)
        if unbegun:
            self.inputs = self.inputs.select(range(self._begun))
        result = ChunkResult(unbegun=unbegun, counts=self.counts, took=self.took)
        self._finish(result)
        end = time.perf_counter()
        for count in self.counts:
            count.memory_mib = self.chain.peak_mib(end)
        result.seconds = sum(self.took) + end - start
        return result

    def _slices(self) -> Iterator[_Items]:
        known, began = self.inputs.paths, time.perf_counter()
        while self._begun < len(self.inputs) and not self._is_to_end(began):
            start = time.perf_counter()
            stop = min(self._begun + self.chain.slice_items(), len(self.inputs))
            slots = list(range(self._begun, stop))
            paths = [ROOT] * len(slots) if known is None else known[self._begun : stop]
            self._begun = stop
            yield self._without_failed(_Items(self._read(slots), slots, paths))
            self.chain.note_slice(len(slots), time.perf_counter() - start)

    def _is_to_end(self, began: float) -> bool:
        """Tell whether to hand back what is not begun."""
        if self._is_async:
            return False
        if self.place.mark is not None and self.place.mark.is_recalled:
            return True
        is_late = time.perf_counter() - began > self.place.call_max_s
        return self._begun > 0 and (is_late or self.made_bytes() > _MADE_BYTES)

    def _read(self, slots: list[int]) -> list[Any]:
        """Return the items in some slots; those that cannot be had fail."""
        if not self.marked or self._is_async:
            with contextlib.suppress(Exception):
                items = self._read_all(slots)
                self.passed[0].append(slots)
                return items
        return [self._read_one(slot) for slot in slots]

    def _read_all(self, slots: list[int]) -> list[Any]:
        inputs = self.inputs
        if inputs.items is None and inputs.records is None:
            sources = self.chain.pipeline.sources
            assert isinstance(sources, Indexed)
            return list(map(sources.payload, inputs.sources[slots[0] : slots[-1] + 1]))
        if isinstance(inputs.items, blocks.Blocks):
            return self._loaded(inputs.items)[slots[0] : slots[-1] + 1]
        return list(map(self._input, slots))

    def _read_one(self, slot: int) -> Any:
        mark = None if self._is_async else self.place.mark
        if mark is not None:
            mark.set(self.inputs.sources[slot], self.chain.first, None)
        try:
            item = self._input(slot)
        except (Exception, SystemExit) as error:
            # The user's code runs here: a function given to hr.indexed, or an unpickling.
            stage = _SOURCES if self.inputs.items is None else self.stages[0].name
            self._fail(slot, stage, self.inputs.path(slot), error)
            return None
        finally:
            if mark is not None:
                mark.clear()
        self.passed[0].append((slot,))
        return item

    def _loaded(self, items: blocks.Blocks) -> list[Any]:
        if self._from_blocks is None:
            self._from_blocks = items.load()
        return self._from_blocks

    def _input(self, slot: int) -> Any:
        inputs = self.inputs
        if isinstance(inputs.items, blocks.Blocks):
            return self._loaded(inputs.items)[slot]
        if inputs.items is not None:
            return pickle.loads(inputs.items[slot])
        if inputs.records is not None:
            return decode_payload(inputs.records[slot][1], restarts=self.place.restarts)
        sources = self.chain.pipeline.sources
        assert isinstance(sources, Indexed)
        return sources.payload(inputs.sources[slot])

    async def _push(self, number: int, items: _Items) -> None:
        """Run stage ``number`` of the group over items, and the stages after it."""
        items = self._without_failed(items)
        if not items.items:
            return
        if number == len(self.stages):
            self._emit(items)
            return
        self.counts[number].items_in += len(items)
        stage = self.stages[number]
        if stage.traits.is_batch:
            await self._take_all(number, items, self._batches(number, items))
        elif self._is_async and len(items) == 1:
            # One that runs beside many others of its kind: no task and no generator of its own.
            out, answer = _Items(), await self._one_async(number, items, 0)
            await self._take(number, items, 0, answer, out)
            await self._push(number + 1, out)
        elif self._is_async:
            await self._take_all(number, items, self._concurrent(number, items))
        elif stage.traits.wants_context or stage.timeout_s:
            await self._one_by_one(number, items)
        else:
            answers = self._map(number, stage.process, items)
            if _are_plain(answers):
                self.counts[number].items_out += len(answers)
                self._note_passed(number, items.slots)
                await self._push(number + 1, _Items(answers, items.slots, items.paths))
            elif set(map(type, answers)) == {GeneratorType} and not self.marked:
                await self._fan_out_all(number, items, answers)
            else:
                await self._take_all(number, items, _with_positions(answers))

    async def _take_all(
        self, number: int, items: _Items, source: AsyncGenerator[tuple[int, Any], None]
    ) -> None:
        """Take a stage's answers, and pass on what they hold as it comes."""
        out = _Items()
        async with contextlib.aclosing(source):
            async for position, answer in source:
                await self._take(number, items, position, answer, out)
                if len(out) >= self._room:
                    await self._push(number + 1, out.take())
        await self._push(number + 1, out)

    def _note_passed(self, number: int, slots: Sequence[int]) -> None:
        """Note that a stage worked; the last one has only when its rows are encoded."""
        if not (self.chain.is_last and number == len(self.stages) - 1):
            self.passed[number + 1].append(slots)

    def _without_failed(self, items: _Items) -> _Items:
        if not self.failures:
            return items
        kept = _Items()
        for item, slot, path in zip(items.items, items.slots, items.paths, strict=True):
            if slot not in self.failures:
                kept.add(item, slot, path)
        return kept

    async def _take(
        self, number: int, items: _Items, position: int, answer: Any, out: _Items
    ) -> None:
        slot, path, count = items.slots[position], items.paths[position], self.counts[number]
        if isinstance(answer, WorkerBroken):
            raise answer
        if isinstance(answer, (_Raised, Failed)):
            self._fail_at(number, slot, path, answer)
        elif isinstance(answer, Many):
            await self._fan_out(number, slot, path, iter(answer.items), out)
        elif isinstance(answer, GeneratorType):
            await self._fan_out(number, slot, path, answer, out)
        elif answer is None:
            count.dropped += 1
            self.passed[number + 1].append((slot,))
        else:
            count.items_out += 1
            self._note_passed(number, (slot,))
            out.add(answer, slot, path)

    async def _fan_out_all(
        self, number: int, items: _Items, fan_outs: list[GeneratorType[Any, Any, Any]]
    ) -> None:
        """Draw many fan-outs one after another: most are at their end after a few items."""
        out, count = _Items(), self.counts[number]
        for slot, path, values in zip(items.slots, items.paths, fan_outs, strict=True):
            if slot in self.failures:
                await self._fan_out(number, slot, path, values, out)  # which closes it
                continue
            start = time.perf_counter()
            children, error = _begin(values)
            count.seconds += time.perf_counter() - start
            made = len(children)
            if error is None and 0 < made < _DRAW_ITEMS and _are_plain(children):
                paths = _child_paths(self._full(path, number), 0, made)
                out.extend(children, [slot] * made, paths)
                count.items_out += made
                self._note_passed(number, (slot,))
            else:
                await self._fan_out(number, slot, path, _drawn(children, error, values), out)
            if len(out) >= self._room:
                await self._push(number + 1, out.take())
        await self._push(number + 1, out)

    async def _fan_out(
        self, number: int, slot: int, path: ItemPath, values: Iterator[Any], out: _Items
    ) -> None:
        """Draw a fan-out's items a few at a time, and pass them on before the next."""
        stage, count = self.stages[number], self.counts[number]
        parent, n, made, left = self._full(path, number), 0, 0, stage.timeout_s
        error: Any = None
        while slot not in self.failures:
            children: list[Any] = []
            start = time.perf_counter()
            error = self._guarded(number, slot, partial(_draw, children, values), timeout_s=left)
            if left is not None:
                left = max(1e-3, left - (time.perf_counter() - start))
            adopted, failed = _adopt(children, slot, parent, n, out)
            error = failed or error
            made, n = made + adopted, n + len(children)
            if error is not None or len(children) < _DRAW_ITEMS:
                break
            await self._push(number + 1, out.take())
        count.items_out += made
        if error is not None:
            self._fail_at(number, slot, path, error)
        elif not made:
            count.dropped += 1
            self.passed[number + 1].append((slot,))
        else:
            self._note_passed(number, (slot,))
        if isinstance(values, GeneratorType) and values.gi_frame is not None:
            # Its own clean-up is the user's code too.
            self._guarded(number, slot, values.close, timeout_s=left)

    def _full(self, path: ItemPath, number: int) -> ItemPath:
        """Return a path with the zeros of the one-to-one stages before stage ``number``."""
        missing = self.chain.first + number - len(path)
        return ItemPath(path + (0,) * missing) if missing else path

    def _full_paths(self, paths: list[ItemPath]) -> list[ItemPath]:
        """Return the paths of what the group made of items."""
        if paths.count(paths[0]) == len(paths):
            return [self._full(paths[0], len(self.stages))] * len(paths)
        if set(map(len, paths)) == {self.chain.first + len(self.stages)}:
            return paths
        full = {path: self._full(path, len(self.stages)) for path in set(paths)}
        return list(map(full.__getitem__, paths))

    def _guarded(
        self,
        number: int,
        slot: int | None,
        call: Callable[[], Any],
        *,
        timeout_s: float | None,
    ) -> Any:
        """Call the user's code with mark, timeout and every exception caught.

        ``slot`` is None where the call serves several of them.
        """
        mark = self.place.mark if self.marked or timeout_s is not None else None
        if self._is_async:
            mark = None
        if mark is not None:
            source = None if slot is None else self.inputs.sources[slot]
            mark.set(source, self.chain.first + number, timeout_s)
        start = time.perf_counter()
        try:
            return call() if timeout_s is None else self.chain.alarm.limit(call, timeout_s)
        except _BEYOND_THE_ITEM:
            raise
        except BaseException as error:
            return self._caught(error)
        finally:
            self.counts[number].seconds += time.perf_counter() - start
            if mark is not None:
                mark.clear()

    def _caught(self, error: BaseException) -> _Raised:
        """Return a stage's exception as its answer, unless its worker's servers have died."""
        if isinstance(error, KeyboardInterrupt) and self.place.mark is None:
            raise error  # somebody sits in front of this process
        self.place.worker.check()
        return _Raised(error)

    async def _one_by_one(self, number: int, items: _Items) -> None:
        """Run a stage over items one by one, and pass on what it makes as it comes."""
        stage, out = self.stages[number], _Items()
        wants_context, timeout_s = stage.traits.wants_context, stage.timeout_s
        for position, item in enumerate(items.items):
            slot, path = items.slots[position], items.paths[position]
            if slot in self.failures:
                continue
            with self._context(number, slot, path) if wants_context else _NOTHING as context:
                arguments = (item,) if context is None else (item, context)
                call = partial(stage.process, *arguments)
                answer = self._guarded(number, slot, call, timeout_s=timeout_s)
                await self._take(number, items, position, answer, out)
            if len(out) >= self._room:
                await self._push(number + 1, out.take())
        await self._push(number + 1, out)

    def _map(self, number: int, function: Callable[[Any], Any], items: _Items) -> list[Any]:
        """Call a plain function on every item at the speed of ``map``."""
        answers: list[Any] = []
        mark = self.place.mark if self.marked else None
        remaining, start = iter(items.items), time.perf_counter()
        while len(answers) < len(items):
            try:
                if mark is None:
                    answers.extend(map(function, remaining))
                else:
                    # No variable holds what tells the mark: an exception would keep it alive.
                    answers.extend(map(function, self._told(mark, number, items, len(answers))))
                if len(answers) < len(items):
                    # To map() this exception of the function's is the end of the items.
                    answers.append(_Raised(StopIteration("raised by the stage")))
            except _BEYOND_THE_ITEM:
                raise
            except BaseException as error:
                answers.append(self._caught(error))
        # One that came after the last item says nothing of any.
        del answers[len(items) :]
        self.counts[number].seconds += time.perf_counter() - start
        return answers

    def _told(self, mark: Mark, number: int, items: _Items, begin: int) -> Iterator[Any]:
        """Yield items from one of them on, which the mark is told of."""
        slots = itertools.islice(items.slots, begin, None)
        sources = map(self.inputs.sources.__getitem__, slots)
        remaining = itertools.islice(items.items, begin, None)
        return mark.over(remaining, sources, self.chain.first + number)

    async def _concurrent(
        self, number: int, items: _Items
    ) -> AsyncGenerator[tuple[int, Any], None]:
        tasks = [
            asyncio.ensure_future(self._one_async(number, items, position))
            for position in range(len(items))
        ]
        try:
            for position, task in enumerate(tasks):
                yield position, await task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one_async(self, number: int, items: _Items, position: int) -> Any:
        stage = self.stages[number]
        slot, path = items.slots[position], items.paths[position]
        async with self.chain._limits[id(stage)]:
            wants_context = stage.traits.wants_context
            with self._context(number, slot, path) if wants_context else _NOTHING as context:
                item = items.items[position]
                arguments = (item,) if context is None else (item, context)

                async def call() -> Any:
                    if stage.traits.is_async_generator:
                        return Many([child async for child in stage.process(*arguments)])
                    return await stage.process(*arguments)

                return await self._guarded_async(number, slot, call)

    async def _guarded_async(
        self, number: int, slot: int | None, call: Callable[[], Awaitable[Any]]
    ) -> Any:
        stage = self.stages[number]
        source = None if slot is None else self.inputs.sources[slot]
        watched: contextlib.AbstractContextManager[None] = _NOTHING
        if self.place.mark is not None and (self.marked or stage.timeout_s):
            watched = self.chain.running.item(source, self.chain.first + number, stage.timeout_s)
        start = time.perf_counter()
        try:
            with watched:
                async with asyncio.timeout(stage.timeout_s) as limit:
                    return await call()
        except _BEYOND_THE_ITEM:
            raise
        except asyncio.CancelledError as error:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            return _Raised(error)  # the stage cancelled something of its own
        except TimeoutError as error:
            return _Raised(StageTimeoutError() if limit.expired() else error)
        except BaseException as error:
            return self._caught(error)
        finally:
            self.counts[number].seconds += time.perf_counter() - start

    async def _batches(self, number: int, items: _Items) -> AsyncGenerator[tuple[int, Any], None]:
        size = self.stages[number].batch_size
        for start in range(0, len(items), size):
            positions = range(start, min(start + size, len(items)))
            answers = await self._batch(number, items, positions)
            for position, answer in zip(positions, answers, strict=True):
                yield position, answer

    async def _batch(self, number: int, items: _Items, positions: range) -> list[Any]:
        """Process one batch; where it raises as a whole, each item alone, to find the guilty."""
        stage = self.stages[number]
        answer = await self._call_batch(number, items, positions)
        if isinstance(answer, WorkerBroken):
            raise answer
        if isinstance(answer, (_Raised, Failed)):
            if len(positions) == 1:
                return [answer]
            found = []
            for position in positions:
                found += await self._batch(number, items, range(position, position + 1))
            return found
        wrong = _wrong_batch(answer, len(positions))
        if wrong:
            failed = Failed(f"stage {stage.name!r} answered a batch with {wrong}")
            return [failed] * len(positions)
        return list(answer)

    async def _call_batch(self, number: int, items: _Items, positions: range) -> Any:
        stage = self.stages[number]
        batch = [items.items[position] for position in positions]
        with contextlib.ExitStack() as stack:
            arguments: tuple[Any, ...] = (batch,)
            if stage.traits.wants_context:
                contexts = [
                    stack.enter_context(
                        self._context(number, items.slots[position], items.paths[position])
                    )
                    for position in positions
                ]
                arguments = (batch, contexts)
            slots = {items.slots[position] for position in positions}
            slot = slots.pop() if len(slots) == 1 else None
            call = partial(stage.process_batch, *arguments)
            if stage.traits.is_async:
                async with self.chain._limits[id(stage)]:
                    return await self._guarded_async(number, slot, call)
            return self._guarded(number, slot, call, timeout_s=stage.timeout_s)

    def _context(self, number: int, slot: int, path: ItemPath) -> _ItemContext:
        return _ItemContext(self, number, slot, self._full(path, number))

    def _fail_at(self, number: int, slot: int, path: ItemPath, error: _Raised | Failed) -> None:
        """Record that a stage failed for an item."""
        self.counts[number].failed += 1
        cause = error.error if isinstance(error, _Raised) else error
        self._fail(slot, self.stages[number].name, self._full(path, number), cause)

    def _fail(self, slot: int, stage: str, path: ItemPath, error: BaseException | Failed) -> None:
        if slot in self.failures:
            return
        if self.place.on_error is not None and not isinstance(error, Failed):
            self.place.on_error(error)
        item = item_id(self.inputs.source_id(slot), self.chain.names, path)
        self.failures[slot] = SlotFailure(
            slot, stage, item, *reason(error, stage, self._timeout_of(stage))
        )

    def _timeout_of(self, stage: str) -> float | None:
        return next((s.timeout_s for s in self.stages if s.name == stage), None)

    def _emit(self, items: _Items) -> None:
        """Keep what the last stage of the group made, as rows or for the next group."""
        if self.chain.is_last:
            # A slot that fails below is taken out again.
            self.passed[-1].append(items.slots)
            if self.chain.pipeline.sink is None:
                return
        paths = self._full_paths(items.paths)
        if self._blocks is not None and self._pass_in_blocks(items, paths):
            return
        packer = self.chain.packer
        encode = packer.row if self.chain.is_last else _pickled
        with contextlib.suppress(Exception):
            made = packer.rows(items.items) if self.chain.is_last else _all_pickled(items.items)
            self.made.extend(made, items.slots, paths)
            return
        for item, slot, path in zip(items.items, items.slots, paths, strict=True):
            try:
                self.made.add(encode(item), slot, path)
            except Exception as error:
                self._fail(slot, self.stages[-1].name, path, error)
                self.counts[-1].failed += 1

    def _pass_in_blocks(self, items: _Items, paths: list[ItemPath]) -> bool:
        """Keep items in blocks; False where they do not go on from those that are in some."""
        assert self._blocks is not None
        n = len(self.made)
        if items.slots == list(range(n, n + len(items))):
            made = blocks.in_blocks(items.items)
            if made is not None:
                self._blocks.parts.extend(made.parts)
                self.made.extend([None] * len(items), items.slots, paths)
                return True
        self._leave_blocks()
        return False

    def _leave_blocks(self) -> None:
        if self._blocks is not None:
            self.made.items, self._blocks = self._blocks.pickled(), None

    def _finish(self, result: ChunkResult) -> None:
        self._check_files()
        table = self._check_fit() if self.chain.is_last else None
        result.failures = [self.failures[slot] for slot in sorted(self.failures)]
        result.worked = sorted(self._worked())
        good = list(range(len(self.inputs)))
        if self.failures:
            good = [slot for slot in good if slot not in self.failures]
        if self.files:
            result.files = {slot: self.files[slot] for slot in good if slot in self.files}
        if self.chain.is_first and self.chain.is_last:
            self._build_frame(result, good, self._without_failed(self.made), table)
            return
        path = self._only_path()
        if path is None:
            self._leave_blocks()
        made = self._without_failed(self.made)
        if path is not None and self.chain.is_last:
            result.column = path, _travelling(made.items)
        elif path is not None:
            result.column = path, self._blocks or made.items
        elif self.chain.is_last:
            made.items = _travelling(made.items)
            result.rows = made.by_slot(good)
        else:
            result.emitted = made.by_slot(good)

    def _worked(self) -> list[str]:
        """Set whether a stage worked between its failures; return those that did after them."""
        names = [_SOURCES, *(stage.name for stage in self.stages)]
        worked = []
        for name, passed in zip(names, self.passed, strict=True):
            failures = [self.failures[slot] for slot in sorted(self.failures)]
            failures = [failure for failure in failures if failure.stage == name]
            guilty = {failure.slot for failure in failures}
            ok = sorted(set(itertools.chain(*passed)) - guilty) if guilty else ()
            before = -1
            for failure in failures:
                failure.after_success = bisect(ok, failure.slot) > bisect(ok, before)
                before = failure.slot
            if bisect(ok, before) < len(ok) or (passed and not guilty):
                worked.append(name)
        return worked

    def _check_files(self) -> None:
        """Fail the sources whose files were asked for and not written."""
        for slot, files in self.files.items():
            for path, name in files:
                source_id = self.inputs.source_id(slot)
                written = output_path(str(self.place.outputs), source_id, encode_path(path), name)
                if not os.path.isfile(written):
                    missing = Failed(
                        f"ctx.output({name!r}) was asked for and no file was written there. "
                        "A source counts as done only with its files."
                    )
                    stage = self.stages[max(0, len(path) - self.chain.first)].name
                    self._fail(slot, stage, path, missing)

    def _check_fit(self) -> Any:
        """Fail the sources whose rows the sink cannot take; return what was made of the rest."""
        made = self._without_failed(self.made)
        fit = self.chain.packer.fit(made.slots, made.items)
        for slot, error in fit.misfits.items():
            self.counts[-1].failed += 1
            self._fail(slot, self.stages[-1].name, made.paths[made.slots.index(slot)], error)
        return fit.table

    def _only_path(self) -> ItemPath | None:
        """Return the path of what was made where every slot made one item, and all have one."""
        made, n = self.made, len(self.inputs)
        if self.failures or self.files or not n or made.slots != list(range(n)):
            return None
        path = made.paths[0]
        return path if made.paths.count(path) == n else None

    def _build_frame(self, result: ChunkResult, good: list[int], made: _Items, table: Any) -> None:
        if not good:
            return
        packer, inputs, files = self.chain.packer, self.inputs, self.files
        index_of = inputs.sources.__getitem__
        try:
            if files:
                packed = [
                    Packed(index_of(s), inputs.source_id(s), rows, files.get(s, ()))
                    for s, rows in made.by_slot(good).items()
                ]
                result.frame = packer.pack(packed, table)
            else:
                sources, owners = list(map(index_of, good)), list(map(index_of, made.slots))
                columns = Columns(sources, owners, made.paths, made.items)
                result.frame = packer.pack_columns(columns, table)
        except LocalStorageError as error:
            result.refused = str(error)
        result.completed = len(good)


def _adopt(
    children: list[Any], slot: int, parent: ItemPath, n: int, out: _Items
) -> tuple[int, Failed | None]:
    """Take what a fan-out made, from its ``n``-th on; return how many items, and a failure."""
    if _are_plain(children):
        out.extend(children, [slot] * len(children), _child_paths(parent, n, len(children)))
        return len(children), None
    made = 0
    for k, child in enumerate(children, n):
        if isinstance(child, WorkerBroken):
            raise child
        if isinstance(child, Failed):
            return made, child
        if child is not None:
            made += 1
            out.add(child, slot, ItemPath((*parent, k)))
    return made, None


def _are_plain(answers: list[Any]) -> bool:
    """Tell whether all of a stage's answers are items as they are."""
    return not any(issubclass(kind, _SPECIAL) for kind in set(map(type, answers)))


def _child_paths(parent: ItemPath, n: int, count: int) -> list[ItemPath]:
    """Return the paths of what a fan-out makes from one path, from its ``n``-th item on."""
    if n + count > _DRAW_ITEMS:
        return [ItemPath((*parent, k)) for k in range(n, n + count)]
    power = max(0, n + count - 1).bit_length()
    return _first_children(parent, 1 << power)[n : n + count]


@lru_cache(maxsize=1024)
def _first_children(parent: ItemPath, count: int) -> list[ItemPath]:
    """Return the paths of a path's first children, which all sources share."""
    return [ItemPath((*parent, k)) for k in range(count)]


def _size_bytes(made: Any) -> int:
    """Return about how many bytes a row or item takes; a row for Parquet has columns."""
    if isinstance(made, dict):
        return sum(map(_size_bytes, made.values()))
    if isinstance(made, (bytes, str)):
        return len(made)
    size: int = getattr(made, "nbytes", 0)
    return size


def _travelling(rows: list[Any]) -> list[bytes]:
    """Return rows as they go to the driver."""
    return [row if isinstance(row, bytes) else _pickled(row) for row in rows]


def _all_pickled(items: list[Any]) -> list[bytes]:
    return [pickle.dumps(item, protocol=5) for item in items]


def _pickled(item: Any) -> bytes:
    """Return an item for the next group's worker; only processes of this attempt read it."""
    try:
        return pickle.dumps(item, protocol=5)
    except (pickle.PicklingError, AttributeError, TypeError):
        return _pickled_by_value(item)


def _pickled_by_value(item: Any) -> bytes:
    try:
        return bytes(cloudpickle.dumps(item, protocol=5))
    except Exception as error:
        raise TypeError(
            f"an item of type {type(item).__qualname__} cannot go to the next stage, "
            f"which runs in another process: {describe(error)}"
        ) from error


async def _with_positions(answers: list[Any]) -> AsyncGenerator[tuple[int, Any], None]:
    for position, answer in enumerate(answers):
        yield position, answer


def _wrong_batch(answer: Any, count: int) -> str:
    """Return what is wrong with the answer to a batch; nothing is guessed."""
    is_text = isinstance(answer, (str, bytes, bytearray))
    if is_text or not (isinstance(answer, Sequence) or hasattr(answer, "tolist")):
        return f"a {type(answer).__name__}, not a sequence whose slot i answers item i"
    if len(answer) != count:
        return f"{len(answer)} slots for {count} items; slot i must answer item i"
    return ""


def _begin(values: Iterator[Any]) -> tuple[list[Any], BaseException | None]:
    """Return the first items of a fan-out, and what it raised instead of the next."""
    children: list[Any] = []
    try:
        _draw(children, values)
    except _BEYOND_THE_ITEM:
        raise
    except BaseException as error:
        return children, error
    return children, None


def _drawn(
    children: list[Any], error: BaseException | None, values: Generator[Any, Any, Any]
) -> Generator[Any, Any, None]:
    """Give a fan-out again from its beginning, of which some was drawn."""
    with contextlib.closing(values):
        yield from children
        if error is not None:
            raise error
        yield from values


def _draw(into: list[Any], values: Iterator[Any]) -> None:
    # What came before an exception stays in the list.
    into.extend(itertools.islice(values, _DRAW_ITEMS))


def run_now(coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Run a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: ResultT = stop.value
        return result
    coroutine.close()
    raise AssertionError("a chain without async stages suspended")
