"""Variables from a file that only its owner can read."""

from pathlib import Path

import pytest

from hpcresume.config.env_file import read_env_file
from hpcresume.errors import ConfigError


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    """Write an env file with a mode."""
    path.write_text(text)
    path.chmod(mode)
    return path


def test_lines_comments_and_quotes(tmp_path: Path) -> None:
    """Blank lines and comments are passed over, quotes are taken off, nothing is expanded."""
    text = "# keys\n\nA=1\nexport B='two words'\nC=\"$A\"\nD=a=b\nE=\n"
    path = write(tmp_path / "env", text)

    expected = {"A": "1", "B": "two words", "C": "$A", "D": "a=b", "E": ""}
    assert expected == read_env_file(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    """Secrets that others can read are none; the message says how to mend it."""
    with pytest.raises(ConfigError, match="chmod 600"):
        read_env_file(write(tmp_path / "env", "A=1\n", mode))


def test_a_bad_line_is_named_without_its_text(tmp_path: Path) -> None:
    """A line that is no assignment is named by its number; what it holds is not repeated."""
    with pytest.raises(ConfigError, match="line 2") as caught:
        read_env_file(write(tmp_path / "env", "A=1\nhunter2\n"))

    assert "hunter2" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A file that is not there is a clear error."""
    with pytest.raises(ConfigError, match="nowhere"):
        read_env_file(tmp_path / "nowhere")
