"""Sources: what a run is over, listed once, in an order that does not change.

Every list streams: a source is yielded as soon as it is known.  Ids come from identity
(a path, a column) or from position (``name#ordinal``); in the second case the file's
content is part of the run's fingerprint, and appending to the file is growth.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import msgspec

from hpcresume.errors import PipelineError, SourcesError
from hpcresume.pipeline.members import Members
from hpcresume.pipeline.payload import decode_payload, encode_payload
from hpcresume.pipeline.records import (
    READERS,
    file_digest,
    file_size,
    line_text,
    open_records,
    read_lines,
)
from hpcresume.pipeline.walk import glob_regex, walk_files

__all__ = [
    "FileSources",
    "FunctionSources",
    "Indexed",
    "IterableSources",
    "LineSources",
    "RowSources",
    "Source",
    "SourceList",
    "as_sources",
    "decode_payload",
    "encode_payload",
    "files",
    "indexed",
    "lines",
    "rows",
]

FileId = Literal["path", "path+size", "digest"]
RowFormat = Literal["jsonl", "csv", "tsv", "parquet"]

_FILE_IDS: tuple[str, ...] = ("path", "path+size", "digest")
_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}


@dataclass(slots=True)
class Source:
    """One input, the unit of resumption.

    Attributes:
        id: Stable and unique within the run.
        payload: What the first stage gets: a Path, or anything that JSON can hold.
        weight: Expected cost, relative to the other sources.
    """

    id: str
    payload: Any = None
    weight: float = 1.0


class Keeper(Protocol):
    """What a listing may hand to whoever lists, besides the sources."""

    def restart_points(self, path: Path, size_bytes: int, digest: str, members: Members) -> None:
        """Keep where reading a gzip file can begin.

        Args:
            path: The file.
            size_bytes: Size of its content, uncompressed.
            digest: Of its content.
            members: Where its members start.
        """

    def note(self, text: str) -> None:
        """Tell the user something about the sources."""


class SourceList:
    """The sources of a pipeline, as declared."""

    def __iter__(self) -> Iterator[Source]:
        """Yield the sources in order, streaming."""
        raise NotImplementedError

    def listed(self, keeper: Keeper | None) -> Iterator[Source]:
        """Yield the sources for a run, which keeps what reading them needs."""
        del keeper
        return iter(self)

    def extent(self, source_id: str) -> tuple[str, int] | None:
        """Return what stays of the id of a source that grows, and how far it reaches.

        None for sources that do not grow: one that is gone is missed.
        """
        del source_id
        return None

    def describe(self) -> dict[str, Any]:
        """Return kind and arguments as JSON values, for the run's fingerprint."""
        raise NotImplementedError

    def grew_from(self, described: Mapping[str, Any]) -> bool:
        """Tell whether these are the sources that ``described`` told of, or more at the end."""
        return dict(described) == self.describe()


class FileSources(SourceList, msgspec.Struct, frozen=True):
    """Regular files under a directory, sorted by path; what :func:`files` returns."""

    root: Path
    pattern: str
    id: FileId
    exclude: tuple[str, ...]

    def __iter__(self) -> Iterator[Source]:
        if not self.root.is_dir():
            raise SourcesError(
                f"{self.root} is not a directory. The sources are the files under it. "
                "Give an existing directory.",
                path=str(self.root),
            )
        wanted = glob_regex(self.pattern)
        unwanted = [glob_regex(glob) for glob in self.exclude]
        for entry, relative in walk_files(self.root, "", [glob_regex(g) for g in self._pruned()]):
            if wanted.fullmatch(relative) and not any(u.fullmatch(relative) for u in unwanted):
                yield self._source(entry, relative)

    def _pruned(self) -> list[str]:
        """Return the globs of directories that need not be read at all."""
        return [glob.removesuffix("/**") for glob in self.exclude]

    def _source(self, entry: os.DirEntry[str], relative: str) -> Source:
        size = entry.stat().st_size
        # A name that is no UTF-8 still needs an id that JSON can hold.
        name = os.fsencode(relative).decode("utf-8", "backslashreplace")
        if self.id == "path+size":
            name = f"{name}@{size}"
        elif self.id == "digest":
            name = f"{name}@{file_digest(Path(entry.path))}"
        return Source(name, Path(entry.path), float(size or 1))

    def describe(self) -> dict[str, Any]:
        """Return the directory and the patterns."""
        return {
            "kind": "files",
            "root": str(self.root),
            "pattern": self.pattern,
            "id": self.id,
            "exclude": list(self.exclude),
        }


