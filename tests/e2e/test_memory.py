"""Out of memory on a real Slurm: the kernel's choice, who is charged, who gets more memory."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Command
from tests.support.cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(420)]

HUNGRY = '''
import os
import sys
import time
from pathlib import Path
import hpcresume as hr


def pipeline(
    n: int = 40, hungry: str = "7", mib: int = 700, how: str = "here", ms: int = 0
) -> hr.Pipeline:
    """Some of the sources fill so much memory: here, in a command, or so that the supervisor pays.

    Memory that belongs to no process in particular leaves the kernel's choice to the scores.
    """

    def work(i, ctx):
        time.sleep(ms / 1000)
        if str(i) in hungry.split(",") and how == "command":
            fill = f"b = bytearray({mib} << 20); b[::4096] = b'x' * len(b[::4096])"
            ctx.run([sys.executable, "-c", fill])
        elif str(i) in hungry.split(",") and how == "supervisor":
            Path(f"/proc/{os.getppid()}/oom_score_adj").write_text("1000")
            with open(os.memfd_create("hungry"), "wb") as file:
                for _ in range(mib):
                    file.write(bytes(1 << 20))
        elif str(i) in hungry.split(","):
            block = bytearray(mib << 20)
            block[:: 4096] = b"x" * len(block[:: 4096])
        return {"i": i}

    return hr.Pipeline(name="hungry", sources=hr.indexed(n), stages=[work])
'''


def submit(cluster: SlurmCluster, *options: str, **site: object) -> tuple[Command, Path]:
    """Submit the hungry pipeline from a fresh directory and return the command and the run."""
    directory = cluster.folder("memory")
    (directory / "hungry.py").write_text(HUNGRY)
    env = {f"HPCRESUME_SITE__{key.upper()}": str(value) for key, value in site.items()}
    command = Command(directory, {**cluster.env, **env})
    command.run(
        *("submit", "hungry.py", "--run-dir", "run", "--local-dir", str(cluster.scratch)),
        *("--sync-interval", "1", *options),
    )
    return command, directory / "run"


def rows_of(command: Command, run: Path, *, rc: int = 0) -> list[int]:
    """Return the sources that have a row, in the order of the results."""
    command.run("collect", str(run), "-o", "out.jsonl", rc=rc)
    lines = (command.directory / "out.jsonl").read_text().splitlines()
    return [json.loads(line)["i"] for line in lines]


def asked(run: Path, round_: int) -> list[tuple[str, str]]:
    """Return the indexes and the memory that each array of a round was submitted with."""
    scripts = sorted((run / f"rounds/{round_:04d}").glob("submit*/job.sh"))
    found = [re.findall(r"#SBATCH --(?:array|mem)=(\S+)", path.read_text()) for path in scripts]
    return [(indexes, mem) for indexes, mem in found]


def outcomes(run: Path, round_: int) -> list[dict[str, Any]]:
    """Return how the attempts of a round ended, by task and attempt."""
    paths = sorted(run.glob(f"rounds/{round_:04d}/tasks/*/e*/outcome.json"))
    return [json.loads(path.read_bytes()) for path in paths]


@pytest.mark.ray
def test_worker(cgroup_cluster: SlurmCluster) -> None:
    """
    The kernel takes the worker, not the driver: the guilty source alone goes to the next
    round, which asks for half as much memory again for it, and completes; all others
    complete in the attempt that it hit, and nobody else is charged.
    """
    command, run = submit(
        cgroup_cluster, "-c", "2", "--mem", "1200M", "-P", "mib=1000", "--array", "1"
    )

    status = command.wait_ended(run)

    assert ("complete", 2) == (status["state"], len(status["rounds"])), status
    assert [("0-0", "1200M")] == asked(run, 0)
    assert [("0-0", "1800M")] == asked(run, 1)
    assert [(1, 39), (1, 1)] == [(t["attempt"], t["completed"]) for t in status["tasks"]]
    assert list(range(40)) == rows_of(command, run)


def test_driver(cgroup_cluster: SlurmCluster) -> None:
    """
    Where the driver is the largest the kernel takes it: what was committed is published, and
    what was in flight, it alone, goes to an array of its own with more memory, beside the
    array of the rest.
    """
    command, run = submit(
        cgroup_cluster, "--engine", "inline", "--mem", "600M", "-P", "hungry=0", "-c", "1"
    )

    status = command.wait_ended(run)

    first, *_ = outcomes(run, 0)
    assert ("saved", "out-of-memory") == (first["state"], first["kind"])
    assert "complete" == status["state"], status
    assert [("0-0", "600M"), ("1-1", "900M")] == asked(run, 1)
    (merge,) = (run / "rounds/0001/submit").glob("merge-*.sh")
    rest, more = status["rounds"][1]["job_id"].split(",")
    assert f"--dependency=afterany:{rest}:{more}\n" in merge.read_text()
    assert [] == command.json("failures", str(run))["failures"]
    assert list(range(40)) == rows_of(command, run)


def test_driver_after_progress(cgroup_cluster: SlurmCluster) -> None:
    """
    A task whose driver ran out of memory after it had completed something goes on with its
    rest at once; only what was in flight waits for the next round, and for more memory.
    """
    command, run = submit(
        *(cgroup_cluster, "--engine", "inline", "--mem", "600M", "-c", "1"),
        *("-P", "hungry=30", "-P", "ms=100"),
    )

    status = command.wait_ended(run)

    first, second = outcomes(run, 0)
    assert ("saved", "out-of-memory") == (first["state"], first["kind"])
    assert "done" == second["state"]
    assert 20 < first["completed"] <= 30
    assert ("complete", 2) == (status["state"], len(status["rounds"])), status
    assert [("0-0", "900M")] == asked(run, 1)
    assert 40 == sum(ended["completed"] for ended in (first, second, *outcomes(run, 1)))
    assert list(range(40)) == rows_of(command, run)


def test_command(cgroup_cluster: SlurmCluster) -> None:
    """
    A command of a stage is larger than its worker, so the kernel takes it: its source is
    tried once more alone, and then, it alone, with more memory; the attempt goes on.
    """
    command, run = submit(
        cgroup_cluster, "--engine", "inline", "--mem", "600M", "-P", "how=command", "-c", "1"
    )

    status = command.wait_ended(run)

    assert ("complete", 2) == (status["state"], len(status["rounds"])), status
    assert [("0-0", "900M")] == asked(run, 1)
    assert [(1, 39), (1, 1)] == [(t["attempt"], t["completed"]) for t in status["tasks"]]
    assert list(range(40)) == rows_of(command, run)


def test_whole_step(cgroup_cluster: SlurmCluster) -> None:
    """
    Where the kernel takes the supervisor, and with it the whole step, nobody is left to say
    what was in flight: Slurm tells why the task ended, and all that is left of it gets more.
    """
    command, run = submit(
        *(cgroup_cluster, "--engine", "inline", "--mem", "600M", "-c", "1"),
        *("-P", "hungry=20", "-P", "how=supervisor", "-P", "mib=600"),
    )

    status = command.wait_ended(run)

    assert [] == outcomes(run, 0)
    assert ("complete", 2) == (status["state"], len(status["rounds"])), status
    assert [("0-0", "900M")] == asked(run, 1)
    assert [] == command.json("failures", str(run))["failures"]
    assert list(range(40)) == rows_of(command, run)


def test_never_fits(cgroup_cluster: SlurmCluster) -> None:
    """
    A source that does not fit into the most that the site grants is charged there like any
    other failure, and ends quarantined with the memory named and what to do.
    """
    command, run = submit(
        *(cgroup_cluster, "--engine", "inline", "--mem", "400M", "-c", "1"),
        *("-P", "hungry=3", "-P", "n=6", "--max-attempts", "2"),
        memory_max="500M",
    )

    status = command.wait_ended(run)

    (failure,) = command.json("failures", str(run))["failures"]
    assert ("incomplete", 5, 1) == (
        status["state"],
        status["sources"]["completed"],
        status["sources"]["quarantined"],
    )
    assert ("3", "out-of-memory") == (failure["source"], failure["kind"])
    assert "500 MiB were not enough" in failure["message"]
    assert "site.memory_max" in failure["message"]
    assert [0, 1, 2, 4, 5] == rows_of(command, run, rc=1)
