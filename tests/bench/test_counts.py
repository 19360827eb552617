"""What an array task asks of the run directory, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.counts import attempt_files, can_trace, count

PUBLICATION = 14
"""Calls of one publication after the first, the look for newer attempts and marks included."""


MODULES = "wave mailbox ftplib poplib imaplib smtplib plistlib tabnanny pyclbr xmlrpc.client"


def test_calls_do_not_depend_on_the_sources(tmp_path: Path) -> None:
    """
    A task asks for the same with 1,000 sources and with 100,000, whose rows are megabytes and
    whose pipeline imports much.
    """
    if not can_trace():
        pytest.skip("strace cannot trace here: python -m tests --install")
    few = count(tmp_path / "few", 1000)
    many = count(tmp_path / "many", 100_000, modules=MODULES)

    assert few == many
    assert sum(few.values()) <= 100
    for name in ("few", "many"):
        assert 3 == len(attempt_files(tmp_path / name / "run"))


@pytest.mark.slow
def test_each_publication_asks_for_the_same(tmp_path: Path) -> None:
    """Each publication after the first one adds as many calls."""
    if not can_trace():
        pytest.skip("strace cannot trace here: python -m tests --install")
    once = count(tmp_path / "once", 200_000)
    often = count(tmp_path / "often", 200_000, max_records=20_000)
    files = attempt_files(tmp_path / "often" / "run")
    segments = sum(path.name.startswith("seg-") for path in files)

    assert segments > 2
    assert PUBLICATION * (segments - 1) == sum(often.values()) - sum(once.values())
