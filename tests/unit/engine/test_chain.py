"""What stages may answer, and whose rows and failures come of it."""

from __future__ import annotations

import functools
import sys
import threading
import time
import tracemalloc
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import hpcresume as hr
from hpcresume.engine.calls import Inputs
from hpcresume.engine.chain import SLICE_ITEMS, Chain
from hpcresume.engine.mark import Mark
from hpcresume.errors import StageStartError
from hpcresume.ids import ItemPath
from hpcresume.pipeline.context import item_seed
from tests.unit.engine.chains import (
    ChainCase,
    call,
    counters,
    failed,
    items,
    paths,
    records,
    rows,
)


def one(x: Any) -> Any:
    """Pass a value on."""
    return x


def fan(n: int) -> Iterator[int]:
    """Give 0 .. n - 1."""
    yield from range(n)


def even(x: int) -> int | None:
    """Drop odd numbers."""
    return x if x % 2 == 0 else None


def test_fan_out_then_filter_attributes_every_row(case: ChainCase) -> None:
    """Rows belong to the source they descend from, in item order, with the items' paths."""
    result = case.run([fan, even], [5, 0, 2])
    assert {0: [0, 2, 4], 1: [], 2: [0]} == rows(result)
    assert [(0, 0), (2, 0), (4, 0), (0, 0)] == paths(result)
    assert [(3, 7, 1, 0), (7, 4, 3, 0)] == counters(result)
    assert 3 == result.completed


def test_fan_out_then_filter_all_completes(case: ChainCase) -> None:
    """A source all of whose items are dropped is complete without a row."""
    result = case.run([fan, lambda _x: None], [3])
    assert ({0: []}, 1, []) == (rows(result), result.completed, result.failures)


def test_failure_after_fan_out_fails_its_source_alone(case: ChainCase) -> None:
    """One failed item fails its source, which then has no rows; its neighbours keep theirs."""

    def picky(x: int) -> int:
        if x == 3:
            raise ValueError("three")
        return x

    result = case.run([fan, picky], [2, 5, 3])
    assert {0: [0, 1], 2: [0, 1, 2]} == rows(result)
    failure = failed(result)[1]
    assert ("s1/fan.3", "picky", "ValueError", "three") == (
        failure.item,
        failure.stage,
        failure.kind,
        failure.message,
    )


def test_failure_names_the_item_that_the_context_names(case: ChainCase) -> None:
    """A failure's item id has a step for each stage passed, as ``ctx.item_id`` has."""
    seen = []

    def last(x: int, ctx: hr.Context) -> int:
        seen.append(ctx.item_id)
        raise ValueError(x)

    result = case.run([fan, one, last], [1])
    assert ["s0/fan.0/one.0"] == seen
    assert seen == [failed(result)[0].item]


@pytest.mark.parametrize("empty", [lambda _x: hr.Many(), lambda _x: (y for y in ())])
def test_empty_fan_out_drops(case: ChainCase, empty: Any) -> None:
    """An empty generator or Many drops the item, which is counted once."""
    result = case.run([empty], [1])
    assert ({0: []}, [(1, 0, 1, 0)]) == (rows(result), counters(result))


def test_fan_out_of_none_only_is_a_drop(case: ChainCase) -> None:
    """None among a generator's values is dropped, and numbers the others."""
    result = case.run([lambda x: hr.Many([None, x, None])], [7])
    assert ({0: [7]}, [(1,)], [(1, 1, 0, 0)]) == (rows(result), paths(result), counters(result))
    result = case.run([lambda _x: hr.Many([None])], [7])
    assert [(1, 0, 1, 0)] == counters(result)


def test_list_is_one_value(case: ChainCase) -> None:
    """A list is a value, not a fan-out."""
    assert {0: [[1, 2]]} == rows(case.run([lambda _x: [1, 2]], [0]))


def test_generator_that_raises_midway(case: ChainCase) -> None:
    """What it gave before is not kept, and the failure is counted as nothing else."""

    def broken(n: int) -> Iterator[int]:
        yield from range(n)
        raise KeyError("midway")

    result = case.run([broken, one], [3])
    assert ({}, "KeyError") == (rows(result), failed(result)[0].kind)
    assert (1, 3, 0, 1) == counters(result)[0]


