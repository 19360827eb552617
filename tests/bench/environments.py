"""Virtual environments of the peers, each made once and kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

PEERS = Path(__file__).with_name("peers")
INSTALL_S = 900


class UnavailableError(Exception):
    """A peer cannot be installed or driven here; the message says why."""


@dataclass(frozen=True)
class Environment:
    """What a peer needs.

    Attributes:
        name: Of its directory; empty: the environment of this process.
        requirements: What pip installs.
        alone: What pip installs then, without what that depends on.
        program: A program that must be there instead, with the Debian package that has it.
    """

    name: str = ""
    requirements: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    program: tuple[str, str] | None = None

    def python(self, root: Path) -> str:
        """Return its interpreter, after installing what is missing.

        Raises:
            UnavailableError: It cannot be installed.
        """
        if self.program is not None:
            self._find_program()
        if not self.name:
            return sys.executable
        place = root / self.name
        python, ready = place / "bin" / "python", place / ".ready"
        if not ready.exists():
            shutil.rmtree(place, ignore_errors=True)
            venv.create(place, with_pip=True)
            install = [python, "-m", "pip", "install", "-q"]
            _install([*install, *self.requirements])
            if self.alone:
                _install([*install, "--no-deps", *self.alone])
            ready.touch()
        return str(python)

    def _find_program(self) -> None:
        assert self.program is not None
        program, package = self.program
        if shutil.which(program) is None and os.geteuid() == 0 and shutil.which("apt-get"):
            _install(["apt-get", "install", "-y", "-q", package])
        if shutil.which(program) is None:
            raise UnavailableError(f"{program} is not installed; Debian's package is {package}")


def _install(command: list[object]) -> None:
    try:
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=INSTALL_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"installing took more than {INSTALL_S} s") from error
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise UnavailableError(f"cannot be installed: {last[:160]}")
