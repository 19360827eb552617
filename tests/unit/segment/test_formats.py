"""Frames, containers and segments: what is written is read, and damage never passes."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import google_crc32c
import msgspec
import pytest
from pyroaring import BitMap

from hpcresume.errors import CorruptDataError, InternalError, RunDirError
from hpcresume.fs import PosixFileSystem
from hpcresume.ids import ROOT, ItemPath
from hpcresume.segment import bitmap as bitmaps
from hpcresume.segment import container
from hpcresume.segment.container import (
    FORMAT_VERSION,
    MAGIC,
    BlockEntry,
    encode_container,
    open_container,
)
from hpcresume.segment.frame import Columns, FrameBuilder, check_frame, decode_frame, frame_bitmap
from hpcresume.segment.segment import Segment, Writer, open_segment
from tests.support.places import RUN_ID, Place, failure, frame, row, segment_bytes, write_file

POSIX = PosixFileSystem()
PATH = "/shared/f"


@pytest.fixture(params=["posix", "sim"])
def place(request, tmp_path: Path) -> Place:
    return Place.make(request.param, tmp_path)


@pytest.fixture
def sim(tmp_path: Path) -> Place:
    return Place.make("sim", tmp_path)


def reseal(body: bytes) -> bytes:
    """Return a frame's bytes with a CRC that fits."""
    return body + struct.pack("<I", google_crc32c.value(body))


def content(segment: Segment) -> tuple:
    """Return all that a segment means, every digest checked on the way."""
    segment.container.verify()
    frames = [segment.frame(n) for n in segment.frame_numbers()]
    rows = [(list(f.sources()), f.paths(), f.files()) for f in frames]
    footer = segment.footer
    return (list(segment.completed), rows, segment.failures(), footer.writer, footer.seq,
            footer.suspects, footer.code, footer.stage_names)  # fmt: skip


# -- bitmaps ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "members", [[], [0], [0, (1 << 32) - 1], range(1000, 200_000), range(0, 100_000, 3)]
)
def test_a_bitmap_is_loaded_as_dumped(members) -> None:
    """Empty, extreme, dense and sparse sets come back as they were."""
    assert BitMap(members) == bitmaps.load(bitmaps.dump(BitMap(members)), what="x")


@pytest.mark.parametrize("data", [b"", b"\0", b":0", b"\xff" * 40])
def test_what_is_no_bitmap_is_corrupt(data: bytes) -> None:
    """Bytes that are no bitmap raise the typed error, with the name of the place."""
    with pytest.raises(CorruptDataError, match="segment-7"):
        bitmaps.load(data, what="segment-7")


def test_every_truncation_of_a_bitmap_is_corrupt() -> None:
    """A bitmap cut short at any byte is refused."""
    data = bitmaps.dump(BitMap([1, 5, 70_000, *range(200_000, 201_000)]))
    for length in range(len(data)):
        with pytest.raises(CorruptDataError):
            bitmaps.load(data[:length], what="x")


def test_spans_and_unions() -> None:
    """A span is half open, an empty one is empty, and a union holds all members."""
    assert [3, 4] == list(bitmaps.span(3, 5))
    assert [] == list(bitmaps.span(5, 5)) == list(bitmaps.span(5, 3))
    assert [1, 3, 4] == list(bitmaps.union([BitMap([1]), bitmaps.span(3, 5)]))
    assert [] == list(bitmaps.union([]))


# -- frames -----------------------------------------------------------------------------------


def test_an_empty_frame() -> None:
    """A frame of no sources has no rows, no paths and no files."""
    found = decode_frame(FrameBuilder().build(), what="x")
    assert ([], b"", [], {}) == (list(found.sources()), found.rows, found.paths(), found.files())


def test_sources_without_rows() -> None:
    """A source whose items were all dropped is completed, with no rows."""
    builder = FrameBuilder()
    for source, rows in ((1, []), (2, [(ROOT, b"2\n")]), (9, [])):
        builder.add(source, rows)
    found = decode_frame(builder.build(), what="x")
    assert [(1, b""), (2, b"2\n"), (9, b"")] == list(found.sources())
    assert [ROOT] == found.paths()


