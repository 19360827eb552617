"""The one file format of the run directory: header, blocks, footer, trailer.

::

    header   8 bytes magic | 4 bytes kind | u32 format version
    blocks   raw bytes, one after another
    footer   MessagePack, a typed struct of its kind, inside an envelope that holds the
             offset, length and CRC-32C of every block and the SHA-256 of header and blocks
    trailer  SHA-256 of the footer | u64 footer length | 8 bytes magic

The footer proves itself, so a reader that needs no block reads the end of the file only.
Nothing is memory-mapped, and every length is checked before it is believed: any byte string
decodes, or raises :class:`CorruptDataError`.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import google_crc32c
import msgspec

from hpcresume.errors import CorruptDataError, RunDirError
from hpcresume.fs import READ_BYTES, Readable, read_exact, reading

MAGIC = b"HPCRESUM"
FORMAT_VERSION = 2
_HEADER = struct.Struct("<8s4sI")
_TRAILER = struct.Struct("<32sQ8s")
_TAIL_BYTES = 1 << 16

DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises on bytes that are not what they should be."""

FooterT = TypeVar("FooterT", bound=msgspec.Struct | None)


class BlockEntry(msgspec.Struct, frozen=True, array_like=True):
    """Where a block lies: offset and length in bytes, and its CRC-32C."""

    offset: int
    length: int
    crc: int


class _Envelope(msgspec.Struct, frozen=True, array_like=True):
    blocks: list[BlockEntry]
    body_digest: bytes
    footer: bytes


class Container(msgspec.Struct, Generic[FooterT], frozen=True):
    """An opened container: its footer is verified, its blocks are not read yet."""

    fs: Readable
    path: str
    kind: bytes
    footer: FooterT
    blocks: tuple[BlockEntry, ...]
    body_digest: bytes
    size_bytes: int

    def read_block(self, number: int) -> bytes:
        """Return a block's bytes.

        Raises:
            CorruptDataError: Its CRC-32C differs from the footer's.
            FileNotFoundError: The file is gone.
            SharedStorageError: The file system refused.
        """
        entry = self.blocks[number]
        with reading(self.path):
            data = read_exact(self.fs, self.path, entry.offset, entry.length)
        if google_crc32c.value(data) != entry.crc:
            raise _corrupt(self.path, f"block {number} fails its CRC")
        return data

    def verify(self) -> None:
        """Read the whole body and compare its digest.

        Raises:
            CorruptDataError: It differs from the footer's.
        """
        end = max((b.offset + b.length for b in self.blocks), default=_HEADER.size)
        digest, offset = hashlib.sha256(), 0
        while offset < end:
            with reading(self.path):
                piece = read_exact(self.fs, self.path, offset, min(READ_BYTES, end - offset))
            digest.update(piece)
            offset += len(piece)
        if digest.digest() != self.body_digest:
            raise _corrupt(self.path, "the body fails its digest")


def encode_container(
    kind: bytes, blocks: Iterable[bytes], footer: msgspec.Struct
) -> Iterator[bytes]:
    """Yield a container's bytes in pieces; ``blocks`` is consumed once.

    ``footer`` is encoded after the last block, so the caller may fill it while yielding.
    """
    header = _HEADER.pack(MAGIC, kind, FORMAT_VERSION)
    digest, offset, entries = hashlib.sha256(header), len(header), []
    yield header
    for block in blocks:
        digest.update(block)
        entries.append(BlockEntry(offset, len(block), google_crc32c.value(block)))
        offset += len(block)
        yield block
    data = msgspec.msgpack.encode(
        _Envelope(entries, digest.digest(), msgspec.msgpack.encode(footer))
    )
    yield data
    yield _TRAILER.pack(hashlib.sha256(data).digest(), len(data), MAGIC)


def open_container(
    fs: Readable, path: str, kind: bytes, footer_type: type[FooterT]
) -> Container[FooterT]:
    """Read and verify a container's footer.

    Raises:
        CorruptDataError: Not a whole container of this kind.
        RunDirError: A newer hpcresume wrote it.
        FileNotFoundError: There is no such file.
        SharedStorageError: The file system refused.
    """
    with reading(path):
        header, data, size = _read_ends(fs, path)
    version = _check_header(path, header, kind)
    if version > FORMAT_VERSION:
        _refuse_newer(fs, path, version, data)
    return _decode(fs, path, kind, footer_type, data=data, size=size)


def _read_ends(fs: Readable, path: str) -> tuple[bytes, bytes, int]:
    """Return a file's header, its footer, which passed its digest, and its size."""
    size = fs.size(path)
    if size < _HEADER.size + _TRAILER.size:
        raise _corrupt(path, f"{size} bytes are too few")
    start = max(0, size - _TAIL_BYTES)
    tail = read_exact(fs, path, start, size - start)
    digest, length, magic = _TRAILER.unpack(tail[-_TRAILER.size :])
    if magic != MAGIC:
        raise _corrupt(path, "it does not end as one")
    begin = size - _TRAILER.size - length
    if begin < _HEADER.size:
        raise _corrupt(path, "its footer is longer than the file")
    header = tail[: _HEADER.size] if start == 0 else read_exact(fs, path, 0, _HEADER.size)
    data = (
        tail[begin - start : -_TRAILER.size]
        if begin >= start
        else read_exact(fs, path, begin, length)
    )
    if hashlib.sha256(data).digest() != digest:
        raise _corrupt(path, "its footer fails its digest")
    return header, data, size


def _check_header(path: str, header: bytes, kind: bytes) -> int:
    magic, found, version = _HEADER.unpack(header)
    if magic != MAGIC or found != kind:
        raise _corrupt(path, f"it is not of kind {kind.decode()}")
    if version < 1:
        raise _corrupt(path, f"its format {version} never existed")
    return int(version)


def _refuse_newer(fs: Readable, path: str, version: int, data: bytes) -> None:
    with contextlib.suppress(*DECODE_ERRORS):
        envelope = msgspec.msgpack.decode(data, type=_Envelope)
        # The body's digest covers the header: one flipped bit is damage, not the future.
        body = Container(fs, path, b"", None, tuple(envelope.blocks), envelope.body_digest, 0)
        body.verify()
    raise RunDirError(
        f"{path} has format {version}; this hpcresume reads up to {FORMAT_VERSION}. "
        "A newer version wrote it. Install that version to go on with this run.",
        path=path,
        version=version,
    )


def _decode(
    fs: Readable,
    path: str,
    kind: bytes,
    footer_type: type[FooterT],
    *,
    data: bytes,
    size: int,
) -> Container[FooterT]:
    try:
        envelope = msgspec.msgpack.decode(data, type=_Envelope)
        footer = msgspec.msgpack.decode(envelope.footer, type=footer_type)
    except DECODE_ERRORS as error:
        raise _corrupt(path, f"its footer cannot be decoded ({error})") from error
    expected = _HEADER.size
    for entry in envelope.blocks:
        if entry.offset != expected or entry.length < 0:
            raise _corrupt(path, "its blocks do not lie one after another")
        expected += entry.length
    if expected != size - _TRAILER.size - len(data):
        raise _corrupt(path, "its blocks do not fill its body")
    return Container(fs, path, kind, footer, tuple(envelope.blocks), envelope.body_digest, size)


def _corrupt(path: str, why: str) -> CorruptDataError:
    return CorruptDataError(
        f"{path} is not a whole file of this run: {why}. "
        "It is set aside; what only it held is computed again.",
        path=path,
        why=why,
    )
