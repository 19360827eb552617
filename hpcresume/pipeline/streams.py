"""The bytes of a file from any uncompressed offset: plain, gzip and Zstandard.

A plain file is sought.  A gzip file is decompressed from the nearest restart point that
:mod:`~hpcresume.pipeline.restarts` keeps, or from its start where there is none.  A
Zstandard file is decompressed from the start of a frame, which is the only place where that
is possible; one of a single frame is read from its start.
"""

from __future__ import annotations

import contextlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from hpcresume.errors import SourcesError
from hpcresume.pipeline.records import open_file, reading

BLOCK_BYTES = 1 << 20
# One byte of Zstandard may stand for 32 KiB: little is given to it at once.
_ZSTD_BYTES = 1 << 14


class Stream(ABC):
    """Uncompressed bytes, read one after another.

    ``position`` is the uncompressed offset of the next byte.
    """

    position: int

    @abstractmethod
    def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes; none at the end."""

    def restart_before(self, offset: int) -> tuple[int, int]:
        """Return the last place before an offset where reading can begin.

        Offsets are asked for in ascending order.

        Returns:
            Compressed and uncompressed offset.
        """
        del offset
        return (0, 0)

    def expect(self, end: int) -> None:  # noqa: B027  # most need not know it
        """Know that it will be read up to an uncompressed offset."""

    @abstractmethod
    def close(self) -> None:
        """Close the file."""


class _Plain(Stream):
    """A plain file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.position = file, 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.position += len(data)
        return data

    def seek(self, offset: int) -> None:
        self._file.seek(offset)
        self.position = offset

    def close(self) -> None:
        self._file.close()


class _Zstd(Stream):
    """A Zstandard file from the start of one of its frames."""

    def __init__(self, path: Path, restart: tuple[int, int]) -> None:
        self._file: IO[bytes] = open_file(path)
        self._file.seek(restart[0])
        self._path, self._at = path, restart[0]
        self.position = self._made = restart[1]
        self._frames: list[tuple[int, int]] = []
        self._frame: Any = None
        self._raw, self._ready = b"", b""

    def read(self, size: int) -> bytes:
        while not self._ready:
            self._raw = self._raw or self._file.read(_ZSTD_BYTES)
            if not self._raw:
                if self._frame is not None:
                    raise EOFError("its last Zstandard frame is not whole")
                return b""
            self._decompress()
        data, self._ready = self._ready[:size], self._ready[size:]
        self.position += len(data)
        return data

    def _decompress(self) -> None:
        zstandard = import_for(self._path, "zstandard")
        if self._frame is None:
            self._frames.append((self._at, self._made))
            self._frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
        try:
            self._ready = self._frame.decompress(self._raw)
        except zstandard.ZstdError as error:
            raise OSError(f"not Zstandard data: {error}") from error
        left = self._frame.unused_data if self._frame.eof else b""
        self._at += len(self._raw) - len(left)
        self._made += len(self._ready)
        self._raw = left
        if self._frame.eof:
            self._frame = None

    def restart_before(self, offset: int) -> tuple[int, int]:
        frames = self._frames
        while len(frames) > 1 and frames[1][1] <= offset:
            frames.pop(0)
        return frames[0] if frames else (0, 0)

    def close(self) -> None:
        self._file.close()


def import_for(path: Path, module: str) -> Any:
    """Return a module that reading a file needs.

    Raises:
        SourcesError: It is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SourcesError(
            f"{path}: reading it needs {module}, which is not installed. "
            "Install it: pip install 'hpcresume[chunks]'.",
            path=str(path),
        ) from error


def open_stream(path: Path, restart: tuple[int, int] = (0, 0)) -> Stream:
    """Open a file for reading from its start, or where a frame or gzip member starts."""
    with reading(path):
        if path.suffix == ".zst":
            return _Zstd(path, restart)
        if path.suffix == ".gz":
            from hpcresume.pipeline.members import MemberStream

            return MemberStream(path, restart)
        return _Plain(open_file(path))


# The stream that this process read last, where the next chunk of the file may begin.
_parked: list[tuple[tuple[Any, ...], Stream]] = []


def _identity(path: Path) -> tuple[Any, ...]:
    status = os.stat(path)
    return (str(path), status.st_ino, status.st_size, status.st_mtime_ns)


@contextlib.contextmanager
def open_at(
    path: Path,
    offset: int,
    size_bytes: int,
    *,
    restart: tuple[int, int] = (0, 0),
    restarts: Path | None = None,
) -> Iterator[Stream]:
    """Give a file's bytes from an uncompressed offset.

    The stream that was read last goes on where that is nearer, so that a worker that reads
    the chunks of a file one after another decompresses it once.

    Args:
        path: The file.
        offset: Where to begin.
        size_bytes: How much will be read.
        restart: A place before it where a Zstandard frame begins.
        restarts: Directory of the restart points of gzip files.
    """
    with reading(path):
        key = _identity(path)
        found = None
        if path.suffix == ".gz" and restarts is not None and not _is_parked_at(key, offset):
            from hpcresume.pipeline.restarts import place_before

            found = place_before(path, offset, restarts)
        stream = _take(key, offset, found.point.uncompressed if found else restart[1])
        if stream is None:
            stream = found.open(offset) if found else open_stream(path, restart)
        stream.expect(offset + size_bytes)
        try:
            _advance(stream, offset)
            yield stream
        except BaseException:
            stream.close()
            raise
    _park(key, stream)


def _is_parked_at(key: tuple[Any, ...], offset: int) -> bool:
    return any(found == key and stream.position == offset for found, stream in _parked)


def _take(key: tuple[Any, ...], offset: int, nearest: int) -> Stream | None:
    if not _parked:
        return None
    found, stream = _parked.pop()
    if found == key and nearest <= stream.position <= offset:
        return stream
    stream.close()
    return None


def _park(key: tuple[Any, ...], stream: Stream) -> None:
    while _parked:
        _parked.pop()[1].close()
    _parked.append((key, stream))


def _advance(stream: Stream, offset: int) -> None:
    if isinstance(stream, _Plain):
        stream.seek(offset)
    while stream.position < offset:
        if not stream.read(min(BLOCK_BYTES, offset - stream.position)):
            raise EOFError(f"it ends at byte {stream.position}, before byte {offset}")


class Window(io.RawIOBase):
    """The next bytes of a stream as a file of their own, noting what is read."""

    def __init__(self, stream: Stream, size_bytes: int, digest: Any) -> None:
        self._stream, self.left, self._digest = stream, size_bytes, digest

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the window goes."""
        data = self._stream.read(min(len(buffer), self.left))
        buffer[: len(data)] = data
        self._digest.update(data)
        self.left -= len(data)
        return len(data)
