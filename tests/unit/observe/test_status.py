"""How a run stands, from its files and one question to Slurm."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from hpcresume import slurm
from hpcresume.cli.status import status_line, status_lines
from hpcresume.errors import SlurmUnreachableError
from hpcresume.observe.status import read_status
from hpcresume.output.run import Run
from hpcresume.segment.segment import Progress, StageCount
from tests.support.runs import make_run


def ended_pid():
    """Return the id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def answer(monkeypatch, *entries):
    """Let squeue answer with entries (task, state) of job array 7; return the names asked for.

    A task that is no number is the name of a merge job, after what its round's name is.
    """
    calls = []

    def queue(*, name, **_options):
        calls.append(name.split(","))
        return [
            slurm.QueueEntry(f"7_{task}", "7", task, calls[0][0], state, None, "n1")
            if isinstance(task, int)
            else slurm.QueueEntry("8", "8", None, f"{calls[0][0]}-{task}", state, None, None)
            for task, state in entries
        ]

    monkeypatch.setattr(slurm, "queue", queue)
    return calls


def stands(made, **options):
    """Return a run's state."""
    return read_status(made.run, **options).state


def test_a_run_without_a_plan_is_planned(tmp_path):
    """Before its first round a run is planned and everything remains."""
    status = read_status(make_run(tmp_path, sources=4, tasks=None).run)

    assert ("planned", 4, []) == (status.state, status.sources.remaining, status.rounds)


def test_a_plan_that_nobody_submitted_is_planned(tmp_path):
    """A round with a plan and nothing else is planned, its tasks wait."""
    status = read_status(make_run(tmp_path, sources=4, tasks=2).run)

    assert ("planned", "planned") == (status.state, status.rounds[0].state)
    assert ["waiting", "waiting"] == [task.state for task in status.tasks]


def test_a_submitted_round_waits_for_its_tasks(tmp_path):
    """Once submitted and before a task starts a run is waiting."""
    made = make_run(tmp_path)
    made.job()

    assert "waiting" == stands(made)


def test_between_local_rounds_the_run_waits_while_its_submit_lives(tmp_path):
    """All tasks ended, the merge not done: the process that submitted goes on, or is gone."""
    states = []
    for n, pid in enumerate((os.getpid(), ended_pid())):
        made = make_run(tmp_path, name=f"run{n}")
        made.job(array=f"{socket.gethostname()}:{pid}")
        before = stands(made)
        made.end(made.attempt())
        states.append((before, stands(made)))

    assert [("waiting", "waiting"), ("interrupted", "interrupted")] == states


def test_a_live_attempt_means_running(tmp_path):
    """While the process of an attempt lives here the run is running."""
    made = make_run(tmp_path)
    made.job()
    made.attempt()
    status = read_status(made.run)

    assert ("running", "running") == (status.state, status.tasks[0].state)


def test_a_dead_attempt_without_an_outcome_means_interrupted(tmp_path):
    """A killed task leaves no outcome; its process being gone tells."""
    made = make_run(tmp_path)
    made.job()
    made.attempt(pid=ended_pid())
    status = read_status(made.run)

    assert ("interrupted", "died") == (status.state, status.tasks[0].state)


def test_a_reused_process_id_is_not_the_attempt(tmp_path):
    """A process that is younger than the attempt is another one."""
    made = make_run(tmp_path)
    made.attempt(started_at="2001-01-01T00:00:00+00:00")

    assert "interrupted" == stands(made)


def test_an_attempt_on_another_host_is_believed_to_run(tmp_path):
    """What cannot be seen from here is said, and taken as running."""
    made = make_run(tmp_path)
    made.job()
    made.attempt(host="elsewhere")
    status = read_status(made.run)

    assert "running" == status.state
    assert "elsewhere" in status.unasked


def test_saved_tasks_and_nobody_running_mean_interrupted(tmp_path):
    """A local run that was stopped with work left is interrupted."""
    made = make_run(tmp_path)
    made.job()
    ref = made.attempt()
    made.publish(ref, [[0, 1]])
    made.end(ref, "saved", kind="terminated", completed=2)
    status = read_status(made.run)

    assert ("interrupted", "saved", 2) == (
        status.state,
        status.tasks[0].state,
        status.tasks[0].completed,
    )


def test_a_finished_run_is_complete(tmp_path):
    """All sources completed and a final generation: complete, nothing left to wait for."""
    made = make_run(tmp_path, sources=3)
    ref = made.attempt()
    made.publish(ref, [range(3)])
    made.end(ref, completed=3)
    made.finish()
    status = read_status(made.run)

    assert ("complete", 0, 0.0) == (status.state, status.sources.remaining, status.eta_s)


