"""The testbed itself: a real Slurm that comes up, breaks as asked, and leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hpcresume import slurm, testbed
from hpcresume.errors import TestbedError
from hpcresume.testbed import cgroups, configure, processes, releases
from hpcresume.testbed.state import Release
from tests.support.cluster import SlurmCluster, bare_directory, cluster

pytestmark = pytest.mark.slurm

# Leaves its task's number on the node's disk, then waits until all four have done so: every
# element is thus on the cluster at the same time as the others.
SEEN = """
srun bash -c 'touch {scratch}/$SLURM_ARRAY_TASK_ID {shared}/$SLURM_ARRAY_TASK_ID
while [ $(ls {shared} | grep -c "^[0-3]$") -lt 4 ]; do sleep 0.1; done
ls {scratch} > {shared}/node-$SLURMD_NODENAME'
"""


def test_array_runs_on_nodes_that_see_only_their_own_disk(each_cluster: SlurmCluster) -> None:
    """
    Four elements of an array run side by side on four nodes; scratch has one path, and
    each finds there only what its own node wrote.
    """
    shared = each_cluster.folder("seen")
    body = SEEN.format(scratch=each_cluster.scratch, shared=shared)

    job = each_cluster.submit(body, "-a", "0-3", "-c", "2")

    assert ["COMPLETED"] * 4 == each_cluster.wait_ended(job)
    seen = {path.name: path.read_text().split() for path in shared.glob("node-*")}
    assert {f"node-{name}" for name in each_cluster.nodes} == set(seen)
    assert ["0", "1", "2", "3"] == sorted(task for tasks in seen.values() for task in tasks)
    assert all(len(tasks) == 1 for tasks in seen.values())


def test_up_gives_idle_nodes_and_the_settings_asked_for(each_cluster: SlurmCluster) -> None:
    """A testbed that is up has four idle nodes, preemption and a short requeue delay."""
    bed = testbed.status(each_cluster.directory)
    live = slurm.config(conf=each_cluster.conf)

    assert bed is not None
    assert ["idle"] * 4 == [node.state for node in bed.nodes]
    assert () == bed.dead
    assert f"proctrack/{bed.proctrack}" == live["ProctrackType"]
    assert "REQUEUE" == live["PreemptMode"]
    assert "cred_expire=5" in live["AuthInfo"]


def test_memory_over_the_request_is_an_oom_kill(cgroup_cluster: SlurmCluster) -> None:
    """A step that takes more than --mem is killed by the kernel, and Slurm says so."""
    log = cgroup_cluster.folder("oom") / "log"
    job = cgroup_cluster.submit(
        f"exec srun {sys.executable} -c 'print(len(bytearray(400 << 20)))'",
        *("--mem=100", "-o", str(log)),
    )

    (state,) = cgroup_cluster.wait_ended(job)
    # The batch step may be recorded first; then the job is FAILED and only its step tells.
    assert state in {"OUT_OF_MEMORY", "FAILED"}
    assert "Out Of Memory" in log.read_text()


def test_accounting_answers(slurm_cluster: SlurmCluster) -> None:
    """Slurmdbd keeps how a job ended."""
    job = slurm_cluster.submit("exit 3")
    assert ["FAILED"] == slurm_cluster.wait_ended(job)

    def recorded() -> bool:
        entries = slurm.accounting(job, conf=slurm_cluster.conf)
        return [("FAILED", "3:0", 0)] == [(e.state, e.exit_code, e.restarts) for e in entries]

    slurm_cluster.wait_until(
        recorded, 30, lambda: str(slurm.accounting(job, conf=slurm_cluster.conf))
    )


def test_an_unprivileged_user_can_submit_and_write_scratch(slurm_cluster: SlurmCluster) -> None:
    """Any user submits with the testbed's SLURM_CONF and writes to a node's disk."""
    folder = slurm_cluster.folder("user")
    script = folder / "job.sh"
    script.write_text(f"#!/bin/bash\nsrun touch {slurm_cluster.scratch}/mine {folder}/done\n")

    done = subprocess.run(
        ["sbatch", "--parsable", "-D", str(folder), "-o", f"{folder}/log", str(script)],
        env=slurm_cluster.env,
        user=65534,
        group=65534,
        capture_output=True,
        text=True,
        check=True,
    )

    assert ["COMPLETED"] == slurm_cluster.wait_ended(slurm.parse_sbatch(done.stdout))
    assert 65534 == (folder / "done").stat().st_uid


def test_preempt_requeues_the_job(slurm_cluster: SlurmCluster) -> None:
    """
    A preempted job gets SIGTERM and its grace period, shows PreemptTime meanwhile, and runs
    again under the same id; from Slurm 24.05 on once more after it has ended.
    """
    folder = slurm_cluster.folder("preempt")
    # Deaf to SIGTERM, so that Slurm itself requeues it after the grace.
    body = f"""