class _OrdinalSources(SourceList, msgspec.Struct, frozen=True):
    """Records of one file; identified by position unless a column names them."""

    path: Path

    def _arguments(self) -> dict[str, Any]:
        raise NotImplementedError

    def _by_position(self) -> bool:
        return True

    def describe(self) -> dict[str, Any]:
        """Return the arguments, with the file's size and digest where position counts."""
        described = self._arguments()
        if self._by_position():
            size = file_size(self.path)
            described |= {"size_bytes": size, "digest": file_digest(self.path, size_bytes=size)}
        return described

    def grew_from(self, described: Mapping[str, Any]) -> bool:
        """Tell whether the file still begins with the bytes that ``described`` told of."""
        before = dict(described)
        size, digest = before.pop("size_bytes", None), before.pop("digest", None)
        if before != self._arguments() or isinstance(size, int) != self._by_position():
            return False
        if not isinstance(size, int):
            return True
        return size <= file_size(self.path) and file_digest(self.path, size_bytes=size) == digest


class LineSources(_OrdinalSources, frozen=True):
    """Lines of a text file; what :func:`lines` returns."""

    def __iter__(self) -> Iterator[Source]:
        with open_records(self.path) as file:
            for n, raw in enumerate(read_lines(file, self.path)):
                yield Source(f"{self.path.name}#{n}", line_text(raw, self.path, n), len(raw) or 1.0)

    def _arguments(self) -> dict[str, Any]:
        return {"kind": "lines", "path": str(self.path)}


class RowSources(_OrdinalSources, frozen=True):
    """Rows of a JSONL, CSV, TSV or Parquet file; what :func:`rows` returns."""

    id: str | None
    format: str

    def __iter__(self) -> Iterator[Source]:
        for n, row in enumerate(READERS[self.format](self.path)):
            yield Source(self._id_of(row, n), row)

    def _id_of(self, row: Any, n: int) -> str:
        if self.id is None:
            return f"{self.path.name}#{n}"
        value = row.get(self.id) if isinstance(row, dict) else None
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise SourcesError(
                f"{self.path}: row {n}: the id column {self.id!r} holds {value!r}. "
                "A source's id is a text or an integer. "
                f"{self._columns_hint(row)}",
                path=str(self.path),
                row=n,
            )
        return str(value)

    def _columns_hint(self, row: Any) -> str:
        if not isinstance(row, dict):
            return "The row is no object, so it has no columns."
        near = difflib.get_close_matches(str(self.id), map(str, row), n=1)
        suggestion = f" Did you mean {near[0]!r}?" if near and near[0] != self.id else ""
        return f"Columns are: {', '.join(map(str, row))}.{suggestion}"

    def _by_position(self) -> bool:
        return self.id is None

    def _arguments(self) -> dict[str, Any]:
        return {"kind": "rows", "path": str(self.path), "id": self.id, "format": self.format}


