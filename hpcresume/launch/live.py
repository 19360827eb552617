"""What the live Slurm answers about itself, in the words of our settings."""

from __future__ import annotations

import getpass
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from hpcresume import slurm
from hpcresume.errors import SlurmRefusedError

_NUMBER = re.compile(r"\d+")
_TASK_LIMIT = re.compile(r"\bmax_array_tasks=(\d+)")


class Live(msgspec.Struct, frozen=True):
    """What Slurm answered.

    Attributes:
        config: Its settings, as ``scontrol show config`` names them.
        partitions: The partitions that this user can see.
        qualities: The qualities of service; empty without accounting.
        associations: What this user may submit under; empty without accounting.
        no_accounting: Why the two are empty, or the empty string.
    """

    config: Mapping[str, str]
    partitions: tuple[slurm.Partition, ...]
    qualities: tuple[slurm.Qos, ...]
    associations: tuple[slurm.Association, ...]
    no_accounting: str

    @property
    def cluster_name(self) -> str:
        """Slurm's ClusterName."""
        return self.config.get("ClusterName", "")

    @property
    def max_array_size(self) -> int:
        """As :func:`max_array_size`."""
        return max_array_size(self.config)

    @property
    def kill_wait_s(self) -> int:
        """Seconds from SIGTERM to SIGKILL; Slurm waits five at least."""
        return max(5, _number(self.config.get("KillWait"), default=30))

    @property
    def drain_s(self) -> float:
        """What can be spent on draining, so that publishing and requeuing still fit."""
        return round(self.kill_wait_s * 0.6, 1)

    @property
    def default_partition(self) -> slurm.Partition | None:
        """The partition of jobs that name none."""
        return next((partition for partition in self.partitions if partition.default), None)

    @property
    def enforced(self) -> frozenset[str]:
        """What of the accounting holds for jobs: ``associations``, ``limits``, ``qos``, ..."""
        return frozenset(self.config.get("AccountingStorageEnforce", "").split(","))

    def submit_limit(self, *, account: str, partition: str, qos: str) -> tuple[int, str] | None:
        """Return how many jobs this user may have in the queue and what says so, or None."""
        mine = [
            one
            for one in self.associations
            if account in {"", one.account} and one.partition in {None, partition}
        ]
        chosen = next((one for one in self.partitions if one.name == partition), None)
        names: set[str | None] = {qos} if qos else {_default_qos(one) for one in mine}
        names |= {chosen.qos} if chosen else set()
        found = [
            *((one.max_submit, f"QOS {one.name}") for one in self.qualities if one.name in names),
            *((one.max_submit, f"account {one.account}") for one in mine),
        ]
        limits = [(limit, where) for limit, where in found if limit is not None]
        return min(limits) if limits and "limits" in self.enforced else None


def _default_qos(association: slurm.Association) -> str:
    """Return the quality of service of jobs that name none."""
    only = association.qos[0] if len(association.qos) == 1 else "normal"
    return association.default_qos or only


def ask(*, conf: Path | None = None) -> Live:
    """Ask the live Slurm everything that the settings are compared with.

    Raises:
        SlurmMissingError: There is no Slurm here.
        SlurmUnreachableError: The controller does not answer.
        SlurmRefusedError: It refuses to show its configuration.
    """
    config = slurm.config(conf=conf)
    partitions = tuple(slurm.partitions(conf=conf))
    try:
        qualities = tuple(slurm.qualities(conf=conf))
        cluster = config.get("ClusterName", "")
        mine = tuple(slurm.associations(getpass.getuser(), cluster=cluster, conf=conf))
    except (slurm.AccountingUnavailableError, SlurmRefusedError) as error:
        return Live(config, partitions, (), (), no_accounting=str(error))
    return Live(config, partitions, qualities, mine, no_accounting="")


def max_array_size(config: Mapping[str, str]) -> int:
    """Return the largest index of an array plus one, or the largest count if that is less.

    Below 2 there are no arrays.
    """
    tasks = _TASK_LIMIT.search(config.get("SchedulerParameters", ""))
    size = _number(config.get("MaxArraySize"), default=1001)
    return min(size, int(tasks[1])) if tasks else size


def _number(text: str | None, *, default: int) -> int:
    match = _NUMBER.match(text or "")
    return int(match[0]) if match else default
