"""Sources: ids, order, payloads, streaming, fingerprints, growth, refusals."""

import gzip
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hpcresume as hr
from hpcresume.errors import PipelineError, SourcesError
from hpcresume.pipeline.sources import SourceList, as_sources


def ids(sources: SourceList) -> list[str]:
    return [source.id for source in sources]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory with files at several depths, a link to a directory and one to a file."""
    root = tmp_path / "tree"
    for name in ("b.txt", "a/x.txt", "a/b/y.txt", "a-b.txt", "a/z.py", "lib/site/s.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "empty.txt").touch()
    (root / "loop").symlink_to(root)
    (root / "link.txt").symlink_to(root / "b.txt")
    os.mkfifo(root / "pipe.txt")
    return root


def test_files_are_sorted_regular_files(tree: Path) -> None:
    """Order is that of sorted paths; directories, links to them and pipes are left out."""
    found = list(hr.files(tree))
    expected = sorted(
        tree / name
        for name in (
            "b.txt",
            "a/x.txt",
            "a/b/y.txt",
            "a-b.txt",
            "a/z.py",
            "lib/site/s.txt",
            "empty.txt",
            "link.txt",
        )
    )

    assert expected == [source.payload for source in found]
    assert [p.relative_to(tree).as_posix() for p in expected] == [s.id for s in found]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["a-b.txt", "b.txt", "empty.txt", "link.txt"]),
        ("**/*.py", ["a/z.py"]),
        ("a/*", ["a/x.txt", "a/z.py"]),
        ("a/**", ["a/b/y.txt", "a/x.txt", "a/z.py"]),
        ("?.txt", ["b.txt"]),
        ("**/[xy].txt", ["a/b/y.txt", "a/x.txt"]),
        ("a/[!x].*", ["a/z.py"]),
        ("*.nothing", []),
    ],
)
def test_patterns_match_the_relative_path(tree: Path, pattern: str, expected: list[str]) -> None:
    """A star stays within one directory, `**/` is any number of them."""
    assert expected == ids(hr.files(tree, pattern))


@pytest.mark.parametrize(
    ("exclude", "left_out"),
    [
        (["**/site/**"], {"lib/site/s.txt"}),
        (["lib/**"], {"lib/site/s.txt"}),
        (["a/x*"], {"a/x.txt"}),
        (["**/b"], {"a/b/y.txt"}),
        (["b.txt", "a/**"], {"b.txt", "a/x.txt", "a/z.py", "a/b/y.txt"}),
    ],
)
def test_exclude_leaves_out_what_matches(
    tree: Path, exclude: list[str], left_out: set[str]
) -> None:
    """Globs of files, of directories and of whole trees are left out; nothing else is."""
    everything = set(ids(hr.files(tree)))

    assert everything - left_out == set(ids(hr.files(tree, exclude=exclude)))


def test_an_excluded_tree_is_not_read(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dir/**` saves the listing of the directory, which may be large or unreadable."""
    read: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda p: read.append(os.fspath(p)) or scandir(p))

    list(hr.files(tree, exclude=["lib/**"]))

    assert str(tree / "a" / "b") in read
    assert str(tree / "lib") not in read


def test_file_weights_are_sizes(tree: Path) -> None:
    """The expected cost of a file is its size, and never 0."""
    weights = {source.id: source.weight for source in hr.files(tree, "*.txt")}

    assert {"a-b.txt": 7.0, "b.txt": 5.0, "empty.txt": 1.0, "link.txt": 5.0} == weights


