"""Runs on this machine, each with a node-local directory of its own."""

from __future__ import annotations

import contextlib
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.cli import Command

INLINE = ("--cluster", "local", "--engine", "inline")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


@dataclass(frozen=True)
class Desk:
    """A directory in which a user works: pipelines, runs, and the node's own disk."""

    path: Path

    @property
    def local(self) -> Path:
        """The node-local directory."""
        return self.path / "local"

    @classmethod
    def make(cls, path: Path) -> Desk:
        """Return a desk in an existing directory."""
        desk = cls(path)
        desk.local.mkdir()
        return desk

    def write(self, name: str, text: str) -> Path:
        """Write a file, dedented, with ``import hpcresume as hr`` above if it is Python."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        head = "import hpcresume as hr\n" if name.endswith(".py") else ""
        path.write_text(head + textwrap.dedent(text))
        return path

    def call(
        self, *arguments: object, env: Mapping[str, str] | None = None, timeout_s: float = 120
    ) -> Ended:
        """Run ``hpcresume`` to its end."""
        command = Command(self.path, {**os.environ, **(env or {})})
        process = command.start(*map(str, arguments))
        try:
            out, err = process.communicate(timeout=timeout_s)
        finally:
            process.kill()
        return Ended(process.returncode, out, err)

    def submit(self, *arguments: object, env: Mapping[str, str] | None = None) -> Ended:
        """Run ``hpcresume submit`` on this machine without Ray."""
        return self.call("submit", *INLINE, "--local-dir", self.local, *arguments, env=env)

    def rows(self, run: str) -> bytes:
        """Return what collecting a finished run gives."""
        ended = self.call("collect", run, "-o", f"{run}.jsonl")
        assert 0 == ended.code, ended
        return (self.path / f"{run}.jsonl").read_bytes()


def family(pid: int) -> list[psutil.Process]:
    """Return a process and its descendants that live."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def kill_family(pid: int) -> None:
    """Kill a process with all its descendants at once, as a lost node would."""
    found = family(pid)
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(found, timeout=20)


def living(marks: Iterable[bytes]) -> Iterator[str]:
    """Yield the processes whose command, environment or open files hold one of these texts."""
    wanted = list(marks)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            known = command + b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
            fds = [
                os.fsencode(os.readlink(f"/proc/{pid}/fd/{fd}"))
                for fd in os.listdir(f"/proc/{pid}/fd")
            ]
            if int(pid) != os.getpid() and any(
                mark in text for mark in wanted for text in [known, *fds]
            ):
                yield f"{pid} {command.replace(bytes(1), b' ').decode(errors='replace')}"


def flip(path: Path, offsets: Iterable[int]) -> None:
    """Damage a file: invert the bytes at these offsets."""
    data = bytearray(path.read_bytes())
    for offset in offsets:
        data[offset] ^= 0xFF
    path.write_bytes(data)


def held_shm() -> set[str]:
    """Return the names in /dev/shm that a living process maps or has open."""
    held = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/maps").read_text()
            held |= {line.rpartition("/dev/shm/")[2] for line in text.splitlines()}
    return held
