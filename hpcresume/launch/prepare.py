"""From a pipeline's file to a run directory with manifest and code: what `submit` does first.

Submitting again continues: changed code is taken and recorded, a grown source list adds a
part to the manifest, everything else that would make old and new results differ is refused
by name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from pyroaring import BitMap

from hpcresume.errors import ChangedRunError, HpcResumeError, RunDirError, SharedStorageError
from hpcresume.fs import POSIX, SHARED_MODE
from hpcresume.ids import new_run_id
from hpcresume.pipeline.load import (
    SNAPSHOT_FILE,
    LoadedPipeline,
    load_pipeline,
    load_snapshot,
    parse_target,
    write_snapshot,
)
from hpcresume.pipeline.members import SPACING_MIN, Members
from hpcresume.pipeline.params import parameter_digest
from hpcresume.pipeline.pipeline import Pipeline
from hpcresume.pipeline.restarts import RestartStore
from hpcresume.pipeline.sources import Indexed, SourceList, encode_payload
from hpcresume.run.directory import (
    FORMAT_VERSION,
    RunDir,
    RunInfo,
    check_owner,
    fingerprint_changes,
    is_foreign,
    probe_writable,
    share_with_group,
)
from hpcresume.run.manifest import (
    Listing,
    Manifest,
    id_digest,
    refuse_duplicates,
    remove_part,
    write_indexed_part,
    write_part,
)


class Prepared(msgspec.Struct, frozen=True):
    """A run that is ready for a round.

    Attributes:
        run: The run directory.
        loaded: The pipeline, loaded in this process.
        manifest: Its sources.
        code: Number of the code snapshot to run.
        added: Sources that this call added.
        notes: What changed since the last submission, for people.
    """

    run: RunDir
    loaded: LoadedPipeline
    manifest: Manifest
    code: int
    added: int
    notes: list[str] = msgspec.field(default_factory=list)


def prepare(
    target: str,
    params: Mapping[str, Any],
    *,
    run_dir: Path | None,
    cwd: Path,
    accept_changes: bool = False,
    shared_group: str = "",
) -> Prepared:
    """Create a run, or open it and take what has changed.

    Args:
        target: ``file.py``, ``file.py:attr``, ``module:attr``, or a run directory.
        params: The pipeline's parameters.
        run_dir: The run directory; None: ``runs/<name>-<parameter digest>`` below ``cwd``.
        cwd: The user's working directory.
        accept_changes: Take changes that would otherwise be refused.
        shared_group: Group that may read the run; only where it is created.

    Raises:
        PipelineError, NotResumableError, SourcesError: The pipeline cannot run as it is.
        ChangedRunError: The run was made with something else.
        RunDirError: The directory cannot be used.
    """
    path = cwd / target
    if path.is_dir() and (path / "run.json").exists():
        return _continue(path)
    loaded = load_pipeline(parse_target(target, cwd), params)
    loaded.pipeline.check_resumable()
    if run_dir is None:
        run_dir = cwd / "runs" / f"{loaded.pipeline.name}-{parameter_digest(loaded.params)}"
    run_dir = (cwd / run_dir).absolute()
    if (run_dir / "run.json").exists():
        if shared_group and stat.S_IMODE(run_dir.stat().st_mode) != SHARED_MODE:
            raise RunDirError(
                f"{run_dir} was created for you alone. What it holds keeps the modes it has. "
                "Leave --shared-group out, or submit to a new --run-dir.",
                path=str(run_dir),
            )
        return _resubmit(run_dir, loaded, accept_changes=accept_changes)
    return _create(run_dir, loaded, target, shared_group)


def _continue(path: Path) -> Prepared:
    run = _open(path)
    numbers = run.code_numbers()
    if not (numbers and run.part_numbers()):
        raise RunDirError(
            f"{path} holds no {'sources' if numbers else 'code'}: its first submission did not "
            "get that far. Submit the pipeline's file again with --run-dir.",
            path=str(path),
        )
    loaded = load_snapshot(Path(run.code_path(numbers[-1])))
    return Prepared(run, loaded, Manifest.open(run), numbers[-1], 0)


def _open(path: Path) -> RunDir:
    check_owner(path)
    run = RunDir.open(str(path.absolute()))
    probe_writable(run.path)
    return run


def fingerprint(pipeline: Pipeline, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must not change silently between two submissions."""
    described: dict[str, Any] = msgspec.to_builtins({**pipeline.describe(), "params": dict(params)})
    return described


