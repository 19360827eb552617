"""The README does what it says: its commands and its first pipeline are run here."""

from __future__ import annotations

import os
import re

from tests.support.places import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CI_RUN = REPOSITORY / ".ci" / "run"


def blocks(language: str) -> list[str]:
    """Return the text of the README's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def test_ci_runs_the_command_of_the_readme() -> None:
    """CI runs the test command that the README gives, to the letter."""
    commands = [line for block in blocks("console") for line in block.splitlines()]
    in_readme = [line for line in commands if "-m tests --install" in line]

    assert 1 == len(in_readme)
    assert in_readme[0] in CI_RUN.read_text(encoding="utf-8").splitlines()
    assert os.access(CI_RUN, os.X_OK)
