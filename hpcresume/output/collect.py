"""Write the result of a run to one file: manifest order, each source once, atomically.

The output is written under a temporary name in its own directory, synced and renamed, so a
reader finds the earlier result or the new one.  The same published segments give the same
bytes.  A segment whose body is damaged is taken back, which reopens its sources, and
collecting begins again without it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, runtime_checkable

import orjson
from pyroaring import BitMap

from hpcresume.errors import SharedStorageError, UsageError
from hpcresume.fs import POSIX, TEMPORARY_PREFIX
from hpcresume.ids import item_id
from hpcresume.merge.generation import Union
from hpcresume.output.files import FileLinker
from hpcresume.output.rows import (
    BadSegmentError,
    SourceRows,
    Span,
    spans,
    take_back_segment,
    union_of,
)
from hpcresume.run.directory import RunDir
from hpcresume.run.manifest import Manifest
from hpcresume.segment.frame import PARQUET
from hpcresume.sinks.parquet import require_pyarrow

if TYPE_CHECKING:
    from hpcresume.output.parquet import ParquetTables

Progress = Callable[[int, int], None]
"""Called with the sources written so far and how many there are to write."""


@dataclass(frozen=True, slots=True)
class CollectReport:
    """What a collect wrote.

    Attributes:
        output: The file.
        rows: Rows in it.
        sources: Sources whose rows are in it.
        total: Sources of the run.
        missing: Sources that are neither completed nor quarantined.
        quarantined: Sources that failed and are not tried again.
        tolerated: How many quarantined sources the pipeline tolerates.
        size_bytes: Size of the file.
        files: Files linked with ``--files``.
        damaged: Published segments found damaged, whose sources were reopened.
    """

    output: str
    rows: int
    sources: int
    total: int
    missing: int
    quarantined: int
    tolerated: int
    size_bytes: int
    files: int
    damaged: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether nothing is missing beyond what the pipeline tolerates."""
        return self.missing == 0 and self.quarantined <= self.tolerated


@runtime_checkable
class RowWriter(Protocol):
    """A format that a result is written in."""

    def write(self, lines: bytes) -> None:
        """Take rows, each ending in a newline."""

    def close(self) -> None:
        """Write what is left; the file is whole afterwards."""