class Indexed(SourceList, msgspec.Struct, frozen=True):
    """The integers below ``n``; payloads are made in the worker and never stored."""

    n: int
    fn: Callable[[int], Any] | None = None

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Source]:
        return map(self.source, range(self.n))

    def source(self, index: int) -> Source:
        """Return source ``index`` with its payload."""
        return Source(str(index), self.payload(index))

    def payload(self, index: int) -> Any:
        """Return what the first stage gets for source ``index``."""
        return index if self.fn is None else self.fn(index)

    def describe(self) -> dict[str, Any]:
        """Return the number of sources and the name of the function."""
        name = None if self.fn is None else _name_of(self.fn)
        return {"kind": "indexed", "n": self.n, "fn": name}

    def grew_from(self, described: Mapping[str, Any]) -> bool:
        """Tell whether only ``n`` differs, and is not smaller."""
        before = dict(described)
        n = before.pop("n", None)
        return isinstance(n, int) and n <= self.n and {**before, "n": self.n} == self.describe()


class IterableSources(SourceList, msgspec.Struct, frozen=True):
    """Sources, ids or (id, payload) pairs from an iterable."""

    iterable: Iterable[Any]

    def __iter__(self) -> Iterator[Source]:
        if iter(self.iterable) is self.iterable:
            self._use_once()
        for n, item in enumerate(self.iterable):
            yield _as_source(item, n)

    def _use_once(self) -> None:
        if self.__dict__.get("_used"):
            raise SourcesError(
                f"the sources are a {type(self.iterable).__name__} that was already listed. "
                "It can be read once only. "
                "Give the function that makes it: sources=fn in place of sources=fn()."
            )
        self.__dict__["_used"] = True

    def describe(self) -> dict[str, Any]:
        """Return the type; the sources themselves are compared by id."""
        return {"kind": "iterable", "type": type(self.iterable).__qualname__}


class FunctionSources(SourceList, msgspec.Struct, frozen=True):
    """What a function returns, called when the sources are listed."""

    fn: Callable[[], Any]

    def __iter__(self) -> Iterator[Source]:
        return self.listed(None)

    def listed(self, keeper: Keeper | None) -> Iterator[Source]:
        """Yield what the function returns, as that would be listed."""
        return as_sources(self.fn()).listed(keeper)

    def describe(self) -> dict[str, Any]:
        """Return the function's name."""
        return {"kind": "function", "name": _name_of(self.fn)}


def files(
    root: str | os.PathLike[str],
    pattern: str = "**/*",
    *,
    id: FileId = "path",  # noqa: A002  # what it is
    exclude: Sequence[str] = (),
) -> FileSources:
    """Return the regular files under ``root`` that match, sorted by path.

    Args:
        root: Directory; symbolic links to directories below it are not followed.
        pattern: Glob on the path relative to ``root``; ``**/`` is any number of directories.
        id: ``path`` is the path relative to ``root``; ``path+size`` and ``digest`` append the
            size or the content's digest, so that a changed file is a new source.
        exclude: Globs on the relative path of what to leave out; one that matches a directory
            leaves out the tree below it.

    Returns:
        Sources with the Path as payload and the size in bytes (at least 1) as weight.

    Raises:
        PipelineError: ``id`` is none of the three.
        SourcesError: When listed: ``root`` is not a directory, or cannot be read.
    """
    if id not in _FILE_IDS:
        raise PipelineError(f"files(id={id!r}): choose one of {', '.join(_FILE_IDS)}.")
    if isinstance(exclude, str):
        raise PipelineError(f"files(exclude={exclude!r}) is not a list. Write [{exclude!r}].")
    return FileSources(_absolute(root), pattern, id, tuple(exclude))


def lines(path: str | os.PathLike[str]) -> LineSources:
    """Return the lines of a UTF-8 text file (``.gz`` is decompressed), without line ends.

    Returns:
        Sources ``name#0``, ``name#1``, ... with the text as payload.

    Raises:
        SourcesError: When listed: the file cannot be read or is not UTF-8.
    """
    return LineSources(_absolute(path))


