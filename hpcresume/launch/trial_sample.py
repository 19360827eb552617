"""Which sources a trial runs: a spread over the listing, or those that are named."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcresume.engine.calls import Inputs
from hpcresume.errors import SourcesError, UsageError
from hpcresume.fs import POSIX
from hpcresume.pipeline.chunk import Chunk
from hpcresume.pipeline.members import SPACING_MIN, Members
from hpcresume.pipeline.payload import decode_payload
from hpcresume.pipeline.restarts import RestartStore
from hpcresume.pipeline.sources import Indexed, SourceList, encode_payload


@dataclass(frozen=True, slots=True)
class Sample:
    """The sources of a trial.

    Attributes:
        total: Number of all sources.
        indices: Positions of the sampled ones in the listing, increasing.
        records: Id and encoded payload of each; None where payloads are made from positions.
        members: Those of the gzip files that chunks are of.
    """

    total: int
    indices: list[int]
    records: list[tuple[str, bytes]] | None = None
    members: dict[Path, Members] = field(default_factory=dict)

    def id_of(self, slot: int) -> str:
        """Return the id of sampled source ``slot``."""
        return str(self.indices[slot]) if self.records is None else self.records[slot][0]


class _Noted:
    """Takes what a listing finds about the gzip files that it reads."""

    def __init__(self) -> None:
        self.members: dict[Path, Members] = {}

    def restart_points(self, path: Path, size_bytes: int, digest: str, members: Members) -> None:
        del size_bytes, digest
        self.members[path] = members

    def note(self, text: str) -> None:
        del text


class Spread:
    """Keeps an even spread of a stream whose length is not known, in one pass.

    Every ``stride``-th item is kept; once there are twice as many as wanted, every other one
    goes and the stride doubles.  Nothing is drawn by chance.
    """

    def __init__(self, n: int) -> None:
        self._n, self._stride = n, 1
        self._kept: list[tuple[int, Any]] = []
        self.count = 0

    def add(self, item: Any) -> None:
        """Take the stream's next item."""
        if self.count % self._stride == 0:
            if len(self._kept) == 2 * self._n:
                self._kept = self._kept[::2]
                self._stride *= 2
            if self.count % self._stride == 0:
                self._kept.append((self.count, item))
        self.count += 1

    def chosen(self) -> list[tuple[int, Any]]:
        """Return at most ``n`` items with their positions, evenly spread over the stream."""
        return [self._kept[i] for i in even_positions(len(self._kept), self._n)]


def even_positions(total: int, n: int) -> list[int]:
    """Return ``n`` positions spread evenly over ``total``, the first one included; all if fewer."""
    n = min(n, total)
    return [i * total // n for i in range(n)]


def spread(sources: SourceList, n: int) -> Sample:
    """Return ``n`` sources spread evenly over a listing; the same ones every time.

    Raises:
        UsageError: ``n`` is below 1.
        SourcesError: The sources cannot be listed.
    """
    if n < 1:
        raise UsageError(f"-n {n}: a sample has at least 1 source.")
    if isinstance(sources, Indexed):
        return Sample(len(sources), even_positions(len(sources), n))
    kept, noted = Spread(n), _Noted()
    for source in sources.listed(noted):
        kept.add(source)
    chosen = kept.chosen()
    records = [(s.id, encode_payload(s.payload, source_id=s.id)) for _, s in chosen]
    return Sample(kept.count, [position for position, _ in chosen], records, noted.members)


def named(sources: SourceList, wanted: Sequence[str]) -> Sample:
    """Return the sources with the given ids, in the order of the listing."""
    if isinstance(sources, Indexed):
        found = {name: int(name) for name in wanted if _is_index(name, len(sources))}
        _refuse_absent(wanted, found, first="0" if len(sources) else None)
        return Sample(len(sources), sorted(found.values()))
    missing, first, total, noted = set(wanted), None, 0, _Noted()
    indices, records = [], []
    for position, source in enumerate(sources.listed(noted)):
        first = source.id if first is None else first
        total = position + 1
        if source.id in missing:
            missing.remove(source.id)
            indices.append(position)
            records.append((source.id, encode_payload(source.payload, source_id=source.id)))
    _refuse_absent(wanted, {record[0] for record in records}, first=first)
    return Sample(total, indices, records, noted.members)


def _is_index(text: str, total: int) -> bool:
    return text.isascii() and text.isdigit() and str(int(text)) == text and int(text) < total


def _refuse_absent(wanted: Sequence[str], found: Collection[str], *, first: str | None) -> None:
    absent = [name for name in wanted if name not in found]
    if absent:
        like = "there are no sources" if first is None else f"the first one is {first!r}"
        raise SourcesError(
            f"no source has the id {' or '.join(map(repr, absent))}. Ids are compared whole; "
            f"{like}. Give ids of the listing, or leave --source out for a sample.",
            absent=absent,
        )


def keep_restart_points(sample: Sample, directory: Path) -> None:
    """Find where reading can begin in the gzip files that chunks of the sample lie deep in.

    A run has these points, so without them the seconds of the stages would be too many.
    """
    payloads = [decode_payload(data) for _, data in sample.records or () if data[:1] == b"c"]
    chunks = [payload for payload in payloads if isinstance(payload, Chunk)]
    deep = {chunk.path for chunk in chunks if chunk.offset > SPACING_MIN}
    for path in sorted(deep & sample.members.keys()):
        RestartStore(POSIX, str(directory)).keep(path, "", sample.members[path])


class SampleFeed:
    """Hands the sampled sources to the executor."""

    def __init__(self, sample: Sample) -> None:
        self._sample, self._at = sample, 0
        self._slots = {index: slot for slot, index in enumerate(sample.indices)}

    def left(self) -> int:
        """Return how many sources have not been taken."""
        return len(self._sample.indices) - self._at

    def weight(self, source: int) -> float:
        """Return 1: a trial has no time limit that it could matter for."""
        del source
        return 1.0

    def take(self, count: int, size_bytes: int, *, weight_max: float) -> Inputs | None:
        """Return up to ``count`` sources; a sample is too small for the bounds to matter."""
        del size_bytes, weight_max
        if not self.left():
            return None
        taken = self._sample.indices[self._at : self._at + count]
        self._at += len(taken)
        return self.give(taken)

    def give(self, sources: Sequence[int]) -> Inputs:
        """Return sources by their positions in the listing."""
        records = self._sample.records
        if records is not None:
            records = [records[self._slots[index]] for index in sources]
        return Inputs(array("I", sources), records=records)
