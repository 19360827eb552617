"""Chunks: ranges, reading in the middle, restart points, growth, files that are not right."""

import csv
import dataclasses
import gzip
import io
import itertools
import json
import os
import random
import sys
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import zstandard

import hpcresume as hr
from hpcresume.errors import PipelineError, SourcesError
from hpcresume.fs import POSIX
from hpcresume.pipeline import chunk_formats, streams
from hpcresume.pipeline import members as members_module
from hpcresume.pipeline import restarts as restarts_module
from hpcresume.pipeline.members import SPACING_MIN, Members, MemberStream, spacing_of
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

    def restart_points(self, path: Path, size_bytes: int, digest: str, members: Members) -> None:
        if size_bytes > members_module.SPACING_MIN:
            self.store.keep(path, digest, members)

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


def bytes_read_by_process() -> int:
    """Return how many bytes this process has read from files."""
    text = Path("/proc/self/io").read_text()
    return int(dict(line.split(": ") for line in text.splitlines())["rchar"])


def from_kept(source: hr.Source, kept: Path) -> tuple[list[int], int]:
    """Return the numbers of a chunk's rows, and how many bytes were read for the first one.

    The stream that was read last is left aside.
    """
    chunk = decode_payload(encode_payload(source.payload), restarts=kept)
    while streams._parked:
        streams._parked.pop()[1].close()
    before = bytes_read_by_process()
    rows = iter(chunk)
    first = next(rows)["n"]
    return [first, *(row["n"] for row in rows)], bytes_read_by_process() - before


def test_gzip_files_are_read_from_restart_points(gz: Path, tmp_path: Path) -> None:
    """With the kept points a chunk far down is read without what lies before it."""
    listed = list(hr.chunks(gz, rows=5000).listed(Kept(tmp_path / "kept")))
    for _ in range(2):  # what is read to import indexed_gzip is not of the file
        numbers, read_bytes = from_kept(listed[-1], tmp_path / "kept")

    assert list(range(65_000, 70_000)) == numbers
    assert read_bytes < 0.4 * gz.stat().st_size


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


def cut_into_members(data: bytes, sizes: Iterable[int]) -> bytes:
    """Return data as gzip members of given sizes, and the rest as one more."""
    members, at = [], 0
    for size in sizes:
        members.append(gzip.compress(data[at : at + size], 1))
        at += size
    return b"".join([*members, gzip.compress(data[at:], 1)])


