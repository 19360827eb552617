"""The JSONL file: a view of the ledger that grows by a row as soon as an item is safe.

Only what the ledger has committed is written, one line at a time, through one open file.  The
file may lack rows, or end in half of one, after a kill or on a full disk: every start compares
it with the ledger and mends it.  Nothing is ever computed from it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from hpcresume.errors import SharedStorageError
from hpcresume.evals.item import split_id
from hpcresume.evals.layout import RESULT, rows_path
from hpcresume.evals.progress import exceeds
from hpcresume.evals.rows import OK
from hpcresume.evals.settings import EvalSettings
from hpcresume.evals.table import RowTable, given_up_row, row_digest
from hpcresume.failpoints import failpoint
from hpcresume.fs import POSIX, TEMPORARY_PREFIX
from hpcresume.pipeline.observer import GivenUp, ObservedTask
from hpcresume.run.directory import RunDir
from hpcresume.run.manifest import Manifest

log = logging.getLogger(__name__)
TOO_MANY = "more items failed than --fail-on-error allows"


class RowFile:
    """The open file, as one array task of this machine appends to it.

    Args:
        path: The file; its directory exists.
        fsync_s: It is synced when this many seconds have passed since the last time.
    """

    def __init__(self, path: Path, *, fsync_s: float) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._fsync_s, self._synced = fsync_s, time.monotonic()
        self._torn = False

    def append(self, lines: bytes) -> None:
        """Write whole lines, in one call where the system takes them so.

        Raises:
            OSError: The disk is full, for example.  The next line begins on one of its own.
        """
        data = memoryview(b"\n" + lines if self._torn else lines)
        at = 0
        while at < len(data):
            try:
                failpoint("eval.append")
                at += os.write(self._fd, data[at:])
            except OSError:
                self._torn = self._torn or at > 0
                raise
        self._torn = False
        if time.monotonic() - self._synced >= self._fsync_s:
            self.sync()

    def sync(self) -> None:
        """Have the system write what it holds back."""
        os.fdatasync(self._fd)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync and close."""
        try:
            self.sync()
        finally:
            os.close(self._fd)


class ItemObserver:
    """What happens when an item is complete, in every mode: its row is written, then told."""

    def __init__(self, task: ObservedTask, settings: EvalSettings) -> None:
        from hpcresume.evals.code import UserCall

        self._run, self._settings = RunDir.open(str(task.run)), settings
        self._manifest = Manifest.open(self._run)
        self.wants_stop, self._failed = "", 0
        # Who runs it in the foreground counts the errors of all tasks.
        self._expected = 0 if task.cluster == "local" else expected_of(self._manifest, settings)
        # Over several nodes lines of one file would mix; there the merge writes it.
        path = rows_path(str(task.run), settings) if task.cluster == "local" else None
        self._file = RowFile(path, fsync_s=settings.fsync_s) if path is not None else None
        cwd = Path(settings.cwd)
        self._callback = UserCall(settings.on_item, cwd) if settings.on_item else None

    def completed(self, sources: Sequence[tuple[int, bytes]]) -> None:
        """Write and tell the rows of these items."""
        for _, lines in sources:
            self.on_item_complete(lines)

    def given_up(self, failure: GivenUp) -> None:
        """Write and tell the row of an item that its worker died of."""
        payload = self._manifest.entry(failure.source).payload
        self.on_item_complete(given_up_row(payload, failure, self._settings) + b"\n")

    def on_item_complete(self, line: bytes) -> None:
        """Do what is due for one item's row; a failure is logged and touches no other item."""
        if self._expected:
            self._count(line)
        try:
            if self._file is not None:
                self._file.append(line)
        except OSError:
            log.exception(
                "item %s: its row cannot be written to the JSONL file; it is safe in the ledger, "
                "and the file is mended when the evaluation ends or is resumed",
                _name_of(line),
            )
        if self._callback is None:
            return
        try:
            call_now(self._callback, orjson.loads(line))
        except Exception:
            log.exception("item %s: the callback failed", _name_of(line))

    def _count(self, line: bytes) -> None:
        """Stop the run where this task alone has more errors than are allowed in all."""
        self._failed += orjson.loads(line)["status"] != OK
        if not self.wants_stop and exceeds(
            self._failed, self._settings.fail_on_error, self._expected
        ):
            self.wants_stop = TOO_MANY
            # Tasks that are to start, and the merge, read it.
            self._run.set_mark("stop")

    def close(self) -> None:
        """Sync the file."""
        if self._file is not None:
            self._file.close()


