"""Parameters: conversion by annotation, refusals, files, digests."""

from __future__ import annotations

import datetime as dt
import enum
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NewType, Optional

import pytest

from hpcresume.errors import PipelineError, UsageError
from hpcresume.pipeline.params import (
    convert_parameters,
    parameter_digest,
    read_params_file,
    to_json,
)

if TYPE_CHECKING:
    from nowhere import Missing

    import hpcresume as hr


class Colour(enum.Enum):
    RED = "r"
    BLUE = 2


Words = NewType("Words", int)

GOOD: list[tuple[Any, Any, Any]] = [
    (int, "10", 10),
    (int, "-3", -3),
    (int, 7, 7),
    (float, "1e-3", 0.001),
    (float, 2, 2.0),
    (bool, "true", True),
    (bool, "Yes", True),
    (bool, "1", True),
    (bool, "no", False),
    (bool, "FALSE", False),
    (bool, "0", False),
    (bool, False, False),
    (str, "10", "10"),
    (str, "", ""),
    (Path, "data/in", Path("data/in")),
    (Path, Path("x"), Path("x")),
    (Literal["fast", "slow"], "slow", "slow"),
    (Literal[1, 2], "2", 2),
    (Literal["1", 1], 1, 1),
    (Colour, "RED", Colour.RED),
    (Colour, "2", Colour.BLUE),
    (Colour, "r", Colour.RED),
    (int | None, "none", None),
    (int | None, "3", 3),
    (int | None, None, None),
    (Optional[float], "0.5", 0.5),  # noqa: UP045  # the older spelling is accepted too
    (str | int, "5", 5),
    (str | int, "five", "five"),
    (int | str, "five", "five"),
    (str | int, 5, 5),
    (list[int], "1, 2,3", [1, 2, 3]),
    (list[int], "[1, 2]", [1, 2]),
    (list[int], ["1", 2], [1, 2]),
    (list[Path], "a,b", [Path("a"), Path("b")]),
    (list[str], "", []),
    (list[str], '["a,b", "c"]', ["a,b", "c"]),
    (list, "a,b", ["a", "b"]),
    (Sequence[float], "1,2", [1.0, 2.0]),
    (tuple[int, ...], "1,2", (1, 2)),
    (tuple[str, int], "a,2", ("a", 2)),
    (dict[str, int], '{"a": 1}', {"a": 1}),
    (dict[str, Path], {"a": "x"}, {"a": Path("x")}),
    (Mapping[str, Any], "{}", {}),
    (dt.date, "2024-02-29", dt.date(2024, 2, 29)),
    (dt.datetime, "2024-02-29T10:00:00", dt.datetime(2024, 2, 29, 10)),
    (Words, "12", 12),
    (Annotated[int, "count"], "12", 12),
    (Any, "as it is", "as it is"),
]

BAD: list[tuple[Any, Any, str]] = [
    (int, "ten", "int"),
    (int, "1.5", "int"),
    (int, 1.5, "int"),
    (int, True, "int"),
    (int, None, "int"),
    (float, "fast", "float"),
    (float, [1], "float"),
    (bool, "maybe", "bool"),
    (bool, 1, "bool"),
    (str, 3, "str"),
    (Path, 3, "Path"),
    (Literal["fast", "slow"], "medium", "fast, slow"),
    (Colour, "GREEN", "RED, BLUE"),
    (int | None, "three", "int | None"),
    (list[int], "1,x", "list[int]"),
    (list[int], 3, "list[int]"),
    (list[int], "[1,", "list[int]"),
    (tuple[str, int], "a", "tuple[str, int]"),
    (dict[str, int], "a=1", "dict[str, int]"),
    (dict[str, int], "[1]", "dict[str, int]"),
    (dt.date, "yesterday", "date"),
    (complex, "1j", "complex"),
]


def taking(annotation: Any) -> Callable[..., Any]:
    def fn(value: Any) -> None: ...

    fn.__annotations__ = {"value": annotation}
    return fn


@pytest.mark.parametrize(("annotation", "given", "expected"), GOOD)
def test_values_convert_by_annotation(annotation: Any, given: Any, expected: Any) -> None:
    """A text becomes a value of the annotated type; a value of that type stays."""
    converted = convert_parameters(taking(annotation), {"value": given})["value"]

    assert (expected, type(expected)) == (converted, type(converted))


