"""Calling the command line in this process."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from hpcresume.cli import cli


@pytest.fixture
def hpcresume():
    """Call the command line with arguments; the result has exit_code, stdout and stderr."""

    def call(*args):
        return CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="hpcresume")

    return call
