"""What the executor decides: order, bounds, charges, stops."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyroaring import BitMap

import hpcresume as hr
from hpcresume.engine.calls import Inputs
from hpcresume.engine.chain import Chain
from hpcresume.engine.executor import Executor, Limits, StageBrokenError
from hpcresume.engine.groups import make_groups
from hpcresume.engine.pool import Event, Finished, Started, WorkerRef
from hpcresume.errors import PoolUnrecoverable
from hpcresume.pipeline.child import CommandOutOfMemoryError
from tests.unit.engine.chains import ChainCase
from tests.unit.engine.pools import Bench, Death, ListFeed, Outcomes


def one(x: Any) -> Any:
    """Pass a value on."""
    return x


@hr.stage(workers=1, name="second")
def second(x: Any) -> Any:
    """Pass a value on, in a group of its own."""
    return x


def fan(n: int) -> Iterator[int]:
    """Give 0 .. n - 1."""
    yield from range(n)


def killer(*sources: int, named: bool = False) -> Callable[[WorkerRef, Inputs, bool], Death | None]:
    """Return a script in which a call with one of these sources kills its worker."""

    def kills(_worker: WorkerRef, inputs: Inputs, marked: bool) -> Death | None:
        guilty = [source for source in inputs.sources if source in sources]
        if not guilty:
            return None
        return Death(guilty[0] if named and marked else None)

    return kills


def test_everything_completes_once(tmp_path: Path) -> None:
    """Every source completes once with its rows, no mark stays, and the shard is settled."""
    bench = Bench(tmp_path, [fan, one], [3, 0, 2], workers=2)
    assert bench.run()
    assert {0: [0, 1, 2], 1: [], 2: [0, 1]} == bench.outcomes.rows
    assert ({}, 3, 0) == (bench.outcomes.open, bench.executor.completed, bench.executor.in_flight)


def test_deepest_first_and_bounded(tmp_path: Path) -> None:
    """Sources are held back while much waits between groups."""
    most = 0
    bench = Bench(tmp_path, [fan, second], [10] * 50, limits=Limits(waiting_max=20, chunk_max=4))

    def tick() -> bool:
        nonlocal most
        most = max(most, bench.executor._groups[1].waiting)
        return True

    assert bench.run(tick)
    # A call that is under way when the bound is reached may still add what it makes.
    assert 0 < most <= 20 + 2 * 4 * 10
    assert {i: list(range(10)) for i in range(50)} == bench.outcomes.rows


def test_waiting_bytes_are_bounded(tmp_path: Path) -> None:
    """Few but large items hold sources back as many small ones do."""
    most = 0
    limits = Limits(waiting_max_bytes=50_000, chunk_max=1)
    bench = Bench(tmp_path, [lambda _x: "x" * 10_000, second], [0] * 40, limits=limits)

    def tick() -> bool:
        nonlocal most
        most = max(most, bench.executor._groups[1].waiting_bytes)
        return True

    assert bench.run(tick)
    assert most <= 80_000
    assert 0 == bench.executor._groups[1].waiting_bytes


@pytest.mark.parametrize(("per_item", "largest"), [(1e-5, 1000), (1e-7, 4096), (0.02, 1)])
def test_calls_are_sized_by_time(tmp_path: Path, per_item: float, largest: int) -> None:
    """A call holds about 10 ms of work: slow items go one by one, quick ones by thousands."""
    bench = Bench(
        tmp_path, [one], [0] * 40_000 if largest > 1 else [0] * 40, seconds_per_item=per_item
    )
    assert bench.run()
    assert 1 == bench.sizes()[0]
    assert largest == max(bench.sizes())


def test_what_waits_beside_each_other_is_told_in_small_calls(tmp_path: Path) -> None:
    """However much a call may hold, items of an async stage do not wait long for each other."""

    async def work(x: int) -> int:
        return x

    limits = Limits(chunk_target_s=1.0)
    bench = Bench(
        tmp_path, [hr.stage(work, max_concurrency=64)], [0] * 400,
        limits=limits, seconds_per_item=0.005,
    )  # fmt: skip
    assert bench.run()
    assert 4 == max(bench.sizes())
    bench = Bench(tmp_path, [one], [0] * 4000, limits=limits, seconds_per_item=0.005)
    assert bench.run()
    assert 200 == max(bench.sizes())


def test_batches_are_full(tmp_path: Path) -> None:
    """A call has at least a batch where there is one, however slow the items are."""

    class Batch(hr.Stage):
        batch_size = 8
        workers = 1

        def process_batch(self, batch: list[int]) -> list[int]:
            return batch

    bench = Bench(tmp_path, [one, Batch()], [0] * 100, seconds_per_item=1.0)
    assert bench.run()
    assert max(bench.sizes(1)) == 8
    bench = Bench(tmp_path, [Batch()], [0] * 100, seconds_per_item=1.0)
    assert bench.run()
    assert [8] * 12 + [4] == bench.sizes()


def test_items_of_a_fan_out_travel_many_at_once(tmp_path: Path) -> None:
    """What one source fans out to is not sent on item by item when the feed is empty."""
    bench = Bench(tmp_path, [fan, second], [20_000], seconds_per_item=1e-6)
    assert bench.run()
    assert list(range(20_000)) == bench.outcomes.rows[0]
    assert len(bench.sizes(1)) < 60


def test_later_groups_take_what_waits_while_sources_still_come(tmp_path: Path) -> None:
    """One call costs the driver more than many quick items: they are cut small at the end only."""
    bench = Bench(tmp_path, [one, second], [0] * 40_000, seconds_per_item=1e-6)
    assert bench.run()
    large = [size for size in bench.sizes(1) if size >= 4000]
    assert sum(large) > 20_000
    assert bench.sizes(1)[-1] < 1000


def test_slow_items_go_to_idle_workers(tmp_path: Path) -> None:
    """No source waits behind a slow one while another worker has nothing to do."""
    bench = Bench(tmp_path, [one], [0] * 4, workers=4, seconds_per_item=3600)
    bench.executor.start()
    seen = 0

    def tick() -> bool:
        nonlocal seen
        seen += 1
        return seen < 3

    assert not bench.executor.run(tick, tick_s=0)
    assert [0, 1, 2, 3] == [s.worker.index for s in bench.pool.log][:4]


def test_retries_come_at_the_end_of_the_shard(tmp_path: Path) -> None:
    """A failed source is tried again when all others had their turn, up to its attempts."""
    tries: list[int] = []

    def picky(x: int, ctx: hr.Context) -> int:
        if x == 1:
            tries.append(ctx.attempt)
            raise ValueError("always")
        return x

    bench = Bench(tmp_path, [picky], [0, 1, 2, 3], limits=Limits(max_attempts=3))
    assert bench.run()
    assert [1, 2, 3] == tries
    assert [(1, n, "ValueError") for n in (1, 2, 3)] == bench.outcomes.charged()
    assert {0: [0], 2: [2], 3: [3]} == bench.outcomes.rows
    last = [s.sources for s in bench.pool.log][-2:]
    assert [[1], [1]] == last
    assert (1, 0) == (bench.executor.quarantined, bench.executor.failing)


def test_retry_that_succeeds_completes(tmp_path: Path) -> None:
    """A source that fails once completes with the rows of the try that worked, and no others."""

    def first(x: int) -> Iterator[int]:
        yield from range(x)

    @hr.stage(workers=1)
    def flaky(k: int, ctx: hr.Context) -> list[int]:
        if k == 2 and ctx.source_id == "s1" and ctx.attempt == 1:
            raise ValueError("once")
        return [k, ctx.attempt]

    for chunk_max in (1, 100):
        bench = Bench(tmp_path, [first, flaky], [3, 6, 2], limits=Limits(chunk_max=chunk_max))
        assert bench.run()
        assert [[k, 2] for k in range(6)] == bench.outcomes.rows[1]
        assert [[k, 1] for k in range(3)] == bench.outcomes.rows[0]
        assert [(1, 1, "ValueError")] == bench.outcomes.charged()


def test_items_of_a_failed_source_are_not_worked_on(tmp_path: Path) -> None:
    """What a failed try still has waiting between groups is dropped."""
    worked: list[int] = []

    @hr.stage(workers=1)
    def fail(k: int) -> int:
        worked.append(k)
        raise ValueError(k)

    bench = Bench(tmp_path, [fan, fail], [1000], limits=Limits(max_attempts=1, chunk_max=10))
    assert bench.run()
    assert len(worked) <= 20
    assert [(0, 1, "ValueError")] == bench.outcomes.charged()


def test_attempts_go_on_from_the_plan(tmp_path: Path) -> None:
    """Tries are numbered after those of earlier rounds, and counted with them."""

    def fail(x: int) -> int:
        raise ValueError(x)

    bench = Bench(tmp_path, [fail], [0, 1], attempts={1: 2}, limits=Limits(max_attempts=3))
    assert bench.run()
    assert [(1, 3), (0, 1), (0, 2), (0, 3)] == [(s, n) for s, n, _ in bench.outcomes.charged()]


def test_no_retry_quarantines_at_once(tmp_path: Path) -> None:
    """``Failed(retry=False)`` is charged once and for good."""
    bench = Bench(tmp_path, [lambda _x: hr.Failed("never", retry=False)], [0])
    assert bench.run()
    assert [(0, 1, "Failed")] == bench.outcomes.charged()
    assert 1 == bench.executor.quarantined


def _failing_from(start: int, error: Callable[[int], Exception] = ValueError) -> Any:
    def stage(x: int) -> int:
        if x >= start:
            raise error(x)
        return x

    return stage


def test_fifty_like_failures_stop_and_charge_nobody(tmp_path: Path) -> None:
    """A stage that fails 50 sources in a row is broken; what completed before is kept."""
    bench = Bench(tmp_path, [one, _failing_from(60)], list(range(200)))
    with pytest.raises(StageBrokenError, match=r"'stage' failed 50 consecutive sources") as caught:
        bench.run()
    assert ("stage-broken", "stage") == (caught.value.fields["kind"], caught.value.fields["stage"])
    assert [] == bench.outcomes.failures
    assert {i: [i] for i in range(60)} == bench.outcomes.rows


def test_fifty_like_failures_of_generators_rows_and_sources(tmp_path: Path) -> None:
    """The stop holds for generators that raise and for rows that cannot be encoded."""

    def bad(_x: int) -> Iterator[int]:
        raise ValueError("at once")
        yield 1

    for stage in (bad, lambda _x: {1, 2}):
        bench = Bench(tmp_path, [stage], [0] * 60)
        with pytest.raises(StageBrokenError):
            bench.run()
        assert [] == bench.outcomes.failures


def test_an_unrecoverable_pool_stops_and_charges_nobody(tmp_path: Path) -> None:
    """The attempt ends with the pool's reason; what completed before is kept."""

    def serve(x: int) -> int:
        if x == 3:
            raise PoolUnrecoverable("nothing serves")
        return x

    bench = Bench(tmp_path, [one, serve], list(range(6)), limits=Limits(chunk_max=1))
    with pytest.raises(StageBrokenError, match="serve': nothing serves") as caught:
        bench.run()
    assert "pool-unrecoverable" == caught.value.fields["kind"]
    assert [] == bench.outcomes.failures
    assert {0: [0], 1: [1], 2: [2]} == bench.outcomes.rows


