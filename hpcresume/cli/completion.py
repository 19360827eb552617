"""``hpcresume completion``: the shell's completion script, printed or installed."""

from __future__ import annotations

import os
from pathlib import Path

import click

from hpcresume.cli.common import say
from hpcresume.errors import UsageError
from hpcresume.fs import replace_file

SHELLS = ("bash", "zsh", "fish")
_STARTS = {"bash": ".bashrc", "zsh": ".zshrc"}


@click.command()
@click.argument("shell", type=click.Choice(SHELLS), required=False)
@click.option("--install", is_flag=True, help="Install it for new shells; twice does no harm.")
def completion(shell: str | None, install: bool) -> None:
    """Print the completion script of SHELL, or install it; by default of the shell in $SHELL.

    \b
    Example:
      hpcresume completion --install
      eval "$(hpcresume completion bash)"
    """
    chosen = shell or _own_shell()
    script = _script(chosen)
    if install:
        _install(chosen, script, Path.home())
    else:
        click.echo(script)


def _own_shell() -> str:
    name = os.path.basename(os.environ.get("SHELL", ""))
    if name not in SHELLS:
        raise UsageError(
            f"$SHELL is {name or 'not set'}, and there is completion for {', '.join(SHELLS)}. "
            "Name one: hpcresume completion bash"
        )
    return name


def _script(shell: str) -> str:
    from click.shell_completion import get_completion_class

    from hpcresume.cli import cli

    completer = get_completion_class(shell)
    assert completer is not None, f"click has no completion for {shell}"
    return completer(cli, {}, "hpcresume", "_HPCRESUME_COMPLETE").source()


def _install(shell: str, script: str, home: Path) -> None:
    """Write the script where the shell, or a line in its start-up file, finds it."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    if shell == "fish":
        path = config / "fish" / "completions" / "hpcresume.fish"
    else:
        path = config / "hpcresume" / f"completion.{shell}"
    start = home / _STARTS[shell] if shell in _STARTS else None
    line = f'[ -f "{path}" ] && . "{path}"  # completion of hpcresume'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(str(path), script.encode(), mode=0o644)
        if start is not None and line not in _lines(start):
            with start.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}\n")
    except OSError as error:
        raise UsageError(
            f"cannot install the completion of {shell}: {error}. Nothing else was changed. "
            f'Add this to the file that your shell reads: eval "$(hpcresume completion {shell})"'
        ) from error
    say(f"installed in {path}{f', read by {start}' if start else ''}; new shells have it")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
