"""Processes, their clients of the file server, and a scheduler that decides everything.

Every process is a greenlet.  It may be interrupted before each call of its file system and
before each commit, for as long as the scheduler likes; it may be killed or frozen there; and
calls may fail before or after their effect.  All choices come from one ``random.Random``, so
a seed is a run.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from greenlet import getcurrent, greenlet

from hpcresume.errors import HpcResumeError
from tests.simulation.disk import Disks
from tests.support.simfs import ClientKilledError, SimFileSystem, SimServer

if TYPE_CHECKING:
    from tests.simulation.oracle import Oracle

RUN = "/shared/run"
NEVER = 1 << 60
MOST_CALLS = 20_000
_NAMING = {"rename", "link", "unlink", "create"}
# What a call says whose reply was lost and that was sent again.
_REPEATED = {
    "mkdir": errno.EEXIST, "link": errno.EEXIST, "create": errno.EEXIST,
    "rename": errno.ENOENT, "unlink": errno.ENOENT,
}  # fmt: skip
_REFUSED = {
    "write": (errno.ENOSPC, errno.EDQUOT, errno.EIO),
    "sync": (errno.ENOSPC, errno.EDQUOT, errno.EIO),
    "close": (errno.EDQUOT, errno.EIO),
}
_FAILED = (errno.EIO, errno.ESTALE)


class ViolationError(AssertionError):
    """An invariant does not hold."""


@dataclass(eq=False)
class Scratch:
    """An attempt's directory on a node; its lock is held by a process."""

    path: str
    ref: Any
    holder: Process


@dataclass(eq=False)
class Node:
    """A machine: a disk, and a cache of listings that may be out of date."""

    name: str
    stale: bool = False
    listings: dict[str, set[str]] = field(default_factory=dict)
    scratch: dict[str, Scratch] = field(default_factory=dict)

    def refresh(self) -> None:
        """See everything again."""
        self.stale = False
        self.listings.clear()


class Process:
    """One process on one node.

    Attributes:
        left: Calls until the scheduler is asked again.
        fault_in: Calls until one goes wrong.
        waits_for: What must be true before it can go on.
        error: The typed error that it ended with.
    """

    def __init__(self, world: World, name: str, body: Callable[[Process], Any], node: Node) -> None:
        self.world, self.name, self.node = world, name, node
        self.client = Client(self)
        self.left = self.calls = self.faults = 0
        self.born = world.moments
        self.was_stale = node.stale
        self.fault_in = world.next_fault()
        self.frozen = self.killed = self.ended = False
        self.waits_for: Callable[[], bool] | None = None
        self.result: Any = None
        self.error: HpcResumeError | None = None
        self.children: list[Process] = []
        self._crash: BaseException | None = None
        self._body = body
        self._greenlet = greenlet(self._main)

    def _main(self) -> None:
        try:
            self.result = self._body(self)
        except ClientKilledError:
            self.killed = True
        except HpcResumeError as error:
            self.error = error
        except BaseException as error:
            self._crash = error
        self.ended = True

    @property
    def alive(self) -> bool:
        """Whether it has not ended and was not killed."""
        return not (self.ended or self.killed)

    @property
    def runnable(self) -> bool:
        """Whether it can go on now."""
        if self.frozen or self.ended or self.killed:
            return False
        return self.waits_for is None or self.waits_for()

    def run(self, calls: int) -> None:
        """Let it go on for so many calls."""
        self.left, self.waits_for = calls, None
        self._greenlet.switch()
        if self._crash is not None:
            if isinstance(self._crash, ViolationError):
                raise self._crash
            raise ViolationError(f"{self.name} raised {self._crash!r}") from self._crash

    def kill(self) -> None:
        """End it where it stands, with every process it started."""
        for child in self.children:
            child.kill()
        if not self.alive:
            return
        self.killed = True
        if self._greenlet:
            self._greenlet.throw(ClientKilledError)
        self.ended = True

    def pause(self) -> None:
        """Let others run."""
        self.world.hub.switch()
        if self.killed:
            raise ClientKilledError

    def wait(self, condition: Callable[[], bool]) -> None:
        """Let others run until something is true."""
        while not condition():
            self.waits_for = condition
            self.pause()

    def point(self) -> None:
        """A place where it can be interrupted."""
        if self.killed:
            raise ClientKilledError
        self.left -= 1
        if self.left <= 0:
            self.pause()
        self.calls += 1
        if self.calls > MOST_CALLS:
            raise ViolationError(f"L1: {self.name} makes calls without an end")

    def fate(self) -> tuple[str, str]:
        """Return what goes wrong with this call, and whether before or after its effect."""
        chance = self.world.chance
        self.fault_in = self.world.next_fault()
        self.faults += 1
        return chance.choice(self.world.fates), chance.choice(("before", "after"))


