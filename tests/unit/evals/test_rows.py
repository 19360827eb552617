"""Rows: one form for every ending, strict JSON, custom columns kept."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hpcresume.evals.item import EvalItem
from hpcresume.evals.rows import Ending, encode, failed, make_row


def item(**fields: Any) -> EvalItem:
    """Return an item with these columns beside question and answer."""
    return EvalItem("a", "?", "!", {"question": "?", "answer": "!", **fields})


def test_a_good_row() -> None:
    """A row holds what the item was, what came out, what it used, and the custom columns."""
    made = item(topic="odd")
    made.step("LLM_END", {"text": "x"}, name="m")
    made.step("TOOL_END")
    made.usage(prompt_tokens=3)
    made.usage(prompt_tokens=4, completion_tokens=1)
    row = json.loads(encode(make_row(made, Ending("ok", {"x": 1}, seconds=0.5), None), "a"))
    assert {
        "id": "a", "repetition": 0, "question": "?", "answer": "!", "output": {"x": 1},
        "status": "ok", "error": None, "traceback": None, "attempts": 1, "seconds": 0.5,
        "steps": [{"kind": "LLM_END", "data": {"text": "x"}, "name": "m"}, {"kind": "TOOL_END"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 1}, "topic": "odd",
    } == row  # fmt: skip


def test_steps_are_filtered() -> None:
    """Only the wanted kinds of steps are kept."""
    made = item()
    made.step("LLM_END")
    made.step("TOOL_END")
    row = make_row(made, Ending("ok"), frozenset({"TOOL_END"}))
    assert [{"kind": "TOOL_END"}] == row["steps"]


def test_columns_that_have_the_name_of_a_key() -> None:
    """A dataset's own `status` does not hide the row's; it is kept below `fields`."""
    row = make_row(item(status="draft", seconds=3), Ending("ok", seconds=1.0), None)
    assert ("ok", 1.0, {"status": "draft", "seconds": 3}) == (
        row["status"],
        row["seconds"],
        row["fields"],
    )


def test_a_failed_row() -> None:
    """An error row has type, message and the user's part of the traceback; time-outs differ."""
    try:
        raise ValueError("no such thing")
    except ValueError as error:
        ending = failed(error, attempts=2, seconds=1.0)
    assert ("error", "ValueError: no such thing", 2) == (
        ending.status,
        ending.error,
        ending.attempts,
    )
    assert "test_rows.py" in (ending.traceback or "")
    assert "timeout" == failed(TimeoutError("late"), attempts=1, seconds=1.0).status


@pytest.mark.parametrize(
    "output", [object(), {"x": float("nan")}, {1: {2, 3}}, "\ud800", [[[object()]]]]
)
def test_output_that_json_cannot_hold(output: Any, caplog: pytest.LogCaptureFixture) -> None:
    """
    It makes the item an error whose row keeps the output as text and says so, with the
    traceback and the item's id in the log.
    """
    row = json.loads(encode(make_row(item(), Ending("ok", output), None), "a"))
    assert ("error", True, "a") == (row["status"], row["lossy"], row["id"])
    assert "RowError" in row["error"]
    assert row["output"] not in (None, "")
    assert "item a" in caplog.text
    assert "Traceback" in caplog.text
