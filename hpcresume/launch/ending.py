"""What is done once when a run has ended: ``finish``, and the user's command is told."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

from pyroaring import BitMap

from hpcresume.config import Settings
from hpcresume.errors import HpcResumeError, UsageError, describe
from hpcresume.failpoints import failpoint
from hpcresume.fs import POSIX
from hpcresume.launch.rounds import Standing, mark_finished, mark_stopped
from hpcresume.launch.step import Step
from hpcresume.merge.plan import newest_plan
from hpcresume.pipeline.pipeline import Pipeline
from hpcresume.run.directory import RunDir
from hpcresume.run.manifest import Manifest
from hpcresume.segment import bitmap as bitmaps

log = logging.getLogger(__name__)
_TIMEOUT_S = 600.0
_STDERR = 2
_FINISHED_OVER = ".hpcresume-sources"
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


def finish_run(run: RunDir, manifest: Manifest, standing: Standing, pipeline: Pipeline) -> Step:
    """Do what is done once at the end of a run; it is stopped where ``finish`` fails."""
    if standing.union.finished:
        return Step("finished", standing)
    failed = ""
    if standing.total:
        failed = _run_finish(run, pipeline, standing.union.completed - manifest.withdrawn())
    if failed:
        mark_stopped(run, standing, f"{failed}. All sources are settled. Mend it and submit again")
        return Step("stopped", standing)
    mark_finished(run, standing)
    return Step("finished", standing)


def _run_finish(run: RunDir, pipeline: Pipeline, completed: BitMap) -> str:
    """Run ``Pipeline(finish=...)`` over an ended run's rows, published by rename.

    It runs again only where other sources are complete than the last time: the list has grown,
    or quarantined ones were tried again.  A kill in the middle leaves a temporary directory,
    and the next merge runs it again.

    Returns:
        What it raised; empty where it did what it is to do.
    """
    if pipeline.finish is None:
        return ""
    target, sources = run.join("finish"), _source_set(completed)
    if _finished_over(target) == sources:
        return ""
    from hpcresume.output.run import Run

    temporary = run.join(f".tmp-finish-{os.urandom(8).hex()}")
    os.mkdir(temporary, 0o700)
    try:
        rows: Any = Run(run.path).rows()
        try:
            pipeline.finish(rows, Path(temporary))
        except HpcResumeError:
            raise
        except (Exception, SystemExit) as error:
            log.exception("finish failed")
            name = getattr(pipeline.finish, "__name__", type(pipeline.finish).__name__)
            return f"finish={name} raised {describe(error)}"
        Path(temporary, _FINISHED_OVER).write_text(sources)
        for directory, _, files in os.walk(temporary):
            for name in files:
                _sync_file(os.path.join(directory, name))
            POSIX.sync_directory(directory)
        failpoint("finish.before_rename")
        _put(run, temporary, target, sources)
        POSIX.sync_directory(run.path)
        failpoint("finish.after_rename")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return ""


def _put(run: RunDir, temporary: str, target: str, sources: str) -> None:
    """Put what ``finish`` made in its place, instead of what it made of other sources."""
    while True:
        try:
            os.rename(temporary, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
        if _finished_over(target) == sources:
            return  # another merge that came first
        aside = run.join(f".tmp-finish-{os.urandom(8).hex()}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(target, aside)
        shutil.rmtree(aside, ignore_errors=True)


def _source_set(sources: BitMap) -> str:
    """Return what tells one set of sources from another, as text."""
    return hashlib.blake2b(bitmaps.dump(sources), digest_size=16).hexdigest()


def _finished_over(target: str) -> str | None:
    """Return which sources ``finish`` has run over; None where nobody can tell."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return Path(target, _FINISHED_OVER).read_text()
    return None


def _sync_file(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def tell_of(run: RunDir, step: Step, settings: Settings) -> None:
    """Tell the user's command of a run's end, where a step led to one."""
    if step.state in ENDS:
        tell_end(run, step.standing.union.number, settings.run.on_end)
