"""The course of an update over a model of the pool, under random faults.

The model is the truth that the update does not see: what every worker really holds, whole or
torn, and whether its gate is open; a call that hangs takes effect at any later time, in part
or in whole, or never, until its worker is fenced.  The contract is checked at every step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcresume.serving.policy import Outcome, Phase, UpdatePolicy, WorkerState
from hpcresume.serving.update import EXPORTER, Answer, How, Step, Update, drive

TORN = -1
HOWS = st.sampled_from([How.OK, How.OK, How.OK, How.RAISED, How.DEAD, How.HUNG])


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """Write no log lines: thousands of tracebacks take longer than what they tell of."""
    logger = logging.getLogger("hpcresume.serving")
    logger.disabled = True
    update = logging.getLogger("hpcresume.serving.update")
    update.disabled = True
    yield
    update.disabled = logger.disabled = False


class BoomError(Exception):
    """What a member of the model raises."""


@dataclass
class ModelWorker:
    """What a worker really is.

    Attributes:
        holds: Version that it would answer with; TORN: parts of two.
        staged: Version beside it.
        is_open: Whether it takes requests.
        is_alive: Whether anything can still happen in it.
        late: Effects of calls that hang.
    """

    holds: int | None
    is_open: bool
    staged: int | None = None
    is_alive: bool = True
    late: list[tuple[Phase, int]] = field(default_factory=list)

    def take(self, phase: Phase, version: int, *, in_place: bool, whole: bool) -> None:
        """Have a phase take its effect, or part of it."""
        if phase is Phase.PAUSE:
            self.is_open = False
        elif phase is Phase.TRANSFER and in_place:
            self.holds, self.staged = (version if whole else TORN), version
        elif phase is Phase.TRANSFER:
            self.staged = version if whole else None
        elif phase is Phase.COMMIT and not in_place:
            self.holds = (self.staged if whole else TORN) if self.staged else self.holds
        elif phase is Phase.FINALIZE:
            self.staged = None
        elif phase is Phase.RESUME and whole:
            self.is_open = True


@dataclass
class ModelPool:
    """Workers, and what chance does to them."""

    workers: dict[str, ModelWorker]
    in_place: bool
    draw: Any
    steps: list[Step] = field(default_factory=list)
    update: Update | None = None

    def perform(self, step: Step) -> dict[str, Answer]:
        """Take a step with every fault there may be, and check the contract after it."""
        self.steps.append(step)
        assert not any(not self.is_alive(name) for name in step.names if step.phase != "fence"), (
            "the dead were asked"
        )
        if step.phase is Phase.FENCE:
            for name in step.names:
                if name != EXPORTER:
                    self.workers[name].is_alive = self.workers[name].is_open = False
            self.check()
            return {}
        answers = {name: self.answer(name, step) for name in step.names}
        self.lag()
        self.check()
        return answers

    def is_alive(self, name: str) -> bool:
        return name == EXPORTER or self.workers[name].is_alive

    def answer(self, name: str, step: Step) -> Answer:
        """Return how a member answers; whatever it answers it may have done the thing."""
        how = self.draw(HOWS)
        if name == EXPORTER:
            return Answer(how, error=None if how is How.OK else BoomError(name))
        worker = self.workers[name]
        if how is How.OK:
            worker.take(step.phase, step.version, in_place=self.in_place, whole=True)
            return Answer(value=step.version if step.phase is Phase.COMMIT else None)
        if how is How.RAISED:
            # A gate opens last of all, so a resume that raises has not opened it.
            if step.phase is not Phase.RESUME and self.draw(st.booleans()):
                worker.take(step.phase, step.version, in_place=self.in_place, whole=False)
        elif how is How.HUNG:
            worker.late.append((step.phase, step.version))
        else:
            worker.is_alive = worker.is_open = False
        return Answer(how, error=BoomError(name))

    def lag(self) -> None:
        """Let some of what hangs take effect now."""
        for worker in self.workers.values():
            if worker.late and worker.is_alive and self.draw(st.booleans()):
                phase, version = worker.late.pop(0)
                whole = self.draw(st.booleans())
                worker.take(phase, version, in_place=self.in_place, whole=whole)

    def check(self) -> None:
        """Whoever takes requests holds one and the same whole version."""
        held = {worker.holds for worker in self.workers.values() if worker.is_open}
        assert len(held) <= 1, (held, self.steps)
        assert TORN not in held, self.steps
        assert None not in held, self.steps


SERVING, STALE = WorkerState.SERVING, WorkerState.STALE


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_course_of_an_update_keeps_the_contract(data: st.DataObject) -> None:
    """
    Whatever raises, hangs, dies or is cancelled, in whatever order: at every step all workers
    that take requests hold one whole version; at the end that is the one in the report, or
    none takes any; and at least ``min_serving`` do where the pool says it can go on.
    """
    draw = data.draw
    names = [f"worker-{i}" for i in range(draw(st.integers(1, 4)))]
    has_old = draw(st.booleans())
    states = {n: (draw(st.sampled_from([SERVING, STALE])) if has_old else STALE) for n in names}
    serving = [n for n, state in states.items() if state is SERVING]
    in_place = draw(st.booleans())
    policy = UpdatePolicy(
        min_serving=draw(st.integers(1, max(1, len(serving)))),
        retries=draw(st.integers(0, 2)),
        overlap=not in_place and draw(st.booleans()),
    )
    old = 1 if has_old and serving else None
    workers = {n: ModelWorker(1, True) if n in serving else ModelWorker(None, False) for n in names}
    pool = ModelPool(workers, in_place, draw)
    update = Update(
        states,
        old=old,
        new=2,
        policy=policy,
        in_place=in_place,
        has_exporter=draw(st.booleans()),
        has_old=draw(st.booleans()),
        frees_caches=draw(st.booleans()),
    )
    pool.check()
    cancel_at = draw(st.none() | st.integers(0, 12))

    def perform(step: Step) -> dict[str, Answer]:
        if cancel_at is not None and len(pool.steps) >= cancel_at:
            update.cancelled = update.cancelled or KeyboardInterrupt()
        return pool.perform(step)

    report = drive(update, perform)

    said = {name for name, state in report.workers.items() if state is SERVING}
    really = {name for name, worker in workers.items() if worker.is_open}
    # One that died after it was asked last may be thought to serve; nobody else may.
    assert really <= said | {n for n in names if not workers[n].is_alive}, pool.steps
    assert {report.version} >= {workers[n].holds for n in really}, pool.steps
    if report.outcome is Outcome.UNRECOVERABLE:
        assert (set(), set()) == (really, said)
    elif report.version is not None:
        least = policy.min_serving if old is not None else 1
        assert len(said) >= least, pool.steps
    assert report.outcome is not Outcome.ROLLED_BACK or report.primary is not None
    assert len(pool.steps) < 60
    finalized = [s for s in pool.steps if s.phase is Phase.FINALIZE]
    resumed = [s for s in pool.steps if s.phase is Phase.RESUME]
    asked = [s.phase for s in pool.steps if s.phase is not Phase.FENCE]
    if finalized and resumed:
        assert asked.index(Phase.FINALIZE) < asked.index(Phase.RESUME)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([How.RAISED, How.DEAD, How.HUNG]),
    st.sampled_from(list(Phase)[:9]),
    st.booleans(),
)
def test_one_fault_in_one_phase(how: How, phase: Phase, all_of_them: bool) -> None:
    """
    A single fault before the commit leaves the old version, one in or after it the new one;
    and only if all workers are lost, or none proves its commit, nobody serves.
    """
    names = ("worker-0", "worker-1", "worker-2")
    workers = {n: ModelWorker(1, True) for n in names}
    pool = ModelPool(workers, in_place=False, draw=lambda _: How.OK)
    update = Update(dict.fromkeys(names, SERVING), old=1, new=2, policy=UpdatePolicy())
    hit: list[str] = []

    def perform(step: Step) -> dict[str, Answer]:
        answers = pool.perform(step)
        for name in step.names if step.phase is phase else ():
            if name == EXPORTER or (hit and not all_of_them and name not in hit):
                continue
            hit.append(name)
            if how is How.DEAD:
                workers[name].is_alive = workers[name].is_open = False
            if phase is Phase.RESUME:
                workers[name].is_open = False
            answers[name] = Answer(how, error=BoomError(name))
        return answers

    report = drive(update, perform)

    lost_all = all_of_them and how is not How.RAISED
    if phase is Phase.BUILD:
        assert Outcome.COMMITTED is report.outcome  # only the exporter builds
    elif lost_all or (all_of_them and phase in (Phase.COMMIT, Phase.RESTORE, Phase.RESUME)):
        assert Outcome.UNRECOVERABLE is report.outcome
    elif phase in (Phase.PAUSE, Phase.RELEASE) and how is not How.RAISED:
        assert (Outcome.COMMITTED, 1) == (report.outcome, len(report.fenced))
    elif phase in (Phase.PAUSE, Phase.RELEASE, Phase.PREPARE, Phase.TRANSFER):
        assert Outcome.ROLLED_BACK is report.outcome
    else:
        assert Outcome.COMMITTED is report.outcome
    assert (report.primary is None) == (report.outcome is Outcome.COMMITTED)
