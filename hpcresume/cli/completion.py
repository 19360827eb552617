"""``hpcresume completion``: the shell's completion script."""

from __future__ import annotations

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of SHELL.

    \b
    Example:
      eval "$(hpcresume completion bash)"
    """
    from click.shell_completion import get_completion_class

    from hpcresume.cli import cli

    completer = get_completion_class(shell)
    assert completer is not None, f"click has no completion for {shell}"
    click.echo(completer(cli, {}, "hpcresume", "_HPCRESUME_COMPLETE").source())
