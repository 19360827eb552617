"""Preparing a run that somebody else prepares too, or that was left half-made."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from hpcresume.errors import RunDirError
from hpcresume.fs import POSIX
from hpcresume.launch import prepare as module
from hpcresume.launch.prepare import prepare
from hpcresume.pipeline.restarts import KIND, PointsFooter
from hpcresume.run.directory import RunDir, is_foreign
from hpcresume.segment.container import open_container

PIPELINE = """
import hpcresume as hr


def pipeline(n: int = 3) -> hr.Pipeline:
    sources = [hr.Source(id=f"s{i}", payload=i) for i in range(n)]
    return hr.Pipeline(name="three", sources=sources, stages=[str])
"""


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A directory with a pipeline."""
    (tmp_path / "three.py").write_text(PIPELINE)
    return tmp_path


def prepared(desk: Path, target: str = "three.py"):
    return prepare(target, {}, run_dir=Path("run"), cwd=desk)


def test_a_run_that_was_killed_before_its_sources_were_listed_is_filled(desk):
    """Submitting the file again lists them; the run directory alone says what is missing."""
    prepared(desk)
    (desk / "run/manifest/part-000001").unlink()

    with pytest.raises(RunDirError, match="holds no sources"):
        prepared(desk, "run")
    assert 3 == prepared(desk).manifest.total


@pytest.mark.parametrize("members", [1, 400])
def test_gzip_files_have_restart_points_whatever_their_members(desk, monkeypatch, members):
    """They are published once, in a run that is submitted again as well; nothing is to be said."""
    piece = b'{"n": 12345}\n' * (150_000 * 12 // members)
    (desk / "rows.jsonl.gz").write_bytes(b"".join([gzip.compress(piece, 1)] * members))
    (desk / "three.py").write_text(
        "import hpcresume as hr\n"
        "pipeline = hr.Pipeline('three', hr.chunks('rows.jsonl.gz', rows=900_000), [str])\n"
    )
    monkeypatch.chdir(desk)
    for _ in range(2):
        assert [] == prepared(desk).notes
        (file,) = desk.glob("run/restarts/*/*")
        footer = open_container(POSIX, str(file), KIND, PointsFooter).footer
        assert 4 <= len(footer.points) <= 5


def test_two_that_create_a_run_at_once_share_it(desk, monkeypatch):
    """The second one finds code and sources of the first, which it takes as its own."""
    first = []
    take_code = module._take_code

    def late(run: RunDir, loaded, notes):
        monkeypatch.setattr(module, "_take_code", take_code)
        first.append(prepared(desk))
        return take_code(run, loaded, notes)

    monkeypatch.setattr(module, "_take_code", late)
    second = prepared(desk)

    assert first[0].run.run_id == second.run.run_id
    assert (1, 3, [1]) == (second.code, second.manifest.total, second.run.part_numbers())


def test_a_failure_does_not_remove_the_run_of_another(desk, monkeypatch):
    """Whoever fails removes the directory only if it has made the run itself."""

    def fail(run: RunDir, loaded, notes):
        raise RunDirError("no space")

    original = RunDir.create

    def overtaken(path, info):
        with monkeypatch.context() as inner:
            inner.setattr(RunDir, "create", original)
            inner.setattr(module, "_take_code", take_code)
            prepared(desk)
        return original(path, info)

    take_code = module._take_code
    monkeypatch.setattr(module, "_take_code", fail)
    monkeypatch.setattr(RunDir, "create", overtaken)
    with pytest.raises(RunDirError, match="no space"):
        prepared(desk)

    monkeypatch.undo()
    assert 3 == prepared(desk).manifest.total
    assert [1] == RunDir.open(str(desk / "run")).part_numbers()


@pytest.mark.parametrize(
    ("names", "foreign"),
    [
        ([], False),
        ([".probe-1f", ".tmp-2e"], False),
        (["thesis.tex"], True),
        ([".git"], True),
        (["CACHEDIR.TAG", "code"], False),
    ],
)
def test_somebodys_own_directory_is_told_from_a_run_in_the_making(tmp_path, names, foreign):
    """The tag comes first; before it a run in the making holds temporary files only."""
    for name in names:
        (tmp_path / name).touch()

    assert foreign == is_foreign(str(tmp_path))