def test_failed_inside_a_generator(case: ChainCase) -> None:
    """``Failed`` among the values fails the source, with the reason and whether to retry."""

    def give(_x: int) -> Iterator[Any]:
        yield 1
        yield hr.Failed("no good", retry=False)
        raise AssertionError("drawn on after a failure")

    failure = failed(case.run([give], [0]))[0]
    assert ("Failed", "no good", False) == (failure.kind, failure.message, failure.retry)


def test_generator_is_closed_when_its_source_fails(case: ChainCase) -> None:
    """A generator's clean-up runs when the source has failed further on."""
    closed = []

    def give(_x: int) -> Iterator[int]:
        try:
            yield from range(10_000)
        finally:
            closed.append(True)

    def fail(x: int) -> int:
        raise ValueError(x)

    result = case.run([give, fail], [0])
    assert ([True], 1) == (closed, len(result.failures))
    assert result.counts[0].items_out < 10_000


@pytest.mark.parametrize("how", ["raise", "return", "yield", "many", "subclass"])
def test_worker_broken_charges_nobody(case: ChainCase, how: str) -> None:
    """However it is said, the call has no results and no failures, and the reason."""

    class Dead(hr.WorkerBroken):
        pass

    def stage(_x: int) -> Any:
        if how == "raise":
            raise hr.WorkerBroken("server gone")
        if how == "subclass":
            return Dead("server gone")
        if how == "many":
            return hr.Many([1, hr.WorkerBroken("server gone")])
        if how == "yield":
            return (x for x in [hr.WorkerBroken("server gone")])
        return hr.WorkerBroken("server gone")

    result = case.run([one, stage], [1, 2])
    assert ("server gone", None, []) == (result.broken, result.frame, result.failures)


def test_failed_and_exceptions_leave_the_others(case: ChainCase) -> None:
    """Each slot has its own outcome."""

    def mixed(x: int) -> Any:
        if x == 1:
            return hr.Failed("bad")
        if x == 2:
            raise OSError("disk")
        if x == 3:
            sys.exit(4)
        return x

    result = case.run([mixed], [0, 1, 2, 3, 4])
    assert {0: [0], 4: [4]} == rows(result)
    kinds = {slot: (f.kind, f.retry) for slot, f in failed(result).items()}
    assert {1: ("Failed", True), 2: ("OSError", True), 3: ("SystemExit", True)} == kinds


def test_traceback_is_the_users(case: ChainCase) -> None:
    """A traceback shows the stage's frames and those below it, none of the engine's."""

    def outer(x: int) -> int:
        return inner(x)

    def inner(_x: int) -> int:
        raise ValueError("deep")

    trace = failed(case.run([outer], [0]))[0].traceback
    assert "in outer" in trace
    assert "in inner" in trace
    assert "hpcresume/engine" not in trace


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (float("nan"), "nan"),
        ({"x": [float("inf")]}, "inf"),
        ({1, 2}, "set"),
        (Path("x"), "PosixPath"),
        ({1: 2}, "Dict key must be str"),
    ],
)
def test_row_that_json_cannot_hold_fails_its_source(case: ChainCase, value: Any, what: str) -> None:
    """The failure is the last stage's and names what is wrong."""
    result = case.run([lambda x: value if x else "fine"], [0, 1])
    assert {0: ["fine"]} == rows(result)
    failure = failed(result)[1]
    assert ("RowError", "lambda", "s1/lambda.0") == (failure.kind, failure.stage, failure.item)
    assert what in failure.message


def test_rows_that_all_fail_make_no_success(case: ChainCase) -> None:
    """A last stage whose rows cannot be encoded has not worked, so that it can be stopped."""
    result = case.run([lambda _x: {1, 2}], [0, 1, 2])
    assert [False] * 3 == [failure.after_success for failure in result.failures]
    assert "lambda" not in result.worked


def test_generator_that_always_raises_makes_no_success(case: ChainCase) -> None:
    """A generator stage has worked only when it was drawn to its end."""

    def bad(_x: int) -> Iterator[int]:
        raise ValueError("at once")
        yield 1

    result = case.run([bad], [0, 1, 2])
    assert [False] * 3 == [failure.after_success for failure in result.failures]
    assert "bad" not in result.worked


def test_success_between_failures_is_told(case: ChainCase) -> None:
    """``after_success`` and ``worked`` say where a stage worked between failures."""

    def picky(x: int) -> int:
        if x < 0:
            raise ValueError(x)
        return x

    result = case.run([picky, one], [-1, -1, 1, -1, 2])
    assert [False, False, True] == [failure.after_success for failure in result.failures]
    assert ["one", "picky", "sources"] == result.worked
    result = case.run([picky, one], [1, -1])
    assert "picky" not in result.worked


