"""What stages print goes to the driver's own streams, and with them to the array task's log.

Ray would write it to files, and have a process of its own look through them several times a
second: half a percent of two cores, and most of a second of a core at the start.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import stat
import sys
import threading
import time

_READ_BYTES = 1 << 16
_CLOSE_S = 1.0


class OutputRelay:
    """Two pipes for the workers to write to, and a thread that hands on what comes.

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
        self._thread = threading.Thread(target=self._relay, name="stage-output", daemon=True)
        self._thread.start()

    def _relay(self) -> None:
        with selectors.DefaultSelector() as selector:
            for reading in (*self._targets, self._told):
                selector.register(reading, selectors.EVENT_READ)
            closing = False
            while not closing:
                ready = [key.fd for key, _ in selector.select()]
                closing = self._told in ready
                for reading in ready:
                    if reading in self._targets:
                        self._hand_on(reading)
            until = time.monotonic() + _CLOSE_S
            # Something that a stage left behind may write for ever.
            while time.monotonic() < until and any(map(self._hand_on, self._targets)):
                pass

    def _hand_on(self, reading: int) -> bool:
        """Write on what has come; return whether anything had."""
        try:
            data = memoryview(os.read(reading, _READ_BYTES))
        except BlockingIOError:
            return False
        with contextlib.suppress(OSError):  # a log that takes no more must not stop the work
            while data:
                data = data[os.write(self._targets[reading], data) :]
        return True

    def close(self) -> None:
        """Hand on the rest, and end."""
        os.write(self._tell, b".")
        self._thread.join(2 * _CLOSE_S)
        if not self._thread.is_alive():
            for end in self._ends:
                os.close(end)


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
