"""The ledger's LMDB: commits, marks, growth, and damage that never reaches the engine."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import lmdb.verify
import pytest
from pyroaring import BitMap

from hpcresume.errors import CorruptDataError, LocalStorageError
from hpcresume.ledger.local_disk import check_local, file_system_kind
from hpcresume.ledger.store import (
    Batch,
    InFlight,
    Ledger,
    LedgerIdentity,
    LedgerState,
    set_aside,
)
from hpcresume.segment.segment import Progress, StageCount, Writer
from tests.support.places import RUN_ID, failure, frame, run_child

IDENTITY = LedgerIdentity(RUN_ID, Writer(0, 3, 2), 1, ["a", "b"])


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "ledger")


@pytest.fixture
def ledger(path: str):
    opened = Ledger.create(path, IDENTITY)
    yield opened
    opened.close()


def sequences(ledger: Ledger, **how) -> list[int]:
    return [sequence for sequence, _ in ledger.pending(**how)]


def held(*sources: int, alone: bool = False) -> bytes:
    return InFlight(BitMap(sources), alone=alone).encode()


# -- commits ----------------------------------------------------------------------------------


def test_a_new_ledger_is_empty(ledger: Ledger) -> None:
    """It knows whose it is and holds nothing."""
    assert (IDENTITY, [], [], 0) == (
        ledger.identity(), sequences(ledger), ledger.in_flight(), ledger.last_sequence(),
    )  # fmt: skip
    assert LedgerState() == ledger.state()


def test_commits_are_pending_in_order(ledger: Ledger) -> None:
    """Frames and failures come back as committed, numbered from 1."""
    assert 1 == ledger.commit(Batch(frames=[frame([1]), frame([2])]))
    assert 2 == ledger.commit(Batch(failures=[failure(3)]))
    (_, first), (_, second) = ledger.pending()
    assert ([frame([1]), frame([2])], []) == (first.frames, first.failures)
    assert ([], [failure(3)]) == (second.frames, second.failures)
    assert (2, [2], []) == (ledger.last_sequence(), sequences(ledger, after=1),
                            sequences(ledger, after=2))  # fmt: skip


def test_a_batch_without_results_is_no_commit(ledger: Ledger) -> None:
    """Marks and counters alone take no number."""
    ledger.commit(Batch(frames=[frame([1])]))
    state = LedgerState([StageCount("a", 5, 4, 1)], Progress(completed=4))
    assert 1 == ledger.commit(Batch(mark={7: held(1)}, state=state))
    assert (1, state) == (ledger.last_sequence(), ledger.state())


def test_released_commits_are_gone_and_their_numbers_too(ledger: Ledger) -> None:
    """After a receipt the commits are deleted; numbers go on, also when all are released."""
    for source in range(4):
        ledger.commit(Batch(frames=[frame([source])]))
    ledger.release(2)
    assert [3, 4] == sequences(ledger)
    ledger.release(4)
    assert ([], 4) == (sequences(ledger), ledger.last_sequence())
    ledger.release(1)
    assert 4 == ledger.last_sequence()
    assert 5 == ledger.commit(Batch(frames=[frame([9])]))


def test_pending_stops_at_a_size(ledger: Ledger) -> None:
    """No further commit is begun beyond the limit; the rest comes with the next call."""
    for source in range(5):
        ledger.commit(Batch(frames=[frame([source]) * 50]))
    size = sum(len(f) for _, commit in ledger.pending() for f in commit.frames) // 5
    first = sequences(ledger, limit_bytes=2 * size)
    assert [1, 2] == first
    assert [3, 4, 5] == sequences(ledger, after=first[-1], limit_bytes=1 << 30)
    assert [1] == sequences(ledger, limit_bytes=1)


def test_marks_say_what_is_in_flight(ledger: Ledger) -> None:
    """A chunk is in flight from its mark until it is unmarked, results or not."""
    since = InFlight(BitMap([1, 2]), since=12.5)
    ledger.commit(Batch(mark={1: since.encode(), 2: held(3, alone=True)}))
    assert [since, InFlight(BitMap([3]), alone=True)] == ledger.in_flight()
    ledger.commit(Batch(frames=[frame([1, 2])], unmark=[1]))
    ledger.commit(Batch(unmark=[99]))
    assert [InFlight(BitMap([3]), alone=True)] == ledger.in_flight()


def test_a_message_that_is_no_unicode_is_kept_readable(ledger: Ledger) -> None:
    """User code may raise with a file name that is not UTF-8; the commit does not fail."""
    ledger.commit(Batch(frames=[frame([1])], failures=[failure(2, message="no \udcff.txt")]))
    ((_, commit),) = ledger.pending()
    assert ("no \\udcff.txt", 2) == (commit.failures[0].message, commit.failures[0].source)


def test_files_are_private(path: str, ledger: Ledger) -> None:
    """Nothing of the ledger can be read by others."""
    assert 0o700 == stat.S_IMODE(os.stat(path).st_mode)
    for name in os.listdir(path):
        assert 0 == stat.S_IMODE(os.stat(os.path.join(path, name)).st_mode) & 0o077


def test_a_taken_place_is_refused(path: str, ledger: Ledger) -> None:
    """No two attempts share a ledger."""
    with pytest.raises(LocalStorageError):
        Ledger.create(path, IDENTITY)


# -- growth -----------------------------------------------------------------------------------


@pytest.mark.parametrize("map_size", [1 << 15, 1 << 16, 1 << 20])
def test_the_map_grows_from_tiny(path: str, map_size: int) -> None:
    """However small the map begins, commits larger than it fit, and all are there."""
    ledger = Ledger.create(path, IDENTITY, map_size=map_size)
    for n in range(8):
        assert n + 1 == ledger.commit(Batch(frames=[bytes([n]) * (200_000 * (n % 3) + 10)]))
    lengths = [(s, len(c.frames[0]), set(c.frames[0])) for s, c in ledger.pending()]
    ledger.close()
    assert [(n + 1, 200_000 * (n % 3) + 10, {n}) for n in range(8)] == lengths
    assert [] == lmdb.verify.verify(path)


def test_the_file_stays_as_small_as_what_is_at_risk(path: str, ledger: Ledger) -> None:
    """A hundred commits of 1 MiB, each released: the file does not grow with their sum."""
    for n in range(100):
        ledger.commit(Batch(frames=[bytes([n]) * (1 << 20)]))
        ledger.release(n + 1)
    assert os.path.getsize(os.path.join(path, "data.mdb")) < 16 << 20


def test_no_space_to_grow_is_typed(path: str, monkeypatch) -> None:
    """Where the disk has no room for a larger map: LocalStorageError, earlier commits intact."""
    ledger = Ledger.create(path, IDENTITY, map_size=1 << 18)
    ledger.commit(Batch(frames=[frame([1])]))
    usage = type(shutil.disk_usage(path))(100, 99, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(LocalStorageError, match="needs to grow"):
        ledger.commit(Batch(frames=[b"x" * (1 << 20)]))
    assert [1] == sequences(ledger)
    monkeypatch.undo()
    assert 2 == ledger.commit(Batch(frames=[b"x" * (1 << 20)]))
    ledger.close()


# -- opening again ----------------------------------------------------------------------------


def fill(path: str, *, before_last: str = "") -> None:
    """
    Leave a ledger with commits, marks and counters, as a dead driver does; on request with a
    copy as of before the last transaction.
    """
    ledger = Ledger.create(path, IDENTITY)
    for n in range(20):
        ledger.commit(Batch(frames=[frame(range(n * 10, n * 10 + 10), rows=3)], mark={n: held(n)}))
    ledger.commit(Batch(failures=[failure(999)], state=LedgerState([StageCount("a")])))
    if before_last:
        os.mkdir(before_last)
        shutil.copy(os.path.join(path, "data.mdb"), before_last)
    ledger.release(3)
    ledger.close()


def test_a_ledger_is_opened_again(path: str) -> None:
    """Another process finds everything that was committed and goes on numbering."""
    fill(path)
    ledger = Ledger.open_verified(path)
    assert IDENTITY == ledger.identity()
    assert list(range(4, 22)) == sequences(ledger)
    assert 20 == len(ledger.in_flight())
    assert 22 == ledger.commit(Batch(frames=[frame([1])]))
    ledger.close()


def test_no_ledger_at_all(path: str) -> None:
    """A directory that is missing, or holds no file, is damaged."""
    with pytest.raises(CorruptDataError):
        Ledger.open_verified(path)
    os.mkdir(path)
    with pytest.raises(CorruptDataError):
        Ledger.open_verified(path)


def test_a_ledger_that_does_not_say_whose_it_is(path: str) -> None:
    """A database without an identity is damaged, and is closed again: it can be set aside."""
    os.mkdir(path)
    Ledger(path).close()
    for _ in range(2):
        with pytest.raises(CorruptDataError, match=r"whose|CRC"):
            Ledger.open_verified(path)
    assert f"{path}.damaged" == set_aside(path)
    assert not os.path.exists(path)


READ_ALL = """
import sys
from hpcresume.errors import CorruptDataError
from hpcresume.ledger.store import Ledger
try:
    ledger = Ledger.open_verified(sys.argv[1])
    commits = list(ledger.pending())
    ledger.in_flight(), ledger.state(), ledger.last_sequence()
