"""The commands as Python functions, for notebooks and scripts.

``hr.submit`` starts or continues a run and returns it; :class:`Run` mirrors the commands that
take one.  Errors are the same exceptions that end the commands; nothing here prints or exits.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from hpcresume.errors import PipelineError, UsageError
from hpcresume.output import run as opened

if TYPE_CHECKING:
    from hpcresume.launch.rounds import Standing
    from hpcresume.launch.stopping import Stopped
    from hpcresume.observe.failures import FailedSource
    from hpcresume.output.collect import CollectReport


class Request(TypedDict, total=False):
    """What an array task asks Slurm for, as sbatch spells it; by default what the stages need.

    Attributes:
        time: Time limit, ``"4:00:00"``.
        partition: Partition.
        account: Account to charge.
        qos: Quality of service.
        constraint: Node features.
        cpus_per_task: Cores.
        mem: Memory, ``"16G"``.
        gpus_per_task: GPUs.
        exclude: Nodes to leave out.
        nodelist: Nodes to use.
    """

    time: str
    partition: str
    account: str
    qos: str
    constraint: str
    cpus_per_task: int
    mem: str
    gpus_per_task: int
    exclude: str
    nodelist: str


def submit(
    pipeline: str | os.PathLike[str] | Callable[..., Any],
    *,
    params: Mapping[str, Any] | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    array: int | None = None,
    cluster: str = "auto",
    site: str | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    accept_changes: bool = False,
    retry_quarantined: bool = False,
    **request: Unpack[Request],
) -> Run:
    """Start a run, or continue it, as ``hpcresume submit`` does.

    On Slurm it returns once the jobs are submitted: ``run.wait()`` waits for the end.  On one
    machine it returns when the run has ended.

    Args:
        pipeline: ``file.py``, ``file.py:name``, ``module:name``, a run directory, or the
            pipeline function itself, imported from a file.
        params: The pipeline's parameters by name; converted by their annotations.
        run_dir: The run directory; by default below ``runs/``.
        array: Most array tasks; by default as the last time, or 1.
        cluster: ``auto`` (Slurm where sbatch is), ``local`` or ``slurm``.
        site: Name of the site; by default the one that is recognised.
        settings: Further settings by section and key, as in ``hpcresume.toml``:
            ``{"sync": {"max_age_s": 10.0}}``.
        accept_changes: Take changes of the pipeline that would be refused.
        retry_quarantined: Try quarantined sources again.
        **request: What each array task asks for; see :class:`Request`.

    Raises:
        PipelineError: The pipeline cannot be loaded from a file: it is defined in a notebook,
            or it is none.
        HpcResumeError: As the command, with the exit code that it would have.
        KeyboardInterrupt: The local run was interrupted; what it committed is published.
    """
    from hpcresume.launch.submit import Submission, make_ready, reopen_run, start

    flags = {section: dict(values) for section, values in (settings or {}).items()}
    flags["request"] = {**flags.get("request", {}), **request}
    submission = Submission(
        target=_target_of(pipeline),
        params=dict(params or {}),
        flags=flags,
        run_dir=None if run_dir is None else Path(run_dir),
        cluster=_checked_cluster(cluster),
        site=site,
        array=_checked_array(array),
        accept_changes=accept_changes,
        retry_quarantined=retry_quarantined,
    )
    ready = make_ready(submission)
    reopen_run(ready, retry_quarantined=retry_quarantined)
    step = start(ready)
    if step.state == "interrupted":
        raise KeyboardInterrupt
    return Run(ready.prepared.run.path)


def status(run: str | os.PathLike[str] | opened.Run) -> dict[str, Any]:
    """Return how a run stands, as ``hpcresume status --json`` prints it.

    Args:
        run: A run, or its directory.

    Raises:
        RunDirError: Not a run directory, or one that cannot be read.
    """
    found = run if isinstance(run, opened.Run) else opened.Run(Path(run))
    return found.status()


class Run(opened.Run):
    """A run, opened by its directory; its methods mirror the commands.

    ``rows()`` and ``status()`` come with it.

    Raises:
        RunDirError: Not a run directory, or one that cannot be read.
    """

    def wait(self, *, timeout_s: float | None = None, poll_s: float = 2.0) -> dict[str, Any]:
        """Wait until nothing more happens by itself and return how the run stands.

        Args:
            timeout_s: Return after so many seconds at the latest, whatever the state.
            poll_s: Seconds between two looks.
        """
        from hpcresume.observe.status import readings

        end = None if timeout_s is None else time.monotonic() + timeout_s
        for found in readings(self._run, pause_s=poll_s):
            if found.ended or (end is not None and time.monotonic() >= end):
                return found.to_dict()
        raise AssertionError("readings end with one that has ended")

    def collect(
        self,
        output: str | os.PathLike[str],
        *,
        with_source: bool = False,
        files: str | os.PathLike[str] | None = None,
    ) -> CollectReport:
        """Write the rows in source order to a ``.jsonl`` or ``.parquet`` file, as ``collect``.

        Args:
            output: The file, replaced atomically.
            with_source: Wrap each row as ``{"source", "item", "row"}``.
            files: Directory that the files of ``ctx.output`` are linked into.

        Returns:
            What was written and what is missing; ``complete`` says whether all is there.
        """
        from hpcresume.output.collect import collect

        return collect(
            self._run,
            Path(output),
            with_source=with_source,
            files=None if files is None else Path(files),
        )

    def failures(self) -> list[FailedSource]:
        """Return the quarantined and failing sources, each with its last failure."""
        from hpcresume.observe.failures import failed_sources
        from hpcresume.output.rows import union_of
        from hpcresume.run.manifest import Manifest

        return failed_sources(Manifest.open(self._run), union_of(self._run))

    def cancel(self) -> Stopped:
        """Stop the run; its tasks publish what they committed.  ``hr.submit(run.path)`` goes on.

        Raises:
            RunDirError: The run belongs to somebody else.
            SlurmUnreachableError: The stop mark is set, but its jobs are still in the queue.
        """
        from hpcresume.launch.stopping import stop_run

        return stop_run(self._run)

    def merge(self) -> Standing:
        """Unite what has been published so far into a generation, and return how it stands.

        Raises:
            RunDirError: The run has no round yet.
        """
        from hpcresume.launch.step import unite

        return unite(self._run)

    def log_lines(self, source: str) -> list[str]:
        """Return the lines of the newest logs that name a source, as ``file:number:line``.

        Raises:
            UsageError: The run has no source of this id.
        """
        from hpcresume.observe.logs import lines_of_source

        return [str(line) for line in lines_of_source(self._run, source)]

    def report(self, output: str | os.PathLike[str]) -> None:
        """Write the run's report, one HTML page without links to elsewhere."""
        from hpcresume.observe.report import write_report

        write_report(self._run, Path(output))


