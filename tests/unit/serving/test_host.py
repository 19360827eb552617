"""What runs around a worker: its gate, its sessions, what it refuses."""

from __future__ import annotations

import os
import threading

import pytest

from hpcresume.serving import Retryable, ServingError, StateError, StateExporter, StatefulWorker
from hpcresume.serving.host import ExporterHost, Held, Reply, WorkerHost
from hpcresume.serving.transport import ObjectTransport

TRANSPORT = ObjectTransport()


class Echo(StatefulWorker):
    """Answers with its state, and counts its hooks."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def text(self) -> bytes:
        return bytes(self.state["text"])

    async def later(self) -> bytes:
        return bytes(self.state["text"])

    def prepare(self, version: int) -> None:
        self.calls.append(f"prepare {version}")

    def finalize(self, version: int) -> None:
        super().finalize(version)
        self.calls.append(f"finalize {version}")


def make(kind: type[StatefulWorker] = Echo) -> WorkerHost:
    host = WorkerHost()
    host.make(kind, ((), {}), TRANSPORT, {})
    return host


def push(host: WorkerHost, version: int, session: int, text: bytes = b"hello") -> Held:
    """Push a state and commit it; return what is held."""
    package = TRANSPORT.pack(version, {"text": text}, "s")
    digest = host.transfer(session, package.manifest, package.chunks)
    assert package.manifest.digest == digest
    return host.commit(session, version)


def test_a_gate_opens_over_a_verified_state_only() -> None:
    """Without a push, or over another state than it is told, a worker takes no request."""
    host = make()
    with pytest.raises(StateError):
        host.resume(1, Held(1, "0" * 64))
    with pytest.raises(Retryable):
        host.request("text", (), {})
    held = push(host, 1, 1)
    with pytest.raises(StateError):
        host.resume(1, Held(2, held.digest))
    host.resume(1, held)

    assert Reply(1, b"hello", 1) == host.request("text", (), {})
    assert Reply(1, b"hello", 1) == host.request("later", (), {})
    assert (held, True, 0, os.getpid()) == (
        *((h := host.health()).held, h.is_open, h.in_flight),
        h.pid,
    )


def test_finalize_is_harmless_at_any_time() -> None:
    """Before anything was prepared, and twice: the worker's hook runs once for a session."""
    host = make()
    host.finalize(1)
    host.prepare(1, 5)
    host.finalize(1)
    host.finalize(1)
    exporter = ExporterHost()
    exporter.make(StateExporter, ((), {}), TRANSPORT)
    exporter.finalize(1)
    exporter.prepare(2, 1)
    exporter.finalize(2)
    exporter.finalize(2)

    assert ["prepare 5", "finalize 5"] == host.worker.calls


def test_an_older_session_changes_nothing() -> None:
    """What comes late, from a session before the newest, is refused."""
    host = make()
    host.resume(2, push(host, 1, 2))
    for late in (
        lambda: host.pause(1, "drain"),
        lambda: host.commit(1, 2),
        lambda: host.resume(1, Held(1, "")),
        lambda: host.finalize(1),
    ):
        with pytest.raises(ServingError, match="session 1 is over"):
            late()

    assert Reply(1, b"hello", 1) == host.request("text", (), {})


def test_commit_may_be_asked_for_twice() -> None:
    """A commit whose answer was lost gives the same answer again."""
    host = make()
    held = push(host, 1, 1)

    assert held == host.commit(1, 1)
    with pytest.raises(StateError, match="version 2 is not staged"):
        host.commit(1, 2)


def test_a_worker_that_serves_is_not_changed() -> None:
    """Neither a commit nor an overwriting push goes past an open gate."""

    class InPlace(Echo):
        in_place = True

        def apply(self, version, parts):
            self.state = {part.name: part for part in parts}

    for kind in (Echo, InPlace):
        host = make(kind)
        host.resume(1, push(host, 1, 1))
        with pytest.raises(ServingError, match="that serves"):
            push(host, 2, 2)
        assert Reply(1, b"hello", 1) == host.request("text", (), {})


