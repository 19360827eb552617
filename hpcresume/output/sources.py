"""Sources that are another run's results; what :func:`results` returns."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from hpcresume.errors import RowError, SourcesError
from hpcresume.output.collect import scope_of
from hpcresume.output.rows import SourceRows, Span, spans, union_of
from hpcresume.pipeline.sources import Source, SourceList
from hpcresume.run.directory import RunDir
from hpcresume.run.manifest import Manifest


@dataclass(frozen=True)
class ResultSources(SourceList):
    """The sources of a finished run with their rows; what :func:`results` returns."""

    run: Path

    def __iter__(self) -> Iterator[Source]:
        run = RunDir.open(str(self.run))
        _refuse_without_rows(run)
        manifest, union = Manifest.open(run), union_of(run)
        scope = scope_of(manifest, union)
        missing = scope.wanted - len(scope.completed | scope.quarantined)
        failed = len(scope.quarantined)
        if missing or failed > run.tolerated(scope.wanted):
            raise _unfinished(run, missing, failed, scope.wanted)
        for span in spans(run, union, manifest):
            for found in _each(run, span):
                if found.rows:
                    source_id = manifest.entry(found.source).source_id
                    rows = [orjson.loads(row) for row in found.rows]
                    yield Source(source_id, rows, float(len(rows)))

    def describe(self) -> dict[str, Any]:
        """Return the run's directory and its id: another run in its place is another input."""
        run_id = RunDir.open(str(self.run)).run_id
        return {"kind": "results", "run": str(self.run), "run_id": run_id}


def _each(run: RunDir, span: Span) -> Iterator[SourceRows]:
    try:
        yield from span.each()
    except RowError as error:
        raise SourcesError(
            f"the rows of {run.path} cannot be payloads: {error.fields['what']!r} holds bytes. "
            f"Collect its parts (hpcresume collect {run.path} --layout parts -o DIR) and take "
            "hr.chunks('DIR/*.parquet').",
            path=run.path,
        ) from error


def _refuse_without_rows(run: RunDir) -> None:
    sink = run.fingerprint().get("sink")
    if not isinstance(sink, dict) or sink.get("kind") not in ("rows", "parts"):
        raise SourcesError(
            f"{run.path} keeps no rows that could be sources: its sink is {sink}. "
            "Results come from runs with sink=hr.Rows() or hr.Parts(...).",
            path=run.path,
        )


def _unfinished(run: RunDir, missing: int, failed: int, total: int) -> SourcesError:
    some = f"{missing} of its {total} sources are missing and {failed} are quarantined"
    again = " --retry-quarantined" if failed and not missing else ""
    return SourcesError(
        f"{run.path} is not finished: {some}. A run over its results would leave theirs out. "
        f"Complete it first: hpcresume submit {run.path}{again}",
        path=run.path,
        missing=missing,
        quarantined=failed,
    )


def results(run: str | os.PathLike[str]) -> ResultSources:
    """Return the sources of another run, each with the list of its rows as payload.

    The ids are those of that run; sources without rows are left out.  The rows are copied
    when they are listed, in constant memory, so that run may be removed afterwards; the
    manifest becomes as large as they are.  Of terabytes collect the parts and take
    :func:`chunks` of them.  When that run has grown, submitting again takes the new sources;
    rows that have changed are refused by name.

    Args:
        run: The run directory of a finished run with ``sink=hr.Rows()`` or ``hr.Parts(...)``.

    Returns:
        Sources with a list of JSON values as payload and its length as weight.

    Raises:
        RunDirError: When listed: not a run directory.
        SourcesError: When listed: the run is not finished, or more of its sources are
            quarantined than it tolerates, or it keeps no rows.
        CorruptDataError: When listed: one of its published files is damaged.
    """
    return ResultSources(Path(os.path.abspath(os.path.expanduser(run))))