@pytest.mark.parametrize("kind", ["path+size", "digest"])
def test_ids_can_follow_the_content(tree: Path, kind: Any) -> None:
    """With size or digest in its id a changed file is a new source, the others are not."""
    before = ids(hr.files(tree, "a/*", id=kind))
    (tree / "a/x.txt").write_text("changed content")
    after = ids(hr.files(tree, "a/*", id=kind))

    assert ["a/x.txt", "a/z.py"] == [i.partition("@")[0] for i in after]
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_names_that_are_no_text_have_ids_that_json_holds(tmp_path: Path) -> None:
    """A file name of arbitrary bytes is escaped in the id and exact in the payload."""
    raw = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    Path(os.fsdecode(raw)).write_text("x")
    (source,) = hr.files(tmp_path)

    assert "caf\\xe9.txt" == source.id
    assert raw == os.fsencode(source.payload)


def test_a_missing_directory_is_an_error_when_listed(tmp_path: Path) -> None:
    """Declaring it is not: a node builds the pipeline without listing."""
    sources = hr.files(tmp_path / "missing")

    with pytest.raises(SourcesError, match="missing is not a directory"):
        list(sources)


def test_a_wrong_kind_of_file_id_is_refused(tmp_path: Path) -> None:
    """The error lists the choices."""
    with pytest.raises(PipelineError, match=r"path\+size"):
        hr.files(tmp_path, id="name")  # type: ignore[arg-type]


def test_lines_are_identified_by_position(tmp_path: Path) -> None:
    """Line ends are not part of the text; blank lines count, a missing last end does not."""
    path = tmp_path / "in.txt"
    path.write_bytes("\ufeffeins\r\nzwei\n\nvier".encode())

    assert [("in.txt#0", "eins"), ("in.txt#1", "zwei"), ("in.txt#2", ""), ("in.txt#3", "vier")] == [
        (s.id, s.payload) for s in hr.lines(path)
    ]


def test_compressed_lines_are_read(tmp_path: Path) -> None:
    """A .gz file is decompressed on the way."""
    path = tmp_path / "in.txt.gz"
    path.write_bytes(gzip.compress(b"a\nb\n"))

    assert ["a", "b"] == [s.payload for s in hr.lines(path)]


def test_a_torn_gzip_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    """Half a file is not taken for a whole one."""
    path = tmp_path / "in.txt.gz"
    path.write_bytes(gzip.compress(os.urandom(5000).hex().encode())[:-100])

    with pytest.raises(SourcesError, match=r"in\.txt\.gz cannot be read"):
        list(hr.lines(path))


def test_lines_that_are_no_text_name_file_and_line(tmp_path: Path) -> None:
    """The error points at the line."""
    path = tmp_path / "in.txt"
    path.write_bytes(b"good\nb\xe9d\n")

    with pytest.raises(SourcesError, match=r"in\.txt:2"):
        list(hr.lines(path))


ROWS = [{"key": "a", "n": 1}, {"key": "b", "n": 2}]


def write_rows(path: Path) -> Path:
    if path.name.endswith("jsonl"):
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    elif path.name.endswith("jsonl.gz"):
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    elif path.suffix == ".csv":
        path.write_text('key,n\r\n"a",1\r\nb,2\r\n')
    elif path.suffix == ".tsv":
        path.write_text("key\tn\na\t1\nb\t2\n")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "csv", "tsv", "parquet"])
def test_rows_are_read_by_suffix(tmp_path: Path, suffix: str) -> None:
    """Every format gives the same rows; CSV and TSV know texts only."""
    path = write_rows(tmp_path / f"in.{suffix}")
    rows = [{**r, "n": str(r["n"])} for r in ROWS] if suffix in ("csv", "tsv") else ROWS

    assert rows == [s.payload for s in hr.rows(path)]
    assert [f"in.{suffix}#0", f"in.{suffix}#1"] == ids(hr.rows(path))
    assert ["a", "b"] == ids(hr.rows(path, id="key"))
    assert ["1", "2"] == ids(hr.rows(path, id="n"))


def test_a_quoted_field_may_hold_line_ends(tmp_path: Path) -> None:
    """A CSV record is not a line."""
    path = tmp_path / "in.csv"
    path.write_text('key,text\na,"one\ntwo"\nb,three\n')

    assert ["one\ntwo", "three"] == [s.payload["text"] for s in hr.rows(path)]


