"""Driving a run from round to round: what `submit`, the merge job and `drive` share."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from filelock import FileLock, Timeout

from hpcresume import slurm
from hpcresume.config import Resolved, Settings, load_settings
from hpcresume.errors import InternalError, RunDirError, SlurmRefusedError
from hpcresume.launch.cancelled import cancelled_tasks
from hpcresume.launch.ending import finish_run, tell_of
from hpcresume.launch.packing import foresee, learn
from hpcresume.launch.rounds import (
    Standing,
    note_starved,
    pardon,
    plan_round,
    plan_settings,
    settle,
    withhold,
)
from hpcresume.launch.slurm_round import (
    active_jobs,
    close_round,
    nodes_without_attempt,
    slurm_ladder,
    starved_tasks,
    submit_round,
    take_up,
)
from hpcresume.launch.step import Step, last_plan
from hpcresume.launch.stopping import unless_stopped
from hpcresume.merge.plan import Plan, newest_plan, open_plan
from hpcresume.pipeline.load import load_snapshot
from hpcresume.run.directory import RunDir, check_owner
from hpcresume.run.manifest import Manifest
from hpcresume.task.bad_node import bad_nodes, excluding

if TYPE_CHECKING:
    from hpcresume.launch.submit import Ready

log = logging.getLogger(__name__)
_TRIES = 5
# Longer than it takes to submit a round; whoever holds the lock longer is stuck.
_LOCK_S = 60.0
_LOCK_POLL_S = 0.2


def reload_settings(plan: Plan) -> Resolved:
    """Return the settings of a plan together with its site's templates.

    The values are those of the submission; only where the templates lie is found anew.
    """
    launch = plan.footer.launch
    found = load_settings(
        site=launch.site, start_dir=Path(launch.cwd or "."), environ=os.environ, flags={}
    )
    return msgspec.structs.replace(found, settings=plan_settings(plan))


@contextlib.contextmanager
def one_at_a_time(run: RunDir) -> Iterator[None]:
    """Let one process of this node submit for a run at a time.

    Two at once do no harm, but each would submit an array, and one of them for nothing.
    """
    path = os.path.join(tempfile.gettempdir(), f"hpcresume-{os.getuid()}-{run.run_id}.lock")
    lock = FileLock(path, timeout=_LOCK_S, poll_interval=_LOCK_POLL_S)
    try:
        lock.acquire()
    except (Timeout, OSError) as error:
        log.warning("%s: going on without the lock %s: %s", run.path, path, error)
    try:
        yield
    finally:
        if lock.is_locked:
            # Who waits for it holds the file without its name, and goes on beside the next one.
            with contextlib.suppress(OSError):
                os.unlink(path)
        lock.release()


def until_planned(step: Callable[[], Step]) -> Step:
    """Return what a step leads to; it looks again where another process planned its round.

    Raises:
        InternalError: That happened too often to be true.
    """
    for _ in range(_TRIES):
        with contextlib.suppress(FileExistsError):
            return step()
    raise InternalError(f"{_TRIES} rounds in a row were planned by others")


def submit_to_slurm(ready: Ready) -> Step:
    """Submit the remainder as a round of job arrays; the merge job does the rest.

    Raises:
        SlurmUnreachableError, SlurmRefusedError: Nothing is lost; submit again.
    """
    with one_at_a_time(ready.prepared.run):
        step = until_planned(lambda: _submit_once(ready))
    tell_of(ready.prepared.run, step, ready.resolved.settings)
    return step


def merge_step(run: RunDir) -> Step:
    """Unite, decide, and submit the remainder as the next round on Slurm.

    Idempotent, killable anywhere, and safe to run twice at once: the plan is an exclusive
    create, and the array is looked up by name before it is submitted.

    Raises:
        RunDirError: The run was never submitted, or not on Slurm.
        SlurmUnreachableError: The controller does not answer; run it again.
    """
    with one_at_a_time(run):
        step = until_planned(lambda: _merge_once(run))
    tell_of(run, step, plan_settings(last_plan(run)))
    return step


def _submit_once(ready: Ready) -> Step:
    run, manifest = ready.prepared.run, ready.prepared.manifest
    settings = ready.resolved.settings
    last = newest_plan(run)
    standing = settle(run, manifest, settings)
    if not standing.remainder and standing.union.withheld:
        # Somebody has cancelled array tasks at this moment, and a merge has taken note of it.
        return Step("stopped", standing)
    if not standing.remainder:
        return finish_run(run, manifest, standing, ready.prepared.loaded.pipeline)
    if last is not None:
        round_ = last.footer.round
        active = active_jobs(run, round_)
        if active:
            pardon(run, round_, [t for t in range(last.footer.tasks) if not _goes_on(t, active)])
            job = unless_stopped(run, partial(take_up, run, last, ready.resolved, active))
            return Step("cancelled" if job is None else "running", standing, round_, job)
        close_round(run, last)
        # What its tasks published before they ended may have come since.
        standing = settle(run, manifest, settings)
        if not standing.remainder:
            return _submit_once(ready)
    round_ = plan_round(
        run,
        manifest,
        standing,
        after=last,
        settings=settings,
        code=ready.prepared.code,
        launch=ready.launch,
        ladder=slurm_ladder(run, ready.launch, ready.resolved),
    )
    return submit_planned(run, manifest, standing, open_plan(run, round_), ready.resolved)


def _goes_on(task: int, active: list[slurm.QueueEntry]) -> bool:
    """Tell whether an array task waits or runs, so that it may still be cancelled."""
    states = {entry.state for entry in active if entry.array_task in (task, None)}
    return bool(states - {"COMPLETING"})


def _merge_once(run: RunDir) -> Step:
    plan = last_plan(run)
    if plan.footer.launch.cluster != "slurm":
        raise RunDirError(
            f"{run.path} was last run on one machine, without Slurm. Nothing was submitted. "
            f"To go on with it, run: hpcresume submit {run.path}",
            path=run.path,
        )
    # Code of the run is loaded below, and where others own it, it is theirs.
    check_owner(run.path)
    manifest, settings = Manifest.open(run), plan_settings(plan)
    round_ = plan.footer.round
    standing = settle(run, manifest, settings)
    if standing.remainder and not run.stop_requested():
        active = active_jobs(run, round_)
        if active:
            resolved = reload_settings(plan)
            job = unless_stopped(run, partial(take_up, run, plan, resolved, active))
            return Step("cancelled" if job is None else "running", standing, round_, job)
        # What its tasks published before they ended may have come since.
        standing = settle(run, manifest, settings, judge=True)
        starved = starved_tasks(run, round_)
        if starved:
            standing = note_starved(run, manifest, settings, plan, starved)
        tasks = cancelled_tasks(run, plan, standing.remainder)
        standing = withhold(run, manifest, settings, plan, tasks)
    if not standing.remainder and not standing.union.withheld:
        pipeline = load_snapshot(Path(run.code_path(run.code_numbers()[-1]))).pipeline
        return finish_run(run, manifest, standing, pipeline)
    if run.stop_requested():
        return Step("cancelled", standing)
    if not standing.remainder:
        # All that is left waits for the user: a round of nothing would follow on itself.
        standing = settle(run, manifest, settings, judge=True)
    if standing.stopped or not standing.remainder:
        return Step("stopped", standing)
    if run.was_submitted(round_):
        round_ = next_round(run, manifest, standing, plan)
    # Otherwise this round was planned by a merge that died before it was submitted.
    plan = open_plan(run, round_)
    return submit_planned(run, manifest, standing, plan, reload_settings(plan))


def submit_planned(
    run: RunDir, manifest: Manifest, standing: Standing, plan: Plan, resolved: Resolved
) -> Step:
    """Submit a planned round; where Slurm takes fewer tasks at once, deal it anew first.

    Raises:
        SlurmUnreachableError: The controller does not answer.  Submitting again is safe.
        SlurmRefusedError: Slurm refuses whatever the size of the array.
    """
    notes: list[str] = []
    while True:
        footer = plan.footer
        learned = foresee(resolved, tasks=footer.tasks)
        if learned is None:
            try:
                job = unless_stopped(run, partial(submit_round, run, plan, resolved))
            except SlurmRefusedError as refusal:
                # Slurm may have taken the array, but not the merge job.
                known = {entry.array_job_id for entry in active_jobs(run, footer.round)}
                slurm.cancel(sorted(known))
                learned = learn(refusal, resolved, tasks=footer.tasks)
            else:
                state = "cancelled" if job is None else "submitted"
                return Step(state, standing, footer.round, job, tuple(notes))
        resolved, notes = learned.resolved, [*notes, learned.note]
        close_round(run, plan)
        # Another merge may have planned it first.
        with contextlib.suppress(FileExistsError):
            plan_round(
                run,
                manifest,
                standing,
                after=plan,
                settings=resolved.settings,
                code=footer.code,
                launch=footer.launch,
                at_most=learned.most,
                ladder=slurm_ladder(run, footer.launch, resolved),
            )
        plan = open_plan(run, run.rounds()[-1])


def next_round(run: RunDir, manifest: Manifest, standing: Standing, plan: Plan) -> int:
    """Plan the next round with the settings of the last one, without the nodes that failed.

    Raises:
        FileExistsError: Another merge planned it first.
    """
    close_round(run, plan)
    resolved = msgspec.structs.replace(reload_settings(plan), settings=without_bad_nodes(run, plan))
    return plan_round(
        run,
        manifest,
        standing,
        after=plan,
        settings=resolved.settings,
        code=run.code_numbers()[-1],
        launch=plan.footer.launch,
        ladder=slurm_ladder(run, plan.footer.launch, resolved),
    )


def without_bad_nodes(run: RunDir, plan: Plan) -> Settings:
    """Return a plan's settings, leaving out nodes on which attempts could not start."""
    settings, round_ = plan_settings(plan), plan.footer.round
    on_slurm = plan.footer.launch.cluster == "slurm"
    suspects = nodes_without_attempt(run, round_) if on_slurm else set[str]()
    bad = bad_nodes(run, round_, suspects=suspects)
    if not bad:
        return settings
    exclude = excluding(settings.request, bad)
    request = msgspec.structs.replace(settings.request, exclude=exclude)
    return msgspec.structs.replace(settings, request=request)
