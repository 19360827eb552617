"""What the workers make of rows for ``hr.Parts``, and what they refuse."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pytest

import hpcresume as hr
from hpcresume.errors import LocalStorageError, PipelineError, RowError
from hpcresume.ids import ItemPath
from hpcresume.segment.frame import Blob, blob_of, decode_frame
from hpcresume.segment.parquet_footer import whole
from hpcresume.sinks import packing
from hpcresume.sinks.packing import BlobFile, JsonlPacker, Packed, ParquetPacker, Place
from hpcresume.sinks.parquet import read_table, table_lines


def packed(packer: Any, *rows: Any) -> list[Packed]:
    """Return one source for each list of rows."""
    return [
        Packed(n, f"s{n}", [(ItemPath((0, k)), packer.row(v)) for k, v in enumerate(values)])
        for n, values in enumerate(rows)
    ]


def table_of(directory: Path, frame: bytes) -> pa.Table:
    """Return the rows of a Parquet frame."""
    blob = blob_of(frame, what="x")
    return read_table(whole(bytes_of(directory, blob), blob.footer))


def bytes_of(directory: Path, blob: Blob) -> bytes:
    """Return a blob's bytes, out of the file that it shares with others."""
    data = (directory / blob.file).read_bytes()[blob.offset : blob.offset + blob.length]
    assert blob.crc == google_crc32c.value(data)
    return data


def test_json_lines_lie_in_a_blob(tmp_path: Path) -> None:
    """The frame says where each source's rows end in the file; without rows there is no file."""
    packer = JsonlPacker(str(tmp_path))
    frame = decode_frame(packer.pack(packed(packer, [1, 2], [], [{"a": 3}])), what="x")
    assert b'1\n2\n{"a":3}\n' == (tmp_path / frame.blob.file).read_bytes()
    assert [(0, 0, 4), (1, 4, 4), (2, 4, 12)] == list(frame.extents())
    assert [(0, 0), (0, 1), (0, 0)] == frame.paths()

    empty = decode_frame(packer.pack(packed(packer, [], [])), what="x")
    assert (None, 2) == (empty.blob, len(empty.completed))
    assert 1 == len(os.listdir(tmp_path))


def test_blobs_follow_each_other_in_a_file_until_it_is_full(tmp_path: Path, monkeypatch) -> None:
    """What one worker makes lies in few files: a commit syncs each of them once."""
    monkeypatch.setattr(packing, "BLOB_FILE_BYTES", 20)
    packer = JsonlPacker(str(tmp_path))
    blobs = [
        blob_of(packer.pack(packed(packer, [n * "x", n])), what="x") for n in (1, 100, 3, 4, 5)
    ]
    assert [0, 6, 0, 8, 17] == [blob.offset for blob in blobs]
    assert 2 == len({blob.file for blob in blobs}) == len(os.listdir(tmp_path))
    assert [b'"x"\n1\n', b'"xxx"\n3\n'] == [bytes_of(tmp_path, blobs[n]) for n in (0, 2)]


def test_blobs_of_two_threads_do_not_mix(tmp_path: Path) -> None:
    """Nothing comes between the pieces of a blob."""
    file, places = BlobFile(str(tmp_path)), list[Place]()
    other = threading.Thread(target=lambda: places.append(file.append([b"other"])))

    def pieces() -> Iterator[bytes]:
        yield b"one "
        other.start()
        other.join(0.2)
        yield b"blob"

    places.append(file.append(pieces()))
    other.join()
    data = (tmp_path / places[0].file).read_bytes()
    found = [data[place.offset : place.offset + place.length] for place in places]
    assert [b"one blob", b"other"] == found
    assert list(map(google_crc32c.value, found)) == [place.crc for place in places]


def test_a_forked_process_does_not_write_between_the_blobs(tmp_path: Path) -> None:
    """A stage's child that raises comes back into the worker's code; its parent goes on."""
    file = BlobFile(str(tmp_path))
    first = file.append([b"first"])
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            file.append([b"child's"])
        os._exit(0)
    os.waitpid(child, 0)
    second = file.append([b"second"])
    assert first.file == second.file
    assert b"firstsecond" == (tmp_path / first.file).read_bytes()
    assert 2 == len(os.listdir(tmp_path))


def test_a_disk_that_fills_up_leaves_the_blobs_before(tmp_path: Path, monkeypatch) -> None:
    """Half a blob is cut off; what the file held stays, and the next blob begins another one."""
    packer = JsonlPacker(str(tmp_path))
    first = blob_of(packer.pack(packed(packer, [1])), what="x")

    def half(file: IO[bytes], data: bytes) -> None:
        file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    refused = packed(packer, ["x" * 100])
    with monkeypatch.context() as full:
        full.setattr(packing, "_write_all", half)
        with pytest.raises(LocalStorageError, match="No space left"):
            packer.pack(refused)
    assert b"1\n" == (tmp_path / first.file).read_bytes()

    second = blob_of(packer.pack(packed(packer, [2])), what="x")
    assert (b"2\n", True) == (bytes_of(tmp_path, second), first.file != second.file)


def test_a_blob_that_is_broken_off_does_not_move_those_after_it(tmp_path: Path) -> None:
    """Whatever ends it midway, a blob of later lies where it is said to."""
    file = BlobFile(str(tmp_path))
    first = file.append([b"first"])
    raw = file._file

    class Interrupted:
        """A file whose writing is done when it is told to stop."""

        def write(self, data: bytes) -> int:
            raw.write(data)
            raise MemoryError

        def close(self) -> None:
            raw.close()

    file._file = Interrupted()  # type: ignore[assignment]
    with pytest.raises(MemoryError):
        file.append([b"half"])
    second = file.append([b"second"])
    for place, blob in ((first, b"first"), (second, b"second")):
        data = (tmp_path / place.file).read_bytes()
        assert blob == data[place.offset : place.offset + place.length]


