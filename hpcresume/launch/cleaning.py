"""Removing what a run no longer needs: temporary files, and segments that packs hold.

Nothing is removed of a run that is in use, nor of a directory that hpcresume has not tagged.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

from hpcresume.errors import RunDirError
from hpcresume.fs import TEMPORARY_PREFIX
from hpcresume.merge.generation import load_newest
from hpcresume.merge.retention import fold_rest, foldable, held, remove_held
from hpcresume.observe.status import read_status
from hpcresume.run.directory import TAG, TAG_NAME, RunDir, check_owner


@dataclass(frozen=True)
class Cleaned:
    """What was removed of a run, or would be.

    Attributes:
        paths: Files and directories, absolute and sorted.
        segments: How many of them are small segments; the others are temporary.
        size_bytes: What all of them take.
        removed: Whether they have been removed.
    """

    paths: list[str]
    segments: int
    size_bytes: int
    removed: bool


def clean_run(run: RunDir, *, everything: bool = False, remove: bool = False) -> Cleaned:
    """Remove what a run no longer needs: small segments that packs hold, and temporary files.

    Args:
        run: The run; none of its tasks may be at work.
        everything: The whole run directory, with its results.
        remove: Fold the small segments that are in no pack yet, and remove; otherwise nothing
            is changed, and what is returned is what would be removed.

    Raises:
        RunDirError: The run is in use, belongs to somebody else, has no tag of hpcresume, or
            a file cannot be removed.
        SharedStorageError: A segment cannot be read, or a pack not be written.
    """
    _refuse_what_is_in_use(run)
    found = [run.path] if everything else _temporary_files(run.path)
    segments = {} if everything else _segments(run, remove=remove)
    size_bytes = sum(map(_size_bytes, found)) + sum(segments.values())
    if remove:
        _remove(found)
    return Cleaned(sorted([*found, *segments]), len(segments), size_bytes, remove)


def _segments(run: RunDir, *, remove: bool) -> dict[str, int]:
    """Return the segments that packs make superfluous, or would, with their sizes in bytes."""
    if remove:
        fold_rest(run)
    union = load_newest(run)
    names = held(run, union) if remove else [*held(run, union), *foldable(run, union)]
    sizes = {name: _size_bytes(run.segment_path(name)) for name in names}
    if remove:
        names = remove_held(run)
    return {run.segment_path(name): sizes[name] for name in names if name in sizes}


def _refuse_what_is_in_use(run: RunDir) -> None:
    check_owner(run.path)
    signature = TAG.splitlines()[0]
    try:
        with open(run.join(TAG_NAME), "rb") as file:
            tagged = file.read(len(signature)) == signature
    except FileNotFoundError:
        tagged = False
    if not tagged:
        raise RunDirError(
            f"{run.path} has no {TAG_NAME} of hpcresume. "
            "It may not be a run directory, so nothing in it is removed. "
            "Check the path; remove it by hand if you are sure.",
            path=run.path,
        )
    found = read_status(run)
    stopping = any(task.state == "running" for task in found.tasks)
    if stopping or found.state in ("running", "waiting"):
        raise RunDirError(
            f"{run.path} is in use ({found.state}). "
            "Its tasks write to it, and what they write would be lost. "
            f"Wait for its end, or run: hpcresume cancel {run.path}",
            path=run.path,
        )


def _temporary_files(path: str) -> list[str]:
    """Return temporary files, and directories that were to become a snapshot or a result."""
    found = []
    for top, directories, names in os.walk(path):
        whole = [name for name in directories if name.startswith(TEMPORARY_PREFIX)]
        directories[:] = [name for name in directories if name not in whole]
        whole += [name for name in names if name.startswith(TEMPORARY_PREFIX)]
        found += [os.path.join(top, name) for name in whole]
    return sorted(found)


def _size_bytes(path: str) -> int:
    if not os.path.isdir(path):
        return os.lstat(path).st_size
    paths = (os.path.join(top, name) for top, _, names in os.walk(path) for name in names)
    return sum(os.lstat(path).st_size for path in paths)


def _remove(paths: list[str]) -> None:
    try:
        for path in paths:
            if os.path.isdir(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
    except OSError as error:
        raise RunDirError(
            f"cannot remove {error.filename}: {error.strerror or error}. "
            "The rest was left as it is. Check its owner and mode, then run this again.",
            path=str(error.filename),
        ) from error
