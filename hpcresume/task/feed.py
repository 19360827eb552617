"""The sources of one shard, read from the manifest as they are wanted."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from pyroaring import BitMap

from hpcresume.engine.calls import Inputs
from hpcresume.run.manifest import Manifest


class ShardFeed:
    """Hands out a shard's sources in index order; reads its own blocks of the manifest only."""

    def __init__(self, manifest: Manifest, sources: BitMap) -> None:
        self._manifest, self._sources, self._at = manifest, sources, 0
        self._count = len(sources)

    def left(self) -> int:
        """Return how many sources have not been taken."""
        return self._count - self._at

    def take(self, count: int, size_bytes: int) -> Inputs | None:
        """Return up to ``count`` sources in index order, None when there are no more."""
        if self._at >= self._count:
            return None
        indices = self._sources[self._at : self._at + count].to_array()
        inputs = self._inputs(indices, size_bytes)
        self._at += len(inputs)
        return inputs

    def give(self, sources: Sequence[int]) -> Inputs:
        """Return given sources, in any number, in the order given."""
        return self._inputs(array("I", sources), None)

    def _inputs(self, indices: array[int], size_bytes: int | None) -> Inputs:
        if indices and self._manifest.is_indexed(indices[0]):
            return Inputs(indices)
        records, size = [], 0
        for entry in self._manifest.entries(indices):
            records.append((entry.source_id, entry.payload))
            size += len(entry.payload)
            if size_bytes is not None and size >= size_bytes:
                break
        return Inputs(indices[: len(records)], records=records)
