"""A run in the foreground of this machine, from round to round."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import msgspec

from hpcresume.config import Resolved, Settings
from hpcresume.errors import HpcResumeError, LocalStorageError, RunDirError
from hpcresume.launch.ending import finish_run
from hpcresume.launch.local import LocalRound, TaskProgress, living_attempts
from hpcresume.launch.rounds import Standing, plan_round, settle
from hpcresume.launch.step import Step
from hpcresume.merge.plan import Launch, Plan, newest_plan, open_plan
from hpcresume.pipeline.pipeline import Pipeline
from hpcresume.run.directory import RunDir
from hpcresume.run.manifest import Manifest
from hpcresume.task.scratch import choose_local, has_attempts


def recover_dead(run: RunDir, settings: Settings) -> int:
    """Publish what dead attempts left on this machine, before anything is dealt again.

    Returns:
        The number of sources that they had committed and not published.
    """
    with contextlib.suppress(LocalStorageError):
        local = choose_local(settings.task.local_dir, settings.site.node_local, os.environ)
        if has_attempts(local, run_id=run.run_id):
            # What reads a ledger takes longer to import than all else here takes.
            from hpcresume.task.recovery import recover_node

            return recover_node(run, local)
    return 0


class LocalRun(msgspec.Struct):
    """A run in the foreground of this machine: round after round until nothing is left.

    Attributes:
        run: The run directory.
        manifest: Its sources.
        pipeline: The pipeline, for ``finish``.
        resolved: The settings.
        launch: How rounds are dealt.
        on_round: Called before each round with its plan.
        on_progress: Called during a round with every task's progress; where it answers True
            the round is interrupted as by SIGTERM.
        on_recovered: Called with the number of sources that a dead attempt had committed
            and that are published now.
    """

    run: RunDir
    manifest: Manifest
    pipeline: Pipeline
    resolved: Resolved
    launch: Launch
    on_round: Callable[[Plan], None]
    on_progress: Callable[[dict[int, TaskProgress]], bool | None]
    on_recovered: Callable[[int], None]
    _last: LocalRound | None = None

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
        try:
            return self._execute()
        finally:
            if self._last is not None:
                # Where storage fails now, the end of this process says the same.
                with contextlib.suppress(HpcResumeError, OSError):
                    self._last.note_end()

    def _execute(self) -> Step:
        settings = self.resolved.settings
        by_hand = True
        while True:
            self._recover()
            standing = settle(self.run, self.manifest, settings, judge=not by_hand)
            if not standing.remainder:
                return finish_run(self.run, self.manifest, standing, self.pipeline)
            if self.run.stop_requested():
                return Step("cancelled", standing)
            if standing.stopped:
                return Step("stopped", standing)
            if by_hand:
                # Every task would find the same on this one machine.
                choose_local(settings.task.local_dir, settings.site.node_local, os.environ)
            by_hand = False
            local = self._execute_round(standing)
            if local.interrupted:
                standing = settle(self.run, self.manifest, settings)
                return Step("interrupted", standing, signal=local.interrupted, forced=local.forced)

    def _recover(self) -> None:
        found = recover_dead(self.run, self.resolved.settings)
        if found:
            self.on_recovered(found)

    def _execute_round(self, standing: Standing) -> LocalRound:
        """Plan and run one round."""
        round_ = plan_round(
            self.run,
            self.manifest,
            standing,
            after=newest_plan(self.run),
            settings=self.resolved.settings,
            code=self.run.code_numbers()[-1],
            launch=self.launch,
        )
        plan = open_plan(self.run, round_)
        self.on_round(plan)
        local = LocalRound(self.run, round_, plan, self.resolved.settings, self.on_progress)
        self._last = local
        local.execute()
        return local
