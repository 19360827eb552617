"""When an attempt publishes, and how its publication stands.

No clock, no process and no file: the supervisor says what happened at which moment
(monotonic seconds), and asks what is due.
"""

from __future__ import annotations

from hpcresume.config.settings import SyncSettings
from hpcresume.task.messages import Ended, Receipt, Report

_MAX_BACKOFF_S = 30.0
_HUNG_S = 60.0


class Schedule:
    """Publication of one attempt.

    Attributes:
        receipt: Commits up to here are published.
        sources: Completed sources that are published.
        failures: Refusals in a row.
        retry_at: No publication is ordered before this moment.
        damaged: Whether the ledger is damaged, so that publishing again is useless.
    """

    def __init__(self, sync: SyncSettings) -> None:
        self._sync = sync
        self.receipt = self.sources = self.failures = 0
        self.retry_at = 0.0
        self.damaged = False
        self._seq = 0
        self._ordered_at: float | None = None
        self._age_from: float | None = None
        self._unpublished_since: float | None = None
        self._before: int | None = None

    @property
    def in_flight(self) -> bool:
        """Whether a publication is ordered and not answered."""
        return self._ordered_at is not None

    def note_commits(self, report: Report, now: float) -> None:
        """Take note of what the driver has committed."""
        if self._age_from is None:
            self._age_from = now
        if report.last > self.receipt and self._unpublished_since is None:
            self._unpublished_since = now

    def is_due(self, report: Report | None, now: float) -> bool:
        """Tell whether to publish now."""
        if report is None or self.in_flight or now < self.retry_at:
            return False
        sync = self._sync
        if report.unpublished_bytes >= sync.max_bytes:
            return True
        if sync.max_records and report.committed - self.sources >= sync.max_records:
            return True
        since = self._unpublished_since
        if self._seq == 0 and since is not None and now - since >= sync.first_age_s:
            return True
        # A driver that a source blocks does not report what it has committed before.
        return self._age_from is not None and now - self._age_from >= sync.max_age_s

    def begin(self, now: float) -> int:
        """Take note that a publication is ordered and return the number of its segment."""
        self._seq += 1
        self._ordered_at = now
        return self._seq

    def take_receipt(self, receipt: Receipt, report: Report | None, now: float) -> None:
        """Take note of a publication; ``report`` is the driver's last."""
        self.receipt, self.failures = receipt.last, 0
        self.sources += receipt.sources
        self._ordered_at, self._age_from = None, now
        more = report is not None and report.last > receipt.last
        self._unpublished_since = now if more else None

    def take_refusal(self, now: float, *, damaged: bool = False) -> None:
        """Take note of a refusal, or of the publisher's death: the next try comes later."""
        self.damaged = self.damaged or damaged
        self._ordered_at = None
        self.failures += 1
        self.retry_at = now + min(_MAX_BACKOFF_S, 0.5 * 2**self.failures)

    def is_hung(self, now: float) -> bool:
        """Tell whether shared storage does not answer the publisher."""
        return self._ordered_at is not None and now - self._ordered_at > _HUNG_S

    def must_hold(self, now: float) -> bool:
        """Tell whether too much is at risk on this node to take more sources."""
        since, ordered = self._unpublished_since, self._ordered_at
        late = since is not None and now - since > 2 * self._sync.max_age_s
        slow = ordered is not None and now - ordered > _HUNG_S / 2
        return late and (self.failures > 0 or slow)

    def is_rest_published(self, ended: Ended | None) -> bool:
        """Tell whether everything is published, once the driver is gone; if not, order more.

        A driver that died cannot say how much it committed: a publication that adds nothing
        can.  One that ended says so, and one more publication carries its last counts.
        """
        before, self._before = self._before, self.receipt if not self.failures else None
        if before is None or self.failures:
            return False
        return self.receipt == before if ended is None else self.receipt >= ended.last
