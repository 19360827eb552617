"""How an evaluation comes along, on a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from hpcresume.cli import eval as command
from hpcresume.evals.run import Launching
from hpcresume.evals.settings import EvalSettings
from tests.support.places import Place

CLEAR_LINE = "\x1b[2K"


def everything(terminal: int) -> Iterator[bytes]:
    """Yield what is written to a terminal, until its other end is closed."""
    with contextlib.suppress(OSError):
        while data := os.read(terminal, 1 << 16):
            yield data


def test_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    E15: on a terminal there is one line with a bar, redrawn, which tells items done, errors,
    items under way, rate, time left and tokens; it is gone at the end.
    """
    run = Place.make("posix", tmp_path).run()
    session = command._Session(run, EvalSettings(dataset=""), Launching(), expected=4)
    rows = [
        {"id": f"i{n}", "repetition": 0, "status": status, "usage": {"total_tokens": 9}}
        for n, status in enumerate(("ok", "error", "ok"))
    ]
    main, child = pty.openpty()
    shown: list[bytes] = []
    # Meanwhile: a terminal that nobody reads takes only so much.
    reader = threading.Thread(target=lambda: shown.extend(everything(main)))
    reader.start()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with os.fdopen(child, "w") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        with command._progress(session) as show:
            show(4)
            Path(run.join("workflow_output.jsonl")).write_bytes(
                b"".join(orjson.dumps(row) + b"\n" for row in rows)
            )
            session.following.look()
            show(1)
    reader.join()
    os.close(main)
    said = b"".join(shown).decode()
    assert "3 of 4 done, 1 errors, 1 running, " in said
    assert " left, 27 tokens" in said
    assert "━" in said
    assert said.rstrip().endswith(CLEAR_LINE), repr(said[-80:])
