"""Packs: many small segments in one file, each whole and byte for byte.

A pack is another place for segments and nothing more.  Which source a segment wins, and what
a generation says of it, does not depend on where it lies; a pack tells by itself what it
holds, so that losing a generation loses no segment.  Packs are numbered by exclusive create,
so a reader finds by name what an old listing does not show.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from hpcresume.errors import CorruptDataError
from hpcresume.fs import READ_BYTES, Readable, Receipt, publish
from hpcresume.ids import Epoch, RoundIndex, TaskIndex
from hpcresume.run.directory import AttemptRef, RunDir, SegmentName
from hpcresume.segment.container import Container, encode_container, open_container
from hpcresume.segment.segment import Segment, Writer, open_segment

KIND = b"PACK"

Key = tuple[Writer, str]
"""What a segment is known by: its writer and its name."""


def key_of(name: SegmentName) -> Key:
    """Return what a generation knows a segment by."""
    ref = name.attempt
    return Writer(ref.round, ref.task, ref.epoch), name.name


def name_of(key: Key) -> SegmentName:
    """Return the name of a segment in the run directory."""
    writer, name = key
    ref = AttemptRef(RoundIndex(writer.round), TaskIndex(writer.task), Epoch(writer.epoch))
    return SegmentName(ref, name)


class PackFooter(msgspec.Struct):
    """What a pack says of itself: the segment that each block is."""

    run_id: str
    number: int
    segments: list[Key]


class InMemory:
    """Bytes that are read like a file."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, _path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return up to ``length`` bytes from ``offset`` on (all of them by default)."""
        return self._data[offset:] if length is None else self._data[offset : offset + length]

    def pieces(self, _path: str) -> Iterator[bytes]:
        """Yield all bytes."""
        yield self._data

    def size(self, _path: str) -> int:
        """Return how many bytes there are."""
        return len(self._data)


class _Within:
    """A part of a file that is read like a file of its own."""

    def __init__(self, fs: Readable, offset: int, size_bytes: int) -> None:
        self._fs, self._offset, self._size = fs, offset, size_bytes

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        rest = max(0, self._size - offset)
        wanted = rest if length is None else min(length, rest)
        return self._fs.read(path, self._offset + offset, wanted)

    def pieces(self, path: str) -> Iterator[bytes]:
        offset = 0
        while piece := self.read(path, offset, READ_BYTES):
            yield piece
            offset += len(piece)

    def size(self, _path: str) -> int:
        return self._size


class Pack(msgspec.Struct, frozen=True):
    """An opened pack: its footer is verified, its segments are not."""

    run: RunDir
    container: Container[PackFooter]
    blocks: dict[Key, int]

    def segment(self, key: Key) -> Segment:
        """Open one of its segments; its footer is verified then.

        Raises:
            CorruptDataError: The pack does not hold it whole.
            FileNotFoundError: The pack is gone.
            SharedStorageError: The file system refused.
        """
        block = self.blocks.get(key)
        if block is None:
            path = self.container.path
            raise CorruptDataError(f"{path} does not hold {key[1]} of {key[0]}.", path=path)
        entry = self.container.blocks[block]
        part = _Within(self.container.fs, entry.offset, entry.length)
        return open_as(part, self.container.path, self.run, key)


def open_as(fs: Readable, path: str, run: RunDir, key: Key) -> Segment:
    """Open a segment of a run that is where one of this name belongs.

    Raises:
        CorruptDataError: Not a whole segment of this run and this writer.
        FileNotFoundError: There is no such file.
        SharedStorageError: The file system refused.
    """
    segment = open_segment(fs, path, run_id=run.run_id)
    if segment.footer.writer != key[0]:
        raise CorruptDataError(
            f"{path} was written by {segment.footer.writer}. It was copied or moved here, and a "
            "segment is read where its writer put it. It is ignored.",
            path=path,
        )
    return segment


class Packs:
    """The packs of a run, each of them opened once."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self._opened: dict[int, Pack] = {}

    def open(self, number: int) -> Pack:
        """Open a pack; reads its footer only.

        Raises:
            CorruptDataError: It is damaged, or of another run.
            FileNotFoundError: There is none of this number.
            SharedStorageError: The file system refused.
        """
        if number not in self._opened:
            self._opened[number] = _open_pack(self.run, number)
        return self._opened[number]

    def segment(self, key: Key, number: int) -> Segment:
        """Open a segment in a pack, or under its own name where ``number`` is 0.

        Raises:
            CorruptDataError: It is not whole.
            FileNotFoundError: It is not there.
            SharedStorageError: The file system refused.
        """
        if number:
            return self.open(number).segment(key)
        return open_as(self.run.fs, self.run.segment_path(name_of(key)), self.run, key)


def _open_pack(run: RunDir, number: int) -> Pack:
    path = run.pack_path(number)
    container = open_container(run.fs, path, KIND, PackFooter)
    footer = container.footer
    if (footer.run_id, footer.number, len(footer.segments)) != (
        run.run_id,
        number,
        len(container.blocks),
    ):
        raise CorruptDataError(
            f"{path} belongs to another run or has another number. It is ignored.", path=path
        )
    return Pack(run, container, {key: block for block, key in enumerate(footer.segments)})


def write_pack(run: RunDir, number: int, segments: Iterator[tuple[Key, bytes]]) -> Receipt:
    """Publish a pack of whole segments, in their order.

    Raises:
        FileExistsError: Another process published this number first.
        SharedStorageError: The file system refused.
    """
    footer = PackFooter(run.run_id, number, [])

    def blocks() -> Iterator[bytes]:
        for key, data in segments:
            footer.segments.append(key)
            yield data

    parts = encode_container(KIND, blocks(), footer)
    return publish(run.fs, run.pack_path(number), parts, label="pack", exclusive=True)
