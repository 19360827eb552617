"""Reading the TOML files that settings come from, and deciding whether to trust them."""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hpcresume.errors import ConfigError


def read_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file's content.

    Raises:
        ConfigError: The file cannot be read, is not TOML, or holds a string with a
            control character.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}). Its settings are needed. "
            "Make it readable or remove it",
            path=str(path),
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}. Correct it", path=str(path)) from error
    return data


def refuse_untrusted(path: Path) -> None:
    """Refuse a file whose content another user decides.

    Raises:
        ConfigError: The file is owned by neither this user nor root, or its group or
            everybody may write it.
    """
    reason = untrusted_reason(path)
    if reason:
        raise ConfigError(
            f"{path}: {reason}. Its lines run in your jobs, as you. "
            f"Keep a copy that only you can write: chmod go-w {path}",
            path=str(path),
        )


def untrusted_reason(path: Path) -> str:
    """Return why a file's content may be another user's, or the empty string."""
    try:
        status = path.stat()
    except OSError as error:
        return f"cannot be examined ({error.strerror})"
    if status.st_uid not in {os.geteuid(), 0}:
        return f"is owned by user {status.st_uid}, neither you nor root"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by other users (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def refuse_control_characters(value: object, *, key: str, origin: str) -> None:
    """Refuse a newline, NUL or other control character in any string of a value.

    Raises:
        ConfigError: Such a string would end its line in the batch script and start another.
    """
    for text in _strings(value):
        if has_control_character(text):
            raise ConfigError(
                f"{key} = {text!r} ({origin}) holds a control character. "
                "A newline would start another line of the batch script. Remove it",
                key=key,
                origin=origin,
            )


def has_control_character(text: str) -> bool:
    """Return whether a text holds a newline, NUL, or any other character below space."""
    return any(ord(character) < 32 or ord(character) == 127 for character in text)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return a sentence that names the known word nearest to ``word``, or lists them all."""
    from difflib import get_close_matches

    words = sorted(known)
    near = get_close_matches(word, words, n=1, cutoff=0.6)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(words)}"