def _create(path: Path, loaded: LoadedPipeline, target: str, shared_group: str) -> Prepared:
    info = RunInfo(
        format=FORMAT_VERSION,
        run_id=new_run_id(),
        name=loaded.pipeline.name,
        target=target,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        version=_version(),
        fingerprint=fingerprint(loaded.pipeline, loaded.params),
    )
    if path.exists() and is_foreign(str(path)):
        raise RunDirError(
            f"{path} exists and is not a run directory. Nothing is written into it. "
            "Give another one with --run-dir.",
            path=str(path),
        )
    try:
        _make_directory(path, mode=0o700)
    except OSError as error:
        raise RunDirError(
            f"cannot create the run directory {path}: {error.strerror}. "
            "Every result is written there. Give one that you may write with --run-dir.",
            path=str(path),
        ) from error
    check_owner(path)
    if shared_group:
        share_with_group(path, shared_group)
    probe_writable(str(path))
    run = RunDir.create(str(path), info)
    try:
        return _fill(run, loaded)
    except HpcResumeError:
        # Nothing has run: a corrected pipeline starts from a clean directory, unless somebody
        # else has created the run at the same time.
        if run.run_id == info.run_id and not run.rounds():
            shutil.rmtree(path, ignore_errors=True)
        raise


def _make_directory(path: Path, *, mode: int) -> None:
    """Create a directory and the missing ones above it, which nobody else may write."""
    if not path.parent.exists():
        _make_directory(path.parent, mode=0o755)
    path.mkdir(mode=mode, exist_ok=True)


def _fill(run: RunDir, loaded: LoadedPipeline) -> Prepared:
    code, notes = _take_code(run, loaded, []), list[str]()
    _list_first(run, loaded.pipeline, notes)
    manifest = Manifest.open(run)
    return Prepared(run, loaded, manifest, code, manifest.total, notes)


def _version() -> str:
    # Only a new run asks, and this import is a tenth of what a command has to load.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("hpcresume")
    except PackageNotFoundError:
        return "0+checkout"


def _resubmit(path: Path, loaded: LoadedPipeline, *, accept_changes: bool) -> Prepared:
    run, notes = _open(path), list[str]()
    if not (run.code_numbers() and run.part_numbers()):
        return _fill(run, loaded)
    changes = _refused_changes(run, loaded)
    if changes and not accept_changes:
        listed = "\n  ".join(changes)
        raise ChangedRunError(
            f"{path} was made with other settings:\n  {listed}\n"
            "Results of both would be mixed. Submit with the old ones, or to another "
            "--run-dir, or take the new ones with --accept-changes.",
            changes=changes,
        )
    notes += [f"accepted: {change}" for change in changes]
    manifest = Manifest.open(run)
    try:
        added = _list_again(run, manifest, loaded.pipeline, notes, accept_changes=accept_changes)
    except FileExistsError:
        # Somebody else submits at the same time, and has added to the manifest.
        return _resubmit(path, loaded, accept_changes=accept_changes)
    current = fingerprint(loaded.pipeline, loaded.params)
    if current != run.fingerprint():
        run.accept_fingerprint(current)
    code = _take_code(run, loaded, notes)
    return Prepared(run, loaded, Manifest.open(run), code, added, notes)


def _refused_changes(run: RunDir, loaded: LoadedPipeline) -> list[str]:
    old, new = dict(run.fingerprint()), fingerprint(loaded.pipeline, loaded.params)
    for current in (old, new):
        # How much may fail, and what is done at the end, change no result.
        for key in ("tolerate", "finish"):
            current.pop(key, None)
    described = old.get("sources", {})
    if new.get("sources") != described and loaded.pipeline.sources.grew_from(described):
        new["sources"] = described
    return fingerprint_changes(old, new)


