"""Sources whose items travel through several groups, put together until they are complete.

Rows and files of a try that failed are dropped at once, and so is what its items still lead
to: they may be in other calls, and must not mix with those of the next try.
"""

from __future__ import annotations

import dataclasses
import logging
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable

from pyroaring import BitMap

from hpcresume.engine import blocks
from hpcresume.engine.calls import ChunkResult, Inputs
from hpcresume.engine.pace import Pace
from hpcresume.ids import ItemPath
from hpcresume.ledger.accounting import Accounting, Ack, Verdict
from hpcresume.segment.frame import Columns
from hpcresume.sinks.packing import Packed, Packer

log = logging.getLogger(__name__)


class Assembly:
    """What is known of the sources in flight.

    Args:
        max_sources: Completed sources that are packed into one frame at most.
        completed: Told every frame, with the number of its sources.
        pace: Told how long sources took, from their admission to their last item.
        clock: Monotonic seconds.
        packer: Packs completed sources.
    """

    def __init__(
        self,
        max_sources: int,
        completed: Callable[[bytes, int], None],
        pace: Pace,
        clock: Callable[[], float],
        packer: Packer,
    ) -> None:
        self._packer = packer
        self._max_sources, self._tell = max_sources, completed
        self._pace, self._clock = pace, clock
        # When a source was admitted, its weight, and for how many it stands: of those that
        # were admitted in one call, the last stands for all.
        self._admitted: dict[int, tuple[float, float, int]] = {}
        self._standing = BitMap()
        self._ended: list[tuple[float, float, int]] = []
        self._accounting = Accounting()
        self._failed: set[int] = set()
        self._rows: dict[int, list[tuple[ItemPath, bytes]]] = defaultdict(list)
        self._files: dict[int, list[tuple[ItemPath, str]]] = defaultdict(list)
        self._done: dict[int, str] = {}
        # Calls that completed their sources with one row each: most of them.
        self._columns: list[tuple[array[int], ItemPath, list[bytes]]] = []
        self._done_sources = self._done_bytes = 0
        self.completed = 0

    def __len__(self) -> int:
        """Return the number of sources in flight, or failed and not yet given up."""
        return len(self._accounting)

    def admit(self, inputs: Inputs) -> None:
        """Begin a try of sources; nothing of the try before it stays."""
        now, count = self._clock(), len(inputs)
        weight = inputs.total_weight() / max(1, count)
        if not inputs.attempts and self._accounting.admit_all(BitMap(inputs.sources)):
            self._time(inputs.sources[-1], (now, weight, count))
            return
        for slot, source in enumerate(inputs.sources):
            self._time(source, (now, weight, 1))
            self._drop(source)
            self._failed.discard(source)
            self._accounting.admit(source, inputs.attempt(slot))

    def _time(self, source: int, entry: tuple[float, float, int]) -> None:
        self._admitted[source] = entry
        self._standing.add(source)

    def _untime(self, source: int) -> tuple[float, float, int] | None:
        self._standing.discard(source)
        return self._admitted.pop(source, None)

    def living(self, inputs: Inputs) -> Inputs:
        """Return the items without those of tries that have failed."""
        if not self._failed or self._failed.isdisjoint(inputs.sources):
            return inputs
        return inputs.select([s for s in range(len(inputs)) if self._is_current(inputs, s)])

    def fail(self, inputs: Inputs, slots: Iterable[int]) -> None:
        """Record that the tries of some items' sources have failed."""
        for slot in slots:
            if self._is_current(inputs, slot):
                self._acknowledge(inputs, slot, failed=True)
                self._end_try(inputs.sources[slot])

    def hand_back(self, begun: Inputs, rest: Inputs) -> None:
        """Take back the admission of the sources of a call that it did not begin."""
        admitted = self._admitted.get(rest.sources[-1])
        for source in rest.sources:
            self.forget(source)
        if admitted is not None and admitted[2] == len(begun) + len(rest) and len(begun):
            self._time(begun.sources[-1], (*admitted[:2], len(begun)))

    def forget(self, source: int) -> None:
        """Drop a source that is not tried again."""
        self._accounting.forget(source)
        self._untime(source)
        self._failed.discard(source)
        self._drop(source)

    def take(self, inputs: Inputs, result: ChunkResult, *, has_rows: bool) -> Inputs:
        """Record what a call made of its items.

        Args:
            inputs: The call's items.
            result: What became of them.
            has_rows: Whether the call's items end in rows.

        Returns:
            The items for the next group.
        """
        if result.column is not None:
            onward = self._take_column(inputs, *result.column, is_last=has_rows)
            if onward is not None:
                return onward
            result = _by_slot(result, is_last=has_rows)
        failed = {failure.slot for failure in result.failures}
        self.fail(inputs, sorted(failed))
        onward = Inputs(array("I"), ids=None if inputs.is_indexed else [], paths=[], items=[])
        for slot, source in enumerate(inputs.sources):
            if slot in failed or not self._is_current(inputs, slot):
                continue
            if slot in result.files:
                self._files[source] += result.files[slot]
            if has_rows:
                self._rows[source] += result.rows[slot]
            emitted = result.emitted.get(slot, ())
            for path, item in emitted:
                _append(onward, inputs, slot, path=path, item=item)
            self._acknowledge(inputs, slot, emitted=tuple(path for path, _ in emitted))
        if self._ended:
            self._note_pace()
        return onward

    def _take_column(
        self, inputs: Inputs, path: ItemPath, values: blocks.Items, *, is_last: bool
    ) -> Inputs | None:
        """
        Record a call that made one item of each of its own; None where that is not all.

        Sources that have files are no chains: calls that made some are recorded item by item.
        """
        sources, known, paths = inputs.sources, BitMap(inputs.sources), inputs.paths
        item = inputs.path(0)
        if paths is not None and paths.count(item) < len(paths):
            return None
        if inputs.attempts or len(known) < len(sources) or not self._failed.isdisjoint(known):
            return None
        if not self._accounting.advance_all(known, item, None if is_last else path):
            return None
        if not is_last:
            ids = None if inputs.is_indexed else list(inputs.source_ids())
            return Inputs(sources, ids=ids, paths=[path] * len(sources), items=values)
        assert isinstance(values, list), "rows are in no blocks"
        self._columns.append((sources, path, values))
        self._ended += filter(None, map(self._untime, known & self._standing))
        self._note_done(len(sources), sum(map(len, values)))
        self._note_pace()
        return Inputs(array("I"), paths=[], items=[])

    def _note_pace(self) -> None:
        ended, self._ended, now = self._ended, [], self._clock()
        for since, weight, count in ended:
            if weight > 0:
                self._pace.note((now - since) / weight, count)

    def flush(self) -> None:
        """Hand on what has completed so far."""
        self._done_sources = self._done_bytes = 0
        if self._columns:
            self._flush_columns()
        if not self._done:
            return
        packed = [
            # Items arrive in any order; within a source rows are in item order.
            Packed(
                source,
                self._done[source],
                sorted(self._rows.pop(source, ())),
                sorted(self._files.pop(source, ())),
            )
            for source in sorted(self._done)
        ]
        self._done = {}
        self._tell(self._packer.pack(packed), len(packed))

    def _flush_columns(self) -> None:
        # Several workers answer in any order.
        columns, self._columns = sorted(self._columns, key=lambda column: column[0][0]), []
        sources = [source for column, _, _ in columns for source in column]
        paths = [path for column, path, _ in columns for _ in column]
        rows = [row for _, _, values in columns for row in values]
        if sources != sorted(sources):
            made = sorted(zip(sources, paths, rows, strict=True))
            sources, paths, rows = (list(column) for column in zip(*made, strict=True))
        frame = self._packer.pack_columns(Columns(sources, sources, paths, rows))
        self._tell(frame, len(sources))

    def _is_current(self, inputs: Inputs, slot: int) -> bool:
        source = inputs.sources[slot]
        return (
            source in self._accounting
            and source not in self._failed
            and self._accounting.attempt(source) == inputs.attempt(slot)
        )

    def _acknowledge(
        self,
        inputs: Inputs,
        slot: int,
        *,
        emitted: tuple[ItemPath, ...] = (),
        failed: bool = False,
    ) -> None:
        source, path = inputs.sources[slot], inputs.path(slot)
        ack = Ack(source, inputs.attempt(slot), path, emitted, failed=failed)
        verdict = self._accounting.acknowledge(ack)
        if verdict is Verdict.COMPLETE:
            self._complete(source, inputs.source_id(slot))
        elif verdict is Verdict.ANOMALY:
            log.error("source %d is owed again: %s", source, self._accounting.anomalies[-1][1])
            self._end_try(source)

    def _end_try(self, source: int) -> None:
        self._failed.add(source)
        self._drop(source)

    def _drop(self, source: int) -> None:
        self._rows.pop(source, None)
        self._files.pop(source, None)

    def _complete(self, source: int, source_id: str) -> None:
        self._done[source] = source_id
        entry = self._untime(source)
        self._ended += [] if entry is None else [entry]
        self._note_done(1, sum(len(row) for _, row in self._rows.get(source, ())))

    def _note_done(self, sources: int, size_bytes: int) -> None:
        self._done_sources += sources
        self._done_bytes += size_bytes
        self.completed += sources
        is_full = self._done_bytes >= self._packer.frame_bytes
        if is_full or self._done_sources >= self._max_sources:
            self.flush()


def _by_slot(result: ChunkResult, *, is_last: bool) -> ChunkResult:
    """Return a result with its column as rows or items of each slot."""
    assert result.column is not None
    path, values = result.column
    made = {slot: [(path, value)] for slot, value in enumerate(blocks.singly(values))}
    if is_last:
        return dataclasses.replace(result, column=None, rows=made)
    return dataclasses.replace(result, column=None, emitted=made)


def _append(onward: Inputs, inputs: Inputs, slot: int, *, path: ItemPath, item: bytes) -> None:
    assert onward.paths is not None
    assert isinstance(onward.items, list)
    attempt = inputs.attempt(slot)
    if attempt > 1:
        onward.attempts[len(onward)] = attempt
    onward.sources.append(inputs.sources[slot])
    if onward.ids is not None:
        onward.ids.append(inputs.source_id(slot))
    onward.paths.append(path)
    onward.items.append(item)