def test_indexed_function_that_raises_fails_its_source(case: ChainCase) -> None:
    """The stage is named ``sources``, and its successes are told."""
    made = hr.indexed(3, lambda i: 1 // (i - 1))
    chain = case.make([one], sources=made)
    inputs = records([0, 0, 0])
    inputs.records = None
    result = call(chain, inputs)
    assert ({0: [-1], 2: [1]}, "sources") == (rows(result), failed(result)[1].stage)
    assert "sources" in result.worked


def test_context_is_the_items(case: ChainCase) -> None:
    """Ids, attempt and seed are those of the item; scratch is gone afterwards."""
    scratch: list[Path] = []

    def look(x: int, ctx: hr.Context) -> dict[str, Any]:
        (ctx.scratch / "file").write_text("x")
        scratch.append(ctx.scratch)
        return {"x": x, "item": ctx.item_id, "try": ctx.attempt, "seed": ctx.seed}

    first = rows(case.run([fan, look], [1, 2], attempts={1: 3}))
    again = rows(case.run([fan, look], [1, 2], attempts={1: 4}))
    assert [("s1/fan.0", 3), ("s1/fan.1", 3)] == [(r["item"], r["try"]) for r in first[1]]
    seeds = [r["seed"] for r in first[0] + first[1]]
    assert seeds == [r["seed"] for r in again[0] + again[1]]
    assert 3 == len(set(seeds))
    assert [False] * 6 == [path.exists() for path in scratch]


def test_outputs_are_recorded_with_their_item(case: ChainCase) -> None:
    """A file of ``ctx.output`` is known by slot, item path and name; a failed source has none."""

    def save(x: int, ctx: hr.Context) -> int:
        ctx.output("sub/a.txt").write_text(str(x))
        if x == 1:
            raise ValueError(x)
        return x

    result = case.run([fan, save], [1, 2])
    assert {0: [((0,), "sub/a.txt")]} == result.files


@pytest.mark.parametrize("make", ["nothing", "directory"])
def test_output_that_is_not_written_fails_its_source(case: ChainCase, make: str) -> None:
    """A source whose file is missing is not complete, and the reason names the file."""

    def save(x: int, ctx: hr.Context) -> int:
        path = ctx.output("a.txt")
        if make == "directory":
            path.mkdir()
        return x

    result = case.run([save], [0])
    assert ({}, {}) == (rows(result), result.files)
    assert "'a.txt'" in failed(result)[0].message


class Doubler(hr.Stage):
    """Doubles a batch; remembers the batches it saw."""

    batch_size = 3

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def process_batch(self, batch: Sequence[int]) -> Sequence[Any]:
        """Answer in slots."""
        self.seen.append(list(batch))
        return [x * 2 for x in batch]


def test_batches_mix_sources(case: ChainCase) -> None:
    """A batch takes the items of several sources, and slot i answers item i."""
    stage = Doubler()
    chain = case.make([fan, stage])
    call(chain, records([0]))
    result = call(chain, records([2, 0, 3, 1]))
    assert [[0, 1, 0], [1, 2, 0]] == stage.seen
    assert {0: [0, 2], 1: [], 2: [0, 2, 4], 3: [0]} == rows(result)


class Answering(hr.Stage):
    """Answers batches with a function."""

    batch_size = 4

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def process_batch(self, batch: Sequence[Any]) -> Any:
        """Answer in slots."""
        return self.answer(batch)


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (lambda b: b[:-1], "3 slots for 4 items"),
        (lambda b: [*b, 1], "5 slots for 4 items"),
        (lambda _b: None, "NoneType"),
        (lambda _b: "abcd", "str"),
        (dict.fromkeys, "dict"),
        (hr.Many, "Many"),
        (iter, "iterator"),
        (set, "set"),
    ],
)
def test_batch_answered_wrongly_fails_all_and_guesses_nothing(
    case: ChainCase, answer: Any, what: str
) -> None:
    """A wrong number of slots, or no slots at all, fails every item and names the stage."""
    result = case.run([Answering(answer)], [1, 2, 3, 4])
    assert {} == rows(result)
    assert 4 == len(result.failures)
    for failure in result.failures:
        assert "'answering'" in failure.message
        assert what in failure.message


