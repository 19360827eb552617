"""Shell completion is installed by one command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.support.places import REPOSITORY


def completion(home, *arguments, shell="/bin/bash"):
    """Run `hpcresume completion` of a user with an empty home."""
    env = {k: v for k, v in os.environ.items() if k != "XDG_CONFIG_HOME"}
    argv = [sys.executable, "-m", "hpcresume", "completion", *arguments]
    return subprocess.run(
        argv,
        env={**env, "HOME": str(home), "SHELL": shell, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_one_command_installs_it_for_the_users_shell(tmp_path):
    """A new bash completes subcommands; installing twice adds one line to the start-up file."""
    (tmp_path / ".bashrc").write_text("export KEPT=1")
    first, second = completion(tmp_path, "--install"), completion(tmp_path, "--install")
    started = (tmp_path / ".bashrc").read_text()
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "hpcresume"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m hpcresume "$@"\n')
    command.chmod(0o755)
    script = (
        ". ~/.bashrc; COMP_WORDS=(hpcresume comp); COMP_CWORD=1; "
        "_hpcresume_completion hpcresume; echo ${COMPREPLY[@]}"
    )
    shown = subprocess.run(
        ["bash", "--norc", "-c", script],
        env={
            "HOME": str(tmp_path),
            "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
            "PYTHONPATH": str(REPOSITORY),
        },
        capture_output=True,
        text=True,
        check=False,
    )

    assert (0, 0) == (first.returncode, second.returncode), first.stderr
    assert started.startswith("export KEPT=1\n")
    assert 1 == started.count("completion of hpcresume")
    assert "completion\n" == shown.stdout, shown.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_their_own_places(tmp_path, shell):
    """zsh reads a line in .zshrc, fish its directory of completions."""
    done = completion(tmp_path, shell, "--install")
    places = {
        "zsh": ".config/hpcresume/completion.zsh",
        "fish": ".config/fish/completions/hpcresume.fish",
    }

    assert 0 == done.returncode, done.stderr
    path = tmp_path / places[shell]
    assert "_HPCRESUME_COMPLETE" in path.read_text()
    assert (shell == "zsh") == (tmp_path / ".zshrc").exists()
    if shutil.which(shell):
        assert 0 == subprocess.run([shell, "-n", str(path)], check=False).returncode


def test_an_unknown_shell_is_named(tmp_path):
    """Exit code 2 and the shells that there are."""
    done = completion(tmp_path, "--install", shell="/bin/tcsh")

    assert 2 == done.returncode
    assert "$SHELL is tcsh" in done.stderr
    assert not list(tmp_path.iterdir())
