"""What one merge step led to; and uniting alone, which needs nothing that submits."""

from __future__ import annotations

import msgspec

from hpcresume.errors import RunDirError
from hpcresume.launch.rounds import Standing, plan_settings, settle
from hpcresume.merge.plan import Plan, newest_plan
from hpcresume.run.directory import JobRecord, RunDir
from hpcresume.run.manifest import Manifest


class Step(msgspec.Struct, frozen=True):
    """What one merge step led to.

    Attributes:
        state: ``finished``, ``stopped``, ``cancelled``, ``interrupted`` (by a signal, of a
            run on this machine), ``running`` (the round's array is still at work) or
            ``submitted`` (a next round was).
        standing: How the run stands.
        round: Number of the round that was submitted, or that is running.
        job: What was submitted.
        signal: The signal that interrupted it, 0 for none.
        forced: Whether its tasks were killed by a second one: what they had committed and not
            published is published when the run is continued.
        notes: Limits that Slurm's refusals have taught, and what to write into the site file.
    """

    state: str
    standing: Standing
    round: int | None = None
    job: JobRecord | None = None
    notes: tuple[str, ...] = ()
    signal: int = 0
    forced: bool = False


def unite(run: RunDir) -> Standing:
    """Unite what has been published into a generation; nothing is submitted.

    Raises:
        RunDirError: The run has no round yet.
    """
    return settle(run, Manifest.open(run), plan_settings(last_plan(run)))


def last_plan(run: RunDir) -> Plan:
    """Return the plan of the last round.

    Raises:
        RunDirError: The run has no round yet.
    """
    plan = newest_plan(run)
    if plan is None:
        raise RunDirError(
            f"{run.path} has no round yet. Nothing was submitted. Run: hpcresume submit PIPELINE",
            path=run.path,
        )
    return plan
