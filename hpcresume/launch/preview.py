"""The round that a submission would make on Slurm, without making anything."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

from pyroaring import BitMap

from hpcresume.config import Resolved, Settings
from hpcresume.errors import RunDirError, UsageError
from hpcresume.fs import POSIX
from hpcresume.launch.ladder import make_ladder
from hpcresume.launch.prepare import _refused_changes, fingerprint
from hpcresume.launch.rendering import render_array, render_merge
from hpcresume.launch.rounds import Standing, share_tasks, stand
from hpcresume.launch.slurm_round import make_array_jobs, make_merge_job
from hpcresume.launch.submit import Submission, launch_of, resolve, with_stage_needs
from hpcresume.launch.submitit_executor import SCRIPT_NAME
from hpcresume.merge.generation import Union
from hpcresume.merge.plan import KIND, ArrayPlan, Launch, Plan, PlanFooter, newest_plan
from hpcresume.pipeline.load import LoadedPipeline, load_pipeline, load_snapshot, parse_target
from hpcresume.pipeline.params import parameter_digest
from hpcresume.pipeline.pipeline import Pipeline
from hpcresume.pipeline.sources import Indexed
from hpcresume.run.directory import FORMAT_VERSION, RunDir, RunInfo
from hpcresume.run.manifest import Manifest
from hpcresume.segment import bitmap as bitmaps
from hpcresume.segment.container import Container

NEW_RUN_ID = "<run-id>"
"""In place of the random id that a new run gets."""
_NO_JOB = "afterany:0"


@dataclass(frozen=True)
class Preview:
    """What would be submitted.

    Attributes:
        run: The run directory, which need not exist.
        plan: The round's plan; it has no shards.
        resolved: The settings.
        notes: What people should know before they submit.
    """

    run: RunDir
    plan: Plan
    resolved: Resolved
    notes: list[str] = field(default_factory=list)

    def array_scripts(self) -> dict[str, str]:
        """Return the batch script of each job array, by the path where it would lie.

        Raises:
            ConfigError: As :func:`~hpcresume.launch.rendering.render_array`.
        """
        jobs = make_array_jobs(self.run, self.plan, self.resolved)
        return {str(job.folder / SCRIPT_NAME): render_array(job, self.resolved) for job in jobs}

    def merge_script(self) -> str:
        """Return the merge job's batch script, with ``<array>`` for the id it waits for.

        Raises:
            ConfigError: As :func:`~hpcresume.launch.rendering.render_merge`.
        """
        script = render_merge(make_merge_job(self.run, self.plan, _NO_JOB), self.resolved)
        return script.replace(f"--dependency={_NO_JOB}", "--dependency=afterany:<array>")


def preview_settings(submission: Submission) -> tuple[LoadedPipeline, Resolved]:
    """Return the pipeline and the settings that a submission would have on Slurm.

    Raises:
        HpcResumeError: The pipeline does not load, or a setting is wrong.
    """
    if submission.cluster == "local":
        raise UsageError(
            "--cluster local submits no batch script: the tasks are started directly. "
            "Leave it out to see what Slurm would be given."
        )
    resolved = resolve(submission, "slurm")
    path = submission.cwd / submission.target
    if _is_run(path):
        numbers = RunDir.open(str(path.absolute())).code_numbers()
        if not numbers:
            raise RunDirError(f"{path} holds no code. Submit the pipeline's file again.")
        loaded = load_snapshot(Path(RunDir.open(str(path.absolute())).code_path(numbers[-1])))
    else:
        spec = parse_target(submission.target, submission.cwd)
        loaded = load_pipeline(spec, submission.params)
    loaded.pipeline.check_resumable()
    return loaded, with_stage_needs(resolved, loaded.pipeline, "slurm")


def preview(submission: Submission, loaded: LoadedPipeline, resolved: Resolved) -> Preview:
    """Return the round that `submit` would make next.

    Args:
        submission: What the user asked for.
        loaded: The pipeline, as :func:`preview_settings` returned it.
        resolved: The settings, likewise.

    Raises:
        HpcResumeError: The run directory cannot be read, or the sources not be listed.
    """
    path = _run_path(submission, loaded)
    exists = _is_run(path)
    run = RunDir.open(str(path)) if exists else _run_to_be(path, submission, loaded)
    last = newest_plan(run) if exists else None
    launch = launch_of(submission, last, cluster="slurm", site=resolved.site_name)
    left = _left(run if exists else None, loaded.pipeline, resolved.settings, launch.array)
    arrays = _arrays(left, launch, resolved)
    footer = PlanFooter(
        run_id=run.run_id,
        round=last.footer.round + 1 if last else 0,
        generation=0,
        code=0,
        sources=len(left.remainder),
        tasks=sum(array.tasks for array in arrays),
        settings={},
        launch=launch,
        arrays=arrays,
    )
    notes = _refusals(run, loaded, submission) if exists else []
    if not left.remainder:
        notes.append("no source is left: submit would submit nothing")
    container = Container(run.fs, run.plan_path(footer.round), KIND, footer, (), b"", 0)
    return Preview(run, Plan(container), resolved, notes)


def _is_run(path: Path) -> bool:
    return (path / "run.json").exists()


def _run_path(submission: Submission, loaded: LoadedPipeline) -> Path:
    target = submission.cwd / submission.target
    if _is_run(target):
        return target.absolute()
    name = f"{loaded.pipeline.name}-{parameter_digest(loaded.params)}"
    return (submission.cwd / (submission.run_dir or Path("runs") / name)).absolute()


def _run_to_be(path: Path, submission: Submission, loaded: LoadedPipeline) -> RunDir:
    info = RunInfo(
        format=FORMAT_VERSION,
        run_id=NEW_RUN_ID,
        name=loaded.pipeline.name,
        target=submission.target,
        created_at="",
        version="",
        fingerprint=fingerprint(loaded.pipeline, loaded.params),
    )
    return RunDir(str(path), info, POSIX)


def _left(run: RunDir | None, pipeline: Pipeline, settings: Settings, most: int) -> Standing:
    """Return what the round would deal; of sources not listed yet no more than ``most``."""
    standing, known = Standing(Union(), BitMap(), 0), 0
    if run is not None and run.part_numbers():
        manifest = Manifest.open(run)
        standing, known = stand(run, manifest, settings), manifest.total
    left = len(standing.remainder)
    if left >= most:
        return standing
    sources = pipeline.sources
    if isinstance(sources, Indexed):
        grown = max(0, len(sources) - known)
    else:
        grown = sum(1 for _ in itertools.islice(sources, known, known + most - left))
    remainder = standing.remainder | bitmaps.span(known, known + grown)
    return Standing(standing.union, remainder, standing.total + grown)


def _arrays(left: Standing, launch: Launch, resolved: Resolved) -> list[ArrayPlan]:
    """Return the round's arrays; Slurm is not asked whether it would grant them."""
    ladder = make_ladder(resolved.settings, lambda _mib: True)
    arrays, first = [], 0
    for demand, tasks in share_tasks(
        left, resolved.settings.site, launch, ladder, most=launch.array
    ):
        arrays.append(ArrayPlan(first, tasks, demand.memory_mib, demand.limit))
        first += tasks
    return arrays or [ArrayPlan(0, 1)]


def _refusals(run: RunDir, loaded: LoadedPipeline, submission: Submission) -> list[str]:
    changes = [] if submission.accept_changes else _refused_changes(run, loaded)
    return [f"submit would refuse without --accept-changes: {change}" for change in changes]