def test_fifty_deaths_in_a_row_stop(tmp_path: Path) -> None:
    """Where every source kills its worker, the stage is what is broken."""

    def kills(_worker: WorkerRef, inputs: Inputs, marked: bool) -> Death | None:
        return Death(inputs.sources[0] if marked else None)

    bench = Bench(tmp_path, [one], [0] * 60, kills=kills)
    with pytest.raises(StageBrokenError, match="50 consecutive sources with death"):
        bench.run()
    assert [] == bench.outcomes.failures


def test_fewer_like_failures_are_charged_at_the_end(tmp_path: Path) -> None:
    """49 failures in a row and nothing after them are the sources' own."""
    bench = Bench(tmp_path, [_failing_from(1)], list(range(50)), limits=Limits(max_attempts=1))
    assert bench.run()
    assert 49 == len(bench.outcomes.failures) == bench.executor.quarantined


@pytest.mark.parametrize("what", ["success", "kind"])
def test_streak_ends_with_a_success_or_another_kind(tmp_path: Path, what: str) -> None:
    """40 failures, something else, 40 failures are no broken stage."""

    def stage(x: int) -> int:
        if x == 40:
            if what == "kind":
                raise KeyError(x)
            return x
        raise ValueError(x)

    bench = Bench(tmp_path, [stage], list(range(81)), limits=Limits(max_attempts=1))
    assert bench.run()
    assert 80 + (what == "kind") == len(bench.outcomes.failures)


