"""How a run stands, from its files; Slurm is asked at most one ``squeue``.

What a live array task does between two publishes is not visible from outside, so its counts
are those of its newest segment.  Nothing here decides anything: the merge step has its own
rules.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from hpcresume import slurm
from hpcresume.errors import HpcResumeError, SlurmUnreachableError
from hpcresume.merge.generation import Union, newest_footer, read_union
from hpcresume.merge.plan import PlanFooter, array_name, merge_name, open_plan, twin_name
from hpcresume.observe.liveness import is_gone, submitter_runs
from hpcresume.run.directory import AttemptInfo, AttemptRef, JobRecord, Outcome, RunDir
from hpcresume.run.manifest import Manifest
from hpcresume.segment.segment import SegmentFooter, StageCount, Writer

SCHEMA = 1
ENDED_STATES = frozenset({"complete", "incomplete", "interrupted", "stopped", "cancelled"})
"""States in which nothing more happens by itself."""
_MAX_ATTEMPTS = 3
_SQUEUE_TIMEOUT_S = 10.0


class SourceCounts(msgspec.Struct):
    """Sources by how they stand.

    Attributes:
        total: All of the run.
        completed: Completed and published.
        failing: Failed and tried again.
        quarantined: Failed and not tried again.
        remaining: Neither completed nor quarantined.
        at_risk: In work or committed on a node and not published yet, as far as files tell.
    """

    total: int = 0
    completed: int = 0
    failing: int = 0
    quarantined: int = 0
    remaining: int = 0
    at_risk: int = 0


class RoundStatus(msgspec.Struct):
    """One round; ``state`` is ``planned``, ``waiting``, ``running`` or ``ended``."""

    round: int
    tasks: int
    job_id: str
    state: str


class TaskStatus(msgspec.Struct):
    """One array task in its newest attempt.

    ``state`` is ``waiting``, ``running``, ``died``, or how the attempt ended: ``done``,
    ``saved``, ``lost``, ``broken``, ``superseded``.
    """

    round: int
    task: int
    attempt: int
    state: str
    host: str
    completed: int
    in_flight: int


class StageStatus(msgspec.Struct, rename={"items_in": "in", "items_out": "out"}):
    """One stage over all attempts: items in and out, dropped, failed; busy seconds."""

    name: str
    items_in: int = 0
    items_out: int = 0
    dropped: int = 0
    failed: int = 0
    seconds: float = 0.0


class Status(msgspec.Struct):
    """How a run stands.

    Attributes:
        state: ``planned``, ``waiting``, ``running``, or how it ended: ``complete``,
            ``incomplete``, ``interrupted``, ``stopped``, ``cancelled``.
        reason: Why, for people.
        run: Path of the run directory.
        name: Name of the pipeline.
        tolerated: Quarantined sources that leave the run complete.
        rate_per_s: Sources completed per second by the tasks that run; None when none does.
        eta_s: Seconds until the remaining sources are done at that rate.
        unasked: What could not be asked, and why; empty when all could.
    """

    state: str
    reason: str
    run: str
    name: str
    sources: SourceCounts
    tolerated: int
    rounds: list[RoundStatus]
    tasks: list[TaskStatus]
    stages: list[StageStatus]
    rate_per_s: float | None
    eta_s: float | None
    unasked: str

    @property
    def ended(self) -> bool:
        """Whether nothing more happens by itself."""
        return self.state in ENDED_STATES

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, ``schema`` first."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return {"schema": SCHEMA, **plain}


@dataclass
class _Attempt:
    """What files say of one attempt; ``alive`` is None where nobody here can tell."""

    ref: AttemptRef
    info: AttemptInfo | None
    outcome: Outcome | None
    footer: SegmentFooter | None
    alive: bool | None = False

    @property
    def writer(self) -> Writer:
        return Writer(self.ref.round, self.ref.task, self.ref.epoch)

    @property
    def state(self) -> str:
        if self.outcome is not None:
            return self.outcome.state
        return "died" if self.alive is False else "running"


@dataclass
class _Round:
    """A round as its files and the queue tell.

    Attributes:
        waiting: Whether something of it is still to run, or to go on.
        unmerged: Whether its tasks are in Slurm's queue and no merge job is.
    """

    number: int
    plan: PlanFooter
    jobs: list[JobRecord]
    owner: str | None
    attempts: list[_Attempt]
    waiting: bool = False
    unmerged: bool = False
    held: list[slurm.QueueEntry] = field(default_factory=list)

    @property
    def live(self) -> list[_Attempt]:
        return [a for a in self.attempts if a.state == "running"]

    @property
    def on_slurm(self) -> bool:
        return self.plan.launch.cluster == "slurm"

    @property
    def merges_itself(self) -> bool:
        """Whether the site lets merge jobs submit the next round."""
        return bool(self.plan.settings.get("site", {}).get("submit_from_compute", True))


@dataclass
class _Queue:
    """What squeue said of jobs that have not ended.

    Attributes:
        tasks: The newest round's array.
        merges: Its merge jobs and their twins.
        planners: Those of the round before, which planned it and may not have submitted it yet.
        unasked: Why squeue was not asked.
    """

    tasks: list[slurm.QueueEntry] = field(default_factory=list)
    merges: list[slurm.QueueEntry] = field(default_factory=list)
    planners: list[slurm.QueueEntry] = field(default_factory=list)
    unasked: str = ""


def read_status(run: RunDir, *, ask_slurm: bool = True) -> Status:
    """Return how a run stands.

    Args:
        run: The run.
        ask_slurm: Whether squeue may be called, once, where the newest round is Slurm's.

    Raises:
        CorruptDataError: The manifest is damaged.
    """
    rounds = [_read_round(run, number) for number in run.rounds()]
    settings = rounds[-1].plan.settings if rounds else {}
    max_attempts = settings.get("run", {}).get("max_attempts", _MAX_ATTEMPTS)
    union = read_union(run, max_attempts=max_attempts)
    unasked = _look_for_life(run, rounds[-1], ask_slurm=ask_slurm) if rounds else ""
    sources = _count_sources(run, union, rounds)
    allowed = run.tolerated(sources.total)
    state, reason = _state_of(run, union, rounds, sources, allowed)
    rate = _rate(rounds) if state == "running" else None
    return Status(
        state=state,
        reason=reason,
        run=run.path,
        name=run.info.name,
        sources=sources,
        tolerated=allowed,
        rounds=[_round_status(r, is_newest=r is rounds[-1]) for r in rounds],
        tasks=[task for r in rounds for task in _task_statuses(r)],
        stages=_sum_stages(rounds),
        rate_per_s=rate,
        eta_s=_eta(state, sources, rate),
        unasked=unasked,
    )


# -- reading ------------------------------------------------------------------------------------


def _read_round(run: RunDir, number: int) -> _Round:
    plan = open_plan(run, number).footer
    attempts = [
        _read_attempt(run, ref) for t in run.tasks(number) for ref in run.attempts(number, t)
    ]
    return _Round(number, plan, run.job_records(number), run.round_owner(number), attempts)


def _read_attempt(run: RunDir, ref: AttemptRef) -> _Attempt:
    return _Attempt(ref, run.attempt_info(ref), run.outcome(ref), newest_footer(run, ref))


def _look_for_life(run: RunDir, newest: _Round, *, ask_slurm: bool) -> str:
    """Find out which attempts of the newest round run; return what could not be asked."""
    queue = _ask_queue(run, newest.number, ask_slurm=ask_slurm) if newest.on_slurm else None
    newest_of = {a.ref.task: a for a in newest.attempts}
    for attempt in newest.attempts:
        if attempt.outcome is None and attempt is newest_of[attempt.ref.task]:
            attempt.alive = _is_alive(attempt, queue)
    if queue is not None:
        # Where Slurm was not asked, a first round that was never submitted still does not wait.
        in_doubt = bool(queue.unasked and (newest.number or newest.jobs or newest.attempts))
        newest.waiting = bool(in_doubt or queue.tasks or queue.merges or queue.planners)
        newest.unmerged = bool(newest.merges_itself and queue.tasks and not queue.merges)
        newest.held = [entry for entry in queue.tasks if "held" in (entry.reason or "").lower()]
        return queue.unasked
    unseen = {a.info.host for a in newest.attempts if a.alive is None and a.info is not None}
    drives = [submitter_runs(job) for job in newest.jobs]
    newest.waiting = any(drives) or (None in drives and not newest.attempts)
    return f"whether processes on {', '.join(sorted(unseen))} still run" if unseen else ""


def _ask_queue(run: RunDir, round_: int, *, ask_slurm: bool) -> _Queue:
    """Ask for the round's jobs by name, as an sbatch whose answer was lost left no record."""
    if not ask_slurm:
        return _Queue(unasked="Slurm's queue: not asked on request")
    array, merges = array_name(run, round_), [merge_name(run, round_), twin_name(run, round_)]
    planners = [merge_name(run, round_ - 1), twin_name(run, round_ - 1)] if round_ else []
    try:
        entries = slurm.queue(
            name=",".join([array, *merges, *planners]),
            user=os.stat(run.path).st_uid,
            timeout_s=_SQUEUE_TIMEOUT_S,
        )
    except SlurmUnreachableError as error:
        complaint = error.fields.get("stderr", error)
        return _Queue(unasked=f"Slurm's queue; Slurm did not answer: {complaint}")
    except HpcResumeError as error:
        return _Queue(unasked=f"Slurm's queue: {error}")
    to_come = [entry for entry in entries if not (entry.ended or entry.waits_in_vain)]
    return _Queue(
        tasks=[entry for entry in to_come if entry.name == array],
        merges=[entry for entry in to_come if entry.name in merges],
        planners=[entry for entry in to_come if entry.name in planners],
    )


