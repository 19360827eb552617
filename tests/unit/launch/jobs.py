"""Jobs to render, settings to render them with, and readers of what comes out."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from hpcresume.config import Resolved, load_settings
from hpcresume.launch.rendering import ArrayJob, MergeJob


def settings(
    flags: dict[str, dict[str, Any]] | None = None, *, site: str = "generic", **environ: str
) -> Resolved:
    """Return settings that nothing outside the test decides."""
    python = {"python": "/opt/venv/bin/python"}
    given = flags or {}
    given = given | {"site": python | given.get("site", {})}
    return load_settings(
        site=site, start_dir=Path("/"), environ={"HOME": "/nonexistent"} | environ, flags=given
    )


def array_job(**changes: Any) -> ArrayJob:
    """Return a job array of 64 tasks with what ``changes`` says."""
    values: dict[str, Any] = {
        "name": "hr-paragraphs-1f2e-r0",
        "run_dir": Path("/scratch/me/run"),
        "folder": Path("/scratch/me/run/rounds/0"),
        "log_dir": Path("/scratch/me/run/logs"),
        "tasks": 64,
    }
    return ArrayJob(**values | changes)


def merge_job(**changes: Any) -> MergeJob:
    """Return a merge job after array 12 with what ``changes`` says."""
    values: dict[str, Any] = {
        "name": "hr-paragraphs-1f2e-m0",
        "run_dir": Path("/scratch/me/run"),
        "log_dir": Path("/scratch/me/run/logs"),
        "dependency": "afterany:12",
    }
    return MergeJob(**values | changes)


def sbatch_reads(script: str) -> list[tuple[str, str | None]]:
    """Return a script's options as sbatch reads them: Slurm's src/sbatch/opt.c, _get_argument."""
    found = []
    for line in script.split("\n")[1:]:
        if not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            found += [_option(word) for word in _words(line.removeprefix("#SBATCH"))]
    return found


def _option(word: str) -> tuple[str, str | None]:
    name, equals, value = word.removeprefix("--").partition("=")
    return name, value if equals else None


def _words(line: str) -> list[str]:
    words, at = [], 0
    while True:
        while at < len(line) and line[at] in " \t\v\f\r":
            at += 1
        if at == len(line) or line[at] == "#":
            return words
        word, at = _word(line, at)
        words.append(word)


def _word(line: str, at: int) -> tuple[str, int]:
    word, quote, escaped = "", "", False
    while at < len(line) and (quote or line[at] not in " \t\v\f\r"):
        character = line[at]
        at += 1
        if escaped:
            word, escaped = word + character, False
        elif character == "\\":
            escaped = True
        elif quote and character == quote:
            quote = ""
        elif not quote and character in "\"'":
            quote = character
        else:
            word += character
    assert not quote, f"sbatch refuses the line: {line!r}"
    return word, at


def bash_syntax(script: str) -> str:
    """Return what ``bash -n`` complains about, or the empty string."""
    done = subprocess.run(
        ["bash", "-n"], input=os.fsencode(script), capture_output=True, check=False
    )
    return done.stderr.decode() or ("" if done.returncode == 0 else f"status {done.returncode}")
