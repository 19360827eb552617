"""When the time limit ends this task: asked of Slurm, again and again, but seldom.

Limits are raised and lowered while a job runs.  SIGUSR2 is sent once, up to a minute early,
and not again after a raise; so Slurm is asked at the start, at the signal, every ten minutes,
and once more shortly before the end as known so far.  With a thousand tasks that is two
questions a second.  Questions are asked in a thread: a controller that does not answer
neither holds the attempt up nor ends it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

ASK_EVERY_S = 600.0
RETRY_S = 60.0
_GIVE_UP_S = 30.0


class TimeLimit:
    """The end of this task's time limit, as known so far.

    Args:
        ask: Returns the end in monotonic seconds, None where it is not known; may take long.
        near_s: Ask once more when this little is left.
        clock: Monotonic seconds.

    Attributes:
        end: The end as known so far; None where nobody has said.
        first_end: What the first answer was.
    """

    def __init__(
        self,
        ask: Callable[[], float | None],
        *,
        near_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask, self._near_s, self._clock = ask, near_s, clock
        self.end: float | None = None
        self.first_end: float | None = None
        self._answers: queue.SimpleQueue[tuple[float, float | None]] = queue.SimpleQueue()
        self._asked_at = self._known_since = float("-inf")
        self._failed = self._asking = False
        self._wanted = False

    def look(self) -> None:
        """Ask as soon as no other question is open."""
        self._wanted = True

    def is_newer_than(self, moment: float) -> bool:
        """Tell whether what is known was asked for after a moment, or could not be had."""
        return self._known_since >= moment

    def wait(self, timeout_s: float) -> None:
        """Wait for the answer to an open question, but not for long."""
        self.turn()
        deadline = time.monotonic() + timeout_s
        while self._asking:  # the late answer to an older question may come first
            try:
                self._take(*self._answers.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                return

    def turn(self) -> None:
        """Take an answer that has come, and ask again where it is time to."""
        while not self._answers.empty():
            self._take(*self._answers.get())
        now = self._clock()
        if self._asking and now - self._asked_at >= _GIVE_UP_S:
            self._take(self._asked_at, None)
        if not self._asking and (self._wanted or self._is_due(now)):
            self._wanted, self._asking, self._asked_at = False, True, now
            threading.Thread(target=self._put_question, args=(now,), daemon=True).start()

    def _put_question(self, asked_at: float) -> None:
        self._answers.put((asked_at, self._ask()))

    def _is_due(self, now: float) -> bool:
        if self._asked_at == float("-inf"):
            return False
        if self.end is not None and now >= self.end - self._near_s > self._asked_at:
            return True
        return now - self._asked_at >= (RETRY_S if self._failed else ASK_EVERY_S)

    def _take(self, asked_at: float, end: float | None) -> None:
        if asked_at < self._asked_at or not self._asking:
            return  # a question that was given up
        self._asking, self._known_since, self._failed = False, asked_at, end is None
        if end is not None:
            self.end = end
            self.first_end = end if self.first_end is None else self.first_end