def test_streaks_are_of_one_stage(tmp_path: Path) -> None:
    """Failures of two stages, 30 each, are two streaks."""

    def first(x: int) -> int:
        if x % 2:
            raise ValueError(x)
        return x

    bench = Bench(
        tmp_path, [first, _failing_from(0)], list(range(60)), limits=Limits(max_attempts=1)
    )
    assert bench.run()
    assert 60 == len(bench.outcomes.failures)


def test_sources_that_failed_before_make_no_streak(tmp_path: Path) -> None:
    """Second tries never stop a stage."""
    bench = Bench(tmp_path, [_failing_from(0)], [0] * 60, attempts=dict.fromkeys(range(60), 1))
    assert bench.run()
    assert 60 == bench.executor.quarantined


def test_scattered_failures_of_the_sources_function(tmp_path: Path) -> None:
    """One failure in three among successes is never a broken stage, whatever its stage."""

    def stage(x: int) -> int:
        if x % 3 == 0:
            raise ValueError(x)
        return x

    for chunk_max in (1, 7, 4096):
        limits = Limits(max_attempts=1, chunk_max=chunk_max)
        bench = Bench(tmp_path, [stage], list(range(300)), limits=limits)
        assert bench.run()
        assert 100 == bench.executor.quarantined


def test_hold_admits_nothing_and_ends_nothing(tmp_path: Path) -> None:
    """While held no source is admitted, nor tried again; released, everything is done."""
    bench = Bench(tmp_path, [one], [0] * 10)
    bench.executor.hold(True)
    ticks = 0

    def tick() -> bool:
        nonlocal ticks
        ticks += 1
        if ticks == 5:
            assert [] == bench.pool.log
            bench.executor.hold(False)
        return True

    assert bench.run(tick)
    assert 10 == bench.executor.completed