@pytest.mark.parametrize(
    ("name", "text", "column", "words"),
    [
        ("in.jsonl", '{"a": 1}\n{"a": \n', None, ["in.jsonl:2", "not JSON"]),
        ("in.jsonl", '{"a": 1}\n{"b": 1}\n', "a", ["row 1", "'a'", "Columns are: b"]),
        ("in.jsonl", '{"name": 1}\n', "nmae", ["Did you mean 'name'?"]),
        ("in.jsonl", '{"a": null}\n', "a", ["None"]),
        ("in.jsonl", '{"a": 1.5}\n', "a", ["1.5"]),
        ("in.jsonl", '{"a": true}\n', "a", ["True"]),
        ("in.jsonl", '"text"\n', "a", ["no object"]),
        ("in.csv", "a,b\n1,2\n3\n", None, ["in.csv:3"]),
        ("in.csv", "a,b\n1,2,3\n", None, ["in.csv:2", "2 columns"]),
        ("in.parquet", "no parquet", None, ["in.parquet", "Parquet"]),
    ],
)
def test_bad_rows_are_refused_where_they_are(
    tmp_path: Path, name: str, text: str, column: str | None, words: list[str]
) -> None:
    """The error names file, place and reason."""
    (tmp_path / name).write_text(text)
    with pytest.raises(SourcesError) as caught:
        list(hr.rows(tmp_path / name, id=column))
    assert [] == [word for word in words if word not in str(caught.value)]


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    """The suffix decides unless a format is given."""
    with pytest.raises(SourcesError, match=r"\.jsonl"):
        hr.rows(tmp_path / "in.xlsx")
    assert "jsonl" == hr.rows(tmp_path / "in.data", format="jsonl").format


def test_compressed_parquet_is_refused_at_once(tmp_path: Path) -> None:
    """Its suffix is known, but nothing can read it; a format that is given decides."""
    with pytest.raises(PipelineError, match=r"in\.parquet\.gz.*Decompress it"):
        hr.rows(tmp_path / "in.parquet.gz")
    assert "jsonl" == hr.rows(tmp_path / "in.parquet.gz", format="jsonl").format


@pytest.mark.parametrize("make", [hr.lines, lambda p: hr.rows(p, format="jsonl")])
def test_a_missing_file_is_an_error_when_listed(tmp_path: Path, make: Any) -> None:
    """The error names the file."""
    with pytest.raises(SourcesError, match="missing cannot be read"):
        list(make(tmp_path / "missing"))


def test_indexed_sources_are_integers() -> None:
    """Ids are the integers' texts; payloads come from the function, made when asked for."""
    squares = hr.indexed(10**9, lambda i: i * i)

    assert (10**9, 49, 7) == (len(squares), squares.payload(7), hr.indexed(9).payload(7))
    assert [("0", 0), ("1", 1), ("2", 4)] == [
        (s.id, s.payload) for s in itertools.islice(squares, 3)
    ]
    assert [] == list(hr.indexed(0))


@pytest.mark.parametrize("arguments", [(-1,), (True,), (2.0,), ("3",), (3, 4)])
def test_wrong_indexed_arguments_are_refused(arguments: tuple[Any, ...]) -> None:
    """A number of sources is an integer of 0 or more."""
    with pytest.raises(PipelineError):
        hr.indexed(*arguments)


def test_iterables_of_ids_pairs_and_sources_are_sources() -> None:
    """An id alone is its own payload."""
    listed = as_sources(["a", ("b", 2), hr.Source("c", 3, weight=5)])

    assert [("a", "a", 1), ("b", 2, 1), ("c", 3, 5)] == [
        (s.id, s.payload, s.weight) for s in listed
    ]


@pytest.mark.parametrize("item", [3, ("a", 1, 2), (1, "a"), "", hr.Source(""), None])
def test_items_that_are_no_source_are_refused(item: Any) -> None:
    """The error says which one, and what it was."""
    with pytest.raises(SourcesError, match="number 1"):
        list(as_sources(["a", item]))


