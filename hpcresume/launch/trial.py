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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import orjson
import psutil
from pyroaring import BitMap

from hpcresume.config import Settings, load_settings
from hpcresume.engine.executor import Executor, Limits, StageBrokenError
from hpcresume.engine.groups import Group, make_groups
from hpcresume.engine.packing import make_driver_packer
from hpcresume.engine.pool import EngineDiedError, InlinePool, Pool
from hpcresume.engine.ray_environment import prepare_environment
from hpcresume.engine.worker import WorkerSetup
from hpcresume.errors import PipelineError, UsageError
from hpcresume.ids import item_id, new_run_id
from hpcresume.launch.estimate import estimate_run
from hpcresume.launch.trial_memory import Memory
from hpcresume.launch.trial_report import StageMeasure, TrialReport, TrialRow, TrialSource
from hpcresume.launch.trial_sample import (
    Sample,
    SampleFeed,
    keep_restart_points,
    named,
    spread,
)
from hpcresume.output.rows import frame_of_blob
from hpcresume.pipeline.load import LoadedPipeline, load_pipeline, write_snapshot
from hpcresume.pipeline.pipeline import Pipeline
from hpcresume.pipeline.target import parse_target, target_of
from hpcresume.segment.segment import Failure, StageCount
from hpcresume.task.allocation import read_allocation
from hpcresume.task.scratch import make_ray_temp

if TYPE_CHECKING:
    from hpcresume.engine.head import RayHead

Engine = Literal["ray", "inline"]

SHOWN_ROWS = 3
_TICK_S = 0.2
_CLOSE_S = 5.0


def trial(
    pipeline: Pipeline | LoadedPipeline | str | os.PathLike[str] | Callable[..., Any],
    *,
    params: Mapping[str, Any] | None = None,
    sources: Iterable[str] | None = None,
    n: int = 10,
    engine: Engine = "inline",
) -> TrialReport:
    """Run a sample of a pipeline's sources in this process, or on Ray, and write nothing.

    Args:
        pipeline: The pipeline, or what names its file: ``file.py``, ``file.py:name``,
            ``module:name``, or the function that makes it, imported from a file.
        params: The pipeline's parameters by name; not for one that is made already.
        sources: Ids of the sources to run; None: ``n`` of them, spread over the listing.
        n: How many, at least 1.
        engine: ``inline`` runs in this process, one source after another; ``ray`` as an
            array task does, in worker processes.  They load the pipeline from its file, so
            it has to be named by it.

    Raises:
        PipelineError: ``pipeline`` is none, or its file cannot be loaded.
        SourcesError: The sources cannot be listed, or an id is none of them.
        NotResumableError: `submit` would refuse the pipeline.
        UsageError: ``n``, ``engine`` or a parameter cannot be right, Ray is in use by this
            process, or its workers have no file to load the pipeline from.
        ConfigError: A setting cannot be right.
    """
    made = _made(pipeline, params)
    settings = load_settings(site=None, start_dir=Path.cwd(), environ=os.environ, flags={}).settings
    chosen = None if sources is None else list(sources)
    return run_trial(made, settings=settings, sources=chosen, n=n, engine=engine)


def _made(pipeline: Any, params: Mapping[str, Any] | None) -> Pipeline | LoadedPipeline:
    if not isinstance(pipeline, Pipeline | LoadedPipeline):
        return load_pipeline(parse_target(_target(pipeline), Path.cwd()), params or {})
    if params:
        raise UsageError(
            "params are for a pipeline that is still to be made. This one is made already. "
            "Give its file, hr.trial('pipeline.py', params=...), or make it with them."
        )
    return pipeline


def _target(pipeline: Any) -> str:
    try:
        return target_of(pipeline)
    except PipelineError as error:
        if callable(pipeline):
            raise PipelineError(
                f"{pipeline!r} cannot be loaded from a file. "
                "In this process it can be called: hr.trial(pipeline())."
            ) from error
        raise PipelineError(
            f"a {type(pipeline).__name__} cannot be tried. "
            "Give an hr.Pipeline, or its file: hr.trial('pipeline.py')."
        ) from error


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
    sample = spread(made.sources, n) if sources is None else named(made.sources, sources)
    with _workplace() as place:
        keep_restart_points(sample, place / "restarts")
        bench = _Bench(made, loaded, sample, place, engine, on_error)
        return bench.run(settings, on_tick)


@dataclass
class _Results:
    """What the executor decided, in memory; the executor's listener.

    Attributes:
        sample: The sources.
        stages: The stages' names.
        original: Puts the user's paths in place of those of the copy that workers run.
        parts: Directory of the blobs of ``hr.Parts``.
    """

    sample: Sample
    stages: list[str]
    original: Callable[[str], str]
    parts: str
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
        found = frame_of_blob(frame, self.parts)
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
        self._results = _Results(self.sample, names, self._original, str(self.place / "parts"))
        self._start_s: float | None = None
        self._stopped = ""

    def run(self, settings: Settings, on_tick: Callable[[int, int], bool]) -> TrialReport:
        """Run the sample and return the report."""
        start = time.monotonic()
        groups = self._groups(settings.task.workers)
        memory = Memory(groups, self.place / "marks" if self.engine == "ray" else None)
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
        feed = SampleFeed(self.sample)
        packer = make_driver_packer(self.pipeline.sink, self._results.parts)
        return Executor(groups, pool, feed, self._results, limits, has_sink=has_sink, packer=packer)

    def _execute(
        self,
        executor: Executor,
        memory: Memory,
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
            parts=str(self.place / "parts"),
            restarts=self.place / "restarts",
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

        def make_setup(group: Group, index: int, mark: str, output: str) -> WorkerSetup:
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
                parts=str(self.place / "parts"),
                restarts=str(self.place / "restarts"),
                mark=mark,
                output=output,
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
        memory: Memory,
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


@contextlib.contextmanager
def _workplace() -> Iterator[Path]:
    """Yield a temporary directory, removed at the end, also where SIGTERM is that end."""
    path = Path(tempfile.mkdtemp(prefix="hpcresume-trial-"))
    for name in ("scratch", "outputs", "parts", "marks"):
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
