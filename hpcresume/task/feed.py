"""The sources of one shard, read from the manifest as they are wanted."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence

from pyroaring import BitMap

from hpcresume.engine.calls import Inputs
from hpcresume.run.manifest import Entry, Manifest

_AHEAD = 4096


class ShardFeed:
    """Hands out a shard's sources in index order; reads its own blocks of the manifest only.

    Sources that are too heavy for now are passed over, and taken as soon as they are not.
    """

    def __init__(self, manifest: Manifest, sources: BitMap) -> None:
        self._manifest, self._sources, self._at = manifest, sources, 0
        self._count, self._uniform = len(sources), manifest.uniform
        self._ahead, self._ahead_at = array("I"), 0
        self._passed_over: list[tuple[float, int]] = []

    def left(self) -> int:
        """Return how many sources have not been taken."""
        return self._count - self._at + len(self._passed_over)

    def weight(self, source: int) -> float:
        """Return a source's expected cost, relative to the others."""
        return 1.0 if self._uniform else self._manifest.entry(source).weight

    def take(
        self, count: int, size_bytes: int, *, weight_max: float = float("inf")
    ) -> Inputs | None:
        """Return up to ``count`` sources of at most that weight; None where none is left."""
        if self._uniform and weight_max < 1:
            return None
        passed_over = self._passed_over
        if passed_over and passed_over[0][0] <= weight_max:
            return self.give([heapq.heappop(passed_over)[1]])
        while self._at < self._count:
            indices = self._next(count)
            inputs = self._take(indices, size_bytes, weight_max)
            if len(inputs):
                return inputs
        return None

    def _next(self, count: int) -> array[int]:
        """Return the indices that come next; a bitmap gives many at the cost of one."""
        start = self._at - self._ahead_at
        if start >= len(self._ahead):
            self._ahead_at, start = self._at, 0
            self._ahead = self._sources[self._at : self._at + max(count, _AHEAD)].to_array()
        return self._ahead[start : start + count]

    def _take(self, indices: array[int], size_bytes: int, weight_max: float) -> Inputs:
        if self._manifest.is_indexed(indices[0]):
            self._at += len(indices)
            return Inputs(indices)
        chosen: list[Entry] = []
        size = 0
        for entry in self._manifest.entries(indices):
            self._at += 1
            if entry.weight > weight_max:
                heapq.heappush(self._passed_over, (entry.weight, entry.source))
                continue
            chosen.append(entry)
            size += len(entry.payload)
            if size >= size_bytes:
                break
        return self._inputs(chosen)

    def give(self, sources: Sequence[int]) -> Inputs:
        """Return given sources, in any number, in the order given."""
        if sources and self._manifest.is_indexed(sources[0]):
            return Inputs(array("I", sources))
        return self._inputs(list(self._manifest.entries(sources)))

    def _inputs(self, entries: list[Entry]) -> Inputs:
        return Inputs(
            array("I", [entry.source for entry in entries]),
            records=[(entry.source_id, entry.payload) for entry in entries],
            weight=None if self._uniform else sum(entry.weight for entry in entries),
        )
