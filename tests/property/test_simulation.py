"""Attempts, zombies, merges and a restarting server, in random order on a simulated file system.

After every step: what has a receipt is in the union (published implies recoverable), a source
keeps its winner from one generation to the next, and no generation forgets one before it.
The same harness must catch versions of publishing that are known to be wrong.
"""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from pyroaring import BitMap

from hpcresume import fs as fs_module
from hpcresume.errors import SharedStorageError
from hpcresume.fs import publish
from hpcresume.ids import Epoch
from hpcresume.merge.generation import Union, load_newest, read_union, write_generation
from hpcresume.run.directory import AttemptRef, RunDir
from hpcresume.segment.segment import Writer, encode_segment
from tests.support.places import footer_of, frame, make_run
from tests.support.simfs import ClientKilledError, SimFileSystem, SimServer

SEEDS = 500
STEPS = 40
OPS = ("create", "write", "sync", "close", "rename", "link", "unlink", "sync_directory", "read",
       "mkdir", "listdir", "size")  # fmt: skip


@dataclass
class Attempt:
    """A process that completes sources and publishes them."""

    run: RunDir
    ref: AttemptRef
    seq: int = 0


@dataclass
class World:
    """One simulated run."""

    chance: random.Random
    server: SimServer = field(default_factory=lambda: SimServer(ordered=True))
    attempts: list[Attempt] = field(default_factory=list)
    promised: set[int] = field(default_factory=set)
    winners: dict[int, tuple[Writer, str]] = field(default_factory=dict)
    epochs: set[tuple[int, Epoch]] = field(default_factory=set)

    def __post_init__(self) -> None:
        make_run(SimFileSystem(self.server), "/run")

    def open(self, *, faulty: bool = True) -> RunDir:
        """Return the run as a new client sees it, one that may fail, die or see old listings."""
        client = SimFileSystem(self.server)
        run = RunDir.open("/run", client)
        if faulty:
            self._arm(client)
        return run

    def _arm(self, client: SimFileSystem) -> None:
        for op in OPS:
            for action in (client.kill, self.server.restart, self._raise):
                if self.chance.random() < 0.05:
                    when = self.chance.choice(("before", "after"))
                    client.on(op, action, when=when, first=self.chance.randrange(1, 12))
        if self.chance.random() < 0.1:
            client.hold_listings()

    def _raise(self) -> None:
        raise OSError(self.chance.choice((errno.ENOSPC, errno.EIO, errno.ESTALE)), "simulated")

    # -- what may happen ------------------------------------------------------------------------

    def start(self) -> None:
        """Start an attempt; the ones before it may live on as zombies."""
        run = self.open()
        ref = run.allocate_attempt(0, self.chance.randrange(3))
        assert (ref.task, ref.epoch) not in self.epochs, "an epoch was given out twice"
        self.epochs.add((ref.task, ref.epoch))
        self.attempts.append(Attempt(run, ref))

    def publish(self) -> None:
        """Publish a segment of some attempt; a receipt is a promise."""
        if not self.attempts:
            return
        attempt = self.chance.choice(self.attempts)
        attempt.seq += 1
        sources = self.chance.sample(range(60), self.chance.randrange(1, 8))
        ref = attempt.ref
        footer = footer_of(Writer(ref.round, ref.task, ref.epoch), attempt.seq)
        name = f"seg-{attempt.seq:06d}-{self.chance.getrandbits(64):016x}"
        parts = encode_segment(footer, [frame(sources)], [])
        publish(attempt.run.fs, attempt.run.attempt_path(ref, name), parts, label="segment")
        self.promised |= set(sources)

    def merge(self) -> None:
        """Merge with a new process; a generation that was written is a promise too."""
        run = self.open()
        union = read_union(run, max_attempts=3)
        write_generation(run, union)
        # Only now: a generation that was seen and not yet acknowledged may be lost again.
        self.promised |= set(union.completed)
        mine = owners(union)
        assert self.winners.items() <= mine.items(), "a winner changed"
        self.winners = mine

    def restart(self) -> None:
        """Restart the file server."""
        self.server.restart()

    def step(self) -> None:
        """Do one thing, which may be refused or be the end of a process."""
        action: Callable[[], None] = self.chance.choices(
            [self.start, self.publish, self.merge, self.restart], [3, 8, 3, 1]
        )[0]
        with contextlib.suppress(SharedStorageError, ClientKilledError, FileExistsError):
            action()

    # -- what must hold -------------------------------------------------------------------------

    def check(self) -> None:
        """Check the invariants with a client that sees everything."""
        run = self.open(faulty=False)
        union = read_union(run, max_attempts=3)
        assert self.promised <= set(union.completed), "what had a receipt is gone"
        assert {} == union.bad
        generation = owners(load_newest(run))
        assert self.winners.items() <= generation.items(), "a winner changed, or was forgotten"


def owners(union: Union) -> dict[int, tuple[Writer, str]]:
    """Return the winner of each source; no source has two."""
    assert sum(map(len, union.won.values())) == len(union.completed)
    assert BitMap().union(*union.won.values()) == union.completed
    return {source: key for key, won in union.won.items() for source in won}


def simulate(world: World) -> None:
    for _ in range(STEPS):
        world.step()
        world.check()


@pytest.mark.parametrize("block", range(5))
def test_nothing_promised_is_lost(block: int) -> None:
    """Every seed of a block runs to its end without breaking an invariant."""
    for seed in range(block * SEEDS // 5, (block + 1) * SEEDS // 5):
        try:
            simulate(World(random.Random(seed)))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def no_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the receipt without looking at the file."""
    real = fs_module._write_temporary
    last: list[bytes] = []

    def remembering(*args, **kwargs):
        last[:] = [(result := real(*args, **kwargs))[0]]
        return result

    monkeypatch.setattr(fs_module, "_write_temporary", remembering)
    monkeypatch.setattr(fs_module, "digest_of", lambda *_: last[0])


def no_file_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never sync a file."""
    handle = type(SimFileSystem().create("/x"))
    monkeypatch.setattr(handle, "sync", lambda _: None)


def no_directory_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never sync a directory."""
    monkeypatch.setattr(SimFileSystem, "sync_directory", lambda *_: None)


def receipt_despite_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a failed publish for a success."""
    real = publish

    def careless(*args, **kwargs):
        with contextlib.suppress(SharedStorageError):
            real(*args, **kwargs)

    monkeypatch.setitem(globals(), "publish", careless)


def merge_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin each merge from nothing, so that late segments take sources from their winners."""
    real = load_newest

    def forgetful(run: RunDir) -> Union:
        return Union(number=real(run).number)

    monkeypatch.setattr("hpcresume.merge.generation.load_newest", forgetful)


@pytest.mark.parametrize(
    "mutant", [no_read_back, no_file_sync, no_directory_sync, receipt_despite_error, merge_forgets]
)
def test_the_harness_catches(mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch) -> None:
    """Each known mistake breaks an invariant under some seed: the checks can fail."""
    for seed in range(SEEDS):
        world = World(random.Random(seed))
        with monkeypatch.context() as patched:
            mutant(patched)
            try:
                simulate(world)
            except AssertionError:
                return
    raise AssertionError(f"{mutant.__name__} was not caught by {SEEDS} seeds")
