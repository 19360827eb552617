"""A state on its way from the exporter to the workers: named parts, grouped in chunks.

A part lies in one chunk, so a worker maps it whole.  Every part carries its checksum, and
the state's digest covers names, types, shapes and checksums of all parts in order: two
states with one digest are the same state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hpcresume.serving.buffers import Buffer, checksum
from hpcresume.serving.errors import StateError

CHUNK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """One named array or text of a state.

    Attributes:
        name: Its name.
        dtype: Type of its values as numpy spells it, or ``memoryview.format``.
        shape: Its shape.
        data: Its bytes, read-only; they may be memory that other workers map, too.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def array(self) -> Any:
        """Return the values as a read-only numpy array over the same memory."""
        import numpy as np

        return np.frombuffer(self.data, dtype=self.dtype).reshape(self.shape)

    def __bytes__(self) -> bytes:
        return bytes(self.data)


@dataclass(frozen=True, slots=True)
class PartInfo:
    """What is known of a part before its bytes are there; the fields are those of :class:`Part`.

    Attributes:
        size_bytes: Its length.
        crc: CRC32C of its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    crc: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a state consists of.

    Attributes:
        version: Its version.
        chunks: The parts in each chunk, in order.
        digest: SHA-256 over all of that but the version, in hex.
    """

    version: int
    chunks: tuple[tuple[PartInfo, ...], ...]
    digest: str

    @property
    def size_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.size_bytes for chunk in self.chunks for part in chunk)


@dataclass(frozen=True, slots=True)
class Package:
    """A state as the exporter holds it while it is being sent.

    Attributes:
        manifest: What it consists of.
        chunks: The bytes, one buffer per part.
    """

    manifest: Manifest
    chunks: tuple[tuple[Buffer, ...], ...]


@dataclass(frozen=True, slots=True)
class Values:
    """A part whose type and shape a transport names itself.

    Attributes:
        data: Contiguous buffer.
        dtype: Type of its values.
        shape: Its shape.
    """

    data: Any
    dtype: str
    shape: tuple[int, ...]


def pack(version: int, parts: object, *, chunk_bytes: int = CHUNK_BYTES) -> Package:
    """Describe a state and group it in chunks, without copying it.

    Args:
        version: Its version.
        parts: A mapping, or an iterable of pairs, of names and contiguous buffers: bytes,
            arrays, whatever ``memoryview`` takes.
        chunk_bytes: Parts are grouped up to this size; a larger one is a chunk of its own.

    Raises:
        StateError: A part is no contiguous buffer, or two have one name.
    """
    named = parts.items() if isinstance(parts, Mapping) else parts
    infos: list[list[PartInfo]] = []
    chunks: list[list[Buffer]] = []
    seen: set[str] = set()
    for name, value in pairs(named):
        if name in seen:
            raise StateError(f"version {version}: two parts are named {name!r}")
        seen.add(name)
        info, buffer = _part(version, name, value)
        size = sum(one.size_bytes for one in infos[-1]) if infos else 0
        if not infos or size + info.size_bytes > chunk_bytes:
            infos.append([])
            chunks.append([])
        infos[-1].append(info)
        chunks[-1].append(buffer)
    manifest = describe(version, infos)
    return Package(manifest, tuple(map(tuple, chunks)))


def describe(version: int, chunks: Iterable[Iterable[PartInfo]]) -> Manifest:
    """Return the manifest of parts that are grouped already."""
    grouped = tuple(map(tuple, chunks))
    listed = [
        [part.name, part.dtype, list(part.shape), part.size_bytes, part.crc]
        for chunk in grouped
        for part in chunk
    ]
    text = json.dumps(listed, separators=(",", ":"))
    return Manifest(version, grouped, hashlib.sha256(text.encode()).hexdigest())


def pairs(parts: object) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of what an exporter returned.

    Raises:
        StateError: It is no iterable of pairs.
    """
    if not isinstance(parts, Iterable) or isinstance(parts, str | bytes | bytearray | memoryview):
        raise StateError(
            f"a state is {type(parts).__name__}. export() returns a mapping, or pairs, "
            "of names and buffers."
        )
    for pair in parts:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise StateError(f"a part of a state is {pair!r:.80}, not a pair of name and buffer")
        yield pair


def _part(version: int, name: str, value: Any) -> tuple[PartInfo, Buffer]:
    try:
        view = memoryview(value.data if isinstance(value, Values) else value)
        buffer = Buffer(view)
    except TypeError as error:
        raise StateError(
            f"version {version}: part {name!r} is {type(value).__name__}, not a contiguous "
            f"buffer ({error}). Give bytes, or numpy.ascontiguousarray(...)."
        ) from error
    crc = checksum(buffer.view)
    if isinstance(value, Values):
        return PartInfo(name, value.dtype, value.shape, view.nbytes, crc), buffer
    dtype = getattr(getattr(value, "dtype", None), "str", None) or view.format
    return PartInfo(name, dtype, tuple(view.shape or ()), view.nbytes, crc), buffer


def unpack(manifest: Manifest, number: int, buffers: Iterable[Any]) -> Iterator[Part]:
    """Yield the verified parts of a chunk that arrived.

    Raises:
        StateError: It is not what was sent.
    """
    expected, arrived = manifest.chunks[number], tuple(buffers)
    if len(arrived) != len(expected):
        raise _differs(manifest, f"chunk {number} has {len(arrived)} of {len(expected)} parts")
    for info, buffer in zip(expected, arrived, strict=True):
        view = memoryview(getattr(buffer, "view", buffer))
        if view.nbytes != info.size_bytes:
            what = f"part {info.name!r} has {view.nbytes} of {info.size_bytes} bytes"
            raise _differs(manifest, what)
        if checksum(view) != info.crc:
            raise _differs(manifest, f"part {info.name!r} fails its checksum")
        yield Part(info.name, info.dtype, info.shape, view.toreadonly())


def _differs(manifest: Manifest, what: str) -> StateError:
    return StateError(f"version {manifest.version} did not arrive as it was sent: {what}")
