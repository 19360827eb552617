"""A pool for code that has no event loop: its loop runs in a thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Self, TypeVar

from hpcresume.serving.policy import UpdateReport
from hpcresume.serving.pool import ServingPool
from hpcresume.serving.seats import PoolState, Served

ResultT = TypeVar("ResultT")


class BlockingPool:
    """A :class:`ServingPool` whose methods return when they are done; from any thread.

    Args:
        make: Makes the pool, in its own loop.
    """

    def __init__(self, make: Callable[[], ServingPool]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pool", daemon=True)
        self._thread.start()

        async def made() -> ServingPool:
            return make()

        self.pool = self.run(made())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, work: Coroutine[Any, Any, ResultT]) -> concurrent.futures.Future[ResultT]:
        """Begin to run a coroutine in the pool's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Run a coroutine in the pool's loop to its end."""
        return self.submit(work).result()

    def start(self) -> None:
        """As :meth:`ServingPool.start`."""
        self.run(self.pool.start())

    def update(self, version: int) -> UpdateReport:
        """As :meth:`ServingPool.update`."""
        return self.run(self.pool.update(version))

    def newest_version(self) -> int:
        """As :meth:`ServingPool.newest_version`."""
        return self.run(self.pool.newest_version())

    def call(
        self, method: str, *arguments: Any, wait_s: float | None = None, **named: Any
    ) -> Served:
        """As :meth:`ServingPool.call`."""
        return self.run(self.pool.call(method, *arguments, wait_s=wait_s, **named))

    def state(self) -> PoolState:
        """As :meth:`ServingPool.state`."""
        return self.pool.state()

    def close(self) -> None:
        """As :meth:`ServingPool.close`; the loop ends with it."""
        if not self._loop.is_closed():
            self.run(self.pool.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
