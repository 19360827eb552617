"""How an update ends for who asked for it: the report, or one exception that carries it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from hpcresume.errors import PoolUnrecoverable, describe
from hpcresume.serving.errors import ServingError
from hpcresume.serving.execution import Execution
from hpcresume.serving.policy import Outcome, UpdateReport


async def to_its_end(work: Coroutine[Any, Any, UpdateReport], execution: Execution) -> UpdateReport:
    """Await an update; whoever cancels the caller waits until service is restored."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = cancelled or error
            execution.cancel(cancelled)
        except BaseException:
            break
    if cancelled is None:
        return task.result()
    failed = None if task.cancelled() else task.exception()
    cancelled.update_report = execution.update.report  # type: ignore[attr-defined]
    cancelled.add_note(str(execution.update.report))
    raise cancelled from failed


def conclude(report: UpdateReport, unrecoverable: PoolUnrecoverable | None) -> UpdateReport:
    """Return the report of an update, or raise what it failed of with the report attached."""
    errors = [one.error for one in report.cleanup]
    if report.outcome is Outcome.UNRECOVERABLE:
        assert unrecoverable is not None
        _attach(unrecoverable, report)
        raise unrecoverable from report.primary
    if report.outcome is Outcome.ROLLED_BACK:
        primary = report.primary or ServingError("too few workers were left for the update")
        _attach(primary, report)
        raise primary
    if not errors:
        return report
    if len(errors) == 1:
        raised: BaseException = errors[0]
    else:
        raised = BaseExceptionGroup(
            f"version {report.to_version} is served, and {len(errors)} things failed while "
            "service was restored",
            errors,
        )
    _attach(raised, report)
    raise raised


def _attach(error: BaseException, report: UpdateReport) -> None:
    error.update_report = report  # type: ignore[attr-defined]
    error.add_note(str(report))
    for one in report.cleanup:
        if one.error is not error:
            error.add_note(f"while service was restored, {one.label}: {describe(one.error)}")
