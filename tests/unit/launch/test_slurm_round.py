"""A round of several arrays: what is submitted, looked up and waited for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyroaring import BitMap

from hpcresume.config import Resolved
from hpcresume.launch.drive import merge_step
from hpcresume.launch.ladder import Ladder
from hpcresume.launch.rounds import (
    learnt,
    note_starved,
    plan_round,
    stand,
    why_stopped,
)
from hpcresume.launch.slurm_round import slurm_ladder, starved_tasks, submit_round
from hpcresume.merge.generation import write_generation
from hpcresume.merge.plan import ArrayPlan, Launch, Plan, newest_plan, open_plan
from hpcresume.run.directory import AttemptInfo
from hpcresume.run.manifest import Manifest
from hpcresume.segment import bitmap as bitmaps
from tests.support.runs import MadeRun, make_run
from tests.unit.launch.jobs import sbatch_reads, settings

LAUNCH = Launch("slurm", 4, site="generic", cwd="/")


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    return make_run(tmp_path, sources=40, tasks=None)


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Return a function that puts a shell script of a given name on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(name: str, body: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)

    make("squeue", "true")
    # Each job gets the next number, and its script is kept under it.
    make("sbatch", f'cd {folder}; n=$(ls | wc -l); cp "$2" $n; echo $n')
    return make


def given(**site: Any) -> Resolved:
    return settings({"request": {"mem": "1000M"}, "site": site})


def make_plan(
    made: MadeRun,
    short: dict[int, list[int]],
    *,
    array: int = 4,
    throttle: int = 0,
    **site: Any,
) -> Plan:
    """Plan the next round of a run in which memory was not enough for some sources."""
    resolved = given(**site)
    standing = stand(made.run, Manifest.open(made.run), resolved.settings)
    for mib, sources in short.items():
        standing.union.note_short(BitMap(sources), mib)
    write_generation(made.run, standing.union)
    number = plan_round(
        made.run,
        Manifest.open(made.run),
        standing,
        after=newest_plan(made.run),
        settings=resolved.settings,
        code=1,
        launch=Launch("slurm", array, throttle, site="generic", cwd="/"),
        ladder=Ladder(1000, 1.5, 0, "", lambda _mib: True),
    )
    return open_plan(made.run, number)


def sources_of(plan: Plan, array: ArrayPlan) -> BitMap:
    tasks = range(array.first, array.first + array.tasks)
    return bitmaps.union(plan.shard(task).bitmap() for task in tasks)


def scripts(tmp_path: Path) -> list[dict[str, str | None]]:
    """Return the options of every job submitted, in order."""
    paths = sorted(
        (p for p in (tmp_path / "bin").iterdir() if p.name.isdigit()), key=lambda p: p.name
    )
    return [dict(sbatch_reads(path.read_text())) for path in paths]


def test_one_array_for_each_request(made: MadeRun) -> None:
    """Tasks are numbered through the round, and the shards of an array hold its sources only."""
    plan = make_plan(made, {1000: [3, 4]})
    assert [ArrayPlan(0, 3), ArrayPlan(3, 1, 1500)] == plan.arrays
    assert (4, 40) == (plan.footer.tasks, plan.footer.sources)
    few, many = (sources_of(plan, array) for array in reversed(plan.arrays))
    assert (BitMap([3, 4]), 38) == (few, len(many))


def test_a_task_for_each_request_though_one_was_asked_for(made: MadeRun) -> None:
    """`--array 1` is one task of each request, or of the largest where the site takes one job."""
    both, one = make_plan(made, {1000: [3]}, array=1), make_plan(made, {}, max_submit=3)
    assert [ArrayPlan(0, 1), ArrayPlan(1, 1, 1500)] == both.arrays
    assert [ArrayPlan(0, 1, 1500)] == one.arrays


def test_all_arrays_are_submitted_and_waited_for(made, tool, tmp_path: Path) -> None:
    """Two arrays, and a merge job that begins after both of them."""
    plan = make_plan(made, {1000: [3]})

    record = submit_round(made.run, plan, given())

    first, second, merge, twin = scripts(tmp_path)
    assert [("0-2", "1000M"), ("3-3", "1500M")] == [(s["array"], s["mem"]) for s in (first, second)]
    assert first["job-name"] == second["job-name"]
    ids = record.array.split(",")
    assert f"afterany:{ids[0]}:{ids[1]}" == merge["dependency"]
    assert f"afternotok:{record.merge}" == twin["dependency"]
    assert [record.merge, record.twin, *ids] == record.job_ids
    assert [record] == made.run.job_records(0)
    folders = {p.parent.name for p in Path(made.path).glob("rounds/0000/*/job.sh")}
    assert {"submit", "submit-00003"} == folders


def test_throttle_is_shared(made, tool, tmp_path: Path) -> None:
    """No more elements run at once than asked for, whatever array they are of."""
    plan = make_plan(made, {1000: [3]}, throttle=2)

    submit_round(made.run, plan, given())

    assert ["0-2%1", "3-3%1"] == [script["array"] for script in scripts(tmp_path)[:2]]


def test_what_a_dead_submitter_left_out_is_submitted(made, tool, tmp_path: Path) -> None:
    """The first array is in the queue, the second is not: it alone is submitted."""
    plan = make_plan(made, {1000: [3]})
    name = f"hpcresume-{made.run.run_id}-0"
    lines = "".join(f"77_{task}|77|{task}|PENDING||None||{name}\\n" for task in range(3))
    tool("squeue", f'case "$*" in *-merge*) ;; *) printf "{lines}";; esac')

    record = submit_round(made.run, plan, given())

    submitted, merge, _twin = scripts(tmp_path)
    assert ("3-3", "1500M") == (submitted["array"], submitted["mem"])
    assert "77" == record.array.split(",")[0]
    assert f"afterany:{record.array.replace(',', ':')}" == merge["dependency"]


def test_an_array_that_has_ended_is_not_submitted_again(made, tool, tmp_path: Path) -> None:
    """Where another array of the round is in the queue, what is left is the merge step's."""
    plan = make_plan(made, {1000: [3]})
    name = f"hpcresume-{made.run.run_id}-0"
    lines = "".join(f"77_{task}|77|{task}|FAILED||None||{name}\\n" for task in range(3))
    lines += f"78_3|78|3|RUNNING||None||{name}\\n"
    made.run.claim_round(0, "77")
    tool("squeue", f'case "$*" in *-merge*) ;; *) printf "{lines}";; esac')

    record = submit_round(made.run, plan, given())

    assert "78" == record.array
    assert [None, None] == [script.get("array") for script in scripts(tmp_path)]


