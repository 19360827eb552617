"""The executor against a reference model, over random pipelines, deaths and orders."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

import hpcresume as hr
from hpcresume.engine.calls import Inputs
from hpcresume.engine.executor import Limits
from hpcresume.engine.pool import WorkerRef
from tests.unit.engine.pools import Bench, Death

ATTEMPTS = 3


def _fan(width: int) -> Any:
    def fan(x: list[Any]) -> Iterator[list[Any]]:
        for k in range((x[0] + len(x)) % (width + 1)):
            yield [*x, k]

    return fan


def _drop(modulus: int) -> Any:
    return lambda x: None if sum(x) % modulus == 0 else x


def _pass(_: int) -> Any:
    return lambda x: [*x, -1]


def _fail(modulus: int, stage: int, flaky: set[int], poison: set[int]) -> Any:
    """Fail every try of some sources and the first of others, at some of their items."""

    def fail(x: list[Any], ctx: hr.Context) -> list[Any]:
        source = x[0]
        if sum(x) % modulus == 0:
            if source in poison:
                raise ValueError(stage)
            if source in flaky and ctx.attempt == 1:
                raise KeyError(stage)
        return x

    return fail


class _Batch(hr.Stage):
    batch_size = 4

    def process_batch(self, batch: list[Any]) -> list[Any]:
        return [None if sum(x) % 7 == 3 else hr.Many([x, [*x, 9]]) for x in batch]


KINDS = ("fan", "drop", "pass", "fail", "batch")


@st.composite
def pipelines(draw: st.DrawFn) -> dict[str, Any]:
    """Draw stages (kind, number, whether a group begins), sources and who misbehaves."""
    some = st.sets(st.integers(0, 19), max_size=4)
    return {
        "stages": draw(
            st.lists(
                st.tuples(st.sampled_from(KINDS), st.integers(1, 4), st.booleans()),
                min_size=1,
                max_size=5,
            )
        ),
        "n": draw(st.integers(1, 20)),
        "flaky": draw(some),
        "poison": draw(some),
        "killers": draw(some),
        "hungry": draw(some),
        "outside": draw(st.integers(0, 3)),
        "workers": draw(st.integers(1, 3)),
        "chunk_max": draw(st.integers(1, 30)),
        "waiting_max": draw(st.integers(1, 50)),
        "weights": draw(st.dictionaries(st.integers(0, 19), st.sampled_from([0, 0.5, 3]))),
        "ran": draw(st.dictionaries(st.integers(0, 19), st.sampled_from([0.5, 8, 50]))),
        "left": draw(st.sampled_from([None, 0, 2, 10])),
        "seconds": draw(st.sampled_from([None, 1e-6, 1e-3, 1.0])),
        "seed": draw(st.integers(0, 2**32)),
        "short": draw(st.sampled_from([0.0, 0.3, 0.9])),
    }


def make_stages(case: dict[str, Any]) -> list[Any]:
    """Return the stages; a changed number of workers begins a group."""
    stages: list[Any] = []
    workers = 1
    for position, (kind, number, new_group) in enumerate(case["stages"]):
        workers = 3 - workers if new_group else workers
        if kind == "batch":
            batch = _Batch()
            batch.workers = workers
            stages.append(batch)
            continue
        made = {
            "fan": lambda n=number: _fan(n),
            "drop": lambda n=number: _drop(n + 1),
            "pass": lambda n=number: _pass(n),
            "fail": lambda n=number, p=position: _fail(n, p, case["flaky"], case["poison"]),
        }[kind]()
        stages.append(hr.stage(made, name=f"{kind}-{position}", workers=workers))
    return stages


def reference(case: dict[str, Any], source: int, attempt: int) -> list[Any] | None:
    """Return the rows that one try of a source gives, None where it fails."""
    items: list[Any] = [[source]]
    for kind, number, _ in case["stages"]:
        made: list[Any] = []
        for x in items:
            if kind == "fan":
                made += [[*x, k] for k in range((x[0] + len(x)) % (number + 1))]
            elif kind == "drop":
                made += [x] if sum(x) % (number + 1) else []
            elif kind == "pass":
                made.append([*x, -1])
            elif kind == "batch":
                made += [] if sum(x) % 7 == 3 else [x, [*x, 9]]
            else:
                guilty = sum(x) % number == 0
                if guilty and (
                    source in case["poison"] or (source in case["flaky"] and attempt == 1)
                ):
                    return None
                made.append(x)
        items = made
    return items


def expected(case: dict[str, Any]) -> tuple[dict[int, list[Any]], dict[int, list[int]]]:
    """Return the rows of every source that completes, and the tries charged to each."""
    rows, charges = {}, {}
    for source in range(case["n"]):
        for attempt in range(1, ATTEMPTS + 1):
            is_deadly = source in case["killers"] | case["hungry"]
            found = None if is_deadly else reference(case, source, attempt)
            if found is not None:
                rows[source] = found
                break
            charges.setdefault(source, []).append(attempt)
    return rows, charges


def make_begins(case: dict[str, Any]) -> Callable[[Inputs], int]:
    """Return how much of a call is begun: all of it, or less, down to nothing."""
    rng = Random(case["seed"] + 1)

    def begins(inputs: Inputs) -> int:
        return rng.randint(0, len(inputs)) if rng.random() < case["short"] else len(inputs)

    return begins


def make_kills(case: dict[str, Any]) -> Any:
    """Return who kills workers: killers in the first group, and a few deaths from outside.

    From outside only calls of several sources die, since a death alone rightly charges.
    Memory runs out wherever a hungry source is, and from outside too.
    """
    rng, left = Random(case["seed"]), [case["outside"]]

    def kills(worker: WorkerRef, inputs: Inputs, marked: bool) -> Death | None:
        guilty = [source for source in inputs.sources if source in case["killers"]]
        if guilty and worker.group == 0:
            knows = marked and rng.random() < 0.5
            return Death(guilty[0] if knows else None)
        hungry = [source for source in inputs.sources if source in case["hungry"]]
        if hungry and worker.group == 0:
            knows = marked and rng.random() < 0.5
            return Death(hungry[0] if knows else None, out_of_memory=True)
        if left[0] and len(inputs) > 1 and rng.random() < 0.2:
            left[0] -= 1
            starved = len(set(inputs.sources)) > 1 and rng.random() < 0.5
            named = rng.choice([None, rng.choice(list(inputs.sources))])
            return Death(named, out_of_memory=starved)
        return None

    return kills


OUT_OF_ORDER = {
    "stages": [("batch", 1, True)], "n": 17, "flaky": set(), "poison": set(), "killers": set(),
    "hungry": {8, 9, 13}, "outside": 1, "workers": 1, "chunk_max": 4, "waiting_max": 1,
    "weights": {}, "ran": {8: 0.5}, "left": None, "seconds": 1e-3, "seed": 0,
    "short": 0.0,
}  # fmt: skip
"""Sources 14 to 16 and 10 wait beside each other after deaths, and come into one call."""


@settings(max_examples=150, deadline=None)
@example(case=OUT_OF_ORDER)
@given(case=pipelines())
def test_every_source_ends_as_the_model_says(case: dict[str, Any]) -> None:
    """
    Each source completes exactly once with the model's rows in order, or is charged each of
    its tries; nobody else is charged, whoever died, in whatever order results came, and
    whatever a time limit put off.
    """
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(
            Path(directory),
            make_stages(case),
            [[source] for source in range(case["n"])],
            workers=case["workers"],
            limits=Limits(
                max_attempts=ATTEMPTS,
                chunk_max=case["chunk_max"],
                waiting_max=case["waiting_max"],
                memory_limit="there is no more",
            ),
            kills=make_kills(case),
            begins=make_begins(case),
            seconds_per_item=case["seconds"],
            weights=case["weights"],
            ran={source: s for source, s in case["ran"].items() if source < case["n"]},
            rng=Random(case["seed"]),
        )
        if case["left"] is not None:
            bench.executor.finish_by(bench.pool.clock() + case["left"])

        def tick() -> bool:
            """Raise the limit once it keeps everything that is left from being started."""
            if bench.executor.lacks_time:
                bench.executor.finish_by(None)
            return True

        assert bench.run(tick)
    rows, charges = expected(case)
    found: dict[int, list[int]] = {}
    for failure in bench.outcomes.failures:
        found.setdefault(failure.source, []).append(failure.attempt)
    assert rows == bench.outcomes.rows
    assert charges == found
    assert {} == bench.outcomes.open
    assert (len(rows), 0) == (bench.executor.completed, bench.executor.in_flight)
