"""What travels between the driver and its workers."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpcresume.engine import blocks
from hpcresume.ids import ROOT, ItemPath
from hpcresume.segment.segment import StageCount

OUT_OF_MEMORY = "out-of-memory"
"""Kind of a failure for want of memory; it is charged only where nothing else ran."""


@dataclass(slots=True)
class Inputs:
    """Items for one call, column by column; slot i of every column is item i.

    Attributes:
        sources: Index of each item's source.
        records: ``(id, encoded payload)`` of each source; None where sources are made
            from their index.  Only for the first group.
        ids: Id of each item's source; None where it is the index.  Only for later groups.
        attempts: Number of the try, by slot; 1 where it is not given.
        paths: Path of each item; None for the sources themselves.
        items: The items, pickled one by one or in blocks; None for the first group.
        weight: Sum of the sources' weights; None where all are 1.  Only for the first group.
    """

    sources: array[int]
    records: list[tuple[str, bytes]] | None = None
    ids: list[str] | None = None
    attempts: dict[int, int] = field(default_factory=dict)
    paths: list[ItemPath] | None = None
    items: blocks.Items | None = None
    weight: float | None = None

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.sources)

    def select(self, slots: Sequence[int]) -> Inputs:
        """Return the items in some slots, in the order given."""

        if isinstance(slots, range) and slots.step == 1 and not self.attempts:
            return self._slice(slots.start, slots.stop)

        def column(values: list[Any] | None) -> list[Any] | None:
            return None if values is None else [values[slot] for slot in slots]

        attempts = {
            new: self.attempts[old] for new, old in enumerate(slots) if old in self.attempts
        }
        sources = array("I", (self.sources[slot] for slot in slots))
        return Inputs(
            sources,
            column(self.records),
            column(self.ids),
            attempts,
            column(self.paths),
            None if self.items is None else column(blocks.singly(self.items)),
            # Who needs the weight of one source asks for one source.
            None if self.weight is None else self.weight * len(sources) / len(self),
        )

    def _slice(self, start: int, stop: int) -> Inputs:
        def column(values: list[Any] | None) -> list[Any] | None:
            return None if values is None else values[start:stop]

        sources = self.sources[start:stop]
        return Inputs(
            sources,
            column(self.records),
            column(self.ids),
            {},
            column(self.paths),
            None if self.items is None else self.items[start:stop],
            None if self.weight is None else self.weight * len(sources) / len(self),
        )

    @classmethod
    def concat(cls, parts: Sequence[Inputs]) -> Inputs:
        """Return the items of several calls of one group as one."""
        if len(parts) == 1:
            return parts[0]
        first, attempts, sources = parts[0], {}, array("I")
        for part in parts:
            attempts.update({len(sources) + slot: n for slot, n in part.attempts.items()})
            sources.extend(part.sources)

        def column(name: str) -> list[Any] | None:
            if getattr(first, name) is None:
                return None
            return [value for part in parts for value in getattr(part, name)]

        weight = None if first.weight is None else sum(part.total_weight() for part in parts)
        is_named = any(part.ids is not None for part in parts)
        return cls(
            sources,
            column("records"),
            [name for part in parts for name in part.source_ids()] if is_named else None,
            attempts,
            column("paths"),
            None
            if first.items is None
            else blocks.join([part.items for part in parts if part.items is not None]),
            weight,
        )

    def in_order(self) -> Inputs:
        """Return the items in the order of their sources."""
        order = sorted(range(len(self)), key=self.sources.__getitem__)
        return self if order == list(range(len(self))) else self.select(order)

    def total_weight(self) -> float:
        """Return the sum of the sources' weights."""
        return len(self) if self.weight is None else self.weight

    def attempt(self, slot: int) -> int:
        """Return the number of the try that an item belongs to."""
        return self.attempts.get(slot, 1)

    @property
    def is_indexed(self) -> bool:
        """Whether the sources are made from their index, which is their id."""
        return self.ids is None and self.records is None

    def source_id(self, slot: int) -> str:
        """Return the id of an item's source."""
        if self.ids is not None:
            return self.ids[slot]
        if self.records is not None:
            return self.records[slot][0]
        return str(self.sources[slot])

    def source_ids(self) -> Iterable[str]:
        """Return the id of every item's source, by slot."""
        if self.ids is not None:
            return self.ids
        if self.records is not None:
            return [source_id for source_id, _ in self.records]
        return map(str, self.sources)

    def path(self, slot: int) -> ItemPath:
        """Return an item's path."""
        return ROOT if self.paths is None else self.paths[slot]

    def size_bytes(self) -> int:
        """Return the bytes of the encoded payloads or items, 0 where there are none."""
        if self.items is not None:
            return blocks.size_bytes(self.items)
        return sum(len(payload) for _, payload in self.records) if self.records else 0


@dataclass(slots=True)
class SlotFailure:
    """Why one item of a call failed.

    Attributes:
        slot: Its slot in the call's inputs.
        stage: Name of the stage.
        item: Id of the item that failed, which may descend from the input.
        kind: Exception type, ``Failed`` or ``timeout``.
        message: One line.
        traceback: The user's part of the traceback.
        retry: Whether to try the source again.
        after_success: Whether the stage had worked for another source since its last
            failure in this call.
        short_mib: Memory that was not enough for it, where a later round gives it more.
    """

    slot: int
    stage: str
    item: str
    kind: str
    message: str
    traceback: str = ""
    retry: bool = True
    after_success: bool = False
    short_mib: int = 0


@dataclass(slots=True)
class ChunkResult:
    """What a call returns.

    Attributes:
        unbegun: How many items, the last ones of the call, were not begun; nothing else says
            anything of them.
        seconds: How long the call took in the worker.
        took: How long the stages took in each of the calls that this is the result of.
        counts: What each stage of the group did, in order.
        failures: The slots that failed.
        worked: Names of the stages that worked for a source after their last failure.
        broken: Why the worker cannot go on; nothing else counts then.
        refused: Why the node-local disk cannot take rows; nothing else counts then.
        unrecoverable: Why the attempt cannot go on; nothing else counts then.
        frame: Chunk frame of everything that succeeded; only where one group is the pipeline.
        completed: Number of sources in the frame.
        rows: Encoded rows of every slot that succeeded; only for the last of several groups.
        emitted: Items made from every slot, pickled; only where another group follows.
        column: In place of ``rows`` or ``emitted`` where every slot made one item and all have
            one path: that path, and rows or pickled items by slot.
        files: Files of ``ctx.output`` by slot: item path and name.
    """

    unbegun: int = 0
    seconds: float = 0.0
    counts: list[StageCount] = field(default_factory=list)
    failures: list[SlotFailure] = field(default_factory=list)
    worked: list[str] = field(default_factory=list)
    broken: str | None = None
    refused: str | None = None
    unrecoverable: str | None = None
    frame: bytes | None = None
    completed: int = 0
    rows: dict[int, list[tuple[ItemPath, bytes]]] = field(default_factory=dict)
    emitted: dict[int, list[tuple[ItemPath, bytes]]] = field(default_factory=dict)
    column: tuple[ItemPath, blocks.Items] | None = None
    files: dict[int, list[tuple[ItemPath, str]]] = field(default_factory=dict)
    took: list[float] = field(default_factory=list)
