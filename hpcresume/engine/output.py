"""What stages print goes to the driver's own streams, and with them to the array task's log.

Ray would write it to files, and have a process of its own look through them several times a
second: half a percent of two cores, and most of a second of a core at the start.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import stat
import sys
import threading
import time

_READ_BYTES = 1 << 16
_HELD_BYTES = 16 << 20
_PATIENCE_S = 2.0
_CLOSE_S = 1.0


class OutputRelay:
    """Two pipes for the workers to write to, and threads that hand on what comes.

    What a log does not take at once is held.  Workers wait for one that is slow; for one that
    hangs they do not, since that would look like stages which run past their time: what they
    print is dropped until it goes on.

    Attributes:
        address: Where a worker of this node finds the pipes, for :func:`join`.
    """

    def __init__(self) -> None:
        out, err = os.pipe(), os.pipe()
        self._told, self._tell = os.pipe()
        self._targets = {out[0]: 1, err[0]: 2}
        self._ends = (*out, *err, self._told, self._tell)
        self.address = f"{os.getpid()} {out[1]} {err[1]}"
        for reading in self._targets:
            os.set_blocking(reading, False)
        self._changed = threading.Condition()
        self._held: dict[int, bytearray] = {1: bytearray(), 2: bytearray()}
        self._dropped, self._hangs, self._ended = {1: 0, 2: 0}, False, False
        self._threads = [
            threading.Thread(target=target, name="stage-output", daemon=True)
            for target in (self._read, self._write)
        ]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        with selectors.DefaultSelector() as selector:
            for reading in (*self._targets, self._told):
                selector.register(reading, selectors.EVENT_READ)
            closing = False
            while not closing:
                ready = [key.fd for key, _ in selector.select()]
                closing = self._told in ready
                for reading in ready:
                    if reading in self._targets:
                        self._take(reading)
            until = time.monotonic() + _CLOSE_S
            # Something that a stage left behind may write for ever.
            while time.monotonic() < until and any(map(self._take, self._targets)):
                pass
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _take(self, reading: int) -> bool:
        """Hold what has come; return whether anything had."""
        try:
            data = os.read(reading, _READ_BYTES)
        except BlockingIOError:
            return False
        target = self._targets[reading]
        held = self._held[target]
        with self._changed:
            if not self._hangs:
                self._hangs = not self._changed.wait_for(
                    lambda: len(held) < _HELD_BYTES, _PATIENCE_S
                )
            if len(held) < _HELD_BYTES:
                held += data
                self._changed.notify_all()
            else:
                self._dropped[target] += len(data)
        return True

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or any(self._held.values()))
                if not any(self._held.values()):
                    return
                taken = {target: bytes(held) for target, held in self._held.items()}
                for held in self._held.values():
                    held.clear()
                self._hangs = False
                self._changed.notify_all()
                for target, count in self._dropped.items():
                    if count:
                        taken[target] += b"hpcresume: the log hung; %d bytes are lost\n" % count
                        self._dropped[target] = 0
            for target, data in taken.items():
                with contextlib.suppress(OSError):  # as where the log's disk is full
                    _write_all(target, data)

    def close(self) -> None:
        """Hand on the rest, and end."""
        os.write(self._tell, b".")
        for thread in self._threads:
            thread.join(2 * _CLOSE_S)
        if not any(thread.is_alive() for thread in self._threads):
            for end in self._ends:
                os.close(end)


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            select.select((), (fd,), ())


def join(address: str) -> None:
    """Let this process and what it starts write to a relay's pipes, line by line.

    Raises:
        OSError: The relay is closed.
    """
    pid, *ends = address.split()
    for fd, end, name in zip((1, 2), ends, ("stdout", "stderr"), strict=True):
        getattr(sys, name).flush()
        pipe = os.open(f"/proc/{pid}/fd/{end}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            # Who comes after the relay's end may find some file of the driver's there.
            if not stat.S_ISFIFO(os.fstat(pipe).st_mode):
                raise BrokenPipeError(f"there is no relay at {address!r}")
            os.dup2(pipe, fd)
        finally:
            os.close(pipe)
        # Ray's streams write the parts of a line one by one: those of others come between.
        stream = open(fd, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115  # lives as long as the process
        setattr(sys, name, stream)


def leave() -> None:
    """Hand on the beginnings of lines; a worker is killed in the end, which loses them."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # a stage may have closed or replaced it
            stream.flush()
