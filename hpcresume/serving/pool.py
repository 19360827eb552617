"""A pool of workers that serve one state, and how that state is replaced.

Contract: when :meth:`ServingPool.update` returns or raises, every worker that takes requests
holds one and the same version, old or new, whose digest it has verified; or the pool is
unrecoverable, nothing of it takes requests, and every caller is told so.  Every phase has a
deadline.  A worker that is new, or was started again, takes no request before a push.

The workers' processes belong to the pool's own: where that ends they end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

from hpcresume.errors import PoolUnrecoverable, describe
from hpcresume.serving.checks import check_pool
from hpcresume.serving.conclusion import conclude, to_its_end
from hpcresume.serving.errors import (
    Retryable,
    ServingError,
    UpdateInProgress,
    UpdatesEndedError,
)
from hpcresume.serving.execution import Execution, Payload
from hpcresume.serving.exporting import Exporting
from hpcresume.serving.host import WorkerHealth
from hpcresume.serving.members import Arguments, Member, Places, RayPlaces
from hpcresume.serving.policy import Outcome, Phase, UpdatePolicy, UpdateReport, WorkerState
from hpcresume.serving.requests import Lease, Requests
from hpcresume.serving.seats import PoolState, Seat, Served, Waiters
from hpcresume.serving.transport import StateTransport, get_transport
from hpcresume.serving.update import EXPORTER, Step, Update
from hpcresume.serving.worker import StateExporter, StatefulWorker
from hpcresume.updates import Journal

log = logging.getLogger(__name__)

_CLOSE_S = 2.0
"""Whoever ends a stage waits a few seconds for its teardown, the clean-up after this included."""


class ServingPool:
    """Workers of one class, each with the same state; used from one event loop.

    Args:
        worker: A :class:`StatefulWorker` class.
        n: Number of workers.
        exporter: A :class:`StateExporter` class, made in a process of its own; None: the
            workers' hooks get each version's state by themselves, under the same contract.
        transport: ``object``, ``file``, ``torch``, ``module:name``, or a transport.
        policy: Deadlines, and what an update may do.
        worker_args: Arguments for the worker's class: positional ones and keywords.
        exporter_args: The same for the exporter's.
        request_timeout_s: A worker that has not answered a request after so long is killed and
            replaced, and its requests are retryable; None: only an update finds it.
        places: Where members run; as actors of this process's Ray head unless given.
        journal: Where every step of an update is noted before it is taken.

    Raises:
        ConfigError: An argument cannot be right.
    """

    def __init__(
        self,
        worker: type[StatefulWorker],
        n: int,
        *,
        exporter: type[StateExporter] | None = None,
        transport: str | StateTransport = "object",
        policy: UpdatePolicy | None = None,
        worker_args: Arguments = ((), {}),
        exporter_args: Arguments = ((), {}),
        request_timeout_s: float | None = None,
        places: Places | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.policy = policy or UpdatePolicy()
        check_pool(worker, n, exporter, self.policy, request_timeout_s)
        self._kind = worker
        self._transport = get_transport(transport)
        self._worker_args = worker_args
        self._places, self._journal = places or RayPlaces(), journal
        self._seats = {f"worker-{i}": Seat(f"worker-{i}", i) for i in range(n)}
        self._exporting = Exporting(exporter, exporter_args, self._transport, self._places)
        self._payload: Payload | None = None
        self._session = asyncio.Lock()
        self._updating: Execution | None = None
        self._update_waits = False
        self._unrecoverable: PoolUnrecoverable | None = None
        self._closed = False
        self._no_updates = ""
        self._phase: Phase | None = None
        self._waiters = Waiters()
        self._requests = Requests(
            self._seats.values(),
            self._waiters,
            concurrency=worker.concurrency,
            timeout_s=request_timeout_s,
            fence_s=self.policy.fence_s,
            check_usable=self._check_usable,
            version=lambda: self.version,
        )

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def version(self) -> int | None:
        """Version that is served, None before the first."""
        return None if self._payload is None else self._payload.manifest.version

    def state(self) -> PoolState:
        """Return how the pool stands."""
        workers = {name: seat.shown for name, seat in self._seats.items()}
        reason = "" if self._unrecoverable is None else str(self._unrecoverable)
        return PoolState(None if reason else self.version, workers, self._phase, reason)

    async def health(self, timeout_s: float = 10) -> dict[str, WorkerHealth | None]:
        """Ask every worker how it stands; a request or a phase that hangs does not keep it.

        Args:
            timeout_s: How long to wait for an answer.

        Returns:
            The workers' answers by name; None: dead, or there was none in time.
        """
        answers = await asyncio.gather(*(seat.health(timeout_s) for seat in self._seats.values()))
        return dict(zip(self._seats, answers, strict=True))

    async def start(self) -> None:
        """Make all workers and the exporter; they take requests after the first update.

        Raises:
            Exception: What the making of one of them raised; all are ended then.
        """
        made = await asyncio.gather(
            *(self._fill(seat) for seat in self._seats.values()),
            self._exporting.member(self.policy),
            return_exceptions=True,
        )
        failed = [error for error in made if isinstance(error, BaseException)]
        if failed:
            await self.close()
            raise failed[0]

    # Requests.

    async def call(
        self, method: str, *arguments: Any, wait_s: float | None = None, **named: Any
    ) -> Served:
        """Have a worker answer a request.

        While no worker takes requests the call is parked; it is routed to one that serves.

        Args:
            method: Name of the worker's method.
            *arguments: Its arguments.
            wait_s: How long to wait for a worker; None: as long as it takes.
            **named: Its keyword arguments.

        Raises:
            Retryable: It was begun and has no answer (the worker died, or the request was
                aborted for an update), or no worker took it in time, or the pool is closed.
            PoolUnrecoverable: No worker ever will.
            Exception: What the worker's method raised.
        """
        return await self._requests.call(method, arguments, named, wait_s=wait_s)

    def lease(
        self, *, wait_s: float | None = None
    ) -> contextlib.AbstractAsyncContextManager[Lease]:
        """Hold a worker that serves, for several requests that one version has to answer.

        Raises:
            Retryable: No worker was free in time, or the pool is closed.
            PoolUnrecoverable: No worker ever will be.
        """
        return self._requests.lease(wait_s=wait_s)

    def _check_usable(self) -> None:
        if self._closed:
            raise Retryable(self.version, "the pool is closed", begun=False)
        if self._unrecoverable is not None:
            raise self._unrecoverable

    # Updates.

    async def newest_version(self) -> int:
        """Ask the exporter which version is newest.

        Raises:
            ServingError: There is no exporter, or it does not answer within ``prepare_s``.
        """
        return await self._exporting.newest_version(self.policy)

    async def update(self, version: int) -> UpdateReport:
        """Serve another version; see the module's contract.

        Args:
            version: Its number, above that which is served.

        Returns:
            The report; its outcome is ``committed``, maybe with fewer workers than before.

        Raises:
            UpdateInProgress: An update runs already; nothing happens.
            UpdatesEndedError: :meth:`end_updates` was called; the old version is served.
            ServingError: The version is not above that which is served; nothing happens.
            PoolUnrecoverable: No worker takes requests any more.
            Exception: What the update failed of, the same object that was raised, with the
                report as ``update_report``; the old version is served.  Or, if its outcome
                is ``committed``, what failed while service was restored: one exception or an
                ``ExceptionGroup``; the new version is served.
            CancelledError: The caller was cancelled; service is restored before it is raised.
        """
        self._check_may_update()
        if self._update_waits or self._updating is not None:
            raise UpdateInProgress(f"version {version}: another update is in progress")
        if self.version is not None and version <= self.version:
            raise ServingError(f"version {version} is not above {self.version}, which is served")
        self._update_waits = True
        try:
            async with self._session:
                await self._enough_running()
                self._check_may_update()
                exporter = await self._exporting.member(self.policy)
                execution = self._execution(version, exporter)
                self._updating = execution
                return await to_its_end(self._run(execution), execution)
        finally:
            self._update_waits, self._updating = False, None
            self._refill_dead()
            self._waiters.wake()

    def end_updates(self, reason: str) -> None:
        """Begin no more updates and wind up one that runs; requests are answered on."""
        self._no_updates = reason
        if self._updating is not None:
            self._updating.cancel(UpdatesEndedError(reason))
        self._waiters.wake()

    def _check_may_update(self) -> None:
        self._check_usable()
        if self._no_updates:
            raise UpdatesEndedError(self._no_updates)

    async def _enough_running(self) -> None:
        """Wait for replacements of dead workers, where too few others are there."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self.policy.start_s
        while len(self._running()) < self.policy.min_serving:
            self._check_may_update()
            if not await self._waiters.wait(max(0.0, end - loop.time())):
                raise ServingError(
                    f"only {len(self._running())} workers run after {self.policy.start_s:g} s"
                )

    @property
    def _overlaps(self) -> bool:
        if self.policy.overlap is not None:
            return self.policy.overlap
        return not (self._kind.in_place or self._frees_caches)

    @property
    def _frees_caches(self) -> bool:
        return self._kind.release is not StatefulWorker.release

    def _running(self) -> dict[str, Seat]:
        wanted = (WorkerState.SERVING, WorkerState.STALE)
        return {n: s for n, s in self._seats.items() if s.state in wanted and not s.is_dead}

    def _execution(self, version: int, exporter: Member | None) -> Execution:
        seats = self._running()
        update = Update(
            {name: seat.state for name, seat in seats.items()},
            old=self.version,
            new=version,
            policy=replace(self.policy, overlap=self._overlaps),
            in_place=self._kind.in_place,
            has_exporter=exporter is not None,
            has_old=self._payload is not None,
            frees_caches=self._frees_caches,
        )
        return self._make_execution(update, seats, exporter, old=self._payload)

    def _make_execution(
        self,
        update: Update,
        seats: Mapping[str, Seat],
        exporter: Member | None = None,
        *,
        old: Payload | None = None,
        new: Payload | None = None,
    ) -> Execution:
        members = {name: seat.member for name, seat in seats.items()}
        if exporter is not None:
            members[EXPORTER] = exporter
        resumed: set[str] = set()

        def follow(step: Step | None) -> None:
            for name, seat in seats.items():
                if name not in resumed or update.states[name] is WorkerState.DEAD:
                    seat.state = update.states[name]
            self._phase = None if step is None else step.phase
            if step is not None and step.phase is Phase.RESUME and not step.is_old:
                # From here on workers answer with it.
                self._payload = execution.new

        def resume(name: str) -> None:
            resumed.add(name)
            seats[name].state = WorkerState.SERVING
            self._waiters.wake()

        execution = Execution(
            update,
            {name: member for name, member in members.items() if member is not None},
            self.policy,
            old=old,
            new=new,
            on_step=follow,
            on_resumed=resume,
            journal=None if new is not None else self._journal,
        )
        return execution

    async def _run(self, execution: Execution) -> UpdateReport:
        """Run an update and draw the consequences."""
        before = self._payload
        try:
            report = await execution.run()
        except BaseException as error:
            # The loop is ending, or this is a bug: nobody knows how the workers stand.
            await self._abandon(
                f"the update to version {execution.update.new} ended in the middle: "
                f"{describe(error)}"
            )
            raise
        log.log(logging.INFO if report.primary is None else logging.WARNING, "%s", report)
        if report.outcome is Outcome.COMMITTED:
            self._forget(before)
        else:
            self._payload = before
            self._transport.forget(execution.occupied)
        if report.outcome is Outcome.UNRECOVERABLE:
            self._give_up(report)
        return conclude(report, self._unrecoverable)

    def _forget(self, payload: Payload | None) -> None:
        if payload is not None and payload.session:
            self._transport.forget(payload.session)

    def _give_up(self, report: UpdateReport) -> None:
        fenced = "; ".join(f"{name}: {reason}" for name, reason in report.fenced.items())
        why = f": {describe(report.primary)}" if report.primary is not None else ""
        self._unrecoverable = PoolUnrecoverable(
            f"the update to version {report.to_version} left too few workers that are known to "
            f"hold one version{why}. None of them serves any more ({fenced}). "
            "Start the task again; what is committed is kept.",
            from_version=report.from_version,
            to_version=report.to_version,
        )

    # Workers that died.

    async def _fill(self, seat: Seat) -> None:
        """Make a worker for a seat; it is stale at first."""
        made = (self._kind, self._worker_args, self._transport)
        member = await seat.fill(self._places, made, self.policy)
        member.died.add_done_callback(lambda _: self._note_death(seat, member))
        self._waiters.wake()

    def _note_death(self, seat: Seat, member: Member) -> None:
        if seat.member is not member or self._closed:
            return
        seat.state = WorkerState.DEAD
        log.warning("%s has died", seat.name)
        self._waiters.wake()
        if self._updating is None:
            self._refill_dead()

    def _refill_dead(self) -> None:
        """Replace the dead, and push to the stale, in the background."""
        for seat in self._seats.values():
            if seat.state is WorkerState.STALE or (
                seat.is_dead and seat.state is not WorkerState.STARTING
            ):
                self._spawn_refill(seat)

    def _spawn_refill(self, seat: Seat) -> None:
        is_refilling = seat.refilling is not None and not seat.refilling.done()
        if self._closed or self._unrecoverable is not None or is_refilling:
            return
        seat.refilling = asyncio.ensure_future(self._refill(seat))

    async def _refill(self, seat: Seat) -> None:
        while not (self._closed or self._unrecoverable) and not self._is_settled(seat):
            if seat.is_dead:
                seat.state = WorkerState.DEAD
                if not self.policy.replace_dead or seat.fruitless >= self.policy.replacements:
                    await self._lose(seat)
                    return
                seat.fruitless += 1
                try:
                    await self._fill(seat)
                except Exception as error:
                    log.warning("%s cannot be started again: %s", seat.name, describe(error))
                    continue
            await self._join(seat)

    def _is_settled(self, seat: Seat) -> bool:
        """Whether a seat's worker serves, or waits for the first update."""
        if seat.is_dead:
            return False
        return seat.state is not WorkerState.STALE or self._payload is None

    async def _join(self, seat: Seat) -> None:
        """Push the served version to a stale worker and let it take requests."""
        async with self._session:
            payload = self._payload
            if payload is None or seat.is_dead or seat.state is not WorkerState.STALE:
                return
            version = payload.manifest.version
            update = Update(
                {seat.name: WorkerState.STALE},
                old=None,
                new=version,
                policy=self.policy,
                in_place=self._kind.in_place,
                has_exporter=False,
            )
            report = await self._make_execution(update, {seat.name: seat}, new=payload).run()
            if report.outcome is Outcome.COMMITTED:
                log.info("%s serves version %s", seat.name, version)
            elif not seat.is_dead and seat.member is not None:
                log.warning("%s cannot be brought to version %s: %s", seat.name, version, report)
                await seat.member.kill(self.policy.fence_s)

    async def _lose(self, seat: Seat) -> None:
        """Give a seat up; the pool with it where too few are left."""
        log.error("%s is given up", seat.name)
        hopeful = [
            s
            for s in self._seats.values()
            if s is not seat and (not s.is_dead or s.fruitless < self.policy.replacements)
        ]
        usable = hopeful if self.policy.replace_dead else [s for s in hopeful if not s.is_dead]
        if len(usable) < self.policy.min_serving:
            await self._abandon(
                f"too few workers are left: {seat.name} died {seat.fruitless + 1} times without "
                "having answered a request"
            )
        self._waiters.wake()

    async def _abandon(self, why: str) -> None:
        """See to it that nobody serves any more."""
        self._unrecoverable = PoolUnrecoverable(
            f"{why}. Start the task again; what is committed is kept."
        )
        for seat in self._seats.values():
            seat.state = WorkerState.DEAD
            if seat.member is not None:
                await seat.member.kill(self.policy.fence_s)
        self._waiters.wake()

    async def ended(self, timeout_s: float) -> bool:
        """Wait until the pool is closed or unrecoverable; return whether it is."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while not (self._closed or self._unrecoverable) and (left := end - loop.time()) > 0:
            await self._waiters.wait(left)
        return self._closed or self._unrecoverable is not None

    async def close(self) -> None:
        """End the pool: an update in progress is wound up, and every request is answered."""
        if self._closed:
            return
        self._closed = True
        self._waiters.wake()
        if self._updating is not None:
            within_s = min(_CLOSE_S, self.policy.cancel_s)
            self._updating.cancel(UpdatesEndedError("the pool is closed"), within_s=within_s)
        tasks = [s.refilling for s in self._seats.values() if s.refilling is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with self._session:
            members = [s.member for s in self._seats.values() if s.member is not None]
            exporter = self._exporting.holder
            members += [exporter] if exporter is not None else []
            await asyncio.gather(*(member.end(self.policy.fence_s) for member in members))
            for seat in self._seats.values():
                seat.state = WorkerState.RETIRED
            self._forget(self._payload)
