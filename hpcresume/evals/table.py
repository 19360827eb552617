"""The rows of an evaluation as its ledger has them: one for each repetition of each item.

The last good row of an item wins; without one, its last error does.  An older error stays
until another try is recorded.  A source that was given up without a row, because its worker
died of it, has one made of what is known.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import orjson
from pyroaring import BitMap

from hpcresume.errors import SharedStorageError
from hpcresume.evals.item import make_item, split_id
from hpcresume.evals.layout import ORDER
from hpcresume.evals.rows import ERROR, OK, TIMEOUT, Ending, encode, make_row
from hpcresume.evals.settings import EvalSettings
from hpcresume.merge.generation import Union
from hpcresume.output.rows import BadSegmentError, spans, take_back_segment, union_of
from hpcresume.pipeline.observer import GivenUp
from hpcresume.pipeline.payload import decode_payload
from hpcresume.run.directory import RunDir
from hpcresume.run.manifest import Entry, Manifest


@dataclass(frozen=True, slots=True)
class Slot:
    """Where an item's row lies.

    Attributes:
        source: Index of the source that it is of.
        number: Which try that is.
        offset: Where it begins in the table's file.
        size: Its length in bytes, without a newline.
        status: Its status.
        digest: Eight bytes that tell it from others.
    """

    source: int
    number: int
    offset: int
    size: int
    status: str
    digest: bytes

    def beats(self, other: Slot | None) -> bool:
        """Tell whether this is the row that counts of the two."""
        if other is None:
            return True
        return (self.status == OK, self.number) > (other.status == OK, other.number)


@dataclass
class RowTable:
    """The rows that count, in a file without a name.

    Attributes:
        slots: Where they lie, by the item's base id.
        bases: Every item's base id with the index of its first source, in the manifest's order.
        owed: Base ids of items with a source that is not settled.
        known: Id and repetition of every item that has a row.
    """

    file: IO[bytes]
    slots: dict[str, Slot] = field(default_factory=dict)
    bases: dict[str, int] = field(default_factory=dict)
    owed: set[str] = field(default_factory=set)
    known: set[tuple[str, int]] = field(default_factory=set)

    def row(self, slot: Slot) -> bytes:
        """Return a row without its newline."""
        return os.pread(self.file.fileno(), slot.size, slot.offset)

    def counts(self) -> Counter[str]:
        """Return how many items have which status; ``missing`` have no row."""
        counts = Counter(slot.status for slot in self.slots.values())
        counts["missing"] = len(self.bases) - len(self.slots)
        return counts

    def _put(self, base: str, entry: Entry, number: int, row: bytes) -> None:
        values = orjson.loads(row)
        self.known.add((values["id"], values["repetition"]))
        at, status = self.file.tell(), values["status"]
        slot = Slot(entry.source, number, at, len(row), status, row_digest(row))
        if slot.beats(self.slots.get(base)):
            self.file.write(row)
            self.slots[base] = slot


def row_digest(row: bytes) -> bytes:
    """Return eight bytes that tell a row from others."""
    return hashlib.blake2b(row, digest_size=8).digest()


@contextlib.contextmanager
def read_table(run: RunDir, settings: EvalSettings) -> Iterator[RowTable]:
    """Read the rows of a run as its published segments have them.

    Raises:
        SharedStorageError: A segment cannot be read, or there is no space for the table.
    """
    union = union_of(run)
    while True:
        try:
            with tempfile.TemporaryFile(dir=run.path) as file:
                table = RowTable(file)
                _fill(table, run, union, settings)
                file.flush()
                yield table
            return
        except BadSegmentError as error:
            # Its items are owed again.
            union = take_back_segment(run, error)
        except OSError as error:
            raise SharedStorageError(
                f"the results cannot be written into {run.path}: {error.strerror or error}. "
                "They are safe in the run's segments. Make space, then resume.",
                path=run.path,
            ) from error


def _fill(table: RowTable, run: RunDir, union: Union, settings: EvalSettings) -> None:
    manifest = Manifest.open(run)
    withdrawn = manifest.withdrawn()
    listed = BitMap(range(manifest.total)) - withdrawn
    settled = union.settled()
    for entry in manifest.entries(listed):
        base, number = split_id(entry.source_id)
        if number == 1:
            table.bases[base] = entry.source
        if entry.source not in settled:
            table.owed.add(base)
    for span in spans(run, union, manifest):
        for source in span.each():
            entry = manifest.entry(source.source)
            base, number = split_id(entry.source_id)
            for row in source.rows:
                table._put(base, entry, number, row)
    for index in union.quarantined() & listed:
        failure = union.failures[index]
        last = failure.last
        entry = manifest.entry(index)
        base, number = split_id(entry.source_id)
        given_up = GivenUp(index, last.kind, last.message, last.traceback, failure.attempts)
        table._put(base, entry, number, given_up_row(entry.payload, given_up, settings))


def given_up_row(payload: bytes, failure: GivenUp, settings: EvalSettings) -> bytes:
    """Return the row of an item that was given up without one."""
    values: dict[str, Any] = decode_payload(payload)
    ending = Ending(
        TIMEOUT if failure.kind == "timeout" else ERROR,
        error=f"{failure.kind}: {failure.message}",
        traceback=failure.traceback or None,
        attempts=failure.attempts + values.get("attempts", 0),
    )
    item = make_item(values, settings.columns)
    return encode(make_row(item, ending, None), item.id)


def in_order(run: RunDir, table: RowTable) -> list[str]:
    """Return the base ids of all items in the order of the dataset as it was last read."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        order = orjson.loads(Path(run.join(ORDER)).read_bytes())
        place = {base: at for at, base in enumerate(order)}
        return sorted(table.bases, key=lambda base: place.get(base, table.bases[base] + len(place)))
    return list(table.bases)
