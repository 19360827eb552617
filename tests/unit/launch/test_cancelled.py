"""Cancelled array tasks by squeue, the accounting or their own files; stopping a whole run."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcresume.config import Resolved, load_settings
from hpcresume.launch.cancelled import cancelled_tasks
from hpcresume.launch.rounds import pardon, reopen, withhold
from hpcresume.launch.stopping import cancel_run, unless_stopped
from hpcresume.merge.plan import open_plan
from hpcresume.run.directory import JobRecord
from hpcresume.run.manifest import Manifest
from hpcresume.segment import bitmap as bitmaps
from tests.support.runs import MadeRun, make_run

Tool = Callable[..., Path]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Return a function that puts a command of Slurm's on the path: what it prints and exits with.

    It returns the file that counts its calls.
    """
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    monkeypatch.setenv("PATH", f"{bin_dir}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, *lines: str, status: int = 0) -> Path:
        calls = tmp_path / f"{name}.calls"
        printed = "".join(f"{line}\n" for line in lines)
        (bin_dir / f"{name}.txt").write_text(printed)
        path = bin_dir / name
        path.write_text(
            f'#!/bin/sh\necho "$@" >> {calls}\ncat {bin_dir}/{name}.txt >&{1 + bool(status)}\n'
            f"exit {status}\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return calls

    return make


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    """Return a run of nine sources in three array tasks, submitted as array 7."""
    made = make_run(tmp_path, sources=9, tasks=3)
    made.job(cluster="slurm", array="7")
    return made


def listed(task: int, state: str, array: int = 7) -> str:
    """Return a line of squeue's."""
    return f"{array}_{task}|{array}|{task}|{state}|n1|None||name"


def cancelled(made: MadeRun) -> list[int]:
    """Return the cancelled tasks of round 0."""
    remainder = bitmaps.span(0, len(made.ids)) - made.union().settled()
    return cancelled_tasks(made.run, open_plan(made.run, 0), remainder)


def test_squeue_remembers(made: MadeRun, tool: Tool) -> None:
    """CANCELLED counts; failed, preempted and completed elements go on; sacct is not asked."""
    tool("squeue", listed(0, "FAILED"), listed(1, "CANCELLED"), listed(2, "PREEMPTED"))
    asked = tool("sacct")

    assert [1] == cancelled(made)
    assert not asked.exists()


def test_finished_shards_do_not_count(made: MadeRun, tool: Tool) -> None:
    """An element that is cancelled after its shard was done owes nothing."""
    made.publish(made.attempt(1), [[3, 4, 5]])
    tool("squeue", *(listed(task, "CANCELLED") for task in range(3)))

    assert [0, 2] == cancelled(made)


def test_the_accounting_is_asked_once(made: MadeRun, tool: Tool) -> None:
    """What squeue has forgotten one question to sacct answers; the last of several runs counts."""
    tool("squeue", listed(0, "COMPLETED"))
    asked = tool(
        "sacct",
        "7_0|COMPLETED|0:0|100|200",
        "7_1|REQUEUED|0:0|100|150",
        "7_1|CANCELLED by 0|0:0|Unknown|160",
        "7_2|REQUEUED|0:0|100|150",
        "7_2|FAILED|85:0|160|200",
    )
    for task in range(3):
        made.attempt(task)

    assert [1] == cancelled(made)
    assert 1 == len(asked.read_text().splitlines())


def test_element_that_never_ran(made: MadeRun, tool: Tool) -> None:
    """
    An element without an attempt, a log, or a record anywhere was cancelled while it waited;
    one that was launched and left no attempt was not.
    """
    tool("squeue", listed(0, "FAILED"))
    tool("sacct", "7_0|FAILED|85:0|100|200")
    made.log("7_2.out", "refused")

    assert [1] == cancelled(made)


@pytest.mark.parametrize("answer", ["Slurm accounting storage is disabled", "unable to contact"])
def test_no_accounting(
    made: MadeRun, tool: Tool, answer: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without accounting an attempt's own record of a cancellation counts, and that is said."""
    tool("squeue")
    tool("sacct", answer, status=1)
    made.attempt(0)
    made.end(made.attempt(1), "saved", kind="cancelled")
    made.end(made.attempt(2), "saved", kind="terminated")

    assert [1] == cancelled(made)
    assert "told by their own files" in caplog.text


def test_a_later_attempt_overrules_a_cancelled_one(made: MadeRun, tool: Tool) -> None:
    """An element that somebody requeued after its cancellation is judged by its last attempt."""
    tool("squeue", listed(0, "COMPLETED"), listed(2, "COMPLETED"))
    tool("sacct", "Slurm accounting storage is disabled", status=1)
    made.end(made.attempt(1), "saved", kind="cancelled")
    made.end(made.attempt(1), "saved", kind="preempted")

    assert [] == cancelled(made)


def test_a_round_without_a_submission(tmp_path: Path, tool: Tool) -> None:
    """A round that was planned and never submitted was not cancelled."""
    tool("squeue")
    tool("sacct")

    assert [] == cancelled(make_run(tmp_path, sources=9, tasks=3))


def test_the_array_that_owns_the_round(made: MadeRun, tool: Tool) -> None:
    """A second array for the same round, whose elements ended at once, has no say."""
    made.run.claim_round(0, "8")
    states = ("CANCELLED", "COMPLETED", "COMPLETED")
    tool(
        "squeue",
        *(listed(task, "FAILED", array=8) for task in range(3)),
        *(listed(task, state) for task, state in enumerate(states)),
    )

    assert [] == cancelled(made)


def test_single_jobs(tmp_path: Path, tool: Tool) -> None:
    """Where the site has no arrays the order of submission tells whose job it is."""
    made = make_run(tmp_path, sources=9, tasks=3)
    made.job(cluster="slurm", array="9,10,11")
    tool("squeue", "9|9|N/A|FAILED|n1|None||name", "10|10|N/A|CANCELLED|n1|None||name")
    tool("sacct", "11|CANCELLED by 5|0:0|100|200")

    assert [1, 2] == cancelled(made)


NAME = "hpcresume-0123456789abcdef"
RECORD = JobRecord(cluster="slurm", array="7", merge="8", twin="9")


def queued(job: str, name: str, state: str = "PENDING") -> str:
    """Return squeue's line of a job that is no element of an array."""
    return f"{job}|{job}|N/A|{state}|n1|None||{name}"


def element(array: int, task: int, state: str, round_: int = 0) -> str:
    """Return squeue's line of an element of a round's array."""
    return f"{array}_{task}|{array}|{task}|{state}|n1|None||{NAME}-{round_}"


def test_cancel_finds_every_job_of_the_run(made: MadeRun, tool: Tool) -> None:
    """Arrays of every round, merge jobs and twins are cancelled; ended and foreign jobs are not."""
    tool(
        "squeue",
        *(element(7, task, "RUNNING") for task in (0, 1)),
        queued("8", f"{NAME}-0-merge"),
        queued("9", f"{NAME}-0-twin"),
        element(12, 0, "PENDING", round_=1),
        queued("3", f"{NAME}-0-merge", "COMPLETED"),
        queued("4", "hpcresume-fedcba9876543210-0-merge"),
        queued("5", "mine"),
    )
    calls = tool("scancel")

    jobs = cancel_run(made.run)

    assert ["8", "9", "7", "12"] == jobs
    assert ["8 9 7 12"] == calls.read_text().splitlines()


def test_cancel_waits_for_a_merge_at_work(made: MadeRun, tool: Tool, tmp_path: Path) -> None:
    """What a merge job submits while it is being cancelled is cancelled as well."""
    tool("squeue", queued("8", f"{NAME}-0-merge", "RUNNING"))
    calls = tool("scancel")
    later = "\n".join([queued("8", f"{NAME}-0-merge", "CANCELLED"), element(9, 0, "PENDING", 1)])
    scancel = tmp_path / "bin" / "scancel"
    scancel.write_text(scancel.read_text().replace("exit 0", ""))
    with scancel.open("a") as script:
        script.write(f"cat > {tmp_path}/bin/squeue.txt <<'END'\n{later}\nEND\n")

    jobs = cancel_run(made.run)

    assert ["8", "9"] == jobs
    assert ["8", "9"] == calls.read_text().splitlines()


def test_cancel_twice(made: MadeRun, tool: Tool) -> None:
    """Where nothing is queued, nothing is cancelled."""
    tool("squeue", element(7, 0, "CANCELLED"))
    calls = tool("scancel")

    assert [] == cancel_run(made.run)
    assert not calls.exists()


def test_nothing_is_submitted_under_a_stop_mark(made: MadeRun, tool: Tool) -> None:
    """A round that is about to be submitted when the run is stopped stays unsubmitted."""
    made.run.set_mark("stop")
    calls = tool("scancel")
    submitted: list[JobRecord] = []

    assert unless_stopped(made.run, lambda: submitted.append(RECORD) or RECORD) is None
    assert [] == submitted
    assert not calls.exists()


def test_what_was_submitted_beside_a_stop_is_taken_back(made: MadeRun, tool: Tool) -> None:
    """A stop mark that appears during a submission takes back all of its jobs."""
    calls = tool("scancel")

    def submit() -> JobRecord:
        made.run.set_mark("stop")
        return RECORD

    assert unless_stopped(made.run, submit) is None
    assert ["8 9 7"] == calls.read_text().splitlines()


def test_what_is_submitted_stays(made: MadeRun, tool: Tool) -> None:
    """Without a stop mark nothing is taken back."""
    calls = tool("scancel")

    assert RECORD is unless_stopped(made.run, lambda: RECORD)
    assert not calls.exists()


def resolved() -> Resolved:
    """Return settings with which a round could be submitted."""
    return load_settings(site="generic", start_dir=Path("/"), environ={}, flags={})


def test_submitting_takes_back_a_cancellation(made: MadeRun) -> None:
    """
    Shards of cancelled tasks stay out until the user submits; those whose cancellation the
    user has overtaken are not kept out by a merge that still finds them cancelled.
    """
    manifest, settings = Manifest.open(made.run), resolved().settings
    plan = open_plan(made.run, 0)

    first = withhold(made.run, manifest, settings, plan, [1])
    reopen(made.run, quarantined=False)
    pardon(made.run, 0, [0, 1])
    second = withhold(made.run, manifest, settings, plan, [1, 2])

    assert {3, 4, 5} == set(first.union.withheld)
    assert {0, 1, 2, 6, 7, 8} == set(first.remainder)
    assert {6, 7, 8} == set(second.union.withheld)
    assert {0, 1, 2, 3, 4, 5} == set(second.remainder)


def test_all_shards_cancelled(made: MadeRun) -> None:
    """A run whose every shard was cancelled stops, and says why."""
    manifest, settings = Manifest.open(made.run), resolved().settings
    plan = open_plan(made.run, 0)

    standing = withhold(made.run, manifest, settings, plan, [0, 1, 2])

    assert "9 sources belong to array tasks that were cancelled" == standing.stopped
    assert not standing.remainder
