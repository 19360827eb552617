"""What runs around a user's worker or exporter, in its process.

The worker's gate is here: it is closed first and opened last, and only over a state whose
digest this process has verified.  A host knows its newest session, and refuses calls of an
older one: what comes late changes nothing.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcresume.serving.errors import Retryable, ServingError, StateError
from hpcresume.serving.state import Manifest, Package, Part, describe
from hpcresume.serving.transport import StateTransport
from hpcresume.serving.worker import PauseMode, StateExporter, StatefulWorker


@dataclass(frozen=True, slots=True)
class Held:
    """A verified state.

    Attributes:
        version: Its version.
        digest: Its digest.
    """

    version: int
    digest: str


@dataclass(frozen=True, slots=True)
class Reply:
    """A worker's answer to a request.

    Attributes:
        version: Version that it held when the request ended.
        value: What the worker's method returned.
        began: Version that it held when the request began.
    """

    version: int
    value: Any
    began: int


@dataclass(frozen=True, slots=True)
class WorkerHealth:
    """How a worker stands, by its own account.

    Attributes:
        pid: Its process.
        held: The verified state that it serves or would serve; None: none, or touched.
        is_open: Whether it takes requests.
        in_flight: Requests that it is working on.
        in_place: Whether its class overwrites its state.
        concurrency: Requests that it answers at once.
    """

    pid: int
    held: Held | None
    is_open: bool
    in_flight: int
    in_place: bool
    concurrency: int


class _Session:
    """Refuses what belongs to an older session than the newest that was seen."""

    def __init__(self) -> None:
        self._newest = 0

    def enter(self, session: int) -> None:
        if session < self._newest:
            raise ServingError(f"session {session} is over, {self._newest} has begun")
        self._newest = session


class WorkerHost:
    """A user's worker and its gate."""

    def __init__(self) -> None:
        self.worker: StatefulWorker
        self._transport: StateTransport
        self._gate = threading.Condition()
        self._open = self._aborting = False
        self._in_flight = 0
        self._held: Held | None = None
        self._staged: Held | None = None
        self._prepared: int | None = None
        self._session = _Session()

    def make(
        self,
        kind: Callable[..., StatefulWorker],
        arguments: tuple[Sequence[Any], Mapping[str, Any]],
        transport: StateTransport,
        environ: Mapping[str, str],
    ) -> None:
        """Make the user's worker; the first thing that is called.

        Args:
            kind: The user's class.
            arguments: Positional and keyword arguments for it.
            transport: How states arrive.
            environ: Variables to set before.
        """
        os.environ.update(environ)
        self._transport = transport
        self.worker = kind(*arguments[0], **arguments[1])

    # Any time.

    def health(self) -> WorkerHealth:
        """Say how the worker stands."""
        with self._gate:
            return WorkerHealth(
                os.getpid(),
                self._held,
                self._open,
                self._in_flight,
                self.worker.in_place,
                self.worker.concurrency,
            )

    def request(self, method: str, arguments: Sequence[Any], named: Mapping[str, Any]) -> Reply:
        """Answer a request.

        Raises:
            Retryable: The gate is closed, or the request was aborted.
        """
        with self._gate:
            if not self._open or self._held is None:
                held = None if self._held is None else self._held.version
                raise Retryable(held, "the worker is paused", begun=False)
            version = self._held.version
            self._in_flight += 1
        cause: Exception | None = None
        try:
            try:
                value = getattr(self.worker, method)(*arguments, **named)
                if inspect.iscoroutine(value):
                    value = asyncio.run_coroutine_threadsafe(value, self._loop).result()
            except Exception as error:
                cause = error
            if self._aborting:
                raise Retryable(version, "the request was aborted for an update") from cause
            if cause is not None:
                raise cause
            return self._reply(version, value)
        finally:
            with self._gate:
                self._in_flight -= 1
                self._gate.notify_all()

    def _reply(self, began: int, value: Any) -> Reply:
        with self._gate:
            held = self._held
        if held is None:
            raise Retryable(began, "the worker did not keep still while it was updated")
        return Reply(held.version, value, began)

    @functools.cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """The loop that a worker's coroutines share."""
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="requests", daemon=True).start()
        return loop

    # The phases of an update, one at a time.

    def pause(self, session: int, mode: PauseMode) -> None:
        """Close the gate, wait for the requests in flight unless they are kept, stop the worker."""
        self._session.enter(session)
        with self._gate:
            self._open, self._aborting = False, mode == "abort"
        if mode == "abort":
            self.worker.abort()
        if mode != "keep":
            with self._gate:
                self._gate.wait_for(lambda: self._in_flight == 0)
                self._aborting = False
        self.worker.pause(mode)

    def release(self, session: int) -> None:
        """Free the worker's caches."""
        self._session.enter(session)
        self.worker.release()

    def prepare(self, session: int, version: int) -> None:
        """Make the worker ready to receive a version."""
        self._session.enter(session)
        self._prepared = version
        self.worker.prepare(version)

    def transfer(self, session: int, manifest: Manifest, chunks: Sequence[Any]) -> str:
        """Receive a state; return its digest as it arrived.

        Raises:
            StateError: It is not what was sent.
        """
        self._session.enter(session)
        arrived: list[list[Any]] = []
        parts = self._arriving(manifest, chunks, arrived)
        held = Held(manifest.version, manifest.digest)
        if self.worker.in_place:
            with self._gate:
                if self._open:
                    raise ServingError("a worker that serves cannot be overwritten")
                self._held = None
            self.worker.apply(manifest.version, parts)
        else:
            self._staged = None
            self.worker.stage(manifest.version, parts)
        for _ in parts:  # whatever the worker did not look at is verified, too
            pass
        if describe(manifest.version, arrived).digest != manifest.digest:
            raise StateError(f"version {manifest.version} has another digest than was announced")
        self._staged = held
        return held.digest

    def _arriving(
        self, manifest: Manifest, chunks: Sequence[Any], arrived: list[list[Any]]
    ) -> Iterator[Part]:
        for number, chunk in enumerate(chunks):
            arrived.append(list(manifest.chunks[number]))
            yield from self._transport.unpack(manifest, number, self.fetch(chunk))

    def fetch(self, chunk: Any) -> Any:
        """Return a chunk that was named in a call."""
        return chunk

    def commit(self, session: int, version: int) -> Held:
        """Serve the staged state from now on; return what is held, also when called again."""
        self._session.enter(session)
        if self._held is not None and self._held.version == version and self._staged is None:
            return self._held
        staged = self._staged
        if staged is None or staged.version != version:
            raise StateError(f"version {version} is not staged")
        with self._gate:
            if self._open:
                raise ServingError("a worker that serves cannot commit")
            # Until the swap has returned nobody knows what the worker holds.
            self._held = None
        if not self.worker.in_place:
            self.worker.commit(version)
        self.worker.version = version
        self._held, self._staged = staged, None
        return staged

    def finalize(self, session: int) -> None:
        """Give back what the session took; harmless twice, or before anything was taken."""
        self._session.enter(session)
        self._staged = None
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            self.worker.finalize(prepared)

    def restore(self, session: int) -> None:
        """Make the worker's caches again."""
        self._session.enter(session)
        self.worker.restore()

    def resume(self, session: int, held: Held) -> None:
        """Start the worker and open the gate, if it holds what it is thought to hold.

        Raises:
            StateError: It does not.
        """
        self._session.enter(session)
        if self._held != held:
            raise StateError(f"it holds {self._held}, not {held}")
        self.worker.resume()
        with self._gate:
            self._open = True

    def shut(self) -> None:
        """Close the gate for good, without waiting for anything."""
        with self._gate:
            self._open, self._held = False, None
            self._session.enter(1 << 62)


