"""The pipeline: sources, stages and a sink under one name."""

from __future__ import annotations

import contextlib
import copy
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcresume.errors import NotResumableError, PipelineError
from hpcresume.pipeline.observer import MakeObserver
from hpcresume.pipeline.sources import SourceList, as_sources
from hpcresume.pipeline.stage import Stage, as_stage

_NAME = re.compile(r"[A-Za-z0-9._-]+")

Finish = Callable[[Iterator[Any], Path], None]
"""``finish(rows, out)``: runs once over the finished run's rows and writes ``out``."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Sink for results that are rows of JSON values; each source's rows exactly once."""

    def describe(self) -> dict[str, Any]:
        """Return this sink as JSON values, for the run's fingerprint."""
        return {"kind": "rows"}


@dataclass(frozen=True, slots=True)
class Parts:
    """Sink for bulk results: files of JSON lines or Parquet, published whole.

    A row is a JSON value (``jsonl``), or a dict or a ``pyarrow.RecordBatch`` or ``Table``
    (``parquet``).

    Args:
        format: ``jsonl`` or ``parquet``.
        schema: For Parquet: a ``pyarrow.Schema``, or ``{column: type}`` with types as pyarrow
            names them; None: that of the first rows.
        size: Most bytes of one part.

    Raises:
        PipelineError: An argument cannot be right.
    """

    format: str
    schema: Any = None
    size: int = 256 << 20

    def __post_init__(self) -> None:
        if self.format not in ("jsonl", "parquet"):
            raise PipelineError(f"Parts({self.format!r}): give 'jsonl' or 'parquet'.")
        if self.schema is not None and self.format == "jsonl":
            raise PipelineError("Parts('jsonl') takes no schema: JSON lines have none.")
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size <= 0:
            raise PipelineError(f"Parts(size={self.size!r}): give a number of bytes above 0.")
        if not (self.schema is None or self._columns()):
            raise PipelineError(
                f"Parts(schema={self.schema!r}): give a pyarrow.Schema with columns, "
                "or a dict of column and type, such as {'text': 'string', 'n': 'int64'}."
            )
        if isinstance(self.schema, Mapping):
            _check_types(self.schema)

    def _columns(self) -> dict[str, str]:
        if isinstance(self.schema, Mapping):
            return {str(name): str(kind) for name, kind in self.schema.items()}
        fields = self.schema if hasattr(self.schema, "metadata") else ()
        return {field.name: str(field.type) for field in fields}

    def describe(self) -> dict[str, Any]:
        """Return this sink as JSON values, for the run's fingerprint."""
        schema = None if self.schema is None else self._columns()
        return {"kind": "parts", "format": self.format, "schema": schema, "size": self.size}


def _check_types(schema: Mapping[Any, Any]) -> None:
    """Refuse types that pyarrow does not know, where it is installed."""
    try:
        import pyarrow as pa
    except ImportError:
        return
    for column, kind in schema.items():
        known = isinstance(kind, pa.DataType)
        if isinstance(kind, str):
            with contextlib.suppress(ValueError):
                known = pa.type_for_alias(kind) is not None
        if not known:
            raise PipelineError(
                f"Parts(schema=...): column {column!r} has the type {kind!r}, which pyarrow does "
                "not know. Give a name such as 'string', 'int64' or 'float64', or a "
                "pyarrow.DataType such as pyarrow.list_(pyarrow.string())."
            )


Sink = Rows | Parts


