"""The results of ``hr.Parts``: as one file, as objects, and as a directory of parts."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import hpcresume as hr
from hpcresume.errors import SharedStorageError, UsageError
from hpcresume.output.collect import collect
from hpcresume.output.layout import collect_parts
from hpcresume.run.directory import RunDir
from tests.support.parts import PartsAttempt, rows_of
from tests.support.runs import MadeRun, make_run


@dataclass
class Made:
    """A run of twelve sources by two attempts that overlap, and what they published."""

    made: MadeRun
    form: str
    attempts: list[PartsAttempt]
    receipts: list

    @property
    def run(self) -> RunDir:
        return self.made.run

    def part(self, number: int) -> Path:
        return self.attempts[number].part(self.receipts[number])


@pytest.fixture(params=["jsonl", "parquet"])
def run(request, tmp_path: Path) -> Made:
    form = request.param
    made = make_run(tmp_path, sources=12, tasks=2)
    sink = hr.Parts(form).describe()
    made.run.accept_fingerprint({**made.run.fingerprint(), "sink": sink})
    attempts, receipts = [], []
    for task, frames in enumerate(([range(3), range(3, 7)], [range(5, 9), [9, 10, 11]])):
        attempt = PartsAttempt(made.run, made.attempt(task), tmp_path / f"local-{task}", form)
        attempt.commit(*frames)
        receipts.append(attempt.publish())
        attempts.append(attempt)
    return Made(made, form, attempts, receipts)


def read(path: Path) -> list[dict]:
    """Return the rows of a result."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_all(directory: Path) -> list[dict]:
    """Return the rows of a directory of parts, sorted."""
    rows = [row for path in directory.iterdir() for row in read(path)]
    return sorted(rows, key=lambda row: (row["index"], row["n"]))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_one_file_in_source_order(run: Made, tmp_path: Path, suffix: str) -> None:
    """Either format of parts gives either format of result: manifest order, each source once."""
    out = tmp_path / f"out.{suffix}"
    report = collect(run.run, out)
    assert rows_of(range(12)) == read(out)
    assert (24, 12, True) == (report.rows, report.sources, report.complete)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_say_whose_they_are(run: Made, tmp_path: Path, suffix: str) -> None:
    """With sources asked for, each row is wrapped with its source and item."""
    out = tmp_path / f"out.{suffix}"
    collect(run.run, out, with_source=True)
    first = read(out)[0]
    assert ("s0.txt", rows_of([0])[0]) == (first["source"], first["row"])
    assert [row["row"] for row in read(out)] == rows_of(range(12))
    wrapped = list(hr.Run(run.run.path).rows(with_source=True))
    assert read(out) == wrapped


def test_rows_in_python(run: Made) -> None:
    """hr.Run gives the same rows as objects."""
    assert rows_of(range(12)) == list(hr.Run(run.run.path).rows())


def test_layout_links_whole_parts_and_rewrites_mixed_ones(run: Made, tmp_path: Path) -> None:
    """A part all of whose sources count is the published file; of the other the rest is written."""
    out = tmp_path / "out"
    report = collect_parts(run.run, out)
    assert rows_of(range(12)) == read_all(out)
    assert (24, 12, True) == (report.rows, report.sources, report.complete)
    linked = [path for path in out.iterdir() if path.samefile(run.part(0))]
    assert (2, 1) == (len(os.listdir(out)), len(linked))
    assert not any(path.samefile(run.part(1)) for path in out.iterdir())
    assert report.size_bytes == sum(path.stat().st_size for path in out.iterdir())


def test_layout_again_replaces_the_directory(run: Made, tmp_path: Path) -> None:
    """A second call gives the same names, and a part of before does not stay."""
    out = tmp_path / "out"
    collect_parts(run.run, out)
    before = sorted(os.listdir(out))
    (out / "part-stale.jsonl").write_text("{}\n")
    collect_parts(run.run, out)
    assert before == sorted(os.listdir(out))
    assert [] == [name for name in os.listdir(tmp_path) if name.startswith(".tmp-")]


