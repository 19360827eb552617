"""`submit` as a function: prepare a run, decide how it is launched, start it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from hpcresume import slurm
from hpcresume.config import Resolved, load_settings
from hpcresume.config.env_file import read_env_file
from hpcresume.engine.groups import make_groups
from hpcresume.errors import (
    SlurmMissingError,
    SlurmRefusedError,
    SlurmUnreachableError,
    UsageError,
)
from hpcresume.launch.ending import check_on_end, tell_of
from hpcresume.launch.local import TaskProgress
from hpcresume.launch.packing import with_live_limits
from hpcresume.launch.prepare import Prepared, prepare
from hpcresume.launch.rounds import reopen
from hpcresume.launch.step import Step
from hpcresume.merge.plan import Launch, Plan, newest_plan
from hpcresume.pipeline.pipeline import Pipeline
from hpcresume.run.directory import RunDir


class Submission(msgspec.Struct, frozen=True):
    """What the user asked for.

    Attributes:
        target: The pipeline or a run directory.
        params: The pipeline's parameters.
        flags: Settings from the command line by section and key; None: not given.
        run_dir: The run directory, None: derived from name and parameters.
        cluster: ``auto``, ``local`` or ``slurm``.
        site: Name of the site, None: found.
        array: Most array tasks, None: as the last time, or 1; then ``throttle`` is that of the
            last time, too.
        throttle: Most array tasks at once, 0: all.
        accept_changes: Take changes that would be refused.
        shared_group: Group that may read the run; only where it is created.
        retry_quarantined: Try quarantined sources again.
        cwd: The user's working directory.
    """

    target: str
    params: Mapping[str, Any] = msgspec.field(default_factory=dict)
    flags: Mapping[str, Mapping[str, Any]] = msgspec.field(default_factory=dict)
    run_dir: Path | None = None
    cluster: str = "auto"
    site: str | None = None
    array: int | None = None
    throttle: int = 0
    accept_changes: bool = False
    shared_group: str = ""
    retry_quarantined: bool = False
    cwd: Path = msgspec.field(default_factory=Path.cwd)


class Ready(msgspec.Struct, frozen=True):
    """A prepared run with everything that launching it needs."""

    prepared: Prepared
    resolved: Resolved
    launch: Launch


def make_ready(submission: Submission) -> Ready:
    """Prepare a run and resolve its settings; nothing is started.

    Raises:
        HpcResumeError: As :func:`~hpcresume.launch.prepare.prepare` and
            :func:`~hpcresume.config.load_settings`.
    """
    cluster = choose_cluster(_wanted_cluster(submission))
    resolved = resolve(submission, cluster)
    if resolved.settings.task.env_file:
        # Every attempt reads it again; a mistake in it is better heard of now.
        read_env_file(resolved.settings.task.env_file)
    check_on_end(resolved.settings.run.on_end)
    prepared = prepare(
        submission.target,
        submission.params,
        run_dir=submission.run_dir,
        cwd=submission.cwd,
        accept_changes=submission.accept_changes,
        shared_group=submission.shared_group,
    )
    last = newest_plan(prepared.run)
    launch = launch_of(submission, last, cluster=cluster, site=resolved.site_name)
    return Ready(prepared, with_stage_needs(resolved, prepared.loaded.pipeline, cluster), launch)


def launch_of(submission: Submission, last: Plan | None, *, cluster: str, site: str) -> Launch:
    """Return how a round is launched: with as many tasks as the last one, unless told otherwise.

    Args:
        submission: What the user asked for.
        last: The newest round of the run, if it has one.
        cluster: ``local`` or ``slurm``.
        site: Name of the site.
    """
    array, throttle = submission.array, submission.throttle
    if array is None:
        before = last.footer.launch if last else Launch(cluster, array=1)
        array, throttle = before.array, before.throttle
    return Launch(cluster, array, throttle, site, cwd=str(submission.cwd.absolute()))


def _wanted_cluster(submission: Submission) -> str:
    """Return the cluster asked for: of a run that is continued by its name, the last one."""
    path = submission.cwd / submission.target
    if submission.cluster != "auto" or not (path / "run.json").exists():
        return submission.cluster
    last = newest_plan(RunDir.open(str(path.absolute())))
    return last.footer.launch.cluster if last else "auto"


def choose_cluster(cluster: str) -> str:
    """Return ``local`` or ``slurm``.

    Raises:
        SlurmMissingError: Slurm was asked for and is not here.
    """
    if cluster == "local" or (cluster == "auto" and not slurm.available()):
        return "local"
    if not slurm.available():
        raise SlurmMissingError(
            "no sbatch on PATH, but --cluster slurm was given. Nothing was submitted. "
            "Log in to a cluster, load its Slurm module, or run here with --cluster local."
        )
    if cluster == "auto":
        try:
            slurm.config()
        except SlurmMissingError:
            # The commands are installed, but no cluster is configured for them.
            return "local"
    return "slurm"


def resolve(submission: Submission, cluster: str) -> Resolved:
    """Return the settings for a submission."""
    start = Path(submission.target.rpartition(":")[0] or submission.target)
    start = (submission.cwd / start).parent if start.suffix == ".py" else submission.cwd
    config: dict[str, str] = {}
    if cluster == "slurm":
        try:
            config = slurm.config()
        except (SlurmMissingError, SlurmRefusedError):
            config = {}
        except SlurmUnreachableError:
            # It would be the wrong site's settings.
            if submission.site is None:
                raise
    resolved = load_settings(
        site=submission.site,
        start_dir=start,
        environ=os.environ,
        flags=submission.flags,
        cluster_name=config.get("ClusterName", ""),
    )
    return with_live_limits(resolved, config)


def with_stage_needs(resolved: Resolved, pipeline: Pipeline, cluster: str) -> Resolved:
    """Fill in what the stages need where the user asked for nothing."""

    import msgspec

    request = resolved.settings.request
    groups = make_groups(pipeline.stages, cpus=1)
    cpus = max(1, math.ceil(sum(group.cpus * group.workers for group in groups)))
    gpus = math.ceil(sum(group.gpus * group.workers for group in groups))
    changed: dict[str, int] = {}
    if not request.cpus_per_task and cluster == "slurm":
        changed["cpus_per_task"] = cpus
    if not request.gpus_per_task and gpus:
        changed["gpus_per_task"] = gpus
    if not changed:
        return resolved
    request = msgspec.structs.replace(request, **changed)
    settings = msgspec.structs.replace(resolved.settings, request=request)
    origins = {**resolved.origins, **{f"request.{key}": "the stages" for key in changed}}
    return msgspec.structs.replace(resolved, settings=settings, origins=origins)


def reopen_run(ready: Ready, *, retry_quarantined: bool) -> None:
    """Take back stop marks and stops: submitting by hand means go on."""
    run = ready.prepared.run
    run.set_mark("resume")
    reopen(run, quarantined=retry_quarantined)


def run_local(
    ready: Ready,
    *,
    on_round: Callable[[Plan], None],
    on_progress: Callable[[dict[int, TaskProgress]], None],
    on_recovered: Callable[[int], None],
) -> Step:
    """Run in the foreground of this machine."""
    # What starts array tasks, here or on Slurm, is half of what a command has to import.
    from hpcresume.launch.foreground import LocalRun

    step = LocalRun(
        run=ready.prepared.run,
        manifest=ready.prepared.manifest,
        pipeline=ready.prepared.loaded.pipeline,
        resolved=ready.resolved,
        launch=ready.launch,
        on_round=on_round,
        on_progress=on_progress,
        on_recovered=on_recovered,
    ).execute()
    tell_of(ready.prepared.run, step, ready.resolved.settings)
    return step


def start(ready: Ready) -> Step:
    """Start a run that is ready, without a word: on one machine until it has ended."""
    if ready.launch.cluster == "slurm":
        from hpcresume.launch.drive import submit_to_slurm

        return submit_to_slurm(ready)
    return run_local(
        ready,
        on_round=lambda _plan: None,
        on_progress=lambda _tasks: None,
        on_recovered=lambda _sources: None,
    )


def parse_array(text: str) -> tuple[int, int]:
    """Return the tasks and the throttle of ``N`` or ``N%M``.

    Raises:
        UsageError: It is neither.
    """
    tasks, _, throttle = text.partition("%")
    try:
        numbers = int(tasks), int(throttle or 0)
    except ValueError:
        numbers = (0, 0)
    if numbers[0] < 1 or numbers[1] < 0:
        spelt = re.fullmatch(r"0-(\d+)", tasks)
        meant = f" Did you mean {int(spelt[1]) + 1}?" if spelt else ""
        raise UsageError(
            f"--array {text!r} is not a number of array tasks.{meant} "
            "Give how many there may be, or N%M to run M of them at once."
        )
    return numbers
