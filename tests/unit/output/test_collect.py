"""Collecting a run into one file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hpcresume.errors import ConfigError, SharedStorageError, UsageError
from hpcresume.output.collect import collect
from hpcresume.output.files import directory_name
from tests.support.runs import make_run


def read_lines(path):
    """Return the decoded lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def finished(tmp_path):
    """A finished run of 20 sources by two tasks, with overlap."""
    made = make_run(tmp_path, sources=20, tasks=2)
    made.publish(made.attempt(0), [range(12)])
    made.publish(made.attempt(1), [range(8, 20)])
    made.finish()
    return made


def test_a_finished_run_gives_every_row_and_is_complete(finished, tmp_path):
    """The report of a finished run counts its rows and calls it complete."""
    out = tmp_path / "out.jsonl"
    report = collect(finished.run, out)

    assert list(range(20)) == [row["index"] for row in read_lines(out)]
    assert (20, 20, 20, 0, True) == (
        report.rows,
        report.sources,
        report.total,
        report.missing,
        report.complete,
    )
    assert out.stat().st_size == report.size_bytes


def test_two_collects_are_identical_and_leave_nothing_else(finished, tmp_path):
    """The same run gives the same bytes, and no temporary file stays."""
    target = tmp_path / "results"
    target.mkdir()
    contents = []
    for _ in range(2):
        collect(finished.run, target / "out.jsonl", with_source=True)
        contents.append((target / "out.jsonl").read_bytes())

    assert contents[0] == contents[1]
    assert ["out.jsonl"] == os.listdir(target)


def test_an_unfinished_run_says_how_many_are_missing(tmp_path):
    """What is published is written; the rest is counted as missing."""
    made = make_run(tmp_path, sources=10)
    made.publish(made.attempt(), [[0, 5]])
    report = collect(made.run, tmp_path / "out.jsonl")

    assert [0, 5] == [row["index"] for row in read_lines(tmp_path / "out.jsonl")]
    assert (8, False) == (report.missing, report.complete)


@pytest.mark.parametrize(("tolerate", "complete"), [(0.0, False), (0.07, True)])
def test_quarantined_sources_count_against_the_tolerance(tmp_path, tolerate, complete):
    """Seven of a hundred quarantined are complete at a tolerance of 0.07, not at 0."""
    made = make_run(tmp_path, sources=100, tolerate=tolerate)
    failures = [made.failure(i, retry=False) for i in range(7)]
    made.publish(made.attempt(), [range(7, 100)], failures=failures)
    made.finish()
    report = collect(made.run, tmp_path / "out.jsonl")

    assert (7, 0, complete) == (report.quarantined, report.missing, report.complete)


def test_a_damaged_segment_is_taken_back_and_collecting_goes_on(tmp_path):
    """Damage found midway leaves a whole result of what is sound, and reopens the rest."""
    made = make_run(tmp_path, sources=12, tasks=2)
    good, bad = made.attempt(0), made.attempt(1)
    made.publish(good, [range(6)])
    made.damage(bad, made.publish(bad, [range(4, 12)]))
    made.finish()
    report = collect(made.run, tmp_path / "out.jsonl")

    assert list(range(6)) == [row["index"] for row in read_lines(tmp_path / "out.jsonl")]
    assert (6, 1, False) == (report.missing, len(report.damaged), report.complete)
    assert not made.union().finished


def test_a_damaged_copy_gives_way_to_a_sound_one(tmp_path):
    """Where another segment holds the damaged one's sources, nothing is missing."""
    made = make_run(tmp_path, sources=6, tasks=2)
    bad = made.attempt(0)
    made.damage(bad, made.publish(bad, [range(6)]))
    made.publish(made.attempt(1), [range(6)], rows=lambda i, _: [((0, 0), f"copy {i}")])
    report = collect(made.run, tmp_path / "out.jsonl")

    assert [f"copy {i}" for i in range(6)] == read_lines(tmp_path / "out.jsonl")
    assert (0, True) == (report.missing, report.complete)


