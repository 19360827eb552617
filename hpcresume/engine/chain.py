"""A chain: the fused stages of one group, run over the items of one call.

Stages run one after another over all items of the call, in slices of bounded size, so that a
trivial stage costs little more than the calls of its function, batches mix items of many
sources, and a fan-out of millions never lies in memory at once.  Attribution is exact:
every item knows the slot of the input it descends from, nothing is inferred from lengths.

The code is asynchronous throughout; for a group without async stages it never suspends, so
:func:`run_now` drives it without an event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import pickle
import signal
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType, GeneratorType
from typing import Any, TypeVar

import cloudpickle

from hpcresume.engine.calls import ChunkResult, Inputs, SlotFailure
from hpcresume.engine.mark import Mark
from hpcresume.errors import RowError, StageStartError, describe
from hpcresume.ids import ItemPath, encode_path, item_id
from hpcresume.ledger.publishing import output_path
from hpcresume.pipeline.context import Context, Worker, item_seed
from hpcresume.pipeline.pipeline import Pipeline
from hpcresume.pipeline.sentinels import Failed, Many, WorkerBroken
from hpcresume.pipeline.sources import Indexed, decode_payload
from hpcresume.pipeline.stage import Stage
from hpcresume.segment.frame import FrameBuilder
from hpcresume.segment.segment import StageCount
from hpcresume.sinks.rows import encode_row

SLICE_ITEMS = 4096
_TRACEBACK_CHARS = 8000
ResultT = TypeVar("ResultT")


class StageTimeoutError(BaseException):
    """Raised inside a stage that runs past its ``timeout_s``.

    Not an ``Exception``, so that a stage's own ``except Exception`` does not swallow it.
    """


class _Raised:
    """An exception in place of a stage's answer."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


_SPECIAL = frozenset({type(None), Many, Failed, WorkerBroken, GeneratorType, _Raised})


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
        on_error: Called with every exception of the user's code that fails a source, while
            its frames are there to be looked at.
    """

    run_id: str
    scratch: Path
    outputs: Path | None
    worker: Worker
    seconds_left: Callable[[], float | None]
    mark: Mark | None = None
    on_error: Callable[[BaseException], None] | None = None


class Chain:
    """The stages of one group, set up in one worker."""

    def __init__(
        self, pipeline: Pipeline, *, first: int, stages: Sequence[Stage], place: ChainPlace
    ) -> None:
        self.pipeline, self.first, self.stages, self.place = pipeline, first, stages, place
        self.names = [stage.name for stage in pipeline.stages]
        self.is_first = first == 0
        self.is_last = first + len(stages) == len(pipeline.stages)
        self._limits = {
            id(stage): asyncio.Semaphore(stage.max_concurrency)
            for stage in stages
            if stage.traits.is_async
        }

    def setup(self) -> None:
        """Set up every stage.

        Raises:
            StageStartError: A stage's set-up raised.
        """
        for stage in self.stages:
            try:
                stage.setup(self.place.worker)
            except Exception as error:
                if self.place.on_error is not None:
                    self.place.on_error(error)
                raise StageStartError(
                    f"stage {stage.name!r} cannot start: {describe(error)}\n"
                    f"{user_traceback(error)}",
                    stage=stage.name,
                ) from error

    def teardown(self) -> None:
        """Tear down every stage and end what the worker spawned; the first error is raised."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.place.worker.close)
            for stage in self.stages:
                stack.callback(stage.teardown)

    async def run(self, inputs: Inputs, *, marked: bool) -> ChunkResult:
        """Run the stages over a call's items.

        Args:
            inputs: The items.
            marked: Write the worker's mark before every item, for a call that may kill it.
        """
        return await _Call(self, inputs, marked=marked).run()


