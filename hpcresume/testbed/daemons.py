"""Start each server of a testbed and wait until it answers, with its log as evidence if not."""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from hpcresume import slurm
from hpcresume.errors import SlurmRefusedError, SlurmUnreachableError, TestbedError
from hpcresume.testbed import processes
from hpcresume.testbed.packages import SEARCH_PATH
from hpcresume.testbed.state import Daemon, Layout, Node, State, save

_TRIES = 3


class PortTakenError(TestbedError):
    """Another process took a port between the check and the daemon's bind; try other ports."""


def environment(layout: Layout) -> dict[str, str]:
    """Return the environment of the testbed's daemons."""
    return {
        "PATH": SEARCH_PATH,
        "LANG": "C",
        "SLURM_CONF": str(layout.conf),
        # slurmdbd's client library takes its socket from here only.
        "MYSQL_UNIX_PORT": str(layout.database_socket),
    }


def start_munged(state: State, layout: Layout) -> None:
    """Start munged with a key of its own; its socket is what ``AuthInfo`` names."""
    folder = layout.munge_key.parent
    folder.mkdir()
    folder.chmod(0o755)
    layout.munge_key.touch(mode=0o600)
    layout.munge_key.write_bytes(os.urandom(128))
    # --force: the directories above may be writable by others, which munged refuses.
    command = ["munged", "--foreground", "--force", f"--key-file={layout.munge_key}"]
    command += [f"--socket={layout.munge_socket}", f"--pid-file={folder / 'pid'}"]
    command += [f"--seed-file={folder / 'seed'}", f"--log-file={layout.log / 'munged.log'}"]
    daemon = _start(state, layout, "munged", command)
    _await(daemon, layout, lambda: _answers(layout.munge_socket), timeout_s=20)


