"""The stages of an evaluation: one runs the workflow on an item, one scores what came out."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import orjson

from hpcresume.evals.code import UserCall, in_thread, within
from hpcresume.evals.item import EvalItem, make_item
from hpcresume.evals.rows import OK, Ending, encode, failed, log, make_row
from hpcresume.evals.settings import EvalSettings
from hpcresume.pipeline.context import Context, Worker
from hpcresume.pipeline.stage import Stage

_KILL_AFTER_S = 10.0
_ENCODE_ASIDE = 1 << 16
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0


class _ItemStage(Stage):
    """Runs one call per item; whatever becomes of it is the item's row, never the run's error."""

    def __init__(self, settings: EvalSettings) -> None:
        self.settings = settings
        self.max_concurrency = settings.max_concurrency
        limit = settings.item_timeout_s
        # Time-outs of items are kept here, unless a call blocks the event loop itself.
        self.timeout_s = limit + _KILL_AFTER_S if limit else None

    def kept_steps(self) -> frozenset[str] | None:
        """Return the kinds of steps that rows keep."""
        steps = self.settings.steps
        return None if steps is None else frozenset(steps)


class WorkflowStage(_ItemStage):
    """Runs the workflow, or asks the endpoint, and returns the item's row."""

    name = "workflow"

    def setup(self, worker: Worker) -> None:
        """Load the workflow, or make the endpoint's client."""
        settings = self.settings
        self._endpoint: Any = None
        self._workflow: UserCall | None = None
        if settings.endpoint:
            from hpcresume.evals.endpoint import Endpoint

            self._endpoint = Endpoint(settings)
        else:
            self._workflow = UserCall(settings.workflow, Path(settings.cwd), settings.params)
            self._workflow.setup(worker)
        # Known only now: making a context for each item costs more than most of the rest.
        is_wanted = self._workflow is not None and self._workflow.wants_context
        self.traits = msgspec.structs.replace(self.traits, wants_context=is_wanted)

    def teardown(self) -> None:
        """Release what the workflow set up."""
        if self._workflow is not None:
            self._workflow.teardown()

    async def process(self, payload: Mapping[str, Any], context: Context | None = None) -> Any:
        """Return the row of one item."""
        item = make_item(payload, self.settings.columns)
        start = time.perf_counter()
        tries = _Tries(self.settings.max_attempts)
        limit = self.settings.item_timeout_s or None
        try:
            output = await within(limit, tries.until_done(lambda: self._call(item, context)))
            ending = Ending(OK, output, attempts=tries.count)
        except Exception as error:
            log.exception("item %s, repetition %d failed", item.id, item.repetition)
            ending = failed(error, attempts=tries.count, seconds=0)
        ending.seconds = time.perf_counter() - start
        ending.attempts += payload.get("attempts", 0)
        row = make_row(item, ending, self.kept_steps())
        return await _fragment(row, item.id)

    def _call(self, item: EvalItem, context: Context | None) -> Awaitable[Any]:
        item.steps.clear()  # what a failed try used is paid, what it did is not told
        if self._workflow is None:
            answer: Awaitable[Any] = self._endpoint.ask(item)
            return answer
        return self._workflow(item, context=context)


class _Tries:
    """Calls until one does not fail, with a growing pause between them."""

    def __init__(self, most: int) -> None:
        self._most, self.count = most, 0

    async def until_done(self, call: Callable[[], Awaitable[Any]]) -> Any:
        while True:
            self.count += 1
            try:
                return await call()
            except Exception as error:
                pause_s = getattr(error, "retry_after_s", None)
                if self.count >= self._most or not getattr(error, "may_retry", True):
                    raise
            if pause_s is None:
                pause_s = min(_FIRST_PAUSE_S * 2 ** (self.count - 1), _LONGEST_PAUSE_S)
            await asyncio.sleep(pause_s)


async def _fragment(row: dict[str, Any], item_id: str) -> orjson.Fragment:
    """Return a row encoded; a large one in another thread, so that the event loop goes on."""
    if _looks_large(row["output"]) or _looks_large(row["question"]):
        return orjson.Fragment(await in_thread(encode, row, item_id))
    return orjson.Fragment(encode(row, item_id))


def _looks_large(value: Any) -> bool:
    return isinstance(value, list | dict) or (isinstance(value, str) and len(value) > _ENCODE_ASIDE)


class ScoreStage(_ItemStage):
    """Scores the stored output of an item; never runs the workflow."""

    name = "score"

    def setup(self, worker: Worker) -> None:
        """Load the scorers."""
        cwd = Path(self.settings.cwd)
        self._scorers = [UserCall(target, cwd, leading=2) for target in self.settings.scorers]
        for number, scorer in enumerate(self._scorers):
            try:
                scorer.setup(worker)
            except BaseException:
                for earlier in self._scorers[:number]:
                    earlier.teardown()
                raise

    def teardown(self) -> None:
        """Release what the scorers set up."""
        for scorer in self._scorers:
            with contextlib.suppress(Exception):
                scorer.teardown()

    async def process(self, payload: Mapping[str, Any]) -> Any:
        """Return the scores of one item; a scorer that fails leaves the others' alone."""
        item = make_item(payload["item"], self.settings.columns)
        item.steps, item.usage_total = payload["steps"], payload["usage"]
        scores: dict[str, float] = {}
        errors: dict[str, str] = {}
        for scorer in self._scorers:
            try:
                limit = self.settings.item_timeout_s or None
                answer = await within(limit, scorer(item, payload["output"]))
                scores |= _as_scores(answer, scorer.name)
            except Exception as error:
                log.exception(
                    "scorer %s failed for item %s, repetition %d",
                    scorer.target, item.id, item.repetition,
                )  # fmt: skip
                ending = failed(error, attempts=1, seconds=0)
                errors[scorer.name] = f"{ending.error}\n{ending.traceback}"
        row = {"id": item.id, "repetition": item.repetition, "scores": scores, "errors": errors}
        return orjson.Fragment(orjson.dumps(row))


def _as_scores(answer: Any, name: str) -> dict[str, float]:
    """Return a scorer's answer by name; keys of a mapping are prefixed with the scorer's."""
    if not isinstance(answer, Mapping):
        return {name: _as_score(answer)}
    return {f"{name}.{key}": _as_score(value) for key, value in answer.items()}


def _as_score(value: Any) -> float:
    number = value.item() if hasattr(value, "item") else value
    if not isinstance(number, int | float) or not math.isfinite(number):
        raise TypeError(f"a scorer answered {value!r}; a score is a finite number")
    return float(number)


def check_settings(settings: EvalSettings) -> None:
    """Load what settings name, to hear of mistakes before anything runs.

    Raises:
        HpcResumeError: Something cannot be loaded.
    """
    cwd = Path(settings.cwd)
    if settings.workflow:
        UserCall(settings.workflow, cwd, settings.params)
    for target in settings.scorers:
        UserCall(target, cwd, leading=2)
    if settings.on_item:
        UserCall(settings.on_item, cwd)
    if settings.endpoint:
        from hpcresume.evals.endpoint import Endpoint

        Endpoint(settings)