def endless() -> Iterator[str]:
    return (f"s{n}" for n in itertools.count())


def test_an_infinite_generator_is_read_only_as_far_as_needed() -> None:
    """Listing streams: the first sources are there before the last ones exist."""
    for sources in (as_sources(endless()), as_sources(endless)):
        assert ["s0", "s1", "s2"] == [s.id for s in itertools.islice(sources, 3)]


def test_lines_are_read_only_as_far_as_needed(tmp_path: Path) -> None:
    """A bad line far down does not keep the first ones from being listed."""
    path = tmp_path / "in.txt"
    path.write_bytes(b"a\n" * 100_000 + b"\xff\n")

    assert 100_000 == len(list(itertools.islice(hr.lines(path), 100_000)))


def test_a_generator_is_listed_once() -> None:
    """A second listing would silently be empty, so it is an error."""
    sources = as_sources(iter(["a"]))

    assert ["a"] == ids(sources)
    with pytest.raises(SourcesError, match="already listed"):
        ids(sources)


def test_a_function_is_called_at_each_listing() -> None:
    """Not before the sources are needed, and anew each time."""
    calls: list[int] = []

    def listed() -> list[str]:
        calls.append(1)
        return ["a"]

    sources = as_sources(listed)
    assert [] == calls
    assert [["a"], ["a"]] == [ids(sources), ids(sources)]
    assert [1, 1] == calls


def test_a_function_may_return_declared_sources(tmp_path: Path) -> None:
    """A function that chooses among source lists is fine."""
    (tmp_path / "a").touch()

    assert ["a"] == ids(as_sources(lambda: hr.files(tmp_path)))


def test_descriptions_are_json(tree: Path) -> None:
    """Every kind of source goes into the fingerprint."""
    (tree / "rows.jsonl").write_text("{}\n")
    every = [
        hr.files(tree),
        hr.lines(tree / "b.txt"),
        hr.rows(tree / "rows.jsonl"),
        hr.rows(tree / "rows.jsonl", id="key"),
        hr.indexed(3, str),
        as_sources(["a"]),
        as_sources(endless),
    ]
    described = [s.describe() for s in every]

    assert described == json.loads(json.dumps(described))
    assert len(every) == len({json.dumps(d) for d in described})
    assert [True] * len(every) == [s.grew_from(d) for s, d in zip(every, described, strict=True)]


@pytest.mark.parametrize(
    ("after", "grew"),
    [(b"a\nb\nc\n", True), (b"a\nb\n", True), (b"a\n", False), (b"a\nX\nc\n", False)],
)
def test_appending_to_a_file_of_lines_is_growth(tmp_path: Path, after: bytes, grew: bool) -> None:
    """Positions stay only where the old content is the beginning of the new."""
    path = tmp_path / "in.txt"
    path.write_bytes(b"a\nb\n")
    before = hr.lines(path).describe()
    path.write_bytes(after)

    assert grew is hr.lines(path).grew_from(before)


def test_rows_with_ids_may_change_in_any_way(tmp_path: Path) -> None:
    """With ids of their own, rows are compared one by one and not by the file."""
    path = tmp_path / "in.jsonl"
    path.write_text('{"k": 1}\n')
    named, counted = hr.rows(path, id="k").describe(), hr.rows(path).describe()
    path.write_text('{"k": 2}\n')

    assert hr.rows(path, id="k").grew_from(named)
    assert not hr.rows(path).grew_from(counted)
    assert not hr.rows(path).grew_from(named)


def test_indexed_sources_may_grow_and_not_shrink() -> None:
    """More of the same function is growth; fewer, or another function, is not."""
    before = hr.indexed(5, abs).describe()

    assert [True, False, False] == [
        s.grew_from(before) for s in (hr.indexed(6, abs), hr.indexed(4, abs), hr.indexed(6, str))
    ]
