"""Plans: the remainder is dealt whole, in balance, and read back shard by shard."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from hpcresume.errors import CorruptDataError
from hpcresume.merge.plan import (
    DEAL_BY_COST_BELOW,
    ArrayPlan,
    Launch,
    PlanFooter,
    deal,
    make_shards,
    open_plan,
    share,
    write_plan,
)
from hpcresume.run.directory import RunDir
from hpcresume.segment import bitmap as bitmaps
from tests.support.places import Place, make_run, write_file


@pytest.fixture(params=["posix", "sim"])
def run(request, tmp_path: Path) -> RunDir:
    return Place.make(request.param, tmp_path).run()


def check_partition(remainder: BitMap, dealt: list[BitMap], shards: int) -> None:
    """Every source in exactly one shard, none empty, never more shards than wanted."""
    assert min(shards, len(remainder)) >= len(dealt)
    assert all(dealt)
    assert len(remainder) == sum(map(len, dealt))
    assert remainder == bitmaps.union(dealt)


@given(st.sets(st.integers(0, 5000), max_size=200), st.integers(1, 40))
def test_equal_costs_are_dealt_in_blocks(sources: set[int], shards: int) -> None:
    """Contiguous blocks whose sizes differ by at most one."""
    remainder = BitMap(sources)
    dealt = deal(remainder, shards)
    check_partition(remainder, dealt, shards)
    assert sorted(sources) == [index for shard in dealt for index in shard]
    assert max(map(len, dealt), default=0) - min(map(len, dealt), default=0) <= 1


@given(st.dictionaries(st.integers(0, 500), st.floats(0, 1e6), max_size=60), st.integers(1, 12))
def test_known_costs_are_dealt_longest_first(weights: dict[int, float], shards: int) -> None:
    """No shard exceeds the mean by more than its heaviest source."""
    remainder = BitMap(weights)
    dealt = deal(remainder, shards, weights.__getitem__)
    check_partition(remainder, dealt, shards)
    if dealt:
        mean = sum(weights.values()) / len(dealt)
        heaviest = max(weights.values())
        loads = [sum(weights[i] for i in shard) for shard in dealt]
        assert max(loads) <= (mean + heaviest) * (1 + 1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 64), st.sampled_from(["even", "skewed", "zero"]))
def test_many_sources_are_dealt_in_blocks_of_equal_cost(seed: int, shards: int, kind: str) -> None:
    """Ten thousand and more: contiguous blocks, none above the mean plus one source."""
    chance = random.Random(seed)
    count = DEAL_BY_COST_BELOW + chance.randrange(500)
    weights = {
        "even": [chance.uniform(1, 2) for _ in range(count)],
        "skewed": [chance.paretovariate(1.1) for _ in range(count)],
        "zero": [0.0] * count,
    }[kind]
    remainder = bitmaps.span(0, count)
    dealt = deal(remainder, shards, weights.__getitem__)
    check_partition(remainder, dealt, shards)
    assert list(range(count)) == [index for shard in dealt for index in shard]
    mean, heaviest = sum(weights) / shards, max(weights)
    assert max(sum(weights[i] for i in shard) for shard in dealt) <= (mean + heaviest) * 1.001
    if kind == "zero":
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.integers(0, DEAL_BY_COST_BELOW + 99), st.floats(0, 1e5), max_size=30),
    st.integers(1, 64),
    st.sampled_from([DEAL_BY_COST_BELOW - 1, DEAL_BY_COST_BELOW + 100]),
    st.sampled_from([1.0, 0.25, None]),
)
def test_slow_sources_share_no_shard_with_many(
    measured: dict[int, float], shards: int, count: int, weight: float | None
) -> None:
    """
    Where some were seen to take long, no shard exceeds the mean by more than one source, few
    sources or many; who is slow and not left to do plays no part.
    """
    remainder = bitmaps.span(0, count)
    dealt = deal(remainder, shards, weight and (lambda _: weight), measured)
    check_partition(remainder, dealt, shards)
    loads = [sum(measured.get(i, weight or 1.0) for i in shard) for shard in dealt]
    slow = [cost for i, cost in measured.items() if i in remainder]
    mean, heaviest = sum(loads) / len(dealt), max([weight or 1.0, *slow])
    assert max(loads) <= (mean + heaviest + 1) * 1.001


def test_slow_sources_leave_the_others_in_blocks() -> None:
    """Many sources of which two are slow: a shard of each, with what it has room for."""
    remainder = bitmaps.span(0, 12_000)
    dealt = deal(remainder, 3, None, {7: 3000.0, 9_000: 5000.0})
    assert [1667, 3667, 6666] == sorted(map(len, dealt))
    assert all(len(bitmaps.dump(shard)) < 100 for shard in dealt)
    assert not any({7, 9_000} <= set(shard) for shard in dealt)


def test_nothing_left_needs_no_shards() -> None:
    """An empty remainder is dealt over no shards."""
    assert [] == deal(BitMap(), 8)
    assert [] == deal(BitMap(), 8, lambda _: 1.0)


def test_a_large_remainder_is_dealt_quickly() -> None:
    """A hundred million sources over a thousand shards, as bitmaps of a few runs."""
    dealt = deal(bitmaps.span(0, 10**8), 1000)
    check_partition(bitmaps.span(0, 10**8), dealt, 1000)
    assert max(len(bitmaps.dump(shard)) for shard in dealt) < 200


def footer(run: RunDir, tasks: int, round_: int = 0) -> PlanFooter:
    return PlanFooter(
        run.run_id, round_, 3, 1, 100, tasks, {"run": {"max_attempts": 3}}, Launch("slurm", 4)
    )


def test_a_plan_is_read_as_written(run: RunDir) -> None:
    """Each shard comes back with its sources, tries, suspects and times, and no other's."""
    dealt = deal(bitmaps.span(0, 100), 4)
    suspected = [BitMap([24, 25, 26, 500]), BitMap([99])]
    shards = make_shards(dealt, {3: 1, 30: 2, 1000: 9}, suspected, {60: 9.5, 200: 1.0})
    write_plan(run, footer(run, 4), shards)

    plan = open_plan(run, 0)

    assert [{}, {}, {60: 9.5}, {}] == [plan.shard(task).ran for task in range(4)]
    assert dealt == [plan.shard(task).bitmap() for task in range(4)]
    assert [{3: 1}, {30: 2}, {}, {}] == [plan.shard(task).attempts for task in range(4)]
    suspects = [[bitmaps.load(g, what="x") for g in plan.shard(t).suspects] for t in range(4)]
    assert [[BitMap([24])], [BitMap([25, 26])], [], [BitMap([99])]] == suspects
    assert (4, {"run": {"max_attempts": 3}}) == (plan.footer.tasks, plan.footer.settings)
    assert [0] == run.rounds()


