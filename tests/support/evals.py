"""Evaluations of known answer: a dataset whose rows say what becomes of them."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.cli import Command, wait_until
from tests.support.local import Desk, Ended

CODE = """
import asyncio
import os
import time

def note(name, text):
    fd = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, text.encode() + b"\\n")
    os.close(fd)

async def longest_stall_s(seconds):
    # Both clocks: a busy machine stalls everybody, and other threads use the processor too.
    longest, start = 0.0, time.monotonic()
    before = start, time.process_time()
    while before[0] < start + seconds:
        await asyncio.sleep(0.005)
        now = time.monotonic(), time.process_time()
        longest = max(longest, min(now[0] - before[0], now[1] - before[1]))
        before = now
    return longest

async def answer(item, here: str = "."):
    note(f"{here}/calls", f"{item.id} {item.repetition}")
    do = item.fields.get("do", "")
    if do == "hang":
        await asyncio.sleep(3600)
    if do == "tick":
        return await longest_stall_s(item.fields["s"])
    await asyncio.sleep(item.fields.get("ms", 0) / 1000)
    item.step("LLM_END", {"asked": item.question})
    item.step("TOOL_END")
    item.usage(prompt_tokens=7, completion_tokens=2, total_tokens=9)
    if do == "object":
        return object()
    if do == "raise" and not os.path.exists(f"{here}/repaired"):
        raise ValueError(f"no answer to {item.question}")
    if do == "large":
        return "x" * 50_000_000
    return item.question.upper()

def plain(item, here: str = "."):
    note(f"{here}/calls", f"{item.id} {item.repetition}")
    if item.fields.get("do") == "hang":
        time.sleep(3600)
    return item.question.upper()

async def exact(item, output):
    note("scored", item.id)
    await asyncio.sleep(item.fields.get("score_ms", 0) / 1000)
    return output == item.answer

def parts(item, output):
    if item.fields.get("do") == "unscorable":
        raise RuntimeError("cannot be scored")
    return {"length": len(output), "steps": len(item.steps)}

def told(row):
    note("told", f"{row['id']} {row['status']}")
"""


@dataclass(frozen=True)
class EvalDesk:
    """A directory with the code above, in which evaluations run into ``out``."""

    desk: Desk

    @classmethod
    def make(cls, path: Path) -> EvalDesk:
        """Return a desk in an existing directory."""
        made = cls(Desk.make(path))
        (path / "flow.py").write_text(CODE)
        return made

    @property
    def path(self) -> Path:
        """The directory."""
        return self.desk.path

    @property
    def out(self) -> Path:
        """The evaluation's directory."""
        return self.path / "out"

    def dataset(self, rows: Iterable[dict[str, Any]], name: str = "data.jsonl") -> None:
        """Write a dataset."""
        (self.path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def arguments(self, *more: object) -> list[str]:
        """Return the arguments of an evaluation with ``flow.py:answer``."""
        named = [str(argument) for argument in more]
        if not {"--workflow", "--endpoint"} & set(named):
            named += ["--workflow", "flow.py:answer"]
        local = ["--local-dir", str(self.desk.local)]
        return ["eval", "--dataset", "data.jsonl", "--output-dir", "out", *local, *named]

    def evaluate(self, *more: object, env: dict[str, str] | None = None) -> Ended:
        """Run an evaluation to its end."""
        return self.desk.call(*self.arguments(*more), env=env)

    def resume(self, *more: object) -> Ended:
        """Resume the evaluation."""
        return self.desk.call("eval", "--resume", "out", "--local-dir", self.desk.local, *more)

    def start(self, *more: object) -> subprocess.Popen[str]:
        """Start an evaluation."""
        return Command(self.path).start(*self.arguments(*more))

    def rows(self) -> list[dict[str, Any]]:
        """Return the whole lines of the JSONL file."""
        path = self.out / "workflow_output.jsonl"
        text = path.read_bytes() if path.exists() else b""
        return [json.loads(line) for line in text.split(b"\n")[:-1]]

    def by_id(self) -> dict[str, dict[str, Any]]:
        """Return the rows of the JSONL file by id."""
        return {row["id"]: row for row in self.rows()}

    def result(self) -> list[dict[str, Any]]:
        """Return the consolidated rows."""
        found: list[dict[str, Any]] = json.loads((self.out / "workflow_output.json").read_bytes())
        return found

    def json(self, name: str) -> dict[str, Any]:
        """Return a JSON file of the output directory."""
        found: dict[str, Any] = json.loads((self.out / name).read_bytes())
        return found

    def calls(self, name: str = "calls") -> Counter[str]:
        """Return how often the code noted what."""
        path = self.path / name
        return Counter(path.read_text().splitlines() if path.exists() else [])

    def wait_for_rows(self, count: int, process: subprocess.Popen[str]) -> list[dict[str, Any]]:
        """Wait until so many rows are in the JSONL file."""

        def there() -> bool:
            assert process.poll() is None, process.communicate()
            return len(self.rows()) >= count

        wait_until(there, timeout_s=120, describe=lambda: f"{len(self.rows())} rows, not {count}")
        return self.rows()


def items(count: int, **more: Any) -> Iterator[dict[str, Any]]:
    """Yield items that are answered right."""
    for n in range(count):
        yield {"id": f"i{n}", "question": f"q{n}", "answer": f"Q{n}", **more}


def stable(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows without what differs from run to run."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "traceback")} for row in rows]
