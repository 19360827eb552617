"""Time limits of calls: interrupted in time, and nothing of them left behind."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from hpcresume.engine.guard import Alarm, StageTimeoutError


def test_call_is_interrupted_at_its_limit() -> None:
    """What runs on is interrupted; what comes after it has its own limit."""
    with Alarm() as alarm:
        with pytest.raises(StageTimeoutError):
            alarm.limit(lambda: time.sleep(60), 0.05)
        assert 3 == alarm.limit(lambda: 3, 60)
    assert (0.0, 0.0) == signal.getitimer(signal.ITIMER_REAL)


def test_signal_that_comes_late_is_no_timeout() -> None:
    """A call that had returned when the signal arrived is not failed by it, nor what follows."""
    with Alarm() as alarm:
        assert 3 == alarm.limit(lambda: 3, 60)
        os.kill(os.getpid(), signal.SIGALRM)
        assert 4 == alarm.limit(lambda: 4, 60)


def test_signal_is_given_back() -> None:
    """Whoever took the signal before has it again."""
    heard: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: heard.append(number))
    try:
        with Alarm() as alarm, pytest.raises(StageTimeoutError):
            alarm.limit(lambda: time.sleep(60), 0.05)
        os.kill(os.getpid(), signal.SIGALRM)
        assert [signal.SIGALRM] == heard
    finally:
        signal.signal(signal.SIGALRM, before)


def test_other_threads_are_not_interrupted() -> None:
    """Beside the main thread a call runs as it is; the driver ends what hangs there."""
    found: list[int] = []

    def beside() -> None:
        with Alarm() as alarm:
            found.append(alarm.limit(lambda: time.sleep(0.05) or 5, 0.01))

    thread = threading.Thread(target=beside)
    thread.start()
    thread.join()
    assert [5] == found
