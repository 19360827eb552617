"""What a testbed consists of, on disk: its directory's layout and ``state.json``.

``state.json`` is written again after every process that is started, so that ``down`` finds
them also when ``up`` was killed half-way.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

from hpcresume.errors import TestbedError

Proctrack = Literal["cgroup", "linuxproc"]
DEFAULT_MAX_ARRAY_SIZE = 1001  # Slurm's own

# slurmstepd's sockets, <directory>/spool/<node>/<node>_123456.4294967291, must fit the 107
# bytes of sockaddr_un (unix(7)).
MAX_DIRECTORY_BYTES = 56
NODES = "nodes"
SCRATCH = "scratch"


class Settings(msgspec.Struct, frozen=True):
    """What a testbed is to be."""

    nodes: int = 4
    """Nodes, each with a private ``scratch`` and ``/dev/shm``."""
    cpus_per_node: int = 2
    """CPUs that Slurm hands out per node; more than the machine has is fine."""
    memory_mb: int | None = None
    """Memory per node in MiB; by default the machine's, divided."""
    proctrack: Proctrack | Literal["auto"] = "auto"
    """How Slurm follows processes.  ``cgroup`` limits memory and signals only a step's first
    process; ``linuxproc`` signals all of them.  ``auto``: cgroup where cgroup v1 is there."""
    accounting: bool = True
    """With slurmdbd and MariaDB, so that ``sacct`` answers."""
    max_array_size: int = DEFAULT_MAX_ARRAY_SIZE
    """Slurm's ``MaxArraySize``: the largest array index is one less."""
    max_submit: int | None = None
    """How many jobs one user may have in the queue, elements of arrays each counted; needs
    ``accounting``.  Only users in the machine's password database may then submit."""


class Release(msgspec.Struct, frozen=True):
    """A release of Debian in a folder of this machine."""

    name: str
    root: str


class Daemon(msgspec.Struct, frozen=True):
    """A process that belongs to a testbed, told from later ones with its id by its start."""

    name: str
    pid: int
    start_ticks: int
    """Start time in clock ticks since boot, field 22 of /proc/<pid>/stat."""


class Node(msgspec.Struct, frozen=True):
    """One node: a slurmd with its own disk."""

    name: str
    port: int


class Ports(msgspec.Struct, frozen=True):
    """TCP ports of a testbed's servers."""

    slurmctld: int
    slurmdbd: int


class State(msgspec.Struct):
    """Everything that ``down`` must know, as ``state.json`` holds it."""

    directory: str
    cluster: str
    boot_id: str
    proctrack: Proctrack
    memory_mb: int
    settings: Settings
    ports: Ports
    nodes: list[Node]
    daemons: list[Daemon]
    release: Release | None = None
    """What it is made of, where that is not the machine's own system."""
    schema: int = 1

    @property
    def cluster_name(self) -> str:
        """Slurm's ClusterName, by which the site ``testbed`` recognises it."""
        return f"hpcresume-testbed-{self.cluster}"

    def node(self, name: str) -> Node:
        """Return a node by its name, or by what follows the cluster's in it: ``n1``.

        Raises:
            TestbedError: There is none of that name.
        """
        for node in self.nodes:
            if name in {node.name, node.name.removeprefix(self.cluster)}:
                return node
        names = ", ".join(node.name for node in self.nodes)
        raise TestbedError(f"the testbed has no node {name!r}. Its nodes are {names}", node=name)


class Layout:
    """Names of everything inside a testbed's directory."""

    def __init__(self, directory: Path) -> None:
        self.root = directory
        self.state = directory / "state.json"
        self.lock = directory / "testbed.lock"
        self.etc = directory / "etc"
        self.conf = directory / "etc" / "slurm.conf"
        self.log = directory / "log"
        self.munge_key = directory / "munge" / "key"
        self.munge_socket = directory / "munge" / "socket"
        self.database = directory / "db" / "data"
        self.database_socket = directory / "db" / "socket"
        self.spool = directory / "spool"
        self.save = directory / "save"
        self.nodes = directory / NODES
        self.scratch = directory / SCRATCH
        """Where every node sees its own disk, and nobody else's."""

    def node_scratch(self, node: str) -> Path:
        """Return the directory that is a node's disk, as seen from outside the nodes."""
        return self.nodes / node / SCRATCH

    def perishable(self) -> list[Path]:
        """Return what a testbed that is down needs no longer; logs and scratch stay."""
        names = ("etc", "munge", "db", "spool", "save", "scratch")
        return [self.root / name for name in names]


def boot_id() -> str:
    """Return the kernel's id of this boot; process ids of another one mean nothing."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def save(state: State) -> None:
    """Replace ``state.json``."""
    path = Layout(Path(state.directory)).state
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(state), indent=2) + b"\n")
    os.replace(temporary, path)


def load(directory: Path) -> State | None:
    """Return the testbed's state, None where none is up in ``directory``.

    Raises:
        TestbedError: ``state.json`` cannot be read.
    """
    path = Layout(directory).state
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise TestbedError(
            f"{path}: cannot be read as a testbed's state: {error}. "
            "It names the processes to end. If none is left (ps -C slurmctld,slurmd), remove it",
            path=str(path),
        ) from error