def test_a_failed_commit_leaves_nothing_that_serves() -> None:
    """Nobody knows what a worker holds whose commit raised: it opens over neither version."""

    class Half(Echo):
        def commit(self, version):
            if version == 2:
                raise RuntimeError("half way")
            super().commit(version)

    host = make(Half)
    old = push(host, 1, 1)
    host.resume(1, old)
    host.pause(2, "drain")
    with pytest.raises(RuntimeError, match="half way"):
        push(host, 2, 2)
    with pytest.raises(StateError):
        host.resume(2, old)


def test_a_short_state_is_refused() -> None:
    """A state of which a chunk is missing is not staged, whatever the worker read of it."""

    class Lazy(Echo):
        def stage(self, version, parts):
            pass

    transport = ObjectTransport(chunk_bytes=1)
    package = transport.pack(1, {"text": b"hello", "more": b"!"}, "s")
    host = make(Lazy)
    with pytest.raises(StateError, match="another digest"):
        host.transfer(1, package.manifest, package.chunks[:1])
    with pytest.raises(StateError):
        host.commit(1, 1)


def test_pause_waits_for_what_is_in_flight() -> None:
    """The gate closes first; pause returns once the last request has its answer."""
    entered, leave = threading.Event(), threading.Event()

    class Slow(Echo):
        def work(self):
            entered.set()
            assert leave.wait(20)
            return self.text()

    host = make(Slow)
    host.resume(1, push(host, 1, 1))
    answers: list[object] = []
    asked = threading.Thread(target=lambda: answers.append(host.request("work", (), {})))
    paused = threading.Thread(target=lambda: host.pause(2, "drain"))
    asked.start()
    assert entered.wait(20)
    paused.start()
    while host.health().is_open:
        pass
    assert paused.is_alive()
    with pytest.raises(Retryable) as refused:
        host.request("text", (), {})
    leave.set()
    paused.join(20)
    asked.join(20)

    assert (1, False) == (refused.value.version, refused.value.begun)
    assert [Reply(1, b"hello", 1)] == answers


class Frozen(Echo):
    """Holds a request in flight from ``pause`` to ``resume``; ``break_loose`` lets it out."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.move = threading.Event(), threading.Event()

    def work(self) -> bytes:
        self.entered.set()
        assert self.move.wait(20)
        return self.text()

    def resume(self) -> None:
        self.move.set()


def test_what_is_kept_in_flight_goes_on_after_the_update() -> None:
    """
    With ``keep`` pause does not wait for a request that the worker holds; it is answered
    after the update, and the answer names the versions of its begin and its end.
    """
    host = make(Frozen)
    host._held = push(host, 1, 1)
    host._open = True
    answers: list[object] = []
    asked = threading.Thread(target=lambda: answers.append(host.request("work", (), {})))
    asked.start()
    assert host.worker.entered.wait(20)
    host.pause(2, "keep")
    assert (False, 1) == ((h := host.health()).is_open, h.in_flight)
    host.resume(2, push(host, 2, 2, b"new"))
    asked.join(20)

    assert [Reply(2, b"new", 1)] == answers


def test_a_request_that_is_not_held_is_not_answered() -> None:
    """What ends while nobody knows which version the worker holds is retryable."""

    class Loose(Frozen):
        in_place = True

        def apply(self, version, parts):
            self.state = {part.name: part.data for part in parts}
            self.move.set()
            asked.join(20)

    host = make(Loose)
    host._held = push_in_place(host)
    host._open = True
    errors: list[Retryable] = []

    def ask() -> None:
        try:
            host.request("work", (), {})
        except Retryable as error:
            errors.append(error)

    asked = threading.Thread(target=ask)
    asked.start()
    assert host.worker.entered.wait(20)
    host.pause(2, "keep")
    push(host, 2, 2)

    assert [(1, True)] == [(error.version, error.begun) for error in errors]


def push_in_place(host: WorkerHost) -> Held:
    """Give a worker a first state without its own ``apply``."""
    host.worker.state = {"text": b"old"}
    return Held(1, "0" * 64)
