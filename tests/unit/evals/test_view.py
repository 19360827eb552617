"""The JSONL file: appended line by line, and mended from the rows that count."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import IO, Any

import orjson
import pytest

from hpcresume.errors import SharedStorageError
from hpcresume.evals.table import RowTable, Slot, row_digest
from hpcresume.evals.view import Repair, RowFile, repair, write_atomically


def row(n: int) -> bytes:
    """Return a row."""
    return orjson.dumps({"id": str(n), "repetition": 0, "status": "ok", "output": "x" * n})


def table_of(file: IO[bytes], numbers: list[int]) -> RowTable:
    """Return a table of some rows."""
    table = RowTable(file)
    for n in numbers:
        data = row(n)
        table.slots[str(n)] = Slot(n, 1, file.tell(), len(data), "ok", row_digest(data))
        table.bases[str(n)] = n
        table.known.add((str(n), 0))
        file.write(data)
    file.flush()
    return table


def lines(*numbers: int) -> bytes:
    """Return rows as a file holds them."""
    return b"".join(row(n) + b"\n" for n in numbers)


@pytest.mark.parametrize(
    ("found", "left", "repaired"),
    [
        (None, lines(1, 2, 3), Repair(3, 0)),
        (lines(1, 2, 3), lines(1, 2, 3), Repair(0, 0)),
        (lines(3, 1, 2), lines(3, 1, 2), Repair(0, 0)),
        (lines(2), lines(2, 1, 3), Repair(2, 0)),
        (lines(1, 2) + row(3)[:9], lines(1, 2, 3), Repair(1, 1)),
        (lines(1, 2) + row(3), lines(1, 2, 3), Repair(1, 1)),
        (lines(3, 2, 2, 1), lines(3, 2, 1), Repair(0, 1)),
        (lines(1) + b"garbage\n\n" + lines(9, 2, 3), lines(1, 2, 3), Repair(0, 3)),
        (b"\0" * 50, lines(1, 2, 3), Repair(3, 1)),
    ],
    ids=[
        "none",
        "whole",
        "reordered",
        "missing",
        "torn",
        "no newline",
        "twice",
        "foreign",
        "zeros",
    ],
)
def test_repair(tmp_path: Path, found: bytes | None, left: bytes, repaired: Repair) -> None:
    """
    E7: lines that are torn, garbage, of other rows or there twice go, rows that are missing
    come, and what is right stays where it is; a second repair finds nothing to do.
    """
    path = tmp_path / "rows.jsonl"
    if found is not None:
        path.write_bytes(found)
    with (tmp_path / "table").open("wb+") as file:
        table = table_of(file, [1, 2, 3])
        assert repaired == repair(path, table, is_whole=True)
        assert left == path.read_bytes()
        inode = path.stat().st_ino
        assert Repair(0, 0) == repair(path, table, is_whole=False)
    assert inode == path.stat().st_ino
    assert ["rows.jsonl", "table"] == sorted(p.name for p in tmp_path.iterdir())


def test_rows_that_are_not_published_yet_stay(tmp_path: Path) -> None:
    """
    Where the ledger of a killed attempt has not been read, rows of items that are otherwise
    unknown stay in the file; what is no row, or another row of a known item, goes.
    """
    path = tmp_path / "rows.jsonl"
    other = row(1).replace(b"ok", b"error") + b"\n"
    path.write_bytes(lines(1, 7) + b"garbage\n" + other)
    with (tmp_path / "table").open("wb+") as file:
        table = table_of(file, [1, 2])
        assert Repair(1, 2) == repair(path, table, is_whole=False)
    assert lines(1, 7, 2) == path.read_bytes()


def test_one_open_and_one_write_for_each_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E6: the file is opened once, and every row is one write that is visible at once."""
    opened, written = [], []
    really_open, really_write = os.open, os.write
    monkeypatch.setattr(os, "open", lambda *a, **k: opened.append(a[0]) or really_open(*a, **k))
    monkeypatch.setattr(os, "write", lambda *a: written.append(a[0]) or really_write(*a))
    file = RowFile(tmp_path / "rows.jsonl", fsync_s=1000)
    for n in range(5):
        file.append(lines(n))
        assert lines(*range(n + 1)) == (tmp_path / "rows.jsonl").read_bytes()
    file.close()
    assert (1, 5) == (len(opened), len(written))


@pytest.mark.parametrize(("interval", "synced"), [(0, 6), (1000, 1)])
def test_sync_at_an_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: float, synced: int
) -> None:
    """Every row is synced with an interval of 0; otherwise by the interval, and at the end."""
    calls = []
    monkeypatch.setattr(os, "fdatasync", calls.append)
    file = RowFile(tmp_path / "rows.jsonl", fsync_s=interval)
    for n in range(5):
        file.append(lines(n))
    file.close()
    assert synced == len(calls)


def test_a_line_after_half_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """E4: after a disk that was full in the middle of a row, the next row has a line of its own."""
    file = RowFile(tmp_path / "rows.jsonl", fsync_s=1000)
    really_write, room = os.write, [5]

    def full(fd: int, data: Any) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = really_write(fd, bytes(data)[: room[0]])
        room[0] -= written
        return written

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for _ in range(2):
            with pytest.raises(OSError, match="No space"):
                file.append(lines(1))
    file.append(lines(2))
    file.close()
    assert lines(1)[:5] + b"\n" + lines(2) == (tmp_path / "rows.jsonl").read_bytes()


def test_a_result_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    """E8: a failure in the middle leaves the earlier result and no other file."""
    path = tmp_path / "result.json"
    path.write_text("earlier")

    def parts() -> Any:
        yield b"new"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SharedStorageError, match="No space left"):
        write_atomically(path, parts())
    assert ("earlier", [path]) == (path.read_text(), list(tmp_path.iterdir()))
