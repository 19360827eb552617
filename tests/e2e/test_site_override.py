"""A user's own site: the files of the README, modules, and Python within a container."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from tests.e2e.test_readme import write_site_files
from tests.support.cli import Command, logs_of, user_id, wait_until
from tests.support.cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

# Stands in for `apptainer exec IMAGE python`: its own mount namespace, in which the image's
# directory holds something, entered by exec; there is no container engine to test with.
CONTAINER = """\
#!/bin/sh
image=$1
shift
exec unshare --mount --propagation private sh -c '
    mount -t tmpfs -o mode=755 image "$0" && echo "inside" > "$0/contents" && exec "$@"
' "$image" "$@"
"""

# What `module` is at most centres: a function of the login shell, not a command.
MODULE = """\
module() { [ "$1" = load ] && export LOADED_MODULES="${LOADED_MODULES:+$LOADED_MODULES:}$2"; }
export -f module
"""

WHERE = '''
import os
import time
from pathlib import Path
import hpcresume as hr


def pipeline(image: Path, n: int = 200, ms: int = 0) -> hr.Pipeline:
    """Say what Python sees of its container and of its modules."""

    def look(i):
        time.sleep(ms / 1000)
        return {"i": i, "contents": (image / "contents").read_text().strip(),
                "modules": os.environ["LOADED_MODULES"]}

    return hr.Pipeline(name="where", sources=hr.indexed(n), stages=[look])
'''


def write(path: Path, text: str, *, mode: int = 0o644) -> Path:
    """Write a file that only its owner can change."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    for folder in (path.parent, path.parent.parent):
        folder.chmod(0o755)
    return path


class Contained:
    """A run whose site starts Python within the stand-in of a container."""

    def __init__(self, cluster: SlurmCluster) -> None:
        self.cluster, self.directory = cluster, cluster.home("contained")
        image = self.directory / "image"
        image.mkdir()
        enter = write(self.directory / "bin" / "enter", CONTAINER, mode=0o755)
        profile = write(self.directory / "etc" / "module.sh", MODULE)
        python = shlex.join([str(enter), str(image), sys.executable])
        site = {
            "setup": [f". {shlex.quote(str(profile))}", "module load python/3.12"],
            "python": python,
        }
        lines = [f"{key} = {json.dumps(value)}" for key, value in site.items()]
        text = "\n".join(["extends = 'testbed'", "[site]", *lines, ""])
        write(self.directory / "sites" / "boxed" / "site.toml", text)
        (self.directory / "where.py").write_text(WHERE)
        env = {**cluster.env, "HPCRESUME_SITE_PATH": str(self.directory / "sites")}
        self.command, self.run = Command(self.directory, env), self.directory / "run"
        self.image = image

    def submit(self, *options: str) -> None:
        """Submit the pipeline."""
        self.command.run(
            *("submit", "where.py", "--run-dir", "run", "--site", "boxed", "-c", "2"),
            *("--engine", "inline", "--local-dir", str(self.cluster.scratch)),
            *("--sync-interval", "1", "-P", f"image={self.image}", *options),
        )

    def rows(self) -> list[dict[str, object]]:
        """Return the run's rows."""
        self.command.run("collect", str(self.run), "-o", "out.jsonl")
        return [json.loads(line) for line in (self.directory / "out.jsonl").read_text().split()]

    def outcomes(self) -> list[dict[str, object]]:
        """Return how the attempts of task 0 in round 0 ended."""
        paths = sorted(self.run.glob("rounds/0000/tasks/00000/e*/outcome.json"))
        return [json.loads(path.read_bytes()) for path in paths]

    def wait_begun(self) -> None:
        """Wait until the first attempt has published something."""
        wait_until(
            lambda: sum(task["completed"] for task in self.command.status(self.run)["tasks"]),
            timeout_s=60,
            describe=lambda: self.cluster.evidence() + logs_of(self.run),
        )


