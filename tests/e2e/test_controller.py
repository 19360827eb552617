"""Slurm's controller away, slow, or asked twice: one array works on a round, and the run ends."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.support.cli import Command, attempt_pids, logs_of, wait_until
from tests.support.cluster import SlurmCluster, cluster
from tests.support.quick import QuickRun, Wrapped, quick_result

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

NO_ANSWER = "echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1"
# What sbatch is called for, by the script it is given: job.sh, merge-*.sh or twin-*.sh.
LOST = {
    "failed": f'"$real" "$@"; {NO_ANSWER}',
    "hung": '"$real" "$@"; exec sleep 60',
}


@pytest.fixture
def wrapped(tmp_path: Path) -> Wrapped:
    """Return a directory for commands that stand in front of Slurm's."""
    directory = tmp_path / "bin"
    directory.mkdir()
    return Wrapped(directory)


def only_for(script: str, body: str) -> str:
    """Return the body of an sbatch that does something else for one kind of script."""
    return f'case "${{!#}}" in */{script}) {body};; *) exec "$real" "$@";; esac'


@pytest.mark.parametrize("script", ["job.sh", pytest.param("merge-*.sh", marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["failed", pytest.param("hung", marks=pytest.mark.slow)])
def test_an_sbatch_whose_answer_is_lost(
    slurm_cluster: SlurmCluster, wrapped: Wrapped, script: str, how: str
) -> None:
    """
    The job is in the queue and `submit` does not know it: it says that, and submitting again
    finds it there instead of submitting another.
    """
    wrapped.wrap("sbatch", only_for(script, LOST[how]))
    quick = QuickRun(slurm_cluster, PATH=wrapped.path)
    process = quick.command.start(*quick.arguments("--array", "2", gate=quick.gate))
    _, said = process.communicate(timeout=120)
    queued = quick.queued()
    status = quick.command.status(quick.run)
    again = Command(quick.directory, slurm_cluster.env)
    again.run("submit", "run")
    quick.gate.touch()

    assert 31 == process.returncode, said
    assert "Run the same command again" in said
    assert f"hpcresume-{quick.run_id}-0" in {name for _, name in queued}
    assert ("no merge job" in status["reason"]) == (script == "job.sh"), status
    assert 1 == len(quick.wait_complete()["rounds"])
    assert 1 == len(quick.workers(0))
    assert 1 == sum(fnmatch(call, f"*/{script}") for call in wrapped.calls())


def test_an_sbatch_that_takes_effect_late(slurm_cluster: SlurmCluster, wrapped: Wrapped) -> None:
    """
    The array appears after the user has submitted again: its round has been dealt anew, and
    its elements end without doing anything.
    """
    late = f'(while [ ! -e "{wrapped.directory}/go" ]; do sleep 0.1; done; exec "$real" "$@")'
    wrapped.wrap("sbatch", only_for("job.sh", f"{late} >/dev/null 2>&1 & {NO_ANSWER}"))
    quick = QuickRun(slurm_cluster, PATH=wrapped.path)
    quick.submit("--array", "2", rc=31, gate=quick.gate)
    Command(quick.directory, slurm_cluster.env).run("submit", "run")
    (wrapped.directory / "go").touch()
    name = f"hpcresume-{quick.run_id}-0"
    wait_until(
        lambda: [e for e in slurm_cluster.jobs(name) if e.ended],
        timeout_s=60,
        describe=slurm_cluster.evidence,
    )
    quick.gate.touch()

    assert 2 == len(quick.wait_complete()["rounds"])
    assert (set(), 1) == (quick.workers(0), len(quick.workers(1)))
    assert "belongs to a later round" in logs_of(quick.run)


def run_all(commands: list[subprocess.Popen[str]]) -> list[str]:
    """Wait for commands that run at once; all must succeed; return what each said."""
    said = ["\n".join(process.communicate(timeout=200)) for process in commands]
    assert [0] * len(commands) == [process.returncode for process in commands], "\n".join(said)
    return said


@pytest.mark.parametrize(
    "apart", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["here", "on two nodes"]
)
def test_submitting_at_the_same_moment(
    slurm_cluster: SlurmCluster, tmp_path: Path, apart: bool
) -> None:
    """
    Three `submit` at once of a new run, then three more while it works: one array works,
    also where the commands see no lock of each other's.
    """
    quick = QuickRun(slurm_cluster)
    places = [tmp_path / (f"node{n}" if apart else "node") for n in range(3)]
    for place in places:
        place.mkdir(exist_ok=True)
    commands = [Command(quick.directory, {**quick.env, "TMPDIR": str(p)}) for p in places]
    first = [c.start(*quick.arguments("--array", "2", gate=quick.gate)) for c in commands]
    said = run_all(first)
    said += run_all([c.start("submit", "run") for c in commands])
    quick.gate.touch()

    status = quick.wait_complete()
    workers = set.union(*(quick.workers(round_["round"]) for round_ in status["rounds"]))
    assert 1 == len(workers), said
    if not apart:
        assert 1 == sum("submitted: 2 tasks" in text for text in said), said
        assert 1 == len({job["array"] for job in quick.jobs()})


def test_the_recorded_array_is_not_the_one_that_works(
    slurm_cluster: SlurmCluster, wrapped: Wrapped
) -> None:
    """
    A second array of the same round starts first and claims it.  The recorded one's elements
    end at once, its merge job sees the other at work and another merge job follows that.
    """
    wrapped.wrap("sbatch", only_for("job.sh", 'exec "$real" --hold "$@"'))
    quick = QuickRun(slurm_cluster, PATH=wrapped.path)
    quick.submit("--array", "2", dies="30", gate=quick.gate)
    (recorded,) = quick.jobs()
    script = quick.run / "rounds/0000/submit/job.sh"
    rival = slurm_cluster.run_as_user("sbatch", "--parsable", str(script))
    wait_until(
        lambda: {rival} == quick.workers(0),
        timeout_s=60,
        describe=lambda: slurm_cluster.evidence() + logs_of(quick.run),
    )
    slurm_cluster.run("scontrol", "release", recorded["array"])
    slurm_cluster.wait_ended(recorded["merge"])
    shown = quick.command.status(quick.run)
    # From now on arrays are not held.
    wrapped.wrap("sbatch")
    quick.gate.touch()

    status = quick.wait_complete()
    assert "running" == shown["state"]
    assert "no merge job" not in shown["reason"], shown
    assert ({rival}, 1) == (quick.workers(0), len(quick.workers(1)))
    assert 2 == len(status["rounds"])
    assert f"belongs to {rival}" in logs_of(quick.run)


GATED = """
touch "{directory}/called"
while [ ! -e "{directory}/go" ]; do sleep 0.1; done
exec "$real" "$@"
"""


def freeze_in_sbatch(cluster_: SlurmCluster, wrapped: Wrapped, *, hold_s: float) -> None:
    """Wait until sbatch is called, then let it meet a frozen controller for so long."""
    wait_until(
        (wrapped.directory / "called").exists,
        timeout_s=120,
        describe=cluster_.evidence,
    )
    with cluster_.paused_controller():
        frozen = time.monotonic()
        (wrapped.directory / "go").touch()
        wait_until(lambda: time.monotonic() - frozen > hold_s, timeout_s=hold_s + 5, describe=str)


@pytest.mark.slow
def test_the_controller_stops_in_the_middle_of_sbatch(
    slurm_cluster: SlurmCluster, wrapped: Wrapped
) -> None:
    """
    slurmctld stands still for 30 s while sbatch waits for it: `submit` fails, whether the
    array is submitted is open, and submitting again leads to one array that works.
    """
    gate = GATED.format(directory=wrapped.directory)
    wrapped.wrap("sbatch", only_for("job.sh", gate.strip().replace("\n", "; ")))
    quick = QuickRun(slurm_cluster, PATH=wrapped.path)
    process = quick.command.start(*quick.arguments("--array", "2", dies="30"))
    freeze_in_sbatch(slurm_cluster, wrapped, hold_s=30)
    _, said = process.communicate(timeout=60)

    Command(quick.directory, slurm_cluster.env).run("submit", "run")

    assert 31 == process.returncode, said
    status = quick.wait_complete()
    working = [quick.workers(round_["round"]) for round_ in status["rounds"]]
    assert all(len(arrays) <= 1 for arrays in working), working
    assert 2 == sum(len(arrays) for arrays in working)


@pytest.mark.parametrize(
    ("patience", "twin"),
    [("600", False), pytest.param("1", True, marks=pytest.mark.slow)],
    ids=["waits", "gives up"],
)
def test_the_controller_stops_while_the_merge_job_submits(
    slurm_cluster: SlurmCluster, wrapped: Wrapped, patience: str, twin: bool
) -> None:
    """
    The merge job tries again for as long as it has patience, after that its twin does: the
    next round is worked on by one array.
    """
    gate = GATED.format(directory=wrapped.directory).strip().replace("\n", "; ")
    body = f'case "${{!#}}" in */0001/submit/job.sh) {gate};; *) exec "$real" "$@";; esac'
    wrapped.wrap("sbatch", body)
    patient = {"HPCRESUME_MERGE__PATIENCE_S": patience}
    quick = QuickRun(slurm_cluster, PATH=wrapped.path, **patient)
    quick.submit("--array", "2", dies="30")
    freeze_in_sbatch(slurm_cluster, wrapped, hold_s=15)

    status = quick.wait_complete()
    assert 2 == len(status["rounds"]), status
    assert 1 == len(quick.workers(1))
    assert ("Trying again" in logs_of(quick.run)) != twin
    merge_logs = list(quick.run.glob("rounds/0000/logs/merge_*.out"))
    assert (2 if twin else 1) == len(merge_logs), merge_logs


@pytest.mark.slow
def test_when_no_merge_job_is_left_status_says_what_to_do(
    slurm_cluster: SlurmCluster, wrapped: Wrapped
) -> None:
    """
    Slurm answers neither the merge job nor its twin: both give up and say so with their exit
    code, and `status` names the command that goes on.
    """
    wrapped.wrap("sbatch", f'case "${{!#}}" in */0001/*) {NO_ANSWER};; *) exec "$real" "$@";; esac')
    patient = {"HPCRESUME_MERGE__PATIENCE_S": "0.5"}
    quick = QuickRun(slurm_cluster, PATH=wrapped.path, **patient)
    quick.submit("--array", "2", dies="30")
    (job,) = quick.jobs()

    stopped = quick.command.wait_ended(quick.run)
    exit_codes = [slurm_cluster.show(job[name]).exit_code for name in ("merge", "twin")]
    Command(quick.directory, slurm_cluster.env).run("merge", "run", "--requeue")

    assert "interrupted" == stopped["state"], stopped
    assert f"to go on: hpcresume merge {quick.run} --requeue" in stopped["reason"]
    assert ["31:0", "31:0"] == exit_codes
    assert 2 == len(quick.wait_complete()["rounds"])


def test_the_controller_stops_while_a_task_requeues_itself(slurm_cluster: SlurmCluster) -> None:
    """
    A task that is told to end publishes, gets no answer from the controller, and leaves its
    rest to the merge job.  Meanwhile `status` tells what the run directory tells.
    """
    quick = QuickRun(slurm_cluster)
    quick.submit("--array", "1", n=60, ms=300)
    wait_until(
        lambda: any(task["completed"] for task in quick.command.status(quick.run)["tasks"]),
        timeout_s=120,
        describe=lambda: logs_of(quick.run),
    )
    (pid,) = attempt_pids(quick.run, 0, 0)
    with slurm_cluster.paused_controller():
        os.kill(pid, signal.SIGTERM)
        start = time.monotonic()
        status = quick.command.status(quick.run)
        took_s = time.monotonic() - start
        wait_until(
            lambda: not Path(f"/proc/{pid}").exists(),
            timeout_s=60,
            describe=lambda: logs_of(quick.run),
        )

    ended = quick.command.wait_ended(quick.run)
    assert "did not answer" in status["unasked"]
    assert status["state"] in {"running", "waiting"}
    assert status["sources"]["completed"] > 0
    assert took_s < 30
    assert ("complete", 2) == (ended["state"], len(ended["rounds"])), ended
    assert ["saved", "done"] == [task["state"] for task in ended["tasks"]]
    assert quick_result(60) == quick.collected()


@pytest.fixture
def bare_cluster() -> Iterator[SlurmCluster]:
    """Return a cluster without accounting."""
    with cluster(accounting=False) as made:
        yield made


def test_a_cluster_without_accounting(bare_cluster: SlurmCluster, wrapped: Wrapped) -> None:
    """
    Nothing asks for accounting: a run loses a task, goes on in a second round, and completes.
    `status` asks the queue once, and `submit --wait` does not ask it all the time.
    """
    for name in ("squeue", "sacct", "sacctmgr"):
        wrapped.wrap(name)
    quick = QuickRun(bare_cluster, PATH=wrapped.path)
    quick.submit("--array", "2", dies="30", gate=quick.gate)
    counts = []
    for _ in range(2):
        before = len(wrapped.calls())
        quick.command.run("status", "run")
        counts.append(len(wrapped.calls()) - before)
    quick.gate.touch()
    before = len(wrapped.calls())
    quick.command.run("submit", "run", "--wait")

    assert [1, 1] == counts
    assert 2 == len(quick.wait_complete()["rounds"])
    assert {"squeue"} == {call.split()[0] for call in wrapped.calls()}
    # Three for the submission, some for two merge jobs, one in 30 s for the wait.
    assert len(wrapped.calls()) - before < 40


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("exec sleep 300", "no answer within 10 s"),
        pytest.param(
            "echo 'slurm_load_jobs error: Socket timed out' >&2; exit 1",
            "Socket timed out",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "echo 'squeue: error: Invalid user' >&2; exit 1",
            "Invalid user",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["slow", "no answer", "refused"],
)
def test_status_without_squeue(
    slurm_cluster: SlurmCluster, wrapped: Wrapped, body: str, why: str
) -> None:
    """What squeue does not tell is named; the rest is what the run directory holds."""
    quick = QuickRun(slurm_cluster)
    quick.submit("--array", "2", dies="30", gate=quick.gate)
    wrapped.wrap("squeue", body)
    blind = Command(quick.directory, {**quick.env, "PATH": wrapped.path})
    start = time.monotonic()
    working = blind.status(quick.run)
    took_s = time.monotonic() - start
    quick.gate.touch()
    quick.wait_complete()
    ended = blind.status(quick.run)

    assert took_s < 30
    assert working["state"] in {"running", "waiting"}
    assert (40, 0) == (working["sources"]["remaining"], working["sources"]["completed"])
    assert why in working["unasked"]
    assert ("complete", 40) == (ended["state"], ended["sources"]["completed"])
    assert 2 == len(wrapped.calls())