def test_stop_drains_what_is_in_flight(tmp_path: Path) -> None:
    """After a stop nothing is admitted, what is between groups is finished, the rest is left."""
    bench = Bench(tmp_path, [fan, second], [5] * 100, limits=Limits(chunk_max=4, waiting_max=20))

    def tick() -> bool:
        if bench.executor.completed:
            bench.executor.stop()
        return True

    assert not bench.run(tick)
    taken = len(bench.feed.taken)
    assert 0 < taken < 100
    assert taken == bench.executor.completed == len(bench.outcomes.rows)
    assert {} == bench.outcomes.open


def test_stop_recalls_who_begins_sources(tmp_path: Path) -> None:
    """Sources that workers hold and have not begun are left; what is between groups is not."""
    bench = Bench(tmp_path, [fan, second], [5] * 100, workers=2, limits=Limits(chunk_max=4))
    held: set[int] = set()

    def tick() -> bool:
        calls = bench.pool.waiting()
        if not held and any(call.worker.group for call in calls):
            held.update(*(call.sources for call in calls if not call.worker.group))
            if held:
                bench.executor.stop()
                bench.executor.stop()
        return True

    assert not bench.run(tick)
    firsts = [ref for ref in bench.pool.starts if ref.group == 0]
    assert firsts == bench.pool.recalled
    assert held
    assert set(bench.feed.taken) - held == bench.outcomes.rows.keys()
    assert (0, {}) == (bench.executor.in_flight, bench.outcomes.open)


