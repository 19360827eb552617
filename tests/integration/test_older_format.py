"""A run that an older hpcresume made and left unfinished: it is read, continued and collected."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from hpcresume.errors import RunDirError
from hpcresume.merge.generation import load_newest, read_union
from hpcresume.merge.packs import key_of
from hpcresume.run.directory import FORMAT_VERSION, RunDir
from tests.support.cli import Command
from tests.support.places import REPOSITORY

ARCHIVE = REPOSITORY / "tests" / "support" / "data" / "run-format-1.tar.gz"
"""60 sources, of which 31 were completed in four segments before Ctrl-C; format 1."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run, unpacked where nobody else could exchange it."""
    path = tmp_path / "squares"
    path.mkdir(mode=0o700)
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(path, filter="data")
    return path


def expected() -> list[dict[str, int]]:
    """Return the rows of an undisturbed run: each square's digits; 7 is dropped, 13 fails."""
    return [
        {"n": n, "square": n * n, "at": at, "digit": int(digit)}
        for n in range(60)
        if n not in {7, 13}
        for at, digit in enumerate(str(n * n))
    ]


def rows(path: Path) -> list[dict[str, int]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_an_older_run_is_read_and_collected(run: Path, tmp_path: Path) -> None:
    """What it had completed is there; collecting says that the rest is missing."""
    assert 1 == RunDir.open(str(run)).info.format < FORMAT_VERSION
    before = load_newest(RunDir.open(str(run)))
    command = Command(tmp_path)

    command.run("collect", str(run), "-o", "out.jsonl", rc=1)

    done = set(before.completed)
    assert 31 == len(done)
    assert [row for row in expected() if row["n"] in done] == rows(tmp_path / "out.jsonl")


def test_an_older_run_is_continued_and_cleaned(run: Path, tmp_path: Path) -> None:
    """It goes on to its end; its segments are folded and removed, and nothing was done twice."""
    command = Command(tmp_path)
    before = {key for key, won in load_newest(RunDir.open(str(run))).won.items() if won}

    command.run(
        *("submit", str(run), "--cluster", "local", "--engine", "inline"),
        *("--collect", "out.jsonl"),
        timeout_s=120,
    )
    whole = (tmp_path / "out.jsonl").read_bytes()
    command.run("clean", str(run), "--yes")
    command.run("collect", str(run), "-o", "again.jsonl")

    assert expected() == rows(tmp_path / "out.jsonl")
    assert whole == (tmp_path / "again.jsonl").read_bytes()
    opened = RunDir.open(str(run))
    union = read_union(opened, max_attempts=3)
    assert before < set(union.won)
    loose = {key_of(name) for ref in opened.all_attempts() for name in opened.segments(ref)}
    assert 3 == len(before - loose)
    assert (60, 0, True) == (len(union.settled()), union.fresh, union.finished)


def test_a_newer_run_is_refused_with_the_version_it_needs(run: Path, tmp_path: Path) -> None:
    """A format from the future is named, with the version that made it; nothing is touched."""
    record = run / "run.json"
    said = json.loads(record.read_bytes())
    record.unlink()
    record.write_text(json.dumps({**said, "format": FORMAT_VERSION + 1, "version": "9.8.7"}))
    with pytest.raises(RunDirError, match=r"format 3; .* up to 2\. hpcresume 9\.8\.7 made it"):
        RunDir.open(str(run))
    Command(tmp_path).run("status", str(run), rc=16)