def test_batch_slots_may_be_anything(case: ChainCase) -> None:
    """None, Many and Failed in a slot mean what they mean alone."""
    result = case.run([Answering(lambda b: [None, hr.Many([1, 2]), hr.Failed("x"), b[3]])], [0] * 4)
    assert {0: [], 1: [1, 2], 3: [0]} == rows(result)
    assert ["x"] == [failure.message for failure in result.failures]


@pytest.mark.parametrize("how", ["raise", "failed"])
def test_batch_that_fails_as_a_whole_is_taken_singly(case: ChainCase, how: str) -> None:
    """The guilty item fails alone; the others of its batch are answered."""

    def answer(batch: Sequence[int]) -> Any:
        if 3 in batch:
            if how == "raise":
                raise ValueError("three in it")
            return hr.Failed("three in it")
        return [x * 10 for x in batch]

    result = case.run([Answering(answer)], [1, 2, 3, 4, 5])
    assert {0: [10], 1: [20], 3: [40], 4: [50]} == rows(result)
    assert {2: "three in it"} == {f.slot: f.message for f in result.failures}


def test_batch_contexts_answer_by_slot(case: ChainCase) -> None:
    """A batch stage with a second parameter gets one context per slot."""

    class Contexts(hr.Stage):
        batch_size = 8

        def process_batch(self, batch: list[int], contexts: list[hr.Context]) -> list[Any]:
            return [ctx.item_id for _, ctx in zip(batch, contexts, strict=True)]

    assert {0: ["s0/fan.0"], 1: ["s1/fan.0", "s1/fan.1"]} == rows(
        case.run([fan, Contexts()], [1, 2])
    )


def spin() -> None:
    """Run Python code without an end."""
    while True:
        pass


def test_timeout_interrupts_a_function(case: ChainCase) -> None:
    """A stage that runs past its time is interrupted, and an ``except Exception`` is no help."""

    @hr.stage(timeout_s=0.05)
    def slow(x: int) -> int:
        if x == 1:
            try:
                spin()
            except Exception:  # as users write it
                return 0
        return x

    result = case.run([slow], [0, 1, 2])
    assert {0: [0], 2: [2]} == rows(result)
    failure = failed(result)[1]
    assert ("timeout", "stage 'slow' ran past its timeout_s=0.05") == (
        failure.kind,
        failure.message,
    )
    assert "in spin" in failure.traceback
    assert "hpcresume/engine" not in failure.traceback


def test_timeout_interrupts_a_generator(case: ChainCase) -> None:
    """The time of a generator stage is that of all its values together."""

    @hr.stage(timeout_s=0.05)
    def slow(x: int) -> Iterator[int]:
        yield 1
        if x:
            spin()

    result = case.run([slow], [0, 1])
    assert ({0: [1]}, "timeout") == (rows(result), failed(result)[1].kind)


def test_timeout_interrupts_a_batch_and_finds_the_item(case: ChainCase) -> None:
    """A batch that runs past its time is taken singly; the slow item alone fails."""

    class Slow(hr.Stage):
        batch_size = 3
        timeout_s = 0.05

        def process_batch(self, batch: list[int]) -> list[int]:
            if 2 in batch:
                spin()
            return batch

    result = case.run([Slow()], [1, 2, 3])
    assert ({0: [1], 2: [3]}, "timeout") == (rows(result), failed(result)[1].kind)


def test_spawned_server_that_died_breaks_the_worker(case: ChainCase) -> None:
    """When a spawned process is dead, an exception is not the source's fault."""

    class Client(hr.Stage):
        def setup(self, worker: hr.Worker) -> None:
            self.server = worker.spawn(["sleep", "1000"], ready=None)

        def process(self, x: int) -> int:
            if x:
                self.server.kill()
                self.server.wait()
                raise ConnectionError("refused")
            return x

    chain = case.make([Client()])
    chain.setup()
    try:
        result = call(chain, records([0, 1]))
    finally:
        chain.teardown()
    assert [] == result.failures
    assert "sleep 1000" in (result.broken or "")


