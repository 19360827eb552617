"""Driving a run from round to round: what `submit`, the merge job and `drive` share."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hpcresume.config import Resolved, Settings, load_settings
from hpcresume.errors import LocalStorageError, RunDirError
from hpcresume.launch.cancelled import cancelled_tasks
from hpcresume.launch.local import LocalRound, TaskProgress, living_attempts
from hpcresume.launch.rounds import (
    Standing,
    mark_finished,
    newest_plan,
    plan_round,
    plan_settings,
    run_finish,
    settle,
    withhold,
)
from hpcresume.launch.slurm_round import active_jobs, submit_round
from hpcresume.launch.stopping import unless_stopped
from hpcresume.merge.plan import Launch, Plan, open_plan
from hpcresume.pipeline.load import load_snapshot
from hpcresume.pipeline.pipeline import Pipeline
from hpcresume.run.directory import JobRecord, RunDir, check_owner
from hpcresume.run.manifest import Manifest
from hpcresume.task.recovery import recover_node
from hpcresume.task.scratch import choose_local

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """What one merge step led to.

    Attributes:
        state: ``finished``, ``stopped``, ``cancelled``, ``running`` (the round's array is
            still at work) or ``submitted`` (a next round was).
        standing: How the run stands.
        round: Number of the round that was submitted, or that is running.
        job: What was submitted.
    """

    state: str
    standing: Standing
    round: int | None = None
    job: JobRecord | None = None


def reload_settings(plan: Plan) -> Resolved:
    """Return the settings of a plan together with its site's templates.

    The values are those of the submission; only where the templates lie is found anew.
    """
    launch = plan.footer.launch
    found = load_settings(
        site=launch.site, start_dir=Path(launch.cwd or "."), environ=os.environ, flags={}
    )
    return dataclasses.replace(found, settings=plan_settings(plan))


def finish_run(run: RunDir, standing: Standing, pipeline: Pipeline) -> None:
    """Do what is done once at the end of a run."""
    if standing.union.finished:
        return
    if standing.total:
        run_finish(run, pipeline)
    mark_finished(run, standing)


def merge_step(run: RunDir) -> Step:
    """Unite, decide, and submit the remainder as the next round on Slurm.

    Idempotent, killable anywhere, and safe to run twice at once: the plan is an exclusive
    create, and the array is looked up by name before it is submitted.

    Raises:
        RunDirError: The run was never submitted.
        SlurmUnreachableError: The controller does not answer; run it again.
    """
    plan = newest_plan(run)
    if plan is None:
        raise RunDirError(
            f"{run.path} has no round yet. Nothing was submitted. Run: hpcresume submit PIPELINE",
            path=run.path,
        )
    # Code of the run is loaded below, and where others own it, it is theirs.
    check_owner(run.path)
    manifest, settings = Manifest.open(run), plan_settings(plan)
    round_ = plan.footer.round
    standing = settle(run, manifest, settings)
    if standing.remainder and plan.footer.launch.cluster == "slurm" and not run.stop_requested():
        if active_jobs(run, round_):
            return Step("running", standing, round_)
        tasks = cancelled_tasks(run, plan, standing.remainder)
        standing = withhold(run, manifest, settings, tasks)
    if not standing.remainder and not standing.union.withheld:
        pipeline = load_snapshot(Path(run.code_path(run.code_numbers()[-1]))).pipeline
        finish_run(run, standing, pipeline)
        return Step("finished", standing)
    if run.stop_requested():
        return Step("cancelled", standing)
    if standing.stopped:
        return Step("stopped", standing)
    if run.job_records(round_) or run.tasks(round_):
        round_ = next_round(run, manifest, standing, plan)
    # Otherwise this round was planned by a merge that died before it was submitted.
    plan = open_plan(run, round_)
    job = unless_stopped(run, lambda: submit_round(run, plan, reload_settings(plan)))
    return Step("cancelled" if job is None else "submitted", standing, round_, job)


def next_round(run: RunDir, manifest: Manifest, standing: Standing, plan: Plan) -> int:
    """Plan the next round with the settings of the last one, without the nodes that failed.

    Returns:
        Its number, also where another merge planned it first.
    """
    with contextlib.suppress(FileExistsError):
        return plan_round(
            run,
            manifest,
            standing,
            settings=without_bad_nodes(run, plan),
            code=run.code_numbers()[-1],
            launch=plan.footer.launch,
        )
    return run.rounds()[-1]


def without_bad_nodes(run: RunDir, plan: Plan) -> Settings:
    """Return a plan's settings, leaving out nodes on which attempts could not start.

    Only where another node did better in the same round: if none did, the fault is not a
    node's, and leaving all of them out would leave the next round waiting for ever.
    """
    settings = plan_settings(plan)
    bad, good = set[str](), set[str]()
    for task in run.tasks(plan.footer.round):
        for ref in run.attempts(plan.footer.round, task):
            info, outcome = run.attempt_info(ref), run.outcome(ref)
            if info is None or outcome is None or info.node is None:
                continue
            (bad if outcome.kind in {"storage", "ray-start"} else good).add(info.node)
    bad -= good
    if not bad or not good:
        return settings
    known = set(filter(None, settings.request.exclude.split(",")))
    request = msgspec.structs.replace(settings.request, exclude=",".join(sorted(known | bad)))
    return msgspec.structs.replace(settings, request=request)


@dataclass
class LocalRun:
    """A run in the foreground of this machine: round after round until nothing is left.

    Attributes:
        run: The run directory.
        manifest: Its sources.
        pipeline: The pipeline, for ``finish``.
        resolved: The settings.
        launch: How rounds are dealt.
        on_round: Called before each round with its plan.
        on_progress: Called during a round with every task's progress.
        on_recovered: Called with the number of sources that a dead attempt had committed
            and that are published now.
    """

    run: RunDir
    manifest: Manifest
    pipeline: Pipeline
    resolved: Resolved
    launch: Launch
    on_round: Callable[[Plan], None]
    on_progress: Callable[[dict[int, TaskProgress]], None]
    on_recovered: Callable[[int], None]

    def execute(self) -> Step:
        """Run rounds until nothing is left, or until it makes no sense to go on.

        Raises:
            RunDirError: Another process of this machine works on the run.
            LocalStorageError: No node-local directory here can be used; nothing was started.
        """
        living = living_attempts(self.run)
        if living:
            raise RunDirError(
                f"{self.run.path} is being worked on by process {living[0].pid} on this "
                "machine. Two at once would only do work twice. "
                "Wait for it, or run: hpcresume cancel " + self.run.path,
                path=self.run.path,
            )
        settings = self.resolved.settings
        by_hand = True
        while True:
            self._recover()
            standing = settle(self.run, self.manifest, settings, by_hand=by_hand)
            if not standing.remainder:
                finish_run(self.run, standing, self.pipeline)
                return Step("finished", standing)
            if self.run.stop_requested():
                return Step("cancelled", standing)
            if standing.stopped:
                return Step("stopped", standing)
            if by_hand:
                # Every task would find the same on this one machine.
                choose_local(settings.task.local_dir, settings.site.node_local, os.environ)
            by_hand = False
            if self._execute_round(standing):
                return Step("interrupted", settle(self.run, self.manifest, settings))

    def _recover(self) -> None:
        """Publish what dead attempts left on this machine before anything is dealt again."""
        settings = self.resolved.settings
        with contextlib.suppress(LocalStorageError):
            local = choose_local(settings.task.local_dir, settings.site.node_local, os.environ)
            found = recover_node(self.run, local)
            if found:
                self.on_recovered(found)

    def _execute_round(self, standing: Standing) -> bool:
        """Plan and run one round; return whether the user interrupted it."""
        round_ = plan_round(
            self.run,
            self.manifest,
            standing,
            settings=self.resolved.settings,
            code=self.run.code_numbers()[-1],
            launch=self.launch,
        )
        plan = open_plan(self.run, round_)
        self.on_round(plan)
        local = LocalRound(self.run, round_, plan, self.resolved.settings, self.on_progress)
        local.execute()
        return local.interrupted
