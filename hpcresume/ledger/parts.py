"""Publish the rows of ``hr.Parts``: blobs of workers, one after another, as one file.

A part is published like a segment, before the segment that refers to it, and never changes.
Where nothing refers to it (a kill in between, a receipt that was lost) it is garbage: readers
find parts through segments only.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator

import google_crc32c
import msgspec

from hpcresume.errors import CorruptDataError
from hpcresume.fs import POSIX, publish, storage_errors
from hpcresume.ledger.store import Commit, StoredBlob
from hpcresume.run.directory import AttemptRef, RunDir
from hpcresume.segment.frame import BLOB_FILE_BYTES, PARQUET, Blob, blob_of, moved
from hpcresume.segment.parquet_footer import MAGIC, FooterJoiner, tail
from hpcresume.segment.segment import PartEntry

SCHEMA_NAME = "schema"
_COPY_BYTES = 4 << 20


class Part:
    """The part that the rows of some commits become.

    Args:
        commits: Commits with their sequence numbers.
        root: Node-local directory of their blobs.
        max_bytes: No further commit is begun beyond this many bytes of rows.

    Attributes:
        commits: The commits taken; after :meth:`publish` their frames refer to the part.
    """

    def __init__(self, commits: Iterable[tuple[int, Commit]], root: str, *, max_bytes: int) -> None:
        self._root = root
        self.commits: list[tuple[int, Commit]] = []
        self._format, taken = "", 0
        for sequence, commit in commits:
            self.commits.append((sequence, commit))
            for blob in filter(None, map(_blob, commit.frames)):
                self._format, taken = blob.format, taken + blob.length
            if taken >= max_bytes:
                break

    def publish(self, run: RunDir, ref: AttemptRef, *, seq: int) -> PartEntry | None:
        """Publish the part; None where the commits have no rows.

        Raises:
            SharedStorageError: The run directory refused; call again with the same commits.
            CorruptDataError: A blob is gone or damaged.
        """
        if not self._format:
            return None
        if self._format == PARQUET:
            self._publish_schema(run)
        name = f"part-{seq:06d}-{secrets.token_hex(8)}.{self._format}"
        path = run.attempt_path(ref, name)
        receipt = publish(run.fs, path, self._pieces(name), label="part")
        return PartEntry(name, receipt.size_bytes, receipt.digest)

    def _publish_schema(self, run: RunDir) -> None:
        """Tell later attempts the schema that was inferred; the first one counts."""
        local = os.path.join(self._root, SCHEMA_NAME)
        if not os.path.exists(local):
            return
        with storage_errors("look for", run.schema_path()):
            known = run.fs.exists(run.schema_path())
        if not known:
            with contextlib.suppress(FileExistsError):
                data = POSIX.read(local)
                publish(run.fs, run.schema_path(), [data], label="schema", exclusive=True)

    def _pieces(self, name: str) -> Iterator[bytes]:
        """Yield the part's bytes, and move the commits' frames there on the way."""
        joiner, offset = FooterJoiner(), 0
        if self._format == PARQUET:
            offset = len(MAGIC)
            yield MAGIC
        for number, (sequence, commit) in enumerate(self.commits):
            frames = list(commit.frames)
            for position, frame in enumerate(frames):
                blob = _blob(frame)
                if blob is None:
                    continue
                yield from self._read(blob)
                if self._format == PARQUET:
                    joiner.add(blob.footer, offset)
                placed = msgspec.structs.replace(blob, file=name, offset=offset)
                frames[position] = moved(frame, placed)
                offset += blob.length
            self.commits[number] = (sequence, Commit(frames, commit.failures))
        if self._format == PARQUET:
            yield tail(joiner.footer())

    def _read(self, blob: Blob) -> Iterator[bytes]:
        path, at, crc = os.path.join(self._root, blob.file), 0, 0
        while at < blob.length:
            try:
                piece = POSIX.read(path, blob.offset + at, min(_COPY_BYTES, blob.length - at))
            except OSError as error:
                raise _damaged(path, str(error)) from error
            if not piece:
                raise _damaged(path, f"it ends at byte {at} of {blob.length} from {blob.offset} on")
            crc, at = google_crc32c.extend(crc, piece), at + len(piece)
            yield piece
        if crc != blob.crc:
            raise _damaged(path, "it fails its CRC")


class _File(msgspec.Struct):
    """What is known of a node-local file of blobs.

    Attributes:
        end: Where the last of its committed blobs ends.
        size_bytes: Bytes of all that are committed; there may be very many of them.
        last: Sequence number of the last commit that names one.
        worker: Whose it is, by group and index; empty where nothing starts again.
        start: Which start of that worker wrote it.
    """

    worker: str
    start: int
    end: int = 0
    size_bytes: int = 0
    last: int = 0

    def is_whole(self) -> bool:
        """Tell whether every blob that it will ever hold is committed."""
        return self.end >= BLOB_FILE_BYTES and self.end == self.size_bytes


class BlobFiles:
    """The node-local files of blobs, and which of them are needed no more.

    A file goes when it takes no further blob and the commits of all that it holds are
    published; what is left goes with the attempt's directory.  What a worker that died, or was
    broken, had not answered is done again: its files take none once its successor has answered.
    """

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}
        self._starts: dict[str, int] = {}

    def committed(self, sequence: int, blobs: Iterable[StoredBlob]) -> None:
        """Note the blobs of a commit."""
        for blob in blobs:
            file = self._files.get(blob.path) or self._new(blob.path)
            file.end = max(file.end, blob.offset + blob.length)
            file.size_bytes += blob.length
            file.last = sequence

    def _new(self, path: str) -> _File:
        worker, _, start = os.path.basename(path).rpartition("-")[0].rpartition("-")
        file = self._files[path] = _File(worker, int(start or 0))
        self._starts[worker] = max(file.start, self._starts.get(worker, 0))
        return file

    def release(self, last: int) -> None:
        """Remove what only commits up to ``last`` need; they are published."""
        for path, file in list(self._files.items()):
            is_left = file.start < self._starts[file.worker]
            if file.last <= last and (is_left or file.is_whole()):
                del self._files[path]
                # The attempt's directory is removed at its end in any case.
                with contextlib.suppress(OSError):
                    os.unlink(path)


def _blob(frame: bytes) -> Blob | None:
    return blob_of(frame, what="a committed frame")


def _damaged(path: str, why: str) -> CorruptDataError:
    return CorruptDataError(
        f"the rows in {path} are damaged: {why}. "
        "Their ledger is set aside; what was published is kept, the rest is computed again.",
        path=path,
    )
