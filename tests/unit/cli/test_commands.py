"""The commands that read a run, and those that end and clean one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from hpcresume import slurm
from hpcresume.cli.logs import Tail
from hpcresume.merge.plan import array_name
from hpcresume.segment.segment import Progress, StageCount
from tests.support.runs import make_run, publish_raw


@pytest.fixture
def sleeper():
    """A process of ours that waits for a signal; ended by its id afterwards."""
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    yield process
    process.kill()
    process.wait()


# -- status -------------------------------------------------------------------------------------


def test_status_shows_counts_tasks_and_stages(tmp_path, hpcresume):
    """People see what is done and left, each task, and each stage."""
    made = make_run(tmp_path, sources=2000, tasks=2)
    progress = Progress(elapsed_s=10, in_flight=3, completed=1500)
    made.publish(
        made.attempt(0),
        [range(1500)],
        progress=progress,
        stages=[StageCount("parse", 1500, 1400, 100, 0, 2.0)],
    )
    result = hpcresume("status", made.path)

    assert 0 == result.exit_code
    assert "demo: running" in result.stdout
    assert "1,500 of 2,000 completed (75.0 %), 500 remaining" in result.stdout
    assert "rate      150.0/s, about 3 s left" in result.stdout
    assert "round 0   2 tasks: 1 running, 1 waiting" in result.stdout
    assert ["parse", "1,500", "1,400", "100", "0", "2.0"] == result.stdout.splitlines()[-1].split()


def test_status_json_is_one_object(tmp_path, hpcresume):
    """With --json stdout is one JSON object with schema 1 first."""
    made = make_run(tmp_path, sources=2)
    result = hpcresume("status", made.path, "--json")

    assert ("schema", 1) == next(iter(json.loads(result.stdout).items()))
    assert 1 == len(result.stdout.splitlines())


def test_status_takes_the_last_run(tmp_path, hpcresume, monkeypatch):
    """Without RUN the last run of the current directory is shown."""
    (tmp_path / "runs").mkdir()
    made = make_run(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)

    assert made.path == json.loads(hpcresume("status", "--json").stdout)["run"]


def test_without_a_run_status_is_a_usage_error(tmp_path, hpcresume, monkeypatch):
    """No run named and none here: exit code 2 and what to give."""
    monkeypatch.chdir(tmp_path)
    result = hpcresume("status")

    assert 2 == result.exit_code
    assert "no run was named" in result.stderr


@pytest.mark.parametrize(("completed", "code"), [([0, 1], 0), ([0], 1)])
def test_watch_ends_with_the_runs_exit_code(tmp_path, hpcresume, completed, code):
    """--watch of an ended run prints one line and exits 0 for complete, 1 otherwise."""
    made = make_run(tmp_path, sources=2)
    left = [made.failure(i, retry=False) for i in {0, 1} - set(completed)]
    made.publish(made.attempt(), [completed], failures=left)
    made.finish()
    result = hpcresume("status", made.path, "--watch")

    assert (code, 1) == (result.exit_code, len(result.stdout.splitlines()))


def test_watch_waits_until_the_run_ends(tmp_path, sleeper):
    """--watch of a running run goes on; when the task is gone it ends with exit code 1."""
    made = make_run(tmp_path, sources=2)
    made.attempt(pid=sleeper.pid)
    watch = subprocess.Popen(
        [sys.executable, "-m", "hpcresume", "status", made.path, "--watch", "--json"],
        stdout=subprocess.PIPE,
        text=True,
    )
    first = json.loads(watch.stdout.readline())["state"]
    sleeper.kill()
    sleeper.wait()
    states = [json.loads(line)["state"] for line in watch.stdout]
    watch.stdout.close()

    assert ("running", "interrupted", 1) == (first, states[-1], watch.wait(timeout=60))


# -- collect ------------------------------------------------------------------------------------


def test_collect_of_a_finished_run_exits_0(tmp_path, hpcresume):
    """The rows are in the file, the report on stderr, nothing on stdout."""
    made = make_run(tmp_path, sources=3)
    made.publish(made.attempt(), [range(3)])
    made.finish()
    out = tmp_path / "out.jsonl"
    result = hpcresume("collect", made.path, "-o", out, "--with-source")

    assert (0, "") == (result.exit_code, result.stdout)
    assert "3 rows of 3 sources" in result.stderr
    assert "s0.txt" == json.loads(out.read_text().splitlines()[0])["source"]


def test_collect_of_an_unfinished_run_exits_1(tmp_path, hpcresume):
    """What is there is written; stderr and the JSON object say what is missing."""
    made = make_run(tmp_path, sources=3)
    made.publish(made.attempt(), [[1]])
    result = hpcresume("collect", made.path, "-o", tmp_path / "out.jsonl", "--json")
    found = json.loads(result.stdout)

    assert (1, 1, 2, False) == (
        result.exit_code,
        found["rows"],
        found["missing"],
        found["complete"],
    )
    assert "2 sources of 3 missing: the run is not finished" in result.stderr


def test_collect_names_a_damaged_segment(tmp_path, hpcresume):
    """A damaged segment is named and what it held counted as missing."""
    made = make_run(tmp_path, sources=3)
    ref = made.attempt()
    bad = made.publish(ref, [range(3)])
    made.finish()
    made.damage(ref, bad)
    result = hpcresume("collect", made.path, "-o", tmp_path / "out.jsonl")

    assert 1 == result.exit_code
    assert bad.name in result.stderr
    assert "3 sources of 3 missing" in result.stderr


def test_collect_without_an_output_is_a_usage_error(tmp_path, hpcresume):
    """-o is required."""
    assert 2 == hpcresume("collect", make_run(tmp_path).path).exit_code


# -- failures -----------------------------------------------------------------------------------


def test_failures_show_stage_attempts_message_and_traceback(tmp_path, hpcresume):
    """Each failed source is shown with where and why it failed."""
    made = make_run(tmp_path, sources=3)
    made.publish(made.attempt(), failures=[made.failure(0), made.failure(2, retry=False)])
    result = hpcresume("failures", made.path)

    assert 0 == result.exit_code
    assert "s2.txt: quarantined after 1 attempt, stage split" in result.stdout
    assert "  item s2.txt/parse.0\n  ValueError: bad input\n" in result.stdout
    assert "    ValueError: bad input" in result.stdout
    assert "1 source quarantined, 1 failing" in result.stderr


def test_failures_tail_and_json(tmp_path, hpcresume):
    """--tail limits what is listed, not what is counted."""
    made = make_run(tmp_path, sources=3)
    made.publish(made.attempt(), failures=[made.failure(i) for i in range(3)])
    found = json.loads(hpcresume("failures", made.path, "--tail", 1, "--json").stdout)

    assert (3, ["s2.txt"]) == (found["failed"], [f["source"] for f in found["failures"]])


def test_a_long_traceback_shows_its_end(tmp_path, hpcresume):
    """Of a long traceback the last lines are shown, and how many came before."""
    made = make_run(tmp_path, sources=1)
    text = "\n".join(f"line {n}" for n in range(40))
    made.publish(made.attempt(), failures=[made.failure(0, traceback=text)])
    shown = hpcresume("failures", made.path).stdout

    assert "... 28 lines before" in shown
    assert "line 39" in shown
    assert "line 27\n" not in shown


def test_no_failures_says_so(tmp_path, hpcresume):
    """A run without failures prints nothing on stdout."""
    result = hpcresume("failures", make_run(tmp_path).path)

    assert ("", "no source failed\n") == (result.stdout, result.stderr)


# -- logs ---------------------------------------------------------------------------------------


def test_logs_print_one_tasks_file(tmp_path, hpcresume):
    """--task chooses a task; one file needs no heading."""
    made = make_run(tmp_path, tasks=2)
    made.log("task-0.log", "zero\n")
    made.log("task-1.log", "one\n")

    assert "one\n" == hpcresume("logs", made.path, "--task", 1).stdout
    assert "==> task-0.log <==\nzero\n==> task-1.log <==\none\n" == (
        hpcresume("logs", made.path).stdout
    )


def test_logs_of_a_task_that_has_none_are_refused(tmp_path, hpcresume):
    """The error names the task and what tells whether it has started."""
    result = hpcresume("logs", make_run(tmp_path).path, "--task", 3)

    assert 16 == result.exit_code
    assert "no logs of array task 3" in result.stderr


def test_following_prints_what_is_appended(tmp_path):
    """-f prints what the file gains, and ends with 130 on Ctrl-C."""
    made = make_run(tmp_path)
    log = made.log("task-0.log", "first\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "hpcresume", "logs", made.path, "-f"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    first = process.stdout.readline()
    with log.open("a") as file:
        file.write("second\n")
    second = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.stdout.close()

    assert ("first\n", "second\n", 130) == (first, second, process.wait(timeout=60))


def test_a_tail_begins_again_when_the_file_is_replaced(tmp_path):
    """Another file under the same name, and a cut one, are read from their start."""
    path = tmp_path / "log"
    tail = Tail(str(path))
    missing = tail.read()
    path.write_text("old\n")
    old = tail.read()
    (tmp_path / "new").write_text("new\n")
    os.replace(tmp_path / "new", path)
    new = tail.read()
    path.write_text("c")
    cut = tail.read()
    tail.close()

    assert (b"", b"old\n", b"new\n", b"c") == (missing, old, new, cut)


# -- cancel -------------------------------------------------------------------------------------


def test_cancel_marks_first_and_ends_local_tasks(tmp_path, hpcresume, sleeper):
    """The stop mark is written and the task's process gets SIGTERM; twice does no harm."""
    made = make_run(tmp_path)
    made.attempt(pid=sleeper.pid)
    first = json.loads(hpcresume("cancel", made.path, "--json").stdout)
    sleeper.wait(timeout=60)
    second = json.loads(hpcresume("cancel", made.path, "--json").stdout)

    assert ([sleeper.pid], []) == (first["processes"], second["processes"])
    assert -signal.SIGTERM == sleeper.returncode
    assert [(1, "stop")] == made.run.marks()


