"""Identifiers of items, sources and runs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcresume.ids import (
    ROOT,
    ItemPath,
    child,
    decode_path,
    encode_path,
    item_id,
    new_run_id,
    parse_item_id,
    source_digest,
)

paths = st.lists(st.integers(0, 10**9), max_size=6).map(lambda n: ItemPath(tuple(n)))
names = st.text(st.characters(exclude_characters="/"), min_size=1, max_size=8)


def test_an_item_id_shows_its_steps() -> None:
    """The id is the source's id and one step for each stage."""
    path = child(child(ROOT, 0), 3)
    assert "a.py/parse.0/functions.3" == item_id("a.py", ["parse", "functions"], path)
    assert "a.py" == item_id("a.py", ["parse"], ROOT)


@given(st.text(max_size=20), st.lists(st.tuples(names, st.integers(0, 10**9)), max_size=5))
def test_an_item_id_is_parsed_back(source: str, steps: list[tuple[str, int]]) -> None:
    """Whatever the source's id holds (slashes, dots, digits), its item ids come apart again."""
    path = ItemPath(tuple(n for _, n in steps))
    item = item_id(source, [name for name, _ in steps], path)
    assert (source, path) == parse_item_id(item, depth=len(steps))


@pytest.mark.parametrize("text", ["", "a", "a/b", "a/b.", "a/b.x", "a/b.-1"])
def test_a_malformed_item_id_is_refused(text: str) -> None:
    """Too few steps, or a step without a number, raise ValueError."""
    with pytest.raises(ValueError, match="item id"):
        parse_item_id(text, depth=1)


@given(paths)
def test_a_path_is_decoded_as_encoded(path: ItemPath) -> None:
    """Text and path are two forms of the same thing."""
    assert path == decode_path(encode_path(path))


@given(st.text(st.characters(), max_size=20), st.text(st.characters(), max_size=20))
def test_ids_that_differ_have_digests_that_differ(first: str, second: str) -> None:
    """`train_001` and `test_001` share nothing; only equal ids are equal."""
    assert (first == second) == (source_digest(first) == source_digest(second))


def test_any_text_has_a_digest() -> None:
    """File names that are not UTF-8 have one too, of 16 bytes."""
    assert 16 == len(source_digest("\udcff"))


def test_run_ids_are_random() -> None:
    """A thousand run ids are a thousand different ones of 16 hexadecimal digits."""
    ids = {new_run_id() for _ in range(1000)}
    assert 1000 == len(ids)
    assert all(len(i) == 16 and int(i, 16) >= 0 for i in ids)
