"""Order-free accounting of the sources whose items travel between stages.

Each processed item is acknowledged once, with what it emitted.  A source is complete if and
only if its root was seen, the set of items emitted equals the set consumed, and nothing
failed.  A counter that reaches zero proves nothing: a drop that overtakes its parent's
fan-out takes it to zero with work outstanding.  Sets do not care about the order of
deliveries, repeated deliveries change nothing, and a lost one leaves the source open.

Most sources go through a pipeline one item at a time.  Of these the sets are one chain, and
the sources that have the same one are a bitmap, so that whole calls are recorded at once;
whatever does not fit its chain leaves the bitmap and gets sets first.

A retry has a higher attempt number and replaces everything the try before it emitted.
Acknowledgements of an older try, or of a source that is complete, are ignored.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from enum import Enum

from pyroaring import BitMap

from hpcresume.ids import ROOT, ItemPath


class Verdict(Enum):
    """What an acknowledgement led to."""

    OPEN = "open"
    COMPLETE = "complete"
    FAILED = "failed"
    REPEATED = "repeated"
    STALE = "stale"
    ANOMALY = "anomaly"


@dataclass(frozen=True, slots=True)
class Ack:
    """One processed item.

    Attributes:
        source: Index of the source.
        attempt: Number of the try it belongs to.
        item: The item that was consumed.
        emitted: The items made from it, in order; none for a drop or the last stage.
        failed: Whether processing it failed; a failure consumes nothing.
    """

    source: int
    attempt: int
    item: ItemPath
    emitted: tuple[ItemPath, ...] = ()
    failed: bool = False


@dataclass(slots=True)
class _Pending:
    attempt: int
    root_seen: bool = False
    failed: bool = False
    emitted: set[ItemPath] = field(default_factory=set)
    consumed: dict[ItemPath, tuple[ItemPath, ...]] = field(default_factory=dict)

    def is_complete(self) -> bool:
        return self.root_seen and not self.failed and self.emitted == self.consumed.keys()


class Accounting:
    """Pending sources of one attempt.

    Memory is bounded by the sources in flight, and a bitmap of those that are settled.
    """

    def __init__(self) -> None:
        self._pending: dict[int, _Pending] = {}
        # First tries whose every item made one, by what was emitted; the last is not consumed.
        self._chains: dict[tuple[ItemPath, ...], BitMap] = {}
        self._completed, self._forgotten = BitMap(), BitMap()
        self.anomalies: list[tuple[Ack, str]] = []

    def __len__(self) -> int:
        """Return the number of pending sources."""
        return len(self._pending) + sum(map(len, self._chains.values()))

    def __contains__(self, source: int) -> bool:
        """Tell whether a source is pending."""
        return source in self._pending or self._chain_of(source) is not None

    def attempt(self, source: int) -> int:
        """Return the number of a pending source's current try."""
        pending = self._pending.get(source)
        return 1 if pending is None else pending.attempt

    def admit_all(self, sources: BitMap) -> bool:
        """Record the roots of first tries at once; False, and nothing recorded, unless all fit."""
        seen = (self._completed, self._forgotten, *self._chains.values())
        is_new = all(map(sources.isdisjoint, seen))
        if not is_new or (self._pending and not self._pending.keys().isdisjoint(sources)):
            return False
        self._put((ROOT,), sources)
        return True

    def advance_all(self, sources: BitMap, item: ItemPath, emitted: ItemPath | None) -> bool:
        """Record that one item of each source was consumed and made one, or is the end of it.

        Args:
            sources: The sources.
            item: The item of each.
            emitted: What each made; None: nothing, which completes the source.

        Returns:
            Whether it was recorded: False where any source is not one chain that ends in
            ``item``, so that each has to be acknowledged by itself.
        """
        chain = next((chain for chain, known in self._chains.items() if sources <= known), None)
        if chain is None or chain[-1] != item:
            return False
        if emitted is not None and not _descends(emitted, item):
            return False
        self._take(chain, sources)
        if emitted is None:
            self._completed |= sources
        else:
            self._put((*chain, emitted), sources)
        return True

    def _chain_of(self, source: int) -> tuple[ItemPath, ...] | None:
        return next((chain for chain, known in self._chains.items() if source in known), None)

    def _put(self, chain: tuple[ItemPath, ...], sources: BitMap) -> None:
        known = self._chains.get(chain)
        self._chains[chain] = sources.copy() if known is None else known | sources

    def _take(self, chain: tuple[ItemPath, ...], sources: BitMap) -> None:
        left = self._chains.pop(chain) - sources
        if left:
            self._chains[chain] = left

    def _unchain(self, source: int) -> None:
        """Turn a source's chain into sets."""
        chain = self._chain_of(source)
        if chain is not None:
            self._take(chain, BitMap([source]))
            pending = _Pending(1, root_seen=True, emitted=set(chain))
            pending.consumed.update((item, (made,)) for item, made in itertools.pairwise(chain))
            self._pending[source] = pending

    def admit(self, source: int, attempt: int) -> Verdict:
        """Record that a source's root was emitted; a higher attempt replaces the try before.

        Acknowledgements may have come first; they count once the root is seen.
        """
        self._forgotten.discard(source)
        pending = self._entry(source, attempt)
        if pending is None:
            return Verdict.STALE
        pending.root_seen = True
        pending.emitted.add(ROOT)
        return self._verdict(source, pending)

    def acknowledge(self, ack: Ack) -> Verdict:
        """Record one processed item.

        Returns:
            ``COMPLETE`` exactly once for each source; it is forgotten then.  ``FAILED``
            when the try has failed; the source stays pending until it is admitted again.
        """
        pending = self._entry(ack.source, ack.attempt)
        if pending is None:
            return Verdict.STALE
        if ack.failed:
            pending.failed = True
            return Verdict.FAILED
        known = pending.consumed.get(ack.item)
        if known is not None:
            return self._repeated(pending, ack, known)
        if any(not _descends(path, ack.item) for path in ack.emitted):
            return self._anomaly(pending, ack, "it emitted items that do not descend from it")
        if len(set(ack.emitted)) < len(ack.emitted) or not pending.emitted.isdisjoint(ack.emitted):
            return self._anomaly(pending, ack, "it emitted an item that was emitted before")
        pending.consumed[ack.item] = ack.emitted
        pending.emitted.update(ack.emitted)
        return self._verdict(ack.source, pending)

    def forget(self, source: int) -> None:
        """Drop a source that is not tried again, unless it is admitted anew."""
        self._unchain(source)
        self._pending.pop(source, None)
        self._forgotten.add(source)

    def _entry(self, source: int, attempt: int) -> _Pending | None:
        if source in self._completed or source in self._forgotten:
            return None
        self._unchain(source)
        pending = self._pending.get(source)
        if pending is None or attempt > pending.attempt:
            pending = self._pending[source] = _Pending(attempt)
        return pending if attempt == pending.attempt else None

    def _repeated(self, pending: _Pending, ack: Ack, known: tuple[ItemPath, ...]) -> Verdict:
        if known == ack.emitted:
            return Verdict.REPEATED
        return self._anomaly(pending, ack, f"it was acknowledged before with {known}")

    def _anomaly(self, pending: _Pending, ack: Ack, why: str) -> Verdict:
        # An anomaly never completes a source: the try fails and the source is owed again.
        pending.failed = True
        self.anomalies.append((ack, why))
        return Verdict.ANOMALY

    def _verdict(self, source: int, pending: _Pending) -> Verdict:
        if pending.failed:
            return Verdict.FAILED
        if not pending.is_complete():
            return Verdict.OPEN
        del self._pending[source]
        self._completed.add(source)
        return Verdict.COMPLETE


def _descends(path: ItemPath, ancestor: ItemPath) -> bool:
    return len(path) > len(ancestor) and path[: len(ancestor)] == ancestor