class JsonLines:
    """JSON lines: the rows as they are."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, lines: bytes) -> None:
        """Write rows."""
        self._file.write(lines)

    def close(self) -> None:
        """Flush what is buffered."""
        self._file.flush()


OpenWriter = Callable[[str, BinaryIO, Union], "RowWriter | ParquetTables"]
"""Opens a writer on a temporary file."""


@dataclass(frozen=True, slots=True)
class Scope:
    """Which sources of a run its result is about.

    Attributes:
        wanted: All sources but withdrawn ones.
        completed: Those of them that are completed.
        quarantined: Those of them that are not tried again.
    """

    wanted: int
    completed: BitMap
    quarantined: BitMap


def scope_of(manifest: Manifest, union: Union) -> Scope:
    """Return which sources count, and how they stand."""
    withdrawn = manifest.withdrawn()
    wanted = manifest.total - len(withdrawn)
    return Scope(wanted, union.completed - withdrawn, union.quarantined() - withdrawn)


def collect(
    run: RunDir,
    output: Path,
    *,
    with_source: bool = False,
    files: Path | None = None,
    on_progress: Progress | None = None,
) -> CollectReport:
    """Write the rows of every completed source to ``output``.

    Args:
        run: The run; it need not have ended.
        output: A ``.jsonl`` or ``.parquet`` file, replaced atomically.
        with_source: Wrap each row as ``{"source", "item", "row"}``.
        files: Directory that gets a link to every file of ``ctx.output``.
        on_progress: Told how far it is.

    Returns:
        What was written and what is missing.

    Raises:
        UsageError: Another suffix, or rows that fit no Parquet schema.
        ConfigError: Parquet is asked for and pyarrow is not installed.
        SharedStorageError: A segment cannot be read, or ``output`` not be written.
    """
    open_writer = _format_of(run, output, with_source=with_source)
    if output.is_dir():
        raise UsageError(
            f"{output} is a directory, so no file of that name can be written. "
            "Name another file; a directory is written with --layout parts.",
            path=str(output),
        )
    if not output.parent.is_dir():
        raise UsageError(
            f"{output.parent} is not a directory, so {output} cannot be written. "
            "The results are safe in the run directory. Create it, or name another file.",
            path=str(output),
        )
    manifest = Manifest.open(run)
    damaged: list[str] = []
    union = union_of(run)
    while True:
        linker = FileLinker(run, files) if files is not None else None
        job = _Job(run, union, manifest, with_source, linker, on_progress)
        try:
            with _replacing(output) as temporary:
                rows = job.write(temporary, open_writer)
                size = os.path.getsize(temporary)
        except BadSegmentError as error:
            damaged.append(str(error))
            union = take_back_segment(run, error)
            continue
        return job.report(output, rows=rows, size_bytes=size, damaged=tuple(damaged))


@dataclass(frozen=True)
class _Job:
    run: RunDir
    union: Union
    manifest: Manifest
    with_source: bool
    linker: FileLinker | None
    on_progress: Progress | None

    def write(self, temporary: str, open_writer: OpenWriter) -> int:
        """Write all rows and return how many there were."""
        scope = scope_of(self.manifest, self.union)
        rows = sources = 0
        with open(temporary, "xb", buffering=1 << 20) as file:
            writer = open_writer(temporary, file, self.union)
            for span in spans(self.run, self.union, self.manifest):
                rows += self._write_span(writer, span)
                sources += len(span.sources)
                if self.on_progress is not None:
                    self.on_progress(sources, len(scope.completed))
            writer.close()
            file.flush()
            os.fsync(file.fileno())
        return rows

    def _write_span(self, writer: RowWriter | ParquetTables, span: Span) -> int:
        if not isinstance(writer, RowWriter):
            if self.linker is not None and span.origin.has_files():
                for source, _ in span.by_source():
                    self.linker.link(self.manifest.entry(source).source_id, span.origin)
            return writer.write_span(span)
        lines = self._encode(span)
        writer.write(lines)
        return lines.count(b"\n")

    def _encode(self, span: Span) -> bytes:
        if not self.with_source and (self.linker is None or not span.origin.has_files()):
            return span.rows
        lines = [line for source in span.each() for line in self._lines(source)]
        return b"".join(lines) if self.with_source else span.rows

    def _lines(self, source: SourceRows) -> Iterator[bytes]:
        source_id = self.manifest.entry(source.source).source_id
        if self.linker is not None:
            self.linker.link(source_id, source.origin)
        return wrap_rows(source_id, source)

    def report(
        self, output: Path, *, rows: int, size_bytes: int, damaged: tuple[str, ...]
    ) -> CollectReport:
        """Return the report of what was written."""
        return report_on(
            self.run,
            scope_of(self.manifest, self.union),
            output=str(output),
            rows=rows,
            size_bytes=size_bytes,
            damaged=damaged,
            files=self.linker.count if self.linker is not None else 0,
        )


def report_on(
    run: RunDir,
    scope: Scope,
    *,
    output: str,
    rows: int,
    size_bytes: int,
    damaged: tuple[str, ...],
    files: int = 0,
) -> CollectReport:
    """Return the report of a result that was written."""
    return CollectReport(
        output=output,
        rows=rows,
        sources=len(scope.completed),
        total=scope.wanted,
        missing=scope.wanted - len(scope.completed) - len(scope.quarantined),
        quarantined=len(scope.quarantined),
        tolerated=run.tolerated(scope.wanted),
        size_bytes=size_bytes,
        files=files,
        damaged=damaged,
    )


def wrap_rows(source_id: str, source: SourceRows) -> Iterator[bytes]:
    """Yield a source's rows as lines of ``{"source", "item", "row"}``."""
    for path, row in zip(source.paths, source.rows, strict=True):
        item = item_id(source_id, source.origin.stage_names, path)
        head = b'{"source":%b,"item":%b,"row":' % (orjson.dumps(source_id), orjson.dumps(item))
        yield head + row + b"}\n"


def _format_of(run: RunDir, output: Path, *, with_source: bool) -> OpenWriter:
    if output.suffix == ".jsonl":
        return lambda _path, file, _union: JsonLines(file)
    if output.suffix == ".parquet":
        require_pyarrow(f"write {output}")
        from hpcresume.output.parquet import ParquetRows, ParquetTables, schema_of

        if run.part_format() == PARQUET and not with_source:
            return lambda _path, file, union: ParquetTables(file, schema_of(run, union))
        return lambda path, file, _union: ParquetRows(path, file)
    raise UsageError(
        f"{output} ends in neither .jsonl nor .parquet. "
        "The suffix says in which format the rows are written. Give one of the two.",
        path=str(output),
    )


@contextlib.contextmanager
def _replacing(output: Path) -> Iterator[str]:
    directory = output.parent
    temporary = str(directory / f"{TEMPORARY_PREFIX}{output.name}-{secrets.token_hex(8)}")
    try:
        yield temporary
        os.replace(temporary, output)
        POSIX.sync_directory(str(directory))
    except OSError as error:
        raise SharedStorageError(
            f"cannot write {output}: {error.strerror or error}. "
            "The results are safe in the run directory. "
            "Check the directory, its space and quota, and collect again.",
            path=str(output),
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