@pytest.mark.parametrize(
    "who",
    [
        {"host": "elsewhere"},
        {"array_job_id": "7"},
        {"started_at": "2001-01-01T00:00:00+00:00"},
    ],
)
def test_cancel_signals_only_local_tasks_of_this_host(tmp_path, hpcresume, sleeper, who):
    """Processes of other hosts, of Slurm, and of other programs are not signalled."""
    made = make_run(tmp_path)
    made.attempt(pid=sleeper.pid, **who)
    result = hpcresume("cancel", made.path, "--json")

    assert [] == json.loads(result.stdout)["processes"]
    assert sleeper.poll() is None


def test_cancel_marks_before_it_asks_slurm(tmp_path, hpcresume, monkeypatch):
    """Merge jobs are cancelled before the array whose end would start them, after the mark."""
    made = make_run(tmp_path, tasks=None)
    made.plan(cluster="slurm")
    made.job(cluster="slurm", array="7", merge="8", twin="9")
    name, seen = array_name(made.run, 0), []
    queued = [("7", name), ("8", f"{name}-merge"), ("9", f"{name}-twin")]
    monkeypatch.setattr(
        slurm,
        "queue",
        lambda: [slurm.QueueEntry(j, j, None, n, "PENDING", None, None) for j, n in queued],
    )
    monkeypatch.setattr(
        slurm, "cancel", lambda jobs: seen.append((list(jobs), made.run.stop_requested()))
    )
    result = hpcresume("cancel", made.path)

    assert [(["8", "9", "7"], True)] == seen
    assert "3 Slurm jobs" in result.stdout
    assert f"hpcresume submit {made.path}" in result.stderr


