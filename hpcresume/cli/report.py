"""``hpcresume report``: a run on one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpcresume.cli.common import human_bytes, run_argument, say

if TYPE_CHECKING:
    from hpcresume.run.directory import RunDir


@click.command()
@run_argument()
@click.option(
    "-o",
    "--output",
    default="report.html",
    show_default=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The page; replaced atomically.",
)
def report(run: RunDir, output: Path) -> None:
    """Write RUN's report: one HTML page that needs no network, also of a run under way.

    It shows when each array task ran and how it ended, throughput, what stages took, stragglers,
    failures, and work that was published twice.

    \b
    Example:
      hpcresume report
      hpcresume report runs/paragraphs-1f2e3d4c -o paragraphs.html
    """
    from hpcresume.observe.report import write_report

    found = write_report(run, output)
    say(f"{output}: {found.name}, {found.state}, {human_bytes(output.stat().st_size)}")
