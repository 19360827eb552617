"""Rounds: union, remainder, the decision to go on, and the plan of the next round."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
from pyroaring import BitMap

from hpcresume.config.settings import Settings, SiteSettings
from hpcresume.errors import InternalError
from hpcresume.ids import RoundIndex
from hpcresume.launch.ladder import Demand, Ladder, fold
from hpcresume.merge.generation import (
    Union,
    load_newest,
    newest_footer,
    read_union,
    write_generation,
)
from hpcresume.merge.plan import (
    ArrayPlan,
    Launch,
    Plan,
    PlanFooter,
    deal,
    is_damaged,
    make_shards,
    share,
    whole_plans,
    write_plan,
)
from hpcresume.merge.retention import fold_small
from hpcresume.run.directory import Outcome, RunDir
from hpcresume.run.manifest import Manifest
from hpcresume.segment import bitmap as bitmaps
from hpcresume.segment.segment import NEEDS_LONGER

if TYPE_CHECKING:
    # What only unites, as `hpcresume merge` does, is to start quickly.
    pass

_TRIES = 5
_SAMPLE = 1000
_BROKEN_ROUNDS = 2
_NAMED = 3
_ONE_MACHINE = "On one machine there is no more to give: run fewer tasks, or split the source"


class Standing(msgspec.Struct, frozen=True):
    """How a run stands after a union.

    Attributes:
        union: What is done.
        remainder: What is left to do, without what waits for the user.
        total: Number of sources, without withdrawn ones.
    """

    union: Union
    remainder: BitMap
    total: int

    @property
    def stopped(self) -> str:
        """Why the run does not go on by itself, empty while it does."""
        return self.union.stopped


def stand(run: RunDir, manifest: Manifest, settings: Settings) -> Standing:
    """Return how a run stands, without writing anything."""
    union = read_union(run, max_attempts=settings.run.max_attempts)
    owed = bitmaps.span(0, manifest.total) - manifest.withdrawn()
    left = owed - union.settled()
    union.withheld &= left
    return Standing(union, left - union.withheld, len(owed))


def settle(run: RunDir, manifest: Manifest, settings: Settings, *, judge: bool = False) -> Standing:
    """Unite what has been published into a new generation, where there is anything new.

    Args:
        run: The run.
        manifest: Its sources.
        settings: Settings of the run.
        judge: The newest round has ended and nobody has asked to go on, so a run that gets
            nowhere is stopped.  While a round is at work nothing can be said against it.

    Raises:
        SharedStorageError: The file system refused.
    """
    for _ in range(_TRIES):
        standing = stand(run, manifest, settings)
        union = standing.union
        stopped, finished = union.stopped, union.finished
        union.finished = finished and not standing.remainder and not union.withheld
        if judge and not (union.stopped or union.finished):
            union.stopped = why_stopped(run, standing, settings)
        if not union.fresh and (stopped, finished) == (union.stopped, union.finished):
            return standing
        fold_small(run, union)
        with contextlib.suppress(FileExistsError):
            write_generation(run, union)
            return standing
    raise InternalError(f"{run.path}: {_TRIES} generations in a row were written by others")


def withhold(
    run: RunDir, manifest: Manifest, settings: Settings, plan: Plan, tasks: list[int]
) -> Standing:
    """Keep the shards of cancelled array tasks out of the next rounds until the user submits.

    Somebody cancelled them on purpose; bringing them back would be against it.

    Args:
        run: The run.
        manifest: Its sources.
        settings: Settings of the run.
        plan: The plan of the tasks' round, which another merge may have followed up by now.
        tasks: The cancelled tasks.
    """
    for _ in range(_TRIES):
        standing = stand(run, manifest, settings)
        union, round_ = standing.union, plan.footer.round
        wanted = [task for task in tasks if (round_, task) not in union.pardoned]
        cancelled = bitmaps.union(plan.shard(task).bitmap() for task in wanted)
        fresh = (cancelled & standing.remainder) - union.withheld
        if not fresh:
            return standing
        union.withheld |= fresh
        left = Standing(union, standing.remainder - fresh, standing.total)
        union.stopped = "" if left.remainder else why_stopped(run, left, settings)
        with contextlib.suppress(FileExistsError):
            write_generation(run, union)
            return stand(run, manifest, settings)
    raise InternalError(f"{run.path}: {_TRIES} generations in a row were written by others")


def pardon(run: RunDir, round_: RoundIndex | int, tasks: list[int]) -> None:
    """Let the shards of array tasks go on whose cancellation is overtaken: `submit` by hand.

    The round's merge is still to come, and would find them cancelled.
    """
    for _ in range(_TRIES):
        union = load_newest(run)
        union.pardoned = [(int(round_), task) for task in tasks]
        with contextlib.suppress(FileExistsError):
            write_generation(run, union)
            return
    raise InternalError(f"{run.path}: {_TRIES} generations in a row were written by others")


def note_starved(
    run: RunDir, manifest: Manifest, settings: Settings, plan: Plan, tasks: list[int]
) -> Standing:
    """Give more memory to what is left of array tasks that ended for want of it, all at once.

    Where Slurm ends the whole step on an out-of-memory kill nobody is left to say which
    sources were in flight, so it is everything that was not published.
    """
    for _ in range(_TRIES):
        standing = stand(run, manifest, settings)
        union, before = standing.union, learnt(standing)
        for task in tasks:
            attempts = run.attempts(plan.footer.round, task)
            info = run.attempt_info(attempts[-1]) if attempts else None
            said = run.outcome(attempts[-1]) if attempts else None
            if info is None or not info.memory_mib or said is not None:
                continue
            if not plan.array_of(task).limit:
                union.note_short(plan.shard(task).bitmap() & standing.remainder, info.memory_mib)
        if learnt(standing) == before:
            return standing
        union.stopped = why_stopped(run, standing, settings)
        with contextlib.suppress(FileExistsError):
            write_generation(run, union)
            return standing
    raise InternalError(f"{run.path}: {_TRIES} generations in a row were written by others")


def mark_finished(run: RunDir, standing: Standing) -> None:
    """Record that nothing is left to do."""
    union = standing.union
    if union.finished:
        return
    union.finished = True
    # Another merge that came first has said the same.
    with contextlib.suppress(FileExistsError):
        write_generation(run, union)


def mark_stopped(run: RunDir, standing: Standing, reason: str) -> None:
    """Record why an ended run is not finished: somebody has to see to it."""
    standing.union.stopped = reason
    # Another merge that came first has met the same.
    with contextlib.suppress(FileExistsError):
        write_generation(run, standing.union)


def reopen(run: RunDir, *, quarantined: bool) -> None:
    """Take back why a run stopped, and the quarantined sources if asked; `submit` by hand."""
    for _ in range(_TRIES):
        union = load_newest(run)
        given_up = union.quarantined() if quarantined else BitMap()
        if not (union.stopped or given_up or union.withheld):
            return
        if union.stopped:
            # Who submits by hand wants them tried once more; they still come first.
            union.ran = {source: seconds / 2 for source, seconds in union.ran.items()}
        union.stopped, union.finished = "", union.finished and not given_up
        union.withheld = BitMap()
        for source in given_up:
            del union.failures[source]
        with contextlib.suppress(FileExistsError):
            write_generation(run, union)
            return


def why_stopped(run: RunDir, standing: Standing, settings: Settings) -> str:
    """Return why a run must not go on by itself, empty where it may."""
    if not standing.remainder:
        count = len(standing.union.withheld)
        return f"{count} sources belong to array tasks that were cancelled" if count else ""
    # One whose sbatch was lost, and which was dealt anew, says nothing.
    plans = [
        plan
        for plan in reversed(list(whole_plans(run)))
        if run.job_records(plan.footer.round) or run.tasks(plan.footer.round)
    ]
    rounds = [RoundIndex(plan.footer.round) for plan in plans]
    if not rounds:
        return ""
    if settings.run.max_rounds and len(rounds) >= settings.run.max_rounds:
        return f"max_rounds={settings.run.max_rounds} rounds are done and sources are left"
    too_long = _too_long(run, standing, rounds[-1])
    if too_long:
        return too_long
    now = (len(standing.remainder), -learnt(standing))
    steps = [*((plan.footer.sources, -plan.footer.learnt) for plan in plans), now]
    fruitless = 0
    while fruitless < len(rounds) and _is_fruitless(steps[-2 - fruitless], steps[-1 - fruitless]):
        fruitless += 1
    broken = _broken(run, rounds[-_BROKEN_ROUNDS:])
    if broken and len(rounds) >= _BROKEN_ROUNDS:
        return broken
    if fruitless >= settings.run.max_no_progress_rounds:
        last = broken or _last_reason(run, rounds[-1])
        return f"{fruitless} rounds in a row completed nothing{f': {last}' if last else ''}"
    return ""


def _too_long(run: RunDir, standing: Standing, round_: int) -> str:
    """Return the reason if no source that is left can finish under the round's time limit.

    Those are sources that an attempt worked on for nearly all the time that a fresh one has.
    As long as any other is left, the run goes on.
    """
    ran = standing.union.interrupted()
    if not ran or any(source not in ran for source in standing.remainder):
        return ""
    outcomes = (
        run.outcome(ref) for task in run.tasks(round_) for ref in run.attempts(round_, task)
    )
    usable_s = max((outcome.usable_s for outcome in outcomes if outcome is not None), default=0.0)
    if not usable_s or any(NEEDS_LONGER * ran[s] <= usable_s for s in standing.remainder):
        return ""
    longest = sorted(standing.remainder, key=lambda source: -ran[source])
    manifest = Manifest.open(run)
    named = ", ".join(
        f"{manifest.entry(source).source_id!r} ({ran[source]:.0f} s)" for source in longest[:_NAMED]
    )
    more = f" and {len(longest) - _NAMED} more" if len(longest) > _NAMED else ""
    subject = "1 source needs" if len(longest) == 1 else f"{len(longest)} sources need"
    return (
        f"{subject} longer than the time limit, which leaves {usable_s:.0f} s for work: "
        f"{named}{more} had not finished when it ended. "
        f"Nobody is charged. Give more time: hpcresume submit {run.path} --time ..."
    )


def _is_fruitless(before: tuple[int, int], after: tuple[int, int]) -> bool:
    return all(later >= earlier for earlier, later in zip(before, after, strict=True))


def learnt(standing: Standing) -> int:
    """Return the tries charged to what is left, plus the MiB that were not enough for it."""
    union, left = standing.union, standing.remainder
    tries = sum(failure.attempts for index, failure in union.failures.items() if index in left)
    return tries + sum(mib * len(group & left) for mib, group in union.short.items())


def _outcomes(run: RunDir, round_: int) -> list[Outcome]:
    """Return how each array task of a round ended last."""
    found = []
    for task in run.tasks(round_):
        attempts = run.attempts(round_, task)
        outcome = run.outcome(attempts[-1]) if attempts else None
        if outcome is not None:
            found.append(outcome)
    return found


def _broken(run: RunDir, rounds: list[RoundIndex]) -> str:
    """Return the reason if every one of these rounds had a task that found a stage broken."""
    reason = ""
    for round_ in rounds:
        broken = [
            outcome for outcome in _outcomes(run, round_) if outcome.kind.startswith("stage-")
        ]
        if not broken:
            return ""
        reason = broken[0].reason
    return reason


def _last_reason(run: RunDir, round_: int) -> str:
    reasons = [outcome.reason for outcome in _outcomes(run, round_) if outcome.state != "done"]
    return reasons[0] if reasons else ""


def plan_round(
    run: RunDir,
    manifest: Manifest,
    standing: Standing,
    *,
    after: Plan | None,
    settings: Settings,
    code: int,
    launch: Launch,
    at_most: int = sys.maxsize,
    ladder: Ladder | None = None,
) -> RoundIndex:
    """Deal the remainder over a new round's array tasks and publish its plan.

    Args:
        run: The run.
        manifest: Its sources.
        standing: How it stands; read after the round before was seen to have ended.
        after: The plan of that round, None for the first.  Whoever plans a round from what
            another one has overtaken finds the number taken.
        settings: Settings of the round.
        code: Number of the code snapshot to run.
        launch: How the user asked for it to be launched.
        at_most: Array tasks that Slurm takes now.
        ladder: What is asked for sources that ran out of memory; None: nothing is asked.

    Raises:
        FileExistsError: Another process planned this round.
        SlurmUnreachableError: Some sources need more memory, and Slurm does not say whether
            it would grant that.
    """
    number = RoundIndex(after.footer.round + 1 if after else 0)
    while is_damaged(run, number):
        number = RoundIndex(number + 1)
    weight_of = None if manifest.uniform else (lambda index: manifest.entry(index).weight)
    per_weight_s = seconds_per_weight(run, standing, weight_of)
    needed = tasks_needed(standing, weight_of, per_weight_s, min_task_s=settings.run.min_task_s)
    slow = {i: s / per_weight_s for i, s in slow_sources(standing).items()} if per_weight_s else {}
    most = min(launch.array, at_most, needed or at_most)
    union = standing.union
    arrays, dealt = [], list[BitMap]()
    for demand, tasks in share_tasks(standing, settings.site, launch, ladder, most=most):
        blocks = deal(demand.sources, tasks, weight_of, slow)
        arrays.append(ArrayPlan(len(dealt), len(blocks), demand.memory_mib, demand.limit))
        dealt += blocks
    shards = make_shards(dealt, union.attempts(), union.open_suspects(), union.interrupted())
    footer = PlanFooter(
        run_id=run.run_id,
        round=number,
        generation=standing.union.number,
        code=code,
        sources=len(standing.remainder),
        tasks=len(shards),
        settings=msgspec.to_builtins(settings),
        launch=launch,
        arrays=arrays,
        learnt=learnt(standing),
    )
    write_plan(run, footer, shards)
    return number


def seconds_per_weight(
    run: RunDir, standing: Standing, weight_of: Callable[[int], float] | None
) -> float | None:
    """Return what a source of weight 1 was measured to take, None where nothing is known.

    The newest round that completed any tells: the remainder of a run may be other than what
    came first.

    Args:
        run: The run.
        standing: How it stands.
        weight_of: Expected cost of a source; None where all cost the same.
    """
    for round_ in reversed(run.rounds()):
        progress = [
            footer.progress
            for task in run.tasks(round_)
            for ref in run.attempts(round_, task)
            if (footer := newest_footer(run, ref))
        ]
        completed = sum(one.completed for one in progress)
        if not completed:
            continue
        won = (won for (writer, _), won in standing.union.won.items() if writer.round == round_)
        done = _mean_weight(bitmaps.union(won), weight_of)
        return sum(one.elapsed_s for one in progress) / completed / done if done > 0 else None
    return None


def slow_sources(standing: Standing) -> dict[int, float]:
    """Return the seconds that sources take at least which a time limit has interrupted."""
    ran = standing.union.interrupted()
    return {i: NEEDS_LONGER * ran[i] for i in BitMap(ran) & standing.remainder}


def tasks_needed(
    standing: Standing,
    weight_of: Callable[[int], float] | None,
    per_weight_s: float | None,
    *,
    min_task_s: float,
) -> int | None:
    """Return how many array tasks the remainder keeps busy, as far as has been measured.

    An array task costs a place in the queue and the start of Ray, so a few quick sources are
    not worth one each.

    Args:
        standing: How the run stands.
        weight_of: Expected cost of a source; None where all cost the same.
        per_weight_s: Seconds that a source of weight 1 takes, None if unknown.
        min_task_s: Seconds of work that are worth an array task; 0: any are.

    Returns:
        None where nothing is known of the cost.
    """
    if not min_task_s or per_weight_s is None:
        return None
    slow = slow_sources(standing)
    quick = standing.remainder - BitMap(slow)
    quick_s = len(quick) * _mean_weight(quick, weight_of) * per_weight_s
    return max(1, math.ceil((quick_s + sum(slow.values())) / min_task_s))


def _mean_weight(sources: BitMap, weight_of: Callable[[int], float] | None) -> float:
    """Return the mean weight of sources, from some of them where they are many."""
    if weight_of is None:
        return 1.0
    step = max(1, len(sources) // _SAMPLE)
    weights = [weight_of(sources[at]) for at in range(0, len(sources), step)]
    return sum(weights) / len(weights) if weights else 0.0


def share_tasks(
    standing: Standing, site: SiteSettings, launch: Launch, ladder: Ladder | None, *, most: int
) -> list[tuple[Demand, int]]:
    """Return what the next round asks for: sources of one request, and over how many tasks.

    Args:
        standing: How the run stands.
        site: Says how many jobs it takes.
        launch: How the round is launched.
        ladder: What is asked for sources that ran out of memory; None: nothing is asked.
        most: Array tasks that are wanted at most; each request has at least one.
    """
    demands = [Demand(0, standing.remainder, _ONE_MACHINE)]
    if ladder is not None:
        demands = ladder.sort(standing.remainder, standing.union.short)
    if launch.cluster == "slurm":
        from hpcresume.launch.packing import capacity

        most = min(most, capacity(site))
        demands = fold(demands, capacity(site))
    sizes = [len(demand.sources) for demand in demands]
    return list(zip(demands, share(most, sizes), strict=True))


def plan_settings(plan: Plan) -> Settings:
    """Return the settings that a plan was made with."""
    return msgspec.convert(plan.footer.settings, Settings)