def test_setup_that_fails_takes_down_what_had_started(case: ChainCase) -> None:
    """The error names the stage; stages before it are torn down and servers ended."""
    events: list[str] = []

    class First(hr.Stage):
        def setup(self, worker: hr.Worker) -> None:
            self.server = worker.spawn(["sleep", "1000"], ready=None)

        def process(self, x: int) -> int:
            return x

        def teardown(self) -> None:
            events.append("down")

    class Second(First):
        def setup(self, worker: hr.Worker) -> None:
            sys.exit("no licence")

    first = First()
    with pytest.raises(StageStartError, match=r"'second' cannot start: SystemExit: no licence"):
        case.make([first, Second()]).setup()
    assert ["down"] == events
    assert first.server.poll() is not None


def test_teardown_that_raises_does_not_keep_the_others_up(case: ChainCase) -> None:
    """Every stage is torn down, last first, whatever one of them raises."""
    events: list[str] = []

    class Noisy(hr.Stage):
        def __init__(self, name: str) -> None:
            self.name = name

        def process(self, x: int) -> int:
            return x

        def teardown(self) -> None:
            events.append(self.name)
            raise ValueError(self.name)

    chain = case.make([Noisy("a"), Noisy("b")])
    chain.setup()
    chain.teardown()
    assert ["b", "a"] == events


def test_item_that_cannot_travel_fails_its_source(case: ChainCase) -> None:
    """Between groups an item that cannot be pickled fails its source, naming its type."""
    chain = case.make([lambda x: threading.Lock() if x else x, one], count=1)
    result = call(chain, records([0, 1]))
    assert [0] == list(result.emitted)
    failure = failed(result)[1]
    assert "lock" in failure.message
    assert "lambda" == failure.stage


def test_closures_travel_between_groups(case: ChainCase) -> None:
    """What plain pickle refuses travels by value."""
    first = case.make([lambda x: lambda: x, one], count=1)
    path, (made,) = call(first, records([7])).column
    last = case.make([one, lambda f: f()], first=1)
    inputs = items([])
    inputs.sources.append(0)
    assert inputs.ids is not None
    assert inputs.paths is not None
    assert inputs.items is not None
    inputs.ids.append("s0")
    inputs.paths.append(path)
    inputs.items.append(made)
    assert ((0, 0), [b"7\n"]) == call(last, inputs).column


def test_later_group_keeps_paths(case: ChainCase) -> None:
    """A later group's rows and failures carry the whole path."""

    def picky(x: int) -> int:
        if x == 2:
            raise ValueError(x)
        return x

    last = case.make([fan, picky], first=1)
    result = call(last, items([(5, (0,), 1), (5, (1,), 2), (6, (0,), 3)]))
    assert {0: [((0, 0), b"1\n")], 2: [((0, 0), b"3\n")]} == result.rows
    assert "s5/fan.1" == failed(result)[1].item


@pytest.mark.parametrize("marked", [False, True])
def test_a_call_longer_than_a_slice(case: ChainCase, *, marked: bool) -> None:
    """A later group's call of many items takes them slice by slice, whatever fails."""

    def picky(x: int) -> int:
        if x == 1:
            raise ValueError(x)
        return x

    n = SLICE_ITEMS + 5
    given = items([(source, (0,), source) for source in range(n)])
    result = call(case.make([one, picky], first=1), given, marked=marked)
    assert [1] == list(failed(result))
    assert {s: [((0, 0), b"%d\n" % s)] for s in range(n) if s != 1} == result.rows


def test_no_sink_keeps_no_rows(case: ChainCase) -> None:
    """Without a sink a value needs not be JSON, and the source completes."""
    result = case.run([lambda _x: {1, 2}], [0], sink=None)
    assert ({0: []}, 1) == (rows(result), result.completed)


def test_partial_and_closure_are_stages(case: ChainCase) -> None:
    """Partials and closures work like functions."""
    assert {0: [8]} == rows(case.run([functools.partial(pow, 2)], [3]))


def test_marked_calls_name_the_source_while_it_runs(case: ChainCase, tmp_path: Path) -> None:
    """In a marked call the mark says which source runs in which stage, and nothing after it."""
    mark, seen = Mark(str(tmp_path / "mark")), []

    def look(x: int) -> int:
        sight = mark.look()
        seen.append((sight.source, sight.stage))
        return x

    result = case.run([one, look], [5, 6], mark=mark, marked=True)
    assert [(0, 1), (1, 1)] == seen
    assert (None, 2) == (mark.look().source, result.completed)


def test_mark_has_its_place_on_the_disk(tmp_path: Path) -> None:
    """The driver recalls a worker also where the disk is full by then."""
    path = tmp_path / "mark"
    Mark(str(path))
    assert 0 < path.stat().st_blocks


