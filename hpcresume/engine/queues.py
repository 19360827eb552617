"""What waits and what runs: calls, the workers that hold them, and the queue of a group."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hpcresume.engine.calls import Inputs
from hpcresume.engine.groups import Group
from hpcresume.engine.pool import WorkerRef
from hpcresume.segment.segment import StageCount


@dataclass(slots=True)
class Chunk:
    """Items that wait for a call, or a call that runs.

    Attributes:
        inputs: The items.
        group: The group that is to work on them.
        at: First slot that still waits; a call takes as many as its time allows.
        isolated: Its worker holds no other call; it may kill it.
        exclusive: Nothing else runs at all; it may kill the driver.
        tainted: The mark named one of its sources before and the rest died again.
    """

    inputs: Inputs
    group: int
    at: int = 0
    isolated: bool = False
    exclusive: bool = False
    tainted: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it may be cut and joined with others."""
        return not (self.isolated or self.exclusive or self.tainted)

    def __len__(self) -> int:
        """Return the number of items that still wait."""
        return len(self.inputs) - self.at

    def cut(self, count: int) -> Inputs:
        """Take up to ``count`` items from the front."""
        start, self.at = self.at, min(len(self.inputs), self.at + count)
        if start == 0 and self.at == len(self.inputs):
            return self.inputs
        return self.inputs.select(range(start, self.at))


@dataclass(slots=True)
class WorkerState:
    """A worker as the executor sees it.

    Attributes:
        ref: Which one, and how often it was started.
        ready: Whether it takes calls.
        fruitless: How often it was started since it last finished a call.
        calls: The calls it holds, oldest first.
        begun: The newest call that it is known to have begun.
        items: Items in them.
        isolated: How many of them are to be alone.
    """

    ref: WorkerRef
    ready: bool = False
    fruitless: int = 0
    calls: dict[int, Chunk] = field(default_factory=dict)
    begun: int = 0
    items: int = 0
    isolated: int = 0

    def hold(self, call: int, chunk: Chunk) -> None:
        """Take a call."""
        self.calls[call] = chunk
        self.items += len(chunk)
        self.isolated += chunk.isolated

    def drop(self, call: int) -> Chunk:
        """Be rid of a call, and return what it was about."""
        chunk = self.calls.pop(call)
        self.items -= len(chunk)
        self.isolated -= chunk.isolated
        return chunk


@dataclass(slots=True)
class GroupState:
    """A group with its workers and what waits for them.

    Attributes:
        group: The group.
        workers: Its workers.
        counts: What each of its stages did.
        queue: The chunks that wait.
        waiting: Items in them.
        waiting_bytes: Their size.
        items_max: Most items of a call, after calls that handed some back; 0: no limit.
        seconds_per_item: What an item takes in a worker, most recent calls counting most;
            0 where that is not known yet.
    """

    group: Group
    workers: list[WorkerState]
    counts: list[StageCount]
    queue: deque[Chunk] = field(default_factory=deque)
    waiting: int = 0
    waiting_bytes: int = 0
    items_max: int = 0
    seconds_per_item: float = 0.0

    def enqueue(self, chunk: Chunk, *, front: bool = False) -> None:
        """Let a chunk wait, unless it holds nothing."""
        if not len(chunk):
            return
        (self.queue.appendleft if front else self.queue.append)(chunk)
        self.waiting += len(chunk)
        self.waiting_bytes += chunk.inputs.size_bytes()

    def unqueue(self, position: int) -> Chunk:
        """Take a chunk out whole."""
        chunk = self.queue[position]
        inputs = self.cut(position, len(chunk))
        return Chunk(
            inputs,
            chunk.group,
            isolated=chunk.isolated,
            exclusive=chunk.exclusive,
            tainted=chunk.tainted,
        )

    def cut(self, position: int, count: int) -> Inputs:
        """Take up to ``count`` items from the front of a chunk."""
        chunk = self.queue[position]
        inputs = chunk.cut(count)
        self.waiting -= len(inputs)
        self.waiting_bytes -= inputs.size_bytes()
        if not len(chunk):
            del self.queue[position]
        return inputs
