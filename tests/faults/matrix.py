"""The fault matrix as data: its rows, the README's table made of it, and results by row.

``python -m tests.faults.matrix`` writes the table into the README;
``python -m tests.faults.matrix OUTCOMES`` prints each row with how its tests ended, as
recorded there by a run of pytest with ``HPCRESUME_TEST_RESULTS=OUTCOMES``.
"""

from __future__ import annotations

import ast
import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

REGISTER = Path(__file__).with_name("matrix.toml")
README = Path(__file__).resolve().parents[2] / "README.md"
HEADER = "| what happens | what is left | what comes next | shown by |"


@dataclass(frozen=True)
class Row:
    """A row of the matrix.

    Attributes:
        number: Its number, 1 to 60.
        fault: What is injected.
        tests: Ids of the tests that do.
        not_injected: Why none does.
    """

    number: int
    fault: str
    tests: tuple[str, ...] = ()
    not_injected: str = ""

    def result(self, outcomes: Mapping[str, str]) -> str:
        """Return how the row's tests ended: passed, FAILED, or why there is no result."""
        if self.not_injected:
            return f"not injected: {self.not_injected}"
        found = [
            outcome
            for node, outcome in outcomes.items()
            if any(node == test or node.startswith(f"{test}[") for test in self.tests)
        ]
        if "failed" in found:
            return "FAILED"
        if "passed" in found:
            return f"passed ({found.count('passed')})"
        return "skipped" if found else "not run"


def load() -> tuple[list[Row], list[dict[str, Any]]]:
    """Return the rows and the README's events."""
    data = tomllib.loads(REGISTER.read_text(encoding="utf-8"))
    rows = [Row(**{**row, "tests": tuple(row.get("tests", ()))}) for row in data["row"]]
    return rows, data["event"]


def readme_table() -> str:
    """Return the README's table of what survives what."""
    rows, events = load()
    by_number = {row.number: row for row in rows}
    lines = [HEADER, "|---|---|---|---|"]
    for event in events:
        tests = [test for number in event["rows"] for test in by_number[number].tests]
        tests += event.get("tests", [])
        files: dict[str, list[str]] = {}
        for test in tests:
            files.setdefault(test.partition("::")[0], []).append(test)
        shown = ", ".join(_link(file, named) for file, named in files.items())
        lines.append(f"| {event['what']} | {event['left']} | {event['next']} | {shown} |")
    return "\n".join(lines) + "\n"


def _link(file: str, tests: Sequence[str]) -> str:
    name = Path(file).stem.removeprefix("test_")
    tier = " (all)" if all(map(is_slow, tests)) else ""
    return f"[{name}]({file}){tier}"


def is_slow(test: str) -> bool:
    """Tell whether every case of a test, named by its id, runs in the tier `all` only."""
    file, _, name = test.partition("[")[0].partition("::")
    tree = ast.parse((README.parent / file).read_text(encoding="utf-8"))
    marks = [node.value for node in tree.body if _assigns(node, "pytestmark")]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            # A mark among the cases of a parametrization is of one case only.
            marks += [one for one in node.decorator_list if not isinstance(one, ast.Call)]
    return any("mark.slow" in ast.unparse(mark) for mark in marks)


def _assigns(node: ast.stmt, name: str) -> TypeGuard[ast.Assign]:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name


def write_readme() -> None:
    """Replace the README's table by the one that follows from the register."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(HEADER)
    _, _, after = rest.partition("\n\n")
    README.write_text(f"{before}{readme_table()}\n{after}", encoding="utf-8")


def read_outcomes(path: Path) -> dict[str, str]:
    """Return how tests ended, by id; the worst of a test's phases counts."""
    outcomes: dict[str, str] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            said = json.loads(line)
            if outcomes.get(said["id"]) != "failed":
                outcomes[said["id"]] = said["outcome"]
    return outcomes


def results_table(outcomes: Mapping[str, str]) -> str:
    """Return each row with its result, as Markdown."""
    rows, _ = load()
    lines = ["| # | fault | result |", "|---|---|---|"]
    lines += [f"| {row.number} | {row.fault} | {row.result(outcomes)} |" for row in rows]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    """Write the README's table, or print the results in a file."""
    if len(argv) > 1:
        print(results_table(read_outcomes(Path(argv[1]))), end="")
    else:
        write_readme()


if __name__ == "__main__":
    main(sys.argv)
