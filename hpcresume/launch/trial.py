"""A trial: a spread sample of a pipeline's sources, run here, and what all of them would cost.

Nothing outlives a trial but its report: no run directory is made, and what the stages write
to their scratch and output paths lies in a temporary directory that is removed at the end.
The executor is the one of an array task, with one try per source and in place of the ledger
a list.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import signal
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec
import orjson
import psutil
from pyroaring import BitMap

from hpcresume.config import Settings, load_settings
from hpcresume.engine.calls import Inputs
from hpcresume.engine.executor import Executor, Limits, StageBrokenError
from hpcresume.engine.groups import Group, make_groups
from hpcresume.engine.pool import EngineDiedError, InlinePool, Pool
from hpcresume.engine.ray_environment import prepare_environment
from hpcresume.engine.worker import WorkerSetup
from hpcresume.errors import SourcesError, UsageError
from hpcresume.ids import item_id, new_run_id
from hpcresume.launch.estimate import Estimate, estimate_run
from hpcresume.pipeline.load import LoadedPipeline, write_snapshot
from hpcresume.pipeline.pipeline import Pipeline
from hpcresume.pipeline.sources import Indexed, SourceList, encode_payload
from hpcresume.segment.frame import decode_frame
from hpcresume.segment.segment import Failure, StageCount
from hpcresume.task.allocation import read_allocation
from hpcresume.task.scratch import make_ray_temp

if TYPE_CHECKING:
    from hpcresume.engine.head import RayHead

Engine = Literal["ray", "inline"]
ItemT = TypeVar("ItemT")

SHOWN_ROWS = 3
_TICK_S = 0.2
_MEMORY_S = 1.0
_CLOSE_S = 5.0


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One row: its source's id, its item's id, and the value that the sink would get."""

    source: str
    item: str
    row: Any


@dataclass(frozen=True, slots=True)
class TrialSource:
    """What became of one source.

    Attributes:
        source: Its id.
        state: ``completed``, ``failed``, or ``not run`` where the trial ended before.
        rows: How many rows it made.
    """

    source: str
    state: str
    rows: int


@dataclass(frozen=True, slots=True)
class StageMeasure:
    """What one stage did.

    Attributes:
        name: The stage.
        items_in: Items it was given.
        items_out: Items it made.
        dropped: Items it dropped.
        failed: Items it failed.
        seconds: Seconds in its code; of an async stage the sum over items in flight together.
        seconds_per_item: The same per item given, None without any.
        peak_memory_bytes: Most resident memory of the process that ran it, which it shares
            with the stages fused with it and, inline, with everything else; None if unknown.
    """

    name: str
    items_in: int
    items_out: int
    dropped: int
    failed: int
    seconds: float
    seconds_per_item: float | None
    peak_memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class TrialReport:
    """What a trial found.

    Attributes:
        pipeline: The pipeline's name.
        engine: ``ray`` or ``inline``.
        total: Number of all sources.
        sources: The sampled sources, in the order of the listing.
        rows: The first rows of each.
        failures: Every failure, with the user's traceback.
        stages: What each stage did.
        start_s: Seconds from the start of the engine until all stages were set up.
        elapsed_s: Seconds of the whole.
        stopped: Why it ended before every sampled source was run, empty otherwise.
        tolerated: Failures that the pipeline tolerates in a sample of this size.
        estimate: What all sources would cost; None where no source completed.
    """

    pipeline: str
    engine: str
    total: int
    sources: list[TrialSource]
    rows: list[TrialRow]
    failures: list[Failure]
    stages: list[StageMeasure]
    start_s: float
    elapsed_s: float
    stopped: str
    tolerated: int
    estimate: Estimate | None

    @property
    def completed(self) -> int:
        """Number of sampled sources that completed."""
        return sum(source.state == "completed" for source in self.sources)

    @property
    def ok(self) -> bool:
        """Whether every sampled source completed, but for as many as the pipeline tolerates."""
        return not self.stopped and len(self.sources) - self.completed <= self.tolerated

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "pipeline": self.pipeline,
            "engine": self.engine,
            "ok": self.ok,
            "stopped": self.stopped,
            "total": self.total,
            "sampled": len(self.sources),
            "completed": self.completed,
            "tolerated": self.tolerated,
            "start_s": self.start_s,
            "elapsed_s": self.elapsed_s,
            "sources": [dataclasses.asdict(source) for source in self.sources],
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "failures": [_failure_values(failure) for failure in self.failures],
            "stages": [_stage_values(stage) for stage in self.stages],
            "estimate": None if self.estimate is None else dataclasses.asdict(self.estimate),
        }


