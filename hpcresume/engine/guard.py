"""What stands between the engine and a stage's code: time limits, and what is told of errors."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self

from hpcresume.engine.calls import OUT_OF_MEMORY
from hpcresume.engine.mark import Mark
from hpcresume.pipeline.child import CommandOutOfMemoryError
from hpcresume.pipeline.sentinels import Failed

_TRACEBACK_CHARS = 8000


class StageTimeoutError(BaseException):
    """Raised inside a stage that runs past its ``timeout_s``.

    Not an ``Exception``, so that a stage's own ``except Exception`` does not swallow it.
    """


class Alarm:
    """Raises :class:`StageTimeoutError` in calls that run too long, while its body runs.

    Works in the main thread, where Python runs signal handlers; a call that does not return
    to the interpreter is ended by the driver, which reads the worker's mark.
    """

    def __init__(self) -> None:
        self._before: Any = None
        self._is_heard = self._is_set = False

    def __enter__(self) -> Self:
        """Take the signal."""
        self._is_heard = threading.current_thread() is threading.main_thread()
        if self._is_heard:
            self._before = signal.signal(signal.SIGALRM, self._expire)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signal back."""
        if self._is_heard:
            signal.signal(signal.SIGALRM, self._before)

    def limit(self, call: Callable[[], Any], timeout_s: float) -> Any:
        """Return what a call returns; interrupt it after ``timeout_s``."""
        if not self._is_heard:
            return call()
        try:
            self._is_set = True
            signal.setitimer(signal.ITIMER_REAL, timeout_s)
            return call()
        finally:
            # The signal may be on its way through another thread, and come late.
            self._is_set = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _expire(self, _number: int, _frame: FrameType | None) -> None:
        if self._is_set:
            raise StageTimeoutError


class Running:
    """The items of async stages in flight, told by the worker's mark.

    A coroutine that blocks stops the event loop and every timeout in it; the driver sees
    the earliest deadline pass, and the source where only one is in flight.
    """

    def __init__(self, mark: Mark | None) -> None:
        self._mark = mark
        self._items: dict[object, tuple[float, int | None, int]] = {}

    @contextlib.contextmanager
    def item(self, source: int | None, stage: int, timeout_s: float | None) -> Iterator[None]:
        """Tell of an item while the body runs."""
        if self._mark is None:
            yield
            return
        key = object()
        limit = float("inf") if timeout_s is None else timeout_s
        self._items[key] = (time.monotonic() + limit, source, stage)
        self._tell(self._mark)
        try:
            yield
        finally:
            del self._items[key]
            self._tell(self._mark)

    def _tell(self, mark: Mark) -> None:
        if not self._items:
            mark.clear()
            return
        deadline, source, stage = min(self._items.values(), key=lambda item: item[0])
        known = source if len(self._items) == 1 else None
        mark.set_until(known, stage, None if deadline == float("inf") else deadline)


def reason(
    error: BaseException | Failed, stage: str, timeout_s: float | None
) -> tuple[str, str, str, bool]:
    """Return kind, message, traceback and whether to try again, of what a stage answered."""
    if isinstance(error, Failed):
        return "Failed", error.reason, "", error.retry
    if isinstance(error, StageTimeoutError):
        return (
            "timeout",
            f"stage {stage!r} ran past its timeout_s={timeout_s:g}",
            (user_traceback(error)),
            True,
        )
    message = str(error).strip() or type(error).__name__
    kind = OUT_OF_MEMORY if isinstance(error, CommandOutOfMemoryError) else type(error).__name__
    return kind, message, user_traceback(error), True


def user_traceback(error: BaseException) -> str:
    """Return an exception's traceback without the engine's own frames, at most 8,000 characters."""
    shown = traceback.TracebackException(type(error), error, error.__traceback__)
    frames = list(traceback.walk_tb(error.__traceback__))
    users = [n for n, (frame, _) in enumerate(frames) if not _is_engine(frame)]
    if users:
        shown.stack[:] = shown.stack[users[0] : users[-1] + 1]
    text = "".join(shown.format())
    return text if len(text) <= _TRACEBACK_CHARS else "...\n" + text[-_TRACEBACK_CHARS:]


def _is_engine(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__", "")
    engine = name.startswith("hpcresume.engine")
    return engine or name in {"contextlib", "asyncio.tasks", "asyncio.timeouts"}
