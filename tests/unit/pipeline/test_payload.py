"""Payloads survive storage exactly, or are refused with the type's name."""

import dataclasses
import datetime as dt
import enum
import os
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcresume.errors import CorruptDataError, SourcesError
from hpcresume.pipeline.sources import decode_payload, encode_payload

texts = st.text(st.characters(exclude_categories=["Cs"]))
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
payloads = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=20
)
names = st.binary(min_size=1).filter(lambda raw: b"\0" not in raw)


@given(payloads)
def test_json_values_come_back_as_they_were(payload: Any) -> None:
    """What JSON can hold is equal after the round trip, with the same types."""
    again = decode_payload(encode_payload(payload))

    assert repr(payload) == repr(again)


@given(names)
def test_paths_come_back_as_they_were(raw: bytes) -> None:
    """A path keeps its bytes, also where they are no text."""
    path = Path(os.fsdecode(raw))

    assert path == decode_payload(encode_payload(path))


def test_tuples_become_lists() -> None:
    """JSON knows one kind of sequence."""
    assert [1, [2, 3]] == decode_payload(encode_payload((1, (2, 3))))


class Colour(enum.Enum):
    RED = 1


class Count(int):
    pass


@dataclasses.dataclass
class Doc:
    text: str


@pytest.mark.parametrize(
    ("payload", "word"),
    [
        (float("nan"), "nan"),
        ([1, {"a": float("inf")}], "inf"),
        (b"bytes", "bytes"),
        ({1, 2}, "set"),
        (object(), "object"),
        (Doc("x"), "Doc"),
        (Colour.RED, "Colour"),
        (Count(3), "Count"),
        (uuid.UUID(int=1), "UUID"),
        (dt.date(2024, 1, 1), "date"),
        ({"path": Path("x")}, "Path"),
        ({1: "a"}, "key 1"),
        (2**64, "64"),
        ("\ud800", "surrogates"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_source_and_type(payload: Any, word: str) -> None:
    """Nothing is converted in silence: every attempt must see what the listing saw."""
    with pytest.raises(SourcesError) as caught:
        encode_payload(payload, source_id="s1")
    assert [] == [w for w in ("'s1'", word) if w not in str(caught.value)]


@pytest.mark.parametrize("data", [b"", b"x1", b"j{", b"j"])
def test_bytes_that_are_no_payload_are_refused(data: bytes) -> None:
    """A damaged manifest is told, not decoded to something."""
    with pytest.raises(CorruptDataError):
        decode_payload(data)
