"""The user's code is called whatever kind it is of, and cannot take the event loop with it."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from hpcresume.errors import PipelineError, UsageError
from hpcresume.evals.code import UserCall, in_thread, load_object, within
from hpcresume.pipeline.context import Worker

CODE = """
import hpcresume as hr

async def slow(item, factor: int = 2):
    return item * factor

def plain(item, factor: int = 3):
    return item * factor

class Costly(hr.Stage):
    def __init__(self, factor: int = 4):
        self.factor, self.set_up = factor, 0
    def setup(self, worker):
        self.set_up += 1
    def process(self, item):
        return item * self.factor * self.set_up

class Awaited(hr.Stage):
    async def process(self, item):
        return item * 5
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with code of every kind."""
    (tmp_path / "user_code.py").write_text(CODE)
    return tmp_path


def call(directory: Path, name: str, params: dict[str, Any] | None = None) -> Any:
    """Set a callable up and call it with 10."""
    made = UserCall(f"user_code.py:{name}", directory, params)
    made.setup(Worker(index=0, cpus=1, gpus=0, scratch=directory))
    return asyncio.run(made(10))


def test_every_kind_is_called(directory: Path) -> None:
    """Async and plain functions, and Stages whose set-up runs before the first item."""
    names = ("slow", "plain", "Costly", "Awaited")
    assert [20, 30, 40, 50] == [call(directory, name) for name in names]


def test_parameters_are_converted(directory: Path) -> None:
    """-P values get the types of annotations; unknown ones and bad values are refused."""
    assert [70, 70] == [call(directory, n, {"factor": "7"}) for n in ("plain", "Costly")]
    with pytest.raises(UsageError, match=r"no parameter 'fctor'.*'factor'"):
        call(directory, "slow", {"fctor": "7"})
    with pytest.raises(UsageError, match="'factor': 'x' is not of type int"):
        call(directory, "slow", {"factor": "x"})


def test_names_that_lead_nowhere(directory: Path) -> None:
    """A missing file, a missing name and code that does not import are told apart."""
    (directory / "broken.py").write_text("1 / 0\n")
    for target, said in {
        "absent.py:f": "no such file",
        "user_code.py:f": "no 'f' in",
        "user_code.py": "give the name in it",
        "broken.py:f": "ZeroDivisionError",
    }.items():
        with pytest.raises(PipelineError, match=said):
            load_object(target, directory)


def test_a_hung_thread_does_not_hang_the_loop() -> None:
    """A synchronous call that never returns times out, and others go on beside it."""
    forever = threading.Event()

    async def run() -> tuple[str, str]:
        hung = asyncio.create_task(within(0.2, in_thread(forever.wait)))
        other = await in_thread(lambda: "done")
        with pytest.raises(TimeoutError):
            await hung
        return other, await in_thread(lambda: "after")

    assert ("done", "after") == asyncio.run(run())
    forever.set()


def test_a_coroutine_that_refuses_to_be_cancelled_is_left_behind() -> None:
    """The time-out of an item holds also where its code swallows the cancellation."""

    async def stubborn(release: asyncio.Event) -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    async def run() -> None:
        release = asyncio.Event()
        with pytest.raises(TimeoutError):
            await within(0.1, stubborn(release))
        release.set()

    asyncio.run(run())


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), StopIteration()])
def test_exceptions_that_would_end_the_loop(error: BaseException) -> None:
    """exit() and the like, in async and in plain code, are errors of their item."""

    async def raises() -> None:
        raise error

    def raises_here() -> None:
        raise error

    async def run() -> list[str]:
        told = []
        for awaited in (raises(), in_thread(raises_here)):
            with pytest.raises(RuntimeError) as caught:
                await within(None, awaited)
            told.append(type(caught.value).__name__)
        return told

    assert ["RuntimeError", "RuntimeError"] == asyncio.run(run())


def test_code_that_cancels_itself() -> None:
    """A CancelledError raised by the workflow is its error, not the end of the run."""

    async def cancels() -> None:
        raise asyncio.CancelledError

    with pytest.raises(RuntimeError, match="cancelled itself"):
        asyncio.run(within(None, cancels()))
