"""What the commands share: how a run is named, how JSON and numbers are printed, exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
from click.shell_completion import CompletionItem

from hpcresume.errors import (
    EXIT_COMPLETE,
    EXIT_INCOMPLETE,
    EXIT_INTERRUPTED,
    EXIT_SAVED,
    UsageError,
)
from hpcresume.observe import words

if TYPE_CHECKING:
    from hpcresume.run.directory import RunDir

SCHEMA = 1
RUNS_DIRECTORY = "runs"
human_bytes, human_count = words.human_bytes, words.human_count
human_duration, human_rate = words.human_duration, words.human_rate
CommandT = TypeVar("CommandT", bound=Callable[..., Any])


class RunDirParam(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on
    """A run directory that exists; the command gets it opened."""

    name = "run"

    def convert(
        self,
        value: Any,
        param: click.Parameter | None,  # noqa: ARG002 - click's
        ctx: click.Context | None,  # noqa: ARG002 - click's
    ) -> RunDir:
        """Open the run directory."""
        from hpcresume.run.directory import RunDir

        return value if isinstance(value, RunDir) else RunDir.open(os.path.abspath(value))

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's
        param: click.Parameter,  # noqa: ARG002 - click's
        incomplete: str,
    ) -> list[CompletionItem]:
        """Complete the names of directories."""
        return [CompletionItem(incomplete, type="dir")]


def run_argument(*, required: bool = False) -> Callable[[CommandT], CommandT]:
    """Return the decorator of the argument RUN.

    Args:
        required: Whether it must be given; otherwise the last run of the current directory
            is meant where it is left out.
    """
    if required:
        return click.argument("run", type=RunDirParam())
    return click.argument("run", type=RunDirParam(), default=lambda: str(last_run(Path.cwd())))


def last_run(directory: Path) -> Path:
    """Return the run that is meant in a directory when none is named.

    Returns:
        The directory itself if it is a run, else the one of ``runs/*`` created last.

    Raises:
        UsageError: There is none.
    """
    if (directory / "run.json").is_file():
        return directory
    found = []
    for record in directory.glob(f"{RUNS_DIRECTORY}/*/run.json"):
        try:
            created = str(json.loads(record.read_bytes())["created_at"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found.append((created, record.parent))
    if not found:
        raise UsageError(
            f"no run was named and {directory} holds none in {RUNS_DIRECTORY}/. "
            "Without one there is nothing to show. "
            "Give the run directory that `hpcresume submit` printed.",
            directory=str(directory),
        )
    return max(found)[1]


json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")


def emit_json(values: Mapping[str, Any]) -> None:
    """Print one JSON object with ``schema`` first."""
    click.echo(json.dumps({"schema": SCHEMA, **values}, ensure_ascii=False))


def say(text: str, *, err: bool = False) -> None:
    """Print one line for people, above a bar if there is one."""
    if not err:
        click.echo(text)
    elif sys.stderr is not None:
        # A bar takes the place of `sys.stderr`, which `click.echo` would go past.
        shown = text if sys.stderr.isatty() else click.unstyle(text)
        print(shown, file=sys.stderr, flush=True)


def finish(exit_code: int) -> NoReturn:
    """End the command with an exit code."""
    click.get_current_context().exit(exit_code)


def interrupted_code(number: int) -> int:
    """Return the exit code of what a signal has ended: the shell's own for Ctrl-C, else "saved"."""
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_SAVED


def exit_code_of(state: str) -> int:
    """Return the exit code of a run that ended in a state: 0 for ``complete``, else 1."""
    return EXIT_COMPLETE if state == "complete" else EXIT_INCOMPLETE


def on_terminal() -> bool:
    """Tell whether people's text goes to a terminal, where it may be redrawn."""
    return sys.stderr.isatty()