def test_mark_names_no_source_after_its_exception(case: ChainCase, tmp_path: Path) -> None:
    """What made items run as they are encoded is not told of a source that failed before."""
    mark, seen = Mark(str(tmp_path / "mark")), []

    class Looking:
        def __reduce__(self) -> tuple[Any, ...]:
            seen.append(mark.look().source)
            return int, ()

    def fails_last(x: int) -> Looking:
        if x == 3:
            raise ValueError(x)
        return Looking()

    chain = case.make([fails_last, last], count=1, mark=mark)
    assert [2] == [f.slot for f in call(chain, records([1, 2, 3]), marked=True).failures]
    assert seen
    assert {None} == set(seen)


@pytest.mark.parametrize(("after", "failed"), [(1, [1]), (4, [])])
def test_exception_between_marked_items_fails_one(
    case: ChainCase, tmp_path: Path, after: int, failed: list[int]
) -> None:
    """A signal's handler that raises while the mark is written does not end all items."""

    def interrupt(x: int) -> int:
        if x == after:
            sys.setprofile(raising)
        return x

    def raising(frame: Any, event: str, _argument: Any) -> None:
        if frame.f_code.co_name == "over" and event == "call":
            sys.setprofile(None)
            raise InterruptedError

    chain = case.make([interrupt], mark=Mark(str(tmp_path / "mark")))
    call(chain, records([0]))
    result = call(chain, records([1, 2, 3, 4]), marked=True)
    assert failed == [failure.slot for failure in result.failures]
    assert 4 - len(failed) == result.completed


def _peak_bytes(chain: Chain, n: int) -> int:
    tracemalloc.start()
    try:
        call(chain, records([n]))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_fan_out_of_many_items_stays_bounded(case: ChainCase) -> None:
    """Items of a huge fan-out never lie in memory together."""

    def fat(n: int) -> Iterator[bytes]:
        for _ in range(n):
            yield bytes(1000)

    chain = case.make([fat, lambda data: None if len(data) == 1000 else data])
    assert _peak_bytes(chain, 50_000) < 4 << 20


def test_stop_iteration_is_the_failure_of_its_item(case: ChainCase) -> None:
    """A function that raises it, as next() does, fails its own item and moves no other."""
    result = case.run([lambda values: next(iter(values))], [[1], [], [3], []])
    assert {0: [1], 2: [3]} == rows(result)
    assert {1: "StopIteration", 3: "StopIteration"} == {
        slot: failure.kind for slot, failure in failed(result).items()
    }


def test_fan_out_of_a_source_that_has_failed_is_closed_at_once(case: ChainCase) -> None:
    """A generator that its stage had begun runs its clean-up, and no further item of it is made."""
    log: list[str] = []

    def pairs(x: str) -> Iterator[tuple[str, int]]:
        yield x, 0
        yield x, 1

    def lines(pair: tuple[str, int]) -> Iterator[int]:
        def reading() -> Iterator[int]:
            try:
                yield -1
                if pair[1] == 0:
                    raise ValueError("unreadable")
                log.append("drawn")
                yield 1
            finally:
                log.append(f"closed {pair[1]}")

        opened = reading()
        next(opened)
        return opened

    def last(n: int) -> int:
        log.append("passed on")
        return n

    result = case.run([pairs, lines, last], ["a"])
    assert ["unreadable"] == [failure.message for failure in result.failures]
    assert ["closed 0", "closed 1"] == log


def last(x: int) -> int:
    """Return the item."""
    return x


class Recalling:
    """A stage that takes 10 ms an item, and recalls its worker at one of them."""

    def __init__(self, mark: Mark, at: int) -> None:
        self.mark, self.at, self.seen = mark, at, 0

    def process(self, x: int) -> int:
        """Return the item."""
        self.seen += 1
        if self.seen == self.at:
            self.mark.recall()
        time.sleep(0.01)
        return x


