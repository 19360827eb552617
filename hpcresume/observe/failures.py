"""The sources of a run that failed: what is known of each."""

from __future__ import annotations

from typing import Any

import msgspec

from hpcresume.merge.generation import SourceFailures, Union
from hpcresume.run.manifest import Manifest


class FailedSource(msgspec.Struct, frozen=True):
    """One source that failed and is not completed.

    Attributes:
        source: Its id.
        index: Its place in the manifest.
        state: ``quarantined`` (not tried again) or ``failing`` (tried again).
        attempts: Tries charged to it.
        stage: Where its last try failed.
        item: The item that failed there.
        kind: Exception type, ``Failed``, ``timeout`` or ``death``.
        message: One line.
        traceback: The traceback, or the tail of the worker's output.
    """

    source: str
    index: int
    state: str
    attempts: int
    stage: str
    item: str
    kind: str
    message: str
    traceback: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


def failed_sources(manifest: Manifest, union: Union) -> list[FailedSource]:
    """Return the failed sources, quarantined ones first, each group in manifest order."""
    withdrawn = manifest.withdrawn()
    known = sorted(
        (not failures.quarantined, index)
        for index, failures in union.failures.items()
        if index not in withdrawn
    )
    return [_failed(index, union.failures[index]) for _, index in known]


def _failed(index: int, failures: SourceFailures) -> FailedSource:
    last = failures.last
    return FailedSource(
        source=last.source_id,
        index=index,
        state="quarantined" if failures.quarantined else "failing",
        attempts=failures.attempts,
        stage=last.stage,
        item=last.item,
        kind=last.kind,
        message=last.message,
        traceback=last.traceback,
    )