@pytest.mark.parametrize("stages", [[one], [fan, second]])
def test_what_a_call_did_not_begin_is_run_again(tmp_path: Path, stages: list[Any]) -> None:
    """Each source is begun once and completes once."""
    bench = Bench(
        tmp_path, stages, list(range(40)), limits=Limits(chunk_max=8, chunk_target_s=1.0),
        begins=lambda inputs: max(1, len(inputs) // 3), seconds_per_item=1e-3,
    )  # fmt: skip
    assert bench.run()
    assert list(range(40)) == sorted(bench.outcomes.rows)
    begun = [
        call.sources[: max(1, len(call.sources) // 3)]
        for call in bench.pool.log
        if call.worker.group == 0
    ]
    assert list(range(40)) == sorted(itertools.chain(*begun))


def test_sources_in_batches_are_paced_by_their_batch(tmp_path: Path) -> None:
    """A source takes as long as its batch, however many of them a call holds."""

    class Together(hr.Stage):
        batch_size = 8

        def process_batch(self, batch: list[int]) -> list[int]:
            return batch

    bench = Bench(
        tmp_path, [Together], [0] * 2000, limits=Limits(chunk_target_s=1.0), seconds_per_item=1e-3
    )
    assert bench.run()
    assert max(bench.sizes()) > 100
    assert 0.008 <= bench.executor._admission.pace.likely() < 0.0101


def test_pool_says_how_long_a_call_may_be(tmp_path: Path) -> None:
    """Where a call keeps everybody waiting, it holds less work than the settings say."""
    bench = Bench(
        tmp_path, [one], list(range(200)), limits=Limits(chunk_target_s=1.0),
        call_most_s=4e-3, seconds_per_item=1e-3,
    )  # fmt: skip
    assert bench.run()
    assert 4 == max(bench.sizes())


@pytest.mark.parametrize(("cuts", "most"), [(1000, 16), (3, 40)])
def test_calls_hold_what_those_before_them_began(tmp_path: Path, cuts: int, most: int) -> None:
    """Where calls begin 4 of their items, the next ones hold little more, until some do."""
    short = iter([4] * cuts)
    bench = Bench(
        tmp_path, [one], list(range(400)), limits=Limits(chunk_target_s=1.0, chunk_max=40),
        begins=lambda inputs: min(next(short, len(inputs)), len(inputs)), seconds_per_item=1e-3,
    )  # fmt: skip
    assert bench.run()
    assert most == max(bench.sizes()[5:])


def test_call_handed_back_whole_says_nothing_of_its_worker(tmp_path: Path) -> None:
    """It finished nothing: how long an item takes is not learnt from it."""
    turns = itertools.count()
    bench = Bench(
        tmp_path, [one], list(range(200)), limits=Limits(chunk_target_s=1e-2),
        begins=lambda inputs: len(inputs) if next(turns) % 2 else 0, seconds_per_item=1e-3,
    )  # fmt: skip
    assert bench.run()
    assert max(bench.sizes()) <= 11


def test_stop_starts_no_retries(tmp_path: Path) -> None:
    """Sources that wait for another try are left for the next attempt."""
    bench = Bench(tmp_path, [_failing_from(0)], [0] * 40, limits=Limits(chunk_max=1))

    def tick() -> bool:
        if bench.outcomes.failures:
            bench.executor.stop()
        return True

    assert not bench.run(tick)
    assert {1} == {attempt for _, attempt, _ in bench.outcomes.charged()}
    assert 40 == bench.executor.failing


def test_stop_when_everything_is_done_is_settled(tmp_path: Path) -> None:
    """A stop that comes after the last source is no unfinished shard."""
    bench = Bench(tmp_path, [one], [0])

    def tick() -> bool:
        if bench.executor.completed:
            bench.executor.stop()
        return True

    assert bench.run(tick)


def test_tick_ends_the_run(tmp_path: Path) -> None:
    """A false tick ends the run at once."""
    bench = Bench(tmp_path, [one], [0] * 5)
    assert not bench.run(lambda: False)
    assert [] == bench.pool.log


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("workers", [1, 3])
def test_killer_is_found_and_no_other_charged(tmp_path: Path, *, named: bool, workers: int) -> None:
    """A source that kills its worker is charged each of its attempts; all others complete."""
    bench = Bench(
        tmp_path, [one], list(range(500)), workers=workers, kills=killer(137, named=named)
    )
    assert bench.run()
    assert [(137, n, "death") for n in (1, 2, 3)] == bench.outcomes.charged()
    assert set(range(500)) - {137} == bench.outcomes.rows.keys()
    assert {} == bench.outcomes.open


def test_death_charges_only_alone(tmp_path: Path) -> None:
    """A single death, from outside, charges nobody: not even of a call of one source."""
    for size in (1, 64):
        deaths = iter([Death()])
        bench = Bench(
            tmp_path,
            [one],
            list(range(200)),
            limits=Limits(chunk_max=size),
            kills=lambda _w, i, _m, d=deaths: next(d, None) if 150 in i.sources else None,
        )
        assert bench.run()
        assert [] == bench.outcomes.failures
        assert 200 == len(bench.outcomes.rows)


def test_suspects_run_isolated_and_marked(tmp_path: Path) -> None:
    """After a death its call is run again in halves, marked, with nothing queued behind."""
    bench = Bench(
        tmp_path,
        [one],
        list(range(400)),
        seconds_per_item=1e-4,
        kills=killer(50),
        limits=Limits(max_attempts=1),
    )
    assert bench.run()
    guilty = [s for s in bench.pool.log if 50 in s.sources]
    assert [False] + [True] * (len(guilty) - 1) == [s.marked for s in guilty]
    sizes = [len(s.sources) for s in guilty]
    assert sizes == sorted(sizes, reverse=True)
    assert 1 == sizes[-1]
    assert all(s.beside == 0 for s in guilty[1:])


def test_answers_that_overtake_each_other(tmp_path: Path) -> None:
    """No call is told to have begun twice, in whatever order its worker's answers come."""
    bench = Bench(tmp_path, [one], list(range(300)), seconds_per_item=1e-4, answers=2)
    assert bench.run()
    assert 300 == len(bench.outcomes.rows)
    assert any(s.beside for s in bench.pool.log)


def test_queued_call_is_never_suspect(tmp_path: Path) -> None:
    """The call that waited behind the one that died is run again as any other, once."""
    bench = Bench(tmp_path, [one], list(range(300)), seconds_per_item=1e-4, kills=killer(200))
    assert bench.run()
    guilty = next(s for s in bench.pool.log if 200 in s.sources)
    behind = next(s for s in bench.pool.log if s.call > guilty.call and s.worker == guilty.worker)
    again = [
        (source, s.marked)
        for s in bench.pool.log
        for source in s.sources
        if s.call > behind.call and source in behind.sources
    ]
    assert [(source, False) for source in behind.sources] == sorted(again)
    innocent = set(range(300)) - set(guilty.sources)
    isolated = [s for s in bench.pool.log if s.marked]
    assert not innocent & {x for s in isolated for x in s.sources}


def test_named_source_is_run_alone(tmp_path: Path) -> None:
    """A mark that names the source spares the halves: it is alone in the next call but one."""
    bench = Bench(
        tmp_path,
        [one],
        list(range(100)),
        seconds_per_item=1e-3,
        kills=lambda _w, i, _m: Death(70) if 70 in i.sources else None,
        limits=Limits(max_attempts=1),
    )
    assert bench.run()
    assert [[70]] == [s.sources for s in bench.pool.log if 70 in s.sources][1:]
    assert [(70, 1, "death")] == bench.outcomes.charged()


def test_mark_that_lies_costs_only_time(tmp_path: Path) -> None:
    """When the named source is innocent, the rest is halved until the guilty one is found."""
    bench = Bench(
        tmp_path,
        [one],
        list(range(64)),
        kills=lambda _w, i, _m: Death(i.sources[0]) if 40 in i.sources else None,
        limits=Limits(max_attempts=1),
    )
    assert bench.run()
    assert [(40, 1, "death")] == bench.outcomes.charged()


def test_overdue_source_is_charged_at_once(tmp_path: Path) -> None:
    """A worker killed for a source's time limit charges that source; the rest goes on."""
    bench = Bench(
        tmp_path,
        [one],
        list(range(50)),
        kills=lambda _w, i, _m: Death(20, overdue=True) if 20 in i.sources else None,
        limits=Limits(max_attempts=2),
    )
    assert bench.run()
    assert [(20, 1, "timeout"), (20, 2, "timeout")] == bench.outcomes.charged()
    assert set(range(50)) - {20} == bench.outcomes.rows.keys()


def test_overdue_batch_is_a_timeout_when_alone(tmp_path: Path) -> None:
    """Where the mark knows no source, the one that is overdue alone is charged a time-out."""
    bench = Bench(
        tmp_path,
        [one],
        list(range(20)),
        kills=lambda _w, i, _m: Death(None, overdue=True) if 7 in i.sources else None,
        limits=Limits(max_attempts=1),
    )
    assert bench.run()
    assert [(7, 1, "timeout")] == bench.outcomes.charged()


def test_death_in_a_later_group(tmp_path: Path) -> None:
    """An item that kills a later group's worker charges its source, named by its item id."""
    bench = Bench(
        tmp_path,
        [fan, second],
        [3, 5, 2],
        kills=lambda w, i, _m: (
            Death()
            if w.group == 1
            and any((s, p) == (1, (4,)) for s, p in zip(i.sources, i.paths or [], strict=False))
            else None
        ),
        limits=Limits(max_attempts=1),
    )
    assert bench.run()
    assert [(1, 1, "death")] == bench.outcomes.charged()
    assert "s1/fan.4" == bench.outcomes.failures[0].item
    assert {0: [0, 1, 2], 2: [0, 1]} == bench.outcomes.rows


def test_suspects_of_a_driver_death_run_exclusively(tmp_path: Path) -> None:
    """They come first, in halves, while nothing else runs in any group; then the others."""
    suspects = BitMap([2, 3, 5])
    bench = Bench(tmp_path, [fan, second], [2] * 8, workers=3, suspects=[suspects])
    assert bench.run()
    assert set(range(8)) == bench.outcomes.rows.keys()
    exclusive = [s for s in bench.pool.log if set(s.sources) <= set(suspects)]
    assert exclusive == bench.pool.log[: len(exclusive)]
    assert [0] * len(exclusive) == [s.beside for s in exclusive]
    assert [[2], [3, 5]] == [s.sources for s in exclusive if s.worker.group == 0]
    # In every group a call says so when its source is the only one anywhere.
    assert {2} == {source for sources in bench.outcomes.alone for source in sources}


def test_worker_that_cannot_start_stops_the_stage(tmp_path: Path) -> None:
    """Three starts without work, and the stage is broken; nobody is charged."""
    bench = Bench(tmp_path, [one], [0] * 9, workers=2, fails_to_start=lambda _w: "no GPU")
    with pytest.raises(StageBrokenError, match="no GPU") as caught:
        bench.run()
    assert "stage-start" == caught.value.fields["kind"]
    assert [] == bench.outcomes.failures
    assert 3 == max(ref.start for ref in bench.pool.starts)


def test_one_bad_worker_is_given_up(tmp_path: Path) -> None:
    """A worker that never starts is left out while others of its stage work."""
    bench = Bench(
        tmp_path,
        [one],
        [0] * 50,
        workers=2,
        fails_to_start=lambda w: "bad card" if w.index else None,
    )
    assert bench.run()
    assert 50 == bench.executor.completed
    assert 3 == len([ref for ref in bench.pool.starts if ref.index == 1])


def test_broken_worker_is_replaced_and_charges_nobody(tmp_path: Path) -> None:
    """``WorkerBroken`` runs the call and those behind it again in a new worker."""
    calls = []

    def stage(x: int) -> Any:
        calls.append(x)
        return hr.WorkerBroken("server gone") if len(calls) == 30 else x

    bench = Bench(tmp_path, [stage], list(range(60)), seconds_per_item=1e-4)
    assert bench.run()
    assert ([], 60) == (bench.outcomes.failures, bench.executor.completed)
    assert [WorkerRef(0, 0, 1)] == bench.pool.retired
    assert {} == bench.outcomes.open


def test_worker_that_breaks_within_every_call_gets_on(tmp_path: Path) -> None:
    """However many items a call holds: a worker that breaks after some of them finishes others."""
    seen: list[int] = []

    def stage(x: int) -> Any:
        seen.append(x)
        return x if len(seen) < 15 else hr.WorkerBroken("server gone")

    bench = Bench(
        tmp_path, [stage], [0] * 500, limits=Limits(chunk_target_s=1.0), seconds_per_item=0.01,
        fails_to_start=lambda _worker: seen.clear(),
    )  # fmt: skip
    assert bench.run()
    assert ([], 500) == (bench.outcomes.failures, bench.executor.completed)
    assert ({}, 0) == (bench.outcomes.open, bench.executor.in_flight)


def test_always_broken_worker_stops(tmp_path: Path) -> None:
    """Broken three times without a source done in between, the stage cannot start."""
    bench = Bench(tmp_path, [lambda _x: hr.WorkerBroken("server gone")], [0] * 9)
    with pytest.raises(StageBrokenError, match="server gone") as caught:
        bench.run()
    assert "stage-start" == caught.value.fields["kind"]
    assert [] == bench.outcomes.failures


def test_counters_add_up(tmp_path: Path) -> None:
    """Every stage's counters are the sums over its calls; a death counts as failed."""
    bench = Bench(
        tmp_path,
        [one, second],
        list(range(30)),
        kills=killer(4),
        limits=Limits(max_attempts=1, chunk_max=5),
    )
    assert bench.run()
    first, last = bench.executor.counts()
    assert ("one", 29, 29) == (first.name, first.items_in, first.items_out)
    assert ("second", 29, 29, 0) == (last.name, last.items_in, last.items_out, last.failed)
    assert 29 == sum(first.spread.values()) == sum(last.spread.values())
    assert first.memory_mib > 0


def test_async_group_keeps_its_concurrency_filled(tmp_path: Path) -> None:
    """Slow async items are in flight side by side up to the stage's concurrency and half more."""

    @hr.stage(max_concurrency=8)
    async def work(x: int) -> int:
        return x

    bench = Bench(tmp_path, [work], list(range(40)), seconds_per_item=1.0)
    assert bench.run()
    assert 12 == max(s.beside for s in bench.pool.log)


def test_death_of_an_async_worker_suspects_all_it_held(tmp_path: Path) -> None:
    """The guilty one of many in flight is found alone; the others complete."""

    @hr.stage(max_concurrency=8)
    async def work(x: int) -> int:
        return x

    bench = Bench(
        tmp_path,
        [work],
        list(range(40)),
        seconds_per_item=1.0,
        kills=killer(11),
        limits=Limits(max_attempts=2),
    )
    assert bench.run()
    assert [(11, 1, "death"), (11, 2, "death")] == bench.outcomes.charged()
    assert set(range(40)) - {11} == bench.outcomes.rows.keys()


def starving(
    *sources: int, named: bool, most_beside: int = 10**9
) -> Callable[[WorkerRef, Inputs, bool], Death | None]:
    """Return a script in which memory runs out for a call with one of these sources."""

    def kills(_worker: WorkerRef, inputs: Inputs, marked: bool) -> Death | None:
        hungry = [source for source in inputs.sources if source in sources]
        if not hungry or (len(inputs) == 1 and most_beside == 0):
            return None
        return Death(hungry[0] if named and marked else None, out_of_memory=True)

    return kills


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("workers", [1, 3])
def test_source_that_needs_more_memory(tmp_path: Path, *, named: bool, workers: int) -> None:
    """It is charged once, after an end with nothing beside it, and left for a later round."""
    bench = Bench(
        *(tmp_path, [one], list(range(300))),
        workers=workers,
        limits=Limits(memory_mib=900),
        kills=starving(137, named=named),
    )
    assert bench.run()
    assert [(137, 1, "out-of-memory")] == bench.outcomes.charged()
    (failure,) = bench.outcomes.failures
    assert 900 == failure.short_mib
    assert "900 MiB were not enough for it alone. It is tried again with more" in failure.message
    assert (1, 0, 299) == (
        bench.executor.deferred,
        bench.executor.quarantined,
        bench.executor.completed,
    )
    assert [[137]] == bench.outcomes.alone
    assert ([137], 0) == (bench.pool.log[-1].sources, bench.pool.log[-1].beside)
    assert {} == bench.outcomes.open


def test_source_that_gets_no_more_memory(tmp_path: Path) -> None:
    """Where there is no more it is charged each of its attempts, and every one has it all."""
    limits = Limits(memory_mib=900, memory_limit="That is all there is")
    kills = starving(7, named=True)
    bench = Bench(tmp_path, [one], list(range(30)), workers=2, limits=limits, kills=kills)
    assert bench.run()
    assert [(7, n, "out-of-memory") for n in (1, 2, 3)] == bench.outcomes.charged()
    assert {0} == {failure.short_mib for failure in bench.outcomes.failures}
    assert "for it alone. That is all there is" in bench.outcomes.failures[0].message
    assert (0, 1) == (bench.executor.deferred, bench.executor.quarantined)
    assert [[7]] * 3 == bench.outcomes.alone


@pytest.mark.parametrize("named", [True, False])
def test_memory_runs_out_only_in_company(tmp_path: Path, *, named: bool) -> None:
    """Whom the kernel took for the others' memory completes alone, and is charged nothing."""
    bench = Bench(
        *(tmp_path, [one], list(range(100))),
        workers=3,
        limits=Limits(memory_mib=900),
        kills=starving(40, 41, 60, named=named, most_beside=0),
        seconds_per_item=1e-4,
    )
    assert bench.run()
    assert [] == bench.outcomes.failures
    assert set(range(100)) == bench.outcomes.rows.keys()


def test_memory_runs_out_in_a_later_group(tmp_path: Path) -> None:
    """The source starts again from its beginning, alone, and its rows are there once."""
    deaths = iter([Death(3, stage=1, out_of_memory=True)])

    def kills(worker: WorkerRef, inputs: Inputs, _marked: bool) -> Death | None:
        return next(deaths, None) if worker.group == 1 and 3 in inputs.sources else None

    bench = Bench(tmp_path, [fan, second], [4] * 20, limits=Limits(memory_mib=900), kills=kills)
    assert bench.run()
    assert [] == bench.outcomes.failures
    assert {i: [0, 1, 2, 3] for i in range(20)} == bench.outcomes.rows
    assert {} == bench.outcomes.open


def test_stop_before_the_hungry_ran_is_not_settled(tmp_path: Path) -> None:
    """A source that waits to run alone is left for the next attempt."""
    limits = Limits(memory_mib=900, chunk_max=1)
    kills = starving(3, named=True)
    bench = Bench(tmp_path, [one], list(range(30)), limits=limits, kills=kills)

    def tick() -> bool:
        if bench.executor.failing:
            bench.executor.stop()
        return True

    assert not bench.run(tick)
    assert [] == bench.outcomes.failures
    assert 1 == bench.executor.failing


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("limit", ["", "no more"])
def test_commands_that_memory_runs_out_for(tmp_path: Path, stages: int, limit: str) -> None:
    """A command that the kernel kills in company is run again alone, and charged only there."""
    tries: list[int] = []

    def command(x: int) -> int:
        tries.append(x)
        if x == 7 or (x == 3 and tries.count(3) == 1):
            raise CommandOutOfMemoryError(-9, ["simulate"], "", "")
        return x

    limits = Limits(memory_mib=900, memory_limit=limit, chunk_max=4)
    bench = Bench(
        *(tmp_path, [command, second][:stages], list(range(30))), workers=2, limits=limits
    )
    assert bench.run()
    charges = 3 if limit else 1
    expected = [(7, n, "out-of-memory") for n in range(1, charges + 1)]
    assert expected == bench.outcomes.charged()
    assert {0 if limit else 900} == {failure.short_mib for failure in bench.outcomes.failures}
    assert "900 MiB were not enough for it alone" in bench.outcomes.failures[0].message
    assert (1 + charges, 2) == (tries.count(7), tries.count(3))
    assert set(range(30)) - {7} == bench.outcomes.rows.keys()
    assert ({}, 1 - bool(limit)) == (bench.outcomes.open, bench.executor.deferred)


class Joining:
    """A pool that answers all calls it holds together; each took 20 ms for a unit of weight."""

    oom_deaths, call_most_s = 0, float("inf")

    def __init__(self, chain: Chain, weights: dict[int, float]) -> None:
        self._chain, self._weights = chain, weights
        self._events: list[Event] = []
        self._held: list[tuple[int, Inputs]] = []

    def start(self, worker: WorkerRef) -> None:
        self._events.append(Started(worker))

    def submit(self, worker: WorkerRef, call: int, inputs: Inputs, *, marked: bool) -> None:
        self._held.append((call, inputs))

    def wait(self, timeout_s: float) -> list[Event]:
        events, self._events = self._events, []
        if events:
            return events
        held, self._held = self._held, []
        processed = [asyncio.run(self._chain.process(inputs)) for _, inputs in held]
        result = self._chain.finish(processed)  # type: ignore[arg-type]
        result.took = [0.02 * self._weights[inputs.sources[0]] for _, inputs in held]
        return [Finished([call for call, _ in held], result)]

    def retire(self, worker: WorkerRef) -> None: ...

    def close(self, timeout_s: float) -> None: ...


def test_joined_answers_are_paced_by_their_own_weights(case: ChainCase) -> None:
    """What sources took per unit of weight is known although their answers came together."""
    weights = {source: 31.0 if source % 4 == 3 else 1.0 for source in range(12)}

    @hr.stage(max_concurrency=12)
    async def work(source: int) -> int:
        return source

    chain, feed = case.make([work]), ListFeed(list(range(12)))
    feed.weights = weights
    groups = make_groups(chain.pipeline.stages, cpus=1)
    pool = Joining(chain, weights)
    executor = Executor(groups, pool, feed, Outcomes(), Limits(chunk_max=1))
    executor.start()
    assert executor.run(lambda: True)
    assert 12 == executor.completed
    paces = executor._admission.pace._counts
    assert {12} == set(paces.values()), "all sources are equally fast for their weight"
    assert 0.02 <= executor._admission.pace.likely() < 0.026
