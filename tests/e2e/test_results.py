"""Runs over the results of another run: ids kept, growth, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import hpcresume as hr
from hpcresume.errors import RunDirError, SourcesError
from tests.support.local import Desk, Ended

WORDS = """
    from pathlib import Path

    @hr.stage
    def words(path):
        text = path.read_text()
        if text == "bad":
            raise ValueError("bad")
        for word in text.split():
            yield {"word": word}

    def pipeline():
        return hr.Pipeline(
            name="words", sources=hr.files("texts"), stages=[words], tolerate=TOLERATE
        )
"""
LONGEST = """
    @hr.stage
    def longest(rows, ctx: hr.Context):
        return {"source": ctx.source_id, "longest": max((r["word"] for r in rows), key=len)}

    def pipeline():
        return hr.Pipeline(name="longest", sources=hr.results("first"), stages=[longest])
"""


def ok(ended: Ended, *fragments: str) -> None:
    """Assert that a command succeeded and said every fragment."""
    assert 0 == ended.code, ended
    assert [] == [fragment for fragment in fragments if fragment not in ended.err], ended


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A user's directory with two pipelines, the second over the results of the first."""
    desk = Desk.make(tmp_path)
    desk.write("words.py", WORDS.replace("TOLERATE", "0.0"))
    desk.write("longest.py", LONGEST)
    for name, text in (("a", "one three"), ("b", ""), ("c", "seven")):
        desk.write(f"texts/{name}.txt", text)
    return desk


def rows(desk: Desk) -> list[dict[str, str]]:
    """Return the rows of the second run."""
    return [json.loads(line) for line in desk.rows("second").splitlines()]


def test_rows_of_a_run_are_sources(desk: Desk) -> None:
    """
    Ids are kept, a source's rows come as a list, sources without rows are left out; the first
    run can go afterwards, and when it grows only what is new is run.
    """
    first, second = ("words.py", "--run-dir", "first"), ("longest.py", "--run-dir", "second")
    ok(desk.submit(*first), "complete")
    ok(desk.submit(*second), "2: 2 new")
    assert [
        {"source": "a.txt", "longest": "three"},
        {"source": "c.txt", "longest": "seven"},
    ] == rows(desk)

    desk.write("texts/d.txt", "eleven")
    ok(desk.submit(*first), "complete")
    ok(desk.submit(*second), "3: 1 new, 2 done, 1 left")
    assert ["a.txt", "c.txt", "d.txt"] == [row["source"] for row in rows(desk)]

    shutil.rmtree(desk.path / "first")
    ok(desk.submit("second"), "3: 0 new, 3 done")


def test_unfinished_runs_are_refused(desk: Desk) -> None:
    """Quarantined sources beyond the tolerance are missing results; the remedy is named."""
    desk.write("texts/bad.txt", "bad")
    assert 1 == desk.submit("words.py", "--run-dir", "first").code

    refused = desk.submit("longest.py", "--run-dir", "second")
    assert 13 == refused.code, refused
    assert "is not finished: 0 of its 4 sources are missing and 1 are quarantined" in refused.err
    assert f"hpcresume submit {desk.path / 'first'} --retry-quarantined" in refused.err
    assert not (desk.path / "second").exists()

    desk.write("words.py", WORDS.replace("TOLERATE", "0.5"))
    ok(desk.submit("words.py", "--run-dir", "first"), "complete")
    ok(desk.submit("longest.py", "--run-dir", "second"), "2: 2 new")


def test_another_run_in_its_place_is_refused(desk: Desk) -> None:
    """Results that have changed, or come from another run, are not mixed with old ones."""
    first, second = ("words.py", "--run-dir", "first"), ("longest.py", "--run-dir", "second")
    ok(desk.submit(*first))
    ok(desk.submit(*second))
    shutil.rmtree(desk.path / "first")
    desk.write("texts/a.txt", "changed")
    ok(desk.submit(*first))

    refused = desk.submit(*second)
    assert 14 == refused.code, refused
    assert "sources.run_id" in refused.err
    ok(desk.submit(*second, "--accept-changes"), "2: 1 new, 1 done, 1 left")
    assert {"changed", "seven"} == {row["longest"] for row in rows(desk)}


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    """When listed; to declare it reads nothing, as every worker does it."""
    with pytest.raises(RunDirError, match="missing"):
        list(hr.results(tmp_path / "missing"))


BYTES = """
    def pipeline(bad: bool = False):
        def work(i):
            return {"i": i, "data": b"x"} if bad else {"i": i}
        return hr.Pipeline(name="parts", sources=hr.indexed(3, str), stages=[work],
                           sink=hr.Parts("parquet"))
"""


def test_rows_in_parts_are_sources(desk: Desk) -> None:
    """
    Rows of Parquet parts are payloads too, unless they hold bytes; then the parts, collected,
    are sources by their chunks, as the error says.
    """
    desk.write("parts.py", BYTES)
    ok(desk.submit("parts.py", "--run-dir", "first"))
    found = {source.id: source.payload for source in hr.results(desk.path / "first")}
    assert {str(i): [{"i": str(i)}] for i in range(3)} == found

    ok(desk.submit("parts.py", "--run-dir", "bad", "-P", "bad=true"))
    with pytest.raises(SourcesError, match=r"'data' holds bytes.*--layout parts.*hr\.chunks"):
        list(hr.results(desk.path / "bad"))
    ok(desk.call("collect", "bad", "--layout", "parts", "-o", "DIR"))
    (source,) = hr.chunks(desk.path / "DIR/*.parquet")
    assert [{"i": str(i), "data": b"x"} for i in range(3)] == list(source.payload)


def test_runs_without_rows_are_refused(desk: Desk) -> None:
    """A run of side effects has no results to go on with."""
    text = WORDS.replace("TOLERATE", "0.0, sink=None")
    desk.write("words.py", text)
    ok(desk.submit("words.py", "--run-dir", "first"))

    with pytest.raises(SourcesError, match="keeps no rows"):
        list(hr.results(desk.path / "first"))
