"""The user's files as they are when an evaluation starts: its tasks run copies of them.

Array tasks that start later, and resumed ones, so run what was submitted, whatever has become
of the originals; starting again takes what has changed.  Copied are the files of workflow,
scorers and callback, the modules beside them that they import, and what ``--snapshot`` names.
Modules of packages are imported where they are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from hpcresume.errors import UsageError
from hpcresume.evals.layout import CODE
from hpcresume.evals.settings import EvalSettings
from hpcresume.evals.view import write_atomically
from hpcresume.pipeline.siblings import is_library, is_users, sibling_files
from hpcresume.pipeline.target import parse_target, split_target
from hpcresume.run.directory import RunDir


def with_copies(settings: EvalSettings) -> EvalSettings:
    """Return settings that name the copies of the user's files as they are now.

    Raises:
        HpcResumeError: A file is not there.
    """
    copies, _ = _plan(settings)
    return msgspec.structs.replace(settings, copies=copies)


def write_copies(run: RunDir, settings: EvalSettings, before: EvalSettings | None) -> list[str]:
    """Write the copies that settings name into the run.

    Args:
        run: The run.
        settings: What :func:`with_copies` returned.
        before: The settings that it ran with last, None for a new one.

    Returns:
        Names of the files that are not as they were then.

    Raises:
        UsageError: A file was changed since the settings were made.
    """
    copies, files = _plan(settings)
    if copies != settings.copies:
        raise UsageError("a file of the workflow or a scorer has just been changed. Start again.")
    for name, data in files.items():
        path = Path(run.join(name))
        if path.exists():
            continue
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(path, iter([data]))
    if before is None or not before.copies:
        return []
    old = _base_of(before.copies)
    return [
        name.rpartition("/")[2]
        for name, data in files.items()
        if not _holds(Path(run.join(old + name.removeprefix(_base_of(copies)))), data)
    ]


def located(settings: EvalSettings, run: Path) -> EvalSettings:
    """Return settings whose workflow, scorers and callback are the copies in a run."""

    def copy_of(target: str) -> str:
        name = settings.copies.get(target)
        return target if name is None else f"{run / name}:{split_target(target)[1]}"

    return msgspec.structs.replace(
        settings,
        workflow=copy_of(settings.workflow),
        scorers=[copy_of(target) for target in settings.scorers],
        on_item=copy_of(settings.on_item),
    )


def _base_of(copies: dict[str, str]) -> str:
    """Return the directory of some copies, which is named after their content."""
    return "/".join(next(iter(copies.values()), "").split("/")[: CODE.count("/") + 2])


def _holds(path: Path, data: bytes) -> bool:
    return path.exists() and path.read_bytes() == data


def _plan(settings: EvalSettings) -> tuple[dict[str, str], dict[str, bytes]]:
    """Return the name of each target's copy, and the files by name, all relative to the run."""
    cwd = Path(settings.cwd)
    mains: dict[str, Path] = {}
    for target in filter(None, [settings.workflow, *settings.scorers, settings.on_item]):
        spec = parse_target(target, cwd)
        is_installed = is_library(spec.path.parent) or not is_users(spec.path)
        if "." not in spec.module and not is_installed:
            mains[target] = spec.path
    if settings.snapshot and not mains:
        raise UsageError("--snapshot: neither the workflow nor a scorer is a file to copy it with.")
    places = {
        root: str(n) for n, root in enumerate(dict.fromkeys(p.parent for p in mains.values()))
    }
    files: dict[str, bytes] = {}
    for root, place in places.items():
        own = [path for path in mains.values() if path.parent == root]
        named = _named(settings, root) if place == "0" else []
        for path in dict.fromkeys([*own, *sibling_files(own, root), *named]):
            files[f"{place}/{path.relative_to(root).as_posix()}"] = path.read_bytes()
    base = f"{CODE}/{_digest(files)}"
    copies = {t: f"{base}/{places[path.parent]}/{path.name}" for t, path in mains.items()}
    return copies, {f"{base}/{name}": data for name, data in files.items()}


def _named(settings: EvalSettings, root: Path) -> Iterator[Path]:
    for name in settings.snapshot:
        path = Path(os.path.abspath(Path(settings.cwd) / name))
        if not path.is_file() or not path.is_relative_to(root):
            why = "is no file" if not path.is_file() else f"is not below {root}"
            raise UsageError(f"--snapshot {name}: {why}. It is copied beside the workflow's file.")
        yield path


def _digest(files: dict[str, bytes]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(files):
        for part in (os.fsencode(name), files[name]):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()
