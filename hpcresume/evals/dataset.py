"""A dataset's rows, and the sources that an evaluation makes of them."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from hpcresume.errors import SourcesError
from hpcresume.evals.code import load_object
from hpcresume.evals.item import Columns, base_id, content_digest
from hpcresume.evals.settings import EvalSettings
from hpcresume.pipeline.sources import Source, SourceList, rows
from hpcresume.pipeline.target import split_target

_TABLES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".pq")


def read_dataset(name: str, cwd: Path) -> Iterator[Any]:
    """Yield the rows of a dataset: objects, or other JSON values.

    Args:
        name: A .json, .jsonl, .csv, .tsv (each also .gz) or .parquet file, or ``module:name``
            of an iterable or of a function that returns one.
        cwd: Directory that the name is meant from.

    Raises:
        SourcesError: It cannot be read, or is none of these.
    """
    suffix = Path(name.removesuffix(".gz")).suffix.lower()
    path = cwd / os.path.expanduser(name)
    if suffix == ".json":
        yield from _json_rows(path)
    elif suffix in _TABLES:
        yield from (source.payload for source in rows(path))
    elif split_target(name)[1] is not None:
        found = load_object(name, cwd)
        found = found() if callable(found) else found
        if not isinstance(found, Iterable) or isinstance(found, str | bytes | Mapping):
            raise SourcesError(f"{name} is a {type(found).__qualname__}, not an iterable of rows.")
        yield from found
    else:
        raise SourcesError(
            f"{name}: unknown kind of dataset. Give a .json, .jsonl, .csv, .tsv (each also .gz) "
            "or .parquet file, or module:name of an iterable."
        )


def _json_rows(path: Path) -> Iterator[Any]:
    import gzip

    try:
        data = path.read_bytes()
        found = orjson.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    except (OSError, EOFError, orjson.JSONDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SourcesError(
            f"{path} cannot be read as JSON: {reason}. It holds the dataset. "
            "Check the path and that the file is whole; one object per line is .jsonl.",
            path=str(path),
        ) from error
    if not isinstance(found, list):
        raise SourcesError(
            f"{path} holds a {type(found).__name__}. A .json dataset is a list of items.",
            path=str(path),
        )
    yield from found


@dataclass(frozen=True)
class EvalSources(SourceList):
    """Items times repetitions, and the tries of items that are run again.

    Attributes:
        settings: Says which items.
        retries: Further tries: source id and payload, made from earlier listings.
    """

    settings: EvalSettings
    retries: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def __iter__(self) -> Iterator[Source]:
        listed = set()
        for base, payload in list_items(self.settings):
            listed.add(base)
            yield Source(base, payload)
        for source_id, payload in self.retries:
            if payload["base"] in listed:
                yield Source(source_id, payload)

    def describe(self) -> dict[str, Any]:
        """Return the kind; the items themselves are compared one by one."""
        return {"kind": "eval-items"}


def list_items(settings: EvalSettings) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield id and payload of every repetition of every item, in the dataset's order.

    Raises:
        SourcesError: A row cannot be an item.
    """
    columns = settings.columns
    seen: Counter[str] = Counter()
    ids: dict[str, str] = {}
    wanted, missing = set(settings.sample_ids), set(settings.sample_ids)
    dataset = read_dataset(settings.dataset, Path(settings.cwd))
    for number, raw in enumerate(itertools.islice(dataset, settings.limit or None)):
        row = _json_value(raw, number)
        digest = content_digest(row)
        occurrence = seen[digest]
        seen[digest] += 1
        _check_columns(row, columns, number)
        item_id = _item_id(row, digest, columns, number)
        if ids.setdefault(item_id, digest) != digest:
            raise SourcesError(
                f"{settings.dataset}: item {number} has the id {item_id!r} of another item. "
                "Rows of the results are told apart by it. Name another column with --id-column.",
                item=number,
            )
        if wanted and item_id not in wanted:
            continue
        missing.discard(item_id)
        shown = f"{item_id}#{occurrence + 1}" if occurrence else item_id
        for repetition in range(settings.repetitions):
            base = base_id(digest, occurrence, repetition)
            payload = {"id": shown, "row": row, "repetition": repetition, "base": base}
            yield base, payload
    if missing:
        raise SourcesError(f"{settings.dataset}: no item has the id {min(missing)!r}.")


def _json_value(row: Any, number: int) -> Any:
    """Return a row as JSON values; what JSON cannot hold becomes text."""
    try:
        return orjson.loads(orjson.dumps(row, default=_as_text, option=orjson.OPT_NON_STR_KEYS))
    except orjson.JSONEncodeError as error:
        raise SourcesError(
            f"item {number} of the dataset cannot be stored: {error}. Items are JSON values."
        ) from error


def _as_text(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _check_columns(row: Any, columns: Columns, number: int) -> None:
    if isinstance(row, dict) and not columns.raw and columns.question not in row:
        raise SourcesError(
            f"item {number} of the dataset has no column {columns.question!r}. "
            f"Its columns are: {', '.join(map(str, row)) or 'none'}. "
            "Name the one that holds the question with --question, or give --raw.",
            item=number,
        )


def _item_id(row: Any, digest: str, columns: Columns, number: int) -> str:
    name = columns.id or "id"
    value = row.get(name) if isinstance(row, dict) else None
    if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
        return str(value)
    if columns.id:
        raise SourcesError(
            f"item {number} of the dataset holds {value!r} in its id column {name!r}. "
            "An id is a text or an integer.",
            item=number,
        )
    return digest[:12]
