"""Running the command as a user would, and waiting for what it leads to."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL_S = 0.2


def wait_until(
    condition: Callable[[], Any], *, timeout_s: float, describe: Callable[[], str]
) -> Any:
    """Return the condition's first true value; fail with evidence when time is up."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s:\n{describe()}")
        time.sleep(POLL_S)


def user_id() -> int:
    """Return the id of the user whose commands and jobs the tests are about."""
    user = os.environ.get("HPCRESUME_TEST_USER")
    return os.getuid() if user is None else pwd.getpwnam(user).pw_uid


def as_user(directory: Path) -> list[str]:
    """Return what goes before a command that is run as ``HPCRESUME_TEST_USER`` if that is set.

    Args:
        directory: Becomes that user's home.
    """
    user = os.environ.get("HPCRESUME_TEST_USER")
    if user is None:
        return []
    entry = pwd.getpwnam(user)
    ids = [f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups"]
    return ["setpriv", *ids, "env", f"HOME={directory}", f"USER={user}", f"LOGNAME={user}"]


@dataclass
class Command:
    """``hpcresume`` in a directory, with an environment, as ``HPCRESUME_TEST_USER`` if set."""

    directory: Path
    env: Mapping[str, str] | None = None

    def argv(self, *arguments: str) -> list[str]:
        """Return the words that start the command."""
        return [*as_user(self.directory), sys.executable, "-m", "hpcresume", *arguments]

    def start(self, *arguments: str, **popen: Any) -> subprocess.Popen[str]:
        """Start a command and return its process."""
        return subprocess.Popen(
            self.argv(*arguments),
            cwd=self.directory,
            env={**(self.env or os.environ), "PYTHONDONTWRITEBYTECODE": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **popen,
        )

    def run(self, *arguments: str, rc: int | None = 0, timeout_s: float = 240) -> str:
        """Run a command to its end, check its exit code and return stdout."""
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"{arguments} ran past {timeout_s:g} s\n{out}\n{err}") from None
        assert rc is None or rc == process.returncode, (
            f"{arguments} exited with {process.returncode}\n{out}\n{err}"
        )
        return out

    def json(self, *arguments: str, rc: int | None = 0, timeout_s: float = 240) -> dict[str, Any]:
        """Run a command with ``--json`` and return what it printed."""
        found: dict[str, Any] = json.loads(
            self.run(*arguments, "--json", rc=rc, timeout_s=timeout_s)
        )
        return found

    def status(self, run: Path) -> dict[str, Any]:
        """Return ``status --json`` of a run."""
        return self.json("status", str(run), rc=None)

    def wait_ended(self, run: Path, *, timeout_s: float = 240) -> dict[str, Any]:
        """Wait for a run's end and return its status."""
        seen: dict[str, Any] = {}

        def ended() -> bool:
            seen.update(self.status(run))
            return seen["state"] not in {"planned", "waiting", "running"}

        wait_until(ended, timeout_s=timeout_s, describe=lambda: f"{seen}\n{logs_of(run)}")
        return seen


def logs_of(run: Path) -> str:
    """Return the tails of a run's logs."""
    paths: Sequence[Path] = sorted(run.glob("rounds/*/logs/*"))
    return "\n".join(
        f"==> {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
        for path in paths
    )


def attempt_pids(run: Path, round_: int, task: int) -> list[int]:
    """Return the supervisors' pids of an array task, as its attempts recorded them."""
    pattern = f"rounds/{round_:04d}/tasks/{task:05d}/e*/attempt.json"
    return [json.loads(path.read_bytes())["pid"] for path in sorted(run.glob(pattern))]