@pytest.mark.parametrize(("annotation", "given", "expected"), GOOD)
def test_what_is_recorded_converts_to_the_same_again(
    annotation: Any, given: Any, expected: Any
) -> None:
    """The JSON that a run records of a parameter makes the same value in every task."""
    fn = taking(annotation)
    recorded = json.loads(json.dumps(to_json(convert_parameters(fn, {"value": given})["value"])))

    assert {"value": expected} == convert_parameters(fn, {"value": recorded})


@pytest.mark.parametrize(("annotation", "given", "wanted"), BAD)
def test_values_that_do_not_convert_name_parameter_value_and_type(
    annotation: Any, given: Any, wanted: str
) -> None:
    """The error holds the parameter, what was given and what would be right."""
    with pytest.raises(UsageError) as caught:
        convert_parameters(taking(annotation), {"value": given})
    assert [] == [w for w in ("'value'", repr(given), wanted) if w not in str(caught.value)]


def example(root: Path, min_words: int = 10, verbose: bool = False) -> hr.Pipeline: ...


def test_string_annotations_are_evaluated() -> None:
    """`from __future__ import annotations` changes nothing, nor does a type-checker's import."""
    converted = convert_parameters(example, {"root": "x", "min_words": "3", "verbose": "yes"})

    assert {"root": Path("x"), "min_words": 3, "verbose": True} == converted


def test_defaults_are_not_filled_in() -> None:
    """Only what was given is returned, so that a run records what its user chose."""
    assert {"root": Path("x")} == convert_parameters(example, {"root": "x"})


def test_parameters_without_annotation_take_their_defaults_type() -> None:
    """n=10 without annotation makes an integer of "20"."""

    def fn(n=10, name=None): ...

    assert {"n": 20, "name": "20"} == convert_parameters(fn, {"n": "20", "name": "20"})


def test_any_keyword_is_passed_to_a_function_that_takes_any() -> None:
    """With **options nothing is unknown."""

    def fn(n: int = 1, **options: str): ...

    assert {"n": 2, "x": "3"} == convert_parameters(fn, {"n": "2", "x": "3"})


def test_an_unknown_parameter_is_refused_with_a_suggestion_and_the_list() -> None:
    """A misspelt name is answered with the nearest and all others."""
    with pytest.raises(UsageError) as caught:
        convert_parameters(example, {"root": "x", "min_word": "3"})
    assert "Did you mean 'min_words'?" in str(caught.value)
    assert "root, min_words, verbose" in str(caught.value)


def test_a_missing_parameter_is_named() -> None:
    """What has no default has to be given."""
    with pytest.raises(UsageError, match="-P root="):
        convert_parameters(example, {})


def test_an_annotation_that_cannot_be_evaluated_is_named() -> None:
    """A type that exists only for type checkers cannot convert a value."""

    def fn(value: Missing): ...

    with pytest.raises(PipelineError, match=r"'value'.*'Missing'"):
        convert_parameters(fn, {"value": "1"})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.json", '{"n": 3, "names": ["a"]}'),
        ("p.toml", 'n = 3\nnames = ["a"]\n'),
    ],
)
def test_parameter_files_hold_names_and_values(tmp_path: Path, name: str, text: str) -> None:
    """JSON and TOML are read alike."""
    (tmp_path / name).write_text(text)

    assert {"n": 3, "names": ["a"]} == read_params_file(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("p.json", "{", "JSON"),
        ("p.toml", "n =", "TOML"),
        ("p.json", "[1]", "list"),
        ("p.yaml", "n: 3", ".toml"),
        ("missing.json", None, "No such file"),
    ],
)
def test_bad_parameter_files_are_refused(
    tmp_path: Path, name: str, text: str | None, word: str
) -> None:
    """The error names the file and what is wrong with it."""
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError) as caught:
        read_params_file(tmp_path / name)
    assert [] == [w for w in (str(tmp_path / name), word) if w not in str(caught.value)]


def test_the_digest_depends_on_values_and_not_on_order() -> None:
    """The same parameters have the same 8 digits, others have others."""
    digest = parameter_digest({"a": 1, "b": Path("x")})

    assert digest == parameter_digest({"b": "x", "a": 1})
    assert digest != parameter_digest({"a": 2, "b": "x"})
    assert (8, True) == (len(digest), int(digest, 16) >= 0)


def test_values_without_json_are_refused() -> None:
    """A parameter that a run cannot record is an error."""
    with pytest.raises(UsageError, match="object"):
        to_json(object())
