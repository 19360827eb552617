"""Bring a testbed up, break it on purpose, and take it down again.

Every call is idempotent enough to be repeated after a kill: ``up`` refuses where a testbed
is up already and clears what a dead one left, ``down`` ends what is there and nothing else.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock

from hpcresume import slurm
from hpcresume.errors import SlurmRefusedError, SlurmUnreachableError, TestbedError
from hpcresume.testbed import cgroups, configure, daemons, packages, processes, releases
from hpcresume.testbed.state import (
    MAX_DIRECTORY_BYTES,
    NODES,
    SCRATCH,
    Daemon,
    Layout,
    Node,
    Ports,
    Proctrack,
    Release,
    Settings,
    State,
    boot_id,
    load,
    save,
)

_PORT_TRIES = 3
_CONTROLLER = "slurmctld"


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One node as Slurm and the process table see it."""

    name: str
    state: str
    """Slurm's word; ``unknown`` where the controller does not answer."""
    alive: bool
    """Whether its slurmd runs."""
    disk: Path
    """Its disk, seen from outside; the node itself sees it at ``Testbed.scratch``."""


@dataclass(frozen=True, slots=True)
class Testbed:
    """A testbed that is up."""

    __test__ = False  # the name starts with "Test"; pytest must not collect it

    directory: Path
    cluster: str
    conf: Path
    """What ``SLURM_CONF`` must name."""
    scratch: Path
    """Node-local disk, one path on every node, mode 1777."""
    proctrack: Proctrack
    accounting: bool
    release: Release | None
    """What it runs inside of; commands that talk to it must run there, too."""
    nodes: tuple[NodeStatus, ...]
    dead: tuple[str, ...]
    """Daemons that were started, are not running now, and were not killed by ``fail_node``."""


def up(directory: Path, settings: Settings | None = None) -> Testbed:
    """Bring up a Slurm on this machine and wait until its nodes are idle.

    Args:
        directory: Its own directory, made if need be; at most 56 bytes long.
        settings: What it is to be; by default what :class:`Settings` says.

    Raises:
        TestbedError: Something is missing, a testbed is up there already, or a daemon did
            not start; then everything started is ended again and the logs stay.
    """
    settings = settings or Settings()
    _check(settings)
    layout = _layout(directory)
    _own(layout)
    with FileLock(layout.lock):
        _refuse_if_up(layout)
        for attempt in range(1, _PORT_TRIES + 1):
            state = _new_state(layout, settings)
            try:
                _bring_up(state, layout)
            except daemons.PortTakenError:
                _take_down(state, layout)
                if attempt == _PORT_TRIES:
                    raise
            except BaseException:
                _take_down(state, layout)
                raise
            else:
                return _status(state, layout)
    raise AssertionError("unreachable: the last try returns or raises")


def down(directory: Path) -> bool:
    """End a testbed: its jobs, daemons, mounts and control groups; logs and disks stay.

    Returns:
        False where no testbed was up; calling it twice is harmless.

    Raises:
        TestbedError: A process survives SIGKILL.
    """
    layout = _layout(directory)
    if not layout.lock.exists():
        return False
    with FileLock(layout.lock):
        state = load(layout.root)
        if state is None:
            return False
        _take_down(state, layout)
        return True


def status(directory: Path) -> Testbed | None:
    """Return the testbed in ``directory``, None where none is up.

    Raises:
        TestbedError: Its state file cannot be read.
    """
    layout = _layout(directory)
    state = load(layout.root)
    return None if state is None or state.boot_id != boot_id() else _status(state, layout)


def release_of(directory: Path) -> Release | None:
    """Return the release that the testbed in ``directory`` is made of, None for the machine's.

    Raises:
        TestbedError: Its state file cannot be read.
    """
    state = load(_layout(directory).root)
    return None if state is None else state.release


