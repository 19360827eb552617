"""``hpcresume clean``: remove what a run no longer needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hpcresume.cli.common import (
    emit_json,
    human_bytes,
    human_count,
    json_option,
    run_argument,
    say,
)

if TYPE_CHECKING:
    from hpcresume.run.directory import RunDir


@click.command()
@run_argument(required=True)
@click.option("--all", "everything", is_flag=True, help="The whole run directory, results too.")
@click.option("--yes", is_flag=True, help="Remove; without it only say what would be removed.")
@json_option
def clean(run: RunDir, everything: bool, yes: bool, as_json: bool) -> None:
    """Remove what RUN no longer needs: small segments that packs hold, and temporary files.

    With --yes small segments that are in no pack yet are folded into one first.  Results,
    logs and records stay, unless --all is given.

    \b
    Example:
      hpcresume clean runs/paragraphs-1f2e3d4c
      hpcresume clean runs/paragraphs-1f2e3d4c --all --yes
    """
    from hpcresume.launch.cleaning import clean_run

    found = clean_run(run, everything=everything, remove=yes)
    if as_json:
        emit_json(
            {"run": run.path, "removed": yes, "paths": found.paths, "bytes": found.size_bytes}
        )
        return
    temporary = len(found.paths) - found.segments
    what = run.path if everything else human_count(temporary, "temporary file")
    if found.segments:
        what = f"{human_count(found.segments, 'small segment')} and {what}"
    say(f"{'removed' if yes else 'would remove'} {what}, {human_bytes(found.size_bytes)}")
    if found.paths and not yes:
        say("Nothing was removed. To remove it, add --yes", err=True)
