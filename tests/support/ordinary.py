"""Running commands as a user who is not root, wherever Python and the package lie.

They often lie below root's home, which nobody else may enter.  So in mount namespaces of their
own, that of the command and those of a cluster's nodes, such a directory is replaced by one
that shows only what is needed of it.
"""

from __future__ import annotations

import pwd
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from hpcresume.testbed.state import load
from tests.support.cli import Command
from tests.support.cluster import SlurmCluster
from tests.support.places import REPOSITORY

NOBODY = pwd.getpwnam("nobody")
_OTHERS_MAY_ENTER = 0o001


def _needed() -> Iterator[Path]:
    """Yield the directories without which no task can start."""
    for path in {Path(sys.base_prefix), Path(sys.prefix), REPOSITORY}:
        yield path.resolve()


def _closed(path: Path) -> Path | None:
    """Return the uppermost directory on the way that others may not enter."""
    for part in reversed([path, *path.parents]):
        if not part.stat().st_mode & _OTHERS_MAY_ENTER:
            return part
    return None


def _opening_script() -> str:
    """Return shell lines that open what is closed, for the namespace they run in."""
    closed: dict[Path, list[Path]] = {}
    for path in _needed():
        if (above := _closed(path)) is not None:
            closed.setdefault(above, []).append(path)
    lines = ["set -e", "umask 022", "keep=$(mktemp -d)"]
    for above, paths in closed.items():
        for number, path in enumerate(paths):
            lines += [f'mkdir "$keep/{number}"', f'mount --bind {_sh(path)} "$keep/{number}"']
        lines.append(f"mount -t tmpfs -o mode=755 none {_sh(above)}")
        for number, path in enumerate(paths):
            lines += [f"mkdir -p {_sh(path)}", f'mount --move "$keep/{number}" {_sh(path)}']
            lines.append(f'rmdir "$keep/{number}"')
    return "\n".join([*lines, 'rmdir "$keep"'])


def _sh(path: Path) -> str:
    return shlex.quote(str(path))


def open_nodes(cluster: SlurmCluster) -> None:
    """Let jobs of ordinary users start Python on the nodes of a cluster."""
    state = load(cluster.directory)
    assert state is not None
    for daemon in state.daemons:
        if daemon.name.startswith("slurmd-"):
            enter = ["nsenter", "--mount", f"--target={daemon.pid}"]
            subprocess.run([*enter, "sh", "-c", _opening_script()], check=True)


class OrdinaryCommand(Command):
    """``hpcresume`` as user nobody."""

    def __init__(self, directory: Path, env: Mapping[str, str]) -> None:
        super().__init__(directory, {**env, "HOME": str(directory)})

    def argv(self, *arguments: str) -> list[str]:
        """Return the words that start the command."""
        drop = ["setpriv", f"--reuid={NOBODY.pw_uid}", f"--regid={NOBODY.pw_gid}"]
        drop += ["--clear-groups", "--"]
        inner = f'{_opening_script()}\nexec {shlex.join(drop)} "$@"'
        script = ["unshare", "--mount", "--propagation", "private", "sh", "-c", inner, "sh"]
        return [*script, sys.executable, "-m", "hpcresume", *arguments]