def preempt(directory: Path, job: str, *, hold_s: int = 30) -> slurm.JobId:
    """Preempt a running job by a job in the partition ``high`` that needs its whole node.

    Args:
        directory: The testbed's directory.
        job: Job id, or ``array_index``; must be running in any partition but ``high``.
        hold_s: How long the preempting job keeps the node.

    Returns:
        Id of the preempting job, in the partition ``high``.

    Raises:
        TestbedError: No testbed is up, or the job does not run.
        SlurmUnreachableError: The controller does not answer.
    """
    state, layout = _require_up(directory)
    records = [info for info in slurm.show_job(job, conf=layout.conf) if info.node_list]
    if not records or records[0].state != "RUNNING":
        seen = records[0].state if records else "not known to Slurm, or without a node"
        raise TestbedError(f"job {job} cannot be preempted: it is {seen}. See: squeue", job=job)
    script = layout.etc / "preempt.sh"
    script.write_text(f"#!/bin/sh\nexec sleep {hold_s}\n", encoding="ascii")
    options = ["-J", "preempt", "-p", "high", "-w", str(records[0].node_list), "--exclusive"]
    options += ["-o", "/dev/null", "-t", "60", "-D", "/", f"--mem={state.memory_mb}"]
    return slurm.sbatch(options, script=script, conf=layout.conf)


def fail_node(directory: Path, node: str) -> None:
    """Kill a node's slurmd with SIGKILL; its jobs run on, unwatched, as after a network split.

    Slurm notices after about 40 s and requeues the jobs elsewhere.

    Raises:
        TestbedError: No testbed is up, no such node, or its slurmd is dead already.
    """
    layout = _layout(directory)
    with FileLock(layout.lock):
        state, layout = _require_up(directory)
        _kill(state, _running(state, f"slurmd-{state.node(node).name}"))


def restore_node(directory: Path, node: str) -> None:
    """Start a failed node's slurmd again, on the same disk; it kills what its jobs left.

    Raises:
        TestbedError: No testbed is up, no such node, or its slurmd runs.
    """
    layout = _layout(directory)
    with FileLock(layout.lock):
        state, layout = _require_up(directory)
        known = state.node(node)
        daemon = _daemon(state, f"slurmd-{known.name}")
        if daemon is not None and processes.alive(daemon):
            raise TestbedError(f"slurmd of {node} is running", node=node)
        daemons.start_slurmd(state, layout, known)


def pause_controller(directory: Path) -> None:
    """Freeze slurmctld with SIGSTOP: Slurm's commands wait for an answer that does not come.

    What they asked takes effect when it is continued, also if they gave up meanwhile.

    Raises:
        TestbedError: No testbed is up, or its slurmctld is dead.
    """
    _signal_controller(directory, signal.SIGSTOP)


def continue_controller(directory: Path) -> None:
    """Thaw a frozen slurmctld; harmless where it runs.

    Raises:
        TestbedError: No testbed is up, or its slurmctld is dead.
    """
    _signal_controller(directory, signal.SIGCONT)


def fail_controller(directory: Path) -> None:
    """Kill slurmctld with SIGKILL: Slurm's commands are refused at once; jobs run on.

    Raises:
        TestbedError: No testbed is up, or its slurmctld is dead already.
    """
    layout = _layout(directory)
    with FileLock(layout.lock):
        state, layout = _require_up(directory)
        _kill(state, _running(state, _CONTROLLER))


def restore_controller(directory: Path) -> None:
    """Start a killed slurmctld again and wait until it answers; it knows its jobs.

    Raises:
        TestbedError: No testbed is up, its slurmctld runs, or it does not start.
    """
    layout = _layout(directory)
    with FileLock(layout.lock):
        state, layout = _require_up(directory)
        daemon = _daemon(state, _CONTROLLER)
        if daemon is not None and processes.alive(daemon):
            raise TestbedError("slurmctld is running")
        daemons.await_slurmctld(daemons.start_slurmctld(state, layout, again=True), layout)


