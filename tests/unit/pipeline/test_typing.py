"""What a type checker makes of a user's pipeline: ``mypy --strict`` takes what is right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.places import REPOSITORY

RIGHT = """
from collections.abc import AsyncIterator, Iterator, Sequence

import hpcresume as hr


class Served(hr.Stage):
    gpus = 1
    workers = 2
    timeout_s = 5

    def setup(self, worker: hr.Worker) -> None:
        self.port = worker.free_port()
        self.server = worker.spawn(["serve"], ready=f"tcp://localhost:{self.port}")

    def process(self, item: str, ctx: hr.Context) -> Iterator[dict[str, int]]:
        yield {item: ctx.attempt}

    def teardown(self) -> None:
        self.server.terminate()


class Batched(hr.Stage):
    batch_size = 64

    def setup(self, place: hr.Worker) -> None:
        place.log.info("%d cores", place.cpus)

    def process_batch(
        self, items: Sequence[str], contexts: Sequence[hr.Context]
    ) -> list[int | hr.Failed | None]:
        return [len(item) or None for item in items]


class Async(hr.Stage):
    max_concurrency = 4

    async def process(self, item: str) -> hr.Many:
        return hr.Many([item])


class Derived(Async):
    async def process(self, item: str) -> hr.Many:
        return await super().process(item.strip())


@hr.stage
def plain(item: int) -> int:
    return item


@hr.stage(cpus=2, timeout_s=None)
async def streamed(item: int, ctx: hr.Context) -> AsyncIterator[int]:
    yield item + ctx.attempt


def pipeline(n: int = 3) -> hr.Pipeline:
    plain(n)
    return hr.Pipeline(
        name="typed",
        sources=hr.indexed(n, str),
        stages=[Served(), Batched, Derived, plain, streamed],
    )
"""

WRONG = {
    "def setup(self, worker: str) -> None: ...": "[override]",
    "async def setup(self, worker: hr.Worker) -> None: ...": "[override]",
    "def setup(self, worker: hr.Worker) -> None: worker.fre_port()": "[attr-defined]",
    "def setup(self) -> None: ...": "[override]",
    "def teardown(self, worker: hr.Worker) -> None: ...": "[override]",
    "cpus = 'two'": "[assignment]",
}


def mypy(path: Path, text: str) -> list[str]:
    """Return the errors that ``mypy --strict`` finds in a user's file."""
    path.write_text(text)
    # The cache of the checks of the package makes this quick, where they have been made.
    cache = REPOSITORY if os.access(REPOSITORY, os.W_OK) else path.parent
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", cache / ".mypy_cache", path],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "" == done.stderr
    return [line for line in done.stdout.splitlines() if ": error: " in line]


def test_stages_of_every_kind_pass(tmp_path):
    """Whatever a subclass calls its parameters, and whatever its process gives back."""
    assert [] == mypy(tmp_path / "user.py", RIGHT)


def test_hooks_that_cannot_be_called_are_found(tmp_path):
    """A wrong signature of setup or teardown, a slip in what is done with the worker."""
    classes = [f"class S{n}(hr.Stage):\n    {line}\n" for n, line in enumerate(WRONG)]
    errors = mypy(tmp_path / "user.py", "import hpcresume as hr\n" + "".join(classes))

    assert list(WRONG.values()) == [error.rpartition("  ")[2] for error in errors]
