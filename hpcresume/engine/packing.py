"""The packer of a pipeline's sink."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

from hpcresume.pipeline.pipeline import Rows, Sink
from hpcresume.sinks.packing import JsonlPacker, Packed, Packer, ParquetPacker, RowsPacker
from hpcresume.sinks.parquet import require_pyarrow


def make_packer(sink: Sink | None, parts: str, writer: str = "") -> Packer:
    """Return what packs a sink's rows in the worker that made them.

    Args:
        sink: The pipeline's sink.
        parts: Node-local directory for blobs; unused where rows stay in their frames.
        writer: The worker, as blobs name it.

    Raises:
        ConfigError: Parquet is asked for and pyarrow is not installed.
    """
    if sink is None or isinstance(sink, Rows):
        return RowsPacker()
    if sink.format == "jsonl":
        return JsonlPacker(parts, writer)
    require_pyarrow("write parts of Parquet")
    return ParquetPacker(sink.schema, parts, writer)


def make_driver_packer(sink: Sink | None, parts: str) -> Packer:
    """Return what packs whole sources in the driver, whose rows came from several calls."""
    packer = make_packer(sink, parts)
    return _Travelled(packer) if isinstance(packer, ParquetPacker) else packer


class _Travelled(ParquetPacker):
    """Packs rows that the workers pickled, after they had seen that these fit."""

    def __init__(self, packer: ParquetPacker) -> None:
        self._packer = packer

    def pack(self, sources: Sequence[Packed], table: Any = None) -> bytes:
        """Return the frame of some sources."""
        opened = [
            source._replace(rows=[(path, pickle.loads(row)) for path, row in source.rows])
            for source in sources
        ]
        return self._packer.pack(opened, table)
