"""Join Parquet row groups that were encoded apart, without touching their pages.

A Parquet file is ``PAR1 | pages | footer | u32 footer length | PAR1``, and only the footer says
where pages lie.  Workers encode row groups as small files of their own; a part holds the pages
of many, one after another, and one footer whose offsets are moved by where they came to lie.

The footer is Thrift's compact protocol, read and written here as a tree of field numbers, so
that fields of later versions of the format pass through unseen.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from hpcresume.errors import CorruptDataError

MAGIC = b"PAR1"
_LENGTH = struct.Struct("<I")
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_MAX_DEPTH = 32

# Field numbers of parquet.thrift.
_SCHEMA, _NUM_ROWS, _ROW_GROUPS, _METADATA = 2, 3, 4, 5
_COLUMNS, _GROUP_OFFSET, _ORDINAL = 1, 5, 7
_CHUNK_OFFSETS, _CHUNK_META = (2, 4, 6), 3
_META_OFFSETS = (9, 10, 11, 14)

Struct = dict[int, tuple[int, Any]]
"""Field number -> type and value."""


def split(data: bytes) -> tuple[bytes, bytes]:
    """Return the pages and the footer of a small Parquet file.

    Raises:
        CorruptDataError: It is none.
    """
    if len(data) < 12 or data[:4] != MAGIC or data[-4:] != MAGIC:
        raise _corrupt("it neither begins nor ends as one")
    (length,) = _LENGTH.unpack(data[-8:-4])
    if length > len(data) - 12:
        raise _corrupt("its footer is longer than the file")
    return data[4 : -8 - length], data[-8 - length : -8]


def whole(pages: bytes, footer: bytes) -> bytes:
    """Return the small Parquet file that :func:`split` took apart."""
    return b"".join((MAGIC, pages, tail(footer)))


def tail(footer: bytes) -> bytes:
    """Return what follows the pages."""
    return footer + _LENGTH.pack(len(footer)) + MAGIC


class FooterJoiner(msgspec.Struct):
    """Collects the footers of row groups; :meth:`footer` is that of all of them in one file."""

    _first: Struct = msgspec.field(default_factory=dict)
    _groups: list[Struct] = msgspec.field(default_factory=list)
    _rows: int = 0

    def add(self, footer: bytes, offset: int) -> None:
        """Take in the footer of a small file whose pages lie from ``offset`` on.

        Raises:
            CorruptDataError: It is no footer, or has another schema than those before.
        """
        found = decode(footer)
        try:
            groups, rows = found[_ROW_GROUPS][1][1], found[_NUM_ROWS][1]
            for group in groups:
                _move(group, offset - len(MAGIC), len(self._groups))
                self._groups.append(group)
        except (KeyError, TypeError, IndexError) as error:
            raise _corrupt(f"its footer lacks a field ({error})") from error
        if not self._first:
            self._first = found
        elif any(found.get(n) != self._first.get(n) for n in (_SCHEMA, _METADATA)):
            raise _corrupt("it has another schema than the row groups before it")
        self._rows += rows

    def footer(self) -> bytes:
        """Return the footer of the joined file."""
        joined = dict(self._first)
        joined[_NUM_ROWS] = (_I64, self._rows)
        joined[_ROW_GROUPS] = (_LIST, (_STRUCT, self._groups))
        return encode(joined)


def _move(group: Struct, by: int, number: int) -> None:
    """Move a row group's offsets; a 0 stands for none."""

    def shift(where: Struct, fields: tuple[int, ...]) -> None:
        for n in fields:
            if n in where and where[n][1]:
                where[n] = (where[n][0], where[n][1] + by)

    shift(group, (_GROUP_OFFSET,))
    for column in group[_COLUMNS][1][1]:
        shift(column, _CHUNK_OFFSETS)
        shift(column[_CHUNK_META][1], _META_OFFSETS)
    if _ORDINAL in group:
        if number < 1 << 15:
            group[_ORDINAL] = (_I16, number)
        else:
            del group[_ORDINAL]