def _is_alive(attempt: _Attempt, queue: _Queue | None) -> bool | None:
    if queue is None:
        gone = is_gone(attempt.info) if attempt.info is not None else True
        return None if gone is None else not gone
    if queue.unasked:
        return None
    job = attempt.info.job_id if attempt.info is not None else None
    return any(
        (entry.job_id == job if job else entry.array_task in (attempt.ref.task, None))
        and entry.state != "PENDING"
        for entry in queue.tasks
    )


# -- judging ------------------------------------------------------------------------------------


def _state_of(
    run: RunDir, union: Union, rounds: list[_Round], sources: SourceCounts, allowed: int
) -> tuple[str, str]:
    newest = rounds[-1] if rounds else None
    live = bool(newest and newest.live)
    # A plan dealt from a generation comes after what that generation said of the run's end.
    overtaken = newest is not None and union.number > 0 and newest.plan.generation >= union.number
    if sources.remaining == 0 and union.finished:
        return _finished(sources, allowed)
    if run.stop_requested():
        return "cancelled", "its tasks are still stopping" if live else "hpcresume cancel"
    if union.stopped and not overtaken and not live:
        text = union.stopped
        return ("interrupted" if text.startswith("interrupted") else "stopped"), text
    if newest is None:
        return "planned", "no round was planned yet"
    return _unfinished(run, newest, sources)