def test_single_jobs_ask_for_their_own_memory(made, tool, tmp_path: Path) -> None:
    """Without arrays each task is a job, with the memory of its request."""
    plan = make_plan(made, {1000: [3]}, array=3)

    record = submit_round(made.run, plan, given(arrays=False))

    *singles, merge, _twin = scripts(tmp_path)
    assert ["1000M", "1000M", "1500M"] == [script["mem"] for script in singles]
    assert f"afterany:{record.array.replace(',', ':')}" == merge["dependency"]


def test_other_memory_options_give_way(made, tool, tmp_path: Path) -> None:
    """Slurm takes one of --mem, --mem-per-cpu and --mem-per-gpu only."""
    resolved = settings({"request": {"extra": ["--mem-per-cpu=500M", "--nice=5"]}})
    plan = make_plan(made, {1000: [3]})

    submit_round(made.run, plan, resolved)

    first, second, *_ = scripts(tmp_path)
    assert ("500M", None) == (first["mem-per-cpu"], first.get("mem"))
    assert ("1500M", "5") == (second["mem"], second["nice"])
    assert "mem-per-cpu" not in second


@pytest.mark.parametrize(
    ("takes", "granted"), [("true", True), ('! grep -q "mem=9" "$2"', False), ("false", True)]
)
def test_slurm_is_asked_what_it_grants(made, tool, takes: str, granted: bool) -> None:
    """With the script itself; where even the usual request is refused, memory is not why."""
    tool("sbatch", f"{takes} || {{ echo not available >&2; exit 1; }}")
    assert granted is slurm_ladder(made.run, LAUNCH, given()).is_granted(9000)


