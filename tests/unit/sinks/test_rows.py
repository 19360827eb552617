"""Rows: what JSON holds, and what is refused by name."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import sys
import tracemalloc
import types
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcresume.errors import RowError
from hpcresume.sinks.rows import encode_lines, encode_row, joined

NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=20,
)


@given(JSON)
def test_json_values_come_back_on_one_line(value: Any) -> None:
    """Every JSON value, integers of any size included, is one line that reads back equal."""
    row = encode_row(value)
    assert b"\n" not in row
    assert value == json.loads(row)
    with contextlib.suppress(RowError):  # integers of any size are for encode_row
        assert [row + b"\n"] * 2 == encode_lines([value, value])


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [1, x], lambda x: {"a": {"b": (x,)}}])
@pytest.mark.parametrize("beside", [1, 2**70])
def test_numbers_without_a_json_form_are_refused(number: float, wrap: Any, beside: int) -> None:
    """NaN and infinity are refused wherever they are, never written as null."""
    with pytest.raises(RowError):
        encode_row([beside, wrap(number)])
    with pytest.raises(RowError):
        encode_lines([1, [beside, wrap(number)]])


@pytest.mark.parametrize("odd", [float("nan"), [float("inf")], {"b": (float("-inf"),)}])
def test_among_long_rows_they_are_refused_too(odd: Any) -> None:
    """What a long row was made of is looked at; one that holds only text and null is a row."""
    rows = [{"text": "x" * 2000, "k": k, "none": None, "yes": True} for k in range(100)]
    assert [encode_row(row) + b"\n" for row in rows] == encode_lines(rows)
    for bad in ({"text": "x" * 2000, "odd": odd}, odd):
        with pytest.raises(RowError):
            encode_lines([*rows, bad])
        with pytest.raises(RowError):
            encode_lines([bad, *rows])


@given(st.lists(st.binary(max_size=1 << 10).map(lambda data: data + b"\n"), max_size=300))
def test_pieces_are_all_lines(lines: list[bytes]) -> None:
    """Lines joined to pieces are the same bytes, whatever their lengths."""
    assert b"".join(lines) == b"".join(joined(lines))


def test_null_is_a_value() -> None:
    """None, and the text null, are rows like others."""
    assert b'{"a":null,"b":"null"}' == encode_row({"a": None, "b": "null"})


def test_rows_hold_no_more_than_their_bytes() -> None:
    """Rows of a source that fans out widely wait in memory, and cost what they are long."""
    tracemalloc.start()
    try:
        rows = [encode_row({"k": k}) for k in range(1000)]
        rows += encode_lines([{"k": k} for k in range(1000)])
        assert tracemalloc.get_traced_memory()[0] < 200 * len(rows)
    finally:
        tracemalloc.stop()


Point = namedtuple("Point", "x")  # noqa: PYI024  # as users write it


@dataclass
class Record:
    """A dataclass."""

    x: int = 1


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (object(), "object"),
        (b"bytes", "bytes"),
        ({1}, "set"),
        (dt.date(2026, 1, 1), "date"),
        (Point(1), "Point"),
        (Record(), "Record"),
        (1j, "complex"),
        (range(2), "range"),
    ],
)
def test_types_without_a_json_form_are_named(value: Any, name: str) -> None:
    """The message names the type, also beside an integer that takes the slow path."""
    for row in (value, {"deep": [value]}, [2**70, {"a": value}] if name != "Point" else [value]):
        with pytest.raises(RowError, match=name):
            encode_row(row)


def test_keys_have_to_be_text() -> None:
    """A key that is no string is refused rather than changed into one."""
    with pytest.raises(RowError, match="str"):
        encode_row({1: 2})
    with pytest.raises(RowError, match="str"):
        encode_row({1: 2**70})


def test_what_is_nested_too_deep_is_refused() -> None:
    """A value that refers to itself is an error, not a crash."""
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(RowError):
        encode_row(loop)
    deep: Any = 2**70
    for _ in range(sys.getrecursionlimit() + 100):
        deep = [deep]
    with pytest.raises(RowError):
        encode_row(deep)


def _like_numpy(value: Any) -> Any:
    """Return an object of a type that says it is numpy's."""
    kind = types.new_class("ndarray")
    kind.__module__ = "numpy"
    kind.tolist = lambda _self: value  # type: ignore[attr-defined]
    return kind()


def test_numpy_values_become_numbers_and_lists() -> None:
    """Scalars and arrays of numpy are converted; NaN in them is refused."""
    assert b'{"a":[1,2],"b":1.5}' == encode_row({"a": _like_numpy([1, 2]), "b": _like_numpy(1.5)})
    for bad in (float("nan"), [0.0, float("nan")]):
        with pytest.raises(RowError):
            encode_row({"a": _like_numpy(bad)})
    with pytest.raises(RowError, match="object"):
        encode_row(_like_numpy(object()))


def test_real_numpy_values() -> None:
    """The same with numpy itself, where it is installed."""
    numpy = pytest.importorskip("numpy")
    row = {"a": numpy.arange(3), "b": numpy.float32(0.5), "c": numpy.int64(7), "d": numpy.bool_(1)}
    assert b'{"a":[0,1,2],"b":0.5,"c":7,"d":true}' == encode_row(row)
    with pytest.raises(RowError):
        encode_row({"a": numpy.array([numpy.nan])})
