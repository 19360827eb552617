"""Sources that are row ranges of large files; what :func:`chunks` returns."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from hpcresume.errors import PipelineError, SourcesError
from hpcresume.pipeline.chunk import Chunk
from hpcresume.pipeline.chunk_formats import LISTERS, Extent, Listed
from hpcresume.pipeline.sources import FileSources, Keeper, Source, SourceList

ChunkFormat = Literal["jsonl", "lines", "csv", "tsv", "parquet", "warc"]
_COMPRESSED = (".gz", ".zst")
_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "lines",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".warc": "warc",
}
_UNKNOWN = {("parquet", ".gz"), ("parquet", ".zst"), ("warc", ".zst")}
_WILD = re.compile(r"[*?\[]")


class _Glob(FileSources, frozen=True):
    """The files that a glob names: as for a single path, there has to be one."""

    def __iter__(self) -> Iterator[Source]:
        empty = True
        for source in super().__iter__():
            empty = False
            yield source
        if empty:
            pattern = str(self.root / self.pattern)
            raise SourcesError(
                f"{pattern}: no file matches. The chunks are of the files that do. "
                "Check the pattern; for files that may be missing give hr.files(...).",
                path=pattern,
            )


class ChunkSources(SourceList, msgspec.Struct, frozen=True):
    """Row ranges of files; what :func:`chunks` returns."""

    paths: tuple[Path | FileSources, ...]
    rows: int
    format: str | None

    def __iter__(self) -> Iterator[Source]:
        return self.listed(None)

    def listed(self, keeper: Keeper | None) -> Iterator[Source]:
        """Yield the chunks file by file; restart points of gzip files go to the keeper."""
        for path, name in self._files():
            kind = self.format or _format_of(path)
            if kind is None:
                raise _unknown_format(path)
            yield from self._chunks_of(path, name, kind, keeper)

    def _files(self) -> Iterator[tuple[Path, str]]:
        for path in self.paths:
            if isinstance(path, FileSources):
                yield from ((source.payload, source.id) for source in path)
            else:
                if path.is_dir():
                    raise SourcesError(
                        f"{path} is a directory. Chunks are of files. "
                        f"Give '{path}/*', or hr.files({str(path)!r}).",
                        path=str(path),
                    )
                yield path, _text(path.name)

    def _chunks_of(
        self, path: Path, name: str, kind: str, keeper: Keeper | None
    ) -> Iterator[Source]:
        if (kind, path.suffix) in _UNKNOWN:
            raise _unknown_format(path)
        listed = Listed()
        many = False
        for extent in LISTERS[kind](path, self.rows, listed):
            many = many or extent.first > 0
            yield _source(path, name, kind, extent)
        if keeper is None or not many:
            return
        if listed.single_frame:
            keeper.note(
                f"{path} is one Zstandard frame, which can be read from its start only: each "
                "worker reads what lies before its chunks. `pzstd`, or `split` and `zstd` and "
                "`cat`, write one that has several."
            )
        if listed.members is not None:
            keeper.restart_points(path, listed.size_bytes, listed.digest, listed.members)

    def describe(self) -> dict[str, Any]:
        """Return the files and the number of rows; each chunk has its own digest."""
        paths = [p.describe() if isinstance(p, FileSources) else str(p) for p in self.paths]
        return {"kind": "chunks", "paths": paths, "rows": self.rows, "format": self.format}

    def grew_from(self, described: Mapping[str, Any]) -> bool:
        """Tell whether the same paths, or more of them, are cut in the same way."""
        before, now = dict(described), self.describe()
        paths = before.pop("paths", None)
        here = now.pop("paths")
        return before == now and isinstance(paths, list) and all(path in here for path in paths)

    def extent(self, source_id: str) -> tuple[str, int] | None:
        """Return a chunk's id up to its last row, and that row: a file's last chunk grows."""
        match = _RANGE.fullmatch(source_id)
        return None if match is None else (match[1], int(match[2]))


_RANGE = re.compile(r"(.*#\d+-)(\d+)", re.DOTALL)


def _source(path: Path, name: str, kind: str, extent: Extent) -> Source:
    last = extent.first + extent.count - 1
    source_id = f"{name}#{extent.first}-{last}"
    chunk = Chunk(
        source_id,
        path,
        kind,
        extent.first,
        extent.count,
        extent.offset,
        extent.size_bytes,
        extent.digest,
        extent.columns,
        extent.restart,
    )
    return Source(source_id, chunk, float(extent.size_bytes or extent.count))


def _text(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _format_of(path: Path) -> str | None:
    bare = path.with_suffix("") if path.suffix in _COMPRESSED else path
    return _FORMATS.get(bare.suffix.lower())


def _unknown_format(path: Path) -> SourcesError:
    return SourcesError(
        f"{path}: unknown format of chunks. Known suffixes are {', '.join(_FORMATS)}, with .gz "
        "after them, or .zst but for Parquet and WARC. "
        f"Give format={', '.join(map(repr, LISTERS))}.",
        path=str(path),
    )


Paths = str | os.PathLike[str] | FileSources


def chunks(
    paths: Paths | Iterable[Paths],
    *,
    rows: int = 10_000,
    format: ChunkFormat | None = None,  # noqa: A002  # what it is
) -> ChunkSources:
    """Return one source per range of ``rows`` rows of large files.

    JSONL, text, CSV and TSV (each also ``.gz`` and ``.zst``), Parquet, and WARC (also ``.gz``,
    a member per record).  A stage gets a :class:`Chunk`; iterating over it reads its rows, in
    constant memory, from near where they lie: from a restart point of a gzip file, the start
    of a Zstandard frame, a Parquet row group.  A file that grew gives new chunks.

    Args:
        paths: A path, a glob, ``hr.files(...)``, or several of these.
        rows: Rows of a chunk; the last one of a file may have fewer.
        format: Default: by each file's suffix.

    Returns:
        Sources ``name#first-last``, counted from 0, with the :class:`Chunk` as payload and
        its size in bytes as weight.

    Raises:
        PipelineError: ``rows`` is below 1, or ``paths`` is none of the above.
        SourcesError: When listed: a file cannot be read, is cut off, or is not of its format,
            or no file matches a glob.
    """
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise PipelineError(f"chunks(rows={rows!r}): give the number of rows, 1 or more.")
    if format is not None and format not in LISTERS:
        raise PipelineError(f"chunks(format={format!r}): choose one of {', '.join(LISTERS)}.")
    several = [paths] if isinstance(paths, str | os.PathLike | FileSources) else paths
    if not isinstance(several, Iterable):
        raise PipelineError(f"chunks({paths!r}): give a path, a glob, hr.files(...) or a list.")
    return ChunkSources(tuple(map(_one, several)), rows, format)


def _one(path: Any) -> Path | FileSources:
    if isinstance(path, FileSources):
        return path
    if not isinstance(path, str | os.PathLike):
        raise PipelineError(f"chunks: {path!r} is no path, glob or hr.files(...).")
    whole = Path(os.path.abspath(os.path.expanduser(path)))
    parts = whole.parts
    wild = [n for n, part in enumerate(parts) if _WILD.search(part)]
    if not wild or whole.exists():
        return whole
    return _Glob(Path(*parts[: wild[0]]), "/".join(parts[wild[0] :]), "path", ())
