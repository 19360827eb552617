"""`site check` and `site new` against a Slurm whose answers a script gives."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hpcresume.config import find_site

# What the commands of a cluster with limits print; sbatch refuses --mem and jobs without a time.
CONFIG = """\
AccountingStorageEnforce = associations,limits,qos,safe
ClusterName             = big
GresTypes               = gpu
JobRequeue              = 0
KillWait                = 60 sec
MaxArraySize            = 500
SchedulerParameters     = bf_interval=2,max_array_tasks=100
SelectType              = select/linear
SLURM_VERSION           = 24.11.1
"""
PARTITION = (
    "PartitionName={name} Default={default} DefaultTime=01:00:00 MaxTime=1-00:00:00 QoS={qos} "
    "AllocNodes={submit} OverSubscribe=EXCLUSIVE PreemptMode=REQUEUE GraceTime=120 State=UP"
)
PARTITIONS = [
    PARTITION.format(name="day", default="YES", qos="N/A", submit="login1"),
    PARTITION.format(name="spare", default="NO", qos="small", submit="ALL"),
]
SACCTMGR = r"""
case "$*" in
  *qos*) printf 'normal||00:00:00\nsmall|4|00:02:00\n' ;;
  *) printf 'proj||normal,small|normal|200\n' ;;
esac
"""
SBATCH = r"""
case "$*" in *--mem=*) echo "sbatch: error: --mem is not allowed here" >&2; exit 1 ;; esac
for script; do :; done
grep -q '^#SBATCH --time=' "$script" || { echo 'sbatch: error: no --time given' >&2; exit 1; }
"""


@pytest.fixture
def slurm_says(tmp_path, monkeypatch):
    """Put commands with given answers first on the path, in a directory without settings."""

    def make(*, config=CONFIG, sbatch=SBATCH, sacctmgr=SACCTMGR):
        (tmp_path / "config").write_text(config)
        (tmp_path / "partitions").write_text("\n".join(PARTITIONS) + "\n")
        scontrol = (
            f'case "$*" in *config) cat {tmp_path}/config ;; *) cat {tmp_path}/partitions ;; esac'
        )
        for name, body in [("scontrol", scontrol), ("sacctmgr", sacctmgr), ("sbatch", sbatch)]:
            path = tmp_path / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/bin/sh\n{body}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
        monkeypatch.setenv("HPCRESUME_SITE_PATH", str(tmp_path / "sites"))
        monkeypatch.delenv("SLURM_CONF", raising=False)
        monkeypatch.chdir(tmp_path)

    return make


@pytest.fixture
def site_file(tmp_path):
    """Write the user's site ``mine``, recognised as the cluster ``big``."""

    def write(text: str) -> None:
        path = tmp_path / "sites" / "mine" / "site.toml"
        path.parent.mkdir(parents=True, mode=0o755, exist_ok=True)
        path.write_text(f"{text}\n[site.identify]\ncluster_name = 'big'\n")
        path.chmod(0o644)

    return write


def findings(result) -> dict[str, list[dict]]:
    """Return what `site check --json` reported, by setting."""
    found: dict[str, list[dict]] = {}
    for finding in json.loads(result.stdout)["findings"]:
        found.setdefault(finding["key"], []).append(finding)
    return found


def test_wrong_settings_come_with_the_line_to_write(hpcresume, slurm_says, site_file):
    """Each value that Slurm contradicts is wrong, with the right one; exit code 15."""
    slurm_says()
    site_file("[request]\ntime = '10'\npartition = 'spare'\n")

    result = hpcresume("site", "check", "--json")

    assert 15 == result.exit_code
    wrong = {
        finding["key"]: finding["write"]
        for found in findings(result).values()
        for finding in found
        if finding["state"] == "wrong"
    }
    assert {
        "site.max_array_size": "site.max_array_size = 100",
        "site.max_submit": "site.max_submit = 4",
        "site.kill_wait_s": "site.kill_wait_s = 60",
        "site.gpu_style": 'site.gpu_style = "gres"',
        "site.memory_style": 'site.memory_style = "none"',
    } == wrong


def test_the_lines_to_write_make_it_right(hpcresume, slurm_says, site_file):
    """A site file with those lines passes, and the merge job has to be right too."""
    slurm_says()
    site_file(
        "[site]\nmax_array_size = 100\nmax_submit = 4\nkill_wait_s = 60\ngpu_style = 'gres'\n"
        "memory_style = 'none'\nforbidden = ['mem', 'wckey']\nrequired = ['time', 'nodes']\n"
        "[request]\ntime = '10'\npartition = 'spare'\naccount = 'proj'\nqos = 'small'\n"
    )

    result = hpcresume("site", "check", "--json")

    assert 0 == result.exit_code, result.stdout
    found = findings(result)
    assert ["ok", "unknown"] == [one["state"] for one in found["site.forbidden"]]
    assert "--mem is not allowed" in found["site.forbidden"][0]["reason"]
    assert ["ok", "unknown"] == [one["state"] for one in found["site.required"]]
    assert ["ok"] == [one["state"] for one in found["site.identify"]]
    assert ["QOS small allows 4"] == [one["reason"] for one in found["site.max_submit"]]


def test_names_that_slurm_does_not_know_are_wrong(hpcresume, slurm_says, site_file):
    """Partition, account and QOS are looked up; the only choice is the line to write."""
    slurm_says()
    site_file("[request]\ntime='1'\npartition = 'night'\naccount = 'other'\nqos = 'huge'\n")

    found = findings(hpcresume("site", "check", "--json"))

    assert ("wrong", "") == (
        found["request.partition"][0]["state"],
        found["request.partition"][0]["write"],
    )
    assert "day, spare" in found["request.partition"][0]["reason"]
    assert 'request.account = "proj"' == found["request.account"][0]["write"]
    assert "normal, small" in found["request.qos"][0]["reason"]


