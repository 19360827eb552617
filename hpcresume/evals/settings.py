"""The settings of an evaluation, stored with its run, and which of them results depend on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from hpcresume.errors import ChangedRunError
from hpcresume.evals.item import Columns
from hpcresume.run.directory import fingerprint_changes


class EvalSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an evaluation is.

    Attributes:
        dataset: File, or ``module:name`` of an iterable or of a function that returns one.
        columns: Which columns are what.
        limit: Only the first items, 0: all.
        sample_ids: Only items with these ids.
        repetitions: How often each item is run.
        workflow: ``module:name`` or ``file.py:name``; empty with an endpoint.
        params: Keyword arguments of the workflow; with an endpoint, further keys of its requests.
        endpoint: URL that each item is posted to; empty with a workflow.
        protocol: ``json`` or ``openai``, what the endpoint speaks.
        request_key: Key of the question in a ``json`` request.
        output_key: Key of the output in a ``json`` answer; empty: the whole answer.
        api_key_env: Name of the variable that holds the endpoint's key.
        scorers: ``module:name`` or ``file.py:name`` of each scorer.
        steps: Kinds of steps that rows keep; None: all.
        max_concurrency: Items in flight at once in one array task.
        item_timeout_s: Seconds for one item with all its tries, 0: no limit.
        max_attempts: Tries of one item before its error counts.
        fail_on_error: Errors that end the run early: below 1 a share, else a count; 0: any
            number is accepted; None: none ends it early, and any is told by the exit code.
        on_item: ``module:name`` of a function that is called with each row.
        write_output: Rows and result are files of the output directory, and stay there.
        fsync_s: The JSONL file is synced when this many seconds have passed; 0: every row.
        cwd: Directory that relative names are meant from.
        snapshot: Further files that the workflow reads, copied beside it into the run.
        copies: Where the files of workflow, scorers and ``on_item`` lie in the run, by target.
    """

    dataset: str
    columns: Columns = Columns()
    limit: int = 0
    sample_ids: list[str] = []
    repetitions: int = 1
    workflow: str = ""
    params: dict[str, Any] = {}
    endpoint: str = ""
    protocol: str = "json"
    request_key: str = "question"
    output_key: str = ""
    api_key_env: str = ""
    scorers: list[str] = []
    steps: list[str] | None = None
    max_concurrency: int = 32
    item_timeout_s: float = 600.0
    max_attempts: int = 1
    fail_on_error: float | None = None
    on_item: str = ""
    write_output: bool = True
    fsync_s: float = 1.0
    cwd: str = "."
    snapshot: list[str] = []
    copies: dict[str, str] = {}


_IDENTITY = ("columns", "workflow", "params", "endpoint", "protocol", "request_key", "output_key",
             "steps")  # fmt: skip
"""What results depend on.  The dataset is compared item by item, not by its name."""


def to_params(settings: EvalSettings) -> dict[str, Any]:
    """Return settings as JSON values."""
    built: dict[str, Any] = msgspec.to_builtins(settings)
    return built


def from_params(values: Mapping[str, Any]) -> EvalSettings:
    """Return what :func:`to_params` was given."""
    return msgspec.convert(dict(values), EvalSettings)


def refuse_changes(path: str, old: EvalSettings, new: EvalSettings) -> None:
    """Refuse to mix results of two settings in one run.

    Raises:
        ChangedRunError: Names the keys that differ.
    """
    before, after = to_params(old), to_params(new)
    changes = fingerprint_changes(
        {key: before[key] for key in _IDENTITY}, {key: after[key] for key in _IDENTITY}
    )
    if changes:
        listed = "\n  ".join(changes)
        raise ChangedRunError(
            f"{path} was made with other settings:\n  {listed}\n"
            "Results of both would be mixed in one file. Use the old ones, or another "
            "--output-dir, or take the new ones for what is still owed with --force.",
            changes=changes,
        )
