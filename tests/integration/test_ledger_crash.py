"""The ledger under SIGKILL, under concurrent reading, and on a full disk."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import lmdb.verify
import pytest

from hpcresume.errors import LocalStorageError
from hpcresume.ledger.store import Batch, Ledger, LedgerIdentity
from hpcresume.segment.frame import decode_frame
from hpcresume.segment.segment import Writer
from tests.support.places import RUN_ID, child_environment, frame, run_child

IDENTITY = LedgerIdentity(RUN_ID, Writer(0, 0, 1), 1, ["a"])

WRITER = """
import os, random, sys
from pyroaring import BitMap
from hpcresume.ledger.store import Batch, InFlight, Ledger, LedgerIdentity
from hpcresume.segment.segment import Writer
from tests.support.places import RUN_ID, frame

path, first, map_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
identity = LedgerIdentity(RUN_ID, Writer(0, 0, 1), 1, ["a"])
if first:
    ledger = Ledger.open_verified(path)
else:
    ledger = Ledger.create(path, identity, map_size=map_size)
chance = random.Random(first)
source = first
while True:
    count = chance.randrange(1, 40)
    sources = range(source, source + count)
    ledger.commit(Batch(mark={source: InFlight(BitMap(sources)).encode()}))
    sequence = ledger.commit(Batch(frames=[frame(sources, rows=chance.randrange(4))],
                                   unmark=[source]))
    os.write(1, f"{sequence} {source} {source + count}\\n".encode())
    source += count
    if chance.random() < 0.1:
        os.write(1, f"releases {sequence - 5}\\n".encode())
        ledger.release(sequence - 5)
"""


def start(*args: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", WRITER, *args], stdout=subprocess.PIPE,
                            env=child_environment(), start_new_session=True)  # fmt: skip


@contextlib.contextmanager
def ended(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """End the process whatever happens."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def read_acknowledged(process: subprocess.Popen, lines: int) -> list[str]:
    """Return so many acknowledgements, kill the process, and add what it still said."""
    said = [process.stdout.readline().decode() for _ in range(lines)]
    assert all(said), "the writer ended by itself"
    os.kill(process.pid, signal.SIGKILL)
    said += process.stdout.read().decode().splitlines(keepends=True)
    # The last line may be cut; it was not acknowledged then.
    return [line.rstrip("\n") for line in said if line.endswith("\n")]


def check(path: str, acknowledged: dict[int, range], *, released: int, deaths: int) -> None:
    """What was acknowledged and not given up for release is there, whole; the file is sound."""
    assert [] == lmdb.verify.verify(path)
    ledger = Ledger.open_verified(path)
    try:
        found = {
            sequence: list(decode_frame(commit.frames[0], what="x").completed)
            for sequence, commit in ledger.pending()
        }
        last = ledger.last_sequence()
        in_flight = ledger.in_flight()
    finally:
        ledger.close()
    for sequence, sources in acknowledged.items():
        if sequence > released:
            assert list(sources) == found.get(sequence), f"commit {sequence} is lost"
    # One commit may be there whose acknowledgement was not read, and one may be under way.
    newest = max(acknowledged, default=0)
    assert newest <= last <= newest + 1
    # Each death leaves at most the one call in flight that its process had marked.
    assert len(in_flight) <= deaths


@pytest.mark.parametrize("map_size", [1 << 16, 64 << 20], ids=["growing", "large"])
def test_no_acknowledged_commit_is_lost_by_sigkill(tmp_path: Path, map_size: int) -> None:
    """
    A writer killed at 25 random moments, each time gone on with by another: after each death
    the file verifies and holds every commit that was acknowledged.
    """
    path = str(tmp_path / "ledger")
    chance = random.Random(map_size)
    acknowledged: dict[int, range] = {}
    first = released = 0
    for death in range(13 if map_size == 1 << 16 else 12):
        with ended(start(path, str(first), str(map_size))) as process:
            lines = read_acknowledged(process, chance.randrange(1, 40))
        for line in lines:
            head, *tail = line.split()
            if head == "releases":  # said before: it may be killed as soon as it has
                released = max(released, int(tail[0]))
            else:
                acknowledged[int(head)] = range(int(tail[0]), int(tail[1]))
        check(path, acknowledged, released=released, deaths=death + 1)
        # One commit may have been made without a word, of at most 40 sources.
        first = max(sources.stop for sources in acknowledged.values()) + 40
        last = newest_sequence(path)
        if last not in acknowledged:
            acknowledged[last] = sources_of(path, last)


def newest_sequence(path: str) -> int:
    ledger = Ledger.open_verified(path)
    try:
        return ledger.last_sequence()
    finally:
        ledger.close()


def sources_of(path: str, sequence: int) -> range:
    ledger = Ledger.open_verified(path)
    try:
        ((_, commit),) = ledger.pending(after=sequence - 1)
        found = decode_frame(commit.frames[0], what="x").completed
        return range(found.min(), found.max() + 1)
    finally:
        ledger.close()


