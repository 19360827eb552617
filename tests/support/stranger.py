"""A second Unix user: a uid that nobody has, with which tests try what others could."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Stranger:
    """Another user of this machine.

    Attributes:
        uid: Its uid, and gid.
    """

    uid: int

    @classmethod
    def make(cls) -> Stranger:
        """Return a user that has no account; skip where acting as another takes more rights."""
        if os.geteuid() != 0:
            pytest.skip("acting as another user takes root")
        taken = {entry.pw_uid for entry in pwd.getpwall()}
        return cls(next(uid for uid in range(61_000, 65_000) if uid not in taken))

    def call(
        self, *command: Any, timeout_s: float = 60, as_group: int | None = None, **popen: Any
    ) -> Any:
        """Run a command as this user, in no further groups, and return how it ended."""
        return subprocess.run(
            [str(word) for word in command],
            user=self.uid,
            group=self.uid if as_group is None else as_group,
            extra_groups=[],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            **popen,
        )

    def python(self, *arguments: Any, env: dict[str, str]) -> Any:
        """Run this interpreter as this user, also where it lies in somebody's home.

        It is ended with status 124 where it does not come to an end by itself.
        """
        capability = "+dac_read_search"
        return subprocess.run(
            [
                *("timeout", "--signal=KILL", "20"),
                *("setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups"),
                *(f"--inh-caps={capability}", f"--ambient-caps={capability}"),
                *(sys.executable, "-P", *map(str, arguments)),
            ],
            env=env,
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )

    def can(self, test: str, path: Any) -> bool:
        """Tell whether ``test`` (``-r``, ``-w``, ``-x``, ``-e``) of a path is true for it."""
        return bool(self.call("test", test, path).returncode == 0)
