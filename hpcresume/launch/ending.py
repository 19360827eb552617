"""What is done once when a run has ended: ``finish``, and the user's command is told."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import subprocess

from hpcresume.config import Settings
from hpcresume.errors import UsageError
from hpcresume.launch.rounds import Standing, mark_finished, run_finish
from hpcresume.launch.step import Step
from hpcresume.merge.plan import newest_plan
from hpcresume.pipeline.pipeline import Pipeline
from hpcresume.run.directory import RunDir

log = logging.getLogger(__name__)
_TIMEOUT_S = 600.0
_STDERR = 2
ENDS = frozenset({"finished", "stopped"})
"""Steps after which a run does not go on by itself; who cancels one knows."""


def check_on_end(command: str) -> None:
    """Refuse a command that could not be run at the end of a run.

    Raises:
        UsageError: It is not there, or cannot be read.
    """
    if command:
        _words(command)


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--on-end {command!r}: {error}. Quote it as a shell would.") from error
    if not words or shutil.which(words[0]) is None:
        name = words[0] if words else command
        raise UsageError(
            f"--on-end {command!r}: there is no command {name!r} on PATH here. It is to be run "
            "when the run has ended, perhaps hours from now. Give its full path; what needs a "
            "shell goes into sh -c '...'."
        )
    return words


def tell_end(run: RunDir, generation: int, command: str) -> None:
    """Run the user's command, with the run's status as JSON on stdin, once for each end.

    Whoever comes first runs it: of a merge job and its twin one, and it is not run again for
    the same end after a kill.  Its failure is logged and changes nothing.

    Args:
        run: The run.
        generation: The generation that the run ended with.
        command: The command, split as a shell would; empty: none.
    """
    if not command or not run.claim_end(generation):
        return
    from hpcresume.observe.status import read_status

    plan = newest_plan(run)
    cwd = plan.footer.launch.cwd if plan is not None and plan.footer.launch.cwd else None
    text = json.dumps(read_status(run, ask_slurm=False).to_dict(), ensure_ascii=False)
    try:
        # What it prints must not mix with a command's own JSON.
        done = subprocess.run(
            _words(command),
            input=text,
            text=True,
            stdout=_STDERR,
            cwd=cwd if cwd and os.path.isdir(cwd) else None,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, UsageError, subprocess.TimeoutExpired) as error:
        log.warning("--on-end %s: %s", command, error)
        return
    if done.returncode:
        log.warning("--on-end %s: exited with %s", command, done.returncode)


def finish_run(run: RunDir, standing: Standing, pipeline: Pipeline) -> None:
    """Do what is done once at the end of a run."""
    if standing.union.finished:
        return
    if standing.total:
        run_finish(run, pipeline)
    mark_finished(run, standing)


def tell_of(run: RunDir, step: Step, settings: Settings) -> None:
    """Tell the user's command of a run's end, where a step led to one."""
    if step.state in ENDS:
        tell_end(run, step.standing.union.number, settings.run.on_end)
