"""``hpcresume doctor``: whether this node and a run directory will do."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpcresume.cli.common import emit_json, finish, json_option, say
from hpcresume.errors import EXIT_INCOMPLETE

if TYPE_CHECKING:
    from hpcresume.config import Request
    from hpcresume.doctor import Check


@click.command()
@click.argument("path", type=click.Path(file_okay=False), default=".")
@click.option("--ray", "with_ray", is_flag=True, help="Start a Ray head too; takes seconds.")
@click.option(
    "--nodes",
    type=click.IntRange(min=1, max=2),
    default=1,
    help="2: also what two nodes see of each other's files below PATH, with srun.",
)
@json_option
def doctor(path: str, with_ray: bool, nodes: int, as_json: bool) -> None:
    """Probe this node, the file system of the run directory PATH, Slurm and Ray.

    PATH need not exist; without it the current directory is probed.  Each line is ok,
    warning or wrong, with what to do.  Run it on a compute node too: srun hpcresume doctor

    Exits 1 if anything is wrong.

    \b
    Example:
      hpcresume doctor $SCRATCH/runs
      srun hpcresume doctor $SCRATCH/runs --ray --json
      hpcresume doctor --nodes 2 $SCRATCH/runs
    """
    checks = []
    for check in _checks(path, with_ray=with_ray, nodes=nodes):
        checks.append(check)
        if not as_json:
            _show(check)
    counts = {state: sum(c.state == state for c in checks) for state in ("wrong", "warning", "ok")}
    if as_json:
        host = os.uname().nodename
        emit_json({"host": host, "path": path, **counts, "checks": [asdict(c) for c in checks]})
    else:
        text = ", ".join(f"{count} {state}" for state, count in counts.items())
        say(text, err=True)
    if counts["wrong"]:
        finish(EXIT_INCOMPLETE)


def _checks(path: str, *, with_ray: bool, nodes: int) -> Iterator[Check]:
    from hpcresume import doctor as probes
    from hpcresume.config import load_settings
    from hpcresume.ledger.local_disk import check_local
    from hpcresume.task.scratch import make_ray_temp

    settings = load_settings(site=None, start_dir=Path.cwd(), environ=os.environ, flags={}).settings
    configured = settings.task.local_dir
    candidates = [configured] if configured else settings.site.node_local
    yield from probes.check_software()
    yield from probes.check_node(
        candidates, os.environ, check_local=check_local, make_ray_temp=make_ray_temp
    )
    yield from probes.check_storage(path)
    yield from probes.check_slurm()
    if with_ray:
        yield from probes.check_ray(make_ray_temp)
    if nodes > 1:
        yield from probes.check_across(
            path,
            nodes=nodes,
            options=_srun_options(settings.request),
            python=shlex.split(settings.site.python),
        )


def _srun_options(request: Request) -> list[str]:
    """Return what the jobs of a run ask for to be let in."""
    names = ("account", "partition", "qos", "constraint", "reservation", "exclude")
    given = ((name, getattr(request, name)) for name in names)
    return [f"--{name}={value}" for name, value in given if value]


def _show(check: Check) -> None:
    say(f"{check.state:<7}  {check.section:<8}  {check.name}: {check.found}")
    if check.remedy:
        say(f"{'':<7}  {'':<8}  -> {check.remedy}")
