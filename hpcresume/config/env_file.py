"""Secrets for the stages: variables from a file that only its owner can read.

The file is read at the start of every attempt; only its path is recorded.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from hpcresume.errors import ConfigError

_LINE = re.compile(r"(?:export\s+)?(?P<name>[A-Za-z_][A-Za-z0-9_]*)=(?P<value>.*)")


def read_env_file(path: str | Path) -> dict[str, str]:
    """Return the variables of a file of ``NAME=value`` lines.

    Blank lines and lines that begin with ``#`` are passed over; a value may stand in single
    or double quotes, and nothing in it is expanded.

    Raises:
        ConfigError: The file cannot be read, others can read it, or a line is none of these.
            No value is part of the message.
    """
    try:
        status = os.stat(path)
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--env-file {path}: cannot be read ({error}). Stages get their secrets from it. "
            "Give a file that you can read on every node.",
            path=str(path),
        ) from error
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"--env-file {path}: others can read it, or it is not yours. It holds secrets. "
            f"Run: chmod 600 {path}",
            path=str(path),
        )
    variables = {}
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ConfigError(
                f"--env-file {path}, line {number}: not NAME=value. Correct the line.",
                path=str(path),
                line=number,
            )
        variables[match["name"]] = _unquoted(match["value"])
    return variables


def _unquoted(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    return value
