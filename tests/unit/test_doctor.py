"""The probes of `doctor`: what they say where all is well, and that each can say otherwise."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from hpcresume import doctor
from hpcresume.doctor import ray_head, software, storage
from hpcresume.errors import LocalStorageError
from tests.support.fuse import fuse_mount

CONFIG = """\
ClusterName = big
JobRequeue = 1
KillWait = 30 sec
MaxArraySize = 1001
PreemptMode = REQUEUE
PreemptType = preempt/qos
PreemptParameters = send_user_signal
SLURM_VERSION = 24.11.1
"""
PROBES = {"flock": storage._flock, "link": storage._hard_link, "fsync": storage._sync_directory}
DETACH = 2  # linux/fs.h, MNT_DETACH


def by_name(checks) -> dict[str, doctor.Check]:
    """Return checks by name, with everything run to the end."""
    return {check.name: check for check in checks}


def anything(path: str) -> None:
    """Take every directory for node-local."""


def short_temp() -> str:
    """Make Ray's directory where its sockets fit."""
    return tempfile.mkdtemp(prefix="hr-", dir="/tmp")


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """Return an empty directory."""
    path = tmp_path / "fresh"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def slurm_says(tmp_path, monkeypatch):
    """Put Slurm commands with given bodies first on the path."""

    def make(**bodies: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in ("sbatch", "scontrol", "sacct"):
            path = folder / name
            path.write_text(f"#!/bin/sh\n{bodies.get(name, 'exit 0')}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return make


def test_a_good_place_is_ok_and_stays_as_it_was(hpcresume_here, fresh):
    """Every probe of storage passes on a local disk; nothing is made or left behind."""
    result = hpcresume_here("doctor", str(fresh / "runs" / "new"), "--json")

    assert 0 == result.returncode, result.stderr
    report = json.loads(result.stdout)
    states = {c["name"]: c["state"] for c in report["checks"] if c["section"] == "storage"}
    assert {"exclusive create", "rename", "fsync", "fsync of a directory", "hard links", "flock",
            "owners", "space", "file system"} <= set(states)  # fmt: skip
    for name in ("exclusive create", "rename", "fsync", "fsync of a directory", "hard links"):
        assert "ok" == states[name], name
    assert (1, 0) == (report["schema"], report["wrong"])
    assert len(report["checks"]) == report["ok"] + report["warning"]
    assert [] == os.listdir(fresh)


def test_a_place_that_refuses_is_wrong_and_says_what_to_do(hpcresume_here):
    """Where no file can be made, doctor exits 1 and gives the reason and a remedy."""
    result = hpcresume_here("doctor", "/proc/runs")

    assert 1 == result.returncode
    lines = result.stdout.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith("wrong")]
    assert lines[at].split()[:3] == ["wrong", "storage", "write:"]
    assert "--run-dir" in lines[at + 1]


@pytest.fixture
def hpcresume_here(tmp_path, monkeypatch):
    """Run the command in a process of its own, in a directory without settings, without Slurm."""

    def call(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "hpcresume", *args],
            cwd=tmp_path,
            env={**os.environ, "PATH": "/nonexistent", "XDG_CONFIG_HOME": str(tmp_path / "none")},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return call


def test_a_file_system_that_refuses_files_is_wrong(tmp_path):
    """A FUSE file system that can hold nothing is found out by trying."""
    point = tmp_path / "mount"
    point.mkdir()
    with fuse_mount(point):
        checks = by_name(doctor.check_storage(str(point), timeout_s=60))
    assert "wrong" == checks["write"].state
    assert "fuse" in checks["file system"].found


def test_a_file_system_that_hangs_is_given_up(tmp_path):
    """Nobody answers this mount: the probe ends at its time limit and says so."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        device = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        pytest.skip(f"/dev/fuse: {error}")
    point = tmp_path / "mount"
    point.mkdir()
    options = f"fd={device},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()}"
    try:
        if libc.mount(b"hang", os.fsencode(point), b"fuse", 0, options.encode()):
            pytest.skip(f"mounting FUSE: {os.strerror(ctypes.get_errno())}")
        started = time.monotonic()
        checks = list(doctor.check_storage(str(point), timeout_s=2))
        assert time.monotonic() - started < 20
    finally:
        libc.umount2(os.fsencode(point), DETACH)
        os.close(device)
    assert "wrong" == checks[-1].state
    assert "no answer within 2 s" in checks[-1].found


def test_two_winners_of_one_name_are_noticed(fresh, monkeypatch):
    """Where an exclusive create is not exclusive, runs cannot be kept there."""
    monkeypatch.setattr(storage, "_RACER", storage._RACER.replace("os.O_EXCL", "0"))
    check = storage._exclusive(str(fresh))
    assert ("wrong", "4 processes won 256 of 64 names") == (check.state, check.found)


def test_a_rename_that_is_not_atomic_is_noticed(fresh, monkeypatch):
    """A reader that sees half a file, or none, is enough."""

    def copy(source: str, target: str) -> None:
        os.unlink(target)
        shutil.copyfile(source, target)
        os.unlink(source)

    monkeypatch.setattr(storage.os, "rename", copy)
    assert "wrong" == storage._rename(str(fresh)).state


@pytest.mark.parametrize(
    ("call", "number", "expected"),
    [
        ("flock", errno.ENOSYS, "ENOSYS"),
        ("link", errno.EPERM, "not permitted"),
        ("fsync", errno.EINVAL, "Invalid argument"),
    ],
)
def test_calls_that_runs_do_without_are_warnings(fresh, monkeypatch, call, number, expected):
    """Locks, hard links and the fsync of a directory have something that stands in for them."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl if call == "flock" else os, call, refuse)
    check = PROBES[call](str(fresh))
    assert "warning" == check.state
    assert expected in check.found
    assert check.remedy


def test_a_failing_fsync_is_wrong(fresh, monkeypatch):
    """What cannot be made durable cannot be published."""

    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    check = storage._tried("fsync", storage._sync_file, str(fresh))
    assert "wrong" == check.state
    assert "Input/output error" in check.found


def test_a_lock_that_excludes_nobody_is_a_warning(fresh, monkeypatch):
    """A lock call that always succeeds is not a lock."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    assert ("warning", "a lock excludes nobody") == (
        (check := storage._flock(str(fresh))).state,
        check.found,
    )


def test_a_directory_that_others_can_replace_is_a_warning(fresh):
    """A parent that anybody may write, without the sticky bit, is named with its mode."""
    inner = fresh / "run"
    inner.mkdir()
    fresh.chmod(0o777)
    (check,) = storage._owners(str(inner))
    assert "warning" == check.state
    assert f"{fresh} has mode 0777" in check.found
    fresh.chmod(0o1777)
    (check,) = storage._owners(str(inner))
    assert f"{fresh} has mode" not in check.found


def test_mount_options_are_named_with_what_they_mean(fresh, monkeypatch):
    """Only options that matter to a run, and not the harmless value of one that can."""
    options = frozenset({"rw", "soft", "nolock", "local_lock=none", "vers=3"})
    monkeypatch.setattr(storage, "mount_of", lambda _: ("/n", "nfs4", options))
    found = by_name(storage._file_system(str(fresh)))
    assert {"file system", "mount option soft", "mount option nolock"} == set(found)
    assert ("ok", "nfs4 at /n") == (found["file system"].state, found["file system"].found)
    assert "mount it hard" in found["mount option soft"].remedy


def test_too_little_space_is_a_warning(fresh, monkeypatch):
    """Bytes and inodes are counted apart."""
    real = os.statvfs(fresh)

    class Full:
        f_bavail, f_frsize, f_files, f_favail = 10, 4096, real.f_files or 1, 5

    monkeypatch.setattr(os, "statvfs", lambda _: Full)
    assert ["warning", "warning"] == [check.state for check in storage._space(str(fresh))]


def test_candidates_of_node_local_disk_are_told_apart(fresh):
    """Unset, missing, refused and usable candidates each say which they are."""

    def check_local(path: str) -> None:
        if path.endswith("shared"):
            raise LocalStorageError(f"{path} is on nfs")

    (fresh / "shared").mkdir()
    checks = by_name(
        doctor.check_node(
            ["$NOT_SET", "$HERE/missing", "${HERE}/shared", "$HERE"],
            {"HERE": str(fresh)},
            check_local=check_local,
            make_ray_temp=short_temp,
        )
    )
    assert "not set here" == checks["$NOT_SET"].found
    assert "does not exist" in checks["$HERE/missing"].found
    assert ("warning", f"{fresh}/shared is on nfs") == (
        checks["${HERE}/shared"].state,
        checks["${HERE}/shared"].found,
    )
    assert checks["$HERE"].found.startswith(f"usable, {fresh}")
    assert "node-local disk" not in checks
    assert "ok" == checks["Ray's sockets"].state


def test_no_usable_candidate_is_wrong():
    """Without node-local disk no attempt can start."""
    checks = by_name(
        doctor.check_node(["$NOT_SET"], {}, check_local=anything, make_ray_temp=short_temp)
    )
    assert "wrong" == checks["node-local disk"].state
    assert "task.local_dir" in checks["node-local disk"].remedy


def test_a_path_too_long_for_sockets_is_wrong(fresh):
    """Ray's sockets have to fit 107 bytes; binding one tells."""
    deep = fresh / ("x" * 80)

    def make() -> str:
        deep.mkdir()
        return str(deep)

    checks = by_name(doctor.check_node(["/"], {}, check_local=anything, make_ray_temp=make))
    assert "wrong" == checks["Ray's sockets"].state
    assert not deep.exists()


def test_the_build_of_lmdb_is_told(monkeypatch):
    """The package's own build is ok, the system's a warning, one that dies wrong."""
    assert "ok" == by_name(doctor.check_software())["lmdb build"].state
    monkeypatch.setattr(software, "_LMDB", "print(0, 9, 33); print(0, 9, 33)")
    assert "warning" == by_name(doctor.check_software())["lmdb build"].state
    monkeypatch.setattr(software, "_LMDB", "import os; os.kill(os.getpid(), 4)")
    assert "wrong" == by_name(doctor.check_software())["lmdb build"].state


def test_what_slurm_is_set_to_is_shown(slurm_says, tmp_path):
    """Restarts, waits, limits and how preemption is announced come from the live Slurm."""
    (tmp_path / "config").write_text(CONFIG)
    spare = "PartitionName=spare PreemptMode=REQUEUE GraceTime=120 State=UP"
    slurm_says(scontrol=f'case "$*" in *config) cat {tmp_path}/config ;; *) echo {spare} ;; esac')

    checks = by_name(doctor.check_slurm())

    assert ["1", "30 sec", "1001"] == [
        checks[name].found for name in ("JobRequeue", "KillWait", "MaxArraySize")
    ]
    assert "the job's own signal" in checks["preemption"].found
    assert "spare REQUEUE with 120 s of grace" in checks["preemption"].found
    assert "ok" == checks["sacct"].state


def test_preemption_that_cancels_and_missing_accounting_are_warnings(slurm_says, tmp_path):
    """Runs work there, in another way, which is said."""
    (tmp_path / "config").write_text(CONFIG)
    spare = "PartitionName=spare PreemptMode=CANCEL State=UP"
    slurm_says(
        scontrol=f'case "$*" in *config) cat {tmp_path}/config ;; *) echo {spare} ;; esac',
        sacct="echo 'Slurm accounting storage is disabled' >&2; exit 1",
    )

    checks = by_name(doctor.check_slurm())

    assert ["warning", "warning"] == [checks[name].state for name in ("preemption", "sacct")]
    assert "merge job" in checks["preemption"].remedy


def test_a_controller_that_does_not_answer_is_wrong(slurm_says):
    """Slurm that is there but silent is something to mend; no Slurm at all is not."""
    slurm_says(scontrol="echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1")
    (check,) = doctor.check_slurm()
    assert ("controller", "wrong") == (check.name, check.state)


def test_no_slurm_is_a_warning(monkeypatch):
    """A laptop has none, and runs all the same."""
    monkeypatch.setenv("PATH", "/nonexistent")
    (check,) = doctor.check_slurm()
    assert ("commands", "warning") == (check.name, check.state)


@pytest.mark.ray
def test_a_head_starts_and_keeps_strangers_out():
    """The head comes up, refuses who lacks its token, and leaves no directory."""
    made: list[str] = []

    def make() -> str:
        made.append(short_temp())
        return made[0]

    checks = by_name(doctor.check_ray(make))

    assert ["ok", "ok"] == [checks[name].state for name in ("head", "token")], checks
    assert not os.path.exists(made[0])


@pytest.mark.ray
def test_a_head_that_lets_strangers_in_is_wrong():
    """The probe of the token can fail: a head without one lets it in."""
    temp = short_temp()
    code = (
        "import ray, sys\n"
        f"ray.init(address='local', num_cpus=1, include_dashboard=False, _temp_dir={temp!r})\n"
        "print(ray.get_runtime_context().gcs_address, flush=True)\n"
        "sys.stdin.read()\n"
    )
    head = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        check = ray_head._stranger(head.stdout.readline().strip(), timeout_s=60)
    finally:
        head.communicate(timeout=60)
        shutil.rmtree(temp, ignore_errors=True)
    assert "wrong" == check.state


@pytest.mark.ray
def test_a_head_that_cannot_start_is_wrong(fresh):
    """The reason is Ray's own last word."""
    path = fresh / "file"
    path.write_text("not a directory")
    (check,) = doctor.check_ray(lambda: str(path))
    assert ("head", "wrong") == (check.name, check.state)
    assert "no answer" not in check.found