@pytest.mark.parametrize("marked", [False, True])
def test_recalled_worker_hands_back_what_it_has_not_begun(
    case: ChainCase, tmp_path: Path, *, marked: bool
) -> None:
    """A call ends at its next slice; the sources that it began are complete, the rest is not."""
    mark = Mark(str(tmp_path / "mark"))
    stage = Recalling(mark, at=12)
    chain = case.make([one, stage.process, last], mark=mark)
    assert 0 == call(chain, records([1]), marked=marked).unbegun
    given = records([1] * 100, attempts={2: 3, 99: 2})
    result = call(chain, given, marked=marked)
    begun = stage.seen - 1
    assert 12 <= stage.seen <= 22
    assert (100 - begun, begun) == (result.unbegun, result.completed)
    assert list(range(begun)) == list(rows(result))
    assert [begun] * 3 == [count.items_out for count in result.counts]
    again = call(chain, given, marked=marked)
    assert (100, 0, None, []) == (again.unbegun, again.completed, again.frame, again.failures)
    assert begun == stage.seen - 1


def test_long_call_hands_back_the_rest(case: ChainCase) -> None:
    """A call that takes longer than it may ends after a slice, which is at least a batch."""

    sizes: list[int] = []

    class Together(hr.Stage):
        batch_size = 4

        def process_batch(self, items: Sequence[int]) -> list[int]:
            sizes.append(len(items))
            time.sleep(0.06)
            return list(items)

    chain = case.make([Together], call_max_s=0.1)
    call(chain, records([0]))
    sizes.clear()
    assert (4, 8) == ((found := call(chain, records([7] * 12))).unbegun, found.completed)
    assert [4, 4] == sizes


def test_first_call_of_a_worker_can_end_early(case: ChainCase) -> None:
    """A worker that does not know yet how long an item takes begins with one."""

    def slow(x: int) -> int:
        time.sleep(0.02)
        return x

    assert 0 < call(case.make([slow], call_max_s=0.1), records([0] * 50)).unbegun


@pytest.mark.parametrize("sink", ["rows", hr.Parts("parquet")])
def test_call_that_makes_much_hands_back_the_rest(case: ChainCase, sink: Any) -> None:
    """Results are not kept until they no longer fit where they go to."""

    def large(x: int) -> dict[str, str]:
        time.sleep(0.02)
        return {"x": "x" * (1 << 20)}

    chain = case.make([large], sink=sink)
    call(chain, records([0]))
    result = call(chain, records([0] * 100))
    assert result.frame is not None
    assert 8 <= result.completed <= 14
    assert 100 == result.completed + result.unbegun


@pytest.mark.parametrize("marked", [False, True])
def test_call_of_a_later_group_that_ends_early(case: ChainCase, *, marked: bool) -> None:
    """What comes in blocks goes on in blocks, also where a part of it is handed back."""
    first = case.make([one, last], count=1)
    onward = call(first, records(list(range(64))))
    assert onward.column is not None

    def slow(x: int) -> int:
        time.sleep(0.01)
        return x

    later = case.make([one, slow, last], first=1, count=1, call_max_s=0.02)
    given = Inputs(array("I", range(64)), ids=[f"s{i}" for i in range(64)],
                   paths=[onward.column[0]] * 64, items=onward.column[1])  # fmt: skip
    call(later, given.select(range(1)), marked=marked)
    result = call(later, given, marked=marked)
    assert 0 < result.unbegun < 64
    assert result.column is not None
    assert 64 - result.unbegun == len(result.column[1])


def test_items_of_async_stages_are_begun_together(case: ChainCase, tmp_path: Path) -> None:
    """A recall leaves a call whose items wait beside each other as it is."""

    async def answer(x: int) -> int:
        return x

    mark = Mark(str(tmp_path / "mark"))
    mark.recall()
    chain = case.make([answer], mark=mark, call_max_s=0)
    result = call(chain, records([1, 2, 3]))
    assert (0, 3) == (result.unbegun, result.completed)


def test_context_makes_its_ids_and_seed_when_asked(case: ChainCase) -> None:
    """They are those of a context made by hand, and stay as they are; nothing else is there."""

    def look(x: int, ctx: hr.Context) -> dict[str, Any]:
        assert isinstance(ctx, hr.Context)
        with pytest.raises(AttributeError, match="colour"):
            ctx.colour  # type: ignore[attr-defined]  # noqa: B018
        return {"item": ctx.item_id, "seed": ctx.seed, "again": ctx.seed, "source": ctx.source_id,
                "attempt": ctx.attempt, "left": ctx.seconds_left()}  # fmt: skip

    result = case.run([one, look], [5], attempts={0: 2})
    seed = item_seed("run", "s0", "look", ItemPath((0,)))
    assert {0: [{"item": "s0/one.0", "seed": seed, "again": seed, "source": "s0", "attempt": 2,
                 "left": 60.0}]} == rows(result)  # fmt: skip
