"""Where a worker or an exporter runs: a Ray actor, or, under a debugger, this process.

A member is called from the pool's event loop, tells when it has died, and can be killed; once
:meth:`Member.kill` has returned nothing of it takes a request or commits any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from hpcresume.serving.host import ExporterHost, WorkerHost

Arguments = tuple[Sequence[Any], Mapping[str, Any]]


class MemberDiedError(Exception):
    """The process that was to answer is gone."""


class Member(Protocol):
    """One worker or exporter.

    Attributes:
        died: Done when it is dead.
    """

    died: asyncio.Future[None]

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of its host.

        Raises:
            MemberDiedError: It died before it answered.
        """

    async def chunks(self, session: int, count: int) -> list[Any]:
        """Have an exporter hand over its chunks; return what stands for them in calls."""

    async def kill(self, timeout_s: float) -> bool:
        """End it at once; return whether it is known to be dead."""

    async def end(self, timeout_s: float) -> None:
        """End it when it is not needed any more."""


class Places(Protocol):
    """Makes members; what they run is made by calling ``make`` of their host."""

    def worker(self, concurrency: int) -> Member:
        """Begin to make a worker that answers so many requests at once."""

    def exporter(self) -> Member:
        """Begin to make an exporter."""

    def environ(self, index: int) -> Mapping[str, str]:
        """Return the variables to set in a worker, given its number."""


class LocalMember:
    """A member in this process; its host's methods run in threads."""

    def __init__(self, host: WorkerHost | ExporterHost) -> None:
        self.died = asyncio.get_running_loop().create_future()
        self.host = host

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method in a thread."""
        answer = self._in_thread(getattr(self.host, method), *arguments)
        await asyncio.wait({answer, self.died}, return_when=asyncio.FIRST_COMPLETED)
        if self.died.done():
            raise MemberDiedError(f"it was killed during {method}()")
        return answer.result()

    def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        # Not the loop's executor: its few threads may all hang, and the process waits for them.
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def run() -> None:
            result, error = None, None
            try:
                result = function(*arguments)
            except Exception as raised:
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop may be closed by then
                loop.call_soon_threadsafe(settle, result, error)

        threading.Thread(target=run, name="member", daemon=True).start()
        # What comes after a kill has nobody to tell.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        return future

    async def chunks(self, session: int, count: int) -> list[Any]:
        """Return the chunks themselves."""
        return [await self.call("chunk", session, number) for number in range(count)]

    async def kill(self, timeout_s: float) -> bool:
        """Shut its gate; a thread that hangs is left behind, and can do nothing any more."""
        del timeout_s
        if not self.died.done():
            self.died.set_result(None)
        if isinstance(self.host, WorkerHost):
            self.host.shut()
        return True

    async def end(self, timeout_s: float) -> None:
        """Do the same."""
        await self.kill(timeout_s)


class LocalPlaces:
    """Members in this process, for ``--engine inline`` and for tests of the pool itself."""

    def worker(self, concurrency: int) -> Member:
        """Make a worker's host."""
        del concurrency
        return LocalMember(WorkerHost())

    def exporter(self) -> Member:
        """Make an exporter's host."""
        return LocalMember(ExporterHost())

    def environ(self, index: int) -> Mapping[str, str]:
        """Return nothing: the variables are everybody's."""
        del index
        return {}


class RayMember:
    """A member that is an actor of this process's Ray head."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.died = asyncio.get_running_loop().create_future()
        self._pid: int | None = None
        handle.look_in.remote(sys.path)
        self._watching = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        import ray.exceptions

        from hpcresume.serving.actors import call

        try:
            host, pid = await call(self._handle, "where")
            self._pid = pid if host == socket.gethostname() else None
            await call(self._handle, "watch")
        except (ray.exceptions.RayError, asyncio.CancelledError):
            pass
        if not self.died.done():
            self.died.set_result(None)

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the actor; what it raises is raised as it was there."""
        import ray.exceptions

        from hpcresume.serving.actors import call

        try:
            return await call(self._handle, method, *arguments)
        # First: what the method raised may itself tell of the death of some other actor.
        except ray.exceptions.RayTaskError as error:
            raise _original(error) from None
        except ray.exceptions.RayActorError as error:
            raise MemberDiedError(f"its process died during {method}()") from error

    async def chunks(self, session: int, count: int) -> list[Any]:
        """Return references to the chunks; they belong to this process and outlive the actor."""
        references = [self._handle.chunk.remote(session, number) for number in range(count)]
        for reference in references:
            await _settled(reference)
        return references

    async def kill(self, timeout_s: float) -> bool:
        """Kill the actor's process and wait until Ray has seen it die."""
        if self._pid is not None and not self.died.done():
            # Ray's own kill takes a moment to get there.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        await self._end_by_ray(timeout_s)
        return self.died.done()

    async def end(self, timeout_s: float) -> None:
        """Have Ray end the actor, which it does not report as a crash then."""
        await self._end_by_ray(timeout_s)
        if not self.died.done():
            await self.kill(timeout_s)

    async def _end_by_ray(self, timeout_s: float) -> None:
        import ray

        with contextlib.suppress(Exception):  # Ray raises what it likes for a dead actor
            ray.kill(self._handle, no_restart=True)
        await asyncio.wait({self.died}, timeout=timeout_s)


async def _settled(reference: Any) -> None:
    import ray.exceptions

    try:
        await reference
    except ray.exceptions.RayTaskError as error:
        raise _original(error) from None
    except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
        raise MemberDiedError("its process died during chunk()") from error


def _original(error: Any) -> BaseException:
    """Return the exception that a method raised, with its remote traceback as a note."""
    cause = error.cause
    if not isinstance(cause, BaseException):
        return RuntimeError(str(error))
    cause.add_note(str(error))
    return cause


class RayPlaces:
    """Members as actors of this process's head; they end with the process that made them.

    Args:
        options: Options of every worker's actor, over the pool's own.
        environ: Returns variables for a worker, given its number.
    """

    def __init__(
        self,
        options: Mapping[str, Any] | None = None,
        environ: Callable[[int], Mapping[str, str]] = lambda _: {},
    ) -> None:
        self._options = {"num_cpus": 0, "max_restarts": 0, **(options or {})}
        self.environ = environ

    def worker(self, concurrency: int) -> Member:
        """Begin to make an actor."""
        from hpcresume.serving.actors import worker_actor

        return RayMember(worker_actor(concurrency).options(**self._options).remote())

    def exporter(self) -> Member:
        """Begin to make an actor."""
        from hpcresume.serving.actors import exporter_actor

        return RayMember(exporter_actor().options(num_cpus=0, max_restarts=0).remote())