def _signal_controller(directory: Path, number: signal.Signals) -> None:
    state, _ = _require_up(directory)
    processes.send(_running(state, _CONTROLLER), number)


def _running(state: State, name: str) -> Daemon:
    daemon = _daemon(state, name)
    if daemon is None or not processes.alive(daemon):
        raise TestbedError(
            f"{name} is not running. To start it: hpcresume testbed restore-node, or "
            "hpcresume testbed controller restore",
            daemon=name,
        )
    return daemon


def _kill(state: State, daemon: Daemon) -> None:
    # Forgotten first: a daemon that is recorded and dead counts as one that crashed.
    state.daemons.remove(daemon)
    save(state)
    processes.send(daemon, signal.SIGKILL)
    processes.wait_until(lambda: not processes.alive(daemon), 10)


def _layout(directory: Path) -> Layout:
    path = Path(os.path.abspath(directory))
    length = len(os.fsencode(path))
    if length > MAX_DIRECTORY_BYTES or any(c.isspace() or c in "%,#" for c in str(path)):
        raise TestbedError(
            f"{path}: not usable for a testbed ({length} bytes; at most {MAX_DIRECTORY_BYTES}, "
            "without spaces, '%', ',' and '#'). Slurm's sockets lie in it, and their names are "
            "short. Choose another directory, say /tmp/testbed",
            path=str(path),
        )
    return Layout(path)


def _check(settings: Settings) -> None:
    packages.require(accounting=settings.accounting)
    if settings.max_submit is not None and not settings.accounting:
        raise TestbedError(
            "a limit of submitted jobs is kept by slurmdbd, and this testbed is to have none. "
            "Leave out either --max-submit or --no-accounting"
        )
    if settings.proctrack == "cgroup" and not cgroups.usable():
        raise TestbedError(
            "proctrack/cgroup needs cgroup v1 (memory and freezer below /sys/fs/cgroup), which "
            "this machine does not have or this user may not write. Use --proctrack linuxproc: "
            "all works but memory limits"
        )


def _proctrack(wanted: Literal["auto", "cgroup", "linuxproc"]) -> Proctrack:
    if wanted == "auto":
        return "cgroup" if cgroups.usable() else "linuxproc"
    return wanted


def _own(layout: Layout) -> None:
    layout.root.mkdir(parents=True, exist_ok=True)
    # Folders named log and scratch will be removed in there: they must not be somebody's.
    if any(layout.root.iterdir()) and not layout.lock.exists():
        raise TestbedError(
            f"{layout.root} is not empty and holds no testbed's files. A testbed needs a "
            "directory of its own, which it clears. Name a new one",
            path=str(layout.root),
        )
    layout.root.chmod(0o755)


def _refuse_if_up(layout: Layout) -> None:
    state = load(layout.root)
    if state is None:
        return
    if state.boot_id == boot_id() and any(map(processes.alive, state.daemons)):
        raise TestbedError(
            f"a testbed is up in {layout.root} already. "
            f"To use it: export SLURM_CONF={layout.conf}; "
            f"to end it: hpcresume testbed down {layout.root}",
            path=str(layout.root),
        )
    _take_down(state, layout)


def _new_state(layout: Layout, settings: Settings) -> State:
    ports = configure.free_ports(settings.nodes + 2)
    cluster = f"tb{secrets.token_hex(3)}"
    return State(
        directory=str(layout.root),
        cluster=cluster,
        boot_id=boot_id(),
        proctrack=_proctrack(settings.proctrack),
        memory_mb=settings.memory_mb or _share_of_memory_mb(settings.nodes),
        settings=settings,
        ports=Ports(slurmctld=ports[0], slurmdbd=ports[1]),
        nodes=[Node(f"{cluster}n{i}", port) for i, port in enumerate(ports[2:], start=1)],
        daemons=[],
        release=releases.here(),
    )


