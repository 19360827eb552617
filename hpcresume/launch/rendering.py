"""The batch scripts of a round: the job array's and its merge job's.

A script is a template of ``templates/`` filled in.  A site's folder may hold a template of
the same name that says ``{% extends "job.sh.j2" %}`` and replaces blocks: directives,
environment, before, run, after.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from hpcresume.config import Request, Resolved, data_dir
from hpcresume.config.files import refuse_control_characters, refuse_untrusted
from hpcresume.errors import ConfigError
from hpcresume.launch.directives import (
    Directives,
    merge_options,
    refuse_line_break,
    request_options,
    site_directives,
)

PICKLE_NAME = "round.pkl"
"""The one pickle of a job array, which every element copies to its own name."""

_DEPENDENCY = re.compile(r"(afterany|afterok|afternotok|after|singleton)(:\d+(_\d+)?)*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class ArrayJob:
    """One job array of a round.

    Attributes:
        name: Slurm's job name; unique per round, so that it can be looked up.
        run_dir: The run directory.
        folder: Folder below it for this array's script, pickle and submitit's results.
        log_dir: Folder of the logs, ``<array>_<index>.out`` and ``.err``.
        tasks: Number of elements.
        first: Index of the first of them; they are numbered through the round.
        throttle: Elements that may run at once; 0: all.
        request: What each asks for; None: the settings' ``[request]``.
        environment: Further variables to export.
        chdir: Working directory; empty: where sbatch is called.
        index: Where the site has no arrays: the task that this single job works on.
    """

    name: str
    run_dir: Path
    folder: Path
    log_dir: Path
    tasks: int
    first: int = 0
    throttle: int = 0
    request: Request | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    chdir: str = ""
    index: int | None = None


@dataclass(frozen=True, kw_only=True)
class MergeJob:
    """The job that unites what a round completed, or its twin that runs when that one dies.

    Attributes:
        name: Slurm's job name.
        run_dir: The run directory.
        log_dir: Folder of the log, ``merge_<job>.out``.
        dependency: As sbatch spells it, ``afterany:<array>`` or ``afternotok:<merge>``.
        environment: Further variables to export.
        chdir: Working directory; empty: where sbatch is called.
    """

    name: str
    run_dir: Path
    log_dir: Path
    dependency: str
    environment: Mapping[str, str] = field(default_factory=dict)
    chdir: str = ""


def render_array(job: ArrayJob, resolved: Resolved) -> str:
    """Return the batch script of a job array.

    Raises:
        ConfigError: A value that cannot stand in a script, an option that the site requires
            and nothing sets, or a template that asks for something unknown.
    """
    directives = array_directives(job, resolved)
    request = _request(job, resolved)
    values = {
        "index": job.index,
        "run_dir": _path(job.run_dir),
        "folder": _path(job.folder),
        "cpus_per_task": max(1, request.cpus_per_task),
        "name": job.name,
        "tasks": job.tasks,
    }
    return _render(
        "job.sh.j2",
        resolved,
        job=values,
        directives=directives,
        environment=job.environment,
        backoff_s=resolved.settings.task.backoff_s,
        pickle_name=PICKLE_NAME,
    )


def render_merge(job: MergeJob, resolved: Resolved) -> str:
    """Return the batch script of a merge job.

    Raises:
        ConfigError: As :func:`render_array`.
    """
    return _render(
        "merge.sh.j2",
        resolved,
        job={"run_dir": _path(job.run_dir), "name": job.name},
        directives=merge_directives(job, resolved),
        environment=job.environment,
    )


def array_directives(job: ArrayJob, resolved: Resolved) -> Directives:
    """Return the sbatch options of a job array, and those that the site forbids.

    Raises:
        ConfigError: As :func:`render_array`.
    """
    if job.tasks < 1:
        raise ConfigError(f"a job array of {job.tasks} tasks has nothing to do. Ask for at least 1")
    request = _request(job, resolved)
    logs = _path(job.log_dir)
    stem = "%A_%a" if job.index is None else f"%j_{job.index}"
    indexes = f"{job.first}-{job.first + job.tasks - 1}"
    array = indexes + (f"%{job.throttle}" if job.throttle else "")
    options: dict[str, str | None] = {
        "job-name": job.name,
        "array": array if job.index is None else "",
        "output": f"{logs}/{stem}.out",
        "error": f"{logs}/{stem}.err",
        "open-mode": "append",
        **_requeue(resolved),
        "signal": f"USR2@{resolved.settings.task.signal_lead_s}",
        "nodes": "1",
        "ntasks": "1",
        **request_options(request, resolved),
        "chdir": job.chdir,
    }
    return site_directives(options, request.extra, resolved)


def merge_directives(job: MergeJob, resolved: Resolved) -> Directives:
    """Return the sbatch options of a merge job, and those that the site forbids.

    Raises:
        ConfigError: As :func:`render_array`.
    """
    parts = re.split(r"[,?]", job.dependency)
    if not all(_DEPENDENCY.fullmatch(part) for part in parts):
        raise ConfigError(f"dependency {job.dependency!r} is not one that sbatch knows")
    options: dict[str, str | None] = {
        "job-name": job.name,
        "dependency": job.dependency,
        "kill-on-invalid-dep": "yes",
        "output": f"{_path(job.log_dir)}/merge_%j.out",
        "open-mode": "append",
        **_requeue(resolved),
        "nodes": "1",
        "ntasks": "1",
        **merge_options(resolved),
        "chdir": job.chdir,
    }
    return site_directives(options, resolved.settings.merge.extra, resolved)


def python_command(resolved: Resolved) -> str:
    """Return the shell words that start Python: the site's, else this interpreter.

    Raises:
        ConfigError: The site's words do not end their quotes.
    """
    words = resolved.settings.site.python
    if not words:
        return shlex.quote(sys.executable)
    try:
        shlex.split(words)
    except ValueError as error:
        origin = resolved.origins["site.python"]
        raise ConfigError(f"site.python = {words!r} ({origin}): {error}. Close it") from error
    return words


def _request(job: ArrayJob, resolved: Resolved) -> Request:
    return job.request or resolved.settings.request


def _requeue(resolved: Resolved) -> dict[str, str | None]:
    return {"requeue": None} if resolved.settings.site.requeue else {"no-requeue": None}


def _path(path: Path) -> str:
    """Return an absolute path that Slurm and submitit take as it stands."""
    text = str(path.absolute())
    refuse_line_break(text, what="path")
    if "%" in text or "\\" in text:
        raise ConfigError(
            f"path {text!r} holds a percent sign or a backslash. Slurm and submitit replace "
            "what follows them in the names of logs and pickles. Choose another --run-dir",
            path=text,
        )
    return text


def _exports(environment: Mapping[str, str]) -> list[str]:
    for name, value in environment.items():
        if not _VARIABLE.fullmatch(name):
            raise ConfigError(f"environment variable {name!r} is not a name that a shell takes")
        refuse_line_break(value, what=f"environment variable {name}:")
    return [f"{name}={shlex.quote(value)}" for name, value in environment.items()]


def _render(
    template: str,
    resolved: Resolved,
    *,
    directives: Directives,
    environment: Mapping[str, str],
    **values: Any,
) -> str:
    for line in resolved.settings.site.setup:
        refuse_control_characters(line, key="site.setup", origin=resolved.origins["site.setup"])
    engine = _Engine(resolved.template_dirs)
    try:
        text: str = engine.get_template(template).render(
            directives=directives.lines(),
            dropped=directives.dropped_lines(),
            exports=_exports(environment),
            python=python_command(resolved),
            settings=resolved.settings,
            **values,
        )
        return text
    except jinja2.TemplateSyntaxError as error:
        place = f"{error.filename or template}:{error.lineno}"
        raise ConfigError(f"{place}: {error.message}. Correct the template") from error
    except jinja2.TemplateError as error:
        place = _place(error, resolved.template_dirs) or template
        raise ConfigError(
            f"{place}: {error.message}. The script cannot be written. "
            "hpcresume render --explain lists what a template can use",
            place=place,
        ) from error


def _place(error: BaseException, folders: Sequence[Path]) -> str:
    """Return ``file:line`` of the innermost template line that an error came through."""
    place, step = "", error.__traceback__
    while step is not None:
        path = step.tb_frame.f_code.co_filename
        if Path(path).parent in folders:
            place = f"{path}:{step.tb_lineno}"
        step = step.tb_next
    return place


def _shipped() -> tuple[Path, Path]:
    return data_dir("templates"), data_dir("site")


class _Engine(jinja2.Environment):
    """Templates of several folders, in which ``extends`` of one's own name means the next below.

    Within the engine a template is called ``<position of its folder>:<file name>``.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        super().__init__(
            loader=jinja2.FunctionLoader(self._load),
            undefined=jinja2.StrictUndefined,
            autoescape=False,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        self.folders = tuple(folders)
        self.filters["sh"] = shlex.quote

    def join_path(self, template: str, parent: str) -> str:
        position, _, name = parent.partition(":")
        start = int(position) + 1 if template == name else 0
        return self._name(template, start=start)

    def get_template(self, name: Any, parent: str | None = None, globals: Any = None) -> Any:  # noqa: A002
        if isinstance(name, str) and parent is None:
            name = self._name(name, start=0)
        return super().get_template(name, parent, globals)

    def _name(self, template: str, *, start: int) -> str:
        for position, folder in enumerate(self.folders[start:], start):
            if (folder / template).is_file():
                return f"{position}:{template}"
        raise jinja2.TemplateNotFound(template, f"no template {template!r} in this site or below")

    def _load(self, name: str) -> tuple[str, str, None]:
        position, _, template = name.partition(":")
        path = self.folders[int(position)] / template
        if not any(path.is_relative_to(folder) for folder in _shipped()):
            refuse_untrusted(path)
        return path.read_text(encoding="utf-8"), str(path), None
