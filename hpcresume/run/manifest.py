"""The manifest: the ordered set of a run's sources, each with an index that never changes.

A part is a container whose blocks hold up to 4,096 sources each (id, encoded payload,
weight), followed by one block with an 8-byte digest of every id.  Growth adds a part.
Sources that are made from their index (``hr.indexed``) need no blocks at all.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec
from pyroaring import BitMap

from hpcresume.errors import CorruptDataError, SourcesError
from hpcresume.fs import FileSystem, Receipt, publish, storage_errors
from hpcresume.run.directory import RunDir
from hpcresume.segment import bitmap as bitmaps
from hpcresume.segment.container import (
    DECODE_ERRORS,
    Container,
    encode_container,
    open_container,
)

KIND = b"MANI"
BLOCK_SOURCES = 4096
BLOCK_BYTES = 8 << 20
"""A block ends at so many sources, or with the source whose payload fills it."""


class Entry(NamedTuple):
    """One source as the manifest holds it."""

    source: int
    source_id: str
    payload: bytes
    weight: float


class PartFooter(msgspec.Struct):
    """What a manifest part says of itself.

    Attributes:
        run_id: The run it belongs to.
        first: Index of its first source.
        count: Number of its sources.
        indexed: Whether its sources are made from their index.
        weight: Sum of its sources' weights.
        uniform: Whether all weights are 1.
        listing: Digest of ids and payloads of the whole listing up to this part.
        withdrawn: Bitmap of earlier sources that the listing no longer holds.
        starts: First source of each block, counted from ``first``; empty where every block
            but the last holds ``BLOCK_SOURCES``.
    """

    run_id: str
    first: int
    count: int
    indexed: bool
    weight: float
    uniform: bool
    listing: bytes
    withdrawn: bytes
    starts: list[int] = []


_BLOCK = msgspec.msgpack.Decoder(list[tuple[str, bytes, float]])


def id_digest(source_id: str) -> int:
    """Return 64 bits of an id's digest, for finding duplicates."""
    data = hashlib.blake2b(source_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(data, "little")


class Listing(msgspec.Struct):
    """Sources in the order they are listed, checked and digested on the way.

    Iterating yields blocks of ``(id, payload, weight)``; afterwards the other fields hold
    for the whole listing.
    """

    sources: Iterable[tuple[str, bytes, float]]
    digests: array[int] = msgspec.field(default_factory=lambda: array("Q"))
    weight: float = 0.0
    uniform: bool = True
    starts: list[int] = msgspec.field(default_factory=list)
    _digest: hashlib.blake2b = msgspec.field(
        default_factory=lambda: hashlib.blake2b(digest_size=16)
    )

    def blocks(self) -> Iterator[list[tuple[str, bytes, float]]]:
        """Yield the sources in blocks of bounded count and size."""
        block: list[tuple[str, bytes, float]] = []
        size = 0
        for source in self.sources:
            source_id, payload, weight = source
            self._digest.update(_encode_id(source_id))
            self._digest.update(b"%d:" % len(payload) + payload)
            self.digests.append(id_digest(source_id))
            self.weight += weight
            self.uniform = self.uniform and weight == 1.0
            block.append(source)
            size += len(payload)
            if len(block) == BLOCK_SOURCES or size >= BLOCK_BYTES:
                self.starts.append(len(self.digests) - len(block))
                yield block
                block, size = [], 0
        if block:
            self.starts.append(len(self.digests) - len(block))
            yield block

    def digest(self) -> bytes:
        """Return the digest of everything listed so far."""
        return self._digest.digest()


def _encode_id(source_id: str) -> bytes:
    try:
        return f"{len(source_id)}:{source_id}".encode()
    except UnicodeEncodeError as error:
        raise SourcesError(
            f"the id {source_id!r} is not valid Unicode. Ids are written to the manifest and to "
            "results as UTF-8. Rename the file, or give the source an id of its own.",
            source_id=source_id,
        ) from error


def repeated_positions(digests: array[int]) -> set[int]:
    """Return the digests that occur more than once, in memory of one 256th of a set."""
    buckets: list[array[int]] = [array("Q") for _ in range(256)]
    for digest in digests:
        buckets[digest & 255].append(digest)
    repeated: set[int] = set()
    for bucket in buckets:
        seen: set[int] = set()
        for digest in bucket:
            if digest in seen:
                repeated.add(digest)
            seen.add(digest)
    return repeated


def write_part(
    run: RunDir, number: int, *, first: int, listing: Listing, withdrawn: BitMap | None = None
) -> Receipt:
    """List sources into a new manifest part, streaming.

    Raises:
        SourcesError: An id is not valid Unicode, or there are more than 2**32 sources.
        FileExistsError: Another process wrote this part first.
        SharedStorageError: The file system refused.
    """
    footer = PartFooter(run.run_id, first, 0, False, 0.0, True, b"", b"")

    def blocks() -> Iterator[bytes]:
        for block in listing.blocks():
            footer.count += len(block)
            yield msgspec.msgpack.encode(block)
        _refuse_too_many(first + footer.count)
        yield listing.digests.tobytes()
        footer.weight, footer.uniform = listing.weight, listing.uniform
        footer.listing = listing.digest()
        if listing.starts != list(range(0, footer.count, BLOCK_SOURCES)):
            footer.starts = listing.starts
        footer.withdrawn = bitmaps.dump(withdrawn if withdrawn is not None else BitMap())

    parts = encode_container(KIND, blocks(), footer)
    return publish(run.fs, run.part_path(number), parts, label="manifest", exclusive=True)


def write_indexed_part(
    run: RunDir, number: int, *, first: int, count: int, withdrawn: BitMap | None = None
) -> Receipt:
    """Record sources that are made from their index; costs nothing per source."""
    _refuse_too_many(first + count)
    gone = bitmaps.dump(withdrawn if withdrawn is not None else BitMap())
    footer = PartFooter(
        run_id=run.run_id,
        first=first,
        count=count,
        indexed=True,
        weight=float(count),
        uniform=True,
        listing=b"",
        withdrawn=gone,
    )
    parts = encode_container(KIND, [], footer)
    return publish(run.fs, run.part_path(number), parts, label="manifest", exclusive=True)


def _refuse_too_many(count: int) -> None:
    if count > bitmaps.MAX_SOURCES:
        raise SourcesError(
            f"{count} sources are more than a run can hold ({bitmaps.MAX_SOURCES}). "
            "Each source has a 32-bit index. Make each source cover several inputs.",
            count=count,
        )


class Part(msgspec.Struct, frozen=True):
    """An opened part of the manifest."""

    container: Container[PartFooter]

    @property
    def footer(self) -> PartFooter:
        """The verified footer."""
        return self.container.footer

    def locate(self, position: int) -> tuple[int, int]:
        """Return the block that holds a source, by its position in the part, and where in it."""
        starts = self.footer.starts
        if not starts:
            return divmod(position, BLOCK_SOURCES)
        block = bisect_right(starts, position) - 1
        return block, position - starts[block]

    def entries(self, block: int) -> list[tuple[str, bytes, float]]:
        """Return the sources of one block."""
        data = self.container.read_block(block)
        try:
            return _BLOCK.decode(data)
        except DECODE_ERRORS as error:
            raise CorruptDataError(
                f"{self.container.path}: block {block} cannot be decoded ({error}). "
                "The manifest says what the run's sources are and cannot be guessed. "
                "Restore the file from a backup, or submit to a new --run-dir.",
                path=self.container.path,
            ) from error

    def digests(self) -> array[int]:
        """Return the 8-byte digest of every id."""
        found: array[int] = array("Q")
        if not self.footer.indexed:
            found.frombytes(self.container.read_block(len(self.container.blocks) - 1))
        return found


class Manifest:
    """The manifest of a run: all its parts."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self._firsts = [part.footer.first for part in parts]
        self._cache: tuple[int, int, list[tuple[str, bytes, float]]] = (-1, -1, [])
        expected = 0
        for part in parts:
            if part.footer.first != expected:
                raise CorruptDataError(
                    f"{part.container.path} begins at source {part.footer.first}, not "
                    f"{expected}. A part of the manifest is missing. "
                    "Restore the manifest directory from a backup.",
                    path=part.container.path,
                )
            expected += part.footer.count
        self.total = expected

    @classmethod
    def open(cls, run: RunDir) -> Manifest:
        """Open a run's manifest; reads footers only.

        Raises:
            CorruptDataError: A part is damaged or missing.
        """
        parts = []
        for number in run.part_numbers():
            with storage_errors("read", run.part_path(number)):
                container = _open_part(run, number)
            if container.footer.run_id != run.run_id:
                raise CorruptDataError(
                    f"{container.path} belongs to run {container.footer.run_id}. "
                    "A file of another run was copied here. Remove it.",
                    path=container.path,
                )
            parts.append(Part(container))
        if not parts and run.rounds():
            raise CorruptDataError(
                f"{run.join('manifest')} is empty, but the run has rounds. The manifest says "
                "what the run's sources are and cannot be guessed. Restore it from a backup.",
                path=run.join("manifest"),
            )
        return cls(parts)

    @property
    def uniform(self) -> bool:
        """Whether all sources have weight 1."""
        return all(part.footer.uniform for part in self.parts)

    def withdrawn(self) -> BitMap:
        """Return the sources that a later listing no longer held."""
        return bitmaps.union(
            bitmaps.load(part.footer.withdrawn, what=part.container.path) for part in self.parts
        )

    def is_indexed(self, index: int) -> bool:
        """Tell whether a source is made from its index."""
        return self._part_of(index).footer.indexed

    def _part_of(self, index: int) -> Part:
        if not 0 <= index < self.total:
            raise IndexError(f"source {index} of {self.total}")
        return self.parts[bisect_right(self._firsts, index) - 1]

    def entry(self, index: int) -> Entry:
        """Return one source; blocks are cached, so ascending access reads each once."""
        part = self._part_of(index)
        if part.footer.indexed:
            return Entry(index, str(index), b"", 1.0)
        block, offset = part.locate(index - part.footer.first)
        if self._cache[:2] != (part.footer.first, block):
            self._cache = (part.footer.first, block, part.entries(block))
        return Entry(index, *self._cache[2][offset])

    def entries(self, indices: Iterable[int]) -> Iterator[Entry]:
        """Yield sources by index; ascending order reads each block once."""
        return map(self.entry, indices)

    def find(self, source_id: str) -> int:
        """Return the index of a source by its id.

        Raises:
            KeyError: No source has this id.
        """
        wanted = id_digest(source_id)
        for part in self.parts:
            if part.footer.indexed:
                if source_id.isdecimal() and str(int(source_id)) == source_id:
                    index = int(source_id)
                    if part.footer.first <= index < part.footer.first + part.footer.count:
                        return index
                continue
            for offset, digest in enumerate(part.digests()):
                index = part.footer.first + offset
                if digest == wanted and self.entry(index).source_id == source_id:
                    return index
        raise KeyError(source_id)


def _open_part(run: RunDir, number: int) -> Container[PartFooter]:
    path = run.part_path(number)
    try:
        return open_container(run.fs, path, KIND, PartFooter)
    except CorruptDataError as error:
        raise CorruptDataError(
            f"{path} is damaged. The manifest says what the run's sources are and cannot be "
            "guessed; published results are as they were. Restore the file from a backup, or "
            "begin a new run with another --run-dir.",
            path=path,
        ) from error


def refuse_duplicates(manifest: Manifest) -> None:
    """Refuse a manifest in which two sources have one id.

    Raises:
        SourcesError: Names the id and both positions.
    """
    digests: array[int] = array("Q")
    for part in manifest.parts:
        digests.extend(part.digests())
    repeated = repeated_positions(digests)
    if not repeated:
        return
    withdrawn = manifest.withdrawn()
    positions = [i for part in manifest.parts for i in _positions(part, repeated)]
    seen: dict[str, int] = {}
    for index in positions:
        if index in withdrawn:
            continue
        source_id = manifest.entry(index).source_id
        if source_id in seen:
            raise SourcesError(
                f"two sources have the id {source_id!r}: number {seen[source_id]} and number "
                f"{index} of the listing. Results are recorded by id, so one would hide the "
                "other. Give each source an id of its own.",
                source_id=source_id,
                positions=(seen[source_id], index),
            )
        seen[source_id] = index


def _positions(part: Part, digests: set[int]) -> Iterator[int]:
    for offset, digest in enumerate(part.digests()):
        if digest in digests:
            yield part.footer.first + offset


def remove_part(fs: FileSystem, run: RunDir, number: int) -> None:
    """Remove a part that no plan refers to yet, after its sources were refused."""
    fs.unlink(run.part_path(number))
