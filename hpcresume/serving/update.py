"""The course of an update: which step comes next, given how the steps before it went.

Pure: no process, no clock, no Ray.  :meth:`Update.run` yields steps and is sent the answers
of everyone it asked, each settled one way or another; whoever executes them kills those that
a ``fence`` step names, and says how long they may take.

Contract: when the generator ends, every worker that takes requests holds one and the same
verified version, the old or the new one; or the outcome is unrecoverable and none does.

Nobody is asked anything after a death or a hang: those are fenced before the next step.
Who was asked to close its gate counts as closed before the answer is there, so that whatever
fails afterwards is made good.  Where nothing was touched the old version is served again.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from hpcresume.errors import describe
from hpcresume.serving.policy import (
    CleanupError,
    Outcome,
    Phase,
    UpdatePolicy,
    UpdateReport,
    WorkerState,
)

log = logging.getLogger(__name__)

EXPORTER = "exporter"
ValueT = TypeVar("ValueT")


class How(enum.StrEnum):
    """How a call of a step was settled."""

    OK = "ok"
    RAISED = "raised"
    DEAD = "dead"
    HUNG = "hung"


@dataclass(frozen=True, slots=True)
class Answer:
    """How a call of a step was settled.

    Attributes:
        how: Whether it returned.
        value: What it returned.
        error: What it raised; of a death or a hang, an exception that says so.
    """

    how: How = How.OK
    value: Any = None
    error: BaseException | None = None

    @property
    def is_lost(self) -> bool:
        """Whether nothing is known of what it did or is going to do."""
        return self.how in (How.DEAD, How.HUNG)


@dataclass(frozen=True, slots=True)
class Step:
    """What is to be done next, by several at once.

    Attributes:
        phase: What.
        names: By whom.
        version: The version concerned.
        is_old: Whether that is the version from before the update.
    """

    phase: Phase
    names: tuple[str, ...]
    version: int
    is_old: bool = False


Answers = Mapping[str, Answer]
Steps = Generator[Step, Answers, ValueT]


class _RollBackError(Exception):
    """Nothing but staged copies was touched: the old version is to be served again."""


class _UnrecoverableError(Exception):
    """Nobody knows what the workers hold, or too few are left."""


class Update:
    """One update of a pool's workers.

    Args:
        workers: Who takes part, each SERVING or STALE.
        old: Version that is served; None where none is.
        new: Version to serve.
        policy: What it may do.
        in_place: Whether pushing overwrites what is served.
        has_exporter: Whether there is somebody to prepare and to build the state.
        has_old: Whether the old version's state is there to be pushed again.
        frees_caches: Whether a pause makes room that preparing and building may need.

    Attributes:
        states: How each worker stands.
        report: What is told of the update; complete when :meth:`run` has ended.
        cancelled: Set by whoever executes the steps to have the rest wound up.
    """

    def __init__(
        self,
        workers: Mapping[str, WorkerState],
        *,
        old: int | None,
        new: int,
        policy: UpdatePolicy,
        in_place: bool = False,
        has_exporter: bool = True,
        has_old: bool = False,
        frees_caches: bool = True,
    ) -> None:
        self.states = dict(workers)
        self.old, self.new, self._policy = old, new, policy
        self._in_place, self._has_exporter, self._has_old = in_place, has_exporter, has_old
        self._pauses_first = frees_caches and not policy.overlap
        self._serving = [n for n, s in workers.items() if s is WorkerState.SERVING]
        self._closed: list[str] = []
        self._released: list[str] = []
        self._prepared: list[str] = []
        self._holds: dict[str, int | None] = {
            n: old if s is WorkerState.SERVING else None for n, s in workers.items()
        }
        self.exporter_lost = False
        self.cancelled: BaseException | None = None
        self.report = UpdateReport(None, old, new)

    def run(self) -> Steps[None]:
        """Yield the steps; the report is complete when this ends."""
        try:
            yield from self._forward()
            version: int | None = self.new
        except _RollBackError:
            version = self.old
        except _UnrecoverableError:
            yield from self._give_up()
            return
        yield from self._clean_up(version)

    @property
    def is_touched(self) -> bool:
        """Whether some worker may hold something else than the old version by now."""
        return any(
            holds != self.old for name, holds in self._holds.items() if name in self._serving
        )

    # Towards the new version.

    def _forward(self) -> Steps[None]:
        if self._pauses_first:
            yield from self._pause()
        yield from self._prepare()
        if not (self._pauses_first or self._policy.overlap):
            yield from self._pause()
        if self._in_place:
            yield from self._overwrite()
        else:
            yield from self._stage()
        if self._policy.overlap:
            yield from self._pause()
        yield from self._commit(self._alive(), self.new)

    def _pause(self) -> Steps[None]:
        self._closed = self._alive(self._serving)
        self._set(self._closed, WorkerState.PAUSED)
        yield from self._all_or_nothing(Phase.PAUSE, self._closed, lost_is_fatal=False)
        self._released = self._alive(self._closed)
        yield from self._all_or_nothing(Phase.RELEASE, self._released, lost_is_fatal=False)
        self._need_enough()

    def _prepare(self) -> Steps[None]:
        exporter = [EXPORTER] if self._has_exporter else []
        self._prepared = [*exporter, *self._alive()]
        yield from self._all_or_nothing(Phase.PREPARE, self._prepared)
        yield from self._all_or_nothing(Phase.BUILD, exporter)

    def _stage(self) -> Steps[None]:
        names = self._alive()
        yield from self._all_or_nothing(Phase.TRANSFER, names)
        if not self._policy.overlap:
            self._set(self._alive(names), WorkerState.STAGED)

    def _overwrite(self) -> Steps[None]:
        """Push over what is served; who was touched and failed is pushed to again."""
        names = left = self._alive()
        for _ in range(1 + self._policy.retries):
            left = yield from self._push(left, self.new)
            if not left:
                break
        good = [n for n in self._alive(names) if self._holds[n] == self.new]
        if not left and good:
            return
        if len(good) >= self._policy.min_serving:
            yield from self._fence(dict.fromkeys(left, "it could not be brought to one version"))
            return
        yield from self._bring_back()

    def _push(self, names: list[str], version: int) -> Steps[list[str]]:
        """Overwrite workers; return those that are alive and hold something unknown."""
        for name in names:
            self._holds[name] = None
        self._set(names, WorkerState.TAINTED)
        answers = yield from self._ask(Phase.TRANSFER, names, version)
        for name, answer in answers.items():
            if answer.how is How.OK:
                self._holds[name] = version
                self.states[name] = WorkerState.STAGED
            else:
                self._blame_answer(answer)
        return [n for n in self._alive(names) if self._holds[n] is None]

    def _bring_back(self) -> Steps[None]:
        """Push the old version to everybody, since too few hold the new one."""
        if self.old is None:
            yield from self._fence(dict.fromkeys(self._alive(), "what it holds is not known"))
            raise _RollBackError
        if not self._has_old:
            raise _UnrecoverableError
        left = yield from self._push(self._alive(), self.old)
        yield from self._fence(dict.fromkeys(left, "it could not be brought back"))
        yield from self._commit(self._alive(), self.old)
        raise _RollBackError

    def _commit(self, names: list[str], version: int) -> Steps[None]:
        """Swap; who fails is asked again, and who still does is fenced.

        From here on there is no way back: a worker that has failed may hold either version.
        """
        for name in names:
            self._holds[name] = None
        self._set(names, WorkerState.TAINTED)
        left = names
        for _ in range(1 + self._policy.retries):
            answers = yield from self._ask(Phase.COMMIT, left, version)
            for name, answer in answers.items():
                if answer.how is How.OK and answer.value == version:
                    self._holds[name] = version
                    self.states[name] = WorkerState.PAUSED
                elif answer.error is not None:
                    log.warning("%s: commit of version %s: %s", name, version, answer.error)
                    self._last = answer.error
            left = [n for n in self._alive(names) if self._holds[n] is None]
            if not left:
                break
        yield from self._fence(dict.fromkeys(left, "it did not prove that it has committed"))
        proven = [n for n in self._alive(names) if self._holds[n] == version]
        if len(proven) < self._enough():
            self._blame(self._last)
            raise _UnrecoverableError

    _last: BaseException | None = None

    # Back to service.

    def _clean_up(self, version: int | None) -> Steps[None]:
        """Finalize, restore, resume: each of them tried for everybody, whatever the others do."""
        yield from self._finalize()
        yield from self._tolerant(Phase.RESTORE, self._alive(self._released), fence=True)
        ready = [n for n in self._alive() if version is not None and self._holds[n] == version]
        shut = [n for n in ready if n in self._closed or n not in self._serving]
        yield from self._tolerant(Phase.RESUME, shut, version, fence=True)
        self._set(self._alive(ready), WorkerState.SERVING)
        serving = [n for n, state in self.states.items() if state is WorkerState.SERVING]
        rest = [n for n in self._alive() if n not in serving]
        self._set([n for n in rest if n not in self._serving], WorkerState.STALE)
        yield from self._fence(
            {n: "what it holds is not known" for n in rest if n in self._serving}
        )
        if version is not None and len(serving) < self._enough():
            self._blame(next((one.error for one in self.report.cleanup), None))
            yield from self._give_up(finalize=False)
            return
        self._end(Outcome.COMMITTED if version == self.new else Outcome.ROLLED_BACK)

    def _finalize(self) -> Steps[None]:
        exporter = [EXPORTER] if EXPORTER in self._prepared and not self.exporter_lost else []
        yield from self._tolerant(Phase.FINALIZE, exporter)
        workers = [n for n in self._alive() if n in self._prepared]
        yield from self._tolerant(Phase.FINALIZE, workers)

    def _give_up(self, *, finalize: bool = True) -> Steps[None]:
        """See to it that nobody serves."""
        if finalize:
            exporter = [EXPORTER] if EXPORTER in self._prepared and not self.exporter_lost else []
            yield from self._tolerant(Phase.FINALIZE, exporter)
        yield from self._fence(dict.fromkeys(self._alive(), "the pool is unrecoverable"))
        self._end(Outcome.UNRECOVERABLE)

    def _end(self, outcome: Outcome) -> None:
        self.report.outcome = outcome
        self.report.workers = dict(self.states)

    # Asking.

    def _ask(
        self, phase: Phase, names: Iterable[str], version: int | None = None
    ) -> Steps[Answers]:
        """Have several do something; fence who is lost before anything else happens."""
        names = tuple(names)
        if not names:
            return {}
        wanted = self.new if version is None else version
        is_old = wanted == self.old and wanted != self.new
        answers = yield Step(phase, names, wanted, is_old=is_old)
        lost = {n: f"{a.how} in {phase}" for n, a in answers.items() if a.is_lost}
        yield from self._fence(lost)
        return answers

    def _all_or_nothing(
        self, phase: Phase, names: Iterable[str], *, lost_is_fatal: bool = True
    ) -> Steps[None]:
        """Take a step before which nothing was touched: one that raises rolls back all."""
        answers = yield from self._ask(phase, names)
        bad = [
            answer
            for answer in answers.values()
            if answer.how is How.RAISED or (answer.is_lost and lost_is_fatal)
        ]
        for answer in bad:
            self._blame_answer(answer)
        if not bad and not self._enough_alive():
            bad = [answer for answer in answers.values() if answer.is_lost]
            self._blame(bad[0].error if bad else None)
        if bad or self._is_cancelled():
            raise _RollBackError

    def _tolerant(
        self,
        phase: Phase,
        names: Iterable[str],
        version: int | None = None,
        *,
        fence: bool = False,
    ) -> Steps[None]:
        """Take a step of the clean-up; who raises is noted, and fenced where it matters."""
        answers = yield from self._ask(phase, names, version)
        raised = {n: a.error for n, a in answers.items() if a.how is not How.OK and a.error}
        for name, error in raised.items():
            log.warning("%s: %s failed: %s", name, phase, describe(error), exc_info=error)
            self.report.cleanup.append(CleanupError(f"{phase} of {name}", error))
        if fence:
            alive = set(self._alive())
            yield from self._fence(
                {n: f"{phase} failed: {describe(e)}" for n, e in raised.items() if n in alive}
            )

    def _fence(self, reasons: Mapping[str, str]) -> Steps[None]:
        if not reasons:
            return
        yield Step(Phase.FENCE, tuple(reasons), self.new)
        self.report.fenced.update(reasons)
        for name in reasons:
            if name == EXPORTER:
                self.exporter_lost = True
            else:
                self.states[name] = WorkerState.DEAD

    def _is_cancelled(self) -> bool:
        if self.cancelled is not None:
            self._blame(self.cancelled)
        return self.cancelled is not None

    def _blame(self, error: BaseException | None) -> None:
        if self.report.primary is None:
            self.report.primary = error

    def _blame_answer(self, answer: Answer) -> None:
        """Blame what a call failed of; of one that was cut short, why it was."""
        is_cut_short = answer.how is How.HUNG and self.cancelled is not None
        self._blame(self.cancelled if is_cut_short else answer.error)

    def _need_enough(self) -> None:
        if not self._enough_alive():
            raise _RollBackError

    def _enough(self) -> int:
        return self._policy.min_serving if self.old is not None else 1

    def _enough_alive(self) -> bool:
        return len(self._alive()) >= self._enough()

    def _alive(self, names: Iterable[str] | None = None) -> list[str]:
        dead = WorkerState.DEAD
        return [n for n in (self.states if names is None else names) if self.states[n] is not dead]

    def _set(self, names: Iterable[str], state: WorkerState) -> None:
        for name in names:
            self.states[name] = state


def drive(update: Update, perform: Callable[[Step], Answers]) -> UpdateReport:
    """Run an update to its end, its steps performed one after another."""
    steps, answers = update.run(), None
    while True:
        try:
            step = next(steps) if answers is None else steps.send(answers)
        except StopIteration:
            return update.report
        answers = perform(step)