def test_rows_keep_their_paths() -> None:
    """Rows of one source and of several keep item order, with the root's path among them."""
    builder = FrameBuilder()
    builder.add(5, [(ItemPath((0,)), b"a\n"), (ItemPath((0, 12)), b"b\n")])
    builder.add(6, [(ROOT, b"c\n")])
    builder.add_files("id5", [(ItemPath((0, 12)), "x.png")])
    found = decode_frame(builder.build(), what="x")
    assert [(5, b"a\nb\n"), (6, b"c\n")] == list(found.sources())
    assert [(0,), (0, 12), ()] == found.paths()
    assert {"id5": [("0.12", "x.png")]} == found.files()


@pytest.mark.parametrize("indices", [(2, 1), (1, 1), (1, 3, 2)])
def test_sources_out_of_order_are_refused(indices: tuple[int, ...]) -> None:
    """Rows are told apart by the order of the indices, so another order is a bug, said so."""
    builder = FrameBuilder()
    for index in indices:
        builder.add(index, [(ROOT, row(index))])
    with pytest.raises(InternalError, match="increasing"):
        builder.build()


def test_rows_out_of_order_are_refused() -> None:
    """So are rows whose owners are in another order than the sources."""
    with pytest.raises(InternalError, match="order of their sources"):
        FrameBuilder().add_columns(Columns([1, 2], [2, 1], [ROOT, ROOT], [row(2), row(1)]))


def test_the_count_of_a_frame_is_checked_first() -> None:
    """`check_frame` gives the number of sources, `frame_bitmap` which ones."""
    data = frame([4, 7, 9])
    assert 3 == check_frame(data, what="x")
    assert [4, 7, 9] == list(frame_bitmap(data, what="x"))


def test_every_flipped_byte_of_a_frame_is_found() -> None:
    """Whichever byte of a frame changes: CorruptDataError, from the check already."""
    data = frame([1, 2, 300_000], rows=2)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0x41
        for call in (check_frame, decode_frame):
            with pytest.raises(CorruptDataError):
                call(bytes(damaged), what="x")


def test_every_truncation_of_a_frame_is_found() -> None:
    """A frame cut short anywhere, to nothing too, or with bytes after it: CorruptDataError."""
    data = frame([1, 2, 3], rows=2)
    for damaged in [*(data[:length] for length in range(len(data))), data + b"\0"]:
        with pytest.raises(CorruptDataError):
            decode_frame(damaged, what="x")


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("value", [0xFFFFFFFF, 0x7FFFFFFF, 10_000])
def test_absurd_lengths_are_refused_before_they_are_believed(position: int, value: int) -> None:
    """A frame whose CRC fits, with a length larger than the frame: CorruptDataError."""
    body = bytearray(frame([1, 2, 3])[:-4])
    struct.pack_into("<I", body, 4 * position, value)
    with pytest.raises(CorruptDataError):
        decode_frame(reseal(bytes(body)), what="x")


def test_a_row_table_that_does_not_fit_is_refused() -> None:
    """Row ends that decrease, or exceed the rows, with a CRC that fits: CorruptDataError."""
    data = frame([1, 2, 3])
    _, bitmap_length, _, _ = struct.unpack_from("<IIII", data)
    for ends in [(20, 10, 57), (0, 0, 0), (1, 2, 10_000), (5, 6, 7)]:
        body = bytearray(data[:-4])
        struct.pack_into("<III", body, 16 + bitmap_length, *ends)
        with pytest.raises(CorruptDataError):
            decode_frame(reseal(bytes(body)), what="x")


@pytest.mark.parametrize(
    "paths", [b"z", b"zgarbage", b"=x", b"=1.", b"=\xff", b"z" + b"\x78\x9c", b"q", b""]
)
def test_item_paths_that_cannot_be_read_are_corrupt(paths: bytes) -> None:
    """Paths that are no paths, with a CRC that fits: CorruptDataError when they are asked for."""
    found = decode_frame(reseal(with_parts(paths, b"")), what="x")
    with pytest.raises(CorruptDataError):
        found.paths()


