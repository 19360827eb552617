"""``hpcresume collect``: the final results."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpcresume.cli.common import (
    emit_json,
    finish,
    human_bytes,
    human_count,
    json_option,
    on_terminal,
    run_argument,
    say,
)
from hpcresume.errors import EXIT_COMPLETE, EXIT_INCOMPLETE

if TYPE_CHECKING:
    from hpcresume.output.collect import CollectReport
    from hpcresume.run.directory import RunDir

LOG_LINE_S = 30.0


@click.command()
@run_argument()
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="A .jsonl or .parquet file, or with --layout parts a directory; replaced atomically.",
)
@click.option(
    "--layout",
    type=click.Choice(["one", "parts"]),
    default="one",
    show_default=True,
    help="One file in source order, or the parts of an hr.Parts run as they are, unsorted.",
)
@click.option("--with-source", is_flag=True, help='Wrap rows as {"source", "item", "row"}.')
@click.option(
    "--files",
    type=click.Path(path_type=Path, file_okay=False),
    help="Link the files of ctx.output into this directory.",
)
@json_option
def collect(
    run: RunDir,
    *,
    output: Path,
    layout: str,
    with_source: bool,
    files: Path | None,
    as_json: bool,
) -> None:
    """Write the rows of RUN in source order, each source once.

    Works on an unfinished run too: it says how many sources are missing and exits with 1.

    \b
    Example:
      hpcresume collect -o results.jsonl
      hpcresume collect runs/paragraphs-1f2e3d4c -o results.parquet --with-source
      hpcresume collect --layout parts -o results/
    """
    from hpcresume.errors import UsageError
    from hpcresume.output.collect import collect as write_result
    from hpcresume.output.layout import collect_parts

    if layout == "parts" and (with_source or files):
        raise UsageError(
            "--layout parts links whole files, so it takes neither --with-source nor --files. "
            "Leave them out, or write one file."
        )
    with _progress() as on_progress:
        if layout == "parts":
            report = collect_parts(run, output, on_progress=on_progress)
        else:
            report = write_result(
                run, output, with_source=with_source, files=files, on_progress=on_progress
            )
    for line in _report_lines(report):
        say(line, err=True)
    if as_json:
        emit_json(_plain(report))
    finish(EXIT_COMPLETE if report.complete else EXIT_INCOMPLETE)


def _report_lines(report: CollectReport) -> Iterator[str]:
    for text in report.damaged:
        yield f"damaged: {text}"
    yield (
        f"{report.output}: {human_count(report.rows, 'row')} of "
        f"{human_count(report.sources, 'source')}, {human_bytes(report.size_bytes)}"
    )
    if report.files:
        yield f"{human_count(report.files, 'file')} linked"
    if report.quarantined:
        yield (
            f"{human_count(report.quarantined, 'source')} quarantined, "
            f"{report.tolerated:,} tolerated. To see why: hpcresume failures RUN"
        )
    if report.missing:
        yield (
            f"{human_count(report.missing, 'source')} of {report.total:,} missing: "
            "the run is not finished. To go on: hpcresume submit RUN"
        )


def _plain(report: CollectReport) -> dict[str, object]:
    return {
        "output": report.output,
        "complete": report.complete,
        "rows": report.rows,
        "sources": report.sources,
        "total": report.total,
        "missing": report.missing,
        "quarantined": report.quarantined,
        "tolerated": report.tolerated,
        "bytes": report.size_bytes,
        "files": report.files,
        "damaged": list(report.damaged),
    }


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    if not on_terminal():
        yield _log_lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress("collect", *columns, console=console, transient=True) as progress:
        task = progress.add_task("collect", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _log_lines() -> Callable[[int, int], None]:
    said = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= LOG_LINE_S:
            said = time.monotonic()
            say(f"{done:,} of {human_count(total, 'source')} written", err=True)

    return line
