"""What is left of an array task's shard when an attempt starts."""

from __future__ import annotations

from collections.abc import Iterable

from hpcresume.merge.generation import load_newest, read_task_union
from hpcresume.merge.plan import Plan
from hpcresume.run.directory import AttemptRef, RunDir
from hpcresume.segment import bitmap as bitmaps
from hpcresume.task.messages import Work


def left_of_shard(
    run: RunDir,
    plan: Plan,
    task: int,
    *,
    max_attempts: int,
    memory_mib: int,
    recovered: Iterable[AttemptRef] = (),
) -> Work | None:
    """Return what is left of a shard, None when that is nothing.

    Args:
        run: The run.
        plan: Its round's plan.
        task: The array task.
        max_attempts: Tries after which a source is quarantined.
        memory_mib: Memory of the array task, in MiB.
        recovered: Attempts of any array task that were recovered on this node just now.
    """
    shard = plan.shard(task)
    union = read_task_union(run, plan.footer.round, task, max_attempts=max_attempts)
    elsewhere = [
        read_task_union(run, ref.round, ref.task, max_attempts=max_attempts).completed
        for ref in recovered
    ]
    attempts = dict(shard.attempts)
    for source, failures in union.attempts().items():
        attempts[source] = attempts.get(source, 0) + failures
    exhausted = {source for source, count in attempts.items() if count >= max_attempts}
    left = shard.bitmap() - union.settled() - bitmaps.union(elsewhere)
    left -= type(left)(exhausted & set(union.attempts()))
    # More of the same does not help these: the next round gives them more.
    left -= bitmaps.union(group for mib, group in union.short.items() if mib >= memory_mib)
    # Looked at last: who removes segments says so before the first of them is gone.
    if left and run.has_removals():
        left -= load_newest(run).settled()
    if not left:
        return None
    suspects = [bitmaps.load(group, what="suspects") for group in shard.suspects]
    for group in union.open_suspects():
        suspects = bitmaps.refine(suspects, group)
    ran = {
        source: max(shard.ran.get(source, 0.0), union.ran.get(source, 0.0))
        for source in (shard.ran.keys() | union.ran.keys())
        if source in left
    }
    return Work(bitmaps.dump(left), attempts, [bitmaps.dump(group) for group in suspects], ran)