def _failure_values(failure: Failure) -> dict[str, Any]:
    values = {"source": failure.source_id}
    names = ("item", "stage", "kind", "message", "traceback")
    return {**values, **{name: getattr(failure, name) for name in names}}


def _stage_values(stage: StageMeasure) -> dict[str, Any]:
    values = dataclasses.asdict(stage)
    return {"name": values.pop("name"), "in": values.pop("items_in"),
            "out": values.pop("items_out"), **values}  # fmt: skip


def trial(
    pipeline: Pipeline | LoadedPipeline,
    *,
    sources: Iterable[str] | None = None,
    n: int = 10,
    engine: Engine = "inline",
) -> TrialReport:
    """Run a sample of a pipeline's sources in this process, or on Ray, and write nothing.

    Args:
        pipeline: The pipeline.
        sources: Ids of the sources to run; None: ``n`` of them, spread over the listing.
        n: How many, at least 1.
        engine: ``inline`` runs in this process, one source after another; ``ray`` as an
            array task does, in worker processes.  They load the pipeline from its file, so
            it has to be what :func:`~hpcresume.pipeline.load.load_pipeline` returned.

    Raises:
        SourcesError: The sources cannot be listed, or an id is none of them.
        NotResumableError: `submit` would refuse the pipeline.
        UsageError: ``n`` or ``engine`` cannot be right, Ray is in use by this process, or
            its workers have no file to load the pipeline from.
    """
    settings = load_settings(site=None, start_dir=Path.cwd(), environ=os.environ, flags={}).settings
    chosen = None if sources is None else list(sources)
    return run_trial(pipeline, settings=settings, sources=chosen, n=n, engine=engine)


def run_trial(
    pipeline: Pipeline | LoadedPipeline,
    *,
    settings: Settings,
    sources: Sequence[str] | None = None,
    n: int = 10,
    engine: str = "inline",
    on_error: Callable[[BaseException], None] | None = None,
    on_tick: Callable[[int, int], bool] = lambda _done, _total: True,
) -> TrialReport:
    """Run a trial as :func:`trial`, with the settings of a submission.

    Args:
        pipeline: The pipeline; with what it was loaded from, Ray's workers load it as tasks do.
        settings: Decide the workers and what the estimate is for.
        sources: As :func:`trial`.
        n: As :func:`trial`.
        engine: As :func:`trial`.
        on_error: Called with every exception of a stage while its frames exist; inline only.
        on_tick: Called at least every 0.2 s while Ray works, and between calls inline, with
            the sources done and sampled; False ends the trial.

    Raises:
        HpcResumeError: As :func:`trial`.
    """
    if engine not in {"ray", "inline"}:
        raise UsageError(f"engine={engine!r}: choose ray or inline.")
    if on_error is not None and engine == "ray":
        raise UsageError(
            "a debugger cannot be attached to Ray's worker processes. "
            "It opens where an exception was raised, in this process. Add --engine inline."
        )
    loaded = pipeline if isinstance(pipeline, LoadedPipeline) else None
    made = pipeline.pipeline if isinstance(pipeline, LoadedPipeline) else pipeline
    if loaded is None and engine == "ray":
        raise UsageError(
            f"pipeline {made.name!r} was made in this process, and Ray's workers load it from "
            "a file. Use engine='inline', or `hpcresume trial FILE`."
        )
    made.check_resumable()
    sample = _named(made.sources, sources) if sources else spread(made.sources, n)
    with _workplace() as place:
        bench = _Bench(made, loaded, sample, place, engine, on_error)
        return bench.run(settings, on_tick)


