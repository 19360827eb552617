"""The result of ``hr.Parts`` as a directory of parts: the same rows, unsorted, for terabytes.

A part whose sources all count is linked, or copied where the file system cannot link.  Of a
part that also holds rows that lost to another attempt's, or were withdrawn, the others are
written anew.  The directory appears whole, by one rename.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyroaring import BitMap

from hpcresume.errors import SharedStorageError, UsageError
from hpcresume.fs import POSIX, TEMPORARY_PREFIX
from hpcresume.merge.generation import Union, find_segment
from hpcresume.merge.packs import Packs, name_of
from hpcresume.output.collect import CollectReport, Progress, report_on, scope_of
from hpcresume.output.files import link_or_copy
from hpcresume.output.rows import (
    BadSegmentError,
    BadSegments,
    LoadedFrame,
    Span,
    read_frame,
    take_back_segment,
    union_of,
)
from hpcresume.run.directory import RunDir, SegmentName
from hpcresume.run.manifest import Manifest
from hpcresume.segment.frame import PARQUET
from hpcresume.segment.segment import Segment

_NAME = "part-"


def collect_parts(
    run: RunDir, directory: Path, *, on_progress: Progress | None = None
) -> CollectReport:
    """Make a directory of the parts that hold the rows of every completed source.

    Args:
        run: The run; it need not have ended.
        directory: Replaced whole; it must be new, empty, or what an earlier call made.
        on_progress: Told how far it is.

    Raises:
        UsageError: The run has no parts, or ``directory`` holds something else.
        SharedStorageError: A part cannot be read, or ``directory`` not be written.
    """
    _check(run, directory)
    manifest, damaged = Manifest.open(run), []
    union = union_of(run)
    while True:
        try:
            with _replacing(directory) as temporary:
                job = _Job(run, union, manifest, temporary, on_progress)
                job.write()
        except BadSegmentError as error:
            damaged.append(str(error))
            union = take_back_segment(run, error)
            continue
        return report_on(
            run,
            scope_of(manifest, union),
            output=str(directory),
            rows=job.rows,
            size_bytes=job.size_bytes,
            damaged=tuple(damaged),
        )


@dataclass
class _Job:
    run: RunDir
    union: Union
    manifest: Manifest
    directory: str
    on_progress: Progress | None
    rows: int = 0
    size_bytes: int = 0

    def write(self) -> None:
        """Link or write the part of every segment that has won sources."""
        withdrawn, packs = self.manifest.withdrawn(), Packs(self.run)
        total, done = len(self.union.completed - withdrawn), 0
        for key, all_won in self.union.won.items():
            won = all_won - withdrawn
            if not won:
                continue
            found = name_of(key)
            with BadSegments(self.run, found):
                segment = find_segment(packs, key, self.union.pack_of.get(key, 0))
                self._take(segment, found, won)
            done += len(won)
            if self.on_progress is not None:
                self.on_progress(done, total)

    def _take(self, segment: Segment, name: SegmentName, won: BitMap) -> None:
        part = segment.footer.part
        if part is None:
            return
        ref, suffix = name.attempt, part.name.rpartition(".")[2]
        stem = f"{_NAME}{ref.round:04d}-{ref.task:05d}-{ref.epoch:03d}-{name.seq:06d}"
        target = os.path.join(self.directory, f"{stem}-{part.digest.hex()[:8]}.{suffix}")
        if won == segment.completed:
            segment.verify_part()
            link_or_copy(segment.part_path(), Path(target))
            blobs = (segment.frame(number).blob for number in segment.frame_numbers())
            self.rows += sum(blob.rows for blob in blobs if blob is not None)
        else:
            self.rows += _rewrite(segment, name, won, target)
        with contextlib.suppress(FileNotFoundError):
            self.size_bytes += os.path.getsize(target)


def _rewrite(segment: Segment, name: SegmentName, won: BitMap, target: str) -> int:
    """Write the rows of some sources of a segment and return how many there were."""
    spans = _spans(segment, name, won)
    if segment.footer.part is not None and segment.footer.part.name.endswith(PARQUET):
        return _rewrite_tables(spans, target)
    rows = 0
    with open(target, "xb", buffering=1 << 20) as file:
        for span in spans:
            file.write(span.rows)
            rows += span.rows.count(b"\n")
    return rows


def _rewrite_tables(spans: Iterator[Span], target: str) -> int:
    from hpcresume.output.parquet import ParquetTables

    rows, writer = 0, None
    with open(target, "xb") as file:
        for span in spans:
            if writer is None:
                writer = ParquetTables(file, span.origin.table().schema)
            rows += writer.write_span(span)
        if writer is not None:
            writer.close()
    if not rows:
        os.unlink(target)
    return rows


def _spans(segment: Segment, name: SegmentName, won: BitMap) -> Iterator[Span]:
    for number in segment.frame_numbers():
        frame, parquet = read_frame(segment, number)
        kept = frame.completed & won
        has_rows = parquet or frame.rows
        if kept and has_rows:
            loaded = LoadedFrame(name, segment.footer.stage_names, frame, kept, parquet)
            yield Span(kept, loaded)


def _check(run: RunDir, directory: Path) -> None:
    if not run.part_format():
        raise UsageError(
            f"{run.path} has no parts: its sink is not hr.Parts. Its rows are within its "
            "segments. Collect them with -o FILE.jsonl or FILE.parquet.",
            path=run.path,
        )
    if not directory.absolute().parent.is_dir():
        raise UsageError(
            f"{directory.parent} is not a directory, so {directory} cannot be made. "
            "The results are safe in the run directory. Create it, or name another one.",
            path=str(directory),
        )
    names = os.listdir(directory) if directory.is_dir() else []
    foreign = [name for name in names if not name.startswith(_NAME)]
    if foreign or (directory.exists() and not directory.is_dir()):
        raise UsageError(
            f"{directory} holds something else ({foreign[0] if foreign else 'a file'}), and "
            "the result replaces the whole directory. Name a new one.",
            path=str(directory),
        )


@contextlib.contextmanager
def _replacing(directory: Path) -> Iterator[str]:
    """Yield a new directory that takes the place of another when all went well."""
    target = str(directory.absolute())
    above = os.path.dirname(target)
    stem = os.path.join(above, f"{TEMPORARY_PREFIX}{directory.name}-{secrets.token_hex(8)}")
    new, old = f"{stem}-new", f"{stem}-old"
    try:
        os.mkdir(new)
        yield new
        for name in os.listdir(new):
            _sync(os.path.join(new, name))
        POSIX.sync_directory(new)
        with contextlib.suppress(FileNotFoundError):
            os.rename(target, old)
        os.rename(new, target)
        POSIX.sync_directory(above)
    except OSError as error:
        raise SharedStorageError(
            f"cannot write {directory}: {error.strerror or error}. "
            "The results are safe in the run directory. "
            "Check the directory, its space and quota, and collect again.",
            path=str(directory),
        ) from error
    finally:
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
