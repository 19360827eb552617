"""Other releases of Debian, and with them other versions of Slurm and Python, in a folder.

A release is built once by debootstrap, with Slurm and a virtual environment that holds this
project, and reused.  A command runs inside it by :func:`command`: with it as root, in a mount
namespace of its own, where everything outside the operating system (home, /tmp, /scratch, ...)
is the machine's own under the same path.  A testbed inside has therefore the same directory
as one outside, and its mounts end with its last process, however that ends.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec
from filelock import FileLock

from hpcresume.errors import TestbedError
from hpcresume.testbed import packages
from hpcresume.testbed.state import Release

NAMES = ("bookworm", "trixie", "sid")
"""Debian's releases with the versions 22.05, 24.11 and 26.05 of Slurm."""

# These belong to a release; whatever else lies in / is the machine's, seen inside too.
_OWN = {"bin", "boot", "etc", "lost+found", "run", "sbin", "usr", "var"}
# Who the machine's users are, and how its network is reached.
_SHARED_FILES = [
    "/etc/passwd",
    "/etc/group",
    "/etc/hosts",
    "/etc/resolv.conf",
    "/etc/pip.conf",
    "/etc/ssl/certs/ca-certificates.crt",
]
# Where the machine's root is for a moment.
_OUTSIDE = ".outside"
_VENV = "/usr/local/lib/hpcresume"
SOURCE = Path("/usr/local/src/hpcresume")
"""Where a checkout is seen inside, whatever lies above it outside."""
_MARKER = Path("/etc/hpcresume-testbed.json")
_PATH = f"{_VENV}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What leads the interpreter or the linker to files of the other release.
_FOREIGN = ("PYTHON", "LD_", "VIRTUAL_ENV", "CONDA", "PYENV")
# Process ids of their own, all of which end with the process that asked, however it ends.
_JAIL = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork"]
_JAIL += ["--kill-child", "--mount-proc"]
_CHECKOUT = Path(__file__).resolve().parent.parent.parent


def here() -> Release | None:
    """Return the release that this process runs inside of, None outside."""
    return _marked(_MARKER)


def default_root(name: str) -> Path:
    """Return where a release is built and looked for unless another folder is named."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "hpcresume", "releases", name)


def prepare(
    name: str,
    *,
    root: Path | None = None,
    mirror: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Release:
    """Build a release unless it is there, and install this project in it unless it is.

    A build that was killed is begun anew by the next call; nothing of it is left over.

    Args:
        name: One of :data:`NAMES`.
        root: Its folder, about 1.5 GB; by default below the user's cache directory.
        mirror: Debian's mirror; by default the one that apt uses here.
        tell: Gets a line before each step that takes minutes.

    Raises:
        TestbedError: Not root, no debootstrap here, or a step failed; with its log.
    """
    packages.require_release_tools()
    path = Path(os.path.abspath(root or default_root(name)))
    release = Release(name, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists() or not any(path.iterdir()):
            tell(f"building Debian {name} with its Slurm in {path} (log: {path}.log)")
            _debootstrap(release, mirror)
        found = _marked(_outside(release, _MARKER))
        if found != release:
            what = "no release of Debian" if found is None else f"{found.name} of {found.root}"
            raise TestbedError(
                f"{path} is not empty and holds {what}. Name another folder, or remove it",
                path=str(path),
            )
        if _installed(release) != _wanted():
            tell(f"installing hpcresume for the Python of {name} (log: {path}.log)")
            _install(release)
    return release


def command(release: Release, argv: Sequence[str], *, directory: Path | None = None) -> list[str]:
    """Return the command that runs ``argv`` inside a release, with :func:`environment`.

    Args:
        release: One that :func:`prepare` has returned, in this or another process.
        argv: Command and arguments.
        directory: Working directory, under its path inside; by default the current one.

    Raises:
        TestbedError: The directory belongs to the operating system, so it is not seen inside;
            or the release is gone.
    """
    if not Path(release.root, "usr").is_dir():
        raise TestbedError(
            f"the release {release.name} is gone: {release.root} is not there. End what was made "
            "of it: hpcresume testbed down; then build it again: hpcresume testbed up --release",
            root=release.root,
        )
    where = directory or Path.cwd()
    _require_visible(where)
    root = shlex.quote(release.root)
    lines = [
        "set -e",
        f"mount --bind {root} {root}",
        # Not repeated in the copy of the folder that the root itself lies in.
        f"mount --make-unbindable {root}",
        *_binds(release),
        f"mount --make-private {root}",
        # Not chroot, which leaves the machine's root as that of the namespace (nsenter(1)).
        f"cd {root}",
        f"pivot_root . {_OUTSIDE}",
        f"umount -l /{_OUTSIDE}",
        f'exec env -C {shlex.quote(str(where))} "$@"',
    ]
    return ["unshare", "--mount", "sh", "-c", "\n".join(lines), "sh", *argv]


def environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return ``base`` (the process's environment) for a command inside."""
    base = os.environ if base is None else base
    kept = {name: value for name, value in base.items() if not name.startswith(_FOREIGN)}
    return {**kept, "PATH": _PATH, "LANG": "C.UTF-8"}


