"""The journal of a pool's updates: what it tells after a death in the middle."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcresume.updates import Journal, UpdateStep, interrupted, journal_path


def step(name: str, *, version: int | None = 2) -> UpdateStep:
    return UpdateStep("5e55", name, 1, 2, version)


@pytest.mark.parametrize(
    ("last", "served"),
    [
        (step("transfer"), 1),
        (step("commit"), 1),
        (step("resume"), 2),
        (step("resume", version=1), 1),
        (step("committed"), 2),
        (step("rolled_back", version=1), 1),
        (step("unrecoverable", version=None), None),
    ],
    ids=lambda one: one.step if isinstance(one, UpdateStep) else "",
)
def test_what_may_have_been_served(tmp_path: Path, last: UpdateStep, served: int | None) -> None:
    """From the resume on a request may have been answered with the new version."""
    journal = Journal(str(tmp_path / "a" / "pool"))
    assert None is journal.last()
    journal.write(step("pause"))
    journal.write(last)

    assert (last, served) == (journal.last(), journal.last().served)


@pytest.mark.parametrize("tail", [b'{"session":"5e', b'{"session":1}\n', b"[]\n", b"\xff\x00\n"])
def test_a_torn_line_is_not_the_last_one(tmp_path: Path, tail: bytes) -> None:
    """What a death left of a line is passed over; the line before it counts."""
    journal = Journal(str(tmp_path / "pool"))
    journal.write(step("transfer"))
    with open(journal.path, "ab") as file:
        file.write(tail)

    assert step("transfer") == journal.last()


def test_what_was_interrupted_is_named_by_stage(tmp_path: Path) -> None:
    """Of several stages' journals those whose last update has not ended are named."""
    attempt = str(tmp_path)
    assert {} == interrupted(attempt)
    Journal(journal_path(attempt, "a/b %")).write(step("transfer"))
    Journal(journal_path(attempt, "done")).write(step("committed"))

    assert {"a/b %": step("transfer")} == interrupted(attempt)
    assert "update from version 1 to 2, in phase 'transfer'" == str(step("transfer"))
    assert "update from version 1 to 2, rolled back" == str(step("rolled_back"))