@pytest.mark.parametrize("files", [b"{", b"[]", b'{"a":1}', b'{"a":[["x"]]}', b"\xff"])
def test_files_that_cannot_be_read_are_corrupt(files: bytes) -> None:
    """A table of files that is none, with a CRC that fits: CorruptDataError."""
    found = decode_frame(reseal(with_parts(b"=", files)), what="x")
    with pytest.raises(CorruptDataError):
        found.files()


def with_parts(paths: bytes, files: bytes) -> bytes:
    bitmap = bitmaps.dump(BitMap([1]))
    head = struct.pack("<IIII", 1, len(bitmap), len(paths), len(files))
    return head + bitmap + struct.pack("<I", 2) + paths + files + b"1\n"


# -- containers -------------------------------------------------------------------------------


class Note(msgspec.Struct):
    """A footer of the tests' own."""

    text: str = ""


def write_container(place: Place, blocks: list[bytes], text: str = "t") -> str:
    path = place.path("c")
    write_file(place.fs, path, b"".join(encode_container(b"TEST", blocks, Note(text))))
    return path


@pytest.mark.parametrize("blocks", [[], [b""], [b"one"], [b"a" * 70_000, b"", b"b"], [b"x"] * 9000])
def test_a_container_is_read_as_written(place: Place, blocks: list[bytes]) -> None:
    """Blocks and footer come back, for bodies and footers larger than one read too."""
    opened = open_container(place.fs, write_container(place, blocks), b"TEST", Note)
    opened.verify()
    assert "t" == opened.footer.text
    assert blocks == [opened.read_block(n) for n in range(len(opened.blocks))]


def test_a_footer_larger_than_the_first_read(place: Place) -> None:
    """A footer beyond 64 KiB is fetched by its length."""
    path = write_container(place, [b"block"], "x" * 200_000)
    assert 200_000 == len(open_container(place.fs, path, b"TEST", Note).footer.text)


def test_a_container_of_another_kind_is_refused(place: Place) -> None:
    """A plan is never read as a segment."""
    path = write_container(place, [])
    with pytest.raises(CorruptDataError, match="kind"):
        open_container(place.fs, path, b"SEGM", Note)


def test_a_flipped_format_version_is_damage(place: Place) -> None:
    """One flipped bit of the version is damage: the body's digest covers it."""
    path = write_container(place, [b"block"])
    data = bytearray(place.fs.read(path))
    struct.pack_into("<I", data, 12, FORMAT_VERSION + 1)
    write_file(place.fs, path, bytes(data))
    with pytest.raises(CorruptDataError, match="digest"):
        open_container(place.fs, path, b"TEST", Note)


def test_a_file_from_the_future_is_refused_by_name(place: Place, monkeypatch) -> None:
    """A whole file of a newer format says which version is needed; it is not called corrupt."""
    monkeypatch.setattr(container, "FORMAT_VERSION", FORMAT_VERSION + 1)
    path = write_container(place, [b"block"])
    monkeypatch.undo()
    with pytest.raises(RunDirError, match=f"format {FORMAT_VERSION + 1}"):
        open_container(place.fs, path, b"TEST", Note)


def test_a_segment_from_the_future_is_set_aside(place: Place, monkeypatch) -> None:
    """One segment of a newer format does not stop the run: it is damage to whoever merges."""
    monkeypatch.setattr(container, "FORMAT_VERSION", FORMAT_VERSION + 1)
    write_file(place.fs, place.path("s"), segment_bytes())
    monkeypatch.undo()
    with pytest.raises(CorruptDataError, match=f"format {FORMAT_VERSION + 1}"):
        open_segment(place.fs, place.path("s"), run_id=RUN_ID)


