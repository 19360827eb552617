"""Four array tasks on one node: four Ray heads side by side, and nothing of them afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.cli import Command, logs_of
from tests.support.cluster import SlurmCluster, cluster

pytestmark = [pytest.mark.slurm, pytest.mark.ray, pytest.mark.timeout(420)]

MEETING = '''
import os
import time
from pathlib import Path
import hpcresume as hr


def pipeline(heads: int, place: Path) -> hr.Pipeline:
    """Each task's source says which Ray head it runs under, once all heads are up together."""

    def meet(i):
        import ray

        context = ray.get_runtime_context()
        (place / str(i)).touch()
        while len(list(place.iterdir())) < heads:
            time.sleep(0.1)
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        return {"i": i, "gcs": context.gcs_address, "node": context.get_node_id(),
                "seen": nodes, "pid": os.getpid()}

    return hr.Pipeline(name="meeting", sources=hr.indexed(heads), stages=[meet])
'''
HEADS = 4


@pytest.fixture
def one_node() -> Iterator[SlurmCluster]:
    """Return a cluster of one node with room for four tasks."""
    with cluster(nodes=1, cpus_per_node=HEADS, accounting=False) as made:
        yield made


def test_four_heads_on_one_node(one_node: SlurmCluster) -> None:
    """
    Four array tasks have a Ray head each on one node at the same time, none sees another's,
    and afterwards no process, socket, shared memory or directory of theirs is left.
    """
    directory, place = one_node.folder("heads"), one_node.folder("meeting")
    (directory / "meeting.py").write_text(MEETING)
    command, run = Command(directory, one_node.env), directory / "run"
    shared_memory = "find /dev/shm -mindepth 1"
    before = one_node.run("srun", "sh", "-c", shared_memory)

    command.run(
        *("submit", "meeting.py", "--run-dir", "run", "--array", str(HEADS), "-c", "1"),
        *("--mem", "1000", "--local-dir", str(one_node.scratch)),
        *("-P", f"heads={HEADS}", "-P", f"place={place}"),
    )
    status = command.wait_ended(run, timeout_s=150)

    assert ("complete", 1) == (status["state"], len(status["rounds"])), logs_of(run)
    command.run("collect", str(run), "-o", "out.jsonl")
    rows = [json.loads(line) for line in (directory / "out.jsonl").read_text().splitlines()]
    assert HEADS == len({row["gcs"] for row in rows}) == len({row["node"] for row in rows})
    assert [[row["node"]] for row in rows] == [row["seen"] for row in rows]
    assert [] == left_on(one_node.disk(one_node.nodes[0]))
    assert before == one_node.run("srun", "sh", "-c", shared_memory)
    assert [] == processes_below(one_node.scratch)


def left_on(disk: Path) -> list[str]:
    """Return what is left on a node's disk, but for the locks that order the starts of heads."""
    return [
        str(path.relative_to(disk))
        for path in disk.rglob("*")
        if not path.name.startswith(("hpcresume-", "ray-start-"))
    ]


def processes_below(scratch: Path) -> list[list[str]]:
    """Return the command lines of living processes that name something on the nodes' disk."""
    found = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [words for words in found if any(f"{scratch}/" in word for word in words)]
