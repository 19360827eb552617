"""Publishing rows as parts: whole, before their segment, or not at all."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hpcresume.errors import CorruptDataError, LocalStorageError, SharedStorageError
from hpcresume.fs import digest_of
from hpcresume.ledger import parts
from hpcresume.ledger.group_commit import GroupCommitter
from hpcresume.ledger.store import Batch, StoredBlob
from hpcresume.merge.generation import read_union
from hpcresume.run.directory import AttemptRef
from hpcresume.segment.frame import blob_of
from hpcresume.sinks import packing
from tests.support.cli import wait_until
from tests.support.parts import PartsAttempt, pack, rows_of
from tests.support.places import Place

REF = AttemptRef(0, 3, 2)


@pytest.fixture(params=["jsonl", "parquet"])
def form(request) -> str:
    return request.param


@pytest.fixture(params=["posix", "sim"])
def attempt(request, form: str, tmp_path: Path):
    made = PartsAttempt(Place.make(request.param, tmp_path).run(), REF, tmp_path / "local", form)
    yield made
    made.ledger.close()


@pytest.fixture
def sim(form: str, tmp_path: Path):
    made = PartsAttempt(Place.make("sim", tmp_path).run(), REF, tmp_path / "local", form)
    yield made
    made.ledger.close()


def content(attempt: PartsAttempt, name: str) -> list[dict]:
    """Return a part's rows."""
    data = attempt.run.fs.read(attempt.run.attempt_path(REF, name))
    if name.endswith(".parquet"):
        return pq.read_table(io.BytesIO(data)).to_pylist()
    import json

    return [json.loads(line) for line in data.splitlines()]


def test_one_part_holds_the_rows_of_all_commits(attempt: PartsAttempt) -> None:
    """The part has every row in the order of the commits, and the segment names its digest."""
    attempt.commit([1, 2], [5])
    attempt.commit([3])

    receipt = attempt.publish()

    segment, (name,) = attempt.segment(receipt), attempt.parts()
    assert ([1, 2, 3, 5], 4) == (list(segment.completed), receipt.sources)
    assert rows_of([1, 2, 5, 3]) == content(attempt, name)
    path = attempt.run.attempt_path(REF, name)
    part = segment.footer.part
    assert (name, attempt.run.fs.size(path), digest_of(attempt.run.fs, path)) == (
        part.name, part.size_bytes, part.digest,
    )  # fmt: skip


def test_a_publication_leaves_two_files(attempt: PartsAttempt) -> None:
    """However many commits it takes: one part, and the segment that refers to it."""
    for number in range(1, 4):
        attempt.commit([10 * number], [10 * number + 1])
        attempt.commit([10 * number + 2])
        attempt.publish(number)
        assert 2 * number == len(attempt.run.fs.listdir(attempt.run.attempt_path(REF)))


def test_sources_without_rows_need_no_part(attempt: PartsAttempt) -> None:
    """They are completed by the segment alone."""
    attempt.commit([1, 2], rows=0)
    receipt = attempt.publish()
    assert ([1, 2], [], None) == (
        list(attempt.segment(receipt).completed),
        attempt.parts(),
        attempt.segment(receipt).footer.part,
    )


def test_a_part_ends_at_its_size(attempt: PartsAttempt) -> None:
    """No further commit is begun beyond the size; the rest goes into the next part."""
    for source in (1, 2, 3):
        attempt.commit([source])
    first = attempt.publish(1, max_bytes=1)
    second = attempt.publish(2, after=first.last)
    assert [[1], [2, 3]] == [list(attempt.segment(r).completed) for r in (first, second)]
    assert [rows_of([1]), rows_of([2, 3])] == [content(attempt, n) for n in attempt.parts()]


def test_a_lost_receipt_leaves_a_part_that_nobody_refers_to(attempt: PartsAttempt) -> None:
    """The same commits go out again as another part; each source counts in one of them."""
    attempt.commit([1, 2])
    receipts = [attempt.publish() for _ in range(2)]
    assert 2 == len(attempt.parts())
    union = read_union(attempt.run, max_attempts=3)
    assert [0, 2] == sorted(map(len, union.won.values()))
    assert 2 == len({attempt.segment(receipt).footer.part.name for receipt in receipts})


@pytest.mark.parametrize("step", ["create", "write", "sync", "close", "rename", "sync_directory"])
def test_a_refusal_of_shared_storage_loses_nothing(
    sim: PartsAttempt, monkeypatch, step: str
) -> None:
    """No segment is published without its part; the next call publishes both."""
    sim.commit([1, 2])
    refuse_once(sim, monkeypatch, step)
    with pytest.raises(SharedStorageError):
        sim.publish()
    assert [] == list(read_union(sim.run, max_attempts=3).completed)

    receipt = sim.publish()

    assert [1, 2] == list(sim.segment(receipt).completed)


