"""``hpcresume testbed``: a real Slurm on this one machine, and ways to break it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from hpcresume.cli.common import emit_json, finish, json_option, say
from hpcresume.errors import TestbedError, UsageError
from hpcresume.testbed.releases import NAMES

if TYPE_CHECKING:
    from hpcresume.testbed import Release, Testbed

EXIT_NOT_UP = 1
_CommandT = TypeVar("_CommandT", bound=Callable[..., Any])


def _default_directory() -> str:
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(state, "hpcresume", "testbed")


_PATH = click.Path(file_okay=False, path_type=Path)


def _directory_argument(command: _CommandT) -> _CommandT:
    return click.argument("directory", type=_PATH, default=_default_directory)(command)


def _directory_option(command: _CommandT) -> _CommandT:
    option = click.option(
        "--dir",
        "directory",
        type=_PATH,
        default=_default_directory,
        help="The testbed's directory, where it is not the default one.",
    )
    return option(command)


def _go_inside(release: Release | None) -> None:
    """Run this very command inside a release, unless it runs there or there is none."""
    from hpcresume.testbed import releases

    if release is not None and release != releases.here():
        command = releases.command(release, ["hpcresume", *sys.argv[1:]])
        os.execvpe(command[0], command, releases.environment())  # noqa: S606 - argv, no shell


def _go_to(directory: Path) -> None:
    """Run this very command inside the release that the testbed in a directory is made of."""
    from hpcresume.testbed import release_of

    _go_inside(release_of(directory))


@click.group()
def testbed() -> None:
    """Run a real Slurm on this one machine, made of the distribution's own packages.

    Several nodes, each with its own disk; partitions with preemption; accounting; memory
    limits where cgroup v1 is there.  Needs root.  DIRECTORY defaults to
    $XDG_STATE_HOME/hpcresume/testbed (~/.local/state/hpcresume/testbed).

    With --release it is made of another release of Debian in a folder, and what talks to it
    runs inside: hpcresume testbed enter.

    \b
    Example:
      eval "$(hpcresume testbed up --install)"
      hpcresume submit pipeline.py --array 8
      hpcresume testbed down
    """


@testbed.command("up")
@_directory_argument
@click.option("--nodes", type=click.IntRange(1, 64), default=4, show_default=True, help="Nodes.")
@click.option(
    "--cpus-per-node",
    type=click.IntRange(1, 256),
    default=2,
    show_default=True,
    help="CPUs that Slurm hands out per node; may be more than there are.",
)
@click.option(
    "--memory-mb",
    type=click.IntRange(64),
    help="Memory per node in MiB.  [default: the machine's, divided]",
)
@click.option(
    "--proctrack",
    type=click.Choice(["auto", "cgroup", "linuxproc"]),
    default="auto",
    show_default=True,
    help="How Slurm follows processes; only cgroup limits memory.",
)
@click.option("--no-accounting", is_flag=True, help="Without slurmdbd: sacct does not answer.")
@click.option(
    "--max-array-size",
    type=click.IntRange(2),
    default=1001,
    show_default=True,
    help="Slurm's MaxArraySize: the largest index of an array is one less.",
)
@click.option(
    "--max-submit",
    type=click.IntRange(1),
    help="Jobs that one user may have in the queue.  [default: no limit]",
)
@click.option(
    "--release",
    type=click.Choice(NAMES),
    help="Make it of this Debian in a folder: Slurm 22.05, 24.11, 26.05.  [default: what is here]",
)
@click.option(
    "--root",
    type=_PATH,
    help="The release's folder, 2 GB.  [default: ~/.cache/hpcresume/releases/NAME]",
)
@click.option("--mirror", help="Mirror of Debian to build the release from.  [default: apt's]")
@click.option("--install", is_flag=True, help="Install what is missing, with apt, as root.")
@json_option
def up(
    directory: Path,
    *,
    nodes: int,
    cpus_per_node: int,
    memory_mb: int | None,
    proctrack: Literal["auto", "cgroup", "linuxproc"],
    no_accounting: bool,
    max_array_size: int,
    max_submit: int | None,
    release: str | None,
    root: Path | None,
    mirror: str | None,
    install: bool,
    as_json: bool,
) -> None:
    """Bring a testbed up and print the line that makes Slurm's commands use it.

    \b
    Example:
      eval "$(hpcresume testbed up --nodes 2 --proctrack linuxproc)"
      sinfo
    """
    from hpcresume import testbed as beds

    if release is not None:
        _go_inside(_built(release, root=root, mirror=mirror, install=install))
    elif install:
        beds.install(accounting=not no_accounting)
    settings = beds.Settings(
        nodes=nodes,
        cpus_per_node=cpus_per_node,
        memory_mb=memory_mb,
        proctrack=proctrack,
        accounting=not no_accounting,
        max_array_size=max_array_size,
        max_submit=max_submit,
    )
    bed = beds.up(directory, settings)
    if as_json:
        emit_json(_as_json(bed))
        return
    if bed.release is None:
        say(f"export SLURM_CONF={bed.conf}")
    else:
        say(f"# in {bed.release.root}; to use it: hpcresume testbed enter", err=True)
    say(f"# {len(bed.nodes)} nodes idle, proctrack/{bed.proctrack}", err=True)
    say(f"# node-local disk on every node: {bed.scratch}", err=True)


def _built(name: str, *, root: Path | None, mirror: str | None, install: bool) -> Release:
    from hpcresume import testbed as beds
    from hpcresume.testbed import releases

    here = releases.here()
    if here is not None:
        if here.name == name:
            return here
        raise UsageError(
            f"this is the inside of the release {here.name}, and a release is built outside. "
            "Leave it first: exit"
        )
    if install:
        beds.install_release_tools()
    return releases.prepare(name, root=root, mirror=mirror, tell=lambda line: say(line, err=True))


@testbed.command("enter", context_settings={"ignore_unknown_options": True})
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@_directory_option
def enter(command: tuple[str, ...], directory: Path) -> None:
    """Run COMMAND, or a shell, where Slurm's commands and jobs belong to the testbed.

    For one made of another release that is inside its folder: home, /tmp and whatever else is
    not the operating system are the machine's, Python and hpcresume are the release's.

    \b
    Example:
      hpcresume testbed up --release trixie
      hpcresume testbed enter -- hpcresume submit pipeline.py --array 8
      hpcresume testbed down
    """
    from hpcresume import testbed as beds

    _go_to(directory)
    bed = beds.status(directory)
    if bed is None:
        raise TestbedError(
            f"no testbed is up in {directory}. To start one: hpcresume testbed up {directory}",
            path=str(directory),
        )
    argv = list(command) or [shutil.which(os.environ.get("SHELL", "sh")) or "sh"]
    os.environ["SLURM_CONF"] = str(bed.conf)
    try:
        os.execvp(argv[0], argv)  # noqa: S606 - argv, no shell
    except FileNotFoundError as error:
        raise UsageError(f"{argv[0]}: no such command here. Name one that is") from error


@testbed.command("down")
@_directory_argument
@json_option
def down(directory: Path, as_json: bool) -> None:
    """End a testbed, its jobs included; logs and the nodes' disks stay in DIRECTORY.

    \b
    Example:
      hpcresume testbed down
    """
    from hpcresume import testbed as beds

    ended = beds.down(directory)
    if as_json:
        emit_json({"directory": str(directory), "ended": ended})
    else:
        say(f"{directory}: {'down' if ended else 'no testbed was up'}", err=True)


@testbed.command("status")
@_directory_argument
@json_option
def status(directory: Path, as_json: bool) -> None:
    """Show a testbed's nodes; exits 1 where none is up or a daemon of it has died.

    \b
    Example:
      hpcresume testbed status --json
    """
    from hpcresume import testbed as beds

    _go_to(directory)
    bed = beds.status(directory)
    if bed is None:
        if as_json:
            emit_json({"directory": str(directory), "up": False})
        else:
            say(f"{directory}: no testbed is up", err=True)
        finish(EXIT_NOT_UP)
    if as_json:
        emit_json(_as_json(bed))
    else:
        _print_status(bed)
    if bed.dead:
        finish(EXIT_NOT_UP)


@testbed.command("preempt")
@click.argument("job")
@click.option(
    "--hold",
    "hold_s",
    type=click.IntRange(1),
    default=30,
    show_default=True,
    help="Seconds for which the node is taken.",
)
@_directory_option
@json_option
def preempt(job: str, hold_s: int, directory: Path, as_json: bool) -> None:
    """Preempt the running job JOB (an id, or ARRAY_INDEX) by one that needs its node.

    The partition of JOB decides what it gets: low 15 s of grace and a requeue, nograce a
    requeue without grace, cancel 10 s of grace and its end.

    \b
    Example:
      hpcresume testbed preempt 7_3
    """
    from hpcresume import testbed as beds

    _go_to(directory)
    preemptor = beds.preempt(directory, job, hold_s=hold_s)
    if as_json:
        emit_json({"job": job, "preempted_by": preemptor})
    else:
        say(preemptor)


@testbed.command("fail-node")
@click.argument("node")
@_directory_option
@json_option
def fail_node(node: str, directory: Path, as_json: bool) -> None:
    """Kill the slurmd of NODE (n1, n2, ...); its jobs run on as zombies.

    Slurm takes about 40 s to see it, and requeues the jobs elsewhere.

    \b
    Example:
      hpcresume testbed fail-node n2
    """
    from hpcresume import testbed as beds

    _go_to(directory)
    beds.fail_node(directory, node)
    if as_json:
        emit_json({"node": node, "alive": False})
    else:
        say(f"{node}: slurmd killed; back with: hpcresume testbed restore-node {node}", err=True)


@testbed.command("restore-node")
@click.argument("node")
@_directory_option
@json_option
def restore_node(node: str, directory: Path, as_json: bool) -> None:
    """Start the slurmd of a failed NODE again, on the same disk.

    \b
    Example:
      hpcresume testbed restore-node n2
    """
    from hpcresume import testbed as beds

    _go_to(directory)
    beds.restore_node(directory, node)
    if as_json:
        emit_json({"node": node, "alive": True})
    else:
        say(f"{node}: slurmd started", err=True)


@testbed.command("controller")
@click.argument("action", type=click.Choice(["pause", "continue", "fail", "restore"]))
@_directory_option
@json_option
def controller(action: str, directory: Path, as_json: bool) -> None:
    """Freeze slurmctld and thaw it, or kill it and start it again.

    Slurm's commands get no answer from a paused one, and are refused by a failed one.

    \b
    Example:
      hpcresume testbed controller pause
      hpcresume testbed controller continue
    """
    from hpcresume import testbed as beds

    _go_to(directory)
    actions = {
        "pause": beds.pause_controller,
        "continue": beds.continue_controller,
        "fail": beds.fail_controller,
        "restore": beds.restore_controller,
    }
    actions[action](directory)
    if as_json:
        emit_json({"controller": action})
    else:
        say(f"slurmctld: {action}", err=True)


def _as_json(bed: Testbed) -> dict[str, Any]:
    return {
        "up": True,
        "directory": str(bed.directory),
        "cluster": bed.cluster,
        "slurm_conf": str(bed.conf),
        "scratch": str(bed.scratch),
        "proctrack": bed.proctrack,
        "accounting": bed.accounting,
        "release": None if bed.release is None else bed.release.name,
        "nodes": [
            {"name": n.name, "state": n.state, "alive": n.alive, "disk": str(n.disk)}
            for n in bed.nodes
        ],
        "dead": list(bed.dead),
    }


def _print_status(bed: Testbed) -> None:
    say(f"cluster  {bed.cluster}, proctrack/{bed.proctrack}")
    if bed.release is None:
        say(f"use      export SLURM_CONF={bed.conf}")
    else:
        say(f"release  {bed.release.name} in {bed.release.root}")
        say("use      hpcresume testbed enter")
    say(f"scratch  {bed.scratch} on every node")
    for node in bed.nodes:
        say(f"{node.name}  {node.state}{'' if node.alive else ', its slurmd is not running'}")
    for name in bed.dead:
        say(f"{name} has died; its log is in {bed.directory / 'log'}")
