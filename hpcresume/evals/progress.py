"""How an evaluation comes along, read from its JSONL file as it grows."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from hpcresume.evals.rows import OK
from hpcresume.evals.table import RowTable

_TOTAL = "total_tokens"


@dataclass
class Following:
    """Reads what is new in a JSONL file.

    Attributes:
        done: Repetitions of items that have a row.
        failed: Those of them whose row is an error or a time-out.
        tokens: Tokens that the rows report.
    """

    path: Path
    done: set[tuple[str, int]] = field(default_factory=set)
    failed: set[tuple[str, int]] = field(default_factory=set)
    tokens: int = 0
    _at: int = 0

    def begin(self, table: RowTable) -> None:
        """Take what is there already, which the file holds."""
        for slot in table.slots.values():
            self._note(table.row(slot))
        with contextlib.suppress(FileNotFoundError):
            self._at = self.path.stat().st_size

    def look(self) -> None:
        """Read the whole lines that have come."""
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._at += len(line)
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    self._note(line)

    def _note(self, line: bytes) -> None:
        row = orjson.loads(line)
        key = (row["id"], row["repetition"])
        self.done.add(key)
        self.failed.discard(key)
        if row["status"] != OK:
            self.failed.add(key)
        self.tokens += tokens_of(row.get("usage", {}))


def exceeds(failed: int, limit: float | None, expected: int) -> bool:
    """Tell whether more have failed than ``fail_on_error`` allows; 0 or None: any number may."""
    if not limit or not failed:
        return False
    return failed >= (limit * expected if limit < 1 else limit)


def tokens_of(usage: dict[str, float]) -> int:
    """Return the tokens that a row reports: the total, else the sum of what names tokens."""
    if _TOTAL in usage:
        return int(usage[_TOTAL])
    return int(sum(amount for name, amount in usage.items() if name.endswith("_tokens")))