def _finished(sources: SourceCounts, allowed: int) -> tuple[str, str]:
    if sources.quarantined <= allowed:
        return "complete", ""
    return (
        "incomplete",
        f"{sources.quarantined} quarantined, {allowed} tolerated",
    )


def _unfinished(run: RunDir, newest: _Round, sources: SourceCounts) -> tuple[str, str]:
    go_on = f"to go on: hpcresume {_command(newest)}".replace("RUN", run.path)
    unmerged = f"no merge job is to follow round {newest.number}; {go_on}"
    if newest.live:
        note = next((a.footer.progress.note for a in newest.live if a.footer), "")
        return "running", unmerged if newest.unmerged else note
    if newest.waiting:
        if newest.held:
            return "waiting", _held(newest.held)
        if newest.unmerged:
            return "waiting", unmerged
        if newest.attempts:
            return "waiting", f"for the merge or restarted tasks of round {newest.number}"
        return "waiting", f"for the tasks of round {newest.number} to start"
    planned_by_a_merge = newest.on_slurm and newest.number > 0
    if not (planned_by_a_merge or newest.jobs or newest.attempts):
        return "planned", f"nothing shows that round {newest.number} was submitted; {go_on}"
    if sources.remaining == 0:
        return "interrupted", f"all its sources are settled, but nothing has ended it; {go_on}"
    return "interrupted", f"nothing of it runs and {sources.remaining} sources remain; {go_on}"