def _checked_cluster(cluster: str) -> str:
    if cluster not in {"auto", "local", "slurm"}:
        raise UsageError(f"cluster={cluster!r}: give 'auto', 'local' or 'slurm'.")
    return cluster


def _checked_array(array: int | None) -> int | None:
    if array is not None and array < 1:
        raise UsageError(f"array={array}: give the number of array tasks, 1 or more.")
    return array


def _target_of(pipeline: str | os.PathLike[str] | Callable[..., Any]) -> str:
    """Return what names a pipeline on the command line."""
    if isinstance(pipeline, str | os.PathLike):
        return os.fspath(pipeline)
    name = getattr(pipeline, "__qualname__", "")
    module = sys.modules.get(getattr(pipeline, "__module__", ""), None)
    if not callable(pipeline) or not name:
        raise PipelineError(
            f"a {type(pipeline).__name__} cannot be submitted: array tasks build the pipeline "
            "themselves, from a file. Write a function that returns it to a file, and give "
            "hr.submit('pipeline.py')."
        )
    path = getattr(module, "__file__", None)
    code = getattr(pipeline, "__code__", None)
    if not path or (code is not None and not os.path.isfile(code.co_filename)):
        raise PipelineError(
            f"the pipeline {name!r} is defined in a notebook or at the prompt, where array tasks "
            "on other nodes cannot load it from. Write its cell to a file (in Jupyter with "
            "%%writefile pipeline.py as the cell's first line), then: hr.submit('pipeline.py')."
        )
    if not name.isidentifier() or getattr(module, name, None) is not pipeline:
        raise PipelineError(
            f"the pipeline {name!r} is defined within a function of {path}, where array tasks "
            "cannot find it. Define it at the top level of the file."
        )
    return f"{os.path.abspath(path)}:{name}"
