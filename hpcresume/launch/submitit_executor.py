"""Submitting one job array through submitit: one pickle, our script, our sbatch.

submitit's part is the pickle and, in the job, loading and running it
(``python -m submitit.core._submit FOLDER``).  Its own array path writes a pickle per
element and renames each after sbatch has returned; a login node that dies in between
leaves elements without one.  Here the pickle is durable before sbatch is called, and each
element's script copies it to the name that submitit looks for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
from submitit.core.utils import DelayedSubmission
from submitit.slurm.slurm import SlurmExecutor, SlurmJob

from hpcresume import slurm
from hpcresume.config import Resolved
from hpcresume.errors import InternalError
from hpcresume.fs import PosixFileSystem, ensure_directory, publish
from hpcresume.launch.rendering import (
    PICKLE_NAME,
    ArrayJob,
    MergeJob,
    python_command,
    render_array,
    render_merge,
)

SCRIPT_NAME = "job.sh"
"""The batch script of a job array, in its folder beside the pickle."""


def submit_round(
    job: ArrayJob, resolved: Resolved, *, function: Callable[[str], Any], argument: str
) -> str:
    """Write a job array's pickle and script, submit it, and return its job id.

    Whether the round has an array already is the caller's question: this calls sbatch.

    Args:
        job: The array.
        resolved: Settings of the run.
        function: What every element runs; a function of a module, pickled by its name.
        argument: Its one argument.

    Raises:
        ConfigError: The script cannot be written; nothing was submitted.
        SharedStorageError: The pickle or the script cannot be written; nothing was submitted.
        SlurmRefusedError: sbatch refused, or answered without a job id.
        SlurmUnreachableError: The controller did not answer; the array may still appear.
    """
    _refuse_by_value(function)
    executor = _RoundExecutor(job, resolved)
    return str(executor.submit(function, argument).job_id)


def submit_merge(job: MergeJob, resolved: Resolved, *, script: Path) -> str:
    """Write a merge job's script to ``script``, submit it, and return its job id.

    Raises:
        ConfigError: The script cannot be written; nothing was submitted.
        SharedStorageError: The pickle or the script cannot be written; nothing was submitted.
        SlurmRefusedError: sbatch refused, or answered without a job id.
        SlurmUnreachableError: The controller did not answer; the job may still appear.
    """
    text = render_merge(job, resolved)
    ensure_directory(PosixFileSystem(), str(job.log_dir))
    _publish(script, os.fsencode(text), label="merge_script")
    return slurm.sbatch([], script=script)


class _RoundExecutor(SlurmExecutor):  # type: ignore[misc]  # submitit is not typed
    """submitit's Slurm executor, for one array that runs one function with one argument."""

    def __init__(self, job: ArrayJob, resolved: Resolved) -> None:
        super().__init__(job.folder, python=python_command(resolved))
        self._job = job
        self._resolved = resolved

    @classmethod
    def affinity(cls) -> int:
        """Answer that Slurm is here: a script can be written where there is no srun."""
        return 2

    def _internal_process_submissions(self, delayed_submissions: list[Any]) -> list[Any]:
        (delayed,) = delayed_submissions
        text = self._make_submission_file_text(self._submitit_command_str, "")
        folder = self._job.folder
        script = folder / SCRIPT_NAME
        ensure_directory(PosixFileSystem(), str(self._job.log_dir))
        _publish(folder / PICKLE_NAME, _pickle(delayed), label="round_pickle")
        _publish(script, os.fsencode(text), label="round_script")
        return [SlurmJob(folder=folder, job_id=slurm.sbatch([], script=script), tasks=[0])]

    def _make_submission_file_text(self, command: str, uid: str) -> str:  # noqa: ARG002  submitit's
        return render_array(self._job, self._resolved)


def _pickle(delayed: DelayedSubmission) -> bytes:
    # In the job submitit reads both; our supervisor takes the signals they are for.
    delayed.set_timeout(0, 0)
    data: bytes = cloudpickle.dumps(delayed)
    return data


def _refuse_by_value(function: Callable[[str], Any]) -> None:
    """Refuse a function that would be pickled as code instead of by its name."""
    module, name = function.__module__, function.__qualname__
    if module == "__main__" or "<" in name:
        raise InternalError(
            f"{module}.{name} is not a function of a module, so the pickle would hold its code "
            "and every element would run that, whatever is installed. Move it to a module"
        )


def _publish(path: Path, data: bytes, *, label: str) -> None:
    files = PosixFileSystem()
    ensure_directory(files, str(path.parent))
    publish(files, str(path), [data], label=label)
