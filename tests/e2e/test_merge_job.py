"""The merge step on a real Slurm: killed at every step, at once, by hand, without progress."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support.cli import Command, logs_of, wait_until
from tests.support.cluster import SlurmCluster
from tests.support.quick import QuickRun, quick_result

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

# The first merge job of a run runs with the fault in $FAULT, and no other process does.
FAULTY_MERGE = """{% extends "merge.sh.j2" %}
{% block before %}
{{ super() }}
unset HPCRESUME_TESTING HPCRESUME_FAILPOINTS
if mkdir {{ job.run_dir | sh }}.faulty; then
    export HPCRESUME_TESTING=1 HPCRESUME_FAILPOINTS="$FAULT"
fi
{% endblock %}
"""


def faulty_site(tmp_path: Path, fault: str) -> dict[str, str]:
    """Return the environment of a site whose first merge job has a fault."""
    folder = tmp_path / "faulty"
    folder.mkdir(mode=0o755)
    (folder / "site.toml").write_text('extends = "testbed"\n')
    (folder / "merge.sh.j2").write_text(FAULTY_MERGE)
    for path in folder.iterdir():
        path.chmod(0o644)
    return {"HPCRESUME_SITE_PATH": str(tmp_path), "FAULT": fault}


def killed(run: Path) -> bool:
    """Tell whether a merge job was killed, by what its shell said."""
    return any("Killed" in log.read_text() for log in run.glob("rounds/*/logs/merge_*.out"))


STEPS = [
    "round.after_array",
    *(
        pytest.param(step, marks=pytest.mark.slow)
        for step in (
            "generation.after_write",
            "generation.after_rename",
            "plan.after_write",
            "plan.after_rename",
            "round_pickle.after_rename",
            "round_script.after_rename",
            "merge_script.after_rename",
            "round.after_merge",
            "round.after_twin",
            "jobs.after_write",
            "jobs.after_rename",
        )
    ),
]


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_merge_job_has_a_twin(
    slurm_cluster: SlurmCluster, tmp_path: Path, step: str
) -> None:
    """
    Killed anywhere between reading what was published and recording what it submitted, the
    merge job is followed by its twin, one array works on the next round, and the run ends
    with every row once.
    """
    quick = QuickRun(slurm_cluster, **faulty_site(tmp_path, f"{step}=kill"))
    quick.submit("--site", "faulty", "--array", "2", dies="30")

    status = quick.wait_complete()

    assert killed(quick.run), logs_of(quick.run)
    assert 2 == len(status["rounds"]), status
    assert [1, 1] == [len(quick.workers(round_)) for round_ in (0, 1)]


@pytest.mark.parametrize(
    "step",
    [
        "finish.before_rename",
        pytest.param("finish.after_rename", marks=pytest.mark.slow),
        pytest.param("generation.after_rename:2", marks=pytest.mark.slow),
    ],
)
def test_a_merge_job_killed_while_it_ends_the_run(
    slurm_cluster: SlurmCluster, tmp_path: Path, step: str
) -> None:
    """`finish` runs again in the twin, and what it made is there once and whole."""
    site = faulty_site(
        tmp_path, step.partition(":")[0] + "=kill:" + (step.partition(":")[2] or "1")
    )
    quick = QuickRun(slurm_cluster, **site)
    quick.submit("--site", "faulty", ends=True)

    status = quick.wait_complete()

    wait_until(lambda: killed(quick.run), timeout_s=30, describe=lambda: logs_of(quick.run))
    assert 1 == len(status["rounds"]), status
    assert "40" == (quick.run / "finish" / "count").read_text()


def cancel_merges(quick: QuickRun) -> None:
    """Cancel the merge job and its twin."""
    (job,) = quick.jobs()
    quick.cluster.run("scancel", job["twin"], job["merge"])
    wait_until(
        lambda: not [name for _, name in quick.queued() if not name.endswith("-0")],
        timeout_s=30,
        describe=lambda: str(quick.queued()),
    )


def test_merging_by_hand_while_the_array_works(slurm_cluster: SlurmCluster) -> None:
    """
    While the tasks work `merge --requeue` submits none and says so; where no merge job is to
    follow them, `status` says so, and the same command submits one.
    """
    quick = QuickRun(slurm_cluster)
    quick.submit("--array", "2", gate=quick.gate)
    before = quick.queued()
    by_hand = quick.command.run("merge", "run", "--requeue")
    unchanged = quick.queued()
    cancel_merges(quick)
    alone = quick.command.status(quick.run)
    quick.command.run("merge", "run", "--requeue")
    repaired = quick.command.status(quick.run)
    after = quick.queued()
    quick.gate.touch()

    assert "is still at work; no tasks were submitted" in by_hand
    assert sorted(before) == sorted(unchanged)
    assert "no merge job is to follow round 0" in alone["reason"], alone
    assert f"hpcresume merge {quick.run} --requeue" in alone["reason"]
    assert "no merge job" not in repaired["reason"]
    assert sorted(name for _, name in before) == sorted(name for _, name in after)
    assert 1 == len(quick.wait_complete()["rounds"])


@pytest.mark.parametrize(
    "apart", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["here", "on two nodes"]
)
def test_two_merges_at_once(slurm_cluster: SlurmCluster, tmp_path: Path, apart: bool) -> None:
    """
    However many merges run at once, one array works on the next round, also where they see
    no lock of each other's.
    """
    quick = QuickRun(slurm_cluster)
    quick.submit("--array", "2", dies="30", gate=quick.gate)
    cancel_merges(quick)
    quick.gate.touch()
    slurm_cluster.wait_ended(quick.jobs()[0]["array"])

    commands = []
    for number in range(3):
        place = tmp_path / (f"node{number}" if apart else "node")
        place.mkdir(exist_ok=True)
        env = {**quick.env, "TMPDIR": str(place)}
        commands.append(Command(quick.directory, env).start("merge", "run", "--requeue"))
    said = [process.communicate(timeout=200) for process in commands]

    status = quick.wait_complete()
    assert [0, 0, 0] == [process.returncode for process in commands], said
    assert 2 == len(status["rounds"]), status
    assert 1 == len(quick.workers(1)), said


def test_no_progress_stops_the_run(slurm_cluster: SlurmCluster) -> None:
    """
    Rounds in a row that complete nothing stop the run with the reason: `submit --wait` and
    `status` exit with 1, and nothing of it is left in the queue.
    """
    fault = {"HPCRESUME_TESTING": "1", "HPCRESUME_FAILPOINTS": "supervisor.before_driver=kill"}
    quick = QuickRun(slurm_cluster, **fault)

    quick.submit("--array", "2", "--wait", rc=1)

    status = quick.command.json("status", "run", rc=1)
    assert ("stopped", 2) == (status["state"], len(status["rounds"])), status
    assert "2 rounds in a row completed nothing" in status["reason"]
    wait_until(lambda: not quick.queued(), timeout_s=30, describe=lambda: str(quick.queued()))


def test_drive_where_jobs_may_not_submit(slurm_cluster: SlurmCluster) -> None:
    """
    Where compute nodes may not submit there is no merge job: `drive` takes a run whose first
    round lost a task to its end, also when it was killed itself before it wrote down what it
    had submitted.
    """
    quick = QuickRun(slurm_cluster, HPCRESUME_SITE__SUBMIT_FROM_COMPUTE="false")
    quick.submit("--array", "2", dies="30")
    slurm_cluster.wait_ended(quick.jobs()[0]["array"])
    idle = quick.command.status(quick.run)

    fault = {"HPCRESUME_TESTING": "1", "HPCRESUME_FAILPOINTS": "round.after_array=kill"}
    dying = Command(quick.directory, {**quick.env, **fault}).start("drive", "run")
    dying.communicate(timeout=120)
    quick.command.run("drive", "run", "--interval", "1")

    assert f"hpcresume drive {quick.run}" in idle["reason"]
    assert -signal.SIGKILL == dying.returncode
    assert 2 == len(quick.wait_complete()["rounds"])
    assert 1 == len(quick.workers(1))
    assert [] == list(quick.run.glob("rounds/*/logs/merge*"))


@pytest.mark.parametrize(
    ("worth", "tasks"),
    [("60", [16, 1]), pytest.param("0", [16, 3], marks=pytest.mark.slow)],
    ids=["a minute", "any work"],
)
def test_a_few_sources_left_take_a_few_tasks(
    slurm_cluster: SlurmCluster, worth: str, tasks: list[int]
) -> None:
    """
    Of 16 array tasks three die with one source left each: as quick as these are measured to
    be, they make one task, or three where any work is worth one.
    """
    quick = QuickRun(slurm_cluster, HPCRESUME_RUN__MIN_TASK_S=worth)
    quick.submit("--array", "16", n=16, dies="2 7 11")

    status = quick.command.wait_ended(quick.run)

    assert ("complete", tasks) == (status["state"], [r["tasks"] for r in status["rounds"]])
    assert quick_result(16) == quick.collected()
