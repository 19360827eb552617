"""How a run stands, from its files; Slurm is asked at most one ``squeue``.

What a live array task does between two publishes is not visible from outside, so its counts
are those of its newest segment.  Nothing here decides anything: the merge step has its own
rules.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from hpcresume.merge.generation import Union
from hpcresume.observe.queue import Life, Queue, ask_queue, look_for_life
from hpcresume.observe.reading import AttemptFiles, Reader, RoundFiles
from hpcresume.run.directory import RunDir
from hpcresume.run.manifest import Manifest
from hpcresume.segment.segment import StageCount

SCHEMA = 1
ENDED_STATES = frozenset({"complete", "incomplete", "interrupted", "stopped", "cancelled"})
"""States in which nothing more happens by itself."""
_RECENT_S = 300.0


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
    """One round; ``state`` is ``planned``, ``waiting``, ``running`` or ``ended``.

    ``sources`` is the remainder that was dealt to it.
    """

    round: int
    tasks: int
    job_id: str
    state: str
    sources: int


class TaskStatus(msgspec.Struct):
    """One array task in its newest attempt.

    Attributes:
        round: Number of its round.
        task: Its number.
        attempt: Number of its newest attempt, 0: none has started.
        state: ``waiting``, ``running``, ``died``, or how the attempt ended: ``done``,
            ``saved``, ``lost``, ``broken``, ``superseded``.
        host: Where it runs, or ran.
        completed: Sources that the attempt completed.
        in_flight: Sources in work.
        left: Sources of its share that are neither completed nor quarantined; None: not told.
        elapsed_s: Seconds that the attempt has run.
        published_s: Seconds since it published last; None where it does not run or has not.
        why: What it waits for, or why it ended.
    """

    round: int
    task: int
    attempt: int
    state: str
    host: str
    completed: int
    in_flight: int
    left: int | None = None
    elapsed_s: float = 0.0
    published_s: float | None = None
    why: str = ""


class StageStatus(msgspec.Struct, rename={"items_in": "in", "items_out": "out"}):
    """One stage over all attempts: items in and out, dropped, failed; busy seconds.

    Attributes:
        memory_mib: Most memory that a worker of it had resident, MiB; 0: not recorded.
        spread: Items by what one took: under ``k`` those between ``2**k`` and ``2**(k + 1)`` s.
    """

    name: str
    items_in: int = 0
    items_out: int = 0
    dropped: int = 0
    failed: int = 0
    seconds: float = 0.0
    memory_mib: int = 0
    spread: dict[int, int] = {}


class FailureGroup(msgspec.Struct):
    """Failing and quarantined sources that failed alike; ``example`` is one of them."""

    stage: str
    kind: str
    message: str
    sources: int
    example: str


class CoreHours(msgspec.Struct):
    """Core-hours that attempts have had so far, and what the rest takes at that price.

    Attributes:
        used: Cores of every attempt times its hours.
        left: Remaining sources at the price of the completed ones; None before the first.
    """

    used: float
    left: float | None


class Status(msgspec.Struct):
    """How a run stands.

    Attributes:
        state: ``planned``, ``waiting``, ``running``, or how it ended: ``complete``,
            ``incomplete``, ``interrupted``, ``stopped``, ``cancelled``.
        reason: Why, for people.
        run: Path of the run directory.
        name: Name of the pipeline.
        tolerated: Quarantined sources that leave the run complete.
        rate_per_s: Sources completed per second by the tasks that run, over the last minutes;
            None when none does.
        eta_s: Seconds until the remaining sources are done at that rate.
        slowest_s: Seconds until the last of the running tasks has done its share at its own
            rate: the run takes at least as long; None where no task has told.
        slowest_task: That task.
        unasked: What could not be asked, and why; empty when all could.
        core_hours: Core-hours used and left.
        failures: Sources that failed and are not completed, in groups, the largest first.
        endings: Attempts by how they ended: ``done``, ``preempted``, ``time-limit``, ``died``...
        seen: The part of the array tasks that has been looked at; 1: all of them.
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
    slowest_s: float | None
    slowest_task: int | None
    unasked: str
    core_hours: CoreHours
    failures: list[FailureGroup]
    endings: dict[str, int]
    seen: float = 1.0

    @property
    def ended(self) -> bool:
        """Whether nothing more happens by itself."""
        return self.state in ENDED_STATES

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, ``schema`` first."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return {"schema": SCHEMA, **plain}