def test_cancel_needs_the_run_named(tmp_path, hpcresume, monkeypatch):
    """What ends or removes something never guesses the run."""
    monkeypatch.chdir(make_run(tmp_path).path)

    assert (2, 2) == (hpcresume("cancel").exit_code, hpcresume("clean").exit_code)


# -- clean --------------------------------------------------------------------------------------


def leave_garbage(made):
    """Leave a temporary file, as a killed publisher does."""
    path = os.path.join(made.run.attempt_path(made.run.all_attempts().__next__()), ".tmp-1234")
    with open(path, "wb") as file:
        file.write(b"x" * 100)
    return path


def ended_run(tmp_path):
    """A finished run with garbage in it."""
    made = make_run(tmp_path, sources=1)
    ref = made.attempt()
    made.publish(ref, [[0]])
    made.end(ref)
    made.finish()
    return made, leave_garbage(made)


def test_clean_removes_garbage_only_when_told_to(tmp_path, hpcresume):
    """Without --yes it says what it would remove; with it only temporary files go."""
    made, garbage = ended_run(tmp_path)
    dry = hpcresume("clean", made.path)
    kept = os.path.exists(garbage)
    wet = hpcresume("clean", made.path, "--yes")

    assert ("would remove 1 temporary file, 100 bytes\n", True) == (dry.stdout, kept)
    assert ("removed 1 temporary file, 100 bytes\n", False) == (
        wet.stdout,
        os.path.exists(garbage),
    )
    assert [0] == list(made.union().completed)


