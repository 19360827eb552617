"""Who is charged: failures counted against sources, or held back as a broken stage's.

A failure of a source that never failed before waits until its stage works for another
source.  When 50 of them in a row, of one stage and one kind, wait, the stage is what is
broken (a dead model server must not quarantine a shard): the task stops and nobody is
charged.  At the end of the shard what waits is charged, and failed sources are tried again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hpcresume.engine.calls import Inputs, SlotFailure
from hpcresume.errors import HpcResumeError
from hpcresume.segment.segment import Failure

MAX_LIKE_FAILURES = 50


class StageBrokenError(HpcResumeError):
    """One stage fails every source in the same way, or cannot start; nobody is charged."""

    exit_code = 76

    def __init__(self, stage: str, reason: str, *, kind: str) -> None:
        super().__init__(reason, stage=stage, kind=kind)


@dataclass(slots=True)
class _Streak:
    """Consecutive failures of one stage by sources that never failed before."""

    kind: str = ""
    failures: list[Failure] = field(default_factory=list)


class Judge:
    """Counts tries.

    Args:
        max_attempts: Tries after which a source is quarantined.
        attempts: Tries that were charged before, by source.
        charge: Told every failure that is charged.
        give_up: Told every source that this attempt does not try again.
    """

    def __init__(
        self,
        max_attempts: int,
        attempts: Mapping[int, int],
        *,
        charge: Callable[[Failure], None],
        give_up: Callable[[int], None],
    ) -> None:
        self._max_attempts = max_attempts
        self._charged = dict(attempts)
        self._tell, self._give_up = charge, give_up
        self._streaks: dict[str, _Streak] = defaultdict(_Streak)
        self._held: set[int] = set()
        self._retries: list[int] = []
        self.quarantined = 0
        self.deferred = 0

    @property
    def failing(self) -> int:
        """Sources that failed and are to be tried again."""
        return len(self._retries) + len(self._held)

    def number_tries(self, inputs: Inputs) -> None:
        """Set the number of the try of every source that was charged before."""
        if not self._charged:
            return
        for slot, source in enumerate(inputs.sources):
            charged = self._charged.get(source)
            if charged:
                inputs.attempts[slot] = charged + 1

    def judge(
        self,
        inputs: Inputs,
        failures: Sequence[SlotFailure],
        *,
        worked: Iterable[str] = (),
        may_wait: bool = True,
    ) -> None:
        """Charge the failures of a call, or hold them back.

        Args:
            inputs: The call's items.
            failures: What failed, in the order it did; a source is charged once for a try.
            worked: Stages that worked for a source after their last failure.
            may_wait: False charges at once, for failures that say nothing of a stage.

        Raises:
            StageBrokenError: A stage failed too many sources in a row; none of them is
                charged.
        """
        for failed in failures:
            source, attempt = inputs.sources[failed.slot], inputs.attempt(failed.slot)
            if source in self._held or self._charged.get(source, 0) >= attempt:
                continue
            failure = _as_failure(inputs, failed)
            if may_wait and attempt == 1 and failed.retry and not failed.short_mib:
                self._extend(failure, after_success=failed.after_success)
            else:
                self._charge(failure)
        for stage in worked:
            if stage in self._streaks:
                self._settle(self._streaks[stage])

    def take_retries(self) -> list[int]:
        """Return, once, the sources to be tried again; what waited for a verdict is charged."""
        for streak in self._streaks.values():
            self._settle(streak)
        sources, self._retries = sorted(self._retries), []
        return sources

    def _extend(self, failure: Failure, *, after_success: bool) -> None:
        streak = self._streaks[failure.stage]
        if after_success or streak.kind != failure.kind:
            self._settle(streak)
        streak.kind = failure.kind
        streak.failures.append(failure)
        self._held.add(failure.source)
        if len(streak.failures) >= MAX_LIKE_FAILURES:
            raise StageBrokenError(
                failure.stage,
                f"stage {failure.stage!r} failed {len(streak.failures)} consecutive sources "
                f"with {failure.kind}: {failure.message}",
                kind="stage-broken",
            )

    def _settle(self, streak: _Streak) -> None:
        failures, streak.failures, streak.kind = streak.failures, [], ""
        for failure in failures:
            self._held.discard(failure.source)
            self._charge(failure)

    def _charge(self, failure: Failure) -> None:
        source = failure.source
        self._charged[source] = max(self._charged.get(source, 0), failure.attempt)
        self._tell(failure)
        if failure.short_mib:
            self.deferred += 1
            self._give_up(source)
        elif failure.retry and failure.attempt < self._max_attempts:
            self._retries.append(source)
        else:
            self.quarantined += 1
            self._give_up(source)


def _as_failure(inputs: Inputs, failed: SlotFailure) -> Failure:
    return Failure(
        source=inputs.sources[failed.slot],
        source_id=inputs.source_id(failed.slot),
        item=failed.item,
        stage=failed.stage,
        kind=failed.kind,
        message=failed.message,
        traceback=failed.traceback,
        attempt=inputs.attempt(failed.slot),
        retry=failed.retry,
        short_mib=failed.short_mib,
    )