def test_an_empty_run_is_complete(tmp_path):
    """A run without sources that was finished is complete, and says that nothing was to do."""
    made = make_run(tmp_path, sources=0)
    made.finish()
    found = read_status(made.run)

    assert ("complete", "there are no sources: nothing to do") == (found.state, found.reason)
    for line in (status_line(found), status_lines(found)[0]):
        assert line.endswith(" (there are no sources: nothing to do)")


@pytest.mark.parametrize(("tolerate", "state"), [(0.0, "incomplete"), (0.5, "complete")])
def test_quarantined_sources_beyond_the_tolerance_are_incomplete(tmp_path, tolerate, state):
    """The pipeline's tolerance decides between complete and incomplete."""
    made = make_run(tmp_path, sources=2, tolerate=tolerate)
    made.publish(made.attempt(), [[0]], failures=[made.failure(1, retry=False)])
    made.finish()

    assert state == stands(made)


def test_a_stopped_run_gives_its_reason(tmp_path):
    """What the merge step wrote as the reason is shown."""
    made = make_run(tmp_path)
    made.end(made.attempt(), "broken", kind="stage-broken")
    made.merge(stopped="stage embed fails on every source")
    status = read_status(made.run)

    assert ("stopped", "stage embed fails on every source") == (status.state, status.reason)


def test_an_interruption_is_told_from_a_stop(tmp_path):
    """A reason that begins with `interrupted` means that submitting again goes on."""
    made = make_run(tmp_path)
    made.merge(stopped="interrupted by SIGINT")

    assert "interrupted" == stands(made)


def test_a_new_round_overtakes_an_earlier_stop(tmp_path):
    """A round that was planned after the stop counts, not the stop."""
    made = make_run(tmp_path)
    union = made.merge(stopped="no progress")
    made.plan(round_=1, generation=union.number)
    made.attempt(round_=1)

    assert "running" == stands(made)


def test_a_grown_run_is_no_longer_complete(tmp_path):
    """Sources added after the end remain, so the run is planned again."""
    made = make_run(tmp_path, sources=3)
    made.publish(made.attempt(), [[0, 1]])
    union = made.finish()
    made.plan(round_=1, generation=union.number)
    status = read_status(made.run)

    assert ("planned", 1) == (status.state, status.sources.remaining)


def test_a_stop_mark_means_cancelled_until_it_is_lifted(tmp_path):
    """A stop mark makes the run cancelled, a later resume mark does not."""
    made = make_run(tmp_path)
    made.attempt(pid=ended_pid())
    made.run.set_mark("stop")
    cancelled = stands(made)
    made.run.set_mark("resume")

    assert ("cancelled", "interrupted") == (cancelled, stands(made))


def test_cancelling_a_finished_run_leaves_it_complete(tmp_path):
    """A stop mark says nothing about a run that had already ended."""
    made = make_run(tmp_path, sources=1)
    made.publish(made.attempt(), [[0]])
    made.finish()
    made.run.set_mark("stop")

    assert "complete" == stands(made)


def test_counts_of_sources(tmp_path):
    """Sources are counted by how they stand, at risk by what live tasks last told."""
    made = make_run(tmp_path, sources=10)
    ref = made.attempt()
    failures = [made.failure(7), made.failure(8, retry=False)]
    progress = Progress(elapsed_s=2.0, in_flight=2, completed=5)
    made.publish(ref, [range(4)], failures=failures, progress=progress)
    status = read_status(made.run)
    sources = status.sources

    assert (10, 4, 1, 1, 5, 3) == (
        sources.total,
        sources.completed,
        sources.failing,
        sources.quarantined,
        sources.remaining,
        sources.at_risk,
    )
    assert (2.5, 2.0) == (status.rate_per_s, status.eta_s)
    assert (5, 2) == (status.tasks[0].completed, status.tasks[0].in_flight)


def test_an_attempt_that_died_completed_what_is_published_of_it(tmp_path):
    """What it published after it told last counts, however it stands in a generation."""
    made = make_run(tmp_path, sources=10)
    ref = made.attempt(pid=ended_pid())
    told = Progress(elapsed_s=2.0, completed=3)
    made.publish(ref, [range(4)], progress=told)
    made.merge()
    made.publish(ref, [range(4, 7)], seq=2, progress=told)
    status = read_status(made.run)

    assert (7, 7, 0) == (
        status.tasks[0].completed,
        status.sources.completed,
        status.sources.at_risk,
    )


