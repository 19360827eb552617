"""The pipeline: validation, unique names, the resumable gate, the fingerprint."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import hpcresume as hr
from hpcresume.errors import NotResumableError, PipelineError


def parse(item: int) -> int:
    return item


class Shuffle(hr.Stage):
    is_resumable = False

    def process(self, item: int) -> int:
        return item


def make(**changes: Any) -> hr.Pipeline:
    arguments = {"name": "p", "sources": hr.indexed(2), "stages": [parse], **changes}
    return hr.Pipeline(**arguments)


def test_stages_get_unique_names() -> None:
    """Stages of one name are numbered from the second on; given names are kept."""

    @hr.stage(name="parse_2")
    def other(item: int) -> int:
        return item

    names = [s.name for s in make(stages=[parse, parse, other, parse, lambda i: i]).stages]

    assert ["parse", "parse_3", "parse_2", "parse_4", "lambda"] == names


def test_one_object_listed_twice_is_two_stages() -> None:
    """Renaming the second occurrence leaves the user's object as it was."""
    shuffle = Shuffle()
    first, second = make(stages=[shuffle, shuffle]).stages

    assert ("shuffle", "shuffle_2") == (first.name, second.name)
    assert first is shuffle
    assert second is not shuffle


def test_not_resumable_names_every_offender() -> None:
    """The gate lists all stages whose output has no single source, not the first."""
    pipeline = make(stages=[Shuffle(), parse, hr.stage(is_resumable=False)(lambda i: i)])

    with pytest.raises(NotResumableError) as caught:
        pipeline.check_resumable()

    assert ["shuffle", "lambda"] == caught.value.fields["stages"]
    assert "shuffle, lambda" in str(caught.value)


def test_resumable_pipelines_pass_the_gate() -> None:
    """A pipeline of ordinary stages is accepted."""
    assert make().check_resumable() is None


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"name": "a b"}, "'a b'"),
        ({"name": ""}, "''"),
        ({"name": ".."}, "'..'"),
        ({"name": "a/b"}, "'a/b'"),
        ({"stages": []}, "no stages"),
        ({"stages": parse}, "not a list"),
        ({"stages": None}, "not a list"),
        ({"stages": "parse"}, "not a list"),
        ({"stages": [3]}, "cannot be called"),
        ({"sources": 3}, "int"),
        ({"sources": "file.txt"}, "str"),
        ({"sources": {"a": 1}}, "dict"),
        ({"tolerate": 1.0}, "tolerate=1.0"),
        ({"tolerate": -0.1}, "tolerate=-0.1"),
        ({"tolerate": "2%"}, "tolerate='2%'"),
        ({"tolerate": float("nan")}, "tolerate=nan"),
        ({"sink": "rows"}, "sink='rows'"),
        ({"finish": 3}, "finish=3"),
        ({"snapshot": "helpers"}, "not a list"),
        ({"snapshot": 3}, "not a list"),
        ({"snapshot": ["helpers", 3]}, "3 is not a path"),
        ({"observer": 3}, "cannot be called"),
        ({"observer": print, "sink": None}, "no rows to tell"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused(changes: dict[str, Any], word: str) -> None:
    """Each wrong argument is an error that shows it."""
    with pytest.raises(PipelineError) as caught:
        make(**changes)
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"schema": {"n": "int64", "a": "nosuch"}}, "'a' has the type 'nosuch'"),
        ({"schema": {"a": 3}}, "'a' has the type 3"),
        ({"size": True}, "size=True"),
    ],
)
def test_parts_that_cannot_be_written_are_refused(arguments: dict[str, Any], word: str) -> None:
    """Before any task has started, not after the first rows."""
    with pytest.raises(PipelineError) as caught:
        hr.Parts("parquet", **arguments)
    assert word in str(caught.value)


def test_types_of_parts_are_names_or_pyarrows_own() -> None:
    """A type without a name, such as a list, is given as an object."""
    import pyarrow as pa

    sink = hr.Parts("parquet", {"a": "string", "b": pa.list_(pa.int32())})

    assert {"a": "string", "b": "list<item: int32>"} == sink.describe()["schema"]


def test_types_are_not_checked_where_pyarrow_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a pipeline is only submitted from, nothing needs it."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    assert {"a": "nosuch"} == hr.Parts("parquet", {"a": "nosuch"}).schema


def write_totals(rows: Any, out: Path) -> None:
    out.write_text(str(sum(rows)))


def test_the_fingerprint_is_json_and_names_what_makes_a_run() -> None:
    """describe() holds name, stages with options, sink, sources, tolerance and finish."""
    described = make(finish=write_totals, tolerate=0.02).describe()

    assert described == json.loads(json.dumps(described))
    assert {"kind": "indexed", "n": 2, "fn": None} == described["sources"]
    assert {"kind": "rows"} == described["sink"]
    assert ("parse", 1) == (
        described["stages"][0]["name"],
        described["stages"][0]["options"]["cpus"],
    )
    assert described["finish"].endswith("write_totals")
    assert 0.02 == described["tolerate"]


def test_a_changed_option_changes_the_fingerprint() -> None:
    """Two pipelines that differ in an option are not the same run."""
    changed = make(stages=[hr.stage(cpus=2)(lambda i: i)])
    same = make(stages=[hr.stage(cpus=1)(lambda i: i)])

    assert changed.describe() != same.describe()


def test_a_pipeline_without_sink_says_so() -> None:
    """sink=None is kept: stages run for their side effects."""
    assert make(sink=None).describe()["sink"] is None
