"""One local Ray head for one attempt: private, short-lived, gone without a trace.

Several heads of one user share a node, so nothing here finds a process by name, uses a fixed
port, or joins a cluster that exists: the address is always ``local``, every ``RAY_*``
variable that could point elsewhere is removed, and a token of the attempt's own keeps other
users of the node out of it.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
from dataclasses import dataclass

import psutil
import ray

from hpcresume.engine.pool import EngineDiedError

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
        store = min(_MAX_STORE_BYTES, resources.memory_bytes // 8, _shm_free() // 2)
        ray.init(
            address="local",
            num_cpus=max(1, resources.cpus),
            num_gpus=resources.gpus,
            object_store_memory=max(_MIN_STORE_BYTES, store),
            _memory=max(_MIN_STORE_BYTES, resources.memory_bytes),
            include_dashboard=False,
            _temp_dir=temp,
            logging_level="warning",
        )
        # ray.init installs a handler that exits; orders come over the pipe instead.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._daemons = [child for child in psutil.Process().children() if child.name() in _DAEMONS]

    def check(self) -> None:
        """Notice the death of Ray's own processes at once; Ray takes up to a minute.

        Raises:
            EngineDiedError: One of them is gone.
        """
        for daemon in self._daemons:
            with contextlib.suppress(psutil.NoSuchProcess):
                if daemon.status() != psutil.STATUS_ZOMBIE:
                    continue
            raise EngineDiedError(
                f"Ray's {daemon_name(daemon)} died. The attempt ends and is started again; "
                "committed work is kept.",
                pid=daemon.pid,
            )

    def close(self) -> None:
        """Disconnect and remove Ray's files; its processes end with this one at the latest."""
        with contextlib.suppress(Exception):
            ray.shutdown()
        shutil.rmtree(self._temp, ignore_errors=True)


def daemon_name(process: psutil.Process) -> str:
    """Return the name of a process that may be gone, from what was cached of it."""
    return str(getattr(process, "_name", None) or "daemon")


def _shm_free() -> int:
    try:
        return shutil.disk_usage("/dev/shm").free  # noqa: S108  # where Ray's object store lies
    except OSError:
        return _MAX_STORE_BYTES
