"""What completing and publishing cost in bytes and in calls: exact counts, no times."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcresume.ids import ROOT
from hpcresume.ledger.publishing import publish_pending
from hpcresume.ledger.store import Batch, Ledger, LedgerIdentity
from hpcresume.run.directory import AttemptRef
from hpcresume.segment.segment import Writer
from hpcresume.sinks.packing import Packed, RowsPacker
from tests.support.places import RUN_ID, Place, row

STATE_BYTES = 10
METADATA = (
    "create", "rename", "link", "unlink", "mkdir", "listdir", "exists", "sync_directory", "size",
)  # fmt: skip


def frames(sources: int, chunk: int) -> tuple[list[bytes], int]:
    """Return frames of chunks, one row for each source, and the bytes of their rows."""
    made, size = [], 0
    for start in range(0, sources, chunk):
        packed = [Packed(i, f"s{i}", [(ROOT, row(i))]) for i in range(start, start + chunk)]
        size += sum(len(row(source.source)) for source in packed)
        made.append(RowsPacker().pack(packed))
    return made, size


def ledger_of(path: Path, frames: list[bytes]) -> Ledger:
    """Return a ledger with one commit."""
    ledger = Ledger.create(str(path), LedgerIdentity(RUN_ID, Writer(0, 3, 2), 1, ["a", "b"]))
    ledger.commit(Batch(frames=frames))
    return ledger


@pytest.mark.parametrize("chunk", [500, 4000])
def test_bytes_per_source(tmp_path: Path, chunk: int) -> None:
    """
    At chunks of 500 and more a published source costs at most 10 bytes beyond its row, and so
    it does on the way, in the frame.
    """
    run = Place.make("sim", tmp_path).run()
    made, rows = frames(40_000, chunk)
    assert sum(map(len, made)) - rows <= STATE_BYTES * 40_000

    ledger = ledger_of(tmp_path / "ledger", made)
    receipt = publish_pending(ledger, run, seq=1)
    ledger.close()

    assert receipt.size_bytes - rows <= STATE_BYTES * 40_000
    assert receipt.size_bytes <= 1.05 * (rows + STATE_BYTES * 40_000)


def test_calls_do_not_depend_on_the_sources(tmp_path: Path, monkeypatch) -> None:
    """Publishing asks the run directory the same things for 10 sources as for 20,000."""
    counts = []
    for n, sources in enumerate((10, 20_000)):
        run = Place.make("sim", tmp_path).run()
        ledger = ledger_of(tmp_path / f"ledger-{n}", frames(sources, min(sources, 4000))[0])
        counts.append(counted(run, ledger, monkeypatch))
        ledger.close()
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) <= 30


def counted(run, ledger: Ledger, monkeypatch) -> dict[str, int]:
    """Publish, and return how often each call on names was made."""
    found = dict.fromkeys(METADATA, 0)
    for name in METADATA:
        original = getattr(run.fs, name)

        def call(*arguments, _name=name, _original=original):
            found[_name] += 1
            return _original(*arguments)

        monkeypatch.setattr(run.fs, name, call)
    publish_pending(ledger, run, seq=1)
    found = dict(found)
    assert 1 == len(run.segments(AttemptRef(0, 3, 2)))
    return found