def test_a_memory_option_that_is_refused_is_wrong(hpcresume, slurm_says, site_file):
    """Where sbatch refuses the way memory is asked for, it is not asked for."""
    slurm_says()
    site_file("[request]\ntime = '10'\n")

    found = findings(hpcresume("site", "check", "--json"))

    assert 'site.memory_style = "none"' == found["site.memory_style"][0]["write"]
    assert "only from login1" in found["site.submit_from_compute"][0]["reason"]


def test_a_refused_job_is_wrong_and_hides_what_depends_on_it(hpcresume, slurm_says, site_file):
    """Slurm's complaint is shown; what only an accepted job shows is unknown, not right."""
    slurm_says(sbatch="echo 'sbatch: error: account expired' >&2; exit 1")
    site_file("[site]\nforbidden = ['mem']\nrequired = ['time']\n[request]\ntime = '10'\n")

    result = hpcresume("site", "check")

    assert 15 == result.exit_code
    lines = {tuple(line.split()[:2]): line for line in result.stdout.splitlines()}
    assert lines["wrong", "job"].endswith("account expired")
    for key in ("site.forbidden", "site.required", "site.memory_style", "site.arrays"):
        assert ("unknown", key) in lines


def test_without_accounting_limits_are_unknown(hpcresume, slurm_says, site_file):
    """A cluster without slurmdbd is checked all the same; the reason is said."""
    slurm_says(
        sacctmgr="echo 'You are not running a supported accounting_storage plugin' >&2; exit 1"
    )
    site_file("[request]\ntime = '10'\n")

    found = findings(hpcresume("site", "check", "--json"))

    assert "unknown" == found["site.max_submit"][0]["state"]
    assert "accounting_storage" in found["site.max_submit"][0]["reason"]
    assert "wrong" == found["site.kill_wait_s"][0]["state"]


def test_where_jobs_may_not_submit_there_is_no_merge_job_to_check(hpcresume, slurm_says, site_file):
    """The merge job is asked about only where one would be submitted."""
    slurm_says()
    site_file("[site]\nsubmit_from_compute = false\n[request]\ntime = '10'\n")

    found = findings(hpcresume("site", "check", "--json"))

    assert "job array" in found
    assert "merge job" not in found
    assert "ok" == found["site.submit_from_compute"][0]["state"]


def test_a_slurm_without_arrays_is_told(hpcresume, slurm_says, site_file):
    """MaxArraySize below 2 means single jobs."""
    slurm_says(config=CONFIG.replace("= 500", "= 1"))
    site_file("[request]\ntime = '10'\n")

    found = findings(hpcresume("site", "check", "--json"))

    assert "site.arrays = false" == found["site.arrays"][0]["write"]


def test_no_slurm_is_said_and_exits_30(hpcresume, monkeypatch, tmp_path):
    """Where there are no Slurm commands nothing can be checked or written."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for command in (["check"], ["new", "mine", "--dir", str(tmp_path)]):
        result = hpcresume("site", *command)
        assert 30 == result.exit_code
        assert "scontrol is not on the path" in result.stderr


def test_new_writes_what_slurm_answers_and_check_agrees(hpcresume, slurm_says, tmp_path):
    """The file holds the live limits, loads as a site, and passes its own check."""
    slurm_says(sbatch="exit 0")

    made = hpcresume("site", "new", "mine")

    assert 0 == made.exit_code, made.stderr
    path = Path(made.stdout.strip())
    assert tmp_path / "sites" / "mine" / "site.toml" == path
    text = path.read_text()
    assert "#   day*, limit 1-00:00:00, preemption REQUEUE, grace 120 s, whole nodes" in text
    site = find_site("mine", dict(os.environ)).own[0]
    assert "big" == site.identify.cluster_name
    assert {
        "site": {"max_array_size": 100, "max_submit": 200, "kill_wait_s": 60, "requeue": True},
        "request": {"partition": "day"},
    } == site.layer.values
    found = findings(hpcresume("site", "check", "--json"))
    assert {"site.gpu_style"} == {
        key for key, (first, *_) in found.items() if first["state"] == "wrong"
    }


def test_new_never_overwrites(hpcresume, slurm_says, site_file, tmp_path):
    """A file that is there stays as it is."""
    slurm_says()
    site_file("[request]\ntime = '10'\n")
    path = tmp_path / "sites" / "mine" / "site.toml"
    before = path.read_bytes()

    result = hpcresume("site", "new", "mine", "--dir", tmp_path / "sites")

    assert (15, before) == (result.exit_code, path.read_bytes())
    assert "exists" in result.stderr


@pytest.mark.parametrize("name", ["../mine", ".mine", "a b", "a/b"])
def test_new_refuses_a_name_that_is_no_folder(hpcresume, slurm_says, tmp_path, name):
    """The name is a folder's in the folder of sites."""
    slurm_says()
    result = hpcresume("site", "new", name, "--dir", tmp_path / "sites")
    assert 15 == result.exit_code
    assert not (tmp_path / "sites").exists()


def test_new_needs_to_know_where(hpcresume, slurm_says, monkeypatch):
    """Without HPCRESUME_SITE_PATH and --dir it is a usage error."""
    slurm_says()
    monkeypatch.delenv("HPCRESUME_SITE_PATH")
    result = hpcresume("site", "new", "mine")
    assert 2 == result.exit_code
    assert "--dir" in result.stderr
