"""Run a Python pipeline over many inputs on a preemptible Slurm cluster, each result once.

The public names are imported when first used, so that ``import hpcresume`` and the
commands that never touch a pipeline stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcresume.api import Run, status, submit
    from hpcresume.errors import HpcResumeError
    from hpcresume.launch.cleaning import Cleaned
    from hpcresume.launch.rounds import Standing
    from hpcresume.launch.stopping import Stopped
    from hpcresume.launch.trial import trial
    from hpcresume.observe.failures import FailedSource
    from hpcresume.output.collect import CollectReport
    from hpcresume.output.sources import results
    from hpcresume.pipeline.chunk import Chunk
    from hpcresume.pipeline.chunk_sources import chunks
    from hpcresume.pipeline.context import Context, Worker
    from hpcresume.pipeline.pipeline import Parts, Pipeline, Rows
    from hpcresume.pipeline.sentinels import Failed, Many, WorkerBroken
    from hpcresume.pipeline.sources import Source, files, indexed, lines, rows
    from hpcresume.pipeline.stage import Stage, stage
    from hpcresume.serving.stage import ServingStage

    __version__: str

__all__ = [
    "Chunk",
    "Cleaned",
    "CollectReport",
    "Context",
    "Failed",
    "FailedSource",
    "HpcResumeError",
    "Many",
    "Parts",
    "Pipeline",
    "Rows",
    "Run",
    "ServingStage",
    "Source",
    "Stage",
    "Standing",
    "Stopped",
    "Worker",
    "WorkerBroken",
    "__version__",
    "chunks",
    "files",
    "indexed",
    "lines",
    "results",
    "rows",
    "stage",
    "status",
    "submit",
    "trial",
]

_HOMES = {
    "Chunk": "hpcresume.pipeline.chunk",
    "Cleaned": "hpcresume.launch.cleaning",
    "CollectReport": "hpcresume.output.collect",
    "Context": "hpcresume.pipeline.context",
    "Failed": "hpcresume.pipeline.sentinels",
    "FailedSource": "hpcresume.observe.failures",
    "HpcResumeError": "hpcresume.errors",
    "Many": "hpcresume.pipeline.sentinels",
    "Pipeline": "hpcresume.pipeline.pipeline",
    "Parts": "hpcresume.pipeline.pipeline",
    "Rows": "hpcresume.pipeline.pipeline",
    "Run": "hpcresume.api",
    "ServingStage": "hpcresume.serving.stage",
    "Source": "hpcresume.pipeline.sources",
    "Stage": "hpcresume.pipeline.stage",
    "Standing": "hpcresume.launch.rounds",
    "Stopped": "hpcresume.launch.stopping",
    "Worker": "hpcresume.pipeline.context",
    "WorkerBroken": "hpcresume.pipeline.sentinels",
    "chunks": "hpcresume.pipeline.chunk_sources",
    "files": "hpcresume.pipeline.sources",
    "indexed": "hpcresume.pipeline.sources",
    "lines": "hpcresume.pipeline.sources",
    "results": "hpcresume.output.sources",
    "rows": "hpcresume.pipeline.sources",
    "stage": "hpcresume.pipeline.stage",
    "status": "hpcresume.api",
    "submit": "hpcresume.api",
    "trial": "hpcresume.launch.trial",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("hpcresume")
    except PackageNotFoundError:  # a checkout on PYTHONPATH has no metadata
        return "0+checkout"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