def expected_of(manifest: Manifest, settings: EvalSettings) -> int:
    """Return the number of items that a share of errors is of, 0 where nothing is limited."""
    if not settings.fail_on_error:
        return 0
    withdrawn = manifest.withdrawn()
    listed = (index for index in range(manifest.total) if index not in withdrawn)
    return sum(split_id(entry.source_id)[1] == 1 for entry in manifest.entries(listed))


def call_now(call: Any, *arguments: Any) -> Any:
    """Call a user's function, async or not, from a thread without an event loop."""
    import asyncio

    return asyncio.run(call(*arguments))


def _name_of(line: bytes) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(orjson.loads(line)["id"])
    return "?"


@dataclass(frozen=True, slots=True)
class Repair:
    """What was wrong with the file: lines that were missing, and lines that did not belong."""

    missing: int = 0
    foreign: int = 0


def repair(path: Path, table: RowTable, *, is_whole: bool) -> Repair:
    """Make a JSONL file hold each row of the table once, and nothing else.

    Lines that are right keep their order.

    Args:
        path: The file.
        table: The rows that count.
        is_whole: The table has everything that was ever committed, as after dead attempts were
            recovered.  Otherwise rows of items that it does not know are left in the file.

    Raises:
        SharedStorageError: The file cannot be written; it is as it was.
    """
    try:
        missing = {slot.digest: base for base, slot in table.slots.items()}
        kept, foreign = _compare(path, missing, None if is_whole else table.known)
        failpoint("eval.repair")
        if foreign or missing or not path.exists():
            path.parent.mkdir(mode=0o700, exist_ok=True)
            # Replaced whole: two merges may do it at the same time.
            with _replacing(path) as temporary, open(temporary, "xb", buffering=1 << 20) as file:
                file.writelines(_lines_at(path, kept))
                _write_rows(file, table, missing)
        return Repair(len(missing), foreign)
    except OSError as error:
        raise SharedStorageError(
            f"{path} cannot be written: {error.strerror or error}. "
            "Every row is safe in the run's ledger and segments. Make space, then resume: "
            f"hpcresume eval --resume {path.parent}",
            path=str(path),
        ) from error


def _compare(
    path: Path, missing: dict[bytes, str], known: set[tuple[str, int]] | None
) -> tuple[list[tuple[int, int]], int]:
    """Take the rows that a file has out of ``missing``; return where they are, and other lines."""
    kept, foreign, at = list[tuple[int, int]](), 0, 0
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            is_row = line.endswith(b"\n")
            counts = is_row and missing.pop(row_digest(line[:-1]), None) is not None
            if counts or (is_row and known is not None and _is_of_none(line, known)):
                kept.append((at, len(line)))
            else:
                foreign += 1
            at += len(line)
    return kept, foreign


def _is_of_none(line: bytes, known: set[tuple[str, int]]) -> bool:
    """Tell whether a line is the row of an item that has no other."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        row = orjson.loads(line)
        return (row["id"], row["repetition"]) not in known
    return False


def _lines_at(path: Path, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for offset, size in places:
            file.seek(offset)
            yield file.read(size)


def _write_rows(file: Any, table: RowTable, missing: dict[bytes, str]) -> None:
    for base in missing.values():
        file.write(table.row(table.slots[base]) + b"\n")
    file.flush()
    os.fsync(file.fileno())


def write_result(run: RunDir, table: RowTable, order: Sequence[str]) -> None:
    """Write all rows as one JSON list, in the dataset's order, atomically.

    Raises:
        SharedStorageError: It cannot be written; an earlier one is as it was.
    """

    def parts() -> Iterator[bytes]:
        yield b"["
        separator = b"\n"
        for base in order:
            slot = table.slots.get(base)
            if slot is not None:
                yield separator + table.row(slot)
                separator = b",\n"
        yield b"\n]\n"

    write_atomically(Path(run.join(RESULT)), parts())


def write_atomically(path: Path, parts: Iterator[bytes]) -> None:
    """Write a file under another name, sync it and rename it.

    Raises:
        SharedStorageError: It cannot be written; an earlier one is as it was.
    """
    try:
        with _replacing(path) as temporary, open(temporary, "xb", buffering=1 << 20) as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise SharedStorageError(
            f"{path} cannot be written: {error.strerror or error}. "
            "Every row is safe in the run's segments. Make space, then resume.",
            path=str(path),
        ) from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[str]:
    temporary = str(path.parent / f"{TEMPORARY_PREFIX}{path.name}-{secrets.token_hex(8)}")
    try:
        yield temporary
        os.replace(temporary, path)
        POSIX.sync_directory(str(path.parent))
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