class Watcher:
    """Reads how one run stands again and again, at the cost of what has changed."""

    def __init__(self, run: RunDir) -> None:
        self.reader = Reader(run)
        self._queue: tuple[int, Queue] | None = None

    def read(self, *, ask_slurm: bool = True, budget_s: float | None = None) -> Status:
        """Return how the run stands now.

        Args:
            ask_slurm: Whether squeue may be called, once, where the newest round is Slurm's;
                otherwise what it answered last still counts.
            budget_s: Read for about so long at most; ``seen`` then tells how far that went.

        Raises:
            CorruptDataError: The manifest is damaged.
        """
        reader = self.reader
        reader.refresh(budget_s=budget_s)
        rounds = reader.rounds
        life = Life()
        if rounds:
            queue = self._ask(rounds[-1], ask_slurm=ask_slurm) if rounds[-1].on_slurm else None
            life = look_for_life(rounds[-1], queue)
        return _judge(reader, life)

    def _ask(self, newest: RoundFiles, *, ask_slurm: bool) -> Queue:
        if ask_slurm:
            self._queue = (newest.number, ask_queue(self.reader.run, newest.number))
        if self._queue is None or self._queue[0] != newest.number:
            return Queue(unasked="Slurm's queue: not asked on request")
        return self._queue[1]


def read_status(run: RunDir, *, ask_slurm: bool = True) -> Status:
    """Return how a run stands.

    Args:
        run: The run.
        ask_slurm: Whether squeue may be called, once, where the newest round is Slurm's.

    Raises:
        CorruptDataError: The manifest is damaged.
    """
    return Watcher(run).read(ask_slurm=ask_slurm)


ASK_SLURM_S = 30.0
"""squeue burdens a controller that every user shares."""


def readings(
    run: RunDir,
    *,
    pause_s: float,
    budget_s: float | None = None,
    timeout_s: float | None = None,
) -> Iterator[Status]:
    """Yield how the run stands until it has ended, or time is up; the last one says how.

    Args:
        run: The run.
        pause_s: Seconds between two readings.
        budget_s: Seconds that one reading takes at most, about.
        timeout_s: Seconds after which the last reading is made; None: not before the run's end.
    """
    watcher, asked_at, pause = Watcher(run), -ASK_SLURM_S, threading.Event()
    end = math.inf if timeout_s is None else time.monotonic() + timeout_s
    while True:
        ask = time.monotonic() - asked_at >= ASK_SLURM_S
        if ask:
            asked_at = time.monotonic()
        found = watcher.read(ask_slurm=ask, budget_s=budget_s)
        yield found
        left_s = end - time.monotonic()
        if (found.ended and found.seen == 1) or left_s <= 0:
            return
        pause.wait(min(pause_s, left_s))


def _judge(reader: Reader, life: Life) -> Status:
    run, rounds, union, now = reader.run, reader.rounds, reader.union, time.time()
    manifest = reader.manifest
    sources = _count_sources(manifest, union, rounds)
    allowed = run.tolerated(sources.total)
    state, reason = _state_of(reader, sources, allowed, life)
    rate = _rate(rounds) if state == "running" else None
    slowest_s, slowest_task = _slowest(rounds) if state == "running" else (None, None)
    return Status(
        state=state,
        reason=reason,
        run=run.path,
        name=run.info.name,
        sources=sources,
        tolerated=allowed,
        rounds=[_round_status(r, life, is_newest=r is rounds[-1]) for r in rounds],
        tasks=[task for r in rounds for task in _task_statuses(r, life, now)],
        stages=_sum_stages(rounds),
        rate_per_s=rate,
        eta_s=_eta(state, sources, rate),
        slowest_s=slowest_s,
        slowest_task=slowest_task,
        unasked=life.unasked,
        core_hours=_core_hours(rounds, sources, now),
        failures=_group_failures(union, manifest),
        endings=_endings(rounds),
        seen=reader.seen,
    )


# -- judging ------------------------------------------------------------------------------------


