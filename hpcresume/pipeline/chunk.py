"""A chunk: a range of rows of one large file, which is one source.

What the manifest holds of it is where it lies and a digest of its content.  The rows are
read where they are needed, in constant memory, and a file that is no longer what ``submit``
listed is an error that names the chunk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import orjson

from hpcresume.errors import SourcesError


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows of one file; iterate over it to read them, as often as you like.

    Attributes:
        id: The source's id, ``name#first-last``.
        path: The file.
        format: ``jsonl``, ``lines``, ``csv``, ``tsv``, ``parquet`` or ``warc``.
        first: Position of its first row in the file, from 0.
        count: Number of its rows; of its lines where blank ones are no rows.
        offset: Bytes before it in the file, uncompressed.
        size_bytes: Its bytes, uncompressed; compressed for WARC, 0 for Parquet.
        digest: Of its bytes; for Parquet of the file's size and footer.
        columns: The columns of a CSV or TSV file.
        restart: Where decompression may begin for it: compressed and uncompressed offset.
        restarts: Directory with the restart points of gzip files; None outside a run.
    """

    id: str
    path: Path
    format: str
    first: int
    count: int
    offset: int = 0
    size_bytes: int = 0
    digest: str = ""
    columns: tuple[str, ...] = ()
    restart: tuple[int, int] = (0, 0)
    restarts: Path | None = field(default=None, compare=False)

    def __iter__(self) -> Iterator[Any]:
        """Yield the rows, read as they are wanted.

        Raises:
            SourcesError: The file cannot be read, is no longer what was listed, or a row is
                not of its format; names the chunk.
        """
        from hpcresume.pipeline.chunk_formats import read_chunk

        return read_chunk(self)

    def changed(self, why: str) -> SourcesError:
        """Return the error for a file that is no longer what was listed."""
        return SourcesError(
            f"{self.path}: rows {self.first} to {self.first + self.count - 1} are not what was "
            f"listed: {why}. The file was changed or damaged since it was submitted. "
            "Restore it, or submit again to take what it holds now.",
            path=str(self.path),
            source=self.id,
        )


_STORED = tuple(f.name for f in fields(Chunk) if f.name not in ("path", "restarts"))


def encode_chunk(chunk: Chunk) -> bytes:
    """Return a chunk as bytes: the path, which need not be text, and the rest as JSON."""
    path = os.fsencode(chunk.path)
    values = [getattr(chunk, name) for name in _STORED]
    return len(path).to_bytes(4, "big") + path + orjson.dumps(values)


def decode_chunk(data: bytes, restarts: Path | None) -> Chunk:
    """Return what :func:`encode_chunk` was given; ValueError for anything else."""
    end = 4 + int.from_bytes(data[:4], "big")
    values = dict(zip(_STORED, orjson.loads(data[end:]), strict=True))
    values |= {name: tuple(values[name]) for name in ("columns", "restart")}
    return Chunk(path=Path(os.fsdecode(data[4:end])), restarts=restarts, **values)
