"""The places on a node that Ray's processes need, tried before Ray is started.

Ray itself takes half a minute to say that it cannot start, and not why.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import socket
import tempfile

from hpcresume.errors import LocalStorageError

SHARED_MEMORY = "/dev/shm"  # noqa: S108  # where Ray's object store lies

# <temp>/session_<26 characters>_<pid>/sockets/plasma_store
_SOCKET = "session_" + "0" * 26 + "_0000000/sockets/plasma_store"
_PROBE_BYTES = 1 << 16


def check_ray_places(temp: str) -> None:
    """Try what a Ray head does first: a socket below ``temp``, and shared memory.

    Raises:
        LocalStorageError: The node refuses one of them; says which.
    """
    check_socket(temp)
    check_shared_memory()


def socket_length(temp: str) -> int:
    """Return the bytes of the longest name of a socket below ``temp``; 107 are allowed."""
    return len(os.fsencode(os.path.join(temp, _SOCKET)))


def check_socket(temp: str) -> None:
    """Bind a socket as long as Ray's longest.

    Raises:
        LocalStorageError: It cannot be.
    """
    path = os.path.join(temp, _SOCKET)
    try:
        os.makedirs(os.path.dirname(path))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
    except OSError as error:
        raise LocalStorageError(
            f"no socket at {socket_length(temp)} bytes in {temp}: {error.strerror or error}. "
            "Ray's processes talk over sockets there. Make /tmp a local directory of the node.",
            path=temp,
        ) from error
    finally:
        shutil.rmtree(os.path.join(temp, _SOCKET.partition("/")[0]), ignore_errors=True)


def check_shared_memory() -> None:
    """Map some shared memory.

    Raises:
        LocalStorageError: It cannot be.
    """
    path = ""
    try:
        fd, path = tempfile.mkstemp(prefix="hpcresume-", dir=SHARED_MEMORY)
        with contextlib.closing(os.fdopen(fd, "r+b", buffering=0)):
            os.posix_fallocate(fd, 0, _PROBE_BYTES)
            with mmap.mmap(fd, _PROBE_BYTES) as memory:
                memory[0] = 1
    except OSError as error:
        raise LocalStorageError(
            f"{SHARED_MEMORY} cannot be used: {error.strerror or error}. "
            "Ray keeps its objects there and does not start without it. "
            "Tell the centre which node it is; a run without Ray takes --engine inline.",
            path=SHARED_MEMORY,
        ) from error
    finally:
        if path:
            with contextlib.suppress(OSError):
                os.unlink(path)