def _state_of(reader: Reader, sources: SourceCounts, allowed: int, life: Life) -> tuple[str, str]:
    run, union, rounds = reader.run, reader.union, reader.rounds
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
    return _unfinished(run, newest, sources, life)


def _finished(sources: SourceCounts, allowed: int) -> tuple[str, str]:
    if sources.quarantined <= allowed:
        return "complete", "" if sources.total else "there are no sources: nothing to do"
    return (
        "incomplete",
        f"{sources.quarantined} quarantined, {allowed} tolerated",
    )


def _unfinished(
    run: RunDir, newest: RoundFiles, sources: SourceCounts, life: Life
) -> tuple[str, str]:
    go_on = f"to go on: hpcresume {_command(newest)}".replace("RUN", run.path)
    unmerged = f"no merge job is to follow round {newest.number}; {go_on}"
    if newest.live:
        note = next((a.footer.progress.note for a in newest.live if a.footer), "")
        return "running", unmerged if life.unmerged else note
    if life.waiting:
        if life.held:
            return "waiting", _held(life)
        if life.unmerged:
            return "waiting", unmerged
        if newest.tasks:
            return "waiting", f"for the merge or restarted tasks of round {newest.number}"
        return "waiting", f"for the tasks of round {newest.number} to start"
    planned_by_a_merge = newest.on_slurm and newest.number > 0
    if not (planned_by_a_merge or newest.jobs or newest.tasks):
        return "planned", f"nothing shows that round {newest.number} was submitted; {go_on}"
    if sources.remaining == 0:
        return "interrupted", f"all its sources are settled, but nothing has ended it; {go_on}"
    return "interrupted", f"nothing of it runs and {sources.remaining} sources remain; {go_on}"


def _held(life: Life) -> str:
    entries = life.held
    job = entries[0].job_id
    return (
        f"{len(entries)} of its jobs are held ({entries[0].reason}), as Slurm does after a node's "
        "prolog failed. They start only once they are released: find out why with "
        f"`scontrol show job {job}`, then `scontrol release {job}`"
    )


def _command(newest: RoundFiles) -> str:
    """Return the command that goes on with a run of which nothing runs."""
    if not newest.on_slurm:
        return "submit RUN"
    return "merge RUN --requeue" if newest.merges_itself else "drive RUN"


def _count_sources(manifest: Manifest, union: Union, rounds: list[RoundFiles]) -> SourceCounts:
    withdrawn = manifest.withdrawn()
    quarantined = union.quarantined() - withdrawn
    counts = SourceCounts(
        total=manifest.total - len(withdrawn),
        completed=len(union.completed - withdrawn),
        quarantined=len(quarantined),
    )
    counts.failing = sum(1 for i in union.failures if i not in withdrawn) - counts.quarantined
    counts.remaining = counts.total - counts.completed - counts.quarantined
    live = {a.writer: a.progress for a in (rounds[-1].live if rounds else []) if a.progress}
    published = Counter(dict.fromkeys(live, 0))
    for (writer, _), won in union.won.items():
        if writer in live:
            published[writer] += len(won)
    counts.at_risk = sum(
        one.in_flight + max(0, one.completed - published[writer]) for writer, one in live.items()
    )
    return counts


def _round_status(round_: RoundFiles, life: Life, *, is_newest: bool) -> RoundStatus:
    arrays = [job.array for job in round_.jobs if job.cluster == "slurm"]
    # Of several submissions of one round the one that works on it counts.
    job_id = round_.owner if round_.owner in arrays else (arrays or [""])[-1]
    if round_.live:
        state = "running"
    elif is_newest and life.waiting:
        state = "waiting"
    elif round_.tasks or not is_newest:
        state = "ended"
    else:
        state = "ended" if round_.jobs else "planned"
    return RoundStatus(round_.number, round_.plan.tasks, job_id, state, round_.plan.sources)


def _task_statuses(round_: RoundFiles, life: Life, now: float) -> Iterable[TaskStatus]:
    newest = round_.newest
    for task in range(max(round_.plan.tasks, *(t + 1 for t in newest), 0)):
        if task in newest:
            yield _task_status(newest[task], now)
            continue
        why = life.waits_for.get(task, life.waits_for.get(None, ""))
        yield TaskStatus(round_.number, task, 0, "waiting", "", 0, 0, why=why)


