"""`site check`, `site new` and `doctor` at a real Slurm; every shipped site before its sbatch."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from hpcresume import slurm
from hpcresume.config import site_names
from hpcresume.launch.rendering import render_array, render_merge
from tests.support.cli import Command
from tests.support.cluster import SlurmCluster
from tests.unit.launch.jobs import array_job, bash_syntax, merge_job, settings
from tests.unit.launch.test_quoting import values

pytestmark = pytest.mark.slurm

# What the testbed has not, or has under other names.
ELSEWHERE = re.compile(
    r"^#SBATCH --(partition|account|qos|constraint|dependency)=.*\n", re.MULTILINE
)


@pytest.fixture
def command(slurm_cluster: SlurmCluster, tmp_path: Path) -> Command:
    """Return the command in an empty directory, talking to the cluster, with a site path."""
    here = {"HPCRESUME_SITE_PATH": str(tmp_path / "sites"), "XDG_CONFIG_HOME": str(tmp_path / "c")}
    return Command(tmp_path, {**slurm_cluster.env, **here})


def test_the_testbeds_site_agrees_with_its_slurm(command: Command) -> None:
    """The shipped site of the testbed is recognised, and nothing in it is wrong."""
    report = command.json("site", "check")

    assert "testbed" == report["site"]
    states = {finding["key"]: finding["state"] for finding in report["findings"]}
    assert [] == [key for key, state in states.items() if state == "wrong"]
    for key in ("job array", "merge job", "site.arrays", "site.max_array_size", "site.identify",
                "site.kill_wait_s", "site.memory_style", "site.required"):  # fmt: skip
        assert "ok" == states[key], key


def test_what_contradicts_the_live_slurm_is_wrong(command: Command, tmp_path: Path) -> None:
    """A site file that is not true is told so, with the live value, and the exit code is 15."""
    path = tmp_path / "sites" / "off" / "site.toml"
    path.parent.mkdir(parents=True)
    path.write_text(
        "[site]\nmax_array_size = 5000\nkill_wait_s = 77\n[request]\npartition = 'nowhere'\n"
    )
    path.chmod(0o644)

    report = command.json("site", "check", "off", rc=15)

    wrong = {f["key"]: f["write"] for f in report["findings"] if f["state"] == "wrong"}
    assert "site.max_array_size = 1001" == wrong["site.max_array_size"]
    assert "site.kill_wait_s = 5" == wrong["site.kill_wait_s"]
    assert {"request.partition", "job array", "merge job", "site.identify"} <= set(wrong)


def test_a_submit_limit_is_found(limited_cluster: SlurmCluster, tmp_path: Path) -> None:
    """A site that allows more jobs and larger arrays than the live Slurm is told both limits."""
    here = {"HPCRESUME_SITE_PATH": "", "XDG_CONFIG_HOME": str(tmp_path / "c")}
    report = Command(tmp_path, {**limited_cluster.env, **here}).json("site", "check", rc=15)

    wrong = {f["key"]: f["write"] for f in report["findings"] if f["state"] == "wrong"}
    assert "site.max_array_size = 8" == wrong["site.max_array_size"]
    assert "site.max_submit = 12" == wrong["site.max_submit"]


@pytest.mark.parametrize(("most", "state"), [("900T", "wrong"), ("100M", "ok")])
def test_more_memory_than_any_node_has(
    command: Command, tmp_path: Path, most: str, state: str
) -> None:
    """The most that a source is given has to be something that Slurm grants."""
    path = tmp_path / "sites" / "large" / "site.toml"
    path.parent.mkdir(parents=True)
    path.write_text(f"[site]\nmemory_max = '{most}'\n[request]\npartition = 'low'\n")
    path.chmod(0o644)

    report = command.json("site", "check", "large", rc=None)

    (found,) = [f for f in report["findings"] if f["key"] == "site.memory_max"]
    assert (state, most) == (found["state"], found["value"])
    assert f"--mem={most} is {'refused' if state == 'wrong' else 'taken'}" in found["reason"]


def test_a_new_site_is_right_about_the_slurm_it_came_from(
    command: Command, slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    """The written file names the cluster, is recognised from then on, and passes the check."""
    made = command.run("site", "new", "mine")
    path = tmp_path / "sites" / "mine" / "site.toml"
    assert str(path) == made.strip()
    assert 'partition = "low"' in path.read_text()
    before = path.read_bytes()

    report = command.json("site", "check")

    live = slurm.config(conf=slurm_cluster.conf)
    assert ("mine", live["ClusterName"]) == (report["site"], report["cluster"])
    assert [] == [f for f in report["findings"] if f["state"] == "wrong"]
    command.run("site", "new", "mine", rc=15)
    assert before == path.read_bytes()


def test_every_shipped_sites_scripts_pass_sbatch(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    """
    A real sbatch takes the array's and the merge job's script of every shipped site, once
    the names of things that this cluster has not are left out.
    """
    asked = {"account": "a", "partition": "p", "qos": "q", "constraint": "c", "time": "10",
             "mem": "100M", "cpus_per_task": 1}  # fmt: skip
    refused = {}
    for name in site_names({}):
        site = settings({"request": asked}, site=name)
        index = None if site.settings.site.arrays else 0
        array = array_job(run_dir=tmp_path, folder=tmp_path, log_dir=tmp_path, index=index)
        for kind, text in (
            ("array", render_array(array, site)),
            ("merge", render_merge(merge_job(run_dir=tmp_path, log_dir=tmp_path), site)),
        ):
            script = tmp_path / "job.sh"
            script.write_text(ELSEWHERE.sub("", text))
            try:
                slurm.would_accept(script=script, conf=slurm_cluster.conf)
            except slurm.SlurmRefusedError as error:
                refused[name, kind] = str(error)

    assert {} == refused


# What a user's names may hold; control characters are refused before (tests/unit).
WEIRD = ["it's", 'a "b"', "$HOME `id`", "x#y;z && w", "\\d\\", "é ü 日本", "--wrap=x", "%j"]


@hypothesis_settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(WEIRD), account=st.sampled_from(WEIRD), comment=values)
def test_weird_names_pass_sbatch(
    slurm_cluster: SlurmCluster, name: str, account: str, comment: str
) -> None:
    """
    Whatever stands in names, paths and options, a real sbatch takes the script as the job
    that was meant, and bash finds nothing wrong with it: no value has left its line.
    """
    folder = slurm_cluster.root / "weird" / re.sub(r"[/%\\]", "_", name)
    folder.mkdir(parents=True, exist_ok=True)
    asked = {"account": account, "extra": [f"--comment={comment}"], "time": "10"}
    job = array_job(
        name=name, run_dir=folder, folder=folder, log_dir=folder, environment={"X": comment}
    )
    text = render_array(job, settings({"request": asked}))
    script = folder / "job.sh"
    script.write_text(text)

    slurm.would_accept(script=script, conf=slurm_cluster.conf)

    assert "" == bash_syntax(text)


def test_doctor_on_a_node_knows_its_disk_and_its_slurm(slurm_cluster: SlurmCluster) -> None:
    """
    Within a job, doctor finds the node's own disk, a run directory that every node sees,
    and the live Slurm's settings; nothing is wrong.
    """
    shared = slurm_cluster.folder("runs")
    setting = f"HPCRESUME_TASK__LOCAL_DIR={slurm_cluster.scratch}"
    command = [sys.executable, "-m", "hpcresume", "doctor", str(shared), "--json"]

    out = slurm_cluster.run("srun", "-n1", "env", setting, *command, timeout_s=120)

    report = json.loads(out)
    checks = {check["name"]: check for check in report["checks"]}
    assert 0 == report["wrong"]
    assert checks[str(slurm_cluster.scratch)]["found"].startswith("usable")
    live = slurm.config(conf=slurm_cluster.conf)
    assert live["KillWait"] == checks["KillWait"]["found"]
    assert live["ClusterName"] in checks["controller"]["found"]
    assert "low REQUEUE with 15 s of grace" in checks["preemption"]["found"]
    assert [] == list(shared.iterdir())


def test_doctor_compares_two_nodes(slurm_cluster: SlurmCluster, command: Command) -> None:
    """
    A job of two nodes finds that a directory on the shared file system shows new files at
    once, that renames and exclusive creates hold across nodes, locks too, and that the clocks
    agree; nothing is left in it or in the queue.
    """
    shared = slurm_cluster.folder("runs")

    report = command.json("doctor", str(shared), "--nodes", "2")

    checks = {c["name"]: c for c in report["checks"] if c["section"] == "nodes"}
    assert ["two nodes", "a new file", "rename", "exclusive create", "flock", "clocks"] == list(
        checks
    )
    assert {"ok"} == {check["state"] for check in checks.values()}, checks
    first, second = checks["two nodes"]["found"].split(" and ")
    assert {first, second} < set(slurm_cluster.nodes)
    assert first != second
    assert [] == list(shared.iterdir())
    slurm_cluster.wait_idle()


def test_doctor_finds_that_a_directory_is_not_shared(
    slurm_cluster: SlurmCluster, command: Command
) -> None:
    """A directory that each node has of its own is wrong, with the node and what to do."""
    report = command.json("doctor", "/dev/shm", "--nodes", "2", rc=1)

    (check,) = [c for c in report["checks"] if c["name"] == "shared directory"]
    assert "wrong" == check["state"]
    assert "No such file or directory" in check["found"]
    assert any(name in check["found"] for name in slurm_cluster.nodes)
    assert "every node sees" in check["remedy"]


def test_doctor_without_two_free_nodes(slurm_cluster: SlurmCluster, command: Command) -> None:
    """A request that no nodes can meet is wrong, with what Slurm said; nothing hangs."""
    asked = {"HPCRESUME_REQUEST__CONSTRAINT": "unobtainable"}
    asking = Command(command.directory, {**(command.env or {}), **asked})

    report = asking.json("doctor", str(slurm_cluster.folder("runs")), "--nodes", "2", rc=1)

    (check,) = [c for c in report["checks"] if c["section"] == "nodes"]
    assert ("srun", "wrong") == (check["name"], check["state"])
    assert "Invalid feature specification" in check["found"]
