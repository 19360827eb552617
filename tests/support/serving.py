"""Workers and exporters that fail where they are told to, and pools of them.

What is told lies in a directory, so that it reaches actors and threads alike: one file per
phase, ``raise``, ``hang``, ``die``, or ``slow`` (until the file is gone), for one member or
for all, for ever or once each.  Events are lines of a file, in the order they happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hpcresume.serving import ServingPool, StateExporter, StatefulWorker, UpdatePolicy
from hpcresume.serving.members import LocalPlaces
from hpcresume.serving.policy import UpdateReport

ValueT = TypeVar("ValueT")
QUICK = UpdatePolicy(
    **{
        f"{phase}_s": 60.0
        for phase in ("pause", "release", "prepare", "build", "transfer", "commit", "finalize",
                      "restore", "resume", "fence")
    }
)  # fmt: skip
WORKER_PHASES = ("pause", "release", "prepare", "stage", "commit", "finalize", "restore", "resume")
EXPORTER_PHASES = ("prepare", "export", "finalize")


class BoomError(Exception):
    """What a member raises that was told to."""


@dataclass(frozen=True)
class Faults:
    """What goes wrong, and what has happened, in a directory.

    Attributes:
        path: The directory.
    """

    path: str

    def arm(self, who: str, phase: str, how: str, *, only_one: bool = True, once: bool = False):
        """Tell workers (``worker``) or the exporter to fail in a phase."""
        words = [how, "one" if only_one else "all", "once" if once else "always"]
        temporary = os.path.join(self.path, "new")
        Path(temporary).write_text(" ".join(words))
        os.replace(temporary, os.path.join(self.path, f"{who}-{phase}"))

    def disarm(self) -> None:
        """Let everything go well from now on."""
        for path in Path(self.path).iterdir():
            if path.name != "events":
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()

    def happen(self, who: str, phase: str, me: str) -> None:
        """Note an event, and fail if that was told to whoever is here."""
        with open(os.path.join(self.path, "events"), "a", encoding="ascii") as file:
            file.write(f"{who}.{phase}\n")
        path = os.path.join(self.path, f"{who}-{phase}")
        with contextlib.suppress(FileNotFoundError):
            how, which, often = Path(path).read_text().split()
            if which == "one" and not self._claim(f"{path}.one", me):
                return
            if often == "once" and not self._is_first(f"{path}.{me}"):
                return
            self._fail(how, path, f"{who} in {phase}")

    @staticmethod
    def _claim(path: str, me: str) -> bool:
        with contextlib.suppress(FileExistsError), open(path, "x", encoding="ascii") as file:
            file.write(me)
        return me == Path(path).read_text()

    @staticmethod
    def _is_first(path: str) -> bool:
        with contextlib.suppress(FileExistsError):
            open(path, "x", encoding="ascii").close()
            return True
        return False

    @staticmethod
    def _fail(how: str, path: str, what: str) -> None:
        if how == "raise":
            raise BoomError(what)
        if how == "die":
            os._exit(1)
        while os.path.exists(path):
            time.sleep(0.02)

    def events(self) -> list[str]:
        """Return what has happened, a run of equal events as one."""
        found: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            for line in Path(self.path, "events").read_text().split():
                if not found or found[-1] != line:
                    found.append(line)
        return found

    def say_newest(self, version: int) -> None:
        """Have the exporter call a version the newest."""
        Path(self.path, "newest").write_text(str(version))

    def let_end(self) -> None:
        """Let the requests that wait for it end."""
        Path(self.path, "end").touch()

    def forget(self) -> None:
        """Start a new list of events."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.path, "events"))


class Faulty(StatefulWorker):
    """A worker whose answers tell every byte of its state."""

    def __init__(self, faults: Faults) -> None:
        self.faults, self.me = faults, f"{os.getpid()}-{id(self)}"
        self.stop = False

    def _happen(self, phase: str) -> None:
        self.faults.happen("worker", phase, self.me)

    def look(self) -> tuple[set[int], int | None]:
        """Return the values in the state, and the version that the worker thinks it has."""
        return {value for part in self.state.values() for value in set(part.data)}, self.version

    def work(self, number: int) -> tuple[int, set[int]]:
        """Take a while, reading the state before and after it."""
        before = self.look()[0]
        self.stop = False
        self._happen("request")
        deadline = time.monotonic() + 0.02
        while time.monotonic() < deadline:
            time.sleep(0.005)
        return number, before | self.look()[0]

    def wait_for_abort(self) -> str:
        """Return once the request is aborted."""
        self.stop = False
        self._happen("waiting")
        while not self.stop:
            time.sleep(0.01)
        return "partial"

    def time_out(self) -> None:
        """Raise what a limit raises."""
        raise TimeoutError("mine")

    def pid(self) -> int:
        """Return the process."""
        return os.getpid()

    def abort(self) -> None:
        self.stop = True

    def pause(self, mode: str) -> None:
        self._happen("pause")

    def release(self) -> None:
        self._happen("release")

    def prepare(self, version: int) -> None:
        self._happen("prepare")

    def stage(self, version: int, parts: Iterator[Any]) -> None:
        self._happen("stage")
        super().stage(version, parts)

    def commit(self, version: int) -> None:
        self._happen("commit")
        super().commit(version)

    def finalize(self, version: int) -> None:
        self._happen("finalize")
        super().finalize(version)

    def restore(self) -> None:
        self._happen("restore")

    def resume(self) -> None:
        self._happen("resume")


