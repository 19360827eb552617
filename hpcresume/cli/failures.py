"""``hpcresume failures``: which sources failed, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from hpcresume.cli.common import emit_json, human_count, json_option, run_argument, say

if TYPE_CHECKING:
    from hpcresume.observe.failures import FailedSource
    from hpcresume.run.directory import RunDir

_TRACEBACK_LINES = 12
# Python's words for a list that came where one item was expected.
_GOT_A_LIST = re.compile(r"'list' object has no|list indices must|not 'list'|not list\b|got list")


@click.command()
@run_argument()
@click.option("--tail", type=click.IntRange(min=1), help="Only the last N sources.", metavar="N")
@json_option
def failures(run: RunDir, tail: int | None, as_json: bool) -> None:
    """Show the sources of RUN that are quarantined or failing, each with its last failure.

    \b
    Example:
      hpcresume failures
      hpcresume failures runs/paragraphs-1f2e3d4c --tail 5
    """
    from hpcresume.observe.failures import failed_sources
    from hpcresume.output.rows import union_of
    from hpcresume.run.manifest import Manifest

    found = failed_sources(Manifest.open(run), union_of(run))
    shown = found[-tail:] if tail else found
    if as_json:
        plain = [failed.to_dict() for failed in shown]
        emit_json({"run": run.path, "failed": len(found), "failures": plain})
        return
    for failed in shown:
        say("\n".join(_lines(failed)))
    say(_summary(found), err=True)


def _lines(failed: FailedSource) -> Iterator[str]:
    tries = human_count(failed.attempts, "attempt")
    yield f"{failed.source}: {failed.state} after {tries}, stage {failed.stage}"
    if failed.item != failed.source:
        yield f"  item {failed.item}"
    yield f"  {failed.kind}: {failed.message}"
    if _GOT_A_LIST.search(failed.message):
        yield "  a list is one value: `yield` its items in the stage before, or return hr.Many(...)"
    lines = failed.traceback.rstrip().splitlines()
    if len(lines) > _TRACEBACK_LINES:
        yield f"    ... {len(lines) - _TRACEBACK_LINES} lines before; all of them: --json"
    for line in lines[-_TRACEBACK_LINES:]:
        yield f"    {line}"


def _summary(found: list[FailedSource]) -> str:
    quarantined = sum(failed.state == "quarantined" for failed in found)
    if not found:
        return "no source failed"
    text = f"{human_count(quarantined, 'source')} quarantined, {len(found) - quarantined:,} failing"
    if quarantined:
        text += ". To try the quarantined ones again: hpcresume submit RUN --retry-quarantined"
    return text
