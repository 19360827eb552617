"""``hpcresume render``: the batch scripts that `submit` would hand to Slurm."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from hpcresume.cli.common import emit_json, human_count, json_option, say
from hpcresume.cli.submit import make_submission, run_options

if TYPE_CHECKING:
    from hpcresume.config import Resolved
    from hpcresume.launch.preview import Preview
    from hpcresume.launch.submit import Submission


@click.command()
@click.argument("target", metavar="PIPELINE|RUN")
@click.argument("sbatch_options", nargs=-1, type=click.UNPROCESSED)
@run_options
@click.option("--explain", is_flag=True, help="Print every setting and where it came from.")
@json_option
def render(
    target: str,
    sbatch_options: tuple[str, ...],
    explain: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Print the batch scripts that `submit` with the same options would submit.

    Nothing is created, and Slurm need not be installed. <array> stands for the id that the
    job array will get, <run-id> for that of a run which does not exist yet.

    \b
    Example:
      hpcresume render pipeline.py --array 64 -t 4:00:00 -c 8
      hpcresume render pipeline.py --site generic --explain
    """
    submission = make_submission(target, sbatch_options, given)
    print_scripts(submission, as_json=as_json, explain=explain)


def print_scripts(submission: Submission, *, as_json: bool, explain: bool) -> None:
    """Print the job array's and the merge job's script, after the settings if asked.

    Raises:
        HpcResumeError: `submit` would fail in the same way.
    """
    from hpcresume.launch.preview import preview, preview_settings

    loaded, resolved = preview_settings(submission)
    if explain and not as_json:
        # First, so that they can be read where a template cannot be rendered.
        _print_settings(resolved)
    found = preview(submission, loaded, resolved)
    arrays, merge = found.array_scripts(), found.merge_script()
    _say_what(found)
    if as_json:
        footer = found.plan.footer
        values = {
            "run": found.run.path,
            "site": resolved.site_name,
            "round": footer.round,
            "tasks": footer.tasks,
            "script": next(iter(arrays)),
            "array": next(iter(arrays.values())),
            "arrays": arrays,
            "merge": merge,
            "notes": found.notes,
        }
        emit_json(values | ({"settings": _settings(resolved)} if explain else {}))
        return
    for path, text in arrays.items():
        click.echo(f"# {path}: {'a' if len(arrays) > 1 else 'the'} job array")
        click.echo(text)
    click.echo("# the merge job, which runs when the array has ended")
    click.echo(merge, nl=False)


def _say_what(found: Preview) -> None:
    say(f"run directory  {found.run.path}", err=True)
    say(f"site           {found.resolved.site_name}", err=True)
    footer = found.plan.footer
    say(f"round          {footer.round}, {human_count(footer.tasks, 'array task')}", err=True)
    for note in found.notes:
        say(f"note           {note}", err=True)


def _settings(resolved: Resolved) -> list[dict[str, Any]]:
    return [
        {"key": entry.key, "value": entry.value, "origin": entry.origin}
        for entry in resolved.explain()
    ]


def _print_settings(resolved: Resolved) -> None:
    entries = resolved.explain()
    texts = [f"# {entry.key} = {json.dumps(entry.value)}" for entry in entries]
    width = max(map(len, texts))
    for text, entry in zip(texts, entries, strict=True):
        click.echo(f"{text:<{width}}  ({entry.origin})")
