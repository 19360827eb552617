"""What persistence costs an evaluation: the same client loop with and without it, side by side.

    python -m tests.measure_eval [ITEMS] [CONCURRENCY]

A model server in a process of its own answers 10,000 chat completions at concurrency 256 to
the same client code: first in a bare loop that keeps the answers in memory, then as
``hpcresume eval`` with ledger, publisher and JSONL file.  A ticker on each event loop measures
how long it stalls, by the clock and by the processor time of the whole process.  On a busy
machine compare the processor times, not the rates.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import hpcresume as hr
from hpcresume.evals.endpoint import Endpoint
from hpcresume.evals.item import EvalItem
from hpcresume.evals.settings import EvalSettings
from tests.support.cli import Command
from tests.support.model_server import model_server

_TICK_S = 0.005


class Client(hr.Stage):
    """The endpoint's client as a workflow, with a ticker on the loop that it runs on.

    Args:
        url: The endpoint.
        concurrency: Requests at once.
        report: File that is written every half second: rows and rates so far, the longest
            stall, and the most memory held after 1,000 items and now.
    """

    def __init__(self, url: str, concurrency: int, report: Path) -> None:
        self.url, self.concurrency, self.report = url, concurrency, report

    def setup(self, worker: hr.Worker) -> None:
        """Make the client and start the ticker."""
        self.endpoint = Endpoint(
            EvalSettings(
                dataset="", endpoint=self.url, protocol="openai", max_concurrency=self.concurrency
            )
        )
        self.stall_s = self.own_stall_s = self.first = self.last = 0.0
        self.done = self.early_kib = 0
        self.cpu = time.process_time()
        self.ticker = asyncio.get_running_loop().create_task(self._tick())

    async def _tick(self) -> None:
        before = told = time.perf_counter()
        cpu_before = time.process_time()
        while True:
            await asyncio.sleep(_TICK_S)
            now, cpu = time.perf_counter(), time.process_time()
            if self.done:
                self.stall_s = max(self.stall_s, now - before - _TICK_S)
                self.own_stall_s = max(self.own_stall_s, cpu - cpu_before)
            before, cpu_before = now, cpu
            if now - told > 0.5:
                told = now
                self.tell()

    def tell(self) -> None:
        """Write the report."""
        seconds = self.last - self.first
        values = {
            "rows": self.done,
            "rows_per_s": self.done / seconds if seconds else 0,
            "longest_stall_ms": self.stall_s * 1000,
            "longest_stall_cpu_ms": self.own_stall_s * 1000,
            "cpu_ms_per_row": 1000 * (time.process_time() - self.cpu) / max(1, self.done),
            "early_mib": self.early_kib / 1024,
            "peak_mib": peak_kib() / 1024,
        }
        temporary = self.report.with_suffix(".new")
        temporary.write_text(json.dumps(values))
        os.replace(temporary, self.report)

    async def process(self, item: EvalItem) -> Any:
        """Ask for one item."""
        self.first = self.first or time.perf_counter()
        answer = await self.endpoint.ask(item)
        self.done += 1
        self.last = time.perf_counter()
        if self.done == 1000:
            self.early_kib = peak_kib()
        return answer


def peak_kib() -> int:
    """Return the most memory that this process has held, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


async def bare(url: str, count: int, concurrency: int, report: Path) -> None:
    """Ask for all items in a loop that keeps nothing on disk."""
    client = Client(url, concurrency, report)
    client.setup(None)  # type: ignore[arg-type]  # it does not look at its worker
    limit = asyncio.Semaphore(concurrency)

    async def one(n: int) -> Any:
        async with limit:
            item = EvalItem(f"i{n}", f"question {n}")
            return {"id": item.id, "output": await client.process(item)}

    await asyncio.gather(*(one(n) for n in range(count)))
    client.tell()


def evaluated(directory: Path, url: str, count: int, concurrency: int, report: Path) -> str:
    """Run the same through ``hpcresume eval``; return what it said."""
    rows = ({"id": f"i{n}", "question": f"question {n}"} for n in range(count))
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = Command(directory, env).start(
        *("eval", "--dataset", "data.jsonl", "--workflow", "tests.measure_eval:Client"),
        *("-P", f"url={url}", "-P", f"concurrency={concurrency}", "-P", f"report={report}"),
        *("--max-concurrency", str(concurrency), "--output-dir", "out"),
        *("--local-dir", str(directory / "local"), "--engine", os.environ.get("ENGINE", "inline")),
    )
    _, err = process.communicate()
    assert 0 == process.returncode, err
    assert count == len((directory / "out/workflow_output.jsonl").read_bytes().splitlines())
    return err


def main(argv: list[str]) -> None:
    """Measure both and print them."""
    count, concurrency = (*map(int, argv), *(10_000, 256)[len(argv) :])
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "local").mkdir()
        with model_server(directory) as server:
            child = [sys.executable, "-m", "tests.measure_eval", "--bare", server.chat]
            for label in ("bare loop", "hpcresume eval", "bare loop", "hpcresume eval"):
                report = directory / "report.json"
                report.unlink(missing_ok=True)
                if label == "bare loop":
                    subprocess.run([*child, str(count), str(concurrency), str(report)], check=True)
                else:
                    evaluated(directory, server.chat, count, concurrency, report)
                    shutil.rmtree(directory / "out")
                values = json.loads(report.read_text())
                print(label, json.dumps({key: round(v, 1) for key, v in values.items()}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bare"]:
        url, count, concurrency, report = sys.argv[2:]
        asyncio.run(bare(url, int(count), int(concurrency), Path(report)))
    else:
        main(sys.argv[1:])