def _share_of_memory_mb(nodes: int) -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    return max(256, total * 9 // 10 // nodes)


def _bring_up(state: State, layout: Layout) -> None:
    _prepare(state, layout)
    with ThreadPoolExecutor(1) as pool:
        database = pool.submit(daemons.make_database, layout) if state.settings.accounting else None
        daemons.start_munged(state, layout)
        if database is not None:
            database.result()
            daemons.start_database(state, layout)
            daemons.start_slurmdbd(state, layout)
    controller = daemons.start_slurmctld(state, layout)
    started = [daemons.start_slurmd(state, layout, node) for node in state.nodes]
    daemons.await_slurmctld(controller, layout)
    daemons.await_idle([controller, *started], layout)


def _prepare(state: State, layout: Layout) -> None:
    for path in [*layout.perishable(), layout.log, layout.nodes]:
        shutil.rmtree(path, ignore_errors=True)
    for path in (layout.etc, layout.log, layout.spool, layout.nodes, layout.scratch):
        path.mkdir()
        path.chmod(0o755)  # whatever the umask: every user's commands read slurm.conf
    layout.scratch.chmod(0o1777)
    layout.conf.write_text(configure.slurm_conf(state, layout), encoding="utf-8")
    layout.conf.chmod(0o644)
    if state.proctrack == "cgroup":
        (layout.etc / "cgroup.conf").write_text(configure.cgroup_conf(), encoding="utf-8")
    if state.settings.accounting:
        secret = layout.etc / "slurmdbd.conf"
        secret.touch(mode=0o600)
        secret.write_text(configure.slurmdbd_conf(state, layout), encoding="utf-8")
    save(state)


def _take_down(state: State, layout: Layout) -> None:
    if state.boot_id == boot_id():
        nodes = [d for d in state.daemons if d.name.startswith("slurmd-")]
        # Nothing of what ends must be saved, so that SIGKILL is enough for jobs and nodes.
        processes.end(nodes, grace_s=0)
        processes.kill_members([f"/{NODES}/{node.name}/{SCRATCH}" for node in state.nodes])
        processes.end([d for d in state.daemons if d.name == _CONTROLLER], grace_s=0)
        processes.end([d for d in state.daemons if d.name == "slurmdbd"], grace_s=0)
        processes.end(state.daemons, grace_s=0)
        if not cgroups.remove([node.name for node in state.nodes]):
            raise TestbedError(
                f"control groups of {state.cluster} are still in use. Call down again"
            )
    for path in layout.perishable():
        shutil.rmtree(path, ignore_errors=True)
    layout.state.unlink(missing_ok=True)


def _status(state: State, layout: Layout) -> Testbed:
    try:
        seen = {node.name: node.state for node in slurm.nodes(conf=layout.conf, timeout_s=5)}
    except (SlurmUnreachableError, SlurmRefusedError):
        seen = {}
    return Testbed(
        directory=layout.root,
        cluster=state.cluster,
        conf=layout.conf,
        scratch=layout.scratch,
        proctrack=state.proctrack,
        accounting=state.settings.accounting,
        release=state.release,
        nodes=tuple(_node_status(node, state, layout, seen) for node in state.nodes),
        dead=tuple(d.name for d in state.daemons if not processes.alive(d)),
    )


def _node_status(node: Node, state: State, layout: Layout, seen: dict[str, str]) -> NodeStatus:
    daemon = _daemon(state, f"slurmd-{node.name}")
    return NodeStatus(
        name=node.name,
        state=seen.get(node.name, "unknown"),
        alive=daemon is not None and processes.alive(daemon),
        disk=layout.node_scratch(node.name),
    )


def _daemon(state: State, name: str) -> Daemon | None:
    return next((daemon for daemon in state.daemons if daemon.name == name), None)


def _require_up(directory: Path) -> tuple[State, Layout]:
    layout = _layout(directory)
    state = load(layout.root)
    if state is None or state.boot_id != boot_id():
        raise TestbedError(
            f"no testbed is up in {layout.root}. To start one: hpcresume testbed up {layout.root}",
            path=str(layout.root),
        )
    return state, layout