def _take_code(run: RunDir, loaded: LoadedPipeline, notes: list[str]) -> int:
    """Return the number of the snapshot that holds the pipeline's files as they are now."""
    numbers = run.code_numbers()
    temporary = Path(run.join("code", f".tmp-{os.urandom(8).hex()}"))
    try:
        temporary.mkdir(mode=0o700)
        digests = write_snapshot(loaded, temporary)
        if numbers:
            old = _digests(Path(run.code_path(numbers[-1])))
            changed = sorted(name for name in old | digests if old.get(name) != digests.get(name))
            if not changed and _record(temporary) == _record(Path(run.code_path(numbers[-1]))):
                return numbers[-1]
            notes.append(f"new code: {', '.join(changed) or 'parameters'}")
        number = numbers[-1] + 1 if numbers else 1
        try:
            os.rename(temporary, run.code_path(number))
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Somebody else submits at the same time, and has taken the number.
            return _take_code(run, loaded, notes)
        POSIX.sync_directory(run.join("code"))
    except OSError as error:
        raise SharedStorageError(
            f"cannot copy the pipeline's files into {run.path}: {error.strerror or error}. "
            "Array tasks load the copy. Check space and quota, then submit again.",
            path=run.path,
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return number


def _record(directory: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode((directory / SNAPSHOT_FILE).read_bytes(), type=dict[str, Any])
    return {}


def _digests(directory: Path) -> dict[str, str]:
    found = _record(directory).get("files", {})
    return dict(found) if isinstance(found, dict) else {}


class _Keeper(msgspec.Struct, frozen=True):
    """Takes what a listing finds besides the sources."""

    run: RunDir
    notes: list[str]

    def restart_points(self, path: Path, size_bytes: int, digest: str, members: Members) -> None:
        if size_bytes > SPACING_MIN:
            RestartStore(self.run.fs, self.run.restarts).keep(path, digest, members)

    def note(self, text: str) -> None:
        self.notes.append(text)


def _encoded(
    run: RunDir, pipeline: Pipeline, notes: list[str]
) -> Iterator[tuple[str, bytes, float]]:
    for source in pipeline.sources.listed(_Keeper(run, notes)):
        payload = encode_payload(source.payload, source_id=source.id)
        yield source.id, payload, float(source.weight)


def _list_first(run: RunDir, pipeline: Pipeline, notes: list[str]) -> None:
    numbers = run.part_numbers()
    if numbers:
        return
    sources = pipeline.sources
    try:
        if isinstance(sources, Indexed):
            write_indexed_part(run, 1, first=0, count=len(sources))
            return
        write_part(run, 1, first=0, listing=Listing(_encoded(run, pipeline, notes)))
    except FileExistsError:
        # Somebody else submits at the same time.  Where two listings differ, the next one tells.
        return
    try:
        refuse_duplicates(Manifest.open(run))
    except HpcResumeError:
        remove_part(run.fs, run, 1)
        raise


def _list_again(
    run: RunDir, manifest: Manifest, pipeline: Pipeline, notes: list[str], *, accept_changes: bool
) -> int:
    """Take a changed listing into the manifest; return how many sources it added."""
    number = run.part_numbers()[-1] + 1
    sources = pipeline.sources
    if isinstance(sources, Indexed):
        return _reindex(run, manifest, len(sources), number, accept_changes=accept_changes)
    known = _Known(manifest)
    fresh = [s for s in _encoded(run, pipeline, notes) if not known.holds(s)]
    gone = known.missing()
    grown = _grown(manifest, sources, gone, fresh)
    notes += [f"{len(grown)} chunks have more rows and run again"] if grown else []
    unexplained = gone - grown
    if unexplained and not accept_changes:
        example = manifest.entry(unexplained[0]).source_id
        raise ChangedRunError(
            f"{len(unexplained)} sources of the run are gone from the listing or have changed, "
            f"for example {example!r}. Their results would stay. "
            "Restore them, submit to another --run-dir, or drop them with --accept-changes.",
            count=len(unexplained),
        )
    if not fresh and not gone:
        return 0
    write_part(run, number, first=manifest.total, listing=Listing(fresh), withdrawn=gone)
    try:
        refuse_duplicates(Manifest.open(run))
    except HpcResumeError:
        remove_part(run.fs, run, number)
        raise
    return len(fresh)


def _grown(
    manifest: Manifest, sources: SourceList, gone: BitMap, fresh: list[tuple[str, bytes, float]]
) -> BitMap:
    """Return the sources that are gone because one that reaches further stands in their place."""
    if not gone:
        return gone
    reach = dict(filter(None, (sources.extent(source_id) for source_id, _, _ in fresh)))
    found = ((index, sources.extent(manifest.entry(index).source_id)) for index in gone)
    return BitMap(index for index, old in found if old and reach.get(old[0], -1) > old[1])


class _Known:
    """The sources that a manifest holds, and which of them a new listing still has."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._withdrawn = manifest.withdrawn()
        self._seen = BitMap()
        self._by_digest: dict[int, int] = {}
        for part in manifest.parts:
            for offset, digest in enumerate(part.digests()):
                index = part.footer.first + offset
                if index not in self._withdrawn:
                    self._by_digest[digest] = index

    def holds(self, source: tuple[str, bytes, float]) -> bool:
        """Tell whether the manifest holds a source as it is."""
        source_id, payload, _ = source
        index = self._by_digest.get(id_digest(source_id))
        if index is None or index in self._seen:
            return False
        entry = self._manifest.entry(index)
        if entry.source_id != source_id or entry.payload != payload:
            return False
        self._seen.add(index)
        return True

    def missing(self) -> BitMap:
        """Return the sources that the listing did not hold as they are."""
        return BitMap(range(self._manifest.total)) - self._seen - self._withdrawn


def _reindex(
    run: RunDir, manifest: Manifest, count: int, number: int, *, accept_changes: bool
) -> int:
    withdrawn = len(manifest.withdrawn())
    if count == manifest.total - withdrawn:
        return 0
    if withdrawn and count > manifest.total - withdrawn:
        raise ChangedRunError(
            f"the run was cut to {manifest.total - withdrawn} sources, now there are {count}. "
            "Sources made from their index cannot come back once they are dropped. "
            "Submit to another --run-dir.",
            count=count,
        )
    if count > manifest.total:
        added = count - manifest.total
        write_indexed_part(run, number, first=manifest.total, count=added)
        return added
    if not accept_changes:
        raise ChangedRunError(
            f"the run has {manifest.total - withdrawn} sources, now there are {count}. "
            "Results of the others would stay. Submit to another --run-dir, or drop them "
            "with --accept-changes.",
            count=count,
        )
    gone = BitMap()
    gone.add_range(count, manifest.total)
    write_indexed_part(run, number, first=manifest.total, count=0, withdrawn=gone)
    return 0