def test_a_full_file_that_does_not_close_well_stays(tmp_path: Path, monkeypatch) -> None:
    """Its blobs are committed, or about to be; what is wrong with it the sync says."""
    monkeypatch.setattr(packing, "BLOB_FILE_BYTES", 1)
    file = BlobFile(str(tmp_path))
    first = file.append([b"first"])

    class Failing:
        """A file whose close tells of an error."""

        def close(self) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    file._file = Failing()  # type: ignore[assignment]
    second = file.append([b"second"])
    assert [b"first", b"second"] == [
        (tmp_path / place.file).read_bytes() for place in (first, second)
    ]


def test_dicts_arrays_and_tables_become_columns(tmp_path: Path) -> None:
    """Dicts, numpy values, batches and tables come back as rows; a batch counts as its rows."""
    packer = ParquetPacker({"n": "int64", "v": pa.list_(pa.float32())}, str(tmp_path))
    batch = pa.table({"v": [[1.0]], "n": [7]}).to_batches()[0]
    data = packer.pack(
        packed(
            packer,
            [{"n": np.int32(1), "v": np.ones(2, np.float32)}, batch, {"n": 3}],
            [],
            [pa.table({"n": [8, 9], "v": [[], None]})],
        )
    )
    frame = decode_frame(data, what="x")
    assert [
        {"n": 1, "v": [1, 1]}, {"n": 7, "v": [1]}, {"n": 3, "v": None}, {"n": 8, "v": []},
        {"n": 9, "v": None},
    ] == table_of(tmp_path, data).to_pylist()  # fmt: skip
    assert [(0, 0, 3), (1, 3, 3), (2, 3, 5)] == list(frame.extents())
    assert 5 == len(frame.paths())


def test_the_first_rows_give_the_schema(tmp_path: Path) -> None:
    """Without a schema that of the first rows holds for all workers of the attempt."""
    first, second = (ParquetPacker(None, str(tmp_path)) for _ in range(2))
    first.pack(packed(first, [{"n": 1, "s": "a"}]))
    data = second.pack(packed(second, [{"s": "b"}, {"n": 2}]))
    assert [{"n": None, "s": "b"}, {"n": 2, "s": None}] == table_of(tmp_path, data).to_pylist()


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"n": "two"}, "int64"),
        ({"n": 1.5}, "1.5"),
        ({"n": 1, "other": 2}, "'other'"),
        (pa.table({"n": [1], "x": [2]}), "'x'"),
        ({"n": 1, "in": {"a": [0.5]}}, "0.5"),
    ],
    ids=["text", "fraction", "unknown column", "table of other columns", "inner fraction"],
)
def test_rows_that_do_not_fit_fail_their_source_alone(tmp_path: Path, row: Any, why: str) -> None:
    """The error names the column or value, and all other sources of the call are packed."""
    schema = {"n": "int64", "in": pa.struct([("a", pa.list_(pa.int32()))])}
    packer = ParquetPacker(schema, str(tmp_path))
    good = packer.row({"n": 1})
    fit = packer.fit([0, 3, 4], [good, packer.row(row), good])
    assert [3] == list(fit.misfits)
    assert why in str(fit.misfits[3])
    assert "schema given" in str(fit.misfits[3])


def test_a_row_without_columns_is_refused(tmp_path: Path) -> None:
    """A number is no row of Parquet."""
    with pytest.raises(RowError, match=r"builtins\.int"):
        ParquetPacker(None, str(tmp_path)).row(3)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch, form: str) -> None:
    """A refusal of the node-local disk is its own error, and no half blob stays."""
    packer = JsonlPacker(str(tmp_path)) if form == "jsonl" else ParquetPacker(None, str(tmp_path))
    sources = packed(packer, [{"a": 1}])
    packer.fit([0], [row for _, row in sources[0].rows])
    before = os.listdir(tmp_path)

    def full(path: str, flags: int) -> int:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        os.close(fd)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(packing, "_private", full)
    with pytest.raises(LocalStorageError, match="No space left"):
        packer.pack(sources)
    assert before == os.listdir(tmp_path)


def test_values_of_parquet_as_json_lines() -> None:
    """Times and decimals become text; bytes have no form in JSON."""
    when, money = pa.array([0], pa.timestamp("s")), pa.array(["1.5"]).cast(pa.decimal128(4, 1))
    table = pa.table({"t": when, "d": money})
    assert [b'{"t":"1970-01-01T00:00:00","d":"1.5"}'] == table_lines(table)
    with pytest.raises(RowError, match="'raw' holds bytes"):
        table_lines(pa.table({"raw": [b"x"]}))


@pytest.mark.parametrize(
    "arguments",
    [{"format": "csv"}, {"format": "jsonl", "schema": {"a": "int64"}},
     {"format": "jsonl", "size": 0}, {"format": "parquet", "schema": {}},
     {"format": "parquet", "schema": 3}],
    ids=str,
)  # fmt: skip
def test_wrong_declarations_are_refused(arguments: dict[str, Any]) -> None:
    """What cannot be a sink is refused where it is written."""
    with pytest.raises(PipelineError, match="Parts"):
        hr.Parts(**arguments)


def test_a_declaration_describes_itself_alike_in_both_spellings() -> None:
    """A schema and the dict that says the same are one run."""
    given = pa.schema([("n", pa.int64()), ("s", pa.string())])
    assert (
        hr.Parts("parquet", schema=given).describe()
        == hr.Parts("parquet", schema={"n": "int64", "s": "string"}).describe()
    )