except CorruptDataError:
    print("corrupt")
else:
    print("read", len(commits))
"""


def truncate(length: int):
    return lambda data: data[:length]


def zero(start: int, length: int):
    return lambda data: data[:start] + bytes(length) + data[start + length :]


@pytest.mark.parametrize(
    "damage",
    [
        truncate(0), truncate(1), truncate(4096), truncate(3 * 4096), truncate(-4096),
        truncate(-1), zero(0, 4096), zero(4096, 4096), zero(0, 8192), zero(8192, 10 * 4096),
        lambda data: b"garbage" * 10_000, lambda data: bytes(len(data)),
    ],
)  # fmt: skip
def test_a_damaged_file_never_kills_the_process(path: str, damage) -> None:
    """
    Truncated, zeroed or replaced (each is a SIGBUS, a SIGABRT or a silent empty database in
    the engine): CorruptDataError, or all commits where the damage hit nothing in use.
    """
    fill(path)
    file = Path(path, "data.mdb")
    file.write_bytes(damage(file.read_bytes()))
    result = run_child(READ_ALL, path)
    assert (0, "") == (result.returncode, result.stderr)
    assert result.stdout in ("corrupt\n", "read 18\n")
    if damage(b"x") == b"" or len(damage(b"x" * 100_000)) < 10_000:
        assert "corrupt\n" == result.stdout


def test_a_flipped_bit_in_a_value_is_found(path: str) -> None:
    """The engine reads it and its verifier sees nothing; the CRC of the commit tells."""
    fill(path)
    file = Path(path, "data.mdb")
    data = file.read_bytes()
    needle = b'{"source":100,"n":1}'
    assert needle in data
    file.write_bytes(data.replace(needle, b'{"source":100,"n":9}'))
    assert [] == lmdb.verify.verify(path)
    ledger = Ledger.open_verified(path)
    with pytest.raises(CorruptDataError, match="CRC"):
        list(ledger.pending())
    ledger.close()


@pytest.mark.parametrize("wrong", [b'"epoch":3', b'"epoch":1'])
def test_a_flipped_bit_in_the_identity_is_found(path: str, wrong: bytes) -> None:
    """A ledger that would be published under another attempt's name is damaged."""
    fill(path)
    file = Path(path, "data.mdb")
    data = file.read_bytes()
    right = b'"writer":[0,3,2]'
    assert right in data
    file.write_bytes(data.replace(right, right.replace(b"2]", wrong[-1:] + b"]")))
    with pytest.raises(CorruptDataError):
        Ledger.open_verified(path)


