"""The hosts as Ray actors: each kind of call has threads of its own.

A worker that hangs in a request or in a phase still says how it stands.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from typing import Any

import ray

from hpcresume.serving.host import ExporterHost, WorkerHost

REQUEST, CONTROL = "request", "control"
GROUPS = {"request": REQUEST, "health": CONTROL, "where": CONTROL, "watch": CONTROL}
"""Method -> group of threads; all others run one at a time, in the order they were called."""


class _Watched:
    """Says where it runs, and holds a call for as long as it lives."""

    def __init__(self) -> None:
        # Under some process trackers the signals of a job reach every process of it.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        super().__init__()

    def look_in(self, path: list[str]) -> None:
        """Import from where the pool's process does; before anything of the user arrives."""
        sys.path[:0] = [entry for entry in path if entry not in sys.path]

    def where(self) -> tuple[str, int]:
        """Return the host's name and the number of the process."""
        return socket.gethostname(), os.getpid()

    def watch(self) -> None:
        """Never return; the end of this call is the end of the process."""
        threading.Event().wait()


class RayWorkerHost(_Watched, WorkerHost):
    """A worker's host in an actor of its own."""

    def fetch(self, chunk: Any) -> Any:
        """Map a chunk from the object store."""
        return ray.get(chunk)


class RayExporterHost(_Watched, ExporterHost):
    """An exporter's host in an actor of its own."""


def worker_actor(concurrency: int) -> Any:
    """Return the actor class of workers that answer so many requests at once."""
    return ray.remote(concurrency_groups={REQUEST: concurrency, CONTROL: 3})(RayWorkerHost)


def exporter_actor() -> Any:
    """Return the actor class of exporters."""
    return ray.remote(concurrency_groups={CONTROL: 3})(RayExporterHost)


def call(handle: Any, method: str, *arguments: Any) -> Any:
    """Call a method of a host's actor in the method's group; return the reference."""
    bound = getattr(handle, method)
    group = GROUPS.get(method)
    return (bound if group is None else bound.options(concurrency_group=group)).remote(*arguments)
