"""The content of a gzip file, member by member, and where its members start.

A member is decompressed from its start without anything that lies before it.  Files of many
small ones (``bgzip``, ``cat`` of several files) have no other places to begin at.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import IO, Any

import msgspec

from hpcresume.pipeline.records import open_file
from hpcresume.pipeline.streams import Stream

SPACING_MIN, SPACING_MAX = 4 << 20, 32 << 20
# What is read at once is copied at the end of each member in it.
_RAW_BYTES = 1 << 15


def spacing_of(size_bytes: int) -> int:
    """Return the distance of restart points for a gzip file of some size."""
    return min(SPACING_MAX, max(SPACING_MIN, size_bytes // 1024))


class Members(msgspec.Struct):
    """What is known of a gzip file's members.

    Attributes:
        starts: Compressed and uncompressed offset of the first one after each spacing.
        longest_bytes: Content of the longest one.
    """

    starts: list[tuple[int, int]] = msgspec.field(default_factory=list)
    longest_bytes: int = 0


class MemberStream(Stream):
    """A gzip file from the start of one of its members, noting where others start."""

    def __init__(self, path: Path, start: tuple[int, int] = (0, 0)) -> None:
        self._spacing = spacing_of(path.stat().st_size)
        self._file: IO[bytes] = open_file(path)
        self._file.seek(start[0])
        self._at, self.position = self._start = self._noted = start
        self._raw = b""
        self._member: Any = None
        self._first = True
        self.members = Members()

    def read(self, size: int) -> bytes:
        data = b""
        while size and not data and self._is_in_member():
            data = self._decompress(size)
        return data

    def _is_in_member(self) -> bool:
        while not self._raw or self._member is None:
            self._raw = self._raw or self._file.read(_RAW_BYTES)
            if not self._raw:
                if self._member is not None:
                    raise EOFError("its last gzip member is not whole")
                return False
            if self._member is None:
                self._begin()
        return True

    def _begin(self) -> None:
        # Zeros may follow a member, as on tapes.
        left = self._raw if self._first else self._raw.lstrip(b"\0")
        self._at += len(self._raw) - len(left)
        self._raw = left
        if left:
            self._start, self._first = (self._at, self.position), False
            self._member = zlib.decompressobj(31)

    def _decompress(self, size: int) -> bytes:
        member = self._member
        try:
            data: bytes = member.decompress(self._raw, size)
        except zlib.error as error:
            raise OSError(f"not gzip data, or damaged: {error}") from error
        left = member.unused_data if member.eof else member.unconsumed_tail
        self._at += len(self._raw) - len(left)
        self._raw = left
        if data:
            self._note()
        self.position += len(data)
        if member.eof:
            length = self.position - self._start[1]
            self.members.longest_bytes = max(self.members.longest_bytes, length)
            self._member = None
        return data

    def _note(self) -> None:
        """Note the start of a member, unless one is noted that lies near before it."""
        if self.position == self._start[1] and self.position - self._noted[1] >= self._spacing:
            self._noted = self._start
            self.members.starts.append(self._start)

    def close(self) -> None:
        self._file.close()
