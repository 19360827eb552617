"""Chunks: ranges, reading in the middle, restart points, growth, files that are not right."""

import csv
import gzip
import io
import itertools
import json
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

import hpcresume as hr
from hpcresume.errors import PipelineError, SourcesError
from hpcresume.fs import POSIX
from hpcresume.pipeline import chunk_formats
from hpcresume.pipeline import restarts as restarts_module
from hpcresume.pipeline.payload import decode_payload, encode_payload
from hpcresume.pipeline.restarts import PointsFooter, RestartStore, directory_of
from hpcresume.pipeline.sources import as_sources
from hpcresume.segment.container import open_container

FORMATS = (
    *("in.jsonl", "in.jsonl.gz", "in.jsonl.zst", "in.ndjson", "in.txt", "in.txt.gz"),
    *("in.csv", "in.csv.gz", "in.tsv.zst", "in.parquet", "in.warc", "in.warc.gz"),
)


def compressed(path: Path, data: bytes) -> None:
    """Write data as the suffix says; gzip in two members and Zstandard in frames of 64 KiB."""
    if path.suffix == ".gz":
        half = len(data) // 2
        data = gzip.compress(data[:half], 1) + gzip.compress(data[half:], 1)
    elif path.suffix == ".zst":
        pieces = [data[at : at + (1 << 16)] for at in range(0, len(data), 1 << 16)]
        data = b"".join(map(zstandard.ZstdCompressor().compress, pieces))
    path.write_bytes(data)


def warc(path: Path, texts: list[str]) -> None:
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=path.suffix == ".gz")
        for n, text in enumerate(texts):
            headers = StatusAndHeaders("200 OK", [("Content-Type", "text/plain")], "", "HTTP/1.1")
            writer.write_record(
                writer.create_warc_record(
                    *(f"http://host/{n}", "response"),
                    payload=io.BytesIO(text.encode()),
                    http_headers=headers,
                )
            )