# -- the whole step was killed ----------------------------------------------------------------


def start(made: MadeRun, task: int, *, outcome: bool = False) -> None:
    """Record an attempt of round 0, as element 77_<task> of 1000 MiB, and maybe how it ended."""
    ref = made.run.allocate_attempt(0, task)
    info = AttemptInfo(
        *("n", "host", "boot", 1, "", 1),
        job_id=f"77_{task}",
        array_job_id="77",
        memory_mib=1000,
    )
    made.run.write_record(made.run.attempt_path(ref, "attempt.json"), info, label="record")
    if outcome:
        made.end(ref, "saved")


def test_tasks_that_could_not_say_how_they_ended(made, tool) -> None:
    """Only where the step's exit code tells of memory, and no outcome tells otherwise."""
    make_plan(made, {})
    for task in range(3):
        start(made, task, outcome=task == 1)
    codes = {0: "0:9", 1: "0:125", 2: "0:125"}
    lines = [
        f"JobId={task} ArrayJobId=77 ArrayTaskId={task} JobName=x JobState=FAILED "
        f"ExitCode=1:0 DerivedExitCode={code}"
        for task, code in codes.items()
    ]
    tool("scontrol", "\n".join(f"echo '{line}'" for line in lines))

    assert [2] == starved_tasks(made.run, 0)


def test_nobody_is_asked_where_all_have_said(made, tool) -> None:
    """Tasks with an outcome, and tasks that never began, are no question for Slurm."""
    make_plan(made, {})
    start(made, 0, outcome=True)
    tool("scontrol", "exit 1")
    assert [] == starved_tasks(made.run, 0)


def test_what_is_left_of_a_killed_task_gets_more(made) -> None:
    """Its whole share that is not done, and no other's; nobody is charged."""
    plan = make_plan(made, {})
    start(made, 2)
    manifest, resolved = Manifest.open(made.run), given()

    standing = note_starved(made.run, manifest, resolved.settings, plan, [2])

    assert {1000: plan.shard(2).bitmap()} == standing.union.short
    assert {} == standing.union.failures
    again = note_starved(made.run, manifest, resolved.settings, plan, [2])
    assert standing.union.number == again.union.number == 2


def submitted(made: MadeRun, short: dict[int, list[int]]) -> None:
    """Plan a round and record that it was submitted."""
    made.job(round_=make_plan(made, short).footer.round, cluster="slurm")


def test_a_step_towards_enough_memory_is_progress(made) -> None:
    """Rounds that complete nothing but raise the memory of a source do not stop the run."""
    resolved, everything = given(), list(range(40))
    for mib in (1000, 1500, 2250, 3375):
        submitted(made, {mib: everything})
    standing = stand(made.run, Manifest.open(made.run), resolved.settings)
    assert 40 * 3375 == learnt(standing)

    assert "" == why_stopped_of(made, {5063: everything})
    submitted(made, {3375: everything})
    submitted(made, {3375: everything})
    assert "3 rounds in a row completed nothing" in why_stopped_of(made, {})


def why_stopped_of(made: MadeRun, short: dict[int, list[int]]) -> str:
    standing = stand(made.run, Manifest.open(made.run), given().settings)
    for mib, sources in short.items():
        standing.union.note_short(BitMap(sources), mib)
    return why_stopped(made.run, standing, given().settings)


def test_a_merge_that_died_amid_submitting_is_completed(made, tool, tmp_path: Path) -> None:
    """Its twin finds one array at work and no record: it submits what is missing, once."""
    make_plan(made, {1000: [3]})
    name = f"hpcresume-{made.run.run_id}-0"
    tool("squeue", f'case "$*" in *-merge*) ;; *) echo "77_0|77|0|RUNNING||None||{name}";; esac')

    steps = [merge_step(made.run) for _ in range(2)]

    assert ["running", "running"] == [step.state for step in steps]
    _array, merge, twin, *_ = scripts(tmp_path)
    assert ["3-3"] == [job["array"] for job in scripts(tmp_path) if "array" in job]
    assert ["merge", "twin"] == [str(job["job-name"]).split("-")[-1] for job in (merge, twin)]
    assert steps[0].job in made.run.job_records(0)