@pytest.mark.parametrize("data", [b"", b"x", b"\0" * 63, b"\0" * 64, b"\0" * 100_000, MAGIC * 20])
def test_what_is_no_container_is_corrupt(place: Place, data: bytes) -> None:
    """Empty files, zeros and fragments are refused."""
    write_file(place.fs, place.path("c"), data)
    with pytest.raises(CorruptDataError):
        open_container(place.fs, place.path("c"), b"TEST", Note)


@pytest.mark.parametrize("length", [0, 1, 1 << 31, (1 << 64) - 1])
def test_absurd_footer_lengths_are_refused(sim: Place, length: int) -> None:
    """A footer length beyond the file, or too small, is not believed."""
    path = write_container(sim, [b"block"])
    data = bytearray(sim.fs.read(path))
    struct.pack_into("<Q", data, len(data) - 16, length)
    write_file(sim.fs, path, bytes(data))
    with pytest.raises(CorruptDataError):
        open_container(sim.fs, path, b"TEST", Note)


@pytest.mark.parametrize(
    "entries",
    [
        [BlockEntry(16, 1 << 40, 0)],
        [BlockEntry(16, -1, 0)],
        [BlockEntry(15, 5, 0)],
        [BlockEntry(16, 4, 0)],
        [BlockEntry(16, 3, 0), BlockEntry(18, 2, 0)],
        [],
    ],
)
def test_block_tables_that_do_not_fit_are_refused(sim: Place, entries: list[BlockEntry]) -> None:
    """Blocks beyond the body, overlapping or with gaps, with a footer digest that fits."""
    footer = msgspec.msgpack.encode([entries, b"d" * 32, msgspec.msgpack.encode(Note("t"))])
    trailer = hashlib.sha256(footer).digest() + struct.pack("<Q", len(footer)) + MAGIC
    header = struct.pack("<8s4sI", MAGIC, b"TEST", FORMAT_VERSION)
    write_file(sim.fs, PATH, header + b"block" + footer + trailer)
    with pytest.raises(CorruptDataError):
        open_container(sim.fs, PATH, b"TEST", Note)


@pytest.mark.parametrize(
    "footer", [b"", b"\xc1", b"\x93", b"\xd9\x01\xff", b"\x93\x90\xc4\0\xc4\0", b"\x90" * 40]
)
def test_footers_that_cannot_be_decoded_are_corrupt(sim: Place, footer: bytes) -> None:
    """A footer with a digest that fits and no meaning: CorruptDataError."""
    trailer = hashlib.sha256(footer).digest() + struct.pack("<Q", len(footer)) + MAGIC
    header = struct.pack("<8s4sI", MAGIC, b"TEST", FORMAT_VERSION)
    write_file(sim.fs, PATH, header + footer + trailer)
    with pytest.raises(CorruptDataError):
        open_container(sim.fs, PATH, b"TEST", Note)


def test_a_missing_file_is_not_corrupt(place: Place) -> None:
    """A name that is not there is an OSError: it may come later."""
    with pytest.raises(FileNotFoundError):
        open_container(place.fs, place.path("none"), b"TEST", Note)


# -- segments ---------------------------------------------------------------------------------


FAILURES = [failure(9), failure(10, 2, retry=False)]


def test_a_segment_is_read_as_written(place: Place) -> None:
    """Completions, rows, failures and who wrote it come back."""
    write_file(place.fs, place.path("s"), segment_bytes([(1, 2), (), (7,)], FAILURES))
    segment = open_segment(place.fs, place.path("s"), run_id=RUN_ID)
    segment.container.verify()

    assert [1, 2, 7] == list(segment.completed)
    assert FAILURES == segment.failures()
    assert Writer(0, 0, 1) == segment.footer.writer
    assert [(1, 2, 2), (0, 0, 0), (7, 7, 1)] == segment.footer.chunks
    assert [(7, row(7))] == list(segment.frame(2).sources())


def test_a_segment_without_anything(place: Place) -> None:
    """A segment that carries progress alone is whole."""
    write_file(place.fs, place.path("s"), segment_bytes([]))
    segment = open_segment(place.fs, place.path("s"), run_id=RUN_ID)
    assert ([], [], []) == (list(segment.completed), list(segment.frame_numbers()),
                            segment.failures())  # fmt: skip


