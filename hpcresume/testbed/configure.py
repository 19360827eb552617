"""The configuration files of a testbed and the ports in them."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

from hpcresume.errors import TestbedError
from hpcresume.testbed.state import Layout, State

# Below Linux's ephemeral ports (ip_local_port_range starts at 32768), so that no outgoing
# connection takes a port between this check and the daemon's bind.
_PORTS = range(20_000, 32_000)

_PARTITIONS = {
    "low": "DefaultTime=60 Default=YES PriorityTier=1 GraceTime=15 PreemptMode=REQUEUE",
    "nograce": "DefaultTime=60 PriorityTier=1 GraceTime=0 PreemptMode=REQUEUE",
    "cancel": "DefaultTime=60 PriorityTier=1 GraceTime=10 PreemptMode=CANCEL",
    "high": "DefaultTime=60 PriorityTier=10 PreemptMode=OFF",
}


def free_ports(count: int) -> list[int]:
    """Return distinct TCP ports that are free on every address now.

    Raises:
        TestbedError: So few are free that a thousand tries do not find them.
    """
    with ExitStack() as held:
        found: list[int] = []
        for port in random.SystemRandom().sample(_PORTS, k=1000):
            probe = held.enter_context(socket.socket())
            try:
                probe.bind(("", port))
            except OSError:
                continue
            found.append(port)
            if len(found) == count:
                return found
    raise TestbedError(
        f"found only {len(found)} of {count} free TCP ports between {_PORTS.start} and "
        f"{_PORTS.stop}. Other testbeds may still be up: ps -C slurmctld,slurmd"
    )


def slurm_conf(state: State, layout: Layout) -> str:
    """Return slurm.conf."""
    host = socket.gethostname().partition(".")[0]
    cpus = state.settings.cpus_per_node
    names = ",".join(node.name for node in state.nodes)
    settings = {**_identity(state, layout), **_behaviour(state), **_accounting(state, layout)}
    lines = [f"{key}={value}" for key, value in settings.items()]
    lines += [
        f"NodeName={node.name} NodeHostname={host} NodeAddr=127.0.0.1 Port={node.port} "
        f"CPUs={cpus} Boards=1 SocketsPerBoard=1 "
        f"CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory={state.memory_mb} "
        "State=UNKNOWN"
        for node in state.nodes
    ]
    lines += [
        # LLN: one-CPU jobs are spread over the nodes, not packed on the first.
        f"PartitionName={name} Nodes={names} State=UP LLN=YES MaxTime=INFINITE {rest}"
        for name, rest in _PARTITIONS.items()
    ]
    return "\n".join(lines) + "\n"


def _identity(state: State, layout: Layout) -> dict[str, object]:
    return {
        "ClusterName": state.cluster_name,
        "SlurmctldHost": "localhost(127.0.0.1)",
        "SlurmctldPort": state.ports.slurmctld,
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        "CredType": "cred/munge",
        # cred_expire: a requeued job waits for its old credential to expire, 121 s by default.
        "AuthInfo": f"socket={layout.munge_socket},cred_expire=5",
        "StateSaveLocation": layout.save,
        "SlurmdSpoolDir": f"{layout.spool}/%n",
        "SlurmctldPidFile": layout.spool / "slurmctld.pid",
        "SlurmdPidFile": f"{layout.spool}/slurmd-%n.pid",
        "SlurmctldLogFile": layout.log / "slurmctld.log",
        "SlurmdLogFile": f"{layout.log}/slurmd-%n.log",
        "SlurmctldSyslogDebug": "quiet",
        "SlurmdSyslogDebug": "quiet",
    }


def _behaviour(state: State) -> dict[str, object]:
    confined = state.proctrack == "cgroup"
    return {
        "ProctrackType": f"proctrack/{state.proctrack}",
        "TaskPlugin": "task/cgroup" if confined else "task/none",
        "JobAcctGatherType": "jobacct_gather/linux",
        "SlurmdParameters": "config_overrides",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "DefMemPerCPU": state.memory_mb // state.settings.cpus_per_node,
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": (
            "bf_interval=2,sched_interval=2,batch_sched_delay=0,sched_min_interval=0"
        ),
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "JobRequeue": 1,
        "KillWait": 5,
        "SlurmdTimeout": 20,
        "ReturnToService": 2,
        "MaxArraySize": state.settings.max_array_size,
        "MpiDefault": "none",
        "PropagateResourceLimits": "NONE",
    }


def _accounting(state: State, layout: Layout) -> dict[str, object]:
    if not state.settings.accounting:
        return {"AccountingStorageType": "accounting_storage/none"}
    # Only with limits: jobs of users without an association are then refused.
    enforced = (
        {"AccountingStorageEnforce": "limits"} if state.settings.max_submit is not None else {}
    )
    return {
        **enforced,
        "AccountingStorageType": "accounting_storage/slurmdbd",
        "AccountingStorageHost": "localhost",
        "AccountingStoragePort": state.ports.slurmdbd,
        # Despite its name munge's socket for slurmdbd, which does not look at AuthInfo.
        "AccountingStoragePass": layout.munge_socket,
    }


def cgroup_conf() -> str:
    """Return cgroup.conf: memory is limited, CPUs are not (nodes share the machine's)."""
    return "CgroupPlugin=cgroup/v1\nConstrainRAMSpace=yes\n"


def slurmdbd_conf(state: State, layout: Layout) -> str:
    """Return slurmdbd.conf; its user must be its only reader."""
    settings = {
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={layout.munge_socket}",
        "DbdHost": "localhost",  # an address is refused at start
        "DbdPort": state.ports.slurmdbd,
        "SlurmUser": "root",
        "StorageType": "accounting_storage/mysql",
        "StorageHost": "localhost",
        "StorageUser": "root",
        "StorageLoc": "slurm_acct_db",
        "LogFile": layout.log / "slurmdbd.log",
        "PidFile": layout.spool / "slurmdbd.pid",
    }
    return "".join(f"{key}={value}\n" for key, value in settings.items())
