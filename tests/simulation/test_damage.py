"""Damage, byte by byte: a typed error, set aside, computed again; never part of a result."""

from __future__ import annotations

import errno
import hashlib
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpcresume.errors import CorruptDataError, HpcResumeError, RunDirError
from hpcresume.ledger.store import Batch, InFlight, Ledger, LedgerIdentity
from hpcresume.merge.generation import load_newest, read_union, write_generation
from hpcresume.merge.plan import newest_plan
from hpcresume.output.rows import BadSegmentError, spans, take_back_segment
from hpcresume.run.directory import RunDir, SegmentName
from hpcresume.run.manifest import Listing, Manifest, write_indexed_part, write_part
from hpcresume.segment.container import MAGIC
from hpcresume.segment.segment import Writer
from hpcresume.task.recovery import publish_dead
from tests.simulation.simulation import submitted
from tests.support.places import (
    RUN_ID,
    frame,
    make_directories,
    make_run,
    publish_segment,
    row,
    run_child,
    segment_bytes,
    segment_name,
    write_file,
)
from tests.support.simfs import SimFileSystem

SOURCES = 6
SPOILT, WHOLE = (0, 1, 2), (3, 4)


@pytest.fixture
def run() -> RunDir:
    """A run whose sources 0 to 4 are published in two segments."""
    made = make_run(SimFileSystem(), "/run")
    write_indexed_part(made, 1, first=0, count=SOURCES)
    publish_segment(made, (0, 0, 1), 1, SPOILT)
    publish_segment(made, (0, 1, 1), 1, WHOLE)
    return made


@pytest.fixture
def spoilt() -> SegmentName:
    """The segment that is damaged."""
    return segment_name((0, 0, 1), 1)


def collected(run: RunDir) -> dict[int, bytes]:
    """Return the rows of the result by source, as `collect` and the merge step see to it."""
    while True:
        union = read_union(run, max_attempts=3)
        try:
            found = list(spans(run, union, Manifest.open(run)))
        except BadSegmentError as error:
            take_back_segment(run, error)
            continue
        return {each.source: each.rows[0] + b"\n" for span in found for each in span.each()}


def rows(*sources: int) -> dict[int, bytes]:
    return {source: row(source) for source in sources}