FUZZ = """
import os, random, shutil, sys
source, before, work, seed, rounds = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
from hpcresume.errors import CorruptDataError
from hpcresume.ledger.store import Ledger

def read(path):
    ledger = Ledger.open_verified(path)
    found = [(s, c.frames, c.failures) for s, c in ledger.pending()]
    return (found, ledger.in_flight(), ledger.state(), ledger.identity(), ledger.last_sequence())

def child(path, expected):
    try:
        return 0 if repr(read(path)) in expected else 3
    except CorruptDataError:
        return 0

def expect(source, name):
    # The engine is never opened in this process: children of it are forked.
    path = os.path.join(work, name)
    os.makedirs(path)
    shutil.copy(os.path.join(source, "data.mdb"), path)
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        with os.fdopen(write_end, "w") as out:
            out.write(repr(read(path)))
        os._exit(0)
    os.close(write_end)
    text = os.fdopen(read_end).read()
    os.wait()
    return text

whole = open(os.path.join(source, "data.mdb"), "rb").read()
chance = random.Random(seed)
expected = (expect(source, "last"), expect(before, "before"))
assert all(expected) and expected[0] != expected[1]
for n in range(rounds):
    data = bytearray(whole)
    for _ in range(chance.choice((1, 1, 2, 8))):
        page = chance.randrange(len(data) // 4096)
        page = chance.choice((page, chance.randrange(2)))
        at = page * 4096 + chance.randrange(chance.choice((64, 192, 4096)))
        data[at] ^= 1 << chance.randrange(8)
    place = os.path.join(work, "d")
    shutil.rmtree(place, ignore_errors=True); os.mkdir(place)
    open(os.path.join(place, "data.mdb"), "wb").write(data)
    pid = os.fork()
    if pid == 0:
        try:
            code = child(place, expected)
        except BaseException as error:
            print(n, repr(error), file=sys.stderr); code = 4
        os._exit(code)
    _, status = os.waitpid(pid, 0)
    if status:
        shutil.copytree(place, f"{work}/bad-{n}")
        print("round", n, "status", status); sys.exit(1)
print("fine")
"""


