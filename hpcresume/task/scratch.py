"""Node-local directories of an attempt, and the sweeping of those that dead ones left.

``<local>/hpcresume-<uid>/<run id>/<round>-<task>-<epoch>/`` holds a lock file that the
supervisor keeps locked; the lock is released by its death, so it tells live from dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from hpcresume.errors import LocalStorageError
from hpcresume.ledger.local_disk import check_local

# <temp>/r/session_<26 characters>_<pid>/sockets/plasma_store must fit a socket's 107 bytes.
MAX_RAY_TEMP_BYTES = 41
_PUT_TRIES = 100
_LOCK, _RAY_TEMP, _NAME = "lock", "ray-temp", "attempt"


@dataclass(frozen=True, slots=True)
class Scratch:
    """An attempt's node-local directories.

    Attributes:
        path: The attempt's directory.
        ray_temp: Ray's directory, short enough for its sockets.
        lock_fd: The locked file.
    """

    path: str
    ray_temp: str
    lock_fd: int

    def remove(self) -> None:
        """Remove both directories; what cannot be removed is left to the next sweep."""
        shutil.rmtree(self.ray_temp, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(self.path))


def choose_local(configured: str, candidates: Iterable[str], environ: Mapping[str, str]) -> str:
    """Return the node-local directory to use.

    Args:
        configured: The user's choice, empty for none.
        candidates: The site's candidates, with ``$VARIABLES``; the first usable one is taken.
        environ: Where the variables come from.

    Raises:
        LocalStorageError: None can be used; says what was tried.
    """
    if configured:
        check_local(configured)
        return configured
    tried = []
    for candidate in candidates:
        path = _expand(candidate, environ)
        if path is None or not os.path.isdir(path):
            continue
        if not os.access(path, os.W_OK | os.X_OK):
            tried.append(f"{path}: not writable")
            continue
        try:
            check_local(path)
        except LocalStorageError as error:
            tried.append(str(error))
            continue
        return path
    raise LocalStorageError(
        f"no node-local directory can be used ({'; '.join(tried) or 'none exists'}). "
        "The ledger needs a disk of the node itself. Give one with --local-dir.",
        tried=tried,
    )


def _expand(text: str, environ: Mapping[str, str]) -> str | None:
    """Return a candidate with its variables filled in, None if one is not set."""
    parts = text.split("/")
    for number, part in enumerate(parts):
        if part.startswith("$"):
            value = environ.get(part[1:].strip("{}"))
            if not value:
                return None
            parts[number] = value
    return "/".join(parts)


def make_scratch(local: str, *, run_id: str, name: str, attempt: str) -> Scratch:
    """Create and lock an attempt's directories.

    Raises:
        LocalStorageError: The disk refused, or another user holds the name.
    """
    import tempfile

    parent = _directory_of(local, run_id)
    base, path = os.path.dirname(parent), os.path.join(parent, name)
    with contextlib.ExitStack() as undo:
        try:
            os.makedirs(base, mode=0o700, exist_ok=True)
            _check_private(base)
            # Others that start on this node sweep what they find there unlocked.
            new = tempfile.mkdtemp(prefix=".new-", dir=base)
            undo.callback(shutil.rmtree, new, ignore_errors=True)
            ray_temp = make_ray_temp(local)
            undo.callback(shutil.rmtree, ray_temp, ignore_errors=True)
            lock_fd = _fill(new, attempt, ray_temp)
            _put(new, path)
        except OSError as error:
            raise LocalStorageError(
                f"cannot create {path}: {error.strerror or error}. "
                "The attempt keeps its ledger there. Free space on the node's disk, or give "
                "another directory with --local-dir.",
                path=path,
            ) from error
        undo.pop_all()
    return Scratch(path, ray_temp, lock_fd)


def _directory_of(local: str, run_id: str) -> str:
    """Return the directory of a run's attempts on this node."""
    return os.path.join(local, f"hpcresume-{os.geteuid()}", run_id)


def _put(new: str, path: str) -> None:
    """Give a directory its name; the one above it goes when the last attempt in it ends."""
    # A directory of this name is garbage: epochs are never given out twice.
    shutil.rmtree(path, ignore_errors=True)
    for left in reversed(range(_PUT_TRIES)):
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        try:
            os.rename(new, path)
        except FileNotFoundError:
            if not left:
                raise
        else:
            return


def _fill(path: str, attempt: str, ray_temp: str) -> int:
    """Make what an attempt's directory holds, and return its locked file."""
    for inner in ("marks", "scratch", "outputs", "parts"):
        os.mkdir(os.path.join(path, inner), 0o700)
    lock_fd = os.open(os.path.join(path, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _write(path, _RAY_TEMP, ray_temp)
    _write(path, _NAME, attempt)
    return lock_fd


def _check_private(path: str) -> None:
    status = os.lstat(path)
    if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode):
        raise LocalStorageError(
            f"{path} belongs to another user. Somebody took the name of your directory. "
            "Give another directory with --local-dir.",
            path=path,
        )


def _write(directory: str, name: str, text: str) -> None:
    with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
        file.write(text)


def _read(directory: str, name: str) -> str:
    with contextlib.suppress(OSError), open(os.path.join(directory, name), encoding="utf-8") as f:
        return f.read()
    return ""


def make_ray_temp(local: str = "") -> str:
    """Create Ray's directory: mode 0700, node-local, short enough for its sockets.

    Raises:
        LocalStorageError: No directory will do.
    """
    import tempfile

    tried = []
    for parent in (local, "/tmp", os.environ.get("TMPDIR", ""), "/var/tmp", "/dev/shm"):  # noqa: S108  # mkdtemp makes it private
        if not parent:
            continue
        try:
            path = tempfile.mkdtemp(prefix="hr-", dir=parent)
        except OSError as error:
            tried.append(f"{parent}: {error.strerror}")
            continue
        if len(os.fsencode(path)) <= MAX_RAY_TEMP_BYTES:
            return path
        tried.append(f"{parent}: its name is too long")
        os.rmdir(path)
    raise LocalStorageError(
        f"no directory for Ray's sockets ({'; '.join(tried)}). "
        f"Their names have to fit {MAX_RAY_TEMP_BYTES} bytes. Make /tmp writable on the nodes.",
        tried=tried,
    )


def has_attempts(local: str, *, run_id: str) -> bool:
    """Tell whether any attempt of a run, dead or alive, has a directory on this node."""
    return os.path.exists(_directory_of(local, run_id))


def dead_attempts(local: str, *, run_id: str) -> Iterator[str]:
    """Yield the directories that dead attempts of a run left on this node.

    Each is locked while the caller works on it, so two sweeps do not meet.
    """
    parent = _directory_of(local, run_id)
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(parent)):
            path = os.path.join(parent, name)
            try:
                fd = os.open(os.path.join(path, _LOCK), os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            else:
                yield path
            finally:
                os.close(fd)


def end_dead(path: str) -> None:
    """End the processes that outlived a dead attempt."""
    import psutil

    from hpcresume.task.process import processes_of

    attempt, ray_temp = _read(path, _NAME), _read(path, _RAY_TEMP)
    if not attempt:
        return
    directories = [f"{directory}/" for directory in (path, ray_temp) if directory]
    found = list(processes_of(attempt, directories))
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(found, timeout=5)


def sweep(path: str) -> None:
    """Remove the directories of a dead attempt."""
    ray_temp = _read(path, _RAY_TEMP)
    if os.path.basename(ray_temp).startswith("hr-"):
        shutil.rmtree(ray_temp, ignore_errors=True)
    shutil.rmtree(path, ignore_errors=True)