class ExporterHost:
    """A user's exporter, and the state that it is sending."""

    def __init__(self) -> None:
        self.exporter: StateExporter
        self._transport: StateTransport
        self._session = _Session()
        self._prepared: int | None = None
        self._package: Package | None = None

    def make(
        self,
        kind: Callable[..., StateExporter],
        arguments: tuple[Sequence[Any], Mapping[str, Any]],
        transport: StateTransport,
    ) -> None:
        """Make the user's exporter; the first thing that is called.

        Args:
            kind: The user's class.
            arguments: Positional and keyword arguments for it.
            transport: How states leave.
        """
        self._transport = transport
        self.exporter = kind(*arguments[0], **arguments[1])

    def newest_version(self) -> int:
        """Return the number of the newest version."""
        return self.exporter.newest_version()

    def prepare(self, session: int, version: int) -> None:
        """Make the exporter ready to send a version."""
        self._session.enter(session)
        self._prepared = version
        self.exporter.prepare(version)

    def build(self, session: int, version: int, name: str) -> Manifest:
        """Take a version's state apart; return what it consists of."""
        self._session.enter(session)
        self._package = self._transport.pack(version, self.exporter.export(version), name)
        return self._package.manifest

    def chunk(self, session: int, number: int) -> Any:
        """Return what workers are to be given for a chunk."""
        self._session.enter(session)
        if self._package is None:
            raise StateError(f"session {session} holds no state")
        return self._transport.chunk(self._package, number)

    def finalize(self, session: int) -> None:
        """Give back what the session took; harmless twice, or before anything was taken."""
        self._session.enter(session)
        self._package = None
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            self.exporter.finalize(prepared)