def decode(data: bytes) -> Struct:
    """Return a struct of Thrift's compact protocol.

    Raises:
        CorruptDataError: The bytes are none.
    """
    reader = _Reader(data)
    try:
        return reader.struct(0)
    except (IndexError, struct.error, KeyError) as error:
        raise _corrupt(f"its footer cannot be decoded ({error!r})") from error


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _varint(self) -> int:
        result = shift = 0
        while True:
            byte = self._byte()
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                return result
            shift += 7

    def _zigzag(self) -> int:
        n = self._varint()
        return (n >> 1) ^ -(n & 1)

    def struct(self, depth: int) -> Struct:
        found: Struct = {}
        number = 0
        while head := self._byte():
            kind, delta = head & 0x0F, head >> 4
            number = number + delta if delta else self._zigzag()
            found[number] = (kind, self._value(kind, depth))
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (_TRUE, _FALSE):
            return kind == _TRUE
        if kind in (_I16, _I32, _I64):
            return self._zigzag()
        if kind == _BINARY:
            return self._bytes(self._varint())
        if kind == _BYTE:
            return self._byte()
        if kind == _DOUBLE:
            return self._bytes(8)
        if depth >= _MAX_DEPTH or kind not in (_LIST, _SET, _STRUCT):
            raise _corrupt(f"its footer holds a value of type {kind} at depth {depth}")
        return self.struct(depth + 1) if kind == _STRUCT else self._list(depth)

    def _list(self, depth: int) -> tuple[int, list[Any]]:
        head = self._byte()
        kind, count = head & 0x0F, head >> 4
        count = self._varint() if count == 15 else count
        if count > len(self._data):
            raise _corrupt("its footer holds a list longer than itself")
        if kind in (_TRUE, _FALSE):
            return kind, [self._byte() for _ in range(count)]
        return kind, [self._value(kind, depth + 1) for _ in range(count)]

    def _bytes(self, length: int) -> bytes:
        found = self._data[self._at : self._at + length]
        if len(found) != length:
            raise IndexError("the end")
        self._at += length
        return found


def encode(value: Struct) -> bytes:
    """Return a struct in Thrift's compact protocol."""
    out = bytearray()
    _write_struct(out, value)
    return bytes(out)


def _write_varint(out: bytearray, n: int) -> None:
    while n >= 0x80:
        out.append((n & 0x7F) | 0x80)
        n >>= 7
    out.append(n)


def _write_zigzag(out: bytearray, n: int) -> None:
    _write_varint(out, n << 1 if n >= 0 else (-n << 1) - 1)


def _write_struct(out: bytearray, fields: Struct) -> None:
    last = 0
    for number in sorted(fields):
        kind, value = fields[number]
        if kind in (_TRUE, _FALSE):
            kind = _TRUE if value else _FALSE
        delta = number - last
        if 0 < delta < 16:
            out.append(delta << 4 | kind)
        else:
            out.append(kind)
            _write_zigzag(out, number)
        last = number
        if kind not in (_TRUE, _FALSE):
            _write_value(out, kind, value)
    out.append(0)


def _write_value(out: bytearray, kind: int, value: Any) -> None:
    if kind in (_I16, _I32, _I64):
        _write_zigzag(out, value)
    elif kind == _BINARY:
        _write_varint(out, len(value))
        out += value
    elif kind in (_BYTE, _TRUE, _FALSE):
        out.append(value)
    elif kind == _DOUBLE:
        out += value
    elif kind == _STRUCT:
        _write_struct(out, value)
    else:
        inner, values = value
        if len(values) < 15:
            out.append(len(values) << 4 | inner)
        else:
            out.append(0xF0 | inner)
            _write_varint(out, len(values))
        for entry in values:
            _write_value(out, inner, entry)


def _corrupt(why: str) -> CorruptDataError:
    return CorruptDataError(
        f"an encoded row group is no Parquet of ours: {why}. "
        "It is set aside and its sources are computed again.",
        why=why,
    )
