"""Which sources are started, and which are not for lack of time."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyroaring import BitMap

import hpcresume as hr
from hpcresume.engine.calls import Inputs
from hpcresume.engine.executor import Limits
from hpcresume.engine.pace import Pace
from tests.unit.engine.pools import Bench


def one(x: Any) -> Any:
    """Pass a value on."""
    return x


def bench_of(
    directory: Path,
    seconds: list[float],
    *,
    left_s: float | None,
    stages: list[Any] | None = None,
    **options: Any,
) -> Bench:
    """Return an executor over sources of known duration with so much time left."""

    def takes(inputs: Inputs) -> float:
        return sum(seconds[source] for source in inputs.sources)

    bench = Bench(directory, stages or [one], seconds, takes=takes, **options)
    if left_s is not None:
        bench.executor.finish_by(bench.pool.clock() + left_s)
    return bench


def run_out(bench: Bench, then: Callable[[], bool] = lambda: False) -> bool:
    """Run until nothing that is left fits, as the supervisor does; ``then`` may go on."""

    def tick() -> bool:
        if bench.executor.lacks_time and not then():
            bench.executor.stop()
        return True

    return bench.run(tick)


def started(bench: Bench) -> list[int]:
    """Return the sources in the order in which they were started."""
    return [source for call in bench.pool.log for source in call.sources]


def test_a_source_like_those_that_took_longer_is_not_started(tmp_path: Path) -> None:
    """With 5 minutes left no source is started where the others took 20; nobody is charged."""
    bench = bench_of(tmp_path, [1200.0] * 10, left_s=3 * 1200 + 300)
    assert not run_out(bench)
    assert [0, 1, 2] == started(bench)
    assert ([], 3, 0) == (bench.outcomes.failures, bench.executor.completed, bench.executor.failing)


def test_short_sources_are_started_to_the_end(tmp_path: Path) -> None:
    """Sources that are known to be short are started as long as they fit."""
    bench = bench_of(tmp_path, [2.0] * 1000, left_s=100)
    assert not run_out(bench)
    assert 48 <= bench.executor.completed <= 50


def test_the_first_sources_of_an_attempt_are_started(tmp_path: Path) -> None:
    """Before a source has completed nothing is known, and nothing is held back."""
    bench = bench_of(tmp_path, [50.0] * 4, left_s=60, workers=2)
    assert not run_out(bench)
    assert [0, 1] == started(bench)


def test_weights_tell_long_sources_from_short_ones(tmp_path: Path) -> None:
    """A heavy source is passed over for lighter ones behind it, and taken after a raise."""
    raised = []

    def raise_limit() -> bool:
        raised.append(started(bench))
        bench.executor.finish_by(bench.pool.clock() + 10_000)
        return len(raised) == 1

    seconds = [1.0, 600.0, 1.0, 600.0, 1.0]
    bench = bench_of(tmp_path, seconds, left_s=300, weights={1: 600.0, 3: 600.0})
    assert run_out(bench, raise_limit)
    assert [[0, 2, 4]] == raised
    assert [0, 2, 4, 1, 3] == started(bench)


def test_a_few_long_sources_do_not_keep_short_ones_waiting(tmp_path: Path) -> None:
    """
    Where nine of ten sources take a second and one takes 20 minutes, sources are started with
    5 minutes left, though the mean is 2 minutes; where half of them are long, none is.
    """
    rare = [1200.0 if n % 10 == 0 else 1.0 for n in range(400)]
    bench = bench_of(tmp_path, rare, left_s=2 * 1200 + 300)
    run_out(bench)
    assert 20 < bench.executor.completed
    often = [1200.0 if n % 2 == 0 else 1.0 for n in range(400)]
    bench = bench_of(tmp_path, often, left_s=2 * 1200 + 300)
    run_out(bench)
    assert [0, 1, 2] == started(bench)


def test_interrupted_sources_come_first(tmp_path: Path) -> None:
    """
    Sources that an attempt ran on before are started first, the longest of them first, each
    in a call of its own; one that ran for nearly as long as is left is not.
    """
    ran = {3: 40.0, 5: 95.0, 7: 80.0}
    bench = bench_of(tmp_path, [0.001] * 10, left_s=100, ran=ran)
    assert not run_out(bench)
    assert [[7], [3]] == [call.sources for call in bench.pool.log[:2]]
    assert 5 not in started(bench)
    assert 9 == bench.executor.completed
    bench = bench_of(tmp_path, [0.001] * 10, left_s=None, ran=ran)
    assert run_out(bench)
    assert [5, 7, 3] == started(bench)[:3]


def test_an_interrupted_source_fits_a_raised_limit(tmp_path: Path) -> None:
    """A source that was held back is started when the limit is raised."""

    def raise_limit() -> bool:
        bench.executor.finish_by(bench.pool.clock() + 200)
        return True

    bench = bench_of(tmp_path, [120.0], left_s=100, ran={0: 99.0})
    assert run_out(bench, raise_limit)
    assert [0] == started(bench)


def test_interrupted_sources_fill_a_batch(tmp_path: Path) -> None:
    """Where a stage takes batches, interrupted sources are not run one by one."""

    class Batch(hr.Stage):
        batch_size = 4

        def process_batch(self, batch: list[Any]) -> list[Any]:
            return batch

    ran = dict.fromkeys(range(6), 10.0)
    bench = bench_of(tmp_path, [1.0] * 8, left_s=1000, ran=ran, stages=[Batch()])
    assert run_out(bench)
    assert [4, 2, 2] == bench.sizes()


def test_a_batch_takes_as_long_as_all_of_it(tmp_path: Path) -> None:
    """What a source is expected to take is the time of its batch, not its part of it."""

    class Batch(hr.Stage):
        batch_size = 10

        def process_batch(self, batch: list[Any]) -> list[Any]:
            return batch

    bench = bench_of(tmp_path, [10.0] * 50, left_s=250, stages=[Batch()])
    assert not run_out(bench)
    assert 20 == bench.executor.completed


def test_failed_sources_are_tried_again_while_others_do_not_fit(tmp_path: Path) -> None:
    """What failed gets its retries in this attempt, where only long sources are left else."""

    def flaky(x: float, ctx: hr.Context) -> float:
        if ctx.source_id == "s1" and ctx.attempt == 1:
            raise ValueError("once")
        return x

    bench = bench_of(
        tmp_path, [1.0, 1.0, 900.0, 1.0], left_s=100, weights={2: 900.0}, stages=[flaky]
    )
    assert not run_out(bench)
    assert [0, 1, 3, 1] == started(bench)
    assert (3, 0) == (bench.executor.completed, bench.executor.failing)


def test_suspects_that_do_not_fit_wait(tmp_path: Path) -> None:
    """A suspect is not started alone where it has run for too long before; others go on."""
    bench = bench_of(tmp_path, [1.0] * 4, left_s=100, suspects=[BitMap([1])], ran={1: 99.0})
    assert not run_out(bench)
    assert [0, 2, 3] == started(bench)
    assert [] == bench.outcomes.alone


def test_several_groups_are_timed_from_admission_to_the_last_item(tmp_path: Path) -> None:
    """With several groups a source takes what passes until its last item is through."""

    @hr.stage(workers=1)
    def second(x: Any) -> Any:
        return x

    limits = Limits(waiting_max=1)
    bench = bench_of(tmp_path, [30.0] * 10, left_s=200, stages=[one, second], limits=limits)
    assert not run_out(bench)
    # One source takes 60 s of work, and up to 60 s more of waiting for its turn.
    assert 3 == bench.executor.completed
    assert [0, 1, 2] == [call.sources[0] for call in bench.pool.log if call.worker.group == 0]


def test_calls_tell_when_they_begin(tmp_path: Path) -> None:
    """Every call is said to begin once: when it is handed over, or when the one before ends."""
    bench = Bench(tmp_path, [one], [0] * 500, seconds_per_item=1e-3)
    assert bench.run()
    assert {call.call for call in bench.pool.log} == bench.outcomes.begun
    assert any(call.beside for call in bench.pool.log)


@pytest.mark.parametrize(
    ("seconds", "least", "most"),
    [([], 0, 0), ([5.0], 5, 6.5), ([1.0] * 80 + [1000.0] * 20, 1, 1.3), ([1, 1, 1, 50], 50, 65)],
)
def test_four_of_five_are_within_the_likely_time(
    seconds: list[float], least: float, most: float
) -> None:
    """What is likely is what four of five stayed below, a quarter too long at most."""
    pace = Pace()
    for value in seconds:
        pace.note(value, 1)
    assert least <= pace.likely() <= most


def test_weights_of_joined_and_cut_calls() -> None:
    """A call knows the sum of its sources' weights; where all are 1 that is their number."""
    assert 3 == Inputs(array("I", [1, 2, 3])).total_weight()
    heavy = Inputs(array("I", [1]), records=[("a", b"")], weight=7.0)
    light = Inputs(array("I", [2]), records=[("b", b"")], weight=1.0)
    joined = Inputs.concat([heavy, light])
    assert 8 == joined.total_weight()
    assert 4 == joined.select([0]).total_weight()
