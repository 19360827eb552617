"""What the live Slurm is set to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from hpcresume import slurm
from hpcresume.doctor.check import Check
from hpcresume.errors import HpcResumeError, SlurmMissingError


def check_slurm() -> Iterator[Check]:
    """What the live Slurm is set to, where there is one."""
    if not slurm.available():
        remedy = "nothing, for runs on this machine; on a cluster: module load slurm"
        yield Check("slurm", "commands", "warning", "there is no sbatch on the path", remedy)
        return
    try:
        config, partitions = slurm.config(), slurm.partitions()
    except SlurmMissingError as error:
        yield Check("slurm", "commands", "warning", str(error))
        return
    except HpcResumeError as error:
        yield Check("slurm", "controller", "wrong", str(error), "scontrol ping")
        return
    cluster, version = config.get("ClusterName", "?"), config.get("SLURM_VERSION", "?")
    yield Check("slurm", "controller", "ok", f"{cluster}, Slurm {version}")
    for key in ("JobRequeue", "KillWait", "MaxArraySize", "MaxBatchRequeue", "MinJobAge"):
        if key in config:
            yield Check("slurm", key, "ok", config[key])
    yield _preemption(config, partitions)
    yield _accounting()


def _preemption(config: Mapping[str, str], partitions: Iterable[slurm.Partition]) -> Check:
    mode, kind = config.get("PreemptMode", "OFF"), config.get("PreemptType", "")
    if mode == "OFF" or not kind or kind.endswith("/none"):
        return Check("slurm", "preemption", "ok", "off")
    where = [
        f"{partition.name} {partition.preempt_mode} with {partition.grace_s or 0} s of grace"
        for partition in partitions
        if partition.preempt_mode not in {None, "OFF"}
    ]
    # Slurm 22.05 has the option under another name.
    words = config.get("PreemptParameters", "") + config.get("SlurmctldParameters", "")
    sent = "the job's own signal" if "send_user_signal" in words else "SIGTERM"
    found = f"{kind}, {mode}, announced by {sent}; {'; '.join(where) or 'no partition'}"
    if any(partition.preempt_mode == "CANCEL" for partition in partitions):
        remedy = "preempted tasks do not come back by themselves; the merge job deals them anew"
        return Check("slurm", "preemption", "warning", found, remedy)
    return Check("slurm", "preemption", "ok", found)


def _accounting() -> Check:
    try:
        slurm.accounting("1")
    except HpcResumeError as error:
        remedy = "how a job ended is asked of the controller, for as long as MinJobAge"
        return Check("slurm", "sacct", "warning", str(error), remedy)
    return Check("slurm", "sacct", "ok", "answers")
