"""``hpcresume drive``: do the merge step's work from the login node."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from hpcresume.cli.common import exit_code_of, finish, human_count, run_argument, say
from hpcresume.errors import SlurmUnreachableError

if TYPE_CHECKING:
    from hpcresume.run.directory import RunDir


@click.command()
@run_argument()
@click.option(
    "--interval", type=float, default=30.0, show_default=True, metavar="S", help="Look every S s."
)
def drive(run: RunDir, interval: float) -> None:
    """Submit RUN's next rounds from here until the run ends.

    For sites where jobs may not submit jobs.  Ctrl-C leaves the jobs running; the same
    command goes on.

    \b
    Example:
      hpcresume drive runs/paragraphs-1f2e3d4c
    """
    from hpcresume.launch.drive import merge_step
    from hpcresume.observe.status import read_status

    said = ""
    while True:
        try:
            step = merge_step(run)
            left = human_count(len(step.standing.remainder), "source")
            line = f"{step.state}, round {step.round}: {left} left"
        except SlurmUnreachableError as error:
            step, line = None, f"waiting for Slurm: {error}"
        if line != said:
            said = line
            say(line)
        if step is not None and step.state in {"finished", "stopped", "cancelled"}:
            status = read_status(run, ask_slurm=False)
            say(f"{status.state}{f': {status.reason}' if status.reason else ''}")
            finish(exit_code_of(status.state))
        time.sleep(interval)
