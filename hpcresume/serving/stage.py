"""A stage whose items are served from a pool within the array task's own Ray head.

The stage's one worker makes the pool in its set-up and ends it in its teardown; what the
pool has started ends with the worker's process at the latest, and so with the attempt.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

from hpcresume.errors import PipelineError, PoolUnrecoverable, describe
from hpcresume.pipeline.context import Worker
from hpcresume.pipeline.sentinels import Many
from hpcresume.pipeline.stage import Stage
from hpcresume.serving.blocking import BlockingPool
from hpcresume.serving.checks import check_pool
from hpcresume.serving.errors import Retryable, UpdateInProgress, UpdatesEndedError
from hpcresume.serving.members import Arguments, LocalPlaces, Places, RayPlaces
from hpcresume.serving.policy import UpdatePolicy, UpdateReport
from hpcresume.serving.pool import ServingPool
from hpcresume.serving.transport import StateTransport
from hpcresume.serving.worker import StateExporter, StatefulWorker
from hpcresume.updates import Journal, journal_path

log = logging.getLogger(__name__)

_TRIES = 3
_LOOK_S = 0.25


class ServingStage(Stage):
    """Serves items from a pool of stateful workers, whose state may be replaced meanwhile.

    An item is answered by one version, whatever happens: one that an update or a death
    interrupts is asked again.  Rows that are dicts name the version that made them.

    Args:
        worker: A :class:`~hpcresume.serving.StatefulWorker` class.
        size: Number of workers in the pool of one array task.
        method: The worker's method that answers an item.
        exporter: A :class:`~hpcresume.serving.StateExporter` class; None: the workers get
            each version's state by themselves.
        refresh_every_s: Ask the exporter this often for its newest version, and serve it;
            None: only :meth:`refresh` replaces the state.
        version_field: Where rows that are dicts name their version; None: nowhere.
        first_version: Version to begin with, where no exporter says which is newest; a stage
            that is started again within an attempt goes on from the version it had reached.
        transport: How states travel.
        policy: Deadlines, and what an update may do.
        request_timeout_s: A worker that has not answered an item after so long is killed and
            replaced, and the item is asked again; None: no limit.
        worker_args: Arguments for the worker's class: positional ones and keywords.
        exporter_args: The same for the exporter's.
        name: The stage's name.
        cpus: Cores that the pool holds; one for each worker unless given.
        gpus: GPUs that the pool holds, shared out evenly among its workers.
        max_concurrency: Items in flight; twice what the workers answer at once unless given.

    Raises:
        PipelineError: An argument cannot be right.
        ConfigError: The same, of those that the pool is made with.
    """

    workers = 1

    def __init__(
        self,
        worker: type[StatefulWorker],
        size: int,
        *,
        method: str = "process",
        exporter: type[StateExporter] | None = None,
        refresh_every_s: float | None = None,
        version_field: str | None = "version",
        first_version: int = 1,
        transport: str | StateTransport = "object",
        policy: UpdatePolicy | None = None,
        request_timeout_s: float | None = None,
        worker_args: Arguments = ((), {}),
        exporter_args: Arguments = ((), {}),
        name: str | None = None,
        cpus: float | None = None,
        gpus: float = 0,
        max_concurrency: int | None = None,
    ) -> None:
        if not callable(getattr(worker, method, None)):
            raise PipelineError(
                f"{worker!r} has no method {method!r} to answer items with. "
                "Define it, or name another one: ServingStage(..., method=...)."
            )
        if refresh_every_s is not None and (exporter is None or refresh_every_s <= 0):
            raise PipelineError(
                f"refresh_every_s={refresh_every_s!r} needs an exporter that is asked, and more "
                "than 0 seconds."
            )
        if policy is not None and policy.pause == "keep":
            raise PipelineError(
                "pause='keep' lets one answer be made by two versions, and a stage's rows name "
                "one. Set pause='drain' or 'abort', or use a ServingPool, whose answers say both."
            )
        check_pool(worker, size, exporter, policy or UpdatePolicy(), request_timeout_s)
        self.name = name or type(self).name
        self.cpus = size if cpus is None else cpus
        self.gpus = gpus
        self.max_concurrency = max_concurrency or 2 * size * max(1, worker.concurrency)
        self._kind, self._size, self._method = worker, size, method
        self._exporter, self._refresh_every_s = exporter, refresh_every_s
        self._version_field, self._first_version = version_field, first_version
        self._transport, self._policy = transport, policy
        self._request_timeout_s = request_timeout_s
        self._worker_args, self._exporter_args = worker_args, exporter_args
        self._front: BlockingPool | None = None

    def setup(self, worker: Worker) -> None:
        """Make the pool and bring it to its first version."""
        _pickle_by_value(self._kind, self._exporter)
        journal = self._journal(worker)
        reached = self._first_version
        if journal is not None and (last := journal.last()) is not None:
            log.warning("stage %r is started again after its %s", self.name, last)
            reached = max(reached, last.served or 0)
        self._front = front = BlockingPool(lambda: self._make_pool(journal))
        front.start()
        front.update(reached if self._exporter is None else front.newest_version())
        if self._refresh_every_s is not None:
            front.submit(self._keep_fresh(self._refresh_every_s))
        front.submit(self._heed_stop(worker))

    def _journal(self, worker: Worker) -> Journal | None:
        if worker.attempt is None:
            return None
        return Journal(journal_path(str(worker.attempt), self.name))

    def _make_pool(self, journal: Journal | None) -> ServingPool:
        return ServingPool(
            self._kind,
            self._size,
            exporter=self._exporter,
            transport=self._transport,
            policy=self._policy,
            request_timeout_s=self._request_timeout_s,
            worker_args=self._worker_args,
            exporter_args=self._exporter_args,
            places=self._places(),
            journal=journal,
        )

    def _places(self) -> Places:
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return LocalPlaces()
        return RayPlaces(environ=self._devices)

    def _devices(self, index: int) -> Mapping[str, str]:
        """Return which of the stage's GPUs a worker sees."""
        mine = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
        if not self.gpus or not mine:
            return {}
        share = max(1, len(mine) // self._size)
        start = index * share % len(mine)
        return {"CUDA_VISIBLE_DEVICES": ",".join(mine[start : start + share])}

    def teardown(self) -> None:
        """End the pool and what it started."""
        if self._front is not None:
            self._front.close()

    @property
    def version(self) -> int | None:
        """Version that is served now."""
        return None if self._front is None else self._front.pool.version

    async def process(self, item: Any) -> Any:
        """Answer an item; override to do more around :meth:`serve`."""
        return await self.serve(item)

    async def serve(self, item: Any) -> Any:
        """Have a worker answer an item, again where an update or a death interrupted it.

        Raises:
            Retryable: Workers died of it, or were interrupted, three times.
            PoolUnrecoverable: The pool serves nothing any more; ends the attempt.
            Exception: What the worker's method raised.
        """
        assert self._front is not None
        for left in reversed(range(_TRIES)):
            work = self._front.pool.call(self._method, item)
            try:
                served = await asyncio.wrap_future(self._front.submit(work))
            except Retryable as error:
                if not left:
                    raise
                log.info("an item is asked again: %s", error)
            else:
                return self._with_version(served.value, served.version)
        raise AssertionError("the last try returns or raises")

    def _with_version(self, value: Any, version: int) -> Any:
        if isinstance(value, Many):
            return Many(self._with_version(one, version) for one in value)
        if isinstance(value, dict) and self._version_field is not None:
            return {**value, self._version_field: version}
        return value

    async def refresh(self, version: int) -> UpdateReport:
        """Serve another version; what it raises is that of :meth:`ServingPool.update`.

        Where the attempt is stopping it does not return: the item that asked stays in flight,
        so that nobody is charged for it, and belongs to the next attempt.
        """
        assert self._front is not None
        pool = self._front.pool
        try:
            return await asyncio.wrap_future(self._front.submit(pool.update(version)))
        except UpdatesEndedError:
            await asyncio.wrap_future(self._front.submit(pool.ended(math.inf)))
            raise

    async def _heed_stop(self, worker: Worker) -> None:
        """End updates when the attempt is to end, so that what is parked is answered in time."""
        assert self._front is not None
        pool = self._front.pool
        while not await pool.ended(_LOOK_S):
            if worker.is_stopping:
                pool.end_updates("the attempt is stopping")
                return

    async def _keep_fresh(self, every_s: float) -> None:
        """Serve the exporter's newest version until the pool ends; in the pool's loop."""
        assert self._front is not None
        pool = self._front.pool
        while not await pool.ended(every_s):
            try:
                newest = await pool.newest_version()
                if pool.version is None or newest > pool.version:
                    await pool.update(newest)
            except UpdatesEndedError:
                return
            except (PoolUnrecoverable, UpdateInProgress):
                continue
            except Exception as error:
                log.warning("version %s is served on: %s", pool.version, describe(error))


def _pickle_by_value(*kinds: type | None) -> None:
    """Send classes of the pipeline's own file as they are: a worker cannot import its copy."""
    ray = sys.modules.get("ray")
    for kind in kinds:
        module = None if kind is None else sys.modules.get(kind.__module__)
        loader = type(getattr(module, "__loader__", None))
        if ray is not None and loader.__module__ == "hpcresume.pipeline.load":
            ray.cloudpickle.register_pickle_by_value(module)