def test_a_reader_follows_while_the_map_grows(tmp_path: Path) -> None:
    """
    Another process reads the ledger while its writer commits and its map grows from 64 KiB:
    each reading is whole and holds what was acknowledged before it began.
    """
    path = str(tmp_path / "ledger")
    ledger = Ledger.create(path, IDENTITY, map_size=1 << 16)
    script = """
import sys
from hpcresume.ledger.store import Ledger
ledger = Ledger(sys.argv[1], map_size=1 << 16)
print("ready", flush=True)
for line in sys.stdin:
    found = list(ledger.pending(after=int(line)))
    assert [s for s, _ in found] == list(range(int(line) + 1, int(line) + 1 + len(found)))
    assert all(set(c.frames[0]) == {s % 251} for s, c in found), "torn"
    print(found[-1][0] if found else line.strip(), flush=True)
"""
    reader = subprocess.Popen(
        [sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=child_environment(), text=True, start_new_session=True,
    )  # fmt: skip
    with ended(reader):
        assert "ready\n" == reader.stdout.readline()
        sequence = 0
        for n in range(30):
            asked = sequence
            for _ in range(5):
                size = 60_000 if n % 3 else 500
                sequence = ledger.commit(Batch(frames=[bytes([(sequence + 1) % 251]) * size]))
            reader.stdin.write(f"{asked}\n")
            reader.stdin.flush()
            assert sequence == int(reader.stdout.readline())
            if n % 4 == 3:
                ledger.release(asked)
        reader.stdin.close()
        assert 0 == reader.wait(20)
    ledger.close()


def test_readers_that_die_do_not_make_the_file_grow(tmp_path: Path) -> None:
    """Readers killed within a transaction leave slots that the next opening clears."""
    path = str(tmp_path / "ledger")
    ledger = Ledger.create(path, IDENTITY)
    ledger.commit(Batch(frames=[frame([1])]))
    ledger.close()
    script = (
        "import sys, os, signal; from hpcresume.ledger.store import Ledger;"
        "l = Ledger(sys.argv[1]); t = l._env.begin(); t.get(b'x', db=l._state);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    for _ in range(5):
        assert -signal.SIGKILL == run_child(script, path).returncode
    ledger = Ledger.open_verified(path)
    for n in range(60):
        sequence = ledger.commit(Batch(frames=[bytes([n]) * (1 << 20)]))
        ledger.release(sequence)
    ledger.close()
    assert os.path.getsize(os.path.join(path, "data.mdb")) < 16 << 20


def test_a_writer_killed_while_it_creates(tmp_path: Path) -> None:
    """
    A process killed as soon as its file appears leaves a ledger that is read, or is found
    damaged; one killed after its first acknowledgement leaves that commit.
    """
    code = (
        "import sys; from hpcresume.errors import CorruptDataError;"
        "from hpcresume.ledger.store import Ledger\n"
        "try: print('some' if any(Ledger.open_verified(sys.argv[1]).pending()) else 'none')\n"
        "except CorruptDataError: print('corrupt')"
    )
    for n in range(6):
        path = str(tmp_path / f"ledger{n}")
        with ended(start(path, "0", str(1 << 16))) as process:
            end = time.monotonic() + 20
            while not os.path.exists(os.path.join(path, "data.mdb")):
                assert time.monotonic() < end, "no ledger was created"
            acknowledged = n % 2 and process.stdout.readline()
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        result = run_child(code, path)
        assert (0, "") == (result.returncode, result.stderr)
        assert result.stdout in (("some\n",) if acknowledged else ("some\n", "none\n", "corrupt\n"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)],
                             capture_output=True, text=True, check=False)  # fmt: skip
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_keeps_what_was_committed(small_disk: Path) -> None:
    """
    On a full disk the commit raises LocalStorageError; earlier commits stay, and after they
    were released there is room again.
    """
    ledger = Ledger.create(str(small_disk / "ledger"), IDENTITY, map_size=1 << 26)
    committed: list[int] = []
    with pytest.raises(LocalStorageError, match="disk"):
        commit_until_it_fails(ledger, committed)
    assert 3 < len(committed) < 16
    assert [(s, {n}) for n, s in enumerate(committed)] == [
        (s, set(c.frames[0])) for s, c in ledger.pending()
    ]
    release_all(ledger, committed[-1])
    assert committed[-1] + 1 == ledger.commit(Batch(frames=[b"x" * 200_000]))
    ledger.close()


def commit_until_it_fails(ledger: Ledger, committed: list[int]) -> None:
    for n in range(100):
        sequence = ledger.commit(Batch(frames=[bytes([n]) * 200_000]))
        committed.append(sequence)


def release_all(ledger: Ledger, last: int) -> None:
    """Release commits one by one, as receipts come."""
    for sequence in range(1, last + 1):
        ledger.release(sequence)


def test_a_full_disk_when_the_ledger_is_created(small_disk: Path) -> None:
    """No room for a new ledger is a LocalStorageError that names the directory."""
    (small_disk / "filler").write_bytes(bytes((3 << 20) - 8192))
    with pytest.raises(LocalStorageError, match="ledger"):
        Ledger.create(str(small_disk / "ledger"), IDENTITY)
