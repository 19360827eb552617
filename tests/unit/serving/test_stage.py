"""A stage that serves from a pool, in this process; and the pool without an event loop."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

import hpcresume as hr
from hpcresume.deadline import note_stopping
from hpcresume.engine.chain import Chain
from hpcresume.errors import EXIT_SAVED, ConfigError, PipelineError, PoolUnrecoverable
from hpcresume.serving import (
    BlockingPool,
    PhaseFailedError,
    Retryable,
    ServingPool,
    StateExporter,
    StatefulWorker,
    UpdatePolicy,
)
from hpcresume.serving.members import LocalPlaces
from hpcresume.updates import interrupted
from tests.unit.engine.chains import ChainCase, failed, rows


class Model(StatefulWorker):
    """Says what it was asked and by which state."""

    def process(self, item):
        if item == "bad":
            raise ValueError("no such item")
        if item == "many":
            return hr.Many([{"n": 0}, {"n": 1}, "text"])
        return {"item": item, "state": bytes(self.state["name"]).decode()}


class Clock(StateExporter):
    """Has a new version whenever the file says so."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def newest_version(self):
        return int(self.path.read_text())

    def export(self, version):
        return {"name": str(version).encode()}


@pytest.fixture
def newest(tmp_path: Path) -> Path:
    path = tmp_path / "newest"
    path.write_text("3")
    return path


@pytest.fixture
def case(tmp_path: Path) -> ChainCase:
    return ChainCase(tmp_path)


def stage(newest: Path, **options) -> hr.ServingStage:
    return hr.ServingStage(Model, 2, exporter=Clock, exporter_args=((str(newest),), {}), **options)


async def answers(stage: hr.ServingStage, *items: object) -> list[object]:
    return [await stage.process(item) for item in items]


def test_rows_name_the_version_that_made_them(case: ChainCase, newest: Path) -> None:
    """Rows that are dicts carry it, also among several; others stay as they are."""
    serving = stage(newest)
    chain = case.make([serving])
    chain.setup()
    try:
        found = asyncio.run(answers(serving, "a", "many"))
    finally:
        chain.teardown()

    assert {"item": "a", "state": "3", "version": 3} == found[0]
    assert [{"n": 0, "version": 3}, {"n": 1, "version": 3}, "text"] == list(found[1])


def test_a_workers_exception_fails_the_source(case: ChainCase, newest: Path) -> None:
    """What the worker's method raises is the item's failure; other items have their rows."""
    from tests.unit.engine.chains import call, records

    chain = case.make([stage(newest, version_field=None)])
    chain.setup()
    try:
        result = call(chain, records(["a", "bad", "b"]))
    finally:
        chain.teardown()

    assert {1: ("ValueError", "no such item")} == {
        slot: (one.kind, one.message) for slot, one in failed(result).items()
    }
    assert [{"item": "a", "state": "3"}] == rows(result)[0]
    assert {0, 2} == set(rows(result))


def test_a_refresh_by_hand(case: ChainCase, newest: Path) -> None:
    """`refresh` serves another version, between two items of the same stage."""
    serving = stage(newest)
    chain = case.make([serving])
    chain.setup()

    async def both() -> list[object]:
        before = await serving.process("a")
        await serving.refresh(7)
        return [before, await serving.process("b")]

    try:
        before, after = asyncio.run(both())
    finally:
        chain.teardown()

    assert ("3", 3, "7", 7) == (
        before["state"],
        before["version"],
        after["state"],
        after["version"],
    )


def test_refresh_every(case: ChainCase, newest: Path) -> None:
    """The exporter is asked, and its newest version served, while items are answered."""
    serving = stage(newest, refresh_every_s=0.05)
    chain = case.make([serving])
    chain.setup()
    try:
        newest.write_text("4")
        deadline = time.monotonic() + 20
        while serving.version != 4:
            assert time.monotonic() < deadline
            (row,) = asyncio.run(answers(serving, "a"))
            assert str(row["version"]) == row["state"]
        newest.write_text("broken")  # the version is served on
        newest.unlink()
        assert 4 == asyncio.run(answers(serving, "a"))[0]["version"]
    finally:
        chain.teardown()


def test_an_item_that_is_interrupted_is_asked_again(case: ChainCase, newest: Path) -> None:
    """A worker that dies under an item costs nothing but time; three times fail the item."""
    serving = stage(newest)
    chain = case.make([serving])
    chain.setup()
    pool = serving._front.pool
    original, deaths = pool.call, []

    async def dies(*arguments, **named):
        if len(deaths) < limit:
            deaths.append(1)
            raise Retryable(3, "it died")
        return await original(*arguments, **named)

    pool.call = dies
    try:
        limit = 2
        assert 3 == asyncio.run(answers(serving, "a"))[0]["version"]
        deaths.clear()
        limit = 3
        with pytest.raises(Retryable):
            asyncio.run(answers(serving, "a"))
    finally:
        chain.teardown()