srun bash -c 'trap "date +%s >> {folder}/term" TERM
echo ${{SLURM_RESTART_COUNT:-0}} >> {folder}/started
while [ ! -e {folder}/stop ]; do sleep 0.1; done'
"""
    job = slurm_cluster.submit(body, "--requeue")
    started = folder / "started"
    slurm_cluster.wait_until(started.exists, 30, "the job runs")

    slurm_cluster.preempt(job, hold_s=5)

    slurm_cluster.wait_until((folder / "term").exists, 30, "SIGTERM came")
    assert slurm_cluster.show(job).preempt_time is not None
    slurm_cluster.wait_until(
        lambda: started.read_text().split() == ["0", "1"], 120, started.read_text
    )
    (folder / "stop").touch()
    assert ["COMPLETED"] == slurm_cluster.wait_ended(job)
    assert len(started.read_text().split()) - 1 == slurm_cluster.show(job).restarts


def test_a_partition_without_grace_requeues_at_once(slurm_cluster: SlurmCluster) -> None:
    """In ``nograce`` a preempted job is requeued without a grace period."""
    folder = slurm_cluster.folder("nograce")
    body = f"""
echo ${{SLURM_RESTART_COUNT:-0}} >> {folder}/started
while [ ! -e {folder}/stop ]; do sleep 0.1; done
"""
    job = slurm_cluster.submit(body, "--requeue", "-p", "nograce")
    started = folder / "started"
    slurm_cluster.wait_until(started.exists, 30, "the job runs")

    slurm_cluster.preempt(job, hold_s=1)

    slurm_cluster.wait_until(
        lambda: started.read_text().split() == ["0", "1"], 60, started.read_text
    )
    (folder / "stop").touch()
    assert ["COMPLETED"] == slurm_cluster.wait_ended(job)


def test_a_partition_can_end_what_it_preempts(slurm_cluster: SlurmCluster) -> None:
    """In ``cancel`` a job that leaves when its grace period starts ends."""
    ready = slurm_cluster.folder("cancel") / "ready"
    body = f"exec srun bash -c 'trap \"exit 0\" TERM; touch {ready}; while :; do sleep 0.1; done'"
    # From 24.05 on Slurm would restart one that it may requeue.
    job = slurm_cluster.submit(body, "--no-requeue", "-p", "cancel")
    slurm_cluster.wait_until(ready.exists, 30, "the job runs")

    slurm_cluster.preempt(job, hold_s=1)

    (state,) = slurm_cluster.wait_ended(job)
    assert state in {"PREEMPTED", "COMPLETED"}


def test_a_paused_controller_answers_late(slurm_cluster: SlurmCluster) -> None:
    """While slurmctld is frozen a submission is not answered; it takes effect afterwards."""
    name = "late"
    with slurm_cluster.paused_controller():
        with pytest.raises(slurm.SlurmUnreachableError, match="may still take effect"):
            slurm.queue(conf=slurm_cluster.conf, timeout_s=2)
        script = slurm_cluster.folder("late") / "job.sh"
        script.write_text("#!/bin/sh\ntrue\n")
        options = ["-J", name, "-o", "/dev/null"]
        with pytest.raises(slurm.SlurmUnreachableError):
            slurm.sbatch(options, script=script, conf=slurm_cluster.conf, timeout_s=2)

    slurm_cluster.wait_until(
        lambda: len(slurm.queue(name=name, conf=slurm_cluster.conf)) == 1, 30, "the job is there"
    )


def test_a_killed_controller_knows_its_jobs_when_it_is_back(slurm_cluster: SlurmCluster) -> None:
    """A job runs on while slurmctld is dead, and its end is known after the restart."""
    folder = slurm_cluster.folder("outage")
    job = slurm_cluster.submit(f"while [ ! -e {folder}/stop ]; do sleep 0.1; done")
    slurm_cluster.wait_running(job)
    with slurm_cluster.killed_controller():
        with pytest.raises(slurm.SlurmUnreachableError):
            slurm.queue([job], conf=slurm_cluster.conf, timeout_s=5)
        (folder / "stop").touch()

    assert ["COMPLETED"] == slurm_cluster.wait_ended(job, 120)


def test_limits_of_arrays_and_submissions_are_enforced() -> None:
    """
    With MaxArraySize 8 the largest index is 7, and with a limit of 4 jobs a fifth element is
    refused while fewer are taken, for root and for an ordinary user.
    """
    with cluster(nodes=1, max_array_size=8, max_submit=4) as made:
        script = made.folder("limits") / "job.sh"
        script.write_text("#!/bin/sh\ntrue\n")
        options = ["--hold", "-o", "/dev/null", "-D", "/"]

        def refusal(array: str) -> str:
            with pytest.raises(slurm.SlurmRefusedError) as caught:
                slurm.sbatch([*options, "-a", array], script=script, conf=made.conf)
            return str(caught.value)

        assert "Invalid job array specification" in refusal("0-8%1")
        assert "MaxSubmitJob" in refusal("0-4")
        slurm.sbatch([*options, "-a", "7,1-3"], script=script, conf=made.conf)
        assert "MaxSubmitJob" in refusal("0")
        made.run(
            # Not nobody: Slurm 26.05 gives that user no association.
            *("setpriv", "--reuid=daemon", "--regid=daemon", "--clear-groups"),
            *("sbatch", *options, "-a", "0-3", str(script)),
        )


def test_a_limit_of_submissions_needs_accounting() -> None:
    """The limit is kept by slurmdbd, so it is refused without."""
    with bare_directory() as directory, pytest.raises(TestbedError, match="--max-submit"):
        testbed.up(directory, testbed.Settings(accounting=False, max_submit=4))


def test_preempt_refuses_a_job_that_does_not_run(slurm_cluster: SlurmCluster) -> None:
    """Preempting an unknown job is an error that names it."""
    with pytest.raises(TestbedError, match="job 99999 cannot be preempted"):
        slurm_cluster.preempt("99999")


@pytest.mark.slow
def test_failed_node_loses_its_job_to_another(cgroup_cluster: SlurmCluster) -> None:
    """
    After kill -9 of a slurmd its job runs elsewhere, while the first attempt's processes run
    on as zombies until the node is restored; the second attempt survives their end.
    """
    folder = cgroup_cluster.folder("fail")
    body = f"""