def test_clean_removes_what_a_killed_finish_left(tmp_path, hpcresume):
    """A directory that was never given its name goes with all it holds."""
    made, garbage = ended_run(tmp_path)
    os.unlink(garbage)
    half = tmp_path / "run" / ".tmp-finish-1234"
    half.mkdir()
    (half / "table").write_bytes(b"x" * 10)
    wet = hpcresume("clean", made.path, "--yes")

    assert ("removed 1 temporary file, 10 bytes\n", False) == (wet.stdout, half.exists())
    assert [0] == list(made.union().completed)


def test_clean_all_removes_the_run(tmp_path, hpcresume):
    """--all --yes removes the whole run directory, --all alone does not."""
    made, _ = ended_run(tmp_path)
    hpcresume("clean", made.path, "--all")
    kept = os.path.isdir(made.path)
    hpcresume("clean", made.path, "--all", "--yes")

    assert (True, False) == (kept, os.path.exists(made.path))


def test_clean_folds_small_segments_and_removes_them(tmp_path, hpcresume):
    """Without --yes it says how many; with it they are in a pack, and the rows are the same."""
    made = make_run(tmp_path, sources=5)
    ref = made.attempt()
    for source in range(5):
        made.publish(ref, [[source]], seq=source + 1)
    made.end(ref)
    made.finish()
    names = made.run.segments(ref)
    size = sum(os.path.getsize(made.run.segment_path(name)) for name in names[:-1])
    hpcresume("collect", made.path, "-o", tmp_path / "before.jsonl")

    dry = hpcresume("clean", made.path, "--json")
    wet = hpcresume("clean", made.path, "--yes", "--json")
    hpcresume("collect", made.path, "-o", tmp_path / "after.jsonl")

    paths = [made.run.segment_path(name) for name in names[:-1]]
    said = [(json.loads(d.stdout)["paths"], json.loads(d.stdout)["bytes"]) for d in (dry, wet)]
    assert [(paths, size)] * 2 == said
    assert (names[-1:], [1]) == (made.run.segments(ref), made.run.pack_numbers())
    assert 5 == len((tmp_path / "after.jsonl").read_bytes().splitlines())
    assert (tmp_path / "before.jsonl").read_bytes() == (tmp_path / "after.jsonl").read_bytes()
    again = hpcresume("clean", made.path)
    assert "would remove 0 temporary files, 0 bytes\n" == again.stdout


def test_clean_refuses_a_directory_without_the_tag(tmp_path, hpcresume):
    """A directory that hpcresume did not tag is not touched."""
    made, garbage = ended_run(tmp_path)
    os.unlink(made.run.join("CACHEDIR.TAG"))
    missing = hpcresume("clean", made.path, "--yes")
    publish_raw(made, "CACHEDIR.TAG", b"Signature: something else")
    other = hpcresume("clean", made.path, "--yes")

    assert (16, 16, True) == (missing.exit_code, other.exit_code, os.path.exists(garbage))


def test_clean_refuses_a_running_run(tmp_path, hpcresume, sleeper):
    """While a task lives nothing is removed, also when the run was cancelled."""
    made = make_run(tmp_path)
    made.attempt(pid=sleeper.pid)
    garbage = leave_garbage(made)
    running = hpcresume("clean", made.path, "--yes")
    made.run.set_mark("stop")
    stopping = hpcresume("clean", made.path, "--yes")

    assert (16, 16, True) == (running.exit_code, stopping.exit_code, os.path.exists(garbage))
    assert "is in use (running)" in running.stderr
