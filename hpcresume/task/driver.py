"""The driver: runs the engine over what is left of a shard and writes the ledger.

It alone imports Ray.  It ignores the job's signals and takes orders over a pipe.  It may die
at any moment without losing what it committed: the supervisor has the ledger published.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout
from pyroaring import BitMap

from hpcresume.deadline import seconds_left
from hpcresume.engine.executor import Executor, Limits, StageBrokenError
from hpcresume.engine.groups import Group, make_groups
from hpcresume.engine.packing import make_driver_packer
from hpcresume.engine.pool import EngineDiedError, InlinePool, Pool
from hpcresume.engine.ray_environment import prepare_environment
from hpcresume.engine.worker import WorkerSetup
from hpcresume.errors import (
    HpcResumeError,
    InternalError,
    LocalStorageError,
    StageStartError,
    describe,
)
from hpcresume.failpoints import failpoint
from hpcresume.ledger.group_commit import GroupCommitter
from hpcresume.ledger.store import InFlight, Ledger, LedgerIdentity, LedgerState, StoredBlob
from hpcresume.memory import MemoryGroup
from hpcresume.merge.plan import open_plan
from hpcresume.pipeline.load import load_snapshot
from hpcresume.pipeline.observer import ObservedTask
from hpcresume.pipeline.pipeline import Parts, Pipeline
from hpcresume.run.directory import RunDir
from hpcresume.run.manifest import Manifest
from hpcresume.segment import bitmap as bitmaps
from hpcresume.segment.frame import blob_of
from hpcresume.segment.segment import Failure, Progress, Writer
from hpcresume.task.feed import ShardFeed
from hpcresume.task.messages import (
    DRIVER_ORDERS,
    AttemptSpec,
    Channel,
    DriverOrder,
    Ended,
    FinishBy,
    Hold,
    Published,
    Report,
    Stop,
    Work,
)
from hpcresume.task.observing import Observing
from hpcresume.task.process import die_with_parent, ignore_job_signals

log = logging.getLogger(__name__)

_REPORT_S = 0.2
_STATE_S = 1.0
_CLOSE_S = 5.0
_START_SLOT_S = 15.0
_COLLECT_AFTER = 20_000
"""New objects before the garbage collector looks at the young ones."""
_OVERLONG = 2.0
"""Times its work that a call may take before it hands back what it has not begun."""
_STOPPED = "stopped before the shard was settled"
_NO_TIME = "no source that is left is expected to finish within the time limit"


class LedgerListener:
    """Hands what the executor decides to the ledger.

    Args:
        committer: The ledger's.
        is_inline: Whether this process runs the calls itself, so that it may die of one.
        parts: Directory of the blobs of ``hr.Parts``.
    """

    def __init__(self, committer: GroupCommitter, *, is_inline: bool, parts: str) -> None:
        self._committer, self._is_inline, self._parts = committer, is_inline, parts
        self._waiting: dict[int, InFlight] = {}
        self.bytes_added = 0

    def started(self, call: int, sources: BitMap, *, alone: bool, begins: bool) -> None:
        """Mark a call as in flight."""
        mark = InFlight(sources, alone, time.monotonic() if begins else 0.0)
        if not begins:
            self._waiting[call] = mark
        self._committer.mark(call, mark.encode(), wait=self._is_inline)

    def began(self, call: int) -> None:
        """Mark since when it is worked on."""
        mark = self._waiting.pop(call, None)
        if mark is not None:
            mark = dataclasses.replace(mark, since=time.monotonic())
            self._committer.mark(call, mark.encode())

    def ended(self, call: int) -> None:
        """Take the mark away, with the results it led to."""
        self._waiting.pop(call, None)
        self._committer.add(unmark=call)

    def completed(self, frame: bytes, sources: int) -> None:
        """Add a chunk of completed sources."""
        blob = blob_of(frame, what="a worker's frame")
        stored = None if blob is None else StoredBlob.of(blob, self._parts)
        self.bytes_added += len(frame) + (stored.length if stored else 0)
        self._committer.add(frame=frame, sources=sources, blob=stored)

    def failed(self, failure: Failure) -> None:
        """Add a failure."""
        self._committer.add(failures=[failure])


class Driver:
    """One attempt's engine and ledger."""

    def __init__(self, spec: AttemptSpec, work: Work, channel: Channel) -> None:
        self._spec, self._work, self._channel = spec, work, channel
        self._deadline: float | None = None
        self._told_ready = False
        self._start = time.monotonic()
        self._next_report = self._next_state = 0.0
        self._published_bytes = 0
        self._sent_bytes: list[tuple[int, int]] = []

    def run(self) -> Ended:
        """Run until the shard is settled or the supervisor says stop."""
        try:
            pipeline = load_snapshot(Path(RunDir.open(self._spec.run).code_path(self._spec.code)))
        except StageStartError as error:
            return Ended("stage-start", str(error), 0)
        return self._run(pipeline.pipeline)

    def _run(self, pipeline: Pipeline) -> Ended:
        spec = self._spec
        run = RunDir.open(spec.run)
        identity = LedgerIdentity(
            run.run_id,
            Writer(spec.round, spec.task, spec.epoch),
            spec.code,
            [stage.name for stage in pipeline.stages],
            has_parts=isinstance(pipeline.sink, Parts),
        )
        ledger = Ledger.create(spec.ledger, identity)
        observing = self._observing = self._observe(pipeline, run)
        self._committer = GroupCommitter(
            ledger, on_commit=None if observing is None else observing.committed
        )
        groups = make_groups(pipeline.stages, cpus=spec.cpus, workers=spec.workers)
        # Calls of async stages run beside this thread, and there are many at once.
        is_serial = spec.engine == "inline" and not any(group.is_async for group in groups)
        self._listener = LedgerListener(self._committer, is_inline=is_serial, parts=spec.parts)
        sources = bitmaps.load(self._work.sources, what="the shard")
        self._total = len(sources)
        try:
            pool = self._pool = self._make_pool(pipeline, groups, run)
        except Exception as error:  # Ray raises whatever its start-up meets
            log.exception("the Ray head cannot start")
            return Ended("ray-start", f"the Ray head cannot start: {describe(error)}", 0)
        self._executor = self._make_executor(pipeline, groups, pool, run, sources)
        try:
            self._executor.start()
            _calm_collector()
            settled = self._executor.run(self._tick)
            kind, reason, stage = ("finished", "every source of the shard is settled", "")
            if self._executor.deferred:
                reason += f"; {self._executor.deferred} need more memory, in the next round"
            if not settled:
                kind, reason = "terminated", self._wants_stop() or _STOPPED
        except StageBrokenError as error:
            kind, reason, stage = error.fields["kind"], str(error), error.fields["stage"]
        except LocalStorageError as error:
            kind, reason, stage = "storage", str(error), ""
            return Ended(kind, reason, self._committer.committed_seq, stage)
        self._committer.flush()
        self._write_state()
        last = self._committer.flush()
        self._report()
        pool.close(self._close_s())
        if observing is not None:
            observing.close(_CLOSE_S)
        return Ended(kind, reason, last, stage)

    def _close_s(self) -> float:
        """Return how long teardowns may take: at a stop, what is left of the time to drain."""
        left = 0.0 if self._deadline is None else self._deadline - time.monotonic()
        return max(_CLOSE_S, left)

    def _observe(self, pipeline: Pipeline, run: RunDir) -> Observing | None:
        if pipeline.observer is None:
            return None
        spec = self._spec
        cluster = open_plan(run, spec.round).footer.launch.cluster
        task = ObservedTask(Path(spec.run), spec.round, spec.task, cluster)
        return Observing(pipeline.observer, task, max_attempts=spec.max_attempts)

    def _make_executor(
        self, pipeline: Pipeline, groups: list[Group], pool: Pool, run: RunDir, sources: BitMap
    ) -> Executor:
        spec = self._spec
        loaded = (bitmaps.load(group, what="suspects") for group in self._work.suspects)
        suspects = [group & sources for group in loaded if group & sources]
        ran = {s: seconds for s, seconds in self._work.ran.items() if s in sources}
        ordinary = sources - bitmaps.union(suspects) - BitMap(ran)
        return Executor(
            groups,
            pool,
            ShardFeed(Manifest.open(run), ordinary),
            self._listener,
            Limits(
                max_attempts=spec.max_attempts,
                chunk_target_s=spec.chunk_target_s,
                chunk_max=spec.chunk_max,
                memory_mib=spec.memory_mib,
                memory_limit=spec.memory_limit,
            ),
            attempts=self._work.attempts,
            suspects=suspects,
            ran=ran,
            has_sink=pipeline.sink is not None,
            packer=make_driver_packer(pipeline.sink, spec.parts),
        )

    def _make_pool(self, pipeline: Pipeline, groups: list[Group], run: RunDir) -> Pool:
        spec = self._spec
        scratch, outputs, parts = os.path.join(spec.local, "scratch"), spec.outputs, spec.parts
        if spec.engine == "inline":
            return InlinePool(
                pipeline,
                groups,
                run_id=run.run_id,
                scratch=Path(scratch),
                outputs=Path(outputs),
                parts=parts,
                seconds_left=lambda: seconds_left(spec.local),
                restarts=Path(run.restarts),
                attempt=Path(spec.local),
            )
        # Ray reads its settings when it is imported.
        prepare_environment()
        from hpcresume.engine.head import HeadResources, RayHead
        from hpcresume.engine.ray_pool import RayPool

        with _start_slot(spec):
            head = RayHead(spec.ray_temp, HeadResources(spec.cpus, spec.gpus, spec.memory_bytes))
        failpoint("driver.after_ray_init")

        def make_setup(group: Group, index: int, mark: str, output: str) -> WorkerSetup:
            return WorkerSetup(
                code=run.code_path(spec.code),
                run_id=run.run_id,
                first=group.first,
                count=len(group.stages),
                index=index,
                cpus=group.cpus,
                gpus=group.gpus,
                scratch=scratch,
                outputs=outputs,
                parts=parts,
                mark=mark,
                output=output,
                local=spec.local,
                restarts=run.restarts,
                call_max_s=_OVERLONG * spec.chunk_target_s,
            )

        return RayPool(
            groups,
            make_setup=make_setup,
            marks=os.path.join(spec.local, "marks"),
            check=head.check,
            memory=MemoryGroup.of_this_process() if spec.memory_mib else MemoryGroup(),
        )

    def _tick(self) -> bool:
        for order in self._channel.receive(DRIVER_ORDERS):
            self._obey(order)
        if self._channel.closed:
            return False
        now = time.monotonic()
        # A first source that blocks this process must not keep the start from being told.
        if now >= self._next_report or self._executor.ready != self._told_ready:
            self._told_ready = self._executor.ready
            self._next_report = now + _REPORT_S
            self._executor.flush_completed()
            self._report()
        if now >= self._next_state:
            self._next_state = now + _STATE_S
            self._write_state()
        if self._wants_stop():
            self._executor.stop()
        return self._deadline is None or now < self._deadline

    def _wants_stop(self) -> str:
        return "" if self._observing is None else self._observing.wants_stop

    def _obey(self, order: DriverOrder) -> None:
        if isinstance(order, Stop):
            self._deadline = order.deadline
            self._executor.stop()
        elif isinstance(order, FinishBy):
            self._executor.finish_by(order.deadline)
        elif isinstance(order, Hold):
            self._executor.hold(order.on)
        else:
            self._committer.release(order.last)
            self._note_receipt(order)

    def _note_receipt(self, order: Published) -> None:
        while self._sent_bytes and self._sent_bytes[0][0] <= order.last:
            self._published_bytes = self._sent_bytes.pop(0)[1]

    def _left(self) -> int:
        return self._total - self._executor.completed - self._executor.quarantined

    def _report(self) -> None:
        executor, committer = self._executor, self._committer
        last = committer.committed_seq
        if not self._sent_bytes or self._sent_bytes[-1][0] < last:
            self._sent_bytes.append((last, self._listener.bytes_added))
        self._channel.send(
            Report(
                last=last,
                committed=committer.committed_sources,
                unpublished_bytes=self._listener.bytes_added - self._published_bytes,
                in_flight=executor.in_flight,
                failing=executor.failing,
                quarantined=executor.quarantined,
                left=self._left(),
                ready=executor.ready,
                lacks_time=executor.lacks_time,
                oom_deaths=self._pool.oom_deaths,
            )
        )

    def _write_state(self) -> None:
        executor = self._executor
        progress = Progress(
            elapsed_s=time.monotonic() - self._start,
            written_at=time.time(),
            in_flight=executor.in_flight,
            # What is published next holds at least these.
            completed=self._committer.committed_sources,
            failing=executor.failing,
            left=self._left(),
            note=_NO_TIME if executor.lacks_time else "",
        )
        self._committer.add(state=LedgerState(executor.counts(), progress))