srun bash -c 'echo $SLURMD_NODENAME >> {folder}/started
while [ ! -e {folder}/stop ]; do date +%s%N > {folder}/alive-$SLURMD_NODENAME; sleep 0.1; done'
"""
    job = cgroup_cluster.submit(body, "--requeue")
    started = folder / "started"
    cgroup_cluster.wait_until(started.exists, 30, "the job runs")
    first = started.read_text().strip()

    cgroup_cluster.kill_node(first)

    cgroup_cluster.wait_until(
        lambda: len(started.read_text().split()) == 2, 120, "it runs elsewhere"
    )
    second = started.read_text().split()[1]
    assert first != second
    assert _beats(cgroup_cluster, folder / f"alive-{first}")

    cgroup_cluster.restore_node(first)

    cgroup_cluster.wait_until(
        lambda: not _processes_writing(folder, first), 60, "the zombie is gone"
    )
    assert _beats(cgroup_cluster, folder / f"alive-{second}")
    (folder / "stop").touch()
    assert ["COMPLETED"] == cgroup_cluster.wait_ended(job)


def test_two_testbeds_side_by_side_do_not_disturb_each_other(
    slurm_cluster: SlurmCluster,
) -> None:
    """The end of one testbed, jobs included, leaves the other's jobs and groups alone."""
    folder = slurm_cluster.folder("side")
    body = f"srun bash -c 'touch {folder}/here; while [ ! -e {folder}/stop ]; do sleep 0.1; done'"
    mine = slurm_cluster.submit(body)
    slurm_cluster.wait_until((folder / "here").exists, 30, "the job runs")
    with cluster(nodes=1, accounting=False, proctrack=slurm_cluster.bed.proctrack) as other:
        theirs = other.submit("srun sleep 600", "-J", "theirs")
        other.wait_running(theirs)
        assert [] == [e for e in slurm_cluster.queue(theirs) if e.name == "theirs"]

    slurm_cluster.wait_until(
        lambda: slurm_cluster.show(mine).state == "RUNNING", 10, "still running"
    )
    (folder / "stop").touch()
    assert ["COMPLETED"] == slurm_cluster.wait_ended(mine)