def test_layout_refuses_what_is_not_its_own(run: Made, tmp_path: Path) -> None:
    """A directory with other things in it is left alone, and so is a file."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    (tmp_path / "file").write_text("")
    for name in ("full", "file", "nowhere/out"):
        with pytest.raises(UsageError, match=name.partition("/")[0]):
            collect_parts(run.run, tmp_path / name)
    assert ["thesis.tex"] == os.listdir(tmp_path / "full")


def test_layout_is_for_parts(tmp_path: Path) -> None:
    """A run whose rows are within its segments has no parts to link."""
    made = make_run(tmp_path, sources=2)
    made.publish(made.attempt(), [[0, 1]])
    with pytest.raises(UsageError, match=r"not hr\.Parts"):
        collect_parts(made.run, tmp_path / "out")


def test_losers_parts_are_never_listed(run: Made, tmp_path: Path) -> None:
    """An attempt whose every source another one won adds no part to the result."""
    late = PartsAttempt(run.run, run.made.attempt(1), tmp_path / "late", run.form)
    late.commit(range(12))
    late.publish()
    before = read_all_parts(run, tmp_path / "a")
    assert rows_of(range(12)) == before
    assert 2 == len(os.listdir(tmp_path / "a"))


def read_all_parts(run: Made, out: Path) -> list[dict]:
    collect_parts(run.run, out)
    return read_all(out)


@pytest.mark.parametrize("how", ["one", "layout"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_part_is_set_aside_and_its_sources_reopened(
    run: Made, tmp_path: Path, how: str, damage: str
) -> None:
    """The result holds everything else; the sources that only the part held are owed again."""
    part = run.part(0)
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 1
    part.unlink()
    if damage != "gone":
        part.write_bytes(data[:40] if damage == "cut" else data)
    run.made.finish()

    if how == "one":
        report = collect(run.run, tmp_path / "out.jsonl")
        rows = read(tmp_path / "out.jsonl")
    else:
        report = collect_parts(run.run, tmp_path / "out")
        rows = read_all(tmp_path / "out")

    # Sources 5 and 6 have another copy, in the second attempt's part.
    assert rows_of(range(5, 12)) == rows
    assert (5, 1, False) == (report.missing, len(report.damaged), report.complete)
    assert list(range(5, 12)) == list(run.made.union().completed)
    assert not run.made.union().finished


def test_withdrawn_sources_are_left_out(run: Made, tmp_path: Path) -> None:
    """What is no longer wanted is in no part of the result."""
    run.made.withdraw(0, 8)
    collect_parts(run.run, tmp_path / "out")
    assert rows_of([*range(1, 8), 9, 10, 11]) == read_all(tmp_path / "out")


def test_a_result_that_cannot_be_written(run: Made, tmp_path: Path, monkeypatch) -> None:
    """A refusal of the file system says that the results are safe, and leaves the earlier one."""
    out = tmp_path / "out"
    collect_parts(run.run, out)
    before = sorted(os.listdir(out))

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hpcresume.output.layout.link_or_copy", full)
    with pytest.raises(SharedStorageError, match="results are safe"):
        collect_parts(run.run, out)
    assert before == sorted(os.listdir(out))


def test_attempts_that_inferred_different_schemas(tmp_path: Path) -> None:
    """Integers of one attempt and fractions of another meet in one column of the result."""
    made = make_run(tmp_path, sources=2, tasks=2)
    sink = hr.Parts("parquet").describe()
    made.run.accept_fingerprint({**made.run.fingerprint(), "sink": sink})
    for task, value in enumerate((1, 2.5)):
        attempt = PartsAttempt(made.run, made.attempt(task), tmp_path / f"l{task}", "parquet")
        row = {"x": value} if task else {"x": value, "extra": "a"}
        attempt.ledger.commit(batch_of(attempt, task, row))
        attempt.publish()
    collect(made.run, tmp_path / "out.parquet")
    assert [{"x": 1.0, "extra": "a"}, {"x": 2.5, "extra": None}] == read(tmp_path / "out.parquet")


def batch_of(attempt: PartsAttempt, source: int, row: dict):
    from hpcresume.ids import ROOT
    from hpcresume.ledger.store import Batch
    from hpcresume.sinks.packing import Packed

    packed = [Packed(source, f"s{source}.txt", [(ROOT, attempt.packer.row(row))])]
    return Batch(frames=[attempt.packer.pack(packed)])