def refuse_once(attempt: PartsAttempt, monkeypatch, step: str) -> None:
    """Let one call of the run directory's file system fail."""
    fs, left = attempt.run.fs, [1]

    def once(call):
        def failing(*arguments, **keywords):
            if left and left.pop():
                raise OSError(28, "No space left on device")
            return call(*arguments, **keywords)

        return failing

    if step in ("write", "sync", "close"):
        create = fs.create

        def wrapped(path: str):
            handle = create(path)
            monkeypatch.setattr(handle, step, once(getattr(handle, step)), raising=False)
            return handle

        monkeypatch.setattr(fs, "create", wrapped)
    else:
        monkeypatch.setattr(fs, step, once(getattr(fs, step)))


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_blob_is_never_published(sim: PartsAttempt, damage: str) -> None:
    """A blob that is not what the ledger says stops the publication; nothing of it is listed."""
    sim.commit([1])
    (path,) = (p for p in sim.root.iterdir() if p.name != "schema")
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptDataError, match=path.name):
        sim.publish()
    assert [] == sim.parts()
    assert [] == list(read_union(sim.run, max_attempts=3).completed)


def test_a_damaged_part_is_noticed(sim: PartsAttempt) -> None:
    """A flipped byte in a part fails the frame that holds it, and the whole."""
    sim.commit([1])
    receipt = sim.publish()
    segment = sim.segment(receipt)
    path = segment.part_path()
    data = bytearray(sim.run.fs.read(path))
    data[6] ^= 1
    sim.run.fs.unlink(path)
    handle = sim.run.fs.create(path)
    handle.write(bytes(data))
    handle.close()
    with pytest.raises(CorruptDataError, match="CRC"):
        segment.read_blob(segment.frame(0))
    with pytest.raises(CorruptDataError, match="digest"):
        segment.verify()


def test_a_commit_needs_its_blob(sim: PartsAttempt) -> None:
    """A blob that cannot be synced is not committed, so nothing names rows that are not there."""
    encoded = pack(sim.packer, [1])
    with pytest.raises(LocalStorageError, match="nowhere"):
        sim.ledger.commit(
            Batch(frames=[encoded], blobs=[StoredBlob(str(sim.root / "nowhere"), 0, 1)])
        )
    assert 0 == sim.ledger.last_sequence()


def test_published_blobs_are_removed(sim: PartsAttempt, monkeypatch) -> None:
    """A file of blobs stays until the receipt for the last commit of them, and goes with it."""
    for module in (packing, parts):
        monkeypatch.setattr(module, "BLOB_FILE_BYTES", 1)
    committer = GroupCommitter(sim.ledger)
    for source in (1, 2):
        frame = pack(sim.packer, [source])
        blob = blob_of(frame, what="x")
        stored = StoredBlob.of(blob, str(sim.root))
        committer.add(frame=frame, blob=stored, sources=1)
        committer.flush()

    def blobs() -> int:
        return sum(path.name != "schema" for path in sim.root.iterdir())

    receipt = sim.publish(max_bytes=1)
    assert 2 == blobs()
    committer.release(receipt.last)
    wait_until(lambda: blobs() == 1, timeout_s=30, describe=blobs)
    committer.close()


def test_a_file_of_blobs_stays_while_a_blob_of_it_may_be_needed(tmp_path: Path) -> None:
    """
    Blobs are committed in any order: the file goes when it is full, each byte of it was
    committed and all these commits are released, not before.
    """
    path, full = tmp_path / "file", parts.BLOB_FILE_BYTES
    path.touch()
    files = parts.BlobFiles()

    def left(*blobs: tuple[int, int, int], release: int) -> bool:
        for sequence, offset, length in blobs:
            files.committed(sequence, [StoredBlob(str(path), offset, length)])
        files.release(release)
        return path.exists()

    assert left((1, 0, 10), release=1), "its worker may add to it"
    assert left((2, 20, full), release=2), "another one lies between them"
    assert left((3, 10, 10), release=2), "the last commit is not published"
    assert not left(release=3)


def test_the_files_of_a_dead_worker_go_once_its_successor_has_answered(tmp_path: Path) -> None:
    """Deaths leave files that will never be full: their disk is not kept until the attempt ends."""
    files = parts.BlobFiles()
    paths = dead, other, next_ = [tmp_path / f"0-{name}-ab12" for name in ("12-1", "2-1", "12-2")]

    def left(*committed: Path, release: int) -> list[Path]:
        for sequence, path in enumerate(committed, release + 1):
            path.touch()
            files.committed(sequence, [StoredBlob(str(path), 0, 10)])
        files.release(release)
        return [path for path in paths if path.exists()]

    assert [dead, other] == left(dead, other, release=0)
    assert [dead, other] == left(release=2), "its worker may be alive"
    assert [other, next_] == left(next_, release=2)
    assert [other, next_] == left(release=3), "their workers may add to them"


def test_many_small_blobs_take_no_memory(tmp_path: Path) -> None:
    """A stage that answers a short row at a time fills a file with tens of thousands of blobs."""
    files = parts.BlobFiles()
    tracemalloc.start()
    try:
        for n in range(10_000):
            files.committed(n, [StoredBlob(str(tmp_path), 100 * n, 100)])
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()


def test_the_inferred_schema_is_told_once(sim: PartsAttempt) -> None:
    """The run directory keeps the schema of the first part, for later attempts."""
    sim.commit([1])
    sim.publish()
    known = sim.run.fs.exists(sim.run.schema_path())
    assert known == sim.parts()[0].endswith(".parquet")
    if known:
        assert (sim.root / "schema").read_bytes() == sim.run.fs.read(sim.run.schema_path())
