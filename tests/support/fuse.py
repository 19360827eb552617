"""A FUSE file system that is one empty directory, spoken over /dev/fuse; needs root.

It is what a test needs to see a kind of file system refused: nothing can be stored in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

# linux/fuse.h
_IN, _OUT = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ")
_GETATTR, _STATFS, _OPENDIR, _INIT = 3, 17, 27, 26
_NO_ANSWER = frozenset({2, 36, 42})  # FORGET, INTERRUPT, BATCH_FORGET
_DETACH = 2


def _init() -> bytes:
    return struct.pack("<IIIIHHIIHH32x", 7, 31, 4096, 0, 1, 1, 4096, 1, 0, 0)


def _attributes() -> bytes:
    mode = stat.S_IFDIR | 0o777
    times = (0,) * 6
    return struct.pack("<QII", 0, 0, 0) + struct.pack(
        "<QQQ3Q3I7I", 1, 0, 0, *times, mode, 2, os.geteuid(), os.getegid(), 0, 4096, 0
    )


def _space() -> bytes:
    return struct.pack("<5Q4I24x", 1 << 20, 1 << 20, 1 << 20, 1, 1, 4096, 255, 4096, 0)


def _serve(device: int) -> None:
    answers = {_INIT: _init(), _GETATTR: _attributes(), _STATFS: _space()}
    answers[_OPENDIR] = struct.pack("<QII", 0, 0, 0)
    # Reading fails once the file system is unmounted.
    with contextlib.suppress(OSError):
        while True:
            request = os.read(device, 1 << 20)
            _, opcode, unique, *_ = _IN.unpack_from(request)
            if opcode in _NO_ANSWER:
                continue
            body = answers.get(opcode)
            error = 0 if body is not None else -errno.ENOSYS
            os.write(device, _OUT.pack(_OUT.size + len(body or b""), error, unique) + (body or b""))


@contextlib.contextmanager
def fuse_mount(path: Path) -> Iterator[None]:
    """Mount the empty directory at ``path``; skip where this is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        device = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        pytest.skip(f"no file system of a refused kind can be made here: /dev/fuse: {error}")
    options = f"fd={device},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()}"
    try:
        if libc.mount(b"test", os.fsencode(path), b"fuse", 0, options.encode()):
            pytest.skip(f"mounting FUSE: {os.strerror(ctypes.get_errno())}")
        server = threading.Thread(target=_serve, args=(device,), daemon=True)
        server.start()
        try:
            yield
        finally:
            libc.umount2(os.fsencode(path), _DETACH)
            server.join(timeout=10)
    finally:
        os.close(device)
