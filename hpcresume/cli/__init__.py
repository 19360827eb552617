"""The ``hpcresume`` command: finds its subcommands by name and imports only the one that runs.

Every error that hpcresume raises on purpose ends as its message on stderr and its own exit
code; anything else is a bug and says so with a traceback and exit code 70.
"""

from __future__ import annotations

import atexit
import errno
import gc
import importlib
import os
import signal
import sys
import termios
from collections.abc import Callable
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from hpcresume.errors import EXIT_INTERRUPTED, HpcResumeError, InternalError

EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE
EXIT_HANGUP = 128 + signal.SIGHUP
_OUTPUTS = (1, 2)
_GARBAGE = 10_000

# Help texts stand here so that `hpcresume --help` imports no command.
COMMANDS = {
    "submit": ("hpcresume.cli.submit:submit", "Start a run, or continue one."),
    "trial": ("hpcresume.cli.trial:trial", "Run a sample of the sources and write nothing."),
    "eval": ("hpcresume.cli.eval:evaluate", "Evaluate a dataset with a workflow or an endpoint."),
    "status": ("hpcresume.cli.status:status", "Show what is done, left, failing and at risk."),
    "merge": ("hpcresume.cli.merge:merge", "Unite what the tasks of a run completed."),
    "collect": ("hpcresume.cli.collect:collect", "Write the final results to one file."),
    "failures": ("hpcresume.cli.failures:failures", "Show the sources that failed, and why."),
    "logs": ("hpcresume.cli.logs:logs", "Print the logs of a run's array tasks."),
    "report": ("hpcresume.cli.report:report", "Write a run's report, one HTML page."),
    "cancel": ("hpcresume.cli.cancel:cancel", "Stop a run; what is committed is published."),
    "clean": ("hpcresume.cli.clean:clean", "Remove what a run no longer needs."),
    "drive": ("hpcresume.cli.drive:drive", "Do the merge step from here until the run ends."),
    "render": ("hpcresume.cli.render:render", "Print the batch script of a submit."),
    "site": ("hpcresume.cli.site:site", "Show the sites that settings can come from."),
    "doctor": ("hpcresume.cli.doctor:doctor", "Probe this node, its storage, Slurm and Ray."),
    "testbed": ("hpcresume.cli.testbed:testbed", "Run a real Slurm on this one machine."),
    "completion": ("hpcresume.cli.completion:completion", "Print or install shell completion."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they run."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's
        """Return the names of all commands, in the order of a run's life."""
        return list(COMMANDS)

    def get_command(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's
        cmd_name: str,
    ) -> click.Command | None:
        """Import and return a command; None where there is none of this name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; of one that does not exist, name the nearest that does."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            import difflib

            near = difflib.get_close_matches(name, COMMANDS, n=1)
            if near:
                ctx.fail(f"no such command {name!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's
        formatter: click.HelpFormatter,
    ) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete a command's name without importing any."""
        names = [
            CompletionItem(name, help=text)
            for name, (_, text) in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return names + click.Command.shell_complete(self, ctx, incomplete)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; every way in which it can fail becomes an exit code."""
        return _guarded(ctx, super().invoke)


def _guarded(ctx: click.Context, invoke: Callable[[click.Context], Any]) -> Any:
    try:
        result = invoke(ctx)
        sys.stdout.flush()
    except (click.ClickException, click.exceptions.Exit):
        raise
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        ctx.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        _forget(sys.stdout.fileno())
        ctx.exit(EXIT_BROKEN_PIPE)
    except InternalError as error:
        _report_bug(error)
        ctx.exit(error.exit_code)
    except HpcResumeError as error:
        if ctx.params.get("debug"):
            _print_traceback(error)
        click.echo(f"error: {error}", err=True)
        ctx.exit(error.exit_code)
    except Exception as error:
        if _is_hangup(error):
            raise
        _report_bug(error)
        ctx.exit(InternalError.exit_code)
    return result


def _is_hangup(error: Exception) -> bool:
    """Tell whether a command has failed to write to a terminal that is gone."""
    is_io = isinstance(error, OSError) and error.errno == errno.EIO
    return is_io and any(map(_is_gone, _OUTPUTS))


def _report_bug(error: Exception) -> None:
    _print_traceback(error)
    click.echo(
        f"error: {type(error).__name__}: {error}. This is a bug in hpcresume, not in your "
        "pipeline. Published results are not affected. Report it with the traceback above.",
        err=True,
    )


def _print_traceback(error: Exception) -> None:
    import traceback

    traceback.print_exception(error)


def _is_gone(fd: int) -> bool:
    try:
        termios.tcgetattr(fd)
    except termios.error as error:
        return bool(error.args[0] == errno.EIO)
    return False


def _forget(fd: int) -> None:
    # The interpreter flushes what is written to once more when it exits and would fail there.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, fd)
    os.close(null)


def _print_version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from hpcresume import __version__

        click.echo(f"hpcresume {__version__}")
        ctx.exit(0)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version.",
)
def cli(debug: bool) -> None:
    """Run a Python pipeline over many inputs on Slurm, each result once.

    \b
    Example:
      hpcresume submit pipeline.py --array 64
      hpcresume status --watch
      hpcresume collect -o results.jsonl

    Exit codes: 0 complete, 1 ended incomplete, 2 usage, 10-19 yours to fix, 20-29 shared
    storage, 30-39 Slurm, 70 bug, 85 saved (submit again), 128+n signal.
    """


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    # To look for garbage among what is imported, and in all of it once more at the end, takes
    # a fifth of a short command.
    gc.set_threshold(_GARBAGE)
    atexit.register(gc.freeze)
    try:
        cli.main(prog_name="hpcresume")
    except OSError as error:
        if not _is_hangup(error):
            raise
        for fd in filter(_is_gone, _OUTPUTS):
            _forget(fd)
        sys.exit(EXIT_HANGUP)
    sys.exit(0)
