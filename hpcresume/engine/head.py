"""One local Ray head for one attempt: private, short-lived, gone without a trace.

Several heads of one user share a node, so nothing here finds a process by name, uses a fixed
port, or joins a cluster that exists: the address is always ``local``, every ``RAY_*``
variable that could point elsewhere is removed, and a token of the attempt's own keeps other
users of the node out of it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import ray

from hpcresume.engine.pool import EngineDiedError

log = logging.getLogger(__name__)

INNER_NAME = "r"
_KNOWN_INSIDE = ("2.59.", "2.60.")
_WATCH_S = 0.5
_STUCK_S = 5.0
_DAEMONS = ("raylet", "gcs_server")
_MIN_STORE_BYTES = 80 << 20
_MAX_STORE_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class HeadResources:
    """What the array task was given.

    Attributes:
        cpus: Cores.
        gpus: GPUs.
        memory_bytes: Memory that all processes of the task may use together.
    """

    cpus: int
    gpus: int
    memory_bytes: int


class RayHead:
    """A running head."""

    def __init__(self, temp: str, resources: HeadResources) -> None:
        self._temp = temp
        before = signal.getsignal(signal.SIGTERM)
        store = min(_MAX_STORE_BYTES, resources.memory_bytes // 8, _shm_free() // 2)
        with _one_node_only():
            ray.init(
                address="local",
                num_cpus=max(1, resources.cpus),
                num_gpus=resources.gpus,
                object_store_memory=max(_MIN_STORE_BYTES, store),
                _memory=max(_MIN_STORE_BYTES, resources.memory_bytes),
                include_dashboard=False,
                # Ray opens its directory to everybody; the one around it stays private.
                _temp_dir=os.path.join(temp, INNER_NAME),
                logging_level="warning",
                log_to_driver=False,
            )
        # ray.init installs a handler that exits, in place of the caller's.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
        self._daemons = [child for child in psutil.Process().children() if child.name() in _DAEMONS]
        self._agents = [agent for daemon in self._daemons for agent in daemon.children()]
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="ray-watch", daemon=True).start()

    def check(self) -> None:
        """Notice the death of Ray's own processes at once; Ray takes up to a minute.

        Raises:
            EngineDiedError: One of them is gone.
        """
        dead = self._dead()
        if dead is not None:
            self._end_others()
            raise _died(dead)

    def _dead(self) -> psutil.Process | None:
        return next((daemon for daemon in self._daemons if _has_ended(daemon.pid)), None)

    def _end_others(self) -> None:
        """Kill what is left of Ray; without one of its processes some of the others linger."""
        for process in (*self._daemons, *self._agents):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _watch(self) -> None:
        """End this process when Ray is dead and the main thread is stuck in a call to it.

        Some calls wait for Ray's control service for a minute, out of reach of any exception.
        What was committed is safe; the supervisor starts another attempt.
        """
        noticed: float | None = None
        while not self._closed.wait(_WATCH_S):
            dead = self._dead()
            if dead is None:
                continue
            noticed = noticed or time.monotonic()
            if time.monotonic() - noticed > _STUCK_S:
                self._end_others()
                log.error("%s", _died(dead))
                os._exit(EngineDiedError.exit_code)

    def close(self) -> None:
        """Disconnect and remove Ray's files; its processes end with this one at the latest."""
        self._closed.set()
        with contextlib.suppress(Exception):
            ray.shutdown()
        shutil.rmtree(self._temp, ignore_errors=True)


@contextlib.contextmanager
def _one_node_only() -> Iterator[None]:
    """Start Ray without its autoscaler, dashboard and log monitor: it has no settings for that.

    They have nothing to do here, and each takes most of a second of a core to start.
    A Ray whose inside is not known is started whole.
    """
    if not ray.__version__.startswith(_KNOWN_INSIDE):
        yield
        return
    from ray._private import services
    from ray._private.node import Node

    before = Node.start_monitor, Node.start_log_monitor, services.start_api_server
    Node.start_monitor = Node.start_log_monitor = lambda _node: None
    services.start_api_server = lambda *_, **__: ("", None)  # no address, and no process
    try:
        yield
    finally:
        Node.start_monitor, Node.start_log_monitor, services.start_api_server = before


def _has_ended(child: int) -> bool:
    """Tell whether a child of this process is dead, without taking its status from its parent."""
    try:
        seen = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return seen is not None


def _died(daemon: psutil.Process) -> EngineDiedError:
    return EngineDiedError(
        f"Ray's {daemon_name(daemon)} died. The attempt ends and is started again; "
        "committed work is kept.",
        pid=daemon.pid,
    )


def daemon_name(process: psutil.Process) -> str:
    """Return the name of a process that may be gone, from what was cached of it."""
    return str(getattr(process, "_name", None) or "daemon")


def _shm_free() -> int:
    try:
        return shutil.disk_usage("/dev/shm").free  # noqa: S108  # where Ray's object store lies
    except OSError:
        return _MAX_STORE_BYTES
