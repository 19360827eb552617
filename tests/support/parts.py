"""Ledgers whose rows lie in blobs, made as the workers make them, for tests of ``hr.Parts``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hpcresume.ids import ItemPath
from hpcresume.ledger.publishing import PublishReceipt, publish_pending
from hpcresume.ledger.store import Batch, Ledger, LedgerIdentity, StoredBlob
from hpcresume.run.directory import AttemptRef, RunDir
from hpcresume.segment.frame import blob_of
from hpcresume.segment.segment import Segment, Writer, open_segment
from hpcresume.sinks.packing import JsonlPacker, Packed, Packer, ParquetPacker
from tests.support.runs import STAGES


def make_packer(form: str, directory: Path, schema: Any = None) -> Packer:
    """Return the packer of a format, its directory made."""
    directory.mkdir(parents=True, exist_ok=True)
    if form == "jsonl":
        return JsonlPacker(str(directory))
    return ParquetPacker(schema, str(directory))


def row_of(source: int, n: int) -> dict[str, Any]:
    """Return the ``n``-th row of a source, the same in every attempt."""
    return {"index": source, "n": n, "text": "x" * (10 * source)}


def pack(packer: Packer, sources: Iterable[int], *, rows: int = 2) -> bytes:
    """Return a frame of some sources, each with so many rows."""
    packed = []
    for source in sorted(sources):
        made = [(ItemPath((0, n)), packer.row(row_of(source, n))) for n in range(rows)]
        packed.append(Packed(source, f"s{source}.txt", made))
    return packer.pack(packed)


class PartsAttempt:
    """One attempt with a ledger of its own, whose rows become parts."""

    def __init__(self, run: RunDir, ref: AttemptRef, place: Path, form: str) -> None:
        self.run, self.ref, self.root = run, ref, place / "parts"
        self.packer = make_packer(form, self.root)
        identity = LedgerIdentity(
            run.run_id, Writer(ref.round, ref.task, ref.epoch), 1, list(STAGES), has_parts=True
        )
        self.ledger = Ledger.create(str(place / "ledger"), identity)

    def commit(self, *frames: Iterable[int], rows: int = 2) -> int:
        """Commit frames of sources and return the number of the commit."""
        encoded = [pack(self.packer, sources, rows=rows) for sources in frames]
        blobs = [blob for data in encoded if (blob := blob_of(data, what="a frame")) is not None]
        stored = [StoredBlob.of(blob, str(self.root)) for blob in blobs]
        return self.ledger.commit(Batch(frames=encoded, blobs=stored))

    def publish(self, seq: int = 1, **options: Any) -> PublishReceipt:
        """Publish what is pending."""
        return publish_pending(self.ledger, self.run, seq=seq, parts_root=str(self.root), **options)

    def segment(self, receipt: PublishReceipt) -> Segment:
        """Return a published segment, all of it verified."""
        path = self.run.attempt_path(self.ref, receipt.name)
        segment = open_segment(self.run.fs, path, run_id=self.run.run_id)
        segment.verify()
        return segment

    def part(self, receipt: PublishReceipt) -> Path:
        """Return the path of the part beside a published segment."""
        return Path(self.segment(receipt).part_path())

    def parts(self) -> list[str]:
        """Return the names of all parts of the attempt."""
        names = self.run.fs.listdir(self.run.attempt_path(self.ref))
        return sorted(name for name in names if name.startswith("part-"))


def rows_of(sources: Sequence[int], *, rows: int = 2) -> list[dict[str, Any]]:
    """Return the rows that some sources make, in order."""
    return [row_of(source, n) for source in sources for n in range(rows)]
