"""The register of the fault matrix agrees with the tests and with the README."""

from __future__ import annotations

import ast
from functools import cache

import pytest

from tests.faults.matrix import README, Row, load, read_outcomes, readme_table, results_table
from tests.support.places import REPOSITORY

ROWS, EVENTS = load()
TESTS = sorted(
    {test for row in ROWS for test in row.tests}
    | {test for event in EVENTS for test in event.get("tests", [])}
)


@cache
def functions(file: str) -> dict[str, str]:
    """Return the tests of a file, each with its source."""
    text = (REPOSITORY / file).read_text(encoding="utf-8")
    return {
        node.name: ast.get_source_segment(text, node) or ""
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
    }


def test_every_row_is_there_once() -> None:
    """Rows 1 to 60; each has tests, or says why it is not injected."""
    assert list(range(1, 61)) == [row.number for row in ROWS]
    assert [] == [row.number for row in ROWS if bool(row.tests) == bool(row.not_injected)]


@pytest.mark.parametrize("test", TESTS)
def test_named_tests_exist(test: str) -> None:
    """A test that the register names is one that pytest finds, with that case."""
    file, _, rest = test.partition("::")
    name, _, case = rest.partition("[")
    assert name in functions(file)
    text = (REPOSITORY / file).read_text(encoding="utf-8")
    assert not case or f'"{case.rstrip("]")}"' in text


def test_rows_of_this_room_are_registered() -> None:
    """Every test of a row is in the register."""
    known = {test.partition("[")[0] for test in TESTS}
    for path in sorted((REPOSITORY / "tests" / "faults").glob("test_*.py")):
        file = str(path.relative_to(REPOSITORY))
        rows = [name for name in functions(file) if f"{name}_".startswith("test_row_")]
        assert [] == [name for name in rows if f"{file}::{name}" not in known], file


def test_every_event_is_shown() -> None:
    """A line of the README stands on rows that are injected."""
    injected = {row.number for row in ROWS if row.tests}
    assert all(set(event["rows"]) <= injected for event in EVENTS)
    assert all(event["rows"] or event["tests"] for event in EVENTS)


def test_the_readme_holds_the_table() -> None:
    """`python -m tests.faults.matrix` has been run since the register changed."""
    assert readme_table() in README.read_text(encoding="utf-8")


def test_a_row_fails_with_any_of_its_tests(tmp_path) -> None:
    """The worst of a row's tests is its result; a row of which nothing ran says so."""
    row = Row(1, "x", ("a.py::one", "a.py::two[case]"))
    assert "not run" == row.result({"a.py::onerous": "passed", "a.py::two[other]": "failed"})
    assert "passed (2)" == row.result({"a.py::one[1]": "passed", "a.py::two[case]": "passed"})
    assert "FAILED" == row.result({"a.py::one[1]": "passed", "a.py::one[2]": "failed"})
    assert "skipped" == row.result({"a.py::one": "skipped"})
    file = tmp_path / "outcomes"
    file.write_text(
        '{"id": "a", "outcome": "failed"}\n{"id": "a", "outcome": "passed"}\n'
        '{"id": "b", "outcome": "passed"}\n'
    )
    assert {"a": "failed", "b": "passed"} == read_outcomes(file)
    assert 62 == len(results_table({}).splitlines())
