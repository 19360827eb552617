"""Which sources are started next, and whether there is time left for them.

In this order: suspects, alone; sources that an earlier attempt was interrupted on, longest
first; failed sources, at the end of the shard; fresh ones; after all others, alone, those
that memory ran out for.  Near the end of the time limit
only those are started that are expected to finish: an interrupted source needs longer than
it ran, any other one what the sources that completed took per unit of weight.  What does not
fit is passed over, not taken; it fits again when the limit is raised.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from pyroaring import BitMap

from hpcresume.engine.calls import Inputs
from hpcresume.engine.judge import Judge
from hpcresume.engine.pace import Pace
from hpcresume.engine.queues import Chunk
from hpcresume.segment.segment import NEEDS_LONGER

_CHUNK_BYTES = 1 << 20


class Feed(Protocol):
    """Where fresh sources come from."""

    def take(self, count: int, size_bytes: int, *, weight_max: float) -> Inputs | None:
        """Return up to ``count`` sources of at most that weight; None where none is left.

        Heavier ones are passed over and stay.
        """

    def give(self, sources: Sequence[int]) -> Inputs:
        """Return sources by index, whether they were taken before or not."""

    def weight(self, source: int) -> float:
        """Return a source's expected cost, relative to the others."""

    def left(self) -> int:
        """Return how many sources have not been taken."""


class Admission:
    """Chooses the next sources.

    Args:
        feed: Fresh sources; without the suspects and the interrupted ones.
        judge: Numbers the tries.
        suspects: Groups of sources that were in flight when a driver died.
        ran: How long earlier attempts ran on a source without finishing it, in seconds.
        clock: Monotonic seconds.

    Attributes:
        pace: Told how long sources took.
        lacks_time: Whether the last call of :meth:`next` gave nothing for lack of time alone.
    """

    def __init__(
        self,
        feed: Feed,
        judge: Judge,
        *,
        suspects: Sequence[BitMap],
        ran: Mapping[int, float],
        clock: Callable[[], float],
    ) -> None:
        self._feed, self._judge, self._ran, self._clock = feed, judge, ran, clock
        self._alone = deque(half for group in suspects for half in _halves(group))
        accused = BitMap().union(*suspects)
        self._interrupted = deque(
            sorted((source for source in ran if source not in accused), key=lambda s: -ran[s])
        )
        self._too_long: list[int] = []
        self._again: deque[int] = deque()
        self._deadly: set[int] = set()
        self._hungry: deque[int] = deque()
        self._has_hungered: set[int] = set()
        self._finish_by: float | None = None
        self.pace = Pace()
        self.lacks_time = False

    @property
    def failing(self) -> int:
        """Failed sources that are to be tried again now."""
        return len(self._again) + len(self._hungry)

    def set_limit(self, finish_by: float | None) -> None:
        """Say when the last source has to be finished, on the clock; None: no limit."""
        self._finish_by = finish_by
        self._interrupted.extendleft(reversed(self._too_long))
        self._too_long.clear()

    def left(self) -> int:
        """Return how many sources can still be given, apart from suspects."""
        interrupted = len(self._interrupted) + len(self._too_long)
        return self._feed.left() + len(self._again) + interrupted

    def is_done(self) -> bool:
        """Tell whether there is nothing left to start, nor to try again now."""
        return not (self._alone or self.left())

    def note_deadly(self, sources: Iterable[int]) -> None:
        """Remember sources that ended their worker: they are tried last, one by one."""
        self._deadly.update(sources)

    def note_hungry(self, sources: Iterable[int]) -> None:
        """Remember sources that memory ran out for: tried again, they are alone."""
        self._has_hungered.update(sources)

    def put_off(self, source: int) -> None:
        """Start a source once more, uncharged and alone, when nothing else is left."""
        if source not in self._hungry:
            self._hungry.append(source)

    def try_again(self) -> bool:
        """Take up the sources that failed so far, or one put off; return whether there are any."""
        retries = self._judge.take_retries()
        for source in sorted(retries, key=lambda source: source in self._deadly):
            (self._hungry if source in self._has_hungered else self._again).append(source)
        if not retries and not self._again and self._hungry:
            retries = [self._hungry.popleft()]
            self._alone.append(BitMap(retries))
        self.lacks_time = self.lacks_time and not retries
        return bool(retries)

    def next(self, size: int, *, batch: int, is_free: bool, is_idle: bool) -> Chunk | None:
        """Return the sources of the next call, None where there are none for now.

        Args:
            size: How many of unknown or short time one call takes.
            batch: How many a batch of the first group holds.
            is_free: The worker that asks holds no call.
            is_idle: Nothing runs or waits anywhere.
        """
        self.lacks_time = False
        alone = next((group for group in self._alone if self._fits(group)), None)
        if alone is not None:
            if not is_idle:
                return None
            self._alone.remove(alone)
            return self._give(alone, isolated=True, exclusive=True)
        interrupted = self._take_interrupted(batch)
        if interrupted:
            return self._give(interrupted)
        if self._again and self._fits([self._again[0]]):
            return self._next_again(size, is_free=is_free)
        inputs = self._feed.take(size, _CHUNK_BYTES, weight_max=self._weight_max())
        if inputs is None:
            self.lacks_time = not self.is_done()
            return None
        self._judge.number_tries(inputs)
        return Chunk(inputs, 0)

    def _take_interrupted(self, count: int) -> list[int]:
        taken: list[int] = []
        while self._interrupted and len(taken) < count:
            source = self._interrupted.popleft()
            (taken if self._fits([source]) else self._too_long).append(source)
        return taken

    def _next_again(self, size: int, *, is_free: bool) -> Chunk | None:
        again, deadly = self._again, self._deadly
        if again[0] in deadly:
            return self._give([again.popleft()], isolated=True) if is_free else None
        taken: list[int] = []
        while again and len(taken) < size and again[0] not in deadly:
            taken.append(again.popleft())
        return self._give(taken)

    def _give(
        self, sources: Sequence[int] | BitMap, *, isolated: bool = False, exclusive: bool = False
    ) -> Chunk:
        inputs = self._feed.give(sorted(sources))  # as frames need them
        self._judge.number_tries(inputs)
        return Chunk(inputs, 0, isolated=isolated, exclusive=exclusive)

    def _fits(self, sources: Iterable[int]) -> bool:
        """Tell whether there is time left for each of some sources."""
        if self._finish_by is None:
            return True
        left, likely = self._finish_by - self._clock(), self.pace.likely()
        return all(
            NEEDS_LONGER * self._ran.get(source, 0.0) <= left
            and likely * self._feed.weight(source) <= left
            for source in sources
        )

    def _weight_max(self) -> float:
        """Return the largest weight of a source that is expected to finish in time."""
        likely = self.pace.likely()
        if self._finish_by is None or not likely:
            return float("inf")
        return max(0.0, self._finish_by - self._clock()) / likely


def _halves(group: BitMap) -> Iterator[BitMap]:
    """Yield the halves of a group of suspects: each death of a driver halves them again."""
    middle = len(group) // 2
    for half in (group[:middle], group[middle:]):
        if half:
            yield half
