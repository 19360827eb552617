"""Formats: what was encoded is decoded, and no bytes raise anything but typed errors."""

from __future__ import annotations

import hashlib
import struct

import google_crc32c
import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from hpcresume.errors import CorruptDataError
from hpcresume.ids import ItemPath
from hpcresume.segment import bitmap as bitmaps
from hpcresume.segment.container import FORMAT_VERSION, MAGIC, encode_container, open_container
from hpcresume.segment.frame import Columns, FrameBuilder, decode_frame
from hpcresume.segment.segment import KIND, Failure, Writer, encode_segment, open_segment
from tests.support.places import RUN_ID, footer_of, segment_bytes, write_file
from tests.support.simfs import SimFileSystem

indices = st.integers(0, (1 << 32) - 1)
paths = st.lists(st.integers(0, 10**6), max_size=4).map(lambda n: ItemPath(tuple(n)))
lines = st.binary(max_size=20).map(lambda data: data.replace(b"\n", b" ") + b"\n")
chunks = st.dictionaries(indices, st.lists(st.tuples(paths, lines), max_size=4), max_size=6)
failures = st.builds(
    Failure, indices, st.text(max_size=5), st.text(max_size=5), st.text(max_size=5),
    st.text(max_size=5), st.text(max_size=20), st.integers(1, 9), st.text(max_size=40),
    st.booleans(),
)  # fmt: skip


def build(chunk: dict[int, list[tuple[ItemPath, bytes]]]) -> bytes:
    builder = FrameBuilder()
    for index in sorted(chunk):
        builder.add(index, chunk[index])
    return builder.build()


def read_all(data: bytes) -> None:
    """Open bytes as a segment and read all of it."""
    fs = SimFileSystem()
    write_file(fs, "/s", data)
    segment = open_segment(fs, "/s", run_id=RUN_ID)
    segment.container.verify()
    segment.failures()
    for number in segment.frame_numbers():
        frame = segment.frame(number)
        frame.paths()
        frame.files()


@given(chunks)
def test_a_frame_is_decoded_as_built(chunk) -> None:
    """Sources, rows and paths of any chunk come back as they were added."""
    found = decode_frame(build(chunk), what="x")
    rows = [(i, b"".join(r for _, r in chunk[i])) for i in sorted(chunk)]
    assert rows == list(found.sources())
    assert [path for i in sorted(chunk) for path, _ in chunk[i]] == found.paths()


@given(chunks)
def test_a_frame_is_the_same_added_by_columns(chunk) -> None:
    """Whose each row is says as much as the rows of each source."""
    builder, sources = FrameBuilder(), sorted(chunk)
    owners = [index for index in sources for _ in chunk[index]]
    made = [row for index in sources for row in chunk[index]]
    paths, rows = [path for path, _ in made], [row for _, row in made]
    builder.add_columns(Columns(sources, owners, paths, rows))
    assert build(chunk) == builder.build()


@given(st.lists(chunks, max_size=4), st.lists(failures, max_size=3))
def test_a_segment_is_decoded_as_encoded(all_chunks, records) -> None:
    """Any frames and failures come back, and the bitmap is the union of the frames."""
    fs = SimFileSystem()
    footer = footer_of(Writer(1, 2, 3))
    frames = [build(chunk) for chunk in all_chunks]
    write_file(fs, "/s", b"".join(encode_segment(footer, frames, records)))
    segment = open_segment(fs, "/s", run_id=RUN_ID)
    segment.container.verify()
    assert BitMap(i for chunk in all_chunks for i in chunk) == segment.completed
    assert records == segment.failures()
    assert [decode_frame(f, what="x") for f in frames] == [
        segment.frame(n) for n in segment.frame_numbers()
    ]