def _task_status(attempt: AttemptFiles, now: float) -> TaskStatus:
    progress, running = attempt.progress, attempt.state == "running"
    why = progress.note if progress and running else ""
    if attempt.outcome is not None:
        why = attempt.outcome.kind if attempt.outcome.state != "done" else ""
    return TaskStatus(
        round=attempt.ref.round,
        task=attempt.ref.task,
        attempt=attempt.ref.epoch,
        state=attempt.state,
        host=attempt.info.host if attempt.info else "",
        completed=attempt.completed,
        in_flight=progress.in_flight if progress and running else 0,
        left=progress.left if progress else None,
        elapsed_s=round(attempt.elapsed_s(now), 1),
        # Clocks of two hosts differ.
        published_s=round(max(0.0, now - progress.written_at), 1) if progress and running else None,
        why=why,
    )


def _sum_stages(rounds: list[RoundFiles]) -> list[StageStatus]:
    totals: dict[str, StageCount] = {}
    for attempt in (a for r in rounds for a in r.attempts if a.footer):
        assert attempt.footer is not None
        for count in attempt.footer.stages:
            totals.setdefault(count.name, StageCount(count.name)).add(count)
    return [
        StageStatus(
            name=one.name,
            items_in=one.items_in,
            items_out=one.items_out,
            dropped=one.dropped,
            failed=one.failed,
            seconds=one.seconds,
            memory_mib=one.memory_mib,
            spread=dict(sorted(one.spread.items())),
        )
        for one in totals.values()
    ]


def recent_rate(attempt: AttemptFiles) -> float | None:
    """Return the sources per second that an attempt completed over its last minutes."""
    last = attempt.progress
    if last is None or last.elapsed_s <= 0:
        return None
    earlier = [p for p in attempt.points if last.elapsed_s - p.elapsed_s <= _RECENT_S]
    first = earlier[0] if earlier else last
    if first.elapsed_s >= last.elapsed_s:
        return last.completed / last.elapsed_s
    return (last.completed - first.completed) / (last.elapsed_s - first.elapsed_s)


def _rate(rounds: list[RoundFiles]) -> float | None:
    rates = [rate for a in rounds[-1].live if (rate := recent_rate(a)) is not None]
    return sum(rates) if rates else None


def _eta(state: str, sources: SourceCounts, rate: float | None) -> float | None:
    if state == "complete":
        return 0.0
    return sources.remaining / rate if rate else None


def _slowest(rounds: list[RoundFiles]) -> tuple[float | None, int | None]:
    """Return when the last running task has done its share at its own rate, and which it is."""
    ends = [
        (attempt.progress.left / rate, int(attempt.ref.task))
        for attempt in rounds[-1].live
        if attempt.progress and (rate := recent_rate(attempt))
    ]
    return max(ends, default=(None, None))


def _core_hours(rounds: list[RoundFiles], sources: SourceCounts, now: float) -> CoreHours:
    used = sum(
        attempt.elapsed_s(now) * (attempt.info.cpus if attempt.info else 0)
        for round_ in rounds
        for attempt in round_.attempts
    )
    left = used / sources.completed * sources.remaining if sources.completed else None
    return CoreHours(used / 3600, None if left is None else left / 3600)


def _group_failures(union: Union, manifest: Manifest) -> list[FailureGroup]:
    withdrawn, groups = manifest.withdrawn(), dict[tuple[str, str, str], FailureGroup]()
    for index, failures in union.failures.items():
        if index not in withdrawn:
            last = failures.last
            group = FailureGroup(last.stage, last.kind, last.message, 0, last.source_id)
            groups.setdefault((last.stage, last.kind, last.message), group).sources += 1
    return sorted(groups.values(), key=lambda group: -group.sources)


def _endings(rounds: list[RoundFiles]) -> dict[str, int]:
    kinds = Counter(ending(a) for r in rounds for a in r.attempts if a.state != "running")
    return dict(kinds.most_common())


def ending(attempt: AttemptFiles) -> str:
    """Return how an attempt ended, in one word."""
    if attempt.outcome is None:
        return attempt.state
    return "done" if attempt.outcome.state == "done" else attempt.outcome.kind