class Client(SimFileSystem):
    """A process's view of the shared file system."""

    def __init__(self, process: Process) -> None:
        super().__init__(process.world.server)
        self._process, self._world = process, process.world

    def _call(self, op: str, path: str, effect: Any, *, torn: Any = None) -> Any:
        process = self._process
        process.point()
        process.fault_in -= 1
        if process.fault_in <= 0:
            return self._faulty(op, path, effect, torn)
        return self._effect(op, path, effect)

    def _effect(self, op: str, path: str, effect: Any) -> Any:
        oracle = self._world.oracle
        if op in _NAMING:
            oracle.before(op, path, self._process)
        try:
            result = effect()
        except FileExistsError:
            self._learn(path)
            raise
        if op in _NAMING:
            if op == "unlink":
                self._unlearn(path)
            else:
                self._learn(path)
            oracle.after(op, path, self._process)
        elif op == "mkdir":
            self._learn(path)
        return result

    def _learn(self, path: str) -> None:
        directory, name = os.path.split(path)
        known = self._process.node.listings.get(directory)
        if known is not None:
            known.add(name)

    def _unlearn(self, path: str) -> None:
        directory, name = os.path.split(path)
        known = self._process.node.listings.get(directory)
        if known is not None:
            known.discard(name)

    def _faulty(self, op: str, path: str, effect: Any, torn: Any) -> Any:
        kind, when = self._process.fate()
        if op == "create" and not self._world.server.hard_links:
            when = "before"  # nobody can tell an empty file of his own from another's
        self._world.note(f"{self._process.name}: {kind} {when} {op} {path}")
        if kind == "kill":
            if when == "after":
                self._effect(op, path, effect)
            elif torn is not None:
                torn()
            raise ClientKilledError
        if kind == "freeze":
            self._process.frozen = True
            if when == "before":
                self._process.pause()
            result = self._effect(op, path, effect)
            if when == "after":
                self._process.pause()
            return result
        if when == "after" and op != "read":
            self._effect(op, path, effect)
            number = _REPEATED.get(op, errno.EIO)
        else:
            number = self._world.chance.choice(_REFUSED.get(op, _FAILED))
            if torn is not None:
                torn()
        raise OSError(number, os.strerror(number), path)

    def listdir(self, path: str) -> list[str]:
        """Return the names in a directory, as the node last saw it where that is stale."""
        node = self._process.node
        if node.stale and (known := node.listings.get(path)) is not None:
            names = list(known)
            self._process.point()
            return names
        names = super().listdir(path)
        if node.stale:
            node.listings[path] = set(names)
        return names

    def exists(self, path: str) -> bool:
        """Tell whether a name exists, or did when its directory was last looked at."""
        node = self._process.node
        if node.stale:
            directory, name = os.path.split(path)
            known = node.listings.get(directory)
            if known is not None and name not in known:
                self._process.point()
                return False
        return super().exists(path)


@contextlib.contextmanager
def tokens(chance: random.Random) -> Iterator[None]:
    """Let random names come from a chance of ours."""
    kept = secrets.token_hex
    secrets.token_hex = lambda size=8: f"{chance.getrandbits(8 * size):0{2 * size}x}"
    try:
        yield
    finally:
        secrets.token_hex = kept


class World:
    """Everything simulated.

    Attributes:
        chance: Where every choice comes from.
        fault_rate: How often a call goes wrong.
        fates: What may then happen to it.
        moments: How often a process was let go on.
        trace: What happened, for a person who replays a seed.
    """

    def __init__(self, chance: random.Random, *, tracing: bool = False) -> None:
        self.chance = chance
        self.hub = getcurrent()
        self.server = SimServer(ordered=True)
        self.disks = Disks()
        self.disks.on_event = self._disk_event
        self.nodes: list[Node] = []
        self.processes: list[Process] = []
        self.fault_rate = 0.0
        self.fates: list[str] = ["error"]
        self.trace: list[str] | None = [] if tracing else None
        self.oracle: Oracle
        self.current: Process | None = None
        self.moments = 0

    def note(self, text: str) -> None:
        """Keep a line of the trace."""
        if self.trace is not None:
            self.trace.append(text)

    def next_fault(self) -> int:
        """Return in how many calls the next fault is due."""
        if not self.fault_rate:
            return NEVER
        return int(self.chance.expovariate(self.fault_rate)) + 1

    def start(self, name: str, body: Callable[[Process], Any], node: Node) -> Process:
        """Start a process."""
        process = Process(self, name, body, node)
        self.processes.append(process)
        self.note(f"start {name} on {node.name}")
        return process

    def run(self, process: Process, calls: int) -> None:
        """Let a process go on."""
        self.note(f"run {process.name} for {calls}")
        self.moments += 1
        self.current = process
        process.run(calls)
        self.current = None

    def runnable(self) -> list[Process]:
        """Return the processes that can go on; forget those that have ended."""
        self.processes = [process for process in self.processes if process.alive]
        return [process for process in self.processes if process.runnable]

    def _disk_event(self, _path: str, _what: str) -> None:
        if self.current is not None:
            self.current.point()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Let code under test see this world: its disks, its chance, and no log."""
        logging.disable(logging.CRITICAL)
        try:
            with tokens(self.chance), self.disks.mounted():
                try:
                    yield
                finally:
                    for process in self.processes:
                        process.kill()
        finally:
            logging.disable(logging.NOTSET)
