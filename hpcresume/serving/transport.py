"""How the chunks of a state get from the exporter's process to the workers'."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from hpcresume.errors import ConfigError
from hpcresume.fs import POSIX, publish
from hpcresume.serving.buffers import Buffer
from hpcresume.serving.errors import StateError
from hpcresume.serving.state import CHUNK_BYTES, Manifest, Package, Part, pack, unpack

_MADE_HERE = "hpcresume-state-"


@runtime_checkable
class StateTransport(Protocol):
    """A way for states; one instance is pickled into every process of a pool.

    What :meth:`chunk` returns travels as the answer of a call of the exporter's actor, through
    Ray's object store, and belongs to the pool: it outlives the exporter.
    """

    @property
    def name(self) -> str:
        """What it is called in messages."""

    def pack(self, version: int, parts: object, session: str) -> Package:
        """In the exporter: take a state apart; nothing of it may change afterwards."""

    def chunk(self, package: Package, number: int) -> Any:
        """In the exporter: return what the workers are to be given for a chunk."""

    def unpack(self, manifest: Manifest, number: int, chunk: Any) -> Iterator[Any]:
        """In a worker: yield a chunk's parts, each verified before it is yielded."""

    def forget(self, session: str) -> None:
        """In the pool's process: remove what a session has left; legal at any time."""


@dataclass(frozen=True)
class ObjectTransport:
    """Through Ray's object store: a worker maps what the exporter wrote once.

    Attributes:
        chunk_bytes: Small parts are grouped up to this size.
    """

    chunk_bytes: int = CHUNK_BYTES
    name: str = field(default="object", init=False)

    def pack(self, version: int, parts: object, session: str) -> Package:
        """Describe the parts where they lie."""
        del session
        return pack(version, parts, chunk_bytes=self.chunk_bytes)

    def chunk(self, package: Package, number: int) -> Any:
        """Return the parts themselves."""
        return package.chunks[number]

    def unpack(self, manifest: Manifest, number: int, chunk: Any) -> Iterator[Any]:
        """Yield the parts where Ray has mapped them."""
        return unpack(manifest, number, chunk)

    def forget(self, session: str) -> None:
        """Do nothing: Ray frees what nobody refers to."""


@dataclass(frozen=True)
class FileTransport:
    """Through files in a directory that all processes of the pool see.

    Each chunk is written under a temporary name, synced, renamed and read back.

    Attributes:
        directory: Where; every session makes a directory of its own in it.
        chunk_bytes: Small parts are grouped up to this size.
    """

    directory: str = field(default_factory=lambda: tempfile.mkdtemp(prefix=_MADE_HERE))
    chunk_bytes: int = CHUNK_BYTES
    name: str = field(default="file", init=False)

    def _path(self, session: str, *names: str) -> str:
        return os.path.join(self.directory, f"state-{session}", *names)

    def pack(self, version: int, parts: object, session: str) -> Package:
        """Write every chunk."""
        package = pack(version, parts, chunk_bytes=self.chunk_bytes)
        os.makedirs(self._path(session), mode=0o700, exist_ok=True)
        paths = []
        for number, buffers in enumerate(package.chunks):
            path = self._path(session, f"chunk-{number:05d}")
            publish(POSIX, path, (bytes(buffer.view) for buffer in buffers), label="state")
            paths.append((Buffer(os.fsencode(path)),))
        return Package(package.manifest, tuple(paths))

    def chunk(self, package: Package, number: int) -> Any:
        """Return the chunk's path."""
        return os.fsdecode(bytes(package.chunks[number][0].view))

    def unpack(self, manifest: Manifest, number: int, chunk: Any) -> Iterator[Any]:
        """Read the chunk and yield its parts."""
        try:
            with open(chunk, "rb") as file:
                data = memoryview(file.read())
        except OSError as error:
            raise StateError(
                f"version {manifest.version}: {chunk} cannot be read: {error.strerror}. "
                "The exporter wrote it; every worker has to see that directory."
            ) from error
        buffers, start = [], 0
        for part in manifest.chunks[number]:
            buffers.append(data[start : start + part.size_bytes])
            start += part.size_bytes
        if start != data.nbytes:
            raise StateError(
                f"version {manifest.version}: {chunk} holds {data.nbytes} of {start} bytes"
            )
        return unpack(manifest, number, buffers)

    def forget(self, session: str) -> None:
        """Remove the session's files, and with the last of them a directory made here."""
        shutil.rmtree(self._path(session), ignore_errors=True)
        if os.path.basename(self.directory).startswith(_MADE_HERE):
            with contextlib.suppress(OSError):
                os.rmdir(self.directory)


TransportMaker = Callable[[], StateTransport]
_MAKERS: dict[str, TransportMaker] = {
    "object": ObjectTransport,
    "file": FileTransport,
}

_LATE = {"torch": "hpcresume.serving.torch_transport:TorchTransport"}
"""Those whose import costs seconds, or fails where nobody needs them."""


def register_transport(name: str, make: TransportMaker) -> None:
    """Make a transport known by name, in place of one of that name."""
    _MAKERS[name] = make


def get_transport(which: str | StateTransport) -> StateTransport:
    """Return a transport given by name, as ``module:name`` of its maker, or itself.

    Raises:
        ConfigError: There is none of that name, or it does not import here; says why.
    """
    if not isinstance(which, str):
        return which
    which = _LATE.get(which, which)
    make = _MAKERS.get(which)
    if make is None and ":" in which:
        make = _imported(which)
    if make is None:
        known = ", ".join(sorted({*_MAKERS, *_LATE}))
        raise ConfigError(
            f"there is no transport {which!r}. Known: {known}; others as 'module:name'.",
            transport=which,
        )
    return make()


def _imported(which: str) -> TransportMaker:
    module, _, name = which.partition(":")
    try:
        make: TransportMaker = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"transport {which!r} does not import: {error}. Install what it needs, or name "
            "another one.",
            transport=which,
        ) from error
    return make


__all__ = [
    "FileTransport",
    "ObjectTransport",
    "Part",
    "StateTransport",
    "get_transport",
    "register_transport",
]