def test_down_leaves_no_process_no_mount_and_no_group() -> None:
    """
    Down ends the daemons and running jobs, a zombie's included, and removes the control
    groups; calling it again is harmless.
    """
    with cluster(nodes=2, accounting=False) as made:
        job = made.submit("srun bash -c 'setsid sleep 600 & sleep 600'", "-a", "0-1", "-c", "2")
        made.wait_running(job)
        made.kill_node(made.nodes[0])
        conf, directory, nodes = made.conf, made.directory, made.nodes
        assert len(_processes_naming(conf)) >= 4

        assert testbed.down(directory)

        assert [] == _processes_naming(conf)
        assert [] == processes.members([f"/{node}/scratch" for node in nodes])
        assert [] == [p for n in made.nodes for p in cgroups.ROOT.glob(f"*/slurm_{n}")]
        assert str(directory) not in Path("/proc/mounts").read_text()
        assert not testbed.down(directory)
        assert testbed.status(directory) is None
        testbed.up(
            directory, testbed.Settings(nodes=1, accounting=False)
        )  # what close() takes down


def test_up_killed_half_way_is_cleared_by_down() -> None:
    """`up` records each process before the next, so `down` finds them after a kill -9."""
    with bare_directory() as directory:
        command = [sys.executable, "-m", "hpcresume", "testbed", "up", str(directory)]
        starting = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        record = directory / "state.json"
        assert processes.wait_until(
            lambda: record.exists() and b'"munged"' in record.read_bytes(),
            30,
        )
        starting.kill()
        starting.communicate()
        conf = directory / "etc" / "slurm.conf"

        assert testbed.down(directory)

        assert processes.wait_until(lambda: _processes_naming(conf) == [], 10)


def test_a_port_taken_meanwhile_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that another process binds after the check costs a second try, nothing else."""
    real, given = configure.free_ports, []

    def first_one_taken(count: int) -> list[int]:
        ports = real(count)
        given.append(ports)
        return [taken.getsockname()[1], *ports[1:]] if len(given) == 1 else ports

    with socket.create_server(("", 0)) as taken, bare_directory() as directory:
        monkeypatch.setattr(configure, "free_ports", first_one_taken)
        try:
            bed = testbed.up(directory, testbed.Settings(nodes=1, accounting=False))
        finally:
            testbed.down(directory)

    assert 2 == len(given)
    assert ["idle"] == [node.state for node in bed.nodes]


def test_a_long_directory_is_refused() -> None:
    """Where Slurm's sockets would not fit, `up` says so before it starts anything."""
    with pytest.raises(TestbedError, match="Choose another directory"):
        testbed.up(Path("/tmp") / ("x" * 80))


def test_a_directory_with_other_files_is_refused() -> None:
    """`up` clears its directory, so it takes none that holds what is not a testbed's."""
    with bare_directory() as directory:
        (directory / "log").mkdir(parents=True)

        with pytest.raises(TestbedError, match="is not empty"):
            testbed.up(directory)

        assert (directory / "log").is_dir()


def test_without_accounting_sacct_says_so() -> None:
    """A cluster without slurmdbd still runs jobs; asking for accounting is a typed error."""
    with cluster(nodes=1, accounting=False) as made:
        job = made.submit("true")
        assert ["COMPLETED"] == made.wait_ended(job)

        with pytest.raises(slurm.AccountingUnavailableError, match="accounting"):
            slurm.accounting(job, conf=made.conf)


def test_up_again_in_the_same_directory_is_refused(slurm_cluster: SlurmCluster) -> None:
    """A second `up` names the first one's SLURM_CONF and changes nothing."""
    with pytest.raises(TestbedError, match=f"SLURM_CONF={slurm_cluster.conf}"):
        testbed.up(slurm_cluster.directory)

    assert slurm.ping(conf=slurm_cluster.conf)


