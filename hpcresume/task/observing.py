"""The observer's thread: hands on what the ledger has committed, and holds nothing up."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from hpcresume.pipeline.observer import GivenUp, MakeObserver, ObservedTask, Observer
from hpcresume.segment.frame import decode_frame
from hpcresume.segment.segment import Failure

log = logging.getLogger(__name__)
_WAITING_MAX = 64 << 20


class Observing:
    """Tells an observer of commits.

    Args:
        make: Makes the observer; it is told nothing if that fails.
        task: What it is told of itself.
        max_attempts: Tries after which a source is given up.

    Attributes:
        wants_stop: Why the observer wants no more sources admitted, empty where it does not.
    """

    def __init__(self, make: MakeObserver, task: ObservedTask, *, max_attempts: int) -> None:
        self._make, self._task, self._max_attempts = make, task, max_attempts
        self._queue: queue.SimpleQueue[tuple[Sequence[bytes], Sequence[Failure]] | None] = (
            queue.SimpleQueue()
        )
        self.wants_stop = ""
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._skipped = False
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)
        self._thread.start()

    def committed(self, frames: Sequence[bytes], failures: Sequence[Failure]) -> None:
        """Queue a commit; where too much waits it is passed over, and never told of."""
        size_bytes = sum(map(len, frames))
        with self._lock:
            if self._waiting_bytes and self._waiting_bytes + size_bytes > _WAITING_MAX:
                if not self._skipped:
                    log.error("the observer is too slow: it is not told of everything")
                self._skipped = True
                return
            self._waiting_bytes += size_bytes
        self._queue.put((frames, failures))

    def close(self, timeout_s: float) -> None:
        """Let the observer end; one that hangs is left behind."""
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        observer: Observer | None = None
        try:
            observer = self._make(self._task)
        except Exception:
            log.exception("the pipeline's observer cannot start; the run goes on without it")
        while (told := self._queue.get()) is not None:
            frames, failures = told
            with self._lock:
                self._waiting_bytes -= sum(map(len, frames))
            if observer is None:
                continue
            sources = [pair for frame in frames for pair in _sources(frame)]
            if sources:
                self._tell(observer.completed, sources)
            for failure in failures:
                if not failure.retry or failure.attempt >= self._max_attempts:
                    self._tell(observer.given_up, _given_up(failure))
            self.wants_stop = observer.wants_stop
        if observer is not None:
            self._tell(observer.close)

    @staticmethod
    def _tell(method: Callable[..., None], *arguments: Any) -> None:
        try:
            method(*arguments)
        except Exception:
            log.exception("the pipeline's observer failed; the results are safe")


def _sources(frame: bytes) -> list[tuple[int, bytes]]:
    return list(decode_frame(frame, what="a frame of this process").sources())


def _given_up(failure: Failure) -> GivenUp:
    return GivenUp(
        failure.source, failure.kind, failure.message, failure.traceback, failure.attempt
    )