def make_database(layout: Layout) -> None:
    """Create MariaDB's data directory.

    Raises:
        TestbedError: mariadb-install-db failed.
    """
    command = ["mariadb-install-db", "--no-defaults", "--user=root", "--skip-test-db"]
    command += [f"--datadir={layout.database}", "--auth-root-authentication-method=socket"]
    command += ["--innodb-log-file-size=8M", "--innodb-flush-log-at-trx-commit=0"]
    # On a busy machine it fails once in a while, for no reason of ours.
    for _ in range(_TRIES):
        shutil.rmtree(layout.database, ignore_errors=True)
        layout.database.mkdir(parents=True)
        done = subprocess.run(
            command, env=environment(layout), capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return
    output = done.stdout + done.stderr
    # What went wrong stands above a page of general advice.
    wrong = [line for line in output.splitlines() if "error" in line.lower()]
    output = "\n".join(wrong[:20]) or output.strip()[-1500:]
    raise TestbedError(f"MariaDB's data directory could not be made: {output}")


def start_database(state: State, layout: Layout) -> None:
    """Start MariaDB on its socket alone, with an empty database for slurmdbd.

    slurmdbd would make it, too, but does not survive that: libmariadb 3.4.10 answers nothing
    on a connection that had named a missing database first.
    """
    first = layout.database.parent / "first.sql"
    first.write_text("CREATE DATABASE IF NOT EXISTS slurm_acct_db;\n", encoding="ascii")
    command = ["mariadbd", "--no-defaults", "--user=root", "--skip-networking"]
    command += [f"--datadir={layout.database}", f"--socket={layout.database_socket}"]
    command += [f"--init-file={first}", f"--pid-file={layout.database.parent / 'pid'}"]
    command += ["--innodb-log-file-size=8M"]
    command += ["--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=32M"]
    # slurmdbd does not take it, and older servers do not know it.
    command += ["--loose-innodb-snapshot-isolation=OFF"]
    daemon = _start(state, layout, "mariadbd", command)
    _await(daemon, layout, lambda: _answers(layout.database_socket), timeout_s=60)


def start_slurmdbd(state: State, layout: Layout) -> None:
    """Start slurmdbd and register the cluster, without which slurmctld would not start."""
    for left in reversed(range(_TRIES)):
        daemon = _start(state, layout, "slurmdbd", ["slurmdbd", "-D"])
        try:
            _await(daemon, layout, lambda: _listens(state.ports.slurmdbd), timeout_s=60)
            break
        except PortTakenError:
            raise
        except TestbedError:
            # It gives up at the first query that the database does not answer as it should.
            if not left or processes.alive(daemon):
                raise
    _await(daemon, layout, lambda: _registers(state.cluster_name, layout.conf), timeout_s=60)
    if state.settings.max_submit is not None:
        _limit_submits(state.settings.max_submit, conf=layout.conf)


def _registers(cluster: str, conf: Path) -> bool:
    """Tell whether slurmdbd has taken the cluster; at first it may refuse without a reason."""
    try:
        slurm.change_accounting(["add", "cluster", cluster], conf=conf)
    except SlurmUnreachableError:
        return False
    except SlurmRefusedError as error:
        return "already exists" in error.fields["stderr"]
    return True


def _limit_submits(jobs: int, *, conf: Path) -> None:
    """Let every user of this machine have so many jobs, through the default QOS."""
    users = ",".join(sorted(entry.pw_name for entry in pwd.getpwall()))
    for words in (
        ["modify", "qos", "normal", "set", f"MaxSubmitJobsPerUser={jobs}"],
        ["add", "account", "everyone"],
        ["add", "user", users, "account=everyone"],
    ):
        slurm.change_accounting(words, conf=conf)


def start_slurmctld(state: State, layout: Layout, *, again: bool = False) -> Daemon:
    """Start the controller; :func:`await_slurmctld` waits for it.

    Args:
        state: The testbed.
        layout: Its files.
        again: After a kill: files that it had not yet saved are no reason to give up.
    """
    layout.save.mkdir(exist_ok=True)
    lenient = ["-i"] if again else []
    command = ["slurmctld", "-D", *lenient, "-f", str(layout.conf)]
    return _start(state, layout, "slurmctld", command)


def await_slurmctld(daemon: Daemon, layout: Layout) -> None:
    """Wait until the controller answers."""
    _await(daemon, layout, lambda: slurm.ping(conf=layout.conf), timeout_s=60)


def start_slurmd(state: State, layout: Layout, node: Node) -> Daemon:
    """Start a node: a mount namespace with a disk and a /dev/shm of its own, and its slurmd."""
    disk = layout.node_scratch(node.name)
    disk.mkdir(parents=True, exist_ok=True)
    disk.chmod(0o1777)
    (layout.spool / node.name).mkdir(exist_ok=True)
    script = (
        "set -e\n"
        f"mount --bind {shlex.quote(str(disk))} {shlex.quote(str(layout.scratch))}\n"
        "mount -t tmpfs -o mode=1777 shm /dev/shm\n"
        f"exec slurmd -D -N {node.name} -f {shlex.quote(str(layout.conf))}\n"
    )
    command = ["unshare", "--mount", "sh", "-c", script]
    return _start(state, layout, f"slurmd-{node.name}", command)


def await_idle(daemons: list[Daemon], layout: Layout) -> None:
    """Wait until every node is idle."""

    def idle() -> bool:
        for daemon in daemons:
            _check(daemon, layout)
        return all(node.state == "idle" for node in slurm.nodes(conf=layout.conf))

    if not processes.wait_until(idle, 60):
        seen = ", ".join(f"{n.name} {n.state}" for n in slurm.nodes(conf=layout.conf))
        raise TestbedError(
            f"the nodes are not idle after 60 s: {seen}.\n{tail(layout, 'slurmctld')}"
        )


def tail(layout: Layout, name: str, *, lines: int = 15) -> str:
    """Return the last lines of a daemon's log, headed by its path."""
    for path in (layout.log / f"{name}.log", layout.log / f"{name}.out"):
        if path.exists() and path.stat().st_size:
            text = path.read_text(encoding="utf-8", errors="replace")
            return "\n".join([f"{path}:", *text.splitlines()[-lines:]])
    return f"{layout.log}: no log of {name}"


def _start(state: State, layout: Layout, name: str, command: list[str]) -> Daemon:
    # Found now: the launcher would report a missing command in the log only.
    program = shutil.which(command[0], path=SEARCH_PATH) or command[0]
    daemon = processes.start(
        name,
        [program, *command[1:]],
        log=layout.log / f"{name}.out",
        environment=environment(layout),
    )
    state.daemons = [d for d in state.daemons if d.name != name or processes.alive(d)] + [daemon]
    save(state)
    return daemon


def _await(daemon: Daemon, layout: Layout, ready: Callable[[], bool], *, timeout_s: float) -> None:
    def answers() -> bool:
        _check(daemon, layout)
        return ready()

    if not processes.wait_until(answers, timeout_s):
        raise TestbedError(
            f"{daemon.name} does not answer after {timeout_s:g} s.\n{tail(layout, daemon.name)}"
        )


def _check(daemon: Daemon, layout: Layout) -> None:
    if processes.alive(daemon):
        return
    evidence = tail(layout, daemon.name)
    kind = PortTakenError if "Address already in use" in evidence else TestbedError
    raise kind(f"{daemon.name} ended while starting.\n{evidence}", daemon=daemon.name)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
