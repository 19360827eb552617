"""The user's files as an evaluation runs them: copies, made when it starts."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from hpcresume.errors import UsageError
from hpcresume.evals.code import load_object
from hpcresume.evals.copies import located, with_copies, write_copies
from hpcresume.evals.settings import EvalSettings
from tests.support.places import Place


def files(directory: Path, **texts: str) -> None:
    """Write Python files."""
    for name, text in texts.items():
        (directory / f"{name}.py").write_text(text)


def settings_of(directory: Path, **more: object) -> EvalSettings:
    """Return the settings of a workflow in one directory, and a scorer in another."""
    (directory / "scores").mkdir()
    files(directory, flow_copied="import words_copied\n\n\ndef answer(item): ...\n")
    files(directory, words_copied="words = 1\n")
    files(directory / "scores", exact_copied="def exact(item, output): return 1\n")
    return EvalSettings(
        dataset="",
        workflow="flow_copied.py:answer",
        scorers=["scores/exact_copied.py:exact"],
        on_item="textwrap:dedent",
        cwd=str(directory),
        **more,  # type: ignore[arg-type]
    )


def test_tasks_run_what_was_there_at_the_start(tmp_path: Path) -> None:
    """
    Files, the modules beside them that they import and what is named besides are copied;
    editing the originals changes nothing, installed modules stay where they are.
    """
    run = Place.make("posix", tmp_path / "shared").run()
    (tmp_path / "prompt.txt").write_text("be brief")
    settings = with_copies(settings_of(tmp_path, snapshot=["prompt.txt"]))
    assert [] == write_copies(run, settings, None)
    files(tmp_path, flow_copied="answer = None\n", words_copied="words = 2\n")
    files(tmp_path / "scores", exact_copied="exact = None\n")

    found = located(settings, Path(run.path))

    answer, exact = (load_object(name, tmp_path) for name in (found.workflow, *found.scorers))
    assert 1 == exact(None, None)
    assert 1 == answer.__globals__["words_copied"].words
    directory = Path(answer.__code__.co_filename).parent
    assert directory.is_relative_to(run.path)
    assert "be brief" == (directory / "prompt.txt").read_text()
    assert "textwrap:dedent" == found.on_item


def test_what_has_changed_is_named(tmp_path: Path) -> None:
    """The next start copies the files as they are then, and names those that differ."""
    run = Place.make("posix", tmp_path / "shared").run()
    settings = settings_of(tmp_path)
    first = with_copies(settings)
    write_copies(run, first, None)
    assert [] == write_copies(run, with_copies(settings), first)
    files(tmp_path, words_copied="words = 3\n")
    second = with_copies(settings)
    assert ["words_copied.py"] == write_copies(run, second, first)
    assert [] == write_copies(run, second, second)
    old, new = (Path(run.path, copied.copies[settings.workflow]) for copied in (first, second))
    assert ["words = 1\n", "words = 3\n"] == [
        path.with_name("words_copied.py").read_text() for path in (old, new)
    ]


def test_what_cannot_be_copied_is_refused(tmp_path: Path) -> None:
    """A named file that is none, or lies elsewhere; and a file that changes meanwhile."""
    run = Place.make("posix", tmp_path / "shared").run()
    settings = settings_of(tmp_path)
    for name, why in {"absent.txt": "is no file", "/etc/passwd": "is not below"}.items():
        with pytest.raises(UsageError, match=why):
            with_copies(msgspec.structs.replace(settings, snapshot=[name]))
    with pytest.raises(UsageError, match="neither the workflow nor a scorer"):
        with_copies(EvalSettings(dataset="", endpoint="http://localhost", snapshot=["x"]))
    copied = with_copies(settings)
    files(tmp_path, words_copied="words = 4\n")
    with pytest.raises(UsageError, match="just been changed"):
        write_copies(run, copied, None)