# -- which sources ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """The sources of a trial.

    Attributes:
        total: Number of all sources.
        indices: Positions of the sampled ones in the listing, increasing.
        records: Id and encoded payload of each; None where payloads are made from positions.
    """

    total: int
    indices: list[int]
    records: list[tuple[str, bytes]] | None = None

    def id_of(self, slot: int) -> str:
        """Return the id of sampled source ``slot``."""
        return str(self.indices[slot]) if self.records is None else self.records[slot][0]


class Spread:
    """Keeps an even spread of a stream whose length is not known, in one pass.

    Every ``stride``-th item is kept; once there are twice as many as wanted, every other one
    goes and the stride doubles.  Nothing is drawn by chance.
    """

    def __init__(self, n: int) -> None:
        self._n, self._stride = n, 1
        self._kept: list[tuple[int, Any]] = []
        self.count = 0

    def add(self, item: Any) -> None:
        """Take the stream's next item."""
        if self.count % self._stride == 0:
            if len(self._kept) == 2 * self._n:
                self._kept = self._kept[::2]
                self._stride *= 2
            if self.count % self._stride == 0:
                self._kept.append((self.count, item))
        self.count += 1

    def chosen(self) -> list[tuple[int, Any]]:
        """Return at most ``n`` items with their positions, evenly spread over the stream."""
        return [self._kept[i] for i in even_positions(len(self._kept), self._n)]