@pytest.mark.parametrize(
    "options",
    [
        {"method": "predict"},
        {"refresh_every_s": 0},
        {"refresh_every_s": 1, "exporter": None},
        {"policy": UpdatePolicy(pause="keep")},
        {"policy": UpdatePolicy(min_serving=3)},
        {"request_timeout_s": 0},
    ],
)
def test_what_cannot_be_right_is_refused(options: dict[str, object]) -> None:
    """A stage that could not work is refused when the pipeline is built."""
    with pytest.raises((PipelineError, ConfigError)):
        hr.ServingStage(Model, 2, **{"exporter": Clock, **options})


def test_a_pool_without_a_loop(newest: Path) -> None:
    """BlockingPool's methods return when they are done, from any thread."""

    def make() -> ServingPool:
        return ServingPool(
            Model, 2, exporter=Clock, exporter_args=((str(newest),), {}), places=LocalPlaces()
        )

    with BlockingPool(make) as pool:
        pool.update(pool.newest_version())
        found: list[object] = []
        threads = [
            threading.Thread(target=lambda: found.append(pool.call("process", "x").version))
            for _ in range(5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert ([3] * 5, 2) == (found, len(pool.state().serving))
    pool.close()


def test_verdicts_travel() -> None:
    """Exceptions of a pool keep their fields between processes; a verdict has its exit code."""
    verdict = pickle.loads(pickle.dumps(PoolUnrecoverable("no version", to_version=3)))
    retry = pickle.loads(pickle.dumps(Retryable(2, "paused", begun=False)))
    lost = pickle.loads(pickle.dumps(PhaseFailedError("build", "exporter", 2, 1.5, "died")))

    assert (EXIT_SAVED, {"to_version": 3}) == (verdict.exit_code, verdict.fields)
    assert (2, False) == (retry.version, retry.begun)
    assert "version 2: exporter died in phase 'build' after 1.5 s" in str(lost)
    assert 1.5 == lost.fields["elapsed_s"]


def attempt_case(case: ChainCase, serving: hr.ServingStage, attempt: Path) -> Chain:
    """Return a chain whose worker belongs to an attempt, as it does in an array task."""
    attempt.mkdir(exist_ok=True)
    chain = case.make([serving])
    worker = hr.Worker(index=0, cpus=1, gpus=0, scratch=case.directory / "w", attempt=attempt)
    chain.place = replace(chain.place, worker=worker)
    return chain


def test_a_stopping_attempt_winds_an_update_up(
    case: ChainCase, newest: Path, tmp_path: Path
) -> None:
    """
    When the attempt is to end, a push that hangs is given up: a parked item is answered by the
    old version, and the item that asked for the update is left to the next attempt.
    """
    pushing, pushed, release = threading.Event(), threading.Event(), threading.Event()
    first = threading.Lock()

    class Hanging(Model):
        def release(self):
            """Pauses come first."""

        def stage(self, version, parts):
            if version == 7 and first.acquire(blocking=False):
                pushing.set()
                release.wait(60)
            super().stage(version, parts)
            if version == 7:
                pushed.set()

    serving = hr.ServingStage(
        Hanging,
        2,
        exporter=Clock,
        exporter_args=((str(newest),), {}),
        policy=UpdatePolicy(cancel_s=2),
    )

    chain = attempt_case(case, serving, tmp_path / "attempt")
    chain.setup()

    async def stop() -> tuple[object, bool]:
        asking = asyncio.ensure_future(serving.refresh(7))
        await asyncio.to_thread(lambda: pushing.wait(20) and pushed.wait(20))
        parked = asyncio.ensure_future(serving.process("a"))
        note_stopping(str(tmp_path / "attempt"))
        row = await parked
        return row, asking.done()

    try:
        row, refreshed = asyncio.run(stop())
    finally:
        release.set()
        chain.teardown()

    assert ({"item": "a", "state": "3", "version": 3}, False) == (row, refreshed)


def test_a_stage_goes_on_from_the_version_it_had_reached(case: ChainCase, tmp_path: Path) -> None:
    """
    Without an exporter, a stage that is started again in an attempt serves the newest version
    that may have answered an item, not its first one.
    """

    class Own(StatefulWorker):
        def stage(self, version, parts):
            self.next = version

        def commit(self, version):
            self.now = self.next

        def process(self, item):
            return {"now": self.now}

    attempt, found = tmp_path / "attempt", []
    for wanted in (5, None):
        serving = hr.ServingStage(Own, 2)
        chain = attempt_case(case, serving, attempt)
        chain.setup()
        found.append(serving.version)
        if wanted is not None:
            asyncio.run(serving.refresh(wanted))
            found.append(serving.version)
        chain.teardown()

    assert [1, 5, 5] == found
    assert {} == interrupted(str(attempt))