def damages(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield every flipped byte, every truncation, and what else befalls files."""
    for at in range(len(whole)):
        for mask in (0x01, 0x80, 0xFF):
            yield f"byte {at} ^ {mask}", whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :]
    for length in range(len(whole)):
        yield f"{length} bytes", whole[:length]
    yield "twice", whole * 2
    yield "a byte more", whole + b"\0"
    yield "zeros", bytes(len(whole))
    yield "another run's", segment_bytes([SPOILT], run_id="f" * 16)
    yield "another writer's", segment_bytes([SPOILT], writer=Writer(7, 0, 1))
    for length in (0, 1, len(whole), 1 << 31, 1 << 62, (1 << 64) - 1):
        yield f"footer of {length}", whole[:-16] + struct.pack("<Q", length) + MAGIC


def test_no_damage_reaches_a_result(run: RunDir, spoilt: SegmentName) -> None:
    """
    Whatever becomes of a segment's bytes: the union is read, the other segment counts, the
    result holds right rows only; and once the bytes are whole, they count again.
    """
    path = run.segment_path(spoilt)
    whole = run.fs.read(path)
    for what, damaged in damages(whole):
        write_file(run.fs, path, damaged)
        assert rows(*WHOLE) == collected(run), what
    write_file(run.fs, path, whole)
    assert rows(*SPOILT, *WHOLE) == collected(run)


def test_damage_after_the_merge(run: RunDir, spoilt: SegmentName) -> None:
    """A segment that goes bad after a generation counted it: its sources are owed again."""
    write_generation(run, read_union(run, max_attempts=3))
    path = run.segment_path(spoilt)
    whole = run.fs.read(path)
    for at in range(0, len(whole), 7):
        write_file(run.fs, path, whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        assert rows(*WHOLE) == collected(run), at
        # What was lost is owed, and no generation says otherwise.
        assert set(WHOLE) == set(load_newest(run).completed), at
        write_file(run.fs, path, whole)
        assert rows(*SPOILT, *WHOLE) == collected(run), at
        write_generation(run, read_union(run, max_attempts=3))


def test_a_segment_forged_with_digests_that_fit(run: RunDir, spoilt: SegmentName) -> None:
    """A footer that lists more than its chunks hold is found out, and does not come back."""
    forged = forge(segment_bytes([SPOILT]), more=5)
    write_file(run.fs, run.segment_path(spoilt), forged)
    for _ in range(2):
        assert rows(*WHOLE) == collected(run)
        write_generation(run, read_union(run, max_attempts=3))


def forge(whole: bytes, *, more: int) -> bytes:
    """Return a segment whose footer says that it completes one source more."""
    from hpcresume.segment import bitmap as bitmaps

    (length,) = struct.unpack("<Q", whole[-16:-8])
    start = len(whole) - 48 - length
    entries, digest, inner = msgspec.msgpack.decode(whole[start : start + length])
    footer = msgspec.msgpack.decode(inner)
    listed = bitmaps.load(footer["completed"], what="x")
    listed.add(more)
    footer["completed"] = bitmaps.dump(listed)
    data = msgspec.msgpack.encode([entries, digest, msgspec.msgpack.encode(footer)])
    trailer = hashlib.sha256(data).digest() + struct.pack("<Q", len(data)) + MAGIC
    return whole[:start] + data + trailer


@pytest.mark.parametrize("name", ["generation", "plan", "manifest", "run.json", "claim"])
def test_damage_to_any_file_is_typed(name: str) -> None:
    """
    Every byte of every other file of a run: a merge goes on without it, or says what is
    damaged; no other exception, and no other sources.
    """
    server = submitted(SOURCES, 2).clone()
    run = RunDir.open("/shared/run", SimFileSystem(server))
    publish_segment(run, (0, 0, 1), 1, SPOILT)
    write_generation(run, read_union(run, max_attempts=3))
    run.claim_round(0, "101")
    path = {
        "generation": run.generation_path(1),
        "plan": run.plan_path(0),
        "manifest": run.part_path(1),
        "run.json": run.join("run.json"),
        "claim": run.round_path(0, "claim"),
    }[name]
    whole = run.fs.read(path)
    for at in range(len(whole)):
        write_file(run.fs, path, whole[:at] + bytes([whole[at] ^ 0x21]) + whole[at + 1 :])
        read_everything(run)
    for length in range(0, len(whole), 5):
        write_file(run.fs, path, whole[:length])
        read_everything(run)


def read_everything(run: RunDir) -> None:
    """Read a run as a merge does; what it says is right, or a typed error."""
    try:
        again = RunDir.open(run.path, run.fs)
        if again.run_id != run.run_id:
            return  # run.json has no digest: every other file is another run's then
        manifest, plan = Manifest.open(again), newest_plan(again)
        again.claim_round(0, "101")
        union = read_union(again, max_attempts=3)
    except HpcResumeError:
        return
    assert SOURCES == manifest.total
    assert set(SPOILT) == set(union.completed)
    assert plan is None or [SOURCES, 2] == [plan.footer.sources, plan.footer.tasks]


def test_a_segment_that_cannot_be_read_for_now(run: RunDir) -> None:
    """EIO on one segment leaves it out of this union, and not out of the next."""
    run.fs.fail("read", errno.EIO, contains="tasks/00000")
    assert set(WHOLE) == set(read_union(run, max_attempts=3).completed)
    assert {*SPOILT, *WHOLE} == set(read_union(run, max_attempts=3).completed)


# -- ledgers ----------------------------------------------------------------------------------

CATALOGUE = """
import os, shutil, struct, sys
from hpcresume.errors import CorruptDataError
from hpcresume.ledger.store import Ledger

source, work = sys.argv[1], sys.argv[2]
whole = open(os.path.join(source, "data.mdb"), "rb").read()
PAGE = 4096

def forgeries():
    for page in range(len(whole) // PAGE):
        base = page * PAGE
        header = whole[base:base + PAGE]
        if not any(header):
            continue
        # page number, flags, lower and upper bound or number of overflow pages
        for at, size in ((0, 8), (10, 2), (12, 2), (14, 2), (12, 4)):
            for value in (0, 1, 7, 0x7FFF, (1 << 8 * size) - 1):
                yield base + at, value.to_bytes(size, "little")
        # offsets of nodes, and what stands where nodes may be: sizes, flags, key sizes
        for at in range(16, 48, 2):
            for value in (0, 15, 4095, 0xFFFF):
                yield base + at, struct.pack("<H", value)
        for at in range(PAGE - 160, PAGE, 2):
            for value in (0xFFFF,):
                yield base + at, struct.pack("<H", value)
    for page in (0, 1):
        # a meta page: magic, version, size of the map, both trees' records, transaction
        for at in range(16, 160, 4):
            for value in (0, 1, 0x7FFFFFFF, 0xFFFFFFFF):
                yield page * PAGE + at, struct.pack("<I", value)

count = 0
for at, data in forgeries():
    if at + len(data) > len(whole):
        continue
    place = os.path.join(work, "d")
    shutil.rmtree(place, ignore_errors=True)
    os.mkdir(place)
    with open(os.path.join(place, "data.mdb"), "wb") as file:
        file.write(whole[:at] + data + whole[at + len(data):])
    print(at, data.hex(), flush=True)
    try:
        ledger = Ledger.open_verified(place)
    except CorruptDataError:
        count += 1
        continue
    try:
        found = [frame for _, commit in ledger.pending() for frame in commit.frames]
        ledger.in_flight(), ledger.state(), ledger.last_sequence()
        known = {b.split(b"|")[0] for b in found}
        assert known <= {b"one", b"two", b"three"}, known
    except CorruptDataError:
        count += 1
    finally:
        ledger.close()
print("refused", count)
"""


def fill(path: str) -> None:
    """Write a ledger with a few commits, one of them larger than a page."""
    ledger = Ledger.create(path, LedgerIdentity(RUN_ID, Writer(0, 0, 1), 1, ["a"]))
    from pyroaring import BitMap

    ledger.commit(Batch(frames=[b"one|"], mark={1: InFlight(BitMap([1])).encode()}))
    ledger.commit(Batch(frames=[b"two|" + bytes(9000)]))
    ledger.commit(Batch(frames=[b"three|"], unmark=[1]))
    ledger.close()


def test_forged_ledgers_never_reach_the_engine(tmp_path: Path) -> None:
    """
    Headers, bounds, node tables, metas and tree records forged one by one, in a process of
    their own: it lives, and what it reads was committed, or the ledger is refused.
    """
    source, work = tmp_path / "ledger", tmp_path / "work"
    fill(str(source))
    work.mkdir()
    result = run_child(CATALOGUE, str(source), str(work), timeout_s=250)
    last = result.stdout.splitlines()[-1:]
    assert 0 == result.returncode, f"{last}: {result.stderr[-500:]}"
    assert int(last[0].split()[1]) > 100


@pytest.mark.parametrize("damage", ["value", "structure"])
def test_a_dead_attempts_damaged_ledger_is_set_aside(tmp_path: Path, damage: str) -> None:
    """Whether verifying or reading finds it: nothing of it is published, once and for all."""
    run = make_run(SimFileSystem(), "/run")
    directory = tmp_path / "0-0-1"
    path = directory / "ledger"
    ledger = Ledger.create(str(path), LedgerIdentity(RUN_ID, Writer(0, 0, 1), 1, ["a"]))
    ledger.commit(Batch(frames=[frame([1, 2])]))
    ledger.close()
    file = path / "data.mdb"
    data = file.read_bytes()
    if damage == "value":
        assert data.count(row(1)) == 1
        file.write_bytes(data.replace(row(1), row(7)))
    else:
        file.write_bytes(data[: len(data) // 2])

    assert 0 == publish_dead(run, str(directory))

    assert not path.exists()
    assert (directory / "ledger.damaged").exists()
    assert [] == [name for ref in run.all_attempts() for name in run.segments(ref)]
    assert 0 == publish_dead(run, str(directory))
    shutil.rmtree(directory)


# -- any bytes --------------------------------------------------------------------------------


def manifest_bytes() -> bytes:
    run = make_run(SimFileSystem(), "/run")
    write_part(run, 1, first=0, listing=Listing([(f"s{i}", b"p", 1.0) for i in range(5)]))
    return run.fs.read(run.part_path(1))


MANIFEST, SEGMENT = manifest_bytes(), segment_bytes([(1, 2), (3,)])
edits = st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=8), st.integers(0, 8)),
                 min_size=1, max_size=4)  # fmt: skip


def edited(data: bytes, changes: list[tuple[int, bytes, int]]) -> bytes:
    """Return data with pieces replaced."""
    for where, piece, gone in changes:
        at = where % (len(data) + 1)
        data = data[:at] + piece + data[at + gone :]
    return data


def resealed(data: bytes) -> bytes:
    """Return data with a footer digest that fits, so that what is inside is read."""
    if len(data) < 64:
        return data
    (length,) = struct.unpack("<Q", data[-16:-8])
    if length > len(data) - 64:
        return data
    footer = data[len(data) - 48 - length : -48]
    return data[:-48] + hashlib.sha256(footer).digest() + data[-16:]


@settings(max_examples=300, derandomize=True, database=None,
          suppress_health_check=list(HealthCheck), deadline=None)  # fmt: skip
@given(changes=edits, seal=st.booleans())
def test_any_manifest_is_read_or_refused(changes, seal: bool) -> None:
    """
    A manifest with pieces replaced is refused with a typed error; one that was forged, with a
    digest that fits, may hold other sources, and raises nothing worse.
    """
    run = make_run(SimFileSystem(), "/run")
    data = edited(MANIFEST, changes)
    write_file(run.fs, run.part_path(1), resealed(data) if seal else data)
    try:
        manifest = Manifest.open(run)
        assert manifest.total == sum(1 for _ in manifest.entries(range(min(manifest.total, 9))))
        manifest.withdrawn()
        for part in manifest.parts:
            part.digests()
    except (CorruptDataError, RunDirError):
        return
    except (AssertionError, IndexError):
        assert seal, "damage that no digest found"


@settings(max_examples=300, derandomize=True, database=None,
          suppress_health_check=list(HealthCheck), deadline=None)  # fmt: skip
@given(changes=edits, seal=st.booleans())
def test_any_segment_is_merged_whole_or_set_aside(changes, seal: bool) -> None:
    """A segment with pieces replaced, its digest made to fit or not, never stops a merge."""
    run = make_run(SimFileSystem(), "/run")
    name = segment_name((0, 0, 1), 1)
    make_directories(run.fs, run.attempt_path(name.attempt))
    data = edited(SEGMENT, changes)
    write_file(run.fs, run.segment_path(name), resealed(data) if seal else data)
    union = read_union(run, max_attempts=3)
    assert set(union.completed) <= {1, 2, 3} or seal
    assert bool(union.won) != bool(union.bad)
