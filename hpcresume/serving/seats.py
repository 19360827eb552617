"""A pool's places and how they stand: what is asked of them and who waits for them."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Any

from hpcresume.serving.host import WorkerHealth
from hpcresume.serving.members import Member, MemberDiedError, Places
from hpcresume.serving.policy import Phase, UpdatePolicy, WorkerState
from hpcresume.serving.worker import StatefulWorker


@dataclass(frozen=True, slots=True)
class Served:
    """The answer to a request.

    Attributes:
        version: Version of the state that made it; one, whatever happened meanwhile.
        value: What the worker's method returned.
        worker: Name of the worker.
        began: Version that it was begun with, another one only with ``pause="keep"``.
    """

    version: int
    value: Any
    worker: str
    began: int


@dataclass(frozen=True, slots=True)
class PoolState:
    """How a pool stands.

    Attributes:
        version: Version that is served, None where none is.
        workers: How each worker stands.
        phase: What an update that is in progress does, None where there is none.
        unrecoverable: Why it serves nothing any more; empty while it can.
    """

    version: int | None
    workers: dict[str, WorkerState]
    phase: Phase | None
    unrecoverable: str

    @property
    def serving(self) -> list[str]:
        """Names of the workers that take requests."""
        return [name for name, state in self.workers.items() if state is WorkerState.SERVING]


@dataclass(slots=True, eq=False)
class Seat:
    """A worker's place in the pool, which others take after it.

    Attributes:
        name: Its name, which is that of whoever holds it.
        index: Its number.
        member: Who holds it.
        state: How that one stands.
        in_flight: Requests that it was given and has not answered.
        turn: When it was last given one.
        fruitless: How often the place was filled again since it last answered one.
        refilling: Fills the place again, and brings a stale worker to the served version.
    """

    name: str
    index: int
    member: Member | None = None
    state: WorkerState = WorkerState.STARTING
    in_flight: int = 0
    turn: int = 0
    fruitless: int = 0
    refilling: asyncio.Task[None] | None = None

    @property
    def is_dead(self) -> bool:
        """Whether nobody holds the place."""
        return self.member is None or self.member.died.done()

    async def fill(
        self, places: Places, made: tuple[type[StatefulWorker], Any, Any], policy: UpdatePolicy
    ) -> Member:
        """Have somebody take the place, stale at first, and return who.

        Args:
            places: Where workers run.
            made: What the worker is made of: its class, the arguments, the transport.
            policy: How long that may take.

        Raises:
            Exception: What the making raised; the place is empty then.
        """
        self.state = WorkerState.STARTING
        self.member = member = places.worker(max(1, made[0].concurrency))
        try:
            async with asyncio.timeout(policy.start_s):
                await member.call("make", *made, places.environ(self.index))
        except BaseException:
            await member.kill(policy.fence_s)
            self.state = WorkerState.DEAD
            raise
        self.state = WorkerState.STALE
        return member

    async def health(self, timeout_s: float) -> WorkerHealth | None:
        """Ask who holds the place how it stands; None: nobody does, or says so in time."""
        if self.member is None or self.is_dead or self.state is WorkerState.STARTING:
            return None
        with contextlib.suppress(MemberDiedError, TimeoutError):
            async with asyncio.timeout(timeout_s):
                health: WorkerHealth = await self.member.call("health")
                return health
        return None

    @property
    def shown(self) -> WorkerState:
        """How it stands for others; the pool itself may not have looked yet."""
        has_died = self.member is not None and self.is_dead
        return (
            WorkerState.DEAD if has_died and self.state is not WorkerState.RETIRED else self.state
        )


@dataclass(slots=True)
class Waiters:
    """Callers that wait for the pool to change, woken in the order they came."""

    futures: dict[asyncio.Future[None], None] = field(default_factory=dict)

    async def wait(self, timeout_s: float | None) -> bool:
        """Wait for a change; return whether there was one in time."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.futures[future] = None
        try:
            await asyncio.wait({future}, timeout=timeout_s)
            return future.done()
        finally:
            del self.futures[future]

    def wake(self) -> None:
        """Tell everybody who waits of a change."""
        for future in self.futures:
            if not future.done():
                future.set_result(None)