def test_a_task_beyond_the_plan(run: RunDir) -> None:
    """An element that the plan does not know is an IndexError."""
    write_plan(run, footer(run, 1), make_shards([BitMap([1])], {}, []))
    with pytest.raises(IndexError):
        open_plan(run, 0).shard(1)


def test_a_round_is_planned_once(run: RunDir) -> None:
    """A second process that deals the round otherwise is refused."""
    write_plan(run, footer(run, 1), make_shards([BitMap([1])], {}, []))
    with pytest.raises(FileExistsError):
        write_plan(run, footer(run, 2), make_shards([BitMap([1]), BitMap([2])], {}, []))
    assert 1 == open_plan(run, 0).footer.tasks


def test_a_plan_of_another_run_is_refused(run: RunDir) -> None:
    """A plan copied from another run names that run."""
    other = make_run(run.fs, run.path + "-other", "f" * 16)
    write_plan(other, footer(other, 1), make_shards([BitMap([1])], {}, []))
    run.fs.mkdir(run.round_path(0))
    write_file(run.fs, run.plan_path(0), run.fs.read(other.plan_path(0)))
    with pytest.raises(CorruptDataError, match="belongs to run ffffffffffffffff"):
        open_plan(run, 0)


def test_every_damage_to_a_plan_is_found(tmp_path: Path) -> None:
    """Any byte flipped or cut: CorruptDataError on opening or on reading the shard."""
    run = Place.make("sim", tmp_path).run()
    write_plan(run, footer(run, 2), make_shards([BitMap([1, 2]), BitMap([3])], {1: 1}, []))
    data = run.fs.read(run.plan_path(0))
    flips = range(16, len(data))
    damaged = [data[:p] + bytes([data[p] ^ 0x81]) + data[p + 1 :] for p in flips]
    for content in [*damaged, *(data[:n] for n in range(len(data)))]:
        write_file(run.fs, run.plan_path(0), content)
        with pytest.raises(CorruptDataError):
            read_all(run)


def read_all(run: RunDir) -> None:
    plan = open_plan(run, 0)
    for task in range(2):
        plan.shard(task).bitmap()


def test_arrays_of_a_plan(run: RunDir) -> None:
    """Each task belongs to one array; a plan that names none is one array of all tasks."""
    shards = make_shards([BitMap([1]), BitMap([2]), BitMap([3])], {}, [])
    more = ArrayPlan(2, 1, 900, "no more")
    two = msgspec.structs.replace(footer(run, 3), arrays=[ArrayPlan(0, 2), more])
    write_plan(run, two, shards)
    write_plan(run, footer(run, 3, round_=1), shards)

    plan, plain = open_plan(run, 0), open_plan(run, 1)

    assert [0, 0, 900] == [plan.array_of(task).memory_mib for task in range(3)]
    assert more == plan.array_of(2)
    assert [ArrayPlan(0, 3)] == plain.arrays
    with pytest.raises(IndexError, match="round 0 has no task 3"):
        plan.array_of(3)


@given(st.integers(1, 200), st.lists(st.integers(1, 10**7), min_size=1, max_size=6))
def test_tasks_are_shared_in_proportion(total: int, sizes: list[int]) -> None:
    """At least one each, never more than sources, and no task spared that could carry load."""
    shares = share(total, sizes)
    assert all(1 <= mine <= size for mine, size in zip(shares, sizes, strict=True))
    assert max(len(sizes), min(total, sum(sizes))) == sum(shares)
    heaviest = max(size / mine for mine, size in zip(shares, sizes, strict=True))
    even = sum(sizes) / max(1, sum(shares) - len(sizes) + 1)
    assert heaviest <= max(even, 1) * 2


def test_two_groups_share_as_they_need() -> None:
    """One source of a hundred gets one task of eight; a task for each even if one is too few."""
    assert [[7, 1], [1, 1], [1]] == [share(8, [99, 1]), share(1, [99, 1]), share(8, [1])]
    assert [1] == share(4, [0])