def _require_visible(path: Path) -> None:
    if len(path.parts) > 1 and _is_own(path.parts[1]) and not path.is_relative_to(SOURCE):
        raise TestbedError(
            f"{path}: not seen inside another release, which has a /{path.parts[1]} of its own. "
            "Work in a directory below /home or /tmp",
            path=str(path),
        )


def _is_own(name: str) -> bool:
    return name in _OWN or name.startswith("lib")


def _binds(release: Release) -> Iterator[str]:
    Path(release.root, _OUTSIDE).mkdir(exist_ok=True)
    for entry in sorted(os.scandir("/"), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False) and not _is_own(entry.name):
            yield _bind(release, Path(entry.path), Path(entry.path))
    for name in _SHARED_FILES:
        if Path(name).exists():
            yield _bind(release, Path(name), Path(name))
    if _in_checkout():
        yield _bind(release, _CHECKOUT, SOURCE)


def _bind(release: Release, outside: Path, inside: Path) -> str:
    target = _outside(release, inside)
    if outside.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    elif not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    return f"mount --rbind {shlex.quote(str(outside))} {shlex.quote(str(target))}"


def _marked(path: Path) -> Release | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Release)
    except FileNotFoundError:
        return None


def _outside(release: Release, inside: Path) -> Path:
    return Path(release.root) / inside.relative_to("/")


def _in_checkout() -> bool:
    return (_CHECKOUT / "pyproject.toml").exists()


def _debootstrap(release: Release, mirror: str | None) -> None:
    partial = Path(f"{release.root}.partial")
    # Its mounts, if it was killed in the middle, went with their namespace.
    shutil.rmtree(partial, ignore_errors=True)
    include = ",".join(packages.release_packages())
    argv = ["debootstrap", "--variant=minbase", f"--include={include}", release.name, str(partial)]
    chosen = mirror or packages.debian_mirror()
    _run(release, [*argv, *([chosen] if chosen else [])], os.environ)
    marker = partial / _MARKER.relative_to("/")
    marker.write_bytes(msgspec.json.encode(release))
    partial.rename(release.root)


def _wanted() -> str:
    """Return what stands for the project's dependencies, to tell when they changed."""
    if _in_checkout():
        return hashlib.sha256((_CHECKOUT / "pyproject.toml").read_bytes()).hexdigest()
    return version("hpcresume")


def _stamp(release: Release) -> Path:
    return _outside(release, Path(_VENV, "installed"))


def _installed(release: Release) -> str | None:
    try:
        return _stamp(release).read_text(encoding="ascii")
    except FileNotFoundError:
        return None


def _install(release: Release) -> None:
    what = ["-e", f"{SOURCE}[test]"] if _in_checkout() else [f"hpcresume[parquet]=={_wanted()}"]
    script = f'set -e; umask 022; python3 -m venv --clear {_VENV}; {_VENV}/bin/pip install "$@"'
    inside = ["sh", "-c", script, "sh", "--no-input", *what]
    _run(release, command(release, inside, directory=Path("/")), environment())
    _stamp(release).write_text(_wanted(), encoding="ascii")


def _run(release: Release, argv: Sequence[str], env: Mapping[str, str]) -> None:
    log = Path(f"{release.root}.log")
    with log.open("wb") as output:
        done = subprocess.run(
            [*_JAIL, *argv],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise TestbedError(
            f"building {release.name} in {release.root} ended with status {done.returncode}. "
            f"Call it again to begin anew. The end of {log}:\n{tail}",
            returncode=done.returncode,
        )