@pytest.mark.skipif(user_id() != 0, reason="making a mount namespace needs root")
def test_python_in_a_container_after_module_load(slurm_cluster: SlurmCluster) -> None:
    """
    `site.python` may be a command that enters a container, `site.setup` may call a shell
    function; the tasks and the merge job run there.
    """
    contained = Contained(slurm_cluster)
    contained.submit()

    status = contained.command.wait_ended(contained.run)

    assert "complete" == status["state"], logs_of(contained.run)
    expected = {"contents": "inside", "modules": "python/3.12"}
    assert [{"i": i, **expected} for i in range(200)] == contained.rows()
    assert not (contained.image / "contents").exists()


@pytest.mark.skipif(user_id() != 0, reason="making a mount namespace needs root")
@pytest.mark.parametrize("event", ["preemption", "scancel"])
def test_signals_reach_python_in_a_container(slurm_cluster: SlurmCluster, event: str) -> None:
    """
    The wrapper ends in `exec`, so Slurm's SIGTERM reaches the supervisor: what was committed
    is published, and a preempted task goes on where it stopped.
    """
    contained = Contained(slurm_cluster)
    contained.submit("-Pms=100")
    contained.wait_begun()
    array = contained.command.status(contained.run)["rounds"][0]["job_id"]

    if event == "preemption":
        slurm_cluster.preempt(f"{array}_0", hold_s=5)
    else:
        slurm_cluster.run("scancel", f"{array}_0")
    wait_until(contained.outcomes, timeout_s=60, describe=lambda: logs_of(contained.run))

    first = contained.outcomes()[0]
    kind = "preempted" if event == "preemption" else "cancelled"
    assert ("saved", kind) == (first["state"], first["kind"])
    assert 0 < int(str(first["completed"])) < 200
    status = contained.command.wait_ended(contained.run)
    assert ("complete" if event == "preemption" else "stopped") == status["state"]
    assert first["completed"] <= status["sources"]["completed"]


PIPELINE = '''
import os
import hpcresume as hr


def pipeline() -> hr.Pipeline:
    """Say what the batch script has set."""
    names = ("LOADED_MODULES", "OMP_NUM_THREADS")
    return hr.Pipeline(
        name="set",
        sources=hr.indexed(8),
        stages=[lambda i: {name: os.environ.get(name) for name in names}],
    )
'''


def test_the_site_of_the_readme_runs(slurm_cluster: SlurmCluster) -> None:
    """
    The files that the README shows, written as they stand, are recognised by the variable
    they name: here, where the testbed's site is recognised too, both are named and nothing is
    submitted.  Chosen, their account, time limit and lines of the shell reach the jobs.
    """
    directory = slurm_cluster.home("readme")
    write_site_files(directory)
    (directory / "set.py").write_text(PIPELINE)
    # A batch script's bash reads this file first, as a login node's profile would be.
    profile = write(directory / "etc" / "module.sh", MODULE)
    here = {
        "HOME": str(directory),
        "CC_CLUSTER": "rorqual",
        "HPCRESUME_SITE_PATH": str(directory / "sites"),
        "BASH_ENV": str(profile),
    }
    command, run = Command(directory, {**slurm_cluster.env, **here}), directory / "run"
    submit = ["submit", "set.py", "--run-dir", "run", "--engine", "inline"]
    refused = command.start(*submit)
    _, said = refused.communicate(timeout=60)
    assert (15, False) == (refused.returncode, run.exists())
    assert "'ours' (CC_CLUSTER=rorqual)" in said
    assert "'testbed' (ClusterName=" in said

    command.run(*submit, "--site", "ours", "--local-dir", str(slurm_cluster.scratch))
    (merge,) = [p for p in (run / "rounds/0000/submit").iterdir() if p.name.startswith("merge")]

    assert "complete" == command.wait_ended(run)["state"], logs_of(run)

    command.run("collect", str(run), "-o", "out.jsonl")
    row = {"LOADED_MODULES": "StdEnv/2023:arrow/21", "OMP_NUM_THREADS": "1"}
    lines = (directory / "out.jsonl").read_text().splitlines()
    assert [row] * 8 == [json.loads(line) for line in lines]
    script = (run / "rounds/0000/submit/job.sh").read_text()
    assert "#SBATCH --account=def-physics" in script.splitlines()
    assert "module load StdEnv/2023 python/3.12" in merge.read_text().splitlines()
