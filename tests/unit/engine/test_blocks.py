"""Items that go to the next group many at a time."""

from __future__ import annotations

import enum
import pickle
from array import array
from typing import Any

import pytest

from hpcresume.engine import blocks
from hpcresume.engine.calls import Inputs
from hpcresume.ids import ItemPath
from tests.unit.engine.chains import ChainCase, call, failed, records


class Colour(enum.IntEnum):
    """Looks like an int and is none."""

    RED = 1


class Poison(int):
    """An int whose unpickling runs somebody's code."""

    def __reduce__(self) -> Any:
        return _poisonous, (int(self),)


def _poisonous(value: int) -> int:
    if value % 2:
        raise ValueError(f"{value} cannot be unpickled")
    return value


SHARED = {"seed": 0}


def _with_shared(n: int) -> dict[str, Any]:
    return {"n": n, "options": SHARED}


def _same(n: int) -> dict[str, Any]:
    SHARED["n"] = n
    return SHARED


def _seeded(item: dict[str, Any]) -> dict[str, Any]:
    before = item["options"]["seed"]
    item["options"]["seed"] = item["n"]
    return {"n": item["n"], "before": before}


PLAIN: list[list[Any]] = [
    list(range(1000)),
    [None, 1, 2.5, "text", b"bytes", True, 3j] * 30,
    [{"i": i, "text": "x" * (i % 7)} for i in range(200)],
    [(i, str(i)) for i in range(200)],
    [[i] * (i % 5) for i in range(200)],
]


@pytest.mark.parametrize("items", PLAIN)
def test_plain_items_come_back_from_any_cut(items: list[Any]) -> None:
    """Cut and joined in every way, they are the same items, with the same types."""
    whole = blocks.in_blocks(items)
    assert isinstance(whole, blocks.Blocks)
    for cut in (0, 1, 63, 64, 65, 130, len(items)):
        parts = [whole[:cut], whole[cut:]]
        assert [cut, len(items) - cut] == list(map(len, parts))
        for again in (blocks.join(parts), blocks.join([blocks.singly(parts[0]), parts[1]])):
            found = list(map(pickle.loads, blocks.singly(again)))
            assert items == found
            assert list(map(type, items)) == list(map(type, found))
    assert items[70:75] == whole[10:][60:65].load()


def test_a_cut_counts_the_bytes_of_its_items() -> None:
    """What waits between groups is bounded in bytes, of which each item counts its own once."""
    whole = blocks.in_blocks([f"{n:0100d}" for n in range(640)])
    assert isinstance(whole, blocks.Blocks)
    assert 64000 <= whole.size_bytes() <= 70000
    for step in (1, 7, 10, 64):
        assert whole.size_bytes() == sum(
            whole[at : at + step].size_bytes() for at in range(0, 640, step)
        )


@pytest.mark.parametrize(
    "items",
    [
        [],
        [1, 2, 3],
        [Colour.RED] * 10,
        [{"n": [1]} for _ in range(10)],
        [{"n": Colour.RED} for _ in range(10)],
        [{(1, 2): 0} for _ in range(10)],
        [1, "a", {"n": 1}, None, 5],
        [SHARED] * 10,
        [bytearray(b"x")] * 10,
        ["x" * 8000] * 10,
        ["x", *(f"{n:08000}" for n in range(100))],
    ],
    ids=["none", "few", "subclass", "nested", "inner-subclass", "key", "mixed", "same", "other",
         "large", "large after a small one"],
)  # fmt: skip
def test_others_go_singly(items: list[Any]) -> None:
    """What is not plain throughout, belongs to two items or is large is in no block."""
    assert blocks.in_blocks(items) is None


def test_items_of_uneven_size_take_few_others_along() -> None:
    """However small the first one is: an item does not travel with hundreds of kilobytes."""
    items = [f"{n:0{n}d}" for n in range(2000)]
    whole = blocks.in_blocks(items)
    assert isinstance(whole, blocks.Blocks)
    assert max(len(pickle.dumps(whole[n : n + 1])) for n in range(2000)) < 40_000
    assert items == whole.load()


def _two(case: ChainCase, first: Any, second: Any, payloads: list[Any]) -> tuple[Any, Any]:
    """Run two groups of one stage; return the first one's result and the rows of the other's."""
    chain = case.make([first, second], count=1)
    call(chain, records(payloads[:1]))  # how long one takes
    result = call(chain, records(payloads))
    path, items = result.column
    n = len(payloads)
    inputs = Inputs(array("I", range(n)), paths=[path] * n, items=items)
    return items, call(case.make([first, second], first=1, count=1), inputs)


def test_a_group_hands_its_items_on_in_blocks(case: ChainCase) -> None:
    """The next group gets what the one before made, and answers for each of them."""
    items, result = _two(case, lambda n: n + 1, lambda n: {"n": n}, list(range(5000)))
    assert isinstance(items, blocks.Blocks)
    path, made = result.column
    assert ItemPath((0, 0)) == path
    assert [b'{"n":%d}\n' % n for n in range(1, 5001)] == made


def test_what_items_share_is_no_way_from_one_to_the_other(case: ChainCase) -> None:
    """A later group's stage may change its item: others that hold the same object stay."""
    _, result = _two(case, _with_shared, _seeded, list(range(100)))
    assert {b'"before":0' in row for row in result.column[1]} == {True}


def test_an_item_changed_after_it_was_made_is_as_it_was(case: ChainCase) -> None:
    """One object made again and again is, in the next group, what it was at the end of its call."""
    items, _ = _two(case, _same, lambda item: item, list(range(10)))
    assert isinstance(items, list)


def test_an_item_that_cannot_be_unpickled_fails_alone(case: ChainCase) -> None:
    """User code that runs while an item arrives is that item's failure."""
    _, result = _two(case, Poison, lambda n: {"n": n}, [0, 1, 2, 3, 4, 5])
    assert {1, 3, 5} == set(failed(result))
    assert {0, 2, 4} == set(result.rows)


@pytest.mark.parametrize("drops", ["first", "last", "some"])
def test_a_drop_ends_the_blocks_and_nothing_is_lost(case: ChainCase, drops: str) -> None:
    """Where not every source made one item, each item goes by its source."""
    n = 9000  # more than two slices
    gone = {"first": {0}, "last": {n - 1}, "some": {5, 4099, 8500}}[drops]
    result = call(
        case.make([lambda i: None if i in gone else i, lambda i: i], count=1),
        records(list(range(n))),
    )
    assert result.column is None
    found = {
        slot: [pickle.loads(item) for _, item in made] for slot, made in result.emitted.items()
    }
    assert {slot: [] if slot in gone else [slot] for slot in range(n)} == found


def test_a_marked_call_reads_each_item_of_a_block_by_itself(case: ChainCase) -> None:
    """A call that may kill its worker gets the same items."""
    result = call(case.make([lambda n: n, lambda n: n], count=1), records(list(range(200))))
    path, items = result.column
    inputs = Inputs(array("I", range(200)), paths=[path] * 200, items=items)
    part = inputs.select(range(50, 150))
    marked = call(case.make([lambda n: n, lambda n: n], first=1, count=1), part, marked=True)
    assert [b"%d\n" % n for n in range(50, 150)] == marked.column[1]


def test_items_for_a_stage_that_takes_one_at_a_time_go_singly(case: ChainCase) -> None:
    """Calls of an async stage are of one item: it does not take a block along for it."""

    async def later(n: int) -> int:
        return n

    result = call(case.make([lambda n: n, later], count=1), records(list(range(100))))
    assert result.column is not None
    assert isinstance(result.column[1], list)