def test_withdrawn_sources_do_not_count(tmp_path):
    """Sources that the listing no longer holds are in no count."""
    made = make_run(tmp_path, sources=4)
    made.publish(made.attempt(), [[0]], failures=[made.failure(1), made.failure(2, retry=False)])
    made.withdraw(0, 1, 2)
    sources = read_status(made.run).sources

    assert (1, 0, 0, 0, 1) == (
        sources.total,
        sources.completed,
        sources.failing,
        sources.quarantined,
        sources.remaining,
    )


def test_stage_counters_add_up_over_attempts(tmp_path):
    """Each attempt's newest counters are added, not those of every segment."""
    made = make_run(tmp_path, tasks=2)
    one, two = made.attempt(0), made.attempt(1)
    made.publish(one, seq=1, stages=[StageCount("parse", 1, 1, 0, 0, 0.5, 10, {-2: 1})])
    made.publish(one, seq=2, stages=[StageCount("parse", 5, 4, 1, 0, 1.0, 40, {-2: 2, -3: 3})])
    made.publish(two, seq=1, stages=[StageCount("parse", 3, 2, 0, 1, 0.5, 30, {-3: 3})])
    found = Run(made.path).status()["stages"]

    counts = {"name": "parse", "in": 8, "out": 6, "dropped": 1, "failed": 1, "seconds": 1.5}
    assert [{**counts, "memory_mib": 40, "spread": {-3: 6, -2: 2}}] == found


def test_the_plain_form_has_every_promised_field(tmp_path):
    """Scripts find the documented fields, under schema 1."""
    made = make_run(tmp_path)
    made.job(cluster="local", array="here")
    made.attempt()
    plain = Run(made.path).status()

    assert 1 == plain["schema"]
    assert {"state", "reason", "rate_per_s", "eta_s", "stages"} <= plain.keys()
    assert ["total", "completed", "failing", "quarantined", "remaining", "at_risk"] == list(
        plain["sources"]
    )
    assert ["round", "tasks", "job_id", "state", "sources"] == list(plain["rounds"][0])
    task = ["round", "task", "attempt", "state", "host", "completed", "in_flight"]
    assert [*task, "left", "elapsed_s", "published_s", "why"] == list(plain["tasks"][0])


# -- Slurm --------------------------------------------------------------------------------------


def slurm_run(tmp_path, tasks=2, **site):
    """A run submitted as job array 7 with merge job 8 and its twin 9."""
    made = make_run(tmp_path, tasks=None)
    made.plan(tasks=tasks, cluster="slurm", site=site)
    made.job(cluster="slurm", array="7", merge="8", twin="9")
    return made


MERGE = ("merge", "PENDING")


def test_slurm_is_asked_once_about_the_newest_round(tmp_path, monkeypatch):
    """However many tasks there are, one squeue asks for the array and the merge jobs."""
    calls = answer(monkeypatch, (0, "RUNNING"), (1, "PENDING"), MERGE)
    made = slurm_run(tmp_path)
    made.attempt(0, host="n1", array_job_id="7", job_id="7_0")
    status = read_status(made.run)

    name = f"hpcresume-{made.run.run_id}-0"
    assert [[name, f"{name}-merge", f"{name}-twin"]] == calls
    assert ("running", ["running", "waiting"]) == (status.state, [t.state for t in status.tasks])
    assert ("7", "running", "") == (status.rounds[0].job_id, status.rounds[0].state, status.unasked)
    assert "" == status.reason


def test_a_pending_array_waits(tmp_path, monkeypatch):
    """Jobs in the queue and no attempt: waiting."""
    answer(monkeypatch, (0, "PENDING"), (1, "PENDING"), MERGE)

    assert "waiting" == stands(slurm_run(tmp_path))


def test_an_array_without_a_record_is_seen(tmp_path, monkeypatch):
    """An array whose sbatch was never answered runs; status says what it lacks."""
    answer(monkeypatch, (0, "RUNNING"))
    made = make_run(tmp_path, tasks=None)
    made.plan(cluster="slurm")
    made.attempt(0, host="n1", array_job_id="7", job_id="7_0")
    status = read_status(made.run)

    assert "running" == status.state
    assert "no merge job is to follow round 0" in status.reason
    assert f"hpcresume merge {made.path} --requeue" in status.reason


def test_between_plan_and_submission_the_merge_job_of_before_counts(tmp_path, monkeypatch):
    """A planned round waits while the merge job that planned it lives, else it is interrupted."""
    made = slurm_run(tmp_path)
    made.plan(round_=1, cluster="slurm")
    name = f"hpcresume-{made.run.run_id}-0-merge"
    states = []
    for state in ("RUNNING", "FAILED"):
        entry = slurm.QueueEntry("8", "8", None, name, state, None, None)
        monkeypatch.setattr(slurm, "queue", lambda entry=entry, **_: [entry])
        states.append(stands(made))
    unasked = stands(made, ask_slurm=False)

    assert (["waiting", "interrupted"], "waiting") == (states, unasked)