class _Call:
    """One call of a chain."""

    def __init__(self, chain: Chain, inputs: Inputs, *, marked: bool) -> None:
        self.chain, self.inputs, self.marked = chain, inputs, marked
        self.stages, self.place = chain.stages, chain.place
        self.counts = [StageCount(stage.name) for stage in chain.stages]
        self.failures: dict[int, SlotFailure] = {}
        self.worked: set[str] = set()
        self.failed_at: dict[str, bool] = {}
        self.rows: list[list[tuple[ItemPath, bytes]]] = [[] for _ in range(len(inputs))]
        self.emitted: dict[int, list[tuple[ItemPath, bytes]]] = {}
        self.files: dict[int, list[tuple[ItemPath, str]]] = {}

    async def run(self) -> ChunkResult:
        start = time.perf_counter()
        result = ChunkResult(counts=self.counts)
        try:
            for items in self._slices():
                await self._push(0, items)
        except WorkerBroken as error:
            return ChunkResult(broken=error.reason, seconds=time.perf_counter() - start)
        finally:
            if self.place.mark is not None:
                self.place.mark.clear()
        self._finish(result)
        result.seconds = time.perf_counter() - start
        return result

    def _slices(self) -> Iterator[_Items]:
        for start in range(0, len(self.inputs), SLICE_ITEMS):
            slots = range(start, min(start + SLICE_ITEMS, len(self.inputs)))
            items = _Items()
            for slot in slots:
                try:
                    item = self._input(slot)
                except Exception as error:
                    # hr.indexed's function is the user's and runs here.
                    self._fail(slot, "sources", self.inputs.path(slot), error)
                    continue
                items.add(item, slot, self.inputs.path(slot))
            yield items

    def _input(self, slot: int) -> Any:
        inputs = self.inputs
        if inputs.items is not None:
            return pickle.loads(inputs.items[slot])
        if inputs.records is not None:
            return decode_payload(inputs.records[slot][1])
        sources = self.chain.pipeline.sources
        assert isinstance(sources, Indexed)
        return sources.payload(inputs.sources[slot])

    async def _push(self, number: int, items: _Items) -> None:
        """Run stage ``number`` of the group over items, and the stages after it."""
        if self.failures:
            items = self._without_failed(items)
        if not items.items:
            return
        if number == len(self.stages):
            self._emit(items)
            return
        self.counts[number].items_in += len(items)
        out = _Items()
        async for position, answer in self._answers(number, items):
            if position is None:
                out = answer
                break
            await self._take(number, items, position, answer, out)
            if len(out) >= SLICE_ITEMS:
                await self._push(number + 1, out.take())
        await self._push(number + 1, out)

    def _without_failed(self, items: _Items) -> _Items:
        kept = _Items()
        for item, slot, path in zip(items.items, items.slots, items.paths, strict=True):
            if slot not in self.failures:
                kept.add(item, slot, path)
        return kept

    async def _answers(self, number: int, items: _Items) -> AsyncIterator[tuple[int | None, Any]]:
        """Yield ``(position, answer)`` for the items that a stage was given, in order.

        Where every answer is a plain value, ``(None, all of them)`` is yielded instead, and
        nothing is looked at one by one.
        """
        stage = self.stages[number]
        if stage.traits.is_batch:
            source = self._batches(number, items)
        elif stage.traits.is_async:
            source = self._concurrent(number, items)
        elif stage.traits.wants_context or stage.timeout_s or self.marked:
            source = self._one_by_one(number, items)
        else:
            answers = self._map(number, stage.process, items.items)
            if _SPECIAL.isdisjoint(map(type, answers)):
                self.counts[number].items_out += len(answers)
                self.worked.add(stage.name)
                yield None, _Items(answers, items.slots, items.paths)
                return
            for position, answer in enumerate(answers):
                yield position, answer
            return
        async for position, answer in source:
            yield position, answer

    async def _take(
        self, number: int, items: _Items, position: int, answer: Any, out: _Items
    ) -> None:
        slot, path = items.slots[position], items.paths[position]
        stage, count = self.stages[number], self.counts[number]
        kind = type(answer)
        if kind is WorkerBroken:
            raise answer
        if kind is _Raised or kind is Failed:
            count.failed += 1
            self._fail(slot, stage.name, path, answer.error if kind is _Raised else answer)
            return
        if slot not in self.failures:
            self.worked.add(stage.name)
        if kind is Many:
            await self._fan_out(number, slot, path, iter(answer.items), out)
        elif kind is GeneratorType:
            await self._fan_out(number, slot, path, answer, out)
        elif answer is None:
            count.dropped += 1
        else:
            count.items_out += 1
            out.add(answer, slot, path)

    async def _fan_out(
        self, number: int, slot: int, path: ItemPath, values: Iterator[Any], out: _Items
    ) -> None:
        stage, count = self.stages[number], self.counts[number]
        parent, n, left = self._full(path, number), 0, stage.timeout_s
        while slot not in self.failures:
            children: list[Any] = []
            start = time.perf_counter()
            error = self._guarded(number, slot, partial(_draw, children, values), timeout_s=left)
            if left is not None:
                left = max(1e-3, left - (time.perf_counter() - start))
            for child in children:
                if type(child) is Failed:
                    error = child
                    break
                if child is not None:
                    count.items_out += 1
                    out.add(child, slot, ItemPath((*parent, n)))
                n += 1
            if error is not None:
                count.failed += 1
                error = error.error if type(error) is _Raised else error
                self._fail(slot, stage.name, path, error)
            if len(children) < SLICE_ITEMS:
                break
            await self._push(number + 1, out.take())
        count.dropped += not n

    def _full(self, path: ItemPath, number: int) -> ItemPath:
        """Return a path with the zeros of the one-to-one stages before stage ``number``."""
        missing = self.chain.first + number - len(path)
        return ItemPath(path + (0,) * missing) if missing else path

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
        if mark is not None:
            source = None if slot is None else self.inputs.sources[slot]
            mark.set(source, self.chain.first + number, timeout_s)
        start = time.perf_counter()
        try:
            if timeout_s is None:
                return call()
            with alarm(timeout_s):
                return call()
        except WorkerBroken:
            raise
        except (Exception, SystemExit, StageTimeoutError) as error:
            self.place.worker.check()
            return _Raised(error)
        finally:
            self.counts[number].seconds += time.perf_counter() - start
            if mark is not None:
                mark.clear()

    async def _one_by_one(self, number: int, items: _Items) -> AsyncIterator[tuple[int, Any]]:
        stage = self.stages[number]
        for position, (item, slot) in enumerate(zip(items.items, items.slots, strict=True)):
            if slot in self.failures:
                continue
            with self._context(number, slot, items.paths[position]) as context:
                arguments = (item,) if context is None else (item, context)
                call = partial(stage.process, *arguments)
                yield position, self._guarded(number, slot, call, timeout_s=stage.timeout_s)

    def _map(self, number: int, function: Callable[[Any], Any], items: list[Any]) -> list[Any]:
        """Call a plain function on every item at the speed of ``map``."""
        answers: list[Any] = []
        remaining = iter(items)
        start = time.perf_counter()
        while len(answers) < len(items):
            try:
                answers.extend(map(function, remaining))
            except WorkerBroken:
                raise
            except (Exception, SystemExit) as error:
                self.place.worker.check()
                answers.append(_Raised(error))
        self.counts[number].seconds += time.perf_counter() - start
        return answers

    async def _concurrent(self, number: int, items: _Items) -> AsyncIterator[tuple[int, Any]]:
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

    async def _one_async(self, number: int, items: _Items, position: int) -> Any:
        stage = self.stages[number]
        slot, path = items.slots[position], items.paths[position]
        async with self.chain._limits[id(stage)]:
            with self._context(number, slot, path) as context:
                item = items.items[position]
                arguments = (item,) if context is None else (item, context)

                async def call() -> Any:
                    if stage.traits.is_async_generator:
                        return Many([child async for child in stage.process(*arguments)])
                    return await stage.process(*arguments)

                return await self._guarded_async(number, call)

    async def _guarded_async(self, number: int, call: Callable[[], Awaitable[Any]]) -> Any:
        stage = self.stages[number]
        start = time.perf_counter()
        try:
            async with asyncio.timeout(stage.timeout_s) as limit:
                return await call()
        except WorkerBroken:
            raise
        except asyncio.CancelledError as error:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            return _Raised(error)  # the stage cancelled something of its own
        except TimeoutError as error:
            return _Raised(StageTimeoutError() if limit.expired() else error)
        except (Exception, SystemExit) as error:
            self.place.worker.check()
            return _Raised(error)
        finally:
            self.counts[number].seconds += time.perf_counter() - start

    async def _batches(self, number: int, items: _Items) -> AsyncIterator[tuple[int, Any]]:
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
        if type(answer) is _Raised:
            if len(positions) == 1:
                return [answer]
            found = []
            for position in positions:
                found += await self._batch(number, items, range(position, position + 1))
            return found
        if not isinstance(answer, Sequence) or isinstance(answer, (str, bytes)):
            answer = list(answer) if hasattr(answer, "__iter__") else [answer]
        if len(answer) != len(positions):
            wrong = Failed(
                f"stage {stage.name!r} answered a batch of {len(positions)} items with "
                f"{len(answer)} slots; slot i must answer item i"
            )
            return [wrong] * len(positions)
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
            if stage.traits.is_async:
                async with self.chain._limits[id(stage)]:
                    return await self._guarded_async(
                        number, lambda: stage.process_batch(*arguments)
                    )
            slots = {items.slots[position] for position in positions}
            return self._guarded(
                number,
                slots.pop() if len(slots) == 1 else None,
                partial(stage.process_batch, *arguments),
                timeout_s=stage.timeout_s,
            )

    @contextlib.contextmanager
    def _context(self, number: int, slot: int, path: ItemPath) -> Iterator[Context | None]:
        stage, place = self.stages[number], self.place
        if not stage.traits.wants_context:
            yield None
            return
        source_id, path = self.inputs.source_id(slot), self._full(path, number)
        outputs = place.outputs
        if outputs is not None:
            outputs = Path(output_path(str(outputs), source_id, encode_path(path), ""))
        context = Context(
            source_id=source_id,
            item_id=item_id(source_id, self.chain.names, path),
            attempt=self.inputs.attempt(slot),
            seed=item_seed(place.run_id, source_id, stage.name, path),
            scratch_root=place.scratch,
            outputs_root=outputs,
            seconds_left=place.seconds_left,
        )
        try:
            yield context
        finally:
            if context.outputs:
                self.files.setdefault(slot, []).extend((path, name) for name in context.outputs)
            context.close()

    def _fail(self, slot: int, stage: str, path: ItemPath, error: BaseException | Failed) -> None:
        if slot in self.failures:
            return
        if self.place.on_error is not None and not isinstance(error, Failed):
            self.place.on_error(error)
        item = item_id(self.inputs.source_id(slot), self.chain.names, path)
        failure = SlotFailure(
            slot, stage, item, *_reason(error, stage, self._timeout_of(stage)),
            after_success=stage in self.worked,
        )  # fmt: skip
        self.worked.discard(stage)
        self.failures[slot] = failure

    def _timeout_of(self, stage: str) -> float | None:
        return next((s.timeout_s for s in self.stages if s.name == stage), None)

    def _emit(self, items: _Items) -> None:
        end = len(self.stages)
        paths = {path: self._full(path, end) for path in set(items.paths)}
        if not self.chain.is_last:
            for item, slot, path in zip(items.items, items.slots, items.paths, strict=True):
                try:
                    self.emitted.setdefault(slot, []).append((paths[path], _pickled(item)))
                except Exception as error:
                    self._fail(slot, self.stages[-1].name, path, error)
            return
        if self.chain.pipeline.sink is None:
            return
        for item, slot, path in zip(items.items, items.slots, items.paths, strict=True):
            try:
                self.rows[slot].append((paths[path], encode_row(item)))
            except RowError as error:
                self._fail(slot, self.stages[-1].name, path, error)

    def _finish(self, result: ChunkResult) -> None:
        result.failures = [self.failures[slot] for slot in sorted(self.failures)]
        result.worked = sorted(self.worked)
        good = [slot for slot in range(len(self.inputs)) if slot not in self.failures]
        result.files = {slot: self.files[slot] for slot in good if slot in self.files}
        if self.chain.is_first and self.chain.is_last:
            self._build_frame(result, good)
        elif self.chain.is_last:
            result.rows = {slot: self.rows[slot] for slot in good}
        else:
            result.emitted = {slot: self.emitted.get(slot, []) for slot in good}

    def _build_frame(self, result: ChunkResult, good: list[int]) -> None:
        if not good:
            return
        frame = FrameBuilder()
        for slot in good:
            frame.add(self.inputs.sources[slot], self.rows[slot])
            if slot in self.files:
                frame.add_files(self.inputs.source_id(slot), self.files[slot])
        result.frame, result.completed = frame.build(), len(good)