def _calm_collector() -> None:
    """Let the garbage collector pass over what the start made, and look less often.

    While it looks, the event loop and all threads stand still: with some hundred coroutines
    under way it took a quarter of this process's time, and up to a tenth of a second at once.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER)


@contextlib.contextmanager
def _start_slot(spec: AttemptSpec) -> Iterator[None]:
    """Let two heads of this user start on this node at a time, but none wait for long.

    Several at once only slow each other down; nothing relies on the lock.
    """
    shared = os.path.dirname(os.path.dirname(spec.local))
    lock = FileLock(os.path.join(shared, f"ray-start-{spec.task % 2}.lock"))
    try:
        lock.acquire(timeout=_START_SLOT_S)
    except (Timeout, OSError):
        log.info("other Ray heads are starting on this node; not waiting longer")
    try:
        yield
    finally:
        lock.release()


def main(argv: list[str]) -> None:
    """Run one attempt's driver; never returns."""
    spec_path, read_fd, write_fd, parent = argv[1], int(argv[2]), int(argv[3]), int(argv[4])
    ignore_job_signals()
    die_with_parent(parent)
    os.umask(0o077)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="hpcresume driver: %(message)s"
    )
    with open(spec_path, "rb") as file:
        spec = msgspec.json.decode(file.read(), type=AttemptSpec)
    with open(os.path.join(spec.local, "work"), "rb") as file:
        work = msgspec.msgpack.decode(file.read(), type=Work)
    channel = Channel(read_fd, write_fd)
    status = 0
    try:
        channel.send(Driver(spec, work, channel).run())
    except (EngineDiedError, InternalError) as error:
        log.error("%s", error)  # noqa: TRY400  # the trace would be Ray's, not the user's
        status = error.exit_code
    except HpcResumeError as error:
        channel.send(Ended("storage", str(error), 0))
        status = error.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    # Ray's own shutdown takes a second and more; its processes end with this one.
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv)
