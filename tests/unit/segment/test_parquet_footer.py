"""Row groups that were encoded apart, in one file: pyarrow reads what went in."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcresume.errors import CorruptDataError
from hpcresume.segment.parquet_footer import (
    MAGIC,
    FooterJoiner,
    decode,
    encode,
    split,
    tail,
    whole,
)
from hpcresume.sinks.packing import encode_row_group

KINDS = {
    "n": pa.int64(), "x": pa.float32(), "flag": pa.bool_(), "text": pa.string(),
    "raw": pa.binary(), "when": pa.timestamp("us", "UTC"), "money": pa.decimal128(12, 2),
    "words": pa.list_(pa.string()), "inner": pa.struct([("a", pa.int32()), ("b", pa.string())]),
    "tag": pa.dictionary(pa.int32(), pa.string()),
}  # fmt: skip


def joined(tables: list[pa.Table]) -> bytes:
    """Encode tables apart and join them in one file."""
    joiner, pages, offset = FooterJoiner(), [], len(MAGIC)
    for table in tables:
        body, footer = split(encode_row_group(table))
        joiner.add(footer, offset)
        pages.append(body)
        offset += len(body)
    return b"".join((MAGIC, *pages, tail(joiner.footer())))


def made(kind: pa.DataType, rows: int, seed: int) -> pa.Array:
    """Return an array of a kind, a third of it null."""
    values: list[Any] = [
        None if (i + seed) % 3 == 0 else value_of(kind, i * 7 + seed) for i in range(rows)
    ]
    return pa.array(values, type=kind)


def value_of(kind: pa.DataType, n: int) -> Any:
    if pa.types.is_list(kind):
        return [f"w{i}" for i in range(n % 4)]
    if pa.types.is_struct(kind):
        return {"a": n % 100, "b": f"b{n}"}
    if pa.types.is_boolean(kind):
        return n % 2 == 0
    if pa.types.is_string(kind) or pa.types.is_dictionary(kind):
        return f"text {n % 11}"
    return str(n).encode() if pa.types.is_binary(kind) else n % 1000


@settings(max_examples=25, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=6, unique=True),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=20),
)
def test_joined_row_groups_read_as_one_table(names: list[str], sizes: list[int]) -> None:
    """Whatever the columns, the joined file holds the rows of all, in order, one group each."""
    schema = pa.schema([(name, KINDS[name]) for name in names])
    tables = [
        pa.table([made(KINDS[name], size, seed) for name in names], schema=schema)
        for seed, size in enumerate(sizes)
    ]

    file = pq.ParquetFile(io.BytesIO(joined(tables)))

    assert pa.concat_tables(tables).to_pylist() == file.read().to_pylist()
    assert sizes == [file.metadata.row_group(i).num_rows for i in range(len(sizes))]
    groups = [file.read_row_group(i).to_pylist() for i in range(len(sizes))]
    assert [table.to_pylist() for table in tables] == groups
    assert schema == file.schema_arrow


def test_statistics_survive() -> None:
    """A reader that skips row groups by their statistics still can."""
    tables = [pa.table({"n": [i, i + 1]}) for i in (0, 100, 200)]
    metadata = pq.ParquetFile(io.BytesIO(joined(tables))).metadata
    found = [metadata.row_group(i).column(0).statistics for i in range(3)]
    assert [(0, 1), (100, 101), (200, 201)] == [(s.min, s.max) for s in found]


def test_a_small_file_comes_back_whole() -> None:
    """Pages and footer put together again are the file they came from, byte by byte."""
    data = encode_row_group(pa.table({"n": [1, 2], "s": ["a", None]}))
    assert data == whole(*split(data))
    footer = split(data)[1]
    assert footer == encode(decode(footer))


def test_different_schemas_are_refused() -> None:
    """Row groups of two schemas make no file."""
    joiner = FooterJoiner()
    joiner.add(split(encode_row_group(pa.table({"n": [1]})))[1], 4)
    with pytest.raises(CorruptDataError, match="another schema"):
        joiner.add(split(encode_row_group(pa.table({"n": ["a"]})))[1], 100)


def test_damage_is_told_or_harmless() -> None:
    """Every truncation and every flipped byte of a footer decodes, or raises the typed error."""
    footer = split(encode_row_group(pa.table({"n": [1, 2], "s": ["a", "b"]})))[1]
    cases = [footer[:n] for n in range(len(footer))]
    cases += [footer[:n] + bytes([footer[n] ^ 0xFF]) + footer[n + 1 :] for n in range(len(footer))]
    refused = 0
    for data in cases:
        try:
            FooterJoiner().add(data, 4)
        except CorruptDataError:
            refused += 1
    assert refused >= len(footer)


@pytest.mark.parametrize("data", [b"", b"PAR1PAR1", b"PAR1" + b"\xff\xff\xff\x7fPAR1", b"x" * 40])
def test_what_is_no_parquet_is_refused(data: bytes) -> None:
    """Bytes that are no Parquet file raise the typed error."""
    with pytest.raises(CorruptDataError, match="no Parquet"):
        split(data)