def write(path: Path, texts: list[str]) -> list[Any]:
    """Write a row per text, and return the rows as a stage should get them."""
    rows: list[Any] = [{"n": str(n), "text": text} for n, text in enumerate(texts)]
    name = path.name
    if ".warc" in name:
        warc(path, texts)
        return texts
    if ".parquet" in name:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    elif ".csv" in name or ".tsv" in name:
        file = io.StringIO()
        writer = csv.DictWriter(
            file, ["n", "text"], dialect="excel-tab" if ".tsv" in name else "excel"
        )
        writer.writeheader()
        writer.writerows(rows)
        compressed(path, file.getvalue().encode())
    elif ".txt" in name:
        compressed(path, "".join(f"{text}\n" for text in texts).encode())
        return texts
    else:
        compressed(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows


def read(source: hr.Source) -> list[Any]:
    """Return a chunk's rows, of a WARC's records the content, as a worker reads them."""
    chunk = decode_payload(encode_payload(source.payload))
    return [row["content"].decode() if chunk.format == "warc" else row for row in chunk]


@pytest.mark.parametrize("name", FORMATS)
def test_chunks_are_ranges_of_rows(tmp_path: Path, name: str) -> None:
    """All rows once, in order; each chunk can be read alone, in any order, and again."""
    rows = write(tmp_path / name, [f"text {n} é" for n in range(25)])
    listed = list(hr.chunks(tmp_path / name, rows=10))

    assert [f"{name}#0-9", f"{name}#10-19", f"{name}#20-24"] == [s.id for s in listed]
    assert rows == [row for source in listed for row in read(source)]
    assert [rows[20:], rows[:10], rows[10:20], rows[10:20]] == [
        read(listed[n]) for n in (2, 0, 1, 1)
    ]
    assert [10, 10, 5] == [s.payload.count for s in listed]


@pytest.mark.parametrize("count", [0, 1, 7, 10, 20, 21])
@pytest.mark.parametrize("name", FORMATS)
def test_any_number_of_rows(tmp_path: Path, name: str, count: int) -> None:
    """Empty files have no chunks; a last chunk is as long as what is left."""
    rows = write(tmp_path / name, [f"text {n}" for n in range(count)])
    listed = list(hr.chunks(tmp_path / name, rows=10))

    assert [min(10, count - first) for first in range(0, count, 10)] == [
        s.payload.count for s in listed
    ]
    assert rows == [row for source in listed for row in read(source)]


@pytest.mark.parametrize("name", ["in.jsonl", "in.txt", "in.csv"])
def test_empty_files_have_no_chunks(tmp_path: Path, name: str) -> None:
    """A file of no bytes at all is no error."""
    (tmp_path / name).touch()
    assert [] == list(hr.chunks(tmp_path / name))


def test_lines_of_all_kinds(tmp_path: Path) -> None:
    """A byte order mark, CRLF, blank lines and a last line without its end."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\n  \n{"a": 3}')
    listed = list(hr.chunks(path, rows=3))

    assert ["in.jsonl#0-2", "in.jsonl#3-4"] == [s.id for s in listed]
    assert [[{"a": 1}, {"a": 2}], [{"a": 3}]] == [read(s) for s in listed]


def test_quoted_line_ends_belong_to_a_record(tmp_path: Path) -> None:
    """A CSV record is not a line, in any chunk; nor is a field limited to 128 KiB."""
    path = tmp_path / "in.csv"
    long = "x" * 200_000
    path.write_bytes(f'\ufeffkey,text\r\na,"one\ntwo"\r\n\r\nb,"{long}\r\n"\r\nc,three'.encode())
    listed = list(hr.chunks(path, rows=1))

    assert [{"key": "a", "text": "one\ntwo"}, {"key": "b", "text": f"{long}\r\n"},
            {"key": "c", "text": "three"}] == [read(s)[0] for s in listed]  # fmt: skip


def test_a_line_of_any_length(tmp_path: Path) -> None:
    """A line longer than all buffers is one row."""
    path = tmp_path / "in.jsonl.gz"
    long = json.dumps("y" * 5_000_000)
    path.write_bytes(gzip.compress(f"1\n{long}\n2\n".encode()))

    assert [[1], [json.loads(long)], [2]] == [read(s) for s in hr.chunks(path, rows=1)]


def test_ids_tell_files_apart(tmp_path: Path) -> None:
    """A glob and hr.files give paths below their directory, in order; a path gives its name."""
    for name in ("b/x.txt", "a/x.txt", "a/y.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1\n2\n")
    of_glob = list(hr.chunks(f"{tmp_path}/*/x.txt"))
    several = hr.chunks([tmp_path / "a/y.txt", hr.files(tmp_path, "b/*")], rows=1)

    assert ["a/x.txt#0-1", "b/x.txt#0-1"] == [s.id for s in of_glob]
    assert ["y.txt#0-0", "y.txt#1-1", "b/x.txt#0-0", "b/x.txt#1-1"] == [s.id for s in several]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """The id is escaped, and the file is found."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    path.write_text("one\n")
    (source,) = hr.chunks(path)

    assert "caf\\xe9.txt#0-0" == source.id
    assert ["one"] == read(source)


class Kept:
    """Takes what a listing finds, in a directory."""

    def __init__(self, directory: Path) -> None:
        self.store, self.notes = RestartStore(POSIX, str(directory)), list[str]()

    def restart_points(self, path: Path, size_bytes: int, digest: str) -> None:
        if size_bytes > restarts_module.SPACING_MIN:
            self.store.keep(path, digest)

    def note(self, text: str) -> None:
        self.notes.append(text)


def long_lines(path: Path, count: int) -> None:
    """Write lines that compress badly: 200 bytes each."""
    random.seed(3)
    data = b"".join(
        b'{"n": %d, "x": "%s"}\n' % (n, random.randbytes(90).hex().encode()) for n in range(count)
    )
    path.write_bytes(gzip.compress(data, 1))


@pytest.fixture
def gz(tmp_path: Path) -> Path:
    """A gzip file of 14 MB of content."""
    path = tmp_path / "in.jsonl.gz"
    long_lines(path, 70_000)
    return path


def test_gzip_files_are_read_from_restart_points(
    gz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the kept points a chunk far down is read without what lies before it."""
    listed = list(hr.chunks(gz, rows=5000).listed(Kept(tmp_path / "kept")))
    data = encode_payload(listed[-1].payload)
    chunk = decode_payload(data, restarts=tmp_path / "kept")
    monkeypatch.setattr(gzip, "GzipFile", None)

    assert list(range(65_000, 70_000)) == [row["n"] for row in chunk]


def test_restart_points_are_found_once(gz: Path, tmp_path: Path) -> None:
    """A second listing keeps what is there; a file with more content has its points anew."""
    kept = Kept(tmp_path / "kept")
    directory = Path(directory_of(tmp_path / "kept", gz))
    for _ in range(2):
        first = list(hr.chunks(gz, rows=5000).listed(kept))
    assert ["0001"] == sorted(os.listdir(directory))
    with gz.open("ab") as file:
        file.write(gzip.compress(b'{"n": 70000}\n'))
    grown = list(hr.chunks(gz, rows=5000).listed(kept))

    assert ["0001", "0002"] == sorted(os.listdir(directory))
    assert first == grown[:-1]
    for source in (grown[6], grown[-1]):
        chunk = decode_payload(encode_payload(source.payload), restarts=tmp_path / "kept")
        assert chunk.first == next(iter(chunk))["n"]


def restart_points_of(path: Path, kept: Path) -> tuple[list[int], float]:
    """Return how many bytes lie between a file's restart points, and their size per its own."""
    list(hr.chunks(path, rows=5000).listed(Kept(kept)))
    (file,) = Path(directory_of(kept, path)).iterdir()
    footer = open_container(POSIX, str(file), restarts_module.KIND, PointsFooter).footer
    with gzip.open(path) as content:
        size_bytes = content.seek(0, os.SEEK_END)
    places = [0, *(point.uncompressed for point in footer.points), size_bytes]
    gaps = [after - before for before, after in itertools.pairwise(places)]
    return gaps, file.stat().st_size / size_bytes


@pytest.mark.parametrize("rows", [22_000, 70_000])
def test_restart_points_take_little_and_lie_close(tmp_path: Path, rows: int) -> None:
    """A chunk is read from about 4 MiB before it, at 0.8 % of the content at most."""
    path = tmp_path / "in.jsonl.gz"
    long_lines(path, rows)
    gaps, share = restart_points_of(path, tmp_path / "kept")

    # A point lies where a block of the compressed data begins.
    assert 4 << 20 <= max(gaps) < (4 << 20) + (256 << 10)
    assert min(gaps[:-1]) >= 4 << 20
    assert 0 < gaps[-1]
    assert share <= 0.008


def test_small_gzip_members_have_no_restart_points(gz: Path, tmp_path: Path) -> None:
    """Many joined into one file are read from its start, and give the same rows."""
    rows, path = gzip.decompress(gz.read_bytes()), tmp_path / "members.jsonl.gz"
    pieces = (rows[at : at + 60_000] for at in range(0, len(rows), 60_000))
    path.write_bytes(b"".join(gzip.compress(piece, 1) for piece in pieces))
    gaps, _ = restart_points_of(path, tmp_path / "kept")
    last = list(hr.chunks(path, rows=5000))[-1].payload
    chunk = decode_payload(encode_payload(last), restarts=tmp_path / "kept")

    assert [len(rows)] == gaps
    assert list(range(65_000, 70_000)) == [row["n"] for row in chunk]


@pytest.mark.parametrize(
    ("size_bytes", "apart_mib"),
    [(1 << 20, 4), (4 << 30, 4), (8 << 30, 8), (32 << 30, 32), (1 << 40, 32)],
)
def test_the_distance_of_restart_points_grows_with_the_file(
    size_bytes: int, apart_mib: int
) -> None:
    """A thousandth of the file, within 4 and 32 MiB: the points of a large one stay few."""
    assert apart_mib << 20 == restarts_module.spacing_of(size_bytes)


def test_chunks_in_a_row_decompress_the_file_once(
    gz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that reads one chunk after another goes on where it was."""
    listed = list(hr.chunks(gz, rows=10_000))
    opened: list[Any] = []
    real = gzip.GzipFile
    monkeypatch.setattr(gzip, "GzipFile", lambda **k: opened.append(k) or real(**k))
    for source in listed:
        assert 10_000 == len(read(source))
    assert 1 == len(opened)
    read(listed[0])
    assert 2 == len(opened)


def test_zstandard_is_read_from_frames(tmp_path: Path) -> None:
    """Chunks know the frame they begin in; of a file of one frame the user is told."""
    path = tmp_path / "in.jsonl.zst"
    write(path, [f"text {n}" for n in range(10_000)])
    kept = Kept(tmp_path / "kept")
    listed = list(hr.chunks(path, rows=1000).listed(kept))
    assert [] == kept.notes
    assert all(s.payload.offset - (1 << 16) <= s.payload.restart[1] for s in listed)
    assert 0 < listed[-1].payload.restart[0] < path.stat().st_size

    path.write_bytes(zstandard.compress(b"1\n2\n3\n"))
    assert [[1], [2], [3]] == [read(s) for s in hr.chunks(path, rows=1).listed(kept)]
    assert 1 == len(kept.notes)
    assert "in.jsonl.zst is one Zstandard frame" in kept.notes[0]


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.jsonl.zst", "in.parquet", "in.warc.gz",
                                  "in.warc", "in.csv.gz"])  # fmt: skip
@pytest.mark.parametrize("cut", [5, 40, 700])
def test_half_written_files_are_refused(tmp_path: Path, name: str, cut: int) -> None:
    """A compressed file, or one with records of known length, that ends too early is named."""
    path = tmp_path / name
    write(path, [random.randbytes(30).hex() for _ in range(200)])
    path.write_bytes(path.read_bytes()[:-cut])

    with pytest.raises(SourcesError, match=name.replace(".", r"\.")):
        list(hr.chunks(path, rows=50))


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.jsonl.zst", "in.parquet", "in.warc.gz",
                                  "in.warc"])  # fmt: skip
def test_files_of_something_else_are_refused(tmp_path: Path, name: str) -> None:
    """The suffix promises a format; the error names the file."""
    (tmp_path / name).write_text("just some text\n" * 20)

    with pytest.raises(SourcesError, match=name.replace(".", r"\.")):
        list(hr.chunks(tmp_path / name))


def test_a_glob_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    """As a path that does not exist: a slip would make an empty run."""
    (tmp_path / "a.jsonl").write_text("1\n")
    slip = hr.chunks([tmp_path / "a.jsonl", f"{tmp_path}/nope*.jsonl"])

    with pytest.raises(SourcesError, match=r"nope\*\.jsonl: no file matches"):
        list(slip)
    assert [] == list(hr.chunks(hr.files(tmp_path, "nope*.jsonl")))


def test_a_glob_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tilde is the home directory, as in hr.files."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text("1\n")

    assert ["a.jsonl#0-0"] == [s.id for s in hr.chunks(["~/a.jsonl"])]
    assert ["a.jsonl#0-0"] == [s.id for s in hr.chunks("~/*.jsonl")]


def damaged_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle] ^= 1
    path.write_bytes(data)


CHANGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "flipped": damaged_middle,
    "emptied": lambda path: os.truncate(path, 0),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "in.jsonl.zst", "in.csv",
                                  "in.parquet", "in.warc", "in.warc.gz"])  # fmt: skip
def test_files_that_change_after_the_listing(tmp_path: Path, name: str, change: str) -> None:
    """Reading fails with an error that names the file; nothing else is given for the rows."""
    path = tmp_path / name
    rows = write(path, [random.randbytes(30).hex() for _ in range(300)])
    listed = list(hr.chunks(path, rows=100))
    CHANGES[change](path)
    failed = 0
    for n, source in enumerate(listed):
        try:
            found = read(source)
        except SourcesError as error:
            failed += name in str(error)
        else:
            # A footer does not tell of every bit of a Parquet file; its pages need not, either.
            assert name == "in.parquet" or rows[n * 100 : n * 100 + 100] == found
    assert failed or (name, change) == ("in.parquet", "flipped")


def test_a_row_that_is_no_json_is_named_with_its_line(tmp_path: Path) -> None:
    """Listing does not parse; reading the chunk tells."""
    path = tmp_path / "in.jsonl"
    path.write_text("1\n" * 14 + '{"a":\n' + "1\n" * 5)
    good, bad = hr.chunks(path, rows=10)

    assert [1] * 10 == read(good)
    with pytest.raises(SourcesError, match=r"in\.jsonl:15: not JSON"):
        read(bad)


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "in.txt", "in.csv", "in.warc.gz"])
def test_appending_keeps_complete_chunks(tmp_path: Path, name: str) -> None:
    """Ids and payloads of complete chunks stay; the last one has the same first row."""
    path = tmp_path / name
    write(path, [f"text {n}" for n in range(25)])
    before = list(hr.chunks(path, rows=10))
    if "warc" in name:
        more = tmp_path / "more.warc.gz"
        write(more, ["more"] * 10)
        tail = more.read_bytes()
    else:
        tail = b"25,more\r\n" * 10 if "csv" in name else b"1\n" * 10
        tail = gzip.compress(tail) if path.suffix == ".gz" else tail
    with path.open("ab") as file:
        file.write(tail)
    after = list(hr.chunks(path, rows=10))

    assert before[:2] == after[:2]
    assert [f"{name}#20-29", f"{name}#30-34"] == [s.id for s in after[2:]]
    chunks = hr.chunks(path, rows=10)
    assert (f"{name}#20-", 24) == chunks.extent(before[2].id)
    assert chunks.grew_from(hr.chunks(path, rows=10).describe())


def test_more_files_are_growth_and_other_rows_are_not(tmp_path: Path) -> None:
    """What a run was made with must be there, cut in the same way."""
    before = hr.chunks(["a.jsonl"], rows=5).describe()

    assert before == json.loads(json.dumps(before))
    assert hr.chunks(["a.jsonl", "b.jsonl"], rows=5).grew_from(before)
    assert not hr.chunks(["b.jsonl"], rows=5).grew_from(before)
    assert not hr.chunks(["a.jsonl"], rows=6).grew_from(before)


def test_a_function_may_return_chunks(gz: Path, tmp_path: Path) -> None:
    """Its restart points are kept as well."""
    list(as_sources(lambda: hr.chunks(gz)).listed(Kept(tmp_path / "kept")))

    assert 1 == len(os.listdir(tmp_path / "kept"))


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("a.jsonl",), {"rows": 0}, "rows=0"),
        (("a.jsonl",), {"rows": True}, "rows=True"),
        (("a.jsonl",), {"format": "xlsx"}, "xlsx"),
        ((3,), {}, "chunks\\(3\\)"),
        (([3],), {}, "3 is no path"),
    ],
)
def test_wrong_arguments_are_refused(arguments: Any, options: Any, words: str) -> None:
    """At once, when declared."""
    with pytest.raises(PipelineError, match=words):
        hr.chunks(*arguments, **options)


def test_wrong_paths_are_refused_when_listed(tmp_path: Path) -> None:
    """A missing file, a directory, and a suffix that says nothing."""
    (tmp_path / "in.xlsx").touch()
    for path, words in (
        ("missing.jsonl", "missing.jsonl cannot be read"),
        (".", "is a directory"),
        ("in.xlsx", "unknown format"),
        ("in.parquet.zst", "unknown format"),
    ):
        with pytest.raises(SourcesError, match=words):
            list(hr.chunks(tmp_path / path))


def test_memory_does_not_grow_with_the_file(gz: Path) -> None:
    """Neither listing 14 MB nor reading a chunk of all of it holds more than some buffers."""
    tracemalloc.start()
    try:
        (source,) = hr.chunks(gz, rows=10**6)
        for _ in source.payload:
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "txt", "jsonl.zst", "parquet", "warc"])
def test_what_is_no_file_is_refused(tmp_path: Path, suffix: str) -> None:
    """A pipe, from which reading would wait for ever, is named; a link to a file is one."""
    path = tmp_path / f"in.{suffix}"
    os.mkfifo(path)
    with pytest.raises(SourcesError, match=f"{path} cannot be read.*no regular file"):
        list(hr.chunks(path))


@pytest.mark.parametrize("read", [hr.lines, hr.rows], ids=["lines", "rows"])
def test_records_of_a_pipe_are_refused(tmp_path: Path, read: Any) -> None:
    """Every task and every submission reads the file again, which a pipe does not bear."""
    path = tmp_path / "in.jsonl"
    os.mkfifo(path)
    with pytest.raises(SourcesError, match="no regular file"):
        list(read(path))


def test_links(tmp_path: Path) -> None:
    """A link to a file is read under its own name; one that leads nowhere is named, or left out."""
    write(tmp_path / "in.jsonl", ["1"])
    (tmp_path / "link.jsonl").symlink_to("in.jsonl")
    (tmp_path / "broken.jsonl").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)

    found = [source.id for source in hr.chunks(tmp_path / "**/*.jsonl")]
    assert ["in.jsonl#0-0", "link.jsonl#0-0"] == found
    with pytest.raises(SourcesError, match=r"broken\.jsonl cannot be read: No such file"):
        list(hr.chunks(tmp_path / "broken.jsonl"))


def test_small_chunks_cost_what_their_bytes_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many chunks lie in a block, its lines are counted once."""
    counted: list[int] = []

    class Block(bytes):
        def count(self, *arguments: Any) -> int:
            counted.append(len(self))
            return super().count(*arguments)

    real = chunk_formats._read
    monkeypatch.setattr(chunk_formats, "_read", lambda *a: Block(real(*a)))
    write(tmp_path / "in.jsonl", ["text"] * 1000)

    assert 1000 == len(list(hr.chunks(tmp_path / "in.jsonl", rows=1)))
    # The second block is the empty one at the end of the file.
    assert [(tmp_path / "in.jsonl").stat().st_size] == [size for size in counted if size]