class InPlace(Faulty):
    """The same over one piece of memory that is overwritten part by part."""

    in_place = True

    def __init__(self, faults: Faults) -> None:
        super().__init__(faults)
        self.memory: dict[str, bytes] = {}

    def look(self) -> tuple[set[int], int | None]:
        return {value for data in self.memory.values() for value in data}, self.version

    def apply(self, version: int, parts: Iterator[Any]) -> None:
        for part in parts:
            self.memory[part.name] = bytes(part.data)
            self._happen("stage")


class Source(StateExporter):
    """Exports version v as parts full of the byte v; ``torn`` parts differ from that."""

    def __init__(self, faults: Faults) -> None:
        self.faults, self.me = faults, f"{os.getpid()}-{id(self)}"

    def _happen(self, phase: str) -> None:
        self.faults.happen("exporter", phase, self.me)

    def newest_version(self) -> int:
        self._happen("newest")
        return int(Path(self.faults.path, "newest").read_text())

    def prepare(self, version: int) -> None:
        self._happen("prepare")

    def export(self, version: int) -> Any:
        self._happen("export")
        return {name: bytes([version]) * 5000 for name in ("a", "b", "c")}

    def finalize(self, version: int) -> None:
        self._happen("finalize")


class Keeper(Faulty):
    """Holds the request in flight over an update, as an engine that can be stopped does."""

    def __init__(self, faults: Faults) -> None:
        super().__init__(faults)
        self.moves = threading.Event()
        self.moves.set()

    def slow(self) -> set[int]:
        """Read the state again and again until told to end; note the values that were seen."""
        seen: set[int] = set()
        while not os.path.exists(os.path.join(self.faults.path, "end")):
            self.moves.wait()
            seen |= self.look()[0]
            if len(seen) == 1:
                self.faults.happen("worker", "slow", self.me)
            time.sleep(0.005)
        return seen

    def pause(self, mode: str) -> None:
        self.moves.clear()
        super().pause(mode)

    def resume(self) -> None:
        super().resume()
        self.moves.set()


@dataclass
class PoolCase:
    """A pool of faulty workers and what it did."""

    pool: ServingPool
    faults: Faults

    async def try_update(self, version: int) -> BaseException | UpdateReport:
        """Return the report of an update, or what it raised."""
        try:
            return await self.pool.update(version)
        except BaseException as error:
            return error

    async def check_contract(self) -> set[int]:
        """
        Ask every worker that takes requests, the pool's opinion aside: all of them hold one
        version, whole, and one that the pool names.  Return the versions.
        """
        found: set[int] = set()
        for seat in self.pool._seats.values():
            if seat.member is None or seat.member.died.done():
                continue
            with contextlib.suppress(Exception):
                async with asyncio.timeout(20):
                    reply = await seat.member.call("request", "look", (), {})
                    version, (values, thinks) = reply.version, reply.value
                    assert {version} == values, (version, values, thinks)
                    found.add(version)
        served = self.pool.state().version
        assert found <= {served}, (found, served)
        return found


@contextlib.asynccontextmanager
async def pool_of(
    tmp_path: Path,
    *,
    n: int = 3,
    kind: type[Faulty] = Faulty,
    exporter: type[StateExporter] | None = Source,
    policy: UpdatePolicy = QUICK,
    places: Any = None,
    transport: Any = "object",
    version: int | None = 1,
    **options: Any,
) -> AsyncGenerator[PoolCase, None]:
    """Run a pool that serves a version; in this process unless ``places`` says otherwise."""
    directory = tmp_path / f"faults-{time.monotonic_ns()}"
    directory.mkdir()
    faults = Faults(str(directory))
    pool = ServingPool(
        kind,
        n,
        exporter=exporter,
        policy=policy,
        places=places or LocalPlaces(),
        transport=transport,
        **options,
        worker_args=((faults,), {}),
        exporter_args=((faults,), {}) if exporter is Source else ((), {}),
    )
    await pool.start()
    try:
        if version is not None:
            await pool.update(version)
        faults.forget()
        yield PoolCase(pool, faults)
    finally:
        faults.disarm()
        await pool.close()


async def eventually(condition: Any, what: str, timeout_s: float = 60) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(0.01)


def run(coroutine: Coroutine[Any, Any, ValueT]) -> ValueT:
    """Run a test's coroutine, with a limit that only a hang reaches."""

    async def limited() -> ValueT:
        async with asyncio.timeout(250):
            return await coroutine

    return asyncio.run(limited())
