"""What a stage may answer besides a value: several values, a failure, a broken worker.

``None`` is the fourth: it drops the item.
A list is one value; only a generator or :class:`Many` fans out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any


class Many:
    """Several values in place of one; an empty one drops the item.

    Attributes:
        items: The values, in order.
    """

    __slots__ = ("items",)

    items: tuple[Any, ...]

    def __init__(self, items: Iterable[Any] = ()) -> None:
        self.items = tuple(items)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Many) and self.items == other.items

    __hash__ = None  # type: ignore[assignment]  # its values need not be hashable

    def __repr__(self) -> str:
        return f"Many({list(self.items)!r})"


@dataclass(frozen=True, slots=True)
class Failed:
    """The item could not be processed; its source stays pending.

    Attributes:
        reason: One line for people; shown by ``hpcresume failures``.
        retry: False quarantines the source at once, without further attempts.
    """

    reason: str
    retry: bool = field(default=True, kw_only=True)


class WorkerBroken(Exception):  # noqa: N818  # also returned as a value; it names a state
    """This worker cannot go on: it is restarted, and no source is charged.

    May be raised or returned.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)

    def __reduce__(self) -> tuple[type[WorkerBroken], tuple[str]]:
        return type(self), (self.reason,)