def _held(entries: list[slurm.QueueEntry]) -> str:
    job = entries[0].job_id
    return (
        f"{len(entries)} of its jobs are held ({entries[0].reason}), as Slurm does after a node's "
        "prolog failed. They start only once they are released: find out why with "
        f"`scontrol show job {job}`, then `scontrol release {job}`"
    )


def _command(newest: _Round) -> str:
    """Return the command that goes on with a run of which nothing runs."""
    if not newest.on_slurm:
        return "submit RUN"
    return "merge RUN --requeue" if newest.merges_itself else "drive RUN"


def _count_sources(run: RunDir, union: Union, rounds: list[_Round]) -> SourceCounts:
    manifest = Manifest.open(run)
    withdrawn = manifest.withdrawn()
    quarantined = union.quarantined() - withdrawn
    counts = SourceCounts(
        total=manifest.total - len(withdrawn),
        completed=len(union.completed - withdrawn),
        quarantined=len(quarantined),
    )
    counts.failing = sum(1 for i in union.failures if i not in withdrawn) - counts.quarantined
    counts.remaining = counts.total - counts.completed - counts.quarantined
    live = [attempt for attempt in (rounds[-1].live if rounds else []) if attempt.footer]
    counts.at_risk = sum(_at_risk(attempt, union) for attempt in live)
    return counts


def _at_risk(attempt: _Attempt, union: Union) -> int:
    assert attempt.footer is not None
    progress = attempt.footer.progress
    published = sum(len(won) for (writer, _), won in union.won.items() if writer == attempt.writer)
    return progress.in_flight + max(0, progress.completed - published)


def _round_status(round_: _Round, *, is_newest: bool) -> RoundStatus:
    arrays = [job.array for job in round_.jobs if job.cluster == "slurm"]
    # Of several submissions of one round the one that works on it counts.
    job_id = round_.owner if round_.owner in arrays else (arrays or [""])[-1]
    if round_.live:
        state = "running"
    elif is_newest and round_.waiting:
        state = "waiting"
    elif round_.attempts or not is_newest:
        state = "ended"
    else:
        state = "ended" if round_.jobs else "planned"
    return RoundStatus(round_.number, round_.plan.tasks, job_id, state)


def _task_statuses(round_: _Round) -> Iterable[TaskStatus]:
    newest: dict[int, _Attempt] = {attempt.ref.task: attempt for attempt in round_.attempts}
    for task in range(max(round_.plan.tasks, *(t + 1 for t in newest), 0)):
        if task not in newest:
            yield TaskStatus(round_.number, task, 0, "waiting", "", 0, 0)
            continue
        attempt = newest[task]
        progress = attempt.footer.progress if attempt.footer else None
        yield TaskStatus(
            round=round_.number,
            task=task,
            attempt=attempt.ref.epoch,
            state=attempt.state,
            host=attempt.info.host if attempt.info else "",
            completed=_completed(attempt),
            in_flight=progress.in_flight if progress and attempt.state == "running" else 0,
        )


def _completed(attempt: _Attempt) -> int:
    if attempt.outcome is not None:
        return attempt.outcome.completed
    return attempt.footer.progress.completed if attempt.footer else 0


def _sum_stages(rounds: list[_Round]) -> list[StageStatus]:
    totals: dict[str, StageStatus] = {}
    counts: list[StageCount] = [
        count for r in rounds for a in r.attempts if a.footer for count in a.footer.stages
    ]
    for count in counts:
        total = totals.setdefault(count.name, StageStatus(count.name))
        total.items_in += count.items_in
        total.items_out += count.items_out
        total.dropped += count.dropped
        total.failed += count.failed
        total.seconds += count.seconds
    return list(totals.values())


def _rate(rounds: list[_Round]) -> float | None:
    progress = [a.footer.progress for a in rounds[-1].live if a.footer]
    rates = [p.completed / p.elapsed_s for p in progress if p.elapsed_s > 0]
    return sum(rates) if rates else None


def _eta(state: str, sources: SourceCounts, rate: float | None) -> float | None:
    if state == "complete":
        return 0.0
    return sources.remaining / rate if rate else None
