"""``hpcresume clean``: remove what a run no longer needs."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import click

from hpcresume.cli.common import (
    emit_json,
    human_bytes,
    human_count,
    json_option,
    run_argument,
    say,
)
from hpcresume.errors import RunDirError

if TYPE_CHECKING:
    from hpcresume.run.directory import RunDir


@click.command()
@run_argument(required=True)
@click.option("--all", "everything", is_flag=True, help="The whole run directory, results too.")
@click.option("--yes", is_flag=True, help="Remove; without it only say what would be removed.")
@json_option
def clean(run: RunDir, everything: bool, yes: bool, as_json: bool) -> None:
    """Remove what RUN no longer needs: small segments that packs hold, and temporary files.

    With --yes small segments that are in no pack yet are folded into one first.  Results,
    logs and records stay, unless --all is given.

    \b
    Example:
      hpcresume clean runs/paragraphs-1f2e3d4c
      hpcresume clean runs/paragraphs-1f2e3d4c --all --yes
    """
    _refuse_what_is_in_use(run)
    found = [run.path] if everything else _temporary_files(run.path)
    segments = {} if everything else _segments(run, remove=yes)
    paths = sorted([*found, *segments])
    size = sum(map(_size_bytes, found)) + sum(segments.values())
    if yes:
        _remove(found)
    if as_json:
        emit_json({"run": run.path, "removed": yes, "paths": paths, "bytes": size})
        return
    what = run.path if everything else human_count(len(found), "temporary file")
    if segments:
        what = f"{human_count(len(segments), 'small segment')} and {what}"
    say(f"{'removed' if yes else 'would remove'} {what}, {human_bytes(size)}")
    if paths and not yes:
        say("Nothing was removed. To remove it, add --yes", err=True)


def _segments(run: RunDir, *, remove: bool) -> dict[str, int]:
    """Return the segments that packs make superfluous, or would, with their sizes in bytes."""
    from hpcresume.merge.generation import load_newest
    from hpcresume.merge.retention import fold_rest, foldable, held, remove_held

    if remove:
        fold_rest(run)
    union = load_newest(run)
    names = held(run, union) if remove else [*held(run, union), *foldable(run, union)]
    sizes = {name: _size_bytes(run.segment_path(name)) for name in names}
    if remove:
        names = remove_held(run)
    return {run.segment_path(name): sizes[name] for name in names if name in sizes}


def _refuse_what_is_in_use(run: RunDir) -> None:
    from hpcresume.observe.status import read_status
    from hpcresume.run.directory import TAG, TAG_NAME, check_owner

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
    from hpcresume.fs import TEMPORARY_PREFIX

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
