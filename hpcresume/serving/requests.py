"""How requests find a worker that serves, who waits for one, and what is asked again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcresume.serving.errors import Retryable
from hpcresume.serving.members import MemberDiedError
from hpcresume.serving.policy import WorkerState
from hpcresume.serving.seats import Seat, Served, Waiters

_REROUTE_S = 0.02


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker that is held for several requests of one caller.

    Attributes:
        worker: Its name.
        version: Version that it served when the lease began.
    """

    worker: str
    version: int
    _requests: Requests
    _seat: Seat

    async def call(self, method: str, *arguments: Any, **named: Any) -> Served:
        """Have this worker answer a request, with the lease's version or not at all.

        Raises:
            Retryable: The worker was paused for another version, or died; ask for a new lease.
        """
        served = await self._requests.ask(self._seat, method, arguments, named)
        if served.version != self.version:
            raise Retryable(served.version, "the worker serves another version by now")
        return served


class Requests:
    """The requests of a pool.

    Args:
        seats: The pool's places.
        waiters: Woken whenever one of them may have become free.
        concurrency: Requests that one worker answers at once.
        timeout_s: Time after which a worker that has not answered is killed, None: none.
        fence_s: How long its death is waited for.
        check_usable: Raises where no worker ever will answer.
        version: Returns the version that is served.
    """

    def __init__(
        self,
        seats: Iterable[Seat],
        waiters: Waiters,
        *,
        concurrency: int,
        timeout_s: float | None,
        fence_s: float,
        check_usable: Callable[[], None],
        version: Callable[[], int | None],
    ) -> None:
        self._seats, self._waiters, self._concurrency = list(seats), waiters, concurrency
        self._timeout_s, self._fence_s = timeout_s, fence_s
        self._check_usable, self._version = check_usable, version
        self._turn = 0

    async def call(
        self,
        method: str,
        arguments: Sequence[Any],
        named: Mapping[str, Any],
        *,
        wait_s: float | None,
    ) -> Served:
        """Have a worker answer a request; see :meth:`ServingPool.call`."""
        while True:
            seat = await self._free_seat(wait_s)
            try:
                return await self.ask(seat, method, arguments, named)
            except Retryable as error:
                if error.begun:
                    raise
                # The worker was paused while the request was on its way.
                await self._waiters.wait(_REROUTE_S)

    @contextlib.asynccontextmanager
    async def lease(self, *, wait_s: float | None) -> AsyncGenerator[Lease, None]:
        """Hold a worker that serves; see :meth:`ServingPool.lease`."""
        seat = await self._free_seat(wait_s)
        version = self._version()
        assert version is not None
        seat.in_flight += 1
        try:
            yield Lease(seat.name, version, self, seat)
        finally:
            seat.in_flight -= 1
            self._waiters.wake()

    async def ask(
        self, seat: Seat, method: str, arguments: Sequence[Any], named: Mapping[str, Any]
    ) -> Served:
        """Have the worker in a place answer a request.

        Raises:
            Retryable: It is paused, or died, or the request was aborted.
            Exception: What the worker's method raised.
        """
        member, held = seat.member, self._version()
        assert member is not None
        seat.in_flight += 1
        limit = asyncio.timeout(self._timeout_s)
        try:
            async with limit:
                reply = await member.call("request", method, arguments, named)
        except MemberDiedError as error:
            raise Retryable(held, f"{seat.name} died while it answered") from error
        except TimeoutError as error:
            if not limit.expired():
                raise  # the user's method raised it
            await member.kill(self._fence_s)
            reason = f"{seat.name} did not answer within {self._timeout_s:g} s and was killed"
            raise Retryable(held, reason) from error
        finally:
            seat.in_flight -= 1
            self._waiters.wake()
        seat.fruitless = 0
        return Served(reply.version, reply.value, seat.name, reply.began)

    async def _free_seat(self, wait_s: float | None) -> Seat:
        loop = asyncio.get_running_loop()
        end = None if wait_s is None else loop.time() + wait_s
        while True:
            self._check_usable()
            room = [
                seat
                for seat in self._seats
                if seat.state is WorkerState.SERVING
                and not seat.is_dead
                and seat.in_flight < self._concurrency
            ]
            if room:
                seat = min(room, key=lambda seat: (seat.in_flight, seat.turn))
                self._turn += 1
                seat.turn = self._turn
                return seat
            left = None if end is None else end - loop.time()
            if (left is not None and left <= 0) or not await self._waiters.wait(left):
                raise Retryable(
                    self._version(), f"no worker was free within {wait_s:g} s", begun=False
                )