def test_command_line_reports_the_testbed(slurm_cluster: SlurmCluster) -> None:
    """`testbed status --json` is one object with SLURM_CONF, scratch and the nodes."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "hpcresume", "testbed", "status", "--json"),
            str(slurm_cluster.directory),
        ],
        capture_output=True,
        text=True,
        check=True,
    )

    seen = json.loads(done.stdout)
    assert (1, str(slurm_cluster.conf)) == (seen["schema"], seen["slurm_conf"])
    assert str(slurm_cluster.scratch) == seen["scratch"]
    assert slurm_cluster.nodes == [node["name"] for node in seen["nodes"]]


@pytest.fixture
def small_release(tmp_path: Path) -> Release:
    """Return a folder that holds a shell and three commands of this machine, as a release."""
    root = tmp_path / "root"
    commands = [shutil.which(name) or name for name in ("sh", "env", "cat", "umount")]
    ldd = subprocess.run(["ldd", *commands], capture_output=True, text=True, check=True).stdout
    libraries = {word for word in ldd.split() if word.startswith("/") and not word.endswith(":")}
    for path in {*commands, *libraries}:
        target = root / os.path.realpath(os.path.dirname(path)).lstrip("/") / os.path.basename(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for name in os.listdir("/"):
        if os.path.islink(f"/{name}") and not (root / name).exists():
            (root / name).symlink_to(os.readlink(f"/{name}"))
    (root / "etc").mkdir()
    (root / "etc/own").write_text("the release's")
    return Release("small", str(root))


@pytest.mark.skipif(releases.here() is not None, reason="a release is built from outside")
def test_a_release_sees_the_machine_s_files_but_its_own_system(
    small_release: Release, tmp_path: Path
) -> None:
    """
    A command in a release runs in the same directory with its own /etc; what it mounts ends
    with it, and the folder holds nothing of the machine afterwards.
    """
    (tmp_path / "mine").write_text("outside, ")

    done = subprocess.run(
        releases.command(small_release, ["cat", "mine", "/etc/own"], directory=tmp_path),
        env=releases.environment(),
        capture_output=True,
        text=True,
        check=False,
    )

    assert (0, "outside, the release's") == (done.returncode, done.stdout), done.stderr
    assert small_release.root not in Path("/proc/mounts").read_text()
    assert [] == list((Path(small_release.root) / tmp_path.relative_to("/").parts[0]).iterdir())


def test_a_release_refuses_a_directory_of_the_system(small_release: Release) -> None:
    """A directory below /usr is another one inside, so no command is run in it."""
    with pytest.raises(TestbedError, match="not seen inside another release"):
        releases.command(small_release, ["cat"], directory=Path("/usr/share"))


def test_a_release_that_is_gone_is_named(tmp_path: Path) -> None:
    """Where the folder was removed, nothing is mounted; the message says how to go on."""
    with pytest.raises(TestbedError, match="the release sid is gone"):
        releases.command(Release("sid", str(tmp_path / "root")), ["true"], directory=tmp_path)

    assert [] == list(tmp_path.iterdir())


@pytest.mark.skipif(releases.here() is not None, reason="a release is built from outside")
def test_a_killed_build_of_a_release_is_begun_anew(tmp_path: Path) -> None:
    """Whatever a killed build had started ends with it, and is not taken for a release."""
    root, tools = tmp_path / "root", tmp_path / "tools"
    tools.mkdir()
    tool = tools / "debootstrap"
    tool.write_text(f"#!/bin/sh\nmkdir -p {root}.partial/etc\nexec sleep 600\n")
    tool.chmod(0o755)
    build = f"from hpcresume.testbed import releases; releases.prepare('sid', root='{root}')"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}

    building = subprocess.Popen([sys.executable, "-c", build], env=environment)
    assert processes.wait_until((tmp_path / "root.partial/etc").exists, 30)
    building.kill()
    building.communicate()

    assert processes.wait_until(lambda: _processes_naming(tools) == [], 10)
    (tmp_path / "root.partial/old").touch()
    tool.write_text("#!/bin/sh\necho no such mirror\nexit 1\n")
    done = subprocess.run(
        [sys.executable, "-c", build], env=environment, capture_output=True, text=True, check=False
    )
    assert "no such mirror" in done.stderr
    assert not (tmp_path / "root.partial/old").exists()
    assert not root.exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(releases.here() is not None, reason="a release is built from outside")
@pytest.mark.parametrize("name", ["trixie", "sid"])
def test_a_testbed_of_another_release(name: str) -> None:
    """
    `up --release` brings the release's Slurm up, `enter` submits to it, the other commands
    find their way inside by themselves, and `down` leaves no process.
    """
    with bare_directory() as directory:
        folder = directory.parent

        def call(*argv: str) -> str:
            done = subprocess.run(
                [sys.executable, "-m", "hpcresume", "testbed", *argv],
                cwd=folder,
                capture_output=True,
                text=True,
                check=True,
            )
            return done.stdout

        at = ["--dir", str(directory)]
        try:
            call("up", str(directory), "--release", name, "--nodes", "2")
            seen = json.loads(call("status", str(directory), "--json"))
            version = call("enter", *at, "sinfo", "--version").split()[1]
            script = "#!/bin/sh\ngrep VERSION_CODENAME /etc/os-release; sleep 600\n"
            (folder / "job.sh").write_text(script)
            job = call("enter", *at, "sbatch", "--parsable", "-o", "log", "job.sh").strip()
            assert processes.wait_until((folder / "log").exists, 60)
            call("preempt", job, *at)
        finally:
            ended = call("down", str(directory), "--json")

        assert (name, ["idle", "idle"]) == (seen["release"], [n["state"] for n in seen["nodes"]])
        assert version != "22.05.8"
        assert f"VERSION_CODENAME={name}" in (folder / "log").read_text() or name == "sid"
        assert json.loads(ended)["ended"]
        assert [] == _processes_naming(directory)


def test_unreachable_controller_is_a_typed_error(slurm_cluster: SlurmCluster) -> None:
    """With nothing behind the controller's port, no answer is told apart from a refusal."""
    folder = slurm_cluster.folder("nowhere")
    for path in slurm_cluster.conf.parent.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    text = slurm_cluster.conf.read_text()
    port = next(line for line in text.splitlines() if line.startswith("SlurmctldPort="))
    (folder / "slurm.conf").write_text(text.replace(port, "SlurmctldPort=1"))

    with pytest.raises(slurm.SlurmUnreachableError, match="may still take effect"):
        slurm.queue(conf=folder / "slurm.conf", timeout_s=3)


