"""The process that runs one group's stages: a Ray actor."""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcresume.deadline import seconds_left
from hpcresume.engine import children, output
from hpcresume.engine.calls import ChunkResult, Inputs
from hpcresume.engine.chain import Chain, ChainPlace, run_now
from hpcresume.engine.mark import Mark
from hpcresume.errors import HpcResumeError
from hpcresume.pipeline.context import Worker
from hpcresume.pipeline.load import load_snapshot


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker needs to know to start.

    Attributes:
        code: Directory of the code snapshot.
        run_id: The run.
        first: Position of the group's first stage in the pipeline.
        count: Number of its stages.
        index: Number of the worker within its group.
        cpus: Cores it holds.
        gpus: GPUs it holds.
        scratch: Node-local directory of the attempt.
        outputs: Node-local root for files of ``ctx.output``.
        parts: Node-local directory for blobs of ``hr.Parts``.
        mark: Path of the worker's mark, named by group, index and start; next to it, ``.fault``
            holds its last words.
        output: Where what the stages print goes to, as its relay says.
        local: Node-local directory of the attempt, where its deadline stands.
        restarts: Directory of the run's restart points; None: there are none.
        call_max_s: Seconds after which a call hands back what it has not begun.
    """

    code: str
    run_id: str
    first: int
    count: int
    index: int
    cpus: float
    gpus: float
    scratch: str
    outputs: str
    parts: str
    mark: str
    output: str
    local: str
    restarts: str | None = None
    call_max_s: float = float("inf")


class StageWorker:
    """Runs calls one after another."""

    def __init__(self, setup: WorkerSetup) -> None:
        self._setup = setup
        self._chain: Chain | None = None
        self._broken: str | None = None

    def start(self) -> str | None:
        """Load the pipeline and set its stages up; return why that fails, if it does."""
        # Under some process trackers the user's signals for the job reach every process.  An
        # event loop runs beside the main thread; there the driver's choice is inherited.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        output.join(self._setup.output)
        os.environ["OMP_NUM_THREADS"] = str(max(1, int(self._setup.cpus)))
        faulthandler.enable(open(self._setup.mark + ".fault", "w"), all_threads=False)  # noqa: SIM115  # lives as long as the process
        logging.basicConfig(stream=sys.stderr, level=logging.INFO)
        try:
            self._chain = self._make_chain()
            self._chain.setup()
        except HpcResumeError as error:
            return str(error)
        children.record(self._setup.mark)
        # What Ray and the stages' modules hold stays; the collector need not look at it again.
        gc.collect()
        gc.freeze()
        return None

    def _make_chain(self) -> Chain:
        setup = self._setup
        pipeline = load_snapshot(Path(setup.code)).pipeline
        scratch = Path(setup.scratch)
        name = f"worker-{setup.first}-{setup.index}-{os.getpid()}"
        place = ChainPlace(
            run_id=setup.run_id,
            scratch=scratch,
            outputs=Path(setup.outputs),
            parts=setup.parts,
            worker=Worker(
                index=setup.index,
                cpus=setup.cpus,
                gpus=setup.gpus,
                scratch=scratch / name,
                attempt=Path(setup.local),
            ),
            seconds_left=self._seconds_left,
            mark=Mark(setup.mark),
            restarts=None if setup.restarts is None else Path(setup.restarts),
            writer=os.path.basename(setup.mark),
            call_max_s=setup.call_max_s,
        )
        stages = pipeline.stages[setup.first : setup.first + setup.count]
        return Chain(pipeline, first=setup.first, stages=stages, place=place)

    def _seconds_left(self) -> float | None:
        return seconds_left(self._setup.local)

    def run(self, inputs: Inputs, marked: bool) -> ChunkResult:  # noqa: FBT001  # a Ray call
        """Run a call; once broken, a worker runs nothing more, whatever is queued."""
        assert self._chain is not None
        if self._broken is not None:
            return ChunkResult(broken=self._broken)
        result = run_now(self._chain.run(inputs, marked=marked))
        self._broken = result.broken
        return result

    def stop(self) -> None:
        """Tear the stages down."""
        if self._chain is not None:
            self._chain.teardown()
        output.leave()


class AsyncStageWorker(StageWorker):
    """Runs calls side by side on an event loop."""

    async def run(self, inputs: Inputs, marked: bool) -> Any:  # type: ignore[override]  # noqa: FBT001
        """Run a call; once broken, a worker runs nothing more, whatever is queued."""
        assert self._chain is not None
        if self._broken is not None:
            return ChunkResult(broken=self._broken)
        result = await self._chain.run(inputs, marked=marked)
        self._broken = result.broken or self._broken
        return result
