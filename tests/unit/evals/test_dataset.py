"""Datasets: what can be read, what an item is, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from hpcresume.errors import SourcesError
from hpcresume.evals.dataset import EvalSources, list_items, read_dataset
from hpcresume.evals.item import Columns, EvalItem, make_item, split_id, try_id
from hpcresume.evals.settings import EvalSettings

ROWS = [
    {"id": "a", "question": "one?", "answer": "1", "topic": "odd"},
    {"id": "b", "question": "two?", "answer": "2", "topic": "even"},
]


def jsonl(rows: list[Any]) -> str:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def settings(directory: Path, rows: list[Any], **more: Any) -> EvalSettings:
    """Return settings over rows in a file of that directory."""
    (directory / "data.jsonl").write_text(jsonl(rows))
    return EvalSettings(dataset="data.jsonl", workflow="w:f", cwd=str(directory), **more)


def bases(made: EvalSettings) -> list[str]:
    """Return the ids of all repetitions."""
    return [base for base, _ in list_items(made)]


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    """JSON, JSON lines, both compressed, CSV, Parquet and an iterable are read alike."""
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "d.json").write_text(json.dumps(ROWS))
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    (tmp_path / "d.jsonl").write_text(jsonl(ROWS))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS).encode()))
    lines = [",".join(ROWS[0]), *(",".join(row.values()) for row in ROWS)]
    (tmp_path / "d.csv").write_text("\n".join(lines) + "\n")
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    (tmp_path / "rows_here.py").write_text(f"LIST = {ROWS!r}\ndef make():\n    yield from LIST\n")
    names = ["d.json", "d.json.gz", "d.jsonl", "d.jsonl.gz", "d.csv", "d.parquet",
             "rows_here.py:LIST", "rows_here.py:make"]  # fmt: skip
    assert dict.fromkeys(names, ROWS) == {
        name: list(read_dataset(name, tmp_path)) for name in names
    }


def test_an_item_is_its_content(tmp_path: Path) -> None:
    """Order of rows and of keys changes no item; a changed value makes another one."""
    first = bases(settings(tmp_path, ROWS))
    reordered = [dict(reversed(row.items())) for row in reversed(ROWS)]
    assert first == list(reversed(bases(settings(tmp_path, reordered))))
    changed = [ROWS[0], {**ROWS[1], "answer": "II"}]
    after = bases(settings(tmp_path, changed))
    assert first[0] == after[0]
    assert first[1] != after[1]


def test_equal_items_and_repetitions_are_told_apart(tmp_path: Path) -> None:
    """Equal items are numbered, each with its repetitions, and ids for people differ."""
    made = settings(tmp_path, [ROWS[0], ROWS[0]], repetitions=2)
    listed = [(p["id"], p["repetition"]) for _, p in list_items(made)]
    assert [("a", 0), ("a", 1), ("a#2", 0), ("a#2", 1)] == listed
    assert 4 == len(set(bases(made)))


def test_selection(tmp_path: Path) -> None:
    """The first items, and items by id; an id that is not there is refused by name."""
    assert 1 == len(bases(settings(tmp_path, ROWS, limit=1)))
    assert bases(settings(tmp_path, ROWS))[1:] == bases(settings(tmp_path, ROWS, sample_ids=["b"]))
    with pytest.raises(SourcesError, match="no item has the id 'z'"):
        bases(settings(tmp_path, ROWS, sample_ids=["z"]))


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        ([{"q": 1}], {}, "no column 'question'"),
        ([{"id": "a", "question": 1}, {"id": "a", "question": 2}], {}, "id 'a' of another item"),
        ([{"question": 1}], {"columns": Columns(id="key")}, "in its id column 'key'"),
    ],
)
def test_rows_that_are_no_items(
    tmp_path: Path, rows: list[Any], more: dict[str, Any], said: str
) -> None:
    """A missing question, an id used twice and a missing id are refused, naming the item."""
    with pytest.raises(SourcesError, match=said):
        bases(settings(tmp_path, rows, **more))


def test_what_json_cannot_hold_becomes_text(tmp_path: Path) -> None:
    """Dates of an iterable are kept as text, so that every attempt reads the same."""
    (tmp_path / "dated.py").write_text(
        "import datetime\nROWS = [{'question': datetime.date(2024, 2, 29)}]\n"
    )
    made = EvalSettings(dataset="dated.py:ROWS", workflow="w:f", cwd=str(tmp_path))
    assert ["2024-02-29"] == [payload["row"]["question"] for _, payload in list_items(made)]


def test_items_as_workflows_see_them() -> None:
    """Columns are mapped, all of them kept; a raw row is the question as a whole."""
    payload = {"id": "a", "row": {"q": "?", "gold": 1, "x": 2}, "repetition": 3}
    item = make_item(payload, Columns(question="q", answer="gold"))
    assert EvalItem("a", "?", 1, {"q": "?", "gold": 1, "x": 2}, 3) == item
    assert payload["row"] == make_item(payload, Columns(raw=True)).question
    text = make_item({"id": "t", "row": "just text", "repetition": 0}, Columns())
    assert ("just text", {}) == (text.question, text.fields)


def test_tries_are_listed_after_the_items(tmp_path: Path) -> None:
    """Further tries come last, and only of items that the dataset still has."""
    made = settings(tmp_path, ROWS)
    first = bases(made)[0]
    retries = [(try_id(first, 2), {"base": first}), (try_id("0" * 20 + "-r0", 2), {"base": "x"})]
    listed = [source.id for source in EvalSources(made, retries)]
    assert [*bases(made), try_id(first, 2)] == listed
    assert [(first, 1), (first, 2)] == [split_id(i) for i in (first, try_id(first, 2))]