def even_positions(total: int, n: int) -> list[int]:
    """Return ``n`` positions spread evenly over ``total``, the first one included; all if fewer."""
    n = min(n, total)
    return [i * total // n for i in range(n)]


def spread(sources: SourceList, n: int) -> Sample:
    """Return ``n`` sources spread evenly over a listing; the same ones every time.

    Raises:
        UsageError: ``n`` is below 1.
        SourcesError: The sources cannot be listed.
    """
    if n < 1:
        raise UsageError(f"-n {n}: a sample has at least 1 source.")
    if isinstance(sources, Indexed):
        return Sample(len(sources), even_positions(len(sources), n))
    kept = Spread(n)
    for source in sources:
        kept.add(source)
    chosen = kept.chosen()
    records = [(s.id, encode_payload(s.payload, source_id=s.id)) for _, s in chosen]
    return Sample(kept.count, [position for position, _ in chosen], records)


def _named(sources: SourceList, wanted: Sequence[str]) -> Sample:
    """Return the sources with the given ids, in the order of the listing."""
    if isinstance(sources, Indexed):
        found = {name: int(name) for name in wanted if _is_index(name, len(sources))}
        _refuse_absent(wanted, found, first="0" if len(sources) else None)
        return Sample(len(sources), sorted(found.values()))
    missing, first, total = set(wanted), None, 0
    indices, records = [], []
    for position, source in enumerate(sources):
        first = source.id if first is None else first
        total = position + 1
        if source.id in missing:
            missing.remove(source.id)
            indices.append(position)
            records.append((source.id, encode_payload(source.payload, source_id=source.id)))
    _refuse_absent(wanted, {record[0] for record in records}, first=first)
    return Sample(total, indices, records)


def _is_index(text: str, total: int) -> bool:
    return text.isascii() and text.isdigit() and str(int(text)) == text and int(text) < total


def _refuse_absent(wanted: Sequence[str], found: Collection[str], *, first: str | None) -> None:
    absent = [name for name in wanted if name not in found]
    if absent:
        like = "there are no sources" if first is None else f"the first one is {first!r}"
        raise SourcesError(
            f"no source has the id {' or '.join(map(repr, absent))}. Ids are compared whole; "
            f"{like}. Give ids of the listing, or leave --source out for a sample.",
            absent=absent,
        )


class _SampleFeed:
    """Hands the sampled sources to the executor."""

    def __init__(self, sample: Sample) -> None:
        self._sample, self._at = sample, 0
        self._slots = {index: slot for slot, index in enumerate(sample.indices)}

    def left(self) -> int:
        """Return how many sources have not been taken."""
        return len(self._sample.indices) - self._at

    def weight(self, source: int) -> float:
        """Return 1: a trial has no time limit that it could matter for."""
        del source
        return 1.0

    def take(self, count: int, size_bytes: int, *, weight_max: float) -> Inputs | None:
        """Return up to ``count`` sources; a sample is too small for the bounds to matter."""
        del size_bytes, weight_max
        if not self.left():
            return None
        taken = self._sample.indices[self._at : self._at + count]
        self._at += len(taken)
        return self.give(taken)

    def give(self, sources: Sequence[int]) -> Inputs:
        """Return sources by their positions in the listing."""
        records = self._sample.records
        if records is not None:
            records = [records[self._slots[index]] for index in sources]
        return Inputs(array("I", sources), records=records)


# -- running them -------------------------------------------------------------------------------


@dataclass
class _Results:
    """What the executor decided, in memory; the executor's listener.

    Attributes:
        sample: The sources.
        stages: The stages' names.
        original: Puts the user's paths in place of those of the copy that workers run.
    """

    sample: Sample
    stages: list[str]
    original: Callable[[str], str]
    rows: list[TrialRow] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def started(self, call: int, sources: BitMap, *, alone: bool, begins: bool) -> None:
        """Take note of nothing: there is nothing to recover."""

    def began(self, call: int) -> None:
        """Take note of nothing."""

    def ended(self, call: int) -> None:
        """Take note of nothing."""

    def completed(self, frame: bytes, sources: int) -> None:
        """Keep the first rows of each completed source."""
        del sources
        found = decode_frame(frame, what="a chunk of the trial")
        slots = {index: slot for slot, index in enumerate(self.sample.indices)}
        paths = iter(found.paths())
        for index, data in found.sources():
            source = self.sample.id_of(slots[index])
            lines = data.splitlines()
            self.counts[index] = len(lines)
            for n, line in enumerate(lines):
                path = next(paths)
                if n < SHOWN_ROWS:
                    item = item_id(source, self.stages, path)
                    self.rows.append(TrialRow(source, item, orjson.loads(line)))

    def failed(self, failure: Failure) -> None:
        """Keep a failure, with the user's own paths in its traceback."""
        text = self.original(failure.traceback)
        self.failures.append(msgspec.structs.replace(failure, traceback=text))

    def outcomes(self) -> list[TrialSource]:
        """Return what became of every sampled source."""
        failed = {failure.source for failure in self.failures}
        found = []
        for slot, index in enumerate(self.sample.indices):
            done = "completed" if index in self.counts else "not run"
            state = "failed" if index in failed else done
            found.append(TrialSource(self.sample.id_of(slot), state, self.counts.get(index, 0)))
        return found

    def sorted_rows(self) -> list[TrialRow]:
        """Return the rows in the order of the listing."""
        order = {self.sample.id_of(slot): slot for slot in range(len(self.sample.indices))}
        return sorted(self.rows, key=lambda row: order[row.source])


@dataclass
class _Bench:
    """One trial at work."""

    pipeline: Pipeline
    loaded: LoadedPipeline | None
    sample: Sample
    place: Path
    engine: str
    on_error: Callable[[BaseException], None] | None

    def __post_init__(self) -> None:
        self._allocation = read_allocation(os.environ)
        self._run_id = new_run_id()
        names = [stage.name for stage in self.pipeline.stages]
        self._results = _Results(self.sample, names, self._original)
        self._start_s: float | None = None
        self._stopped = ""

    def run(self, settings: Settings, on_tick: Callable[[int, int], bool]) -> TrialReport:
        """Run the sample and return the report."""
        start = time.monotonic()
        groups = self._groups(settings.task.workers)
        memory = _Memory(groups, self.place / "marks" if self.engine == "ray" else None)
        counts = [StageCount(stage.name) for stage in self.pipeline.stages]
        if self.sample.indices:
            with self._pool(groups) as pool:
                executor = self._executor(groups, pool, settings)
                self._execute(executor, memory, on_tick, start)
                counts = executor.counts()
        elapsed = time.monotonic() - start
        start_s = elapsed if self._start_s is None else self._start_s
        return self._report(counts, memory, settings, start_s=start_s, elapsed_s=elapsed)

    def _original(self, text: str) -> str:
        if self.loaded is None:
            return text
        copied = f"{self.place / 'code'}{os.sep}"
        return text.replace(copied, f"{self.loaded.spec.path.parent}{os.sep}")

    def _groups(self, workers: int) -> list[Group]:
        """Return the groups with no more workers than there are sources, inline with one."""
        most = 1 if self.engine == "inline" else max(1, len(self.sample.indices))
        groups = make_groups(self.pipeline.stages, cpus=self._allocation.cpus, workers=workers)
        return [dataclasses.replace(g, workers=min(g.workers, most)) for g in groups]

    def _executor(self, groups: list[Group], pool: Pool, settings: Settings) -> Executor:
        task = settings.task
        limits = Limits(
            max_attempts=1, chunk_target_s=task.chunk_target_s, chunk_max=task.chunk_max_sources
        )
        has_sink = self.pipeline.sink is not None
        feed = _SampleFeed(self.sample)
        return Executor(groups, pool, feed, self._results, limits, has_sink=has_sink)

    def _execute(
        self,
        executor: Executor,
        memory: _Memory,
        on_tick: Callable[[int, int], bool],
        start: float,
    ) -> None:
        total = len(self.sample.indices)

        def tick() -> bool:
            if executor.ready and self._start_s is None:
                self._start_s = time.monotonic() - start
            memory.look()
            return on_tick(executor.completed + executor.quarantined, total)

        try:
            executor.start()
            if not executor.run(tick, tick_s=_TICK_S):
                self._stopped = "it was ended by hand"
        except (StageBrokenError, EngineDiedError) as error:
            self._stopped = self._original(str(error))
        finally:
            executor.flush_completed()
            memory.look(now=True)

    @contextlib.contextmanager
    def _pool(self, groups: list[Group]) -> Iterator[Pool]:
        if self.engine == "ray":
            with self._ray_pool(groups) as pool:
                yield pool
            return
        inline = InlinePool(
            self.pipeline,
            groups,
            run_id=self._run_id,
            scratch=self.place / "scratch",
            outputs=self.place / "outputs",
            seconds_left=lambda: None,
            on_error=self.on_error,
        )
        try:
            yield inline
        finally:
            inline.close(_CLOSE_S)

    @contextlib.contextmanager
    def _ray_pool(self, groups: list[Group]) -> Iterator[Pool]:
        assert self.loaded is not None
        code = self.place / "code"
        write_snapshot(self.loaded, code)

        def make_setup(group: Group, index: int, mark: str) -> WorkerSetup:
            return WorkerSetup(
                code=str(code),
                run_id=self._run_id,
                first=group.first,
                count=len(group.stages),
                index=index,
                cpus=group.cpus,
                gpus=group.gpus,
                scratch=str(self.place / "scratch"),
                outputs=str(self.place / "outputs"),
                mark=mark,
                local=str(self.place),
            )

        gpus = math.ceil(sum(group.gpus * group.workers for group in groups))
        with self._ray_head(gpus) as head:
            from hpcresume.engine.ray_pool import RayPool

            marks = str(self.place / "marks")
            pool = RayPool(groups, make_setup=make_setup, marks=marks, check=head.check)
            try:
                yield pool
            finally:
                pool.close(_CLOSE_S)

    @contextlib.contextmanager
    def _ray_head(self, gpus: int) -> Iterator[RayHead]:
        before = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
        _refuse_second_ray()
        # Ray reads its settings when it is imported.
        prepare_environment()
        from hpcresume.engine.head import HeadResources, RayHead

        given = self._allocation
        # A stage that finds no GPU says so itself; Ray would wait for one forever.
        resources = HeadResources(given.cpus, max(gpus, given.gpus), given.memory_bytes)
        temp = make_ray_temp()
        try:
            head = RayHead(temp, resources)
            try:
                yield head
            finally:
                processes = _processes_below(temp)
                head.close()
                _end(processes)
        finally:
            # Once more: a process of Ray's that was ending may have made it anew.
            shutil.rmtree(temp, ignore_errors=True)
            for name in [name for name in os.environ if name.startswith("RAY_")]:
                del os.environ[name]
            os.environ.update(before)

    def _report(
        self,
        counts: list[StageCount],
        memory: _Memory,
        settings: Settings,
        *,
        start_s: float,
        elapsed_s: float,
    ) -> TrialReport:
        results = self._results
        outcomes = results.outcomes()
        ran = sum(source.state != "not run" for source in outcomes)
        estimate = None
        if any(source.state == "completed" for source in outcomes):
            estimate = estimate_run(
                self.pipeline,
                [count.seconds / ran for count in counts],
                settings=settings,
                sources=self.sample.total,
                start_s=start_s,
            )
        return TrialReport(
            pipeline=self.pipeline.name,
            engine=self.engine,
            total=self.sample.total,
            sources=outcomes,
            rows=results.sorted_rows(),
            failures=results.failures,
            stages=[_measure(count, memory.of(n)) for n, count in enumerate(counts)],
            start_s=start_s,
            elapsed_s=elapsed_s,
            stopped=self._stopped,
            tolerated=int(self.pipeline.tolerate * len(outcomes) + 1e-9),
            estimate=estimate,
        )


def _measure(count: StageCount, peak_memory_bytes: int | None) -> StageMeasure:
    return StageMeasure(
        name=count.name,
        items_in=count.items_in,
        items_out=count.items_out,
        dropped=count.dropped,
        failed=count.failed,
        seconds=count.seconds,
        seconds_per_item=count.seconds / count.items_in if count.items_in else None,
        peak_memory_bytes=peak_memory_bytes,
    )


class _Memory:
    """Peak resident memory of the processes that run the stages; best effort.

    The kernel's own high-water mark of a process is read while it lives.  ``ru_maxrss``
    would not do: on Linux a child inherits its parent's through exec.
    """

    def __init__(self, groups: Sequence[Group], marks: Path | None) -> None:
        self._marks = marks
        self._group_of = [group.number for group in groups for _ in group.stages]
        self._workers: dict[int, int] = {}
        self._peaks: dict[int, int] = {}
        self._next = 0.0

    def look(self, *, now: bool = False) -> None:
        """Read the marks, at most once a second unless it must be ``now``."""
        clock = time.monotonic()
        if clock < self._next and not now:
            return
        self._next = clock + _MEMORY_S
        if self._marks is None:
            self._note(os.getpid(), set(self._group_of))
            return
        self._find_workers(str(self._marks) + os.sep)
        for pid, group in self._workers.items():
            self._note(pid, {group})

    def _find_workers(self, marks: str) -> None:
        """Find Ray's workers by the file that each keeps open for its last words."""
        for process in psutil.Process().children(recursive=True):
            if process.pid in self._workers:
                continue
            try:
                names = os.listdir(f"/proc/{process.pid}/fd")
                links = [os.readlink(f"/proc/{process.pid}/fd/{name}") for name in names]
            except OSError:
                continue
            for link in links:
                if link.startswith(marks) and link.endswith(".fault"):
                    number = link.removeprefix(marks).partition("-")[0]
                    self._workers[process.pid] = int(number)

    def _note(self, pid: int, groups: Iterable[int]) -> None:
        peak = _high_water_bytes(pid)
        for group in groups if peak else ():
            self._peaks[group] = max(self._peaks.get(group, 0), peak)

    def of(self, stage: int) -> int | None:
        """Return the peak of the processes that ran stage number ``stage``."""
        return self._peaks.get(self._group_of[stage])


def _high_water_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) << 10
    except OSError:
        return 0
    return 0


@contextlib.contextmanager
def _workplace() -> Iterator[Path]:
    """Yield a temporary directory, removed at the end, also where SIGTERM is that end."""
    path = Path(tempfile.mkdtemp(prefix="hpcresume-trial-"))
    for name in ("scratch", "outputs", "marks"):
        (path / name).mkdir(mode=0o700)
    try:
        with _sigterm_interrupts():
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield  # whoever set a handler decides
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _processes_below(temp: str) -> list[psutil.Process]:
    """Return the processes of the Ray head in ``temp``, and what these have started."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any(temp in word for word in child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found


def _end(processes: list[psutil.Process]) -> None:
    """Wait until processes that were told to end have done so, and kill what does not."""
    _, left = psutil.wait_procs(processes, timeout=_CLOSE_S)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=_CLOSE_S)


def _refuse_second_ray() -> None:
    import sys

    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        raise UsageError(
            "Ray is in use by this process already. A trial starts a head of its own. "
            "Call ray.shutdown() first, or use engine='inline'."
        )
