"""The commands as Python functions, for notebooks and scripts.

``hr.submit`` starts or continues a run and returns it; :class:`Run` mirrors the commands
status, collect, failures, cancel, clean, merge, report and ``logs --source``.  The others that take
a run (drive, render, watch, and logs by task) are commands only.  Errors are the same exceptions
that end the commands; nothing here prints or exits.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, cast

from hpcresume.config.layers import layer_of, schema
from hpcresume.errors import UsageError
from hpcresume.launch.cleaning import Cleaned, clean_run
from hpcresume.launch.rounds import Standing
from hpcresume.launch.stopping import Stopped
from hpcresume.observe.failures import FailedSource
from hpcresume.output import run as opened
from hpcresume.output.collect import CollectReport
from hpcresume.pipeline.target import target_of
from hpcresume.run.directory import RunDir


class Request(TypedDict, total=False):
    """What an array task asks Slurm for, as sbatch spells it; by default what the stages need.

    Attributes:
        time: Time limit, ``"4:00:00"``.
        partition: Partition.
        account: Account to charge.
        qos: Quality of service.
        constraint: Node features.
        reservation: Reservation.
        cpus_per_task: Cores.
        mem: Memory, ``"16G"``.
        gpus_per_task: GPUs.
        exclude: Nodes to leave out.
        nodelist: Nodes to use.
        extra: Further options of sbatch, ``["--licenses=matlab"]``.
    """

    time: str
    partition: str
    account: str
    qos: str
    constraint: str
    reservation: str
    cpus_per_task: int
    mem: str
    gpus_per_task: int
    exclude: str
    nodelist: str
    extra: list[str]


def submit(
    pipeline: str | os.PathLike[str] | Callable[..., Any] | opened.Run,
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
    machine it returns when the run has ended.  There signals such as Ctrl-C interrupt the run
    where the main thread called; from another thread, ``hr.Run(...).cancel()`` does.

    Args:
        pipeline: ``file.py``, ``file.py:name``, ``module:name``, a run or its directory, or
            the pipeline function itself, imported from a file.
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
        UsageError: An argument or a parameter cannot be right.
        ConfigError: A setting cannot be right.
        HpcResumeError: As the command, with the exit code that it would have.
        KeyboardInterrupt: The local run was interrupted; what it committed is published.
    """
    from hpcresume.launch.submit import Submission, make_ready, reopen_run, start

    submission = Submission(
        target=str(pipeline.path) if isinstance(pipeline, opened.Run) else target_of(pipeline),
        params=dict(params or {}),
        flags=_flags(settings or {}, cast("dict[str, Any]", request)),
        run_dir=None if run_dir is None else Path(os.path.expanduser(run_dir)),
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
        CorruptDataError: Its list of sources is damaged.
        SharedStorageError: The run directory cannot be read.
    """
    found = run if isinstance(run, opened.Run) else opened.Run(Path(run))
    return found.status()


class Run(opened.Run):
    """A run, opened by its directory; its methods mirror the commands.

    ``rows()`` and ``status()`` come with it.

    Attributes:
        path: The directory, absolute: it stays what it was when the working directory changes.

    Raises:
        RunDirError: Not a run directory, or one that cannot be read.  Every method raises it,
            too, once the directory has gone.
        CorruptDataError: Its ``run.json``, or in a method the list of sources, is damaged.
        SharedStorageError: In a method: the run directory cannot be read.
    """

    def wait(self, *, timeout_s: float | None = None, poll_s: float = 2.0) -> dict[str, Any]:
        """Wait until nothing more happens by itself and return how the run stands.

        Args:
            timeout_s: Take the last look after so many seconds, whatever the state.
            poll_s: Seconds between two looks.
        """
        from hpcresume.observe.status import readings

        for found in readings(self._run, pause_s=poll_s, timeout_s=timeout_s):
            # A directory that has gone would be waited for without end.
            RunDir.open(str(self.path))
            last = found
        return last.to_dict()

    def collect(
        self,
        output: str | os.PathLike[str],
        *,
        layout: Literal["one", "parts"] = "one",
        with_source: bool = False,
        files: str | os.PathLike[str] | None = None,
    ) -> CollectReport:
        """Write the rows in source order to a ``.jsonl`` or ``.parquet`` file, as ``collect``.

        Args:
            output: The file, or with ``layout="parts"`` the directory; replaced atomically.
            layout: ``one`` file, or the ``parts`` of an ``hr.Parts`` run as they are, unsorted.
            with_source: Wrap each row as ``{"source", "item", "row"}``; for one file.
            files: Directory that the files of ``ctx.output`` are linked into; for one file.

        Returns:
            What was written and what is missing; ``complete`` says whether all is there.

        Raises:
            UsageError: Arguments that do not go together, another suffix, rows that fit no
                Parquet schema, a run without parts, or a directory that holds something else.
            ConfigError: Parquet is asked for and pyarrow is not installed.
            SharedStorageError: A segment cannot be read, or ``output`` not be written.
        """
        from hpcresume.output.collect import collect
        from hpcresume.output.layout import collect_parts

        place = Path(os.path.expanduser(output))
        linked = None if files is None else Path(os.path.expanduser(files))
        if layout == "one":
            return collect(self._run, place, with_source=with_source, files=linked)
        if layout != "parts":
            raise UsageError(f"layout={layout!r}: give 'one' or 'parts'.")
        if with_source or linked:
            raise UsageError(
                "layout='parts' links whole files, so it takes neither with_source nor files. "
                "Leave them out, or write one file."
            )
        return collect_parts(self._run, place)

    def failures(self) -> list[FailedSource]:
        """Return the quarantined and failing sources, each with its last failure."""
        from hpcresume.observe.failures import failed_sources
        from hpcresume.output.rows import union_of
        from hpcresume.run.manifest import Manifest

        run = self._run
        return failed_sources(Manifest.open(run), union_of(run))

    def cancel(self) -> Stopped:
        """Stop the run; its tasks publish what they committed.  ``hr.submit(run.path)`` goes on.

        Raises:
            RunDirError: The run belongs to somebody else.
            SlurmUnreachableError: The stop mark is set, but its jobs are still in the queue.
        """
        from hpcresume.launch.stopping import stop_run

        return stop_run(self._run)

    def clean(self, *, everything: bool = False, remove: bool = False) -> Cleaned:
        """Remove what the run no longer needs, or say what that is.

        That is temporary files of killed tasks, and small segments that packs hold.  Results,
        logs and records stay, unless everything goes.

        Args:
            everything: The whole run directory, with its results; the run is gone then.
            remove: Remove, as ``clean --yes``; segments in no pack yet are folded into one first.

        Returns:
            The ``paths`` that were removed, or would be, and their ``size_bytes``.

        Raises:
            RunDirError: The run is in use, belongs to somebody else, is not tagged as a run of
                hpcresume, or a file cannot be removed.
            SharedStorageError: A segment cannot be read, or a pack not be written.
        """
        return clean_run(self._run, everything=everything, remove=remove)

    def merge(self) -> Standing:
        """Unite what has been published so far into a generation; nothing is submitted.

        Returns:
            How the run stands: ``union`` is what is done, with the generation's ``number`` and
            the positions ``completed``; ``remainder`` the positions of the sources left to do;
            ``total`` the number of sources; ``stopped`` why it does not go on, or empty.

        Raises:
            RunDirError: The run has no round yet.
            SharedStorageError: A segment cannot be read, or the generation not be written.
        """
        from hpcresume.launch.step import unite

        return unite(self._run)

    def log_lines(self, source: str) -> list[str]:
        """Return the log lines that name a source, as ``file:number:line``.

        They are what stages wrote with ``ctx.log``, from the logs of all rounds in which a task
        was given the source.  Why it failed is in :meth:`failures`.

        Raises:
            UsageError: The run has no source of this id.
        """
        from hpcresume.observe.logs import lines_of_source

        return [str(line) for line in lines_of_source(self._run, source)]

    def report(self, output: str | os.PathLike[str]) -> None:
        """Write the run's report, one HTML page without links to elsewhere.

        Raises:
            UsageError: The file cannot be written.
        """
        from hpcresume.observe.report import write_report

        write_report(self._run, Path(os.path.expanduser(output)))


def _checked_cluster(cluster: str) -> str:
    if cluster not in {"auto", "local", "slurm"}:
        raise UsageError(f"cluster={cluster!r}: give 'auto', 'local' or 'slurm'.")
    return cluster


def _checked_array(array: int | None) -> int | None:
    if array is None:
        return None
    if isinstance(array, bool) or not isinstance(array, int) or array < 1:
        raise UsageError(f"array={array!r}: give the number of array tasks, 1 or more.")
    return array


def _flags(
    settings: Mapping[str, Mapping[str, Any]], request: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return the settings of a submission, checked so that errors name the argument."""
    known = Request.__annotations__
    for key in request:
        if key not in known:
            raise UsageError(f"hr.submit takes no {key!r}.{_way_to_give(key, known)}")
    given, asked = _given(settings), _given({"request": request})
    layer_of(given, origin="hr.submit(settings=...)")
    layer_of(asked, origin="hr.submit")
    return {**given, "request": {**given.get("request", {}), **asked["request"]}}


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without those that are None, which are not given."""
    return {
        section: {key: value for key, value in keys.items() if value is not None}
        if isinstance(keys, Mapping)
        else keys
        for section, keys in settings.items()
    }


def _way_to_give(key: str, known: Mapping[str, Any]) -> str:
    homes = [section for section, keys in schema().items() if key in keys]
    if homes:
        return f" It is a setting: settings={{{homes[0]!r}: {{{key!r}: ...}}}}."
    near = difflib.get_close_matches(key, known, n=1)
    return f" Did you mean {near[0]}?" if near else f" Known are {', '.join(known)}."
