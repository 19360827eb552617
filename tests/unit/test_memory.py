"""The control group of a process: its limit and its out-of-memory kills, in both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcresume.memory import MemoryGroup

NO_LIMIT_V1 = "9223372036854771712\n"
OOM_CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"
EVENTS = "low 0\nhigh 0\nmax 913\noom 4\noom_kill 3\noom_group_kill 0\n"
V1_TASK = "slurm_n1/uid_0/job_5/step_0/task_0"
V2_TASK = "system.slice/n1_slurmstepd.scope/job_5/step_0/user/task_0"


def group_of(tmp_path: Path, membership: str) -> MemoryGroup:
    """Return the group of a process whose membership reads so."""
    path = tmp_path / "self-cgroup"
    path.write_text(membership)
    return MemoryGroup.of_this_process(root=tmp_path / "cgroup", membership=path)


def write(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_step_under_version_1(tmp_path: Path) -> None:
    """As Slurm 22.05 lays it out: the step has the limit, its task the count."""
    write(
        tmp_path,
        {
            f"memory/{V1_TASK}/memory.oom_control": OOM_CONTROL,
            f"memory/{V1_TASK}/memory.limit_in_bytes": NO_LIMIT_V1,
            "memory/slurm_n1/uid_0/job_5/step_0/memory.limit_in_bytes": f"{400 << 20}\n",
            "memory/slurm_n1/uid_0/job_5/memory.limit_in_bytes": f"{400 << 20}\n",
            "memory/slurm_n1/uid_0/memory.limit_in_bytes": NO_LIMIT_V1,
            "memory/memory.limit_in_bytes": NO_LIMIT_V1,
        },
    )
    group = group_of(tmp_path, f"9:name=systemd:/\n4:memory:/{V1_TASK}\n0::/\n")
    assert (2, 400) == (group.kills(), group.limit_mib())


def test_a_step_under_version_2(tmp_path: Path) -> None:
    """As Slurm 24.11 lays it out: "max" is no limit, and the least one above it counts."""
    job = "system.slice/n1_slurmstepd.scope/job_5"
    write(
        tmp_path,
        {
            f"{V2_TASK}/memory.events": EVENTS,
            f"{V2_TASK}/memory.max": "max\n",
            f"{job}/step_0/user/memory.max": f"{900 << 20}\n",
            f"{job}/memory.max": f"{600 << 20}\n",
            "system.slice/memory.max": "max\n",
        },
    )
    group = group_of(tmp_path, f"0::/{V2_TASK}\n")
    assert (3, 600) == (group.kills(), group.limit_mib())


def test_version_1_beside_version_2(tmp_path: Path) -> None:
    """On a hybrid machine the memory controller is where its line says."""
    write(
        tmp_path,
        {"memory/a/memory.oom_control": OOM_CONTROL, "unified/b/cgroup.procs": "1\n"},
    )
    group = group_of(tmp_path, "0::/b\n4:memory:/a\n")
    assert (2, 0) == (group.kills(), group.limit_mib())


@pytest.mark.parametrize(
    "membership",
    ["", "0::/gone\n", "4:memory:/gone\n", "1:cpu,cpuacct:/a\n", "nonsense\n", "0::/../..\n"],
)
def test_nothing_can_be_read(tmp_path: Path, membership: str) -> None:
    """Without the files nobody knows, which is no error."""
    group = group_of(tmp_path, membership)
    assert (0, 0) == (group.kills(), group.limit_mib())


def test_no_membership(tmp_path: Path) -> None:
    """So it is without /proc."""
    group = MemoryGroup.of_this_process(root=tmp_path, membership=tmp_path / "absent")
    assert (0, 0) == (group.kills(), group.limit_mib())


def test_a_group_that_vanishes(tmp_path: Path) -> None:
    """A group that was there and is not any more counts as one that nobody can read."""
    write(tmp_path, {"a/memory.events": EVENTS})
    group = group_of(tmp_path, "0::/a\n")
    assert 3 == group.kills()
    (tmp_path / "cgroup/a/memory.events").unlink()
    assert 0 == group.kills()


def test_a_kernel_that_does_not_count(tmp_path: Path) -> None:
    """Before Linux 4.13 the file has no such line."""
    write(tmp_path, {"memory/a/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n"})
    assert 0 == group_of(tmp_path, "4:memory:/a\n").kills()