def _pickled(item: Any) -> bytes:
    """Return an item for the next group's worker; only processes of this attempt read it."""
    try:
        return pickle.dumps(item, protocol=5)
    except (pickle.PicklingError, AttributeError, TypeError):
        return bytes(cloudpickle.dumps(item, protocol=5))


def _draw(into: list[Any], values: Iterator[Any]) -> None:
    # What came before an exception stays in the list.
    into.extend(itertools.islice(values, SLICE_ITEMS))


def _reason(
    error: BaseException | Failed, stage: str, timeout_s: float | None
) -> tuple[str, str, str, bool]:
    """Return kind, message, traceback and whether to try again."""
    if isinstance(error, Failed):
        return "Failed", error.reason, "", error.retry
    if isinstance(error, StageTimeoutError):
        return (
            "timeout",
            f"stage {stage!r} ran past its timeout_s={timeout_s:g}",
            (user_traceback(error)),
            True,
        )
    message = str(error).strip() or type(error).__name__
    return type(error).__name__, message, user_traceback(error), True


def user_traceback(error: BaseException) -> str:
    """Return an exception's traceback without the engine's own frames, at most 8,000 characters."""
    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None and _is_engine(tb.tb_frame):
        tb = tb.tb_next
    lines = traceback.format_exception(type(error), error, tb)
    text = "".join(lines)
    return text if len(text) <= _TRACEBACK_CHARS else "...\n" + text[-_TRACEBACK_CHARS:]


def _is_engine(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__", "")
    return bool(name.startswith("hpcresume.engine") or name in {"contextlib", "asyncio.tasks"})


@contextlib.contextmanager
def alarm(timeout_s: float | None) -> Iterator[None]:
    """Raise :class:`StageTimeoutError` in the body once it has run for ``timeout_s``.

    Works in the main thread, where Python runs signal handlers; a body that does not return
    to the interpreter is ended by the driver, which reads the worker's mark.
    """
    if timeout_s is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(_number: int, _frame: FrameType | None) -> None:
        raise StageTimeoutError

    before = signal.signal(signal.SIGALRM, expire)
    try:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_now(coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Run a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: ResultT = stop.value
        return result
    coroutine.close()
    raise AssertionError("a chain without async stages suspended")