def rows(
    path: str | os.PathLike[str],
    *,
    id: str | None = None,  # noqa: A002  # what it is
    format: RowFormat | None = None,  # noqa: A002  # what it is
) -> RowSources:
    """Return the rows of a JSONL, CSV, TSV (each also ``.gz``) or Parquet file.

    Args:
        path: The file.
        id: Column that holds each source's id; without it ids are ``name#0``, ``name#1``, ...
        format: Default: by the file's suffix.

    Returns:
        Sources with the row as payload: a dict (of texts for CSV and TSV), or for JSONL
        whatever JSON value the line holds.

    Raises:
        PipelineError: The name is that of a compressed Parquet file, which cannot be read.
        SourcesError: The format is unknown; when listed: the file or a row cannot be read.
    """
    path = _absolute(path)
    chosen = format or _FORMATS.get(Path(path.name.removesuffix(".gz")).suffix.lower())
    if format is None and chosen == "parquet" and path.suffix == ".gz":
        raise PipelineError(
            f"rows({str(path)!r}): a Parquet file is read from its end, which gzip does not "
            "allow. Decompress it; Parquet compresses its columns itself.",
            path=str(path),
        )
    if chosen is None or chosen not in READERS:
        raise SourcesError(
            f"{path}: unknown format of rows{f' {format!r}' if format else ''}. "
            f"Known suffixes are {', '.join(_FORMATS)}, with .gz after them. "
            "Give format='jsonl', 'csv', 'tsv' or 'parquet'.",
            path=str(path),
        )
    return RowSources(path, id, chosen)


def indexed(n: int, fn: Callable[[int], Any] | None = None) -> Indexed:
    """Return ``n`` sources with the ids "0", "1", ...; none of them is stored.

    Args:
        n: Number of sources, 0 or more.
        fn: Makes source i's payload from i, in the worker; by default the payload is i.

    Raises:
        PipelineError: ``n`` is not an integer of 0 or more, or ``fn`` cannot be called.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise PipelineError(f"indexed({n!r}): give the number of sources, 0 or more.")
    if fn is not None and not callable(fn):
        raise PipelineError(f"indexed({n}, {fn!r}): the second argument cannot be called.")
    return Indexed(n, fn)


def as_sources(obj: object) -> SourceList:
    """Return ``obj`` as a list of sources.

    Args:
        obj: A source list, an iterable of :class:`Source`, ids or (id, payload) pairs, or a
            function that returns one of these (called when listed).

    Raises:
        PipelineError: It is none of these.
    """
    if isinstance(obj, SourceList):
        return obj
    if isinstance(obj, Iterable) and not isinstance(obj, str | bytes | Mapping | Source | type):
        return IterableSources(obj)
    if callable(obj) and not isinstance(obj, type):
        return FunctionSources(cast("Callable[[], Any]", obj))
    raise PipelineError(
        f"sources={obj!r} has type {type(obj).__qualname__}, which is not a list of sources. "
        "Give hr.files(...), hr.lines(...), hr.rows(...), hr.chunks(...), hr.results(...), "
        "hr.indexed(...), an iterable of hr.Source, ids or (id, payload) pairs, or a function "
        "returning one."
    )


def _as_source(item: Any, n: int) -> Source:
    if isinstance(item, Source):
        source = item
    elif isinstance(item, str):
        source = Source(item, item)
    elif isinstance(item, tuple) and len(item) == 2:
        source = Source(item[0], item[1])
    else:
        raise SourcesError(
            f"source number {n} is {item!r} ({type(item).__qualname__}). "
            "Every source needs an id that stays the same from listing to listing. "
            "Yield hr.Source(id, payload), an id, or an (id, payload) pair."
        )
    if not isinstance(source.id, str) or not source.id:
        raise SourcesError(
            f"source number {n} has the id {source.id!r} ({type(source.id).__qualname__}). "
            "Ids are texts, and not empty. Give str(...) of what identifies it."
        )
    return source


def _absolute(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def _name_of(fn: object) -> str:
    fn = getattr(fn, "func", fn)
    return str(getattr(fn, "__qualname__", type(fn).__qualname__))
