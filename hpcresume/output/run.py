"""A run from Python: its rows and how it stands."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpcresume.ids import item_id
from hpcresume.output.rows import BadSegmentError, Span, spans, take_back_segment, union_of
from hpcresume.run.directory import RunDir
from hpcresume.run.manifest import Manifest


class Run:
    """A run, opened by its directory.

    Attributes:
        path: The directory, absolute: it stays what it was when the working directory changes.

    Raises:
        RunDirError: Not a run directory, or one that cannot be read.  Every method raises it,
            too, once the directory has gone.
        CorruptDataError: Its ``run.json`` is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.abspath(os.path.expanduser(path)))
        RunDir.open(str(self.path))

    @property
    def _run(self) -> RunDir:
        # Opened each time: a directory that has gone reads as a run without sources.
        return RunDir.open(str(self.path))

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def rows(self, *, with_source: bool = False) -> Iterator[Any]:
        """Yield the rows of all completed sources in manifest order, decoded.

        Args:
            with_source: Yield ``{"source", "item", "row"}`` instead of the row.

        Raises:
            CorruptDataError: A published segment is damaged.  Its sources are open again;
                what was yielded so far stands.
            SharedStorageError: A segment cannot be read.
        """
        run = self._run
        manifest, union = Manifest.open(run), union_of(run)
        try:
            for span in spans(run, union, manifest):
                yield from _wrapped(span, manifest) if with_source else span.objects()
        except BadSegmentError as error:
            take_back_segment(run, error)
            raise

    def status(self) -> dict[str, Any]:
        """Return how the run stands, as ``hpcresume status --json`` prints it.

        Raises:
            CorruptDataError: The list of sources is damaged.
            SharedStorageError: The run directory cannot be read.
        """
        from hpcresume.observe.status import read_status

        return read_status(self._run).to_dict()


def _wrapped(span: Span, manifest: Manifest) -> Iterator[dict[str, Any]]:
    rows = span.objects()
    for index, paths in span.by_source():
        source_id = manifest.entry(index).source_id
        for path in paths:
            item = item_id(source_id, span.origin.stage_names, path)
            yield {"source": source_id, "item": item, "row": next(rows)}