def test_flipped_bits_anywhere_are_found_or_do_no_harm(path: str, tmp_path: Path) -> None:
    """
    Bits flipped anywhere in the file, 250 times: everything is read as committed, or
    CorruptDataError; no signal, no other exception, nothing changed, nothing invented.  A
    flip in the transaction number of a meta page, which has no checksum, takes the file back
    by one transaction, whole: what that held is computed again.
    """
    before = str(tmp_path / "before")
    fill(path, before_last=before)
    result = run_child(FUZZ, path, before, str(tmp_path / "work"), "1", "250", timeout_s=200)
    assert ("fine\n", "") == (result.stdout, result.stderr)


# -- where it may lie -------------------------------------------------------------------------


def test_the_kind_of_a_file_system_is_known(tmp_path: Path) -> None:
    """The kind is one that Linux mounts; for /proc it is proc."""
    assert "proc" == file_system_kind("/proc/self")
    assert "unknown" != file_system_kind(str(tmp_path))


@pytest.mark.parametrize("kind", ["nfs4", "lustre", "gpfs", "beegfs", "cifs", "fuse.sshfs", "9p"])
def test_shared_file_systems_are_refused(tmp_path: Path, monkeypatch, kind: str) -> None:
    """LMDB corrupts its file on them; the error names the kind and the option."""
    monkeypatch.setattr("hpcresume.ledger.local_disk.file_system_kind", lambda _: kind)
    with pytest.raises(LocalStorageError, match=f"{kind}.*--local-dir"):
        check_local(str(tmp_path))


def test_local_disks_are_accepted_with_enough_space(tmp_path: Path) -> None:
    """The test's own directory will do; more than the disk has is refused; so is no directory."""
    check_local(str(tmp_path), need_bytes=1)
    with pytest.raises(LocalStorageError, match="MiB left"):
        check_local(str(tmp_path), need_bytes=1 << 60)
    with pytest.raises(LocalStorageError, match="cannot use"):
        check_local(str(tmp_path / "none"))


def test_a_mount_point_with_a_space_is_recognised(monkeypatch, tmp_path: Path) -> None:
    """The kernel escapes it; a shared file system mounted there is not taken for the root's."""
    target = tmp_path / "my data"
    target.mkdir()
    mounts = tmp_path / "mountinfo"
    escaped = str(target).replace(" ", "\\040")
    mounts.write_text(
        "21 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n"
        f"40 21 0:40 / {escaped} rw shared:9 - nfs4 server:/x rw\n"
    )
    real_open = open
    monkeypatch.setattr(
        "builtins.open",
        lambda file, *a, **k: real_open(
            mounts if file == "/proc/self/mountinfo" else file, *a, **k
        ),
    )
    assert "nfs4" == file_system_kind(str(target))