@pytest.mark.parametrize(
    ("state", "reason", "missing"),
    [
        ("PENDING", "Dependency", False),
        ("RUNNING", None, False),
        ("PENDING", "DependencyNeverSatisfied", True),
        ("FAILED", None, True),
    ],
)
def test_a_merge_job_that_cannot_run_does_not_count(tmp_path, monkeypatch, state, reason, missing):
    """A twin whose merge job succeeded waits for ever where Slurm does not remove it."""
    made = slurm_run(tmp_path)
    name = f"hpcresume-{made.run.run_id}-0"
    array = slurm.QueueEntry("7_0", "7", 0, name, "PENDING", None, None)
    merge = slurm.QueueEntry("8", "8", None, f"{name}-merge", state, reason, None)
    monkeypatch.setattr(slurm, "queue", lambda **_: [array, merge])
    status = read_status(made.run)

    assert ("waiting", missing) == (status.state, "no merge job" in status.reason)


def test_of_two_arrays_the_one_that_owns_the_round_is_shown(tmp_path, monkeypatch):
    """Whichever submission was recorded last, the claim tells which array works."""
    answer(monkeypatch)
    made = slurm_run(tmp_path)
    made.job(cluster="slurm", array="11")
    made.run.claim_round(0, "7")

    assert "7" == read_status(made.run).rounds[0].job_id


def test_held_jobs_are_named_with_the_remedy(tmp_path, monkeypatch):
    """Jobs that Slurm holds wait for somebody: status says which, and how they go on."""

    def queue(*, name, **_options):
        reason = "launch failed requeued held"
        return [slurm.QueueEntry("7", "7", 0, name.split(",")[0], "PENDING", reason, None)]

    monkeypatch.setattr(slurm, "queue", queue)
    status = read_status(slurm_run(tmp_path).run)

    assert "waiting" == status.state
    assert "1 of its jobs are held (launch failed requeued held)" in status.reason
    assert "scontrol release 7`" in status.reason


def test_a_requeued_task_waits_although_its_attempt_died(tmp_path, monkeypatch):
    """An element that Slurm put back into the queue has died and the run waits."""
    answer(monkeypatch, (0, "PENDING"), MERGE)
    made = slurm_run(tmp_path, tasks=1)
    made.attempt(0, host="n1", array_job_id="7", job_id="7_0")
    status = read_status(made.run)

    assert ("waiting", "died") == (status.state, status.tasks[0].state)


@pytest.mark.parametrize(
    ("submits", "command"), [(True, "merge RUN --requeue"), (False, "drive RUN")]
)
def test_a_run_that_slurm_has_forgotten_is_interrupted(tmp_path, monkeypatch, submits, command):
    """No job in the queue and work left: nothing goes on by itself, and it says what does."""
    answer(monkeypatch, (0, "CANCELLED"), (1, "FAILED"))
    made = slurm_run(tmp_path, submit_from_compute=submits)
    made.attempt(0, host="n1", array_job_id="7", job_id="7_0")
    status = read_status(made.run)

    assert "interrupted" == status.state
    assert f"hpcresume {command.replace('RUN', made.path)}" in status.reason


def test_a_silent_controller_is_no_error(tmp_path, monkeypatch):
    """What Slurm would not say is named, and unended attempts count as running."""

    def silent(*_args, **_options):
        raise SlurmUnreachableError("Slurm did not answer `squeue`: timeout")

    monkeypatch.setattr(slurm, "queue", silent)
    made = slurm_run(tmp_path)
    made.attempt(0, host="n1", array_job_id="7", job_id="7_0")
    status = read_status(made.run)

    assert "running" == status.state
    assert "did not answer" in status.unasked


def test_slurm_is_not_asked_on_request(tmp_path, monkeypatch):
    """`ask_slurm=False` runs no command and says so."""
    calls = answer(monkeypatch)
    status = read_status(slurm_run(tmp_path).run, ask_slurm=False)

    assert ([], "waiting") == (calls, status.state)
    assert "not asked" in status.unasked


def test_a_damaged_segment_does_not_stop_status(tmp_path):
    """A segment whose end is damaged is passed over; the one before it tells."""
    made = make_run(tmp_path)
    ref = made.attempt()
    made.publish(ref, [[0]], seq=1, progress=Progress(in_flight=4, completed=1))
    made.damage(ref, made.publish(ref, [[1]], seq=2), at=-1)

    status = read_status(made.run)

    assert (1, 4) == (status.sources.completed, status.tasks[0].in_flight)