def test_an_earlier_result_survives_a_failed_collect(finished, tmp_path):
    """The output is replaced only by a whole one."""
    out = tmp_path / "out.jsonl"
    out.write_text("earlier\n")

    def stop(_done, _total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(finished.run, out, on_progress=stop)

    assert "earlier\n" == out.read_text()
    assert [] == [name for name in os.listdir(tmp_path) if name.startswith(".tmp-")]


def test_an_empty_run_gives_an_empty_file(tmp_path):
    """No sources means no rows, and a complete result."""
    made = make_run(tmp_path, sources=0)
    report = collect(made.run, tmp_path / "out.jsonl")

    assert (b"", True) == ((tmp_path / "out.jsonl").read_bytes(), report.complete)


@pytest.mark.parametrize("name", ["out.csv", "out", "missing/out.jsonl"])
def test_an_output_that_cannot_be_is_refused(finished, tmp_path, name):
    """An unknown suffix and a missing directory are usage errors that name the file."""
    with pytest.raises(UsageError, match="out"):
        collect(finished.run, tmp_path / name)


def test_a_refusing_disk_is_reported_with_the_output(finished, tmp_path):
    """A disk that refuses the output gives a shared-storage error, and the run is unharmed."""
    if os.geteuid() == 0:
        out = Path("/proc/self/out.jsonl")
    else:
        (tmp_path / "closed").mkdir(mode=0o500)
        out = tmp_path / "closed" / "out.jsonl"

    with pytest.raises(SharedStorageError, match=r"out\.jsonl"):
        collect(finished.run, out)


# -- files --------------------------------------------------------------------------------------


def test_files_of_winners_are_linked_once(tmp_path):
    """`files` holds each completed source's files, the winner's, by source and item."""
    made = make_run(tmp_path, sources=["a/b", "c"], tasks=2)
    first = {0: [((), "x.png", b"first"), ((0, 1), "x.png", b"item")]}
    made.publish(made.attempt(0), [[0]], files=first)
    made.publish(made.attempt(1), [[0, 1]], files={0: [((), "x.png", b"late")]})
    target = tmp_path / "files"
    report = collect(made.run, tmp_path / "out.jsonl", files=target)
    collect(made.run, tmp_path / "out.jsonl", files=target)

    found = {str(p.relative_to(target)): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    assert {"a%2Fb/root/x.png": b"first", "a%2Fb/0.1/x.png": b"item"} == found
    assert 2 == report.files
    assert 2 == (target / "a%2Fb/root/x.png").stat().st_nlink


def test_files_are_copied_where_links_cannot_be(tmp_path, monkeypatch):
    """On another file system the files are copied."""
    made = make_run(tmp_path, sources=1)
    made.publish(made.attempt(), [[0]], files={0: [((), "x.bin", b"data")]})

    def refuse(*_args, **_kwargs):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("hpcresume.output.files.os.link", refuse)
    collect(made.run, tmp_path / "out.jsonl", files=tmp_path / "files")

    copied = tmp_path / "files" / "s0.txt" / "root" / "x.bin"
    assert (b"data", 1) == (copied.read_bytes(), copied.stat().st_nlink)


def test_a_missing_file_reopens_its_source(tmp_path):
    """A source whose file is gone is not passed over: it is open again."""
    made = make_run(tmp_path, sources=2)
    ref = made.attempt()
    made.publish(ref, [[0, 1]], files={0: [((), "x.bin", b"data")]})
    next(Path(made.run.attempt_path(ref, "files")).rglob("x.bin")).unlink()
    report = collect(made.run, tmp_path / "out.jsonl", files=tmp_path / "files")

    assert (2, False) == (report.missing, report.complete)


def test_directory_names_never_collide_and_are_safe():
    """Ids that differ get names that differ, each one path component that fits."""
    ids = ["", ".", "..", "a/b", "a%2Fb", "a b", "~", "%7E", ".x", "ä", "\udc80", "A" * 400]
    ids += ["A" * 401, "A" * 180, "A" * 180 + "~"]
    names = [directory_name(source_id) for source_id in ids]

    assert len(ids) == len(set(names))
    assert all("/" not in n and not n.startswith(".") and 0 < len(n) < 255 for n in names)


# -- parquet ------------------------------------------------------------------------------------


def test_parquet_holds_the_same_rows(tmp_path, monkeypatch):
    """Columns come from all rows, also where a column first appears in a later batch."""
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("hpcresume.output.parquet.BATCH_ROWS", 3)
    made = make_run(tmp_path, sources=8)
    rows = [{"n": i} if i < 5 else {"n": i + 0.5, "late": [str(i)]} for i in range(8)]
    made.publish(made.attempt(), [range(8)], rows=lambda i, _: [((0, 0), rows[i])])
    collect(made.run, tmp_path / "a.parquet")
    collect(made.run, tmp_path / "b.parquet")

    expected = [{"n": float(r["n"]), "late": r.get("late")} for r in rows]
    assert expected == parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert [] == [name for name in os.listdir(tmp_path) if name.startswith(".tmp-")]


def test_parquet_puts_plain_values_into_one_column(tmp_path):
    """Rows that are no objects become the column `value`."""
    parquet = pytest.importorskip("pyarrow.parquet")
    made = make_run(tmp_path, sources=3)
    made.publish(made.attempt(), [range(3)], rows=lambda i, _: [((0, 0), i)])
    collect(made.run, tmp_path / "out.parquet")

    assert [0, 1, 2] == parquet.read_table(tmp_path / "out.parquet")["value"].to_pylist()


def test_rows_without_one_schema_are_refused(tmp_path):
    """A column of numbers and texts is a usage error that says what to do."""
    pytest.importorskip("pyarrow")
    made = make_run(tmp_path, sources=2)
    made.publish(made.attempt(), [range(2)], rows=lambda i, _: [((0, 0), {"x": [i, "a"][i]})])

    with pytest.raises(UsageError, match=r"\.jsonl"):
        collect(made.run, tmp_path / "out.parquet")


def test_parquet_without_pyarrow_says_what_to_install(finished, tmp_path, monkeypatch):
    """Without pyarrow the error names the extra."""
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)

    with pytest.raises(ConfigError, match=r"hpcresume\[parquet\]"):
        collect(finished.run, tmp_path / "out.parquet")