@given(st.lists(st.binary(max_size=50), max_size=6), st.text(max_size=30))
def test_a_container_is_decoded_as_encoded(blocks, text) -> None:
    """Blocks of any content, empty ones too, and any footer."""

    class Note(msgspec.Struct):
        text: str

    fs = SimFileSystem()
    write_file(fs, "/c", b"".join(encode_container(b"TEST", blocks, Note(text))))
    opened = open_container(fs, "/c", b"TEST", Note)
    opened.verify()
    assert (blocks, text) == ([opened.read_block(n) for n in range(len(blocks))],
                              opened.footer.text)  # fmt: skip


@settings(max_examples=400)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_a_frame_or_corrupt(data: bytes, sealed: bool) -> None:
    """Random bytes, with and without a CRC that fits: a frame, or CorruptDataError."""
    if sealed:
        data += struct.pack("<I", google_crc32c.value(data))
    try:
        found = decode_frame(data, what="x")
        found.paths()
        found.files()
    except CorruptDataError:
        return
    assert sum(len(rows) for _, rows in found.sources()) == len(found.rows)


@settings(max_examples=400)
@given(st.lists(st.integers(0, 40), min_size=4, max_size=4), st.binary(max_size=80))
def test_frames_with_plausible_lengths(lengths: list[int], body: bytes) -> None:
    """Headers whose lengths nearly fit, with a CRC that fits: a frame, or CorruptDataError."""
    data = struct.pack("<IIII", *lengths) + body
    try:
        found = decode_frame(data + struct.pack("<I", google_crc32c.value(data)), what="x")
        found.paths()
        found.files()
    except CorruptDataError:
        return
    assert lengths[0] == len(found.completed)


@settings(max_examples=400)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_bitmap_or_corrupt(data: bytes) -> None:
    """Random bytes: a set whose members are sorted and as many as it says, or an error."""
    try:
        found = bitmaps.load(data, what="x")
    except CorruptDataError:
        return
    assert sorted(set(found)) == list(found)
    assert found == bitmaps.load(bitmaps.dump(found), what="x")


@settings(max_examples=300)
@given(st.lists(indices, max_size=60), st.data())
def test_a_damaged_bitmap_is_a_set_or_corrupt(members: list[int], data: st.DataObject) -> None:
    """Bits flipped in a bitmap that no digest guards: some set, or CorruptDataError."""
    damaged = bytearray(bitmaps.dump(BitMap(members)))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = bitmaps.load(bytes(damaged), what="x")
    except CorruptDataError:
        return
    assert len(found) == len(list(found))


@settings(max_examples=300)
@given(st.binary(max_size=400))
def test_any_bytes_are_a_segment_or_corrupt(data: bytes) -> None:
    """Random bytes as a file: CorruptDataError."""
    try:
        read_all(data)
    except CorruptDataError:
        return
    raise AssertionError("random bytes were accepted as a segment")


@settings(max_examples=400)
@given(st.binary(max_size=60), st.binary(max_size=120), st.binary(max_size=200))
def test_sealed_nonsense_is_corrupt(body: bytes, footer: bytes, inner: bytes) -> None:
    """Files whose digests all fit and whose content means nothing: typed errors only."""
    header = struct.pack("<8s4sI", MAGIC, KIND, FORMAT_VERSION)
    blocks = [(16, len(body), google_crc32c.value(body))]
    digest = hashlib.sha256(header + body).digest()
    for data in (footer, msgspec.msgpack.encode((blocks, digest, inner))):
        trailer = hashlib.sha256(data).digest() + struct.pack("<Q", len(data)) + MAGIC
        try:
            read_all(header + body + data + trailer)
        except CorruptDataError:
            continue
        raise AssertionError("nonsense was accepted as a segment")


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_segment_is_found(data: st.DataObject) -> None:
    """Bytes of a segment replaced, removed or inserted anywhere: typed errors only."""
    whole = segment_bytes([(1, 2), (3,)])
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(len(whole), start + 40)))
    damaged = whole[:start] + data.draw(st.binary(max_size=40)) + whole[stop:]
    if damaged == whole:
        return
    try:
        read_all(damaged)
    except CorruptDataError:
        return
    raise AssertionError("a damaged segment was accepted")