SHAPES: dict[str, list[int]] = {
    "bgzip": [60_000] * 300,
    "two large": [7_000_000],
    "large, then small": [6_000_000, *[60_000] * 200],
    "small, then large": [60_000] * 120,
    "in turn": [60_000, 30_000, 5_000_000, *[60_000] * 40, 5_500_000, 1_000, 0],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_are_read_from_members(gz: Path, tmp_path: Path, shape: str) -> None:
    """Members of all sizes: no chunk is read from more than about 8 MiB before it."""
    data, kept = gzip.decompress(gz.read_bytes()), tmp_path / "kept"
    path = tmp_path / "members.jsonl.gz"
    path.write_bytes(cut_into_members(data, SHAPES[shape]))
    gaps, share = restart_points_of(path, kept)
    listed = list(hr.chunks(path, rows=5000).listed(Kept(kept)))
    found = [from_kept(source, kept) for source in listed]

    assert list(range(70_000)) == [n for numbers, _ in found for n in numbers]
    assert max(gaps) < 2 * SPACING_MIN
    assert share <= 0.008
    assert max(read_bytes for _, read_bytes in found[1:]) < 0.7 * path.stat().st_size
    assert found[-1][1] < 0.45 * path.stat().st_size


def test_payloads_do_not_know_of_members(gz: Path, tmp_path: Path) -> None:
    """Where reading begins is not part of a source, so that a run goes on with what it has."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(gzip.decompress(gz.read_bytes()))
    plain = list(hr.chunks(path, rows=5000))
    gz.write_bytes(cut_into_members(path.read_bytes(), SHAPES["in turn"]))
    listed = list(hr.chunks(gz, rows=5000))

    for one, other in zip(plain, listed, strict=True):
        same = dataclasses.replace(other.payload, path=path, id=one.id)
        assert encode_payload(one.payload) == encode_payload(same)


def test_many_small_members_need_no_index(
    gz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their starts are known when the file is listed: it is not read a second time."""
    gz.write_bytes(cut_into_members(gzip.decompress(gz.read_bytes()), SHAPES["bgzip"]))
    monkeypatch.setattr(restarts_module, "_export", None)
    gaps, _ = restart_points_of(gz, tmp_path / "kept")

    assert 4 == len(gaps)
    assert max(gaps) < SPACING_MIN + 60_000


def publish_windows_only(path: Path, kept: Path) -> None:
    """Publish a file's restart points as versions did that knew nothing of members."""
    listed = chunk_formats.Listed()
    list(chunk_formats.LISTERS["jsonl"](path, 5000, listed))
    members = Members(longest_bytes=sys.maxsize)
    RestartStore(POSIX, str(kept)).keep(path, listed.digest, members)


@pytest.fixture
def close(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restart points that lie 64 KiB apart."""
    monkeypatch.setattr(members_module, "SPACING_MIN", 1 << 16)


@pytest.mark.usefixtures("close")
@pytest.mark.parametrize(
    ("shape", "files"),
    [([], 1), ([600_000], 2), ([3_000] * 300, 2), ([400_000, *[3_000] * 90, 300_000, 3_000], 2)],
    ids=["one", "two large", "bgzip", "mixed"],
)
def test_points_of_earlier_versions_are_read(tmp_path: Path, shape: list[int], files: int) -> None:
    """A run goes on with what it has; the next listing adds the members where there are some."""
    path, kept = tmp_path / "in.jsonl.gz", tmp_path / "kept"
    long_lines(path, 6000)
    path.write_bytes(cut_into_members(gzip.decompress(path.read_bytes()), shape))
    publish_windows_only(path, kept)
    listed = list(hr.chunks(path, rows=500))
    for _ in range(2):
        found = [n for source in listed for n in from_kept(source, kept)[0]]
        assert list(range(6000)) == found
        assert listed == list(hr.chunks(path, rows=500).listed(Kept(kept)))
    assert files == len(os.listdir(directory_of(kept, path)))


@pytest.mark.usefixtures("close")
def test_a_long_chunk_leaves_a_large_member_for_small_ones(tmp_path: Path) -> None:
    """What it has read is not read again, though small members have no points within."""
    path, kept = tmp_path / "in.jsonl.gz", tmp_path / "kept"
    long_lines(path, 12_000)
    sizes = [300_000, *[3_000] * 700]
    path.write_bytes(cut_into_members(gzip.decompress(path.read_bytes()), sizes))
    list(hr.chunks(path, rows=1000).listed(Kept(kept)))
    for _ in range(2):  # what is read to import indexed_gzip is not of the file
        before = bytes_read_by_process()
        with streams.open_at(path, 200_000, 2_000_000, restarts=kept) as stream:
            while stream.position < 2_000_000:
                assert stream.read(50_000)
        read_bytes = bytes_read_by_process() - before
        streams._parked.pop()[1].close()

    # indexed_gzip reads 1 MiB at once.
    assert read_bytes < 4 * path.stat().st_size


def test_chunks_that_follow_each_other_are_read_as_one(gz: Path, tmp_path: Path) -> None:
    """The second one is read in as few pieces: each begins at a restart point again."""
    kept, size = tmp_path / "kept", 4 << 20
    list(hr.chunks(gz, rows=5000).listed(Kept(kept)))
    took = []
    for offset in (size, size + 500_000, 2 * size + 500_000):  # the first one imports
        before = bytes_read_by_process()
        with streams.open_at(gz, offset, size, restarts=kept) as stream:
            while stream.position < offset + size:
                assert stream.read(1 << 20)
        took.append(bytes_read_by_process() - before)
    assert took[2] < 1.5 * took[1]


@pytest.mark.usefixtures("close")
@pytest.mark.parametrize("seed", range(6))
def test_random_members_and_chunks(tmp_path: Path, seed: int) -> None:
    """Members and chunks of any size, read in any order, give what the whole file holds."""
    rng = random.Random(seed)
    path, kept = tmp_path / "in.jsonl.gz", tmp_path / "kept"
    lines = [b'{"n": %d, "x": "%s"}\n' % (n, rng.randbytes(60).hex().encode()) for n in range(9000)]
    sizes = [rng.choice([0, 1, 500, 20_000, 70_000, 300_000]) for _ in range(25)]
    path.write_bytes(cut_into_members(b"".join(lines), sizes))
    listed = list(hr.chunks(path, rows=rng.choice([7, 150, 1000])).listed(Kept(kept)))
    for source in rng.choices(listed, k=60):
        chunk = decode_payload(encode_payload(source.payload), restarts=kept)
        assert list(range(chunk.first, chunk.first + chunk.count)) == [row["n"] for row in chunk]


@pytest.mark.parametrize(
    ("tail", "whole"),
    [(b"\0" * 700, True), (b"\0" * 40_000, True), (b"\n", False), (b"\0\0text\n" * 9, False)],
    ids=["zeros", "many zeros", "line end", "text"],
)
def test_what_follows_the_last_member(tmp_path: Path, tail: bytes, whole: bool) -> None:
    """Zeros are no content, also between members; anything else is refused."""
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(b"1\n") + b"\0" * 50_000 + gzip.compress(b"2\n") + tail)
    if whole:
        assert [[1], [2]] == [read(s) for s in hr.chunks(path, rows=1)]
    else:
        with pytest.raises(SourcesError, match=r"in\.jsonl\.gz"):
            list(hr.chunks(path, rows=1))


def test_a_member_that_expands_a_thousandfold(tmp_path: Path) -> None:
    """It is decompressed piece by piece."""
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * 30_000_000 + b"1\n"))
    tracemalloc.start()
    stream = MemberStream(path)
    total = sum(map(len, iter(lambda: stream.read(1 << 16), b"")))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    stream.close()

    assert 30_000_002 == total == stream.members.longest_bytes
    assert peak < 1 << 20


@pytest.mark.parametrize(
    ("size_bytes", "apart_mib"),
    [(1 << 20, 4), (4 << 30, 4), (8 << 30, 8), (32 << 30, 32), (1 << 40, 32)],
)
def test_the_distance_of_restart_points_grows_with_the_file(
    size_bytes: int, apart_mib: int
) -> None:
    """A thousandth of the file, within 4 and 32 MiB: the points of a large one stay few."""
    assert apart_mib << 20 == spacing_of(size_bytes)


def test_chunks_in_a_row_decompress_the_file_once(
    gz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that reads one chunk after another goes on where it was."""
    listed = list(hr.chunks(gz, rows=10_000))
    opened: list[Any] = []
    real = members_module.MemberStream
    monkeypatch.setattr(members_module, "MemberStream", lambda *a: opened.append(a) or real(*a))
    for source in listed:
        assert 10_000 == len(read(source))
    assert 1 == len(opened)
    read(listed[0])
    assert 2 == len(opened)


def test_a_worker_that_goes_far_ahead_begins_at_a_restart_point(gz: Path, tmp_path: Path) -> None:
    """It does not read on from where it was, if a point lies nearer."""
    gz.write_bytes(cut_into_members(gzip.decompress(gz.read_bytes()), SHAPES["bgzip"]))
    listed = list(hr.chunks(gz, rows=5000).listed(Kept(tmp_path / "kept")))
    first, last = (
        decode_payload(encode_payload(listed[n].payload), restarts=tmp_path / "kept")
        for n in (0, -1)
    )
    assert 5000 == len(list(first))
    before = bytes_read_by_process()
    assert 5000 == len(list(last))

    assert bytes_read_by_process() - before < 0.4 * gz.stat().st_size


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