def test_requeue_and_cancel_count_what_is_done_already(slurm_cluster: SlurmCluster) -> None:
    """A pending job is requeued, and an ended or unknown one cancelled, without complaint."""
    held = slurm_cluster.submit("true", "--hold")
    slurm.requeue(held, conf=slurm_cluster.conf)
    slurm.cancel([held], conf=slurm_cluster.conf)
    slurm_cluster.wait_ended(held)
    slurm.cancel([held, "999999"], conf=slurm_cluster.conf)

    with pytest.raises(slurm.SlurmRefusedError, match="Invalid job id"):
        slurm.requeue("999999", conf=slurm_cluster.conf)
    assert [] == slurm.show_job("999999", conf=slurm_cluster.conf)
    assert [] == slurm.queue(["999999"], conf=slurm_cluster.conf)


def test_times_of_a_job_are_unix_seconds(slurm_cluster: SlurmCluster) -> None:
    """EndTime of a running job is its start plus its limit, in unix seconds."""
    job = slurm_cluster.submit("srun sleep 600", "-t", "7")
    slurm_cluster.wait_running(job)

    info = slurm_cluster.show(job)

    assert info.start_time is not None
    assert info.start_time + 7 * 60 == info.end_time
    assert 7 * 60 == info.time_limit_s
    assert abs(os.stat(slurm_cluster.conf).st_mtime - info.start_time) < 3600


def _beats(made: SlurmCluster, path: Path) -> bool:
    before = path.read_text()
    made.wait_until(lambda: path.read_text() not in ("", before), 10, f"{path.name} is written")
    return True


def _processes_writing(folder: Path, node: str) -> list[int]:
    return [pid for pid in _processes_naming(folder) if _environment(pid, "SLURMD_NODENAME", node)]


def _environment(pid: int, name: str, value: str) -> bool:
    try:
        return f"{name}={value}\0" in Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return False


def _processes_naming(path: Path) -> list[int]:
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            texts = [Path(f"/proc/{pid}/{file}").read_bytes() for file in ("cmdline", "environ")]
        except OSError:
            continue
        if pid != os.getpid() and any(os.fsencode(path) in text for text in texts):
            found.append(pid)
    return found