def test_a_segment_of_another_run_is_refused(place: Place) -> None:
    """A file copied from another run's directory is named with both runs."""
    write_file(place.fs, place.path("s"), segment_bytes(run_id="f" * 16))
    with pytest.raises(CorruptDataError, match="belongs to run ffffffffffffffff"):
        open_segment(place.fs, place.path("s"), run_id=RUN_ID)


def test_every_flipped_bit_of_a_segment_is_found(sim: Place) -> None:
    """
    Whichever bit of a small segment flips: CorruptDataError, never another exception, and
    never accepted with another meaning.
    """
    data = segment_bytes([(1, 2), (3,)], FAILURES)
    write_file(sim.fs, PATH, data)
    for position in range(len(data)):
        for bit in (0, 3, 7):
            sim.fs.server.rot(PATH, position, 1 << bit)
            with pytest.raises(CorruptDataError):
                content(open_segment(sim.fs, PATH, run_id=RUN_ID))
            sim.fs.server.rot(PATH, position, 1 << bit)
    assert [1, 2, 3] == content(open_segment(sim.fs, PATH, run_id=RUN_ID))[0]


def test_a_bad_footer_is_found_without_reading_the_body(sim: Place) -> None:
    """What merging believes is proven when the segment is opened: footer and trailer."""
    data = segment_bytes([(1, 2), (3,)], FAILURES)
    write_file(sim.fs, PATH, data)
    opened = open_segment(sim.fs, PATH, run_id=RUN_ID)
    body_end = max(b.offset + b.length for b in opened.container.blocks)
    for position in range(body_end, len(data)):
        sim.fs.server.rot(PATH, position)
        with pytest.raises(CorruptDataError):
            open_segment(sim.fs, PATH, run_id=RUN_ID)
        sim.fs.server.rot(PATH, position)


def test_every_truncation_of_a_segment_is_found(sim: Place) -> None:
    """A segment cut short at any byte, to zero length too, does not open."""
    data = segment_bytes([(1, 2), (3,)], FAILURES)
    for length in range(len(data)):
        write_file(sim.fs, PATH, data[:length])
        with pytest.raises(CorruptDataError):
            open_segment(sim.fs, PATH, run_id=RUN_ID)


def test_bytes_after_or_before_a_segment_are_found(sim: Place) -> None:
    """Nothing may precede the header or follow the trailer."""
    for data in (segment_bytes() + b"\0", b"\0" + segment_bytes(), segment_bytes() * 2):
        write_file(sim.fs, PATH, data)
        with pytest.raises(CorruptDataError):
            content(open_segment(sim.fs, PATH, run_id=RUN_ID))


def test_zeroed_pages_are_found(sim: Place) -> None:
    """Any 64 bytes of a segment replaced by zeros, as a torn write leaves them."""
    data = segment_bytes([(1, 2), (3,)], FAILURES)
    for start in range(0, len(data), 16):
        zeroed = data[:start] + bytes(len(data[start : start + 64])) + data[start + 64 :]
        write_file(sim.fs, PATH, zeroed)
        with pytest.raises(CorruptDataError):
            content(open_segment(sim.fs, PATH, run_id=RUN_ID))


def test_blocks_that_changed_places_are_found(sim: Place) -> None:
    """Two blocks of equal length exchanged fail their CRCs and the body's digest."""
    data = segment_bytes([(1,), (2,)])
    write_file(sim.fs, PATH, data)
    first, second = open_segment(sim.fs, PATH, run_id=RUN_ID).container.blocks
    assert first.length == second.length
    a = data[first.offset : second.offset]
    b = data[second.offset : second.offset + second.length]
    write_file(sim.fs, PATH, data.replace(a + b, b + a))

    segment = open_segment(sim.fs, PATH, run_id=RUN_ID)
    for call in (segment.container.verify, lambda: segment.frame(0), lambda: segment.frame(1)):
        with pytest.raises(CorruptDataError):
            call()