class Pipeline:
    """Stages that every source goes through, and where the results go.

    Args:
        name: Names runs, job arrays and files; letters, digits, ``.``, ``_``, ``-``.
        sources: What :func:`~hpcresume.pipeline.sources.as_sources` takes.
        stages: Functions, callables and :class:`Stage` objects, in order.
        sink: :class:`Rows`, :class:`Parts`, or None for stages that are run for their side
            effects.
        finish: Runs once over the finished run; for steps that need all results.
        tolerate: Share of sources, from 0 to below 1, that may end quarantined in a
            run that still counts as complete.
        snapshot: Further files or directories to copy into the run, relative to the
            pipeline's file.
        observer: Makes what is told of results in every array task, as soon as they are
            safe; see :mod:`hpcresume.pipeline.observer`.

    Attributes:
        stages: The stages as :class:`Stage` objects with unique names.
        sources: The sources as a :class:`SourceList`.

    Raises:
        PipelineError: An argument cannot be right.
    """

    def __init__(
        self,
        name: str,
        sources: object,
        stages: Sequence[object],
        sink: Sink | None = Rows(),
        *,
        finish: Finish | None = None,
        tolerate: float = 0.0,
        snapshot: Sequence[str | os.PathLike[str]] = (),
        observer: MakeObserver | None = None,
    ) -> None:
        self.name = _checked_name(name)
        self.sources: SourceList = as_sources(sources)
        self.stages = _checked_stages(stages, name)
        self.sink = _checked_sink(sink)
        self.finish = finish
        self.tolerate = _checked_tolerance(tolerate)
        self.snapshot = _checked_snapshot(snapshot)
        self.observer = _checked_observer(observer, self.sink)
        if finish is not None and not callable(finish):
            raise PipelineError(f"finish={finish!r} cannot be called. Give finish=fn(rows, out).")

    def check_resumable(self) -> None:
        """Refuse a pipeline whose output cannot be attributed to single sources.

        Raises:
            NotResumableError: Names every stage with ``is_resumable = False``.
        """
        offenders = [stage.name for stage in self.stages if not stage.is_resumable]
        if offenders:
            raise NotResumableError(
                f"pipeline {self.name!r}: not resumable: {', '.join(offenders)}. "
                "What such a stage puts out belongs to no single source, so an interrupted "
                "run cannot tell which sources are done. "
                "Move global steps to Pipeline(finish=...) or to a second run over the results.",
                stages=offenders,
            )

    def describe(self) -> dict[str, Any]:
        """Return what makes two runs the same run, as JSON values."""
        return {
            "name": self.name,
            "stages": [{"name": s.name, "options": s.options} for s in self.stages],
            "sink": None if self.sink is None else self.sink.describe(),
            "sources": self.sources.describe(),
            "tolerate": self.tolerate,
            "finish": None if self.finish is None else qualified_name(self.finish),
        }

    def __repr__(self) -> str:
        stages = " -> ".join(stage.name for stage in self.stages)
        return f"<Pipeline {self.name}: {stages}>"


def qualified_name(fn: object) -> str:
    """Return ``module.name`` of a callable; of its function where it is a partial."""
    fn = getattr(fn, "func", fn)
    name = getattr(fn, "__qualname__", type(fn).__qualname__)
    return f"{getattr(fn, '__module__', type(fn).__module__)}.{name}"


def _checked_name(name: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.strip(".") == "":
        raise PipelineError(
            f"a pipeline is named {name!r}. The name is part of file and job names. "
            "Use letters, digits, '.', '_' and '-'."
        )
    return name


def _checked_stages(stages: Sequence[object], name: str) -> tuple[Stage, ...]:
    if callable(stages) or isinstance(stages, Stage | str) or not isinstance(stages, Iterable):
        raise PipelineError(f"pipeline {name!r}: stages={stages!r} is not a list. Write [...].")
    made = tuple(as_stage(stage) for stage in stages)
    if not made:
        raise PipelineError(f"pipeline {name!r} has no stages. Give at least one.")
    return _uniquely_named(made)


def _uniquely_named(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    given = {stage.name for stage in stages}
    taken: set[str] = set()
    unique = []
    for stage in stages:
        name, n = stage.name, 1
        while name in taken or (n > 1 and name in given):
            n += 1
            name = f"{stage.name}_{n}"
        taken.add(name)
        unique.append(stage if name == stage.name else _renamed(stage, name))
    return tuple(unique)


def _renamed(stage: Stage, name: str) -> Stage:
    """Return a shallow copy: one object listed twice is two stages."""
    renamed = copy.copy(stage)
    object.__setattr__(renamed, "name", name)  # also where the class is a frozen dataclass
    return renamed


def _checked_sink(sink: Sink | None) -> Sink | None:
    if sink is not None and not isinstance(sink, Rows | Parts):
        raise PipelineError(
            f"sink={sink!r} is not a sink. Give Rows(), Parts(...), or None for no results."
        )
    return sink


def _checked_observer(observer: MakeObserver | None, sink: object) -> MakeObserver | None:
    if observer is None:
        return None
    if not callable(observer):
        raise PipelineError(f"observer={observer!r} cannot be called. Give observer=fn(task).")
    if not isinstance(sink, Rows):
        raise PipelineError(f"observer={observer!r}: there are no rows to tell with sink={sink!r}.")
    return observer


def _checked_tolerance(tolerate: float) -> float:
    is_number = isinstance(tolerate, int | float) and not isinstance(tolerate, bool)
    if not is_number or not 0 <= tolerate < 1:
        raise PipelineError(
            f"tolerate={tolerate!r} is not a share of the sources. "
            "Give a number from 0 to below 1; 0.02 is two in a hundred."
        )
    return float(tolerate)


def _checked_snapshot(snapshot: Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    if isinstance(snapshot, str | os.PathLike):
        raise PipelineError(f"snapshot={snapshot!r} is not a list. Write [{str(snapshot)!r}].")
    if not isinstance(snapshot, Iterable):
        raise PipelineError(f"snapshot={snapshot!r} is not a list. Write ['settings.json'].")
    paths = tuple(snapshot)
    wrong = [path for path in paths if not isinstance(path, str | os.PathLike)]
    if wrong:
        raise PipelineError(f"snapshot={snapshot!r}: {wrong[0]!r} is not a path.")
    return tuple(os.fspath(path) for path in paths)
