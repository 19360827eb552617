"""Listing a directory tree in one order, and globs on relative paths."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hpcresume.errors import SourcesError


def glob_regex(pattern: str) -> re.Pattern[str]:
    """Return what ``fullmatch``es a relative path when the glob does; ``**/`` is any depth."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]]+\])", pattern)
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(special.get(p) or _glob_literal(p) for p in parts), re.DOTALL)


def _glob_literal(part: str) -> str:
    if part.startswith("[") and part.endswith("]") and len(part) > 2:
        inner = part[1:-1].replace("\\", "\\\\")
        return f"[^{inner[1:]}]" if inner.startswith("!") else f"[{inner}]"
    return re.escape(part)


def walk_files(
    directory: Path | str, prefix: str, pruned: Sequence[re.Pattern[str]]
) -> Iterator[tuple[os.DirEntry[str], str]]:
    """Yield the regular files below a directory with their relative paths, in path order.

    Raises:
        SourcesError: A directory cannot be read.
    """
    try:
        with os.scandir(directory) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise SourcesError(
            f"{directory} cannot be listed: {error.strerror}. The sources under it are unknown. "
            "Make it readable or exclude it.",
            path=str(directory),
        ) from error
    for entry in entries:
        relative = prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            if not any(regex.fullmatch(relative) for regex in pruned):
                yield from walk_files(entry.path, relative + "/", pruned)
        elif entry.is_file():
            yield entry, relative
