"""Runs on this machine: submitting again, growing, interrupting, and trying again."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import hpcresume as hr
from hpcresume.run.directory import RunDir
from hpcresume.segment.segment import open_segment
from tests.support.cli import Command, wait_until
from tests.support.local import INLINE, Desk, Ended, kill_family
from tests.support.pipelines import fan_result, write_fan

TEXTS = """
@hr.stage
def measure(path):
    with open("calls", "a") as calls:
        calls.write(path.name + "\\n")
    return {"name": path.name, "words": len(path.read_text().split())}

def pipeline():
    return hr.Pipeline(name="texts", sources=hr.files("texts"), stages=[measure])
"""


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A user's directory."""
    return Desk.make(tmp_path)


def ok(ended: Ended, *fragments: str) -> None:
    """Assert that a command succeeded and said every fragment."""
    assert 0 == ended.code, ended
    assert [] == [fragment for fragment in fragments if fragment not in ended.err], ended


def lines(path: Path) -> list[str]:
    """Return a file's lines, sorted; none where there is no file."""
    return sorted(path.read_text().splitlines()) if path.exists() else []


def start(desk: Desk, *arguments: str) -> subprocess.Popen[str]:
    """Start ``hpcresume submit`` without waiting for it."""
    local = ("--local-dir", str(desk.local))
    return Command(desk.path).start("submit", *INLINE, *local, *arguments)


def wait_for_calls(calls: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until a pipeline has been called so often."""
    wait_until(
        lambda: len(lines(calls)) >= count,
        timeout_s=60,
        describe=lambda: f"{len(lines(calls))} calls; the command ended: {process.poll()}",
    )


def test_submitting_a_complete_run_does_nothing(desk: Desk) -> None:
    """The same command again finds everything done and runs no source."""
    calls = write_fan(desk.path).with_name("calls")
    command = ("fan.py", "--run-dir", "run", "-P", "n=20", "-P", "ms=0", "-P", f"calls={calls}")
    ok(desk.submit(*command), "20: 20 new, 0 done, 20 left", "round 0", "complete")
    before = lines(calls)

    again = desk.submit(*command)

    ok(again, "20: 0 new, 20 done, 0 left", "complete")
    assert "round" not in again.err
    assert 20 == len(before)
    assert before == lines(calls)
    assert fan_result(20) == desk.rows("run")


def test_the_run_directory_follows_name_and_parameters(desk: Desk) -> None:
    """Without --run-dir each set of parameters has a run of its own below runs/."""
    write_fan(desk.path)
    for n in (3, 4, 3):
        ok(desk.submit("fan.py", "-P", "ms=0", "-P", f"n={n}"))

    runs = sorted((desk.path / "runs").iterdir())
    assert 2 == len(runs)
    assert all(run.name.startswith("fan-") for run in runs)
    assert "fan: complete" in desk.call("status").out


def test_edited_pipeline(desk: Desk) -> None:
    """An edited file is taken and named; what is done stays as the old code made it."""
    (desk.path / "texts").mkdir()
    desk.write("texts/a.txt", "one two")
    desk.write("p.py", TEXTS)
    ok(desk.submit("p.py", "--run-dir", "run"))
    desk.write("texts/b.txt", "three")
    desk.write("p.py", TEXTS.replace('"words": len', '"count": len'))

    ok(desk.submit("p.py", "--run-dir", "run"), "new code: p.py", "complete")

    rows = [json.loads(line) for line in desk.rows("run").splitlines()]
    assert [{"name": "a.txt", "words": 2}, {"name": "b.txt", "count": 1}] == rows
    assert 2 == len(list(desk.path.glob("run/code/*")))


def test_grown_source_list(desk: Desk) -> None:
    """Of a list that grew only the new sources are run, and the result holds all."""
    for name in ("b", "d"):
        desk.write(f"texts/{name}.txt", name)
    desk.write("p.py", TEXTS)
    ok(desk.submit("p.py", "--run-dir", "run"), "2: 2 new, 0 done, 2 left")
    for name in ("a", "c"):
        desk.write(f"texts/{name}.txt", name)

    ok(desk.submit("p.py", "--run-dir", "run"), "4: 2 new, 2 done, 2 left", "4 completed")

    assert [f"{name}.txt" for name in "abcd"] == lines(desk.path / "calls")
    rows = [json.loads(line)["name"] for line in desk.rows("run").splitlines()]
    assert ["b.txt", "d.txt", "a.txt", "c.txt"] == rows


def test_source_that_is_gone(desk: Desk) -> None:
    """A source that left the list is refused by name, or dropped where that is accepted."""
    for name in ("a", "b"):
        desk.write(f"texts/{name}.txt", name)
    desk.write("p.py", TEXTS)
    ok(desk.submit("p.py", "--run-dir", "run"))
    (desk.path / "texts/a.txt").unlink()

    refused = desk.submit("p.py", "--run-dir", "run")
    assert 14 == refused.code, refused
    assert "'a.txt'" in refused.err
    ok(desk.submit("p.py", "--run-dir", "run", "--accept-changes"), "1: 0 new, 1 done, 0 left")
    assert b'{"name":"b.txt","words":1}\n' == desk.rows("run")


@pytest.mark.parametrize("engine", ["inline", pytest.param("ray", marks=pytest.mark.ray)])
def test_ctrl_c(desk: Desk, engine: str) -> None:
    """
    Ctrl-C drains, publishes and exits with 130, naming the command that continues; that one
    completes the run with the result of an uninterrupted one, running nothing twice.
    """
    calls = write_fan(desk.path).with_name("calls")
    process = start(
        *(desk, "fan.py", "--run-dir", "run", "--engine", engine, "--sync-interval", "600"),
        *("-P", "ms=20", "-P", f"calls={calls}"),
    )
    try:
        wait_for_calls(calls, 30, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        kill_family(process.pid)
    interrupted = Ended(process.returncode, out, err)
    done = json.loads(desk.call("status", "run", "--json").out)["sources"]["completed"]

    assert 130 == interrupted.code, interrupted
    assert "interrupted" in interrupted.err
    assert "hpcresume submit run" in interrupted.err
    assert 30 <= done < 200
    ok(desk.submit("run", "--engine", engine), f"200: 0 new, {done} done", "200 completed")
    assert fan_result(200) == desk.rows("run")
    assert [str(i) for i in range(200)] == sorted(lines(calls), key=int)


def test_the_terminal_is_closed(desk: Desk) -> None:
    """A run whose terminal goes away publishes all that it has done, and ends."""
    calls = write_fan(desk.path).with_name("calls")
    given = ("fan.py", "--run-dir", "run", "-P", "n=4000", "-P", "ms=20", "-P", f"calls={calls}")
    command = Command(desk.path).argv("submit", *INLINE, "--local-dir", str(desk.local), *given)
    terminal, side = pty.openpty()
    process = subprocess.Popen(
        # These tests may run under nohup, which this command must not.
        ["env", "--default-signal=HUP", "setsid", "--ctty", *command, "--sync-interval", "600"],
        cwd=desk.path, stdin=side, stdout=side, stderr=side,
    )  # fmt: skip
    os.close(side)
    try:
        wait_until(
            lambda: len(lines(calls)) >= 30, timeout_s=60, describe=lambda: f"{process.poll()}"
        )
        os.close(terminal)
        code = process.wait(timeout=60)
    finally:
        kill_family(process.pid)

    # 129: it was just writing there.
    assert code in (85, 129)
    found = json.loads(desk.call("status", "run", "--json").out)
    assert ("interrupted", len(lines(calls))) == (found["state"], found["sources"]["completed"])


def test_lines_stand_above_the_bar(desk: Desk) -> None:
    """On a terminal what is said while the bar moves has a line of its own."""
    write_fan(desk.path)
    given = ("fan.py", "--run-dir", "run", "-Pn=60", "-Pms=20", f"-Pcalls={desk.path}/calls")
    command = Command(desk.path).argv("submit", *INLINE, "--local-dir", str(desk.local), *given)
    terminal, side = pty.openpty()
    process = subprocess.Popen(
        command, cwd=desk.path, stdin=side, stdout=side, stderr=side,
        env={**os.environ, "TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(side)
    shown = b""
    try:
        # Linux says EIO where others say that this is the end.
        with contextlib.suppress(OSError):
            while part := os.read(terminal, 1 << 16):
                shown += part
        assert 0 == process.wait(timeout=60), shown
    finally:
        kill_family(process.pid)
        os.close(terminal)
    assert b"done in this round" in shown
    assert re.search(rb"(?:\n|\r|\x1b\[2K)round 0  ", shown), shown


@pytest.mark.skipif(shutil.which("nohup") is None, reason="needs nohup")
def test_nohup(desk: Desk) -> None:
    """What nohup started goes on after a hangup, and its log holds plain lines."""
    calls = write_fan(desk.path).with_name("calls")
    command = Command(desk.path).argv("submit", *INLINE, "--local-dir", str(desk.local), "fan.py")
    with (desk.path / "log").open("wb") as log:
        process = subprocess.Popen(
            ["nohup", *command, "--run-dir", "run", "-P", "ms=20", "-P", f"calls={calls}"],
            cwd=desk.path, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        wait_until(
            lambda: len(lines(calls)) >= 30, timeout_s=60, describe=(desk.path / "log").read_text
        )
        os.killpg(process.pid, signal.SIGHUP)
        code = process.wait(timeout=120)
    finally:
        kill_family(process.pid)

    said = (desk.path / "log").read_text()
    assert 0 == code, said
    assert "complete" in said.splitlines()
    assert set() == {c for c in said if not c.isprintable()} - {"\n"}
    assert fan_result() == desk.rows("run")


def kill_in_the_middle(desk: Desk) -> tuple[list[str], Path]:
    """Start a run whose work is committed but never published, and kill all of it."""
    calls = write_fan(desk.path).with_name("calls")
    command = [
        *("fan.py", "--run-dir", "run", "--sync-interval", "600"),
        *("-P", "ms=20", "-P", f"calls={calls}"),
    ]
    process = start(desk, *command)
    try:
        wait_for_calls(calls, 60, process)
    finally:
        kill_family(process.pid)
        process.communicate()
    return command, calls


def test_everything_killed(desk: Desk) -> None:
    """After a kill -9 of everything the same command completes the run and leaves nothing."""
    command, _ = kill_in_the_middle(desk)

    ok(desk.submit(*command), "recovered", "of a dead attempt", "complete", "200 completed")

    assert fan_result(200) == desk.rows("run")
    assert [] == list(desk.local.glob("hpcresume-*/*/*"))


def test_committed_work_is_not_run_again(desk: Desk) -> None:
    """What a killed attempt had committed on this node's disk is not computed again."""
    command, calls = kill_in_the_middle(desk)
    before = len(lines(calls))

    ok(desk.submit(*command), "complete")

    # A commit every 100 ms is 5 sources; the rest came back from the dead attempt's ledger.
    assert len(lines(calls)) - 200 < before / 2


def test_json(desk: Desk) -> None:
    """With --json stdout is one object with schema 1, and people's text is on stderr."""
    write_fan(desk.path)
    ended = desk.submit("fan.py", "--run-dir", "run", "-P", "ms=0", "-P", "n=5", "--json")

    ok(ended, "run directory", "complete")
    (line,) = ended.out.splitlines()
    said = json.loads(line)
    assert 1 == said["schema"]
    assert ("complete", str(desk.path / "run")) == (said["state"], said["run"])
    assert {"total", "completed", "failing", "quarantined", "remaining", "at_risk"} == set(
        said["sources"]
    )
    assert (5, 5) == (said["sources"]["total"], said["sources"]["completed"])


def test_two_runs_side_by_side(desk: Desk) -> None:
    """Runs in different directories do not meet, also on one node-local disk."""
    write_fan(desk.path)
    sizes = {"one": 150, "two": 120}
    running = {
        run: start(desk, "fan.py", "--run-dir", run, "-P", f"n={n}", "-P", "ms=10")
        for run, n in sizes.items()
    }
    try:
        for process in running.values():
            out, err = process.communicate(timeout=100)
            ok(Ended(process.returncode, out, err), "complete")
    finally:
        for process in running.values():
            kill_family(process.pid)

    for run, n in sizes.items():
        assert fan_result(n) == desk.rows(run)


def test_several_tasks(desk: Desk) -> None:
    """Several tasks share the sources, and the result is in source order."""
    write_fan(desk.path)
    ok(
        desk.submit("fan.py", "--run-dir", "run", "--array", "3", "-P", "ms=1"),
        "200 sources in 3 tasks",
        "complete",
    )

    assert fan_result(200) == desk.rows("run")


def test_finish_runs_once(desk: Desk) -> None:
    """``finish`` gets the rows of the whole run, once; submitting again does not repeat it."""
    desk.write(
        "p.py",
        """
        def total(rows, out):
            with open("finished", "a") as times:
                times.write("once\\n")
            (out / "total.txt").write_text(str(sum(rows)))

        def pipeline():
            return hr.Pipeline(
                name="sum", sources=hr.indexed(10), stages=[lambda i: i], finish=total
            )
        """,
    )
    for _ in range(2):
        ok(desk.submit("p.py", "--run-dir", "run"), "what finish made", "run/finish")

    assert "45" == (desk.path / "run/finish/total.txt").read_text()
    assert ["once"] == lines(desk.path / "finished")


FINISHED = """
def half(i):
    return 10 // (i - 2 if FAILS else 7)

def count(rows, out):
    if FINISH_FAILS:
        raise ValueError("finish broke")
    with open("finished", "a") as times:
        times.write("once\\n")
    (out / "count.txt").write_text(str(sum(1 for _ in rows)))

def pipeline(n: int = 5):
    return hr.Pipeline(name="half", sources=hr.indexed(n), stages=[half], finish=count)
"""


def test_finish_runs_again_when_more_is_complete(desk: Desk) -> None:
    """
    A list that has grown, and quarantined sources that were tried again, have their results in
    what ``finish`` makes, and nothing of the time before stays.
    """
    desk.write("p.py", "FAILS, FINISH_FAILS = True, False\n" + FINISHED)
    assert 1 == desk.submit("p.py", "--run-dir", "run", "--max-attempts", "1").code
    made = desk.path / "run/finish"
    assert "4" == (made / "count.txt").read_text()
    (made / "of the first time").touch()

    desk.write("p.py", "FAILS, FINISH_FAILS = False, False\n" + FINISHED)
    ok(desk.submit("p.py", "--run-dir", "run", "--retry-quarantined", "--accept-changes"))
    assert "5" == (made / "count.txt").read_text()
    ok(desk.submit("p.py", "--run-dir", "run", "-P", "n=7", "--accept-changes"))
    assert "7" == (made / "count.txt").read_text()
    ok(desk.submit("p.py", "--run-dir", "run", "-P", "n=7"))

    assert ["once"] * 3 == lines(desk.path / "finished")
    assert ["count.txt"] == [p.name for p in made.iterdir() if not p.name.startswith(".")]
    assert [] == list(desk.path.glob("run/.tmp-finish*"))


def test_finish_that_fails_stops_the_run(desk: Desk) -> None:
    """What ``finish`` raised is why the run stopped; after a repair it runs, and no source does."""
    desk.write("p.py", "FAILS, FINISH_FAILS = False, True\n" + FINISHED)
    failed = desk.submit("p.py", "--run-dir", "run", "--on-end", "sh -c 'cat > ended.json'")
    status = hr.Run(desk.path / "run").status()
    desk.write("p.py", "FAILS, FINISH_FAILS = False, False\n" + FINISHED)
    mended = desk.submit("p.py", "--run-dir", "run", "--accept-changes")

    assert "Traceback" in failed.err
    assert "finish=count raised ValueError: finish broke" in failed.err
    assert "bug in hpcresume" not in failed.err
    assert ("stopped", 5) == (status["state"], status["sources"]["completed"])
    assert "ValueError: finish broke" in status["reason"]
    assert "stopped" == json.loads((desk.path / "ended.json").read_text())["state"]
    ok(mended, "5: 0 new, 5 done, 0 left", "complete")
    assert "5" == (desk.path / "run/finish/count.txt").read_text()


def test_a_process_that_lives_on_drives_no_run(desk: Desk) -> None:
    """After ``hr.submit``, ended or interrupted, the living process is not waited for."""
    desk.write("p.py", "def pipeline():\n    return hr.Pipeline('p', hr.indexed(3), [work])\n"
               "def work(i):\n    import os, signal\n"
               "    if os.path.exists('interrupt'):\n"
               "        os.kill(int(open('interrupt').read()), signal.SIGINT); signal.pause()\n"
               "    return i\n")  # fmt: skip
    script = """
import os, sys, hpcresume as hr
settings = {"task": {"engine": "inline", "local_dir": sys.argv[1], "drain_s": 1}}
for name in ("first", "second"):
    if name == "second":
        open("interrupt", "w").write(str(os.getpid()))
    try:
        run = hr.submit("p.py", run_dir=name, cluster="local", settings=settings)
    except KeyboardInterrupt:
        print("interrupted")
        run = hr.Run(name)
    status = run.wait(timeout_s=20)
    print(status["state"], status["rounds"][-1]["state"])
"""
    done = subprocess.run([sys.executable, "-c", script, str(desk.local)], cwd=desk.path,
                          capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert "complete ended\ninterrupted\ninterrupted ended\n" == done.stdout, done.stderr


def test_retry_quarantined(desk: Desk) -> None:
    """Quarantined sources are run again on request only, with the code as it is then."""
    broken = """
    def half(i):
        return 10 // (i - 2)

    def pipeline():
        return hr.Pipeline(name="half", sources=hr.indexed(5), stages=[half])
    """
    desk.write("p.py", broken)
    first = desk.submit("p.py", "--run-dir", "run", "--max-attempts", "2")
    desk.write("p.py", broken.replace("10 // (i - 2)", "10 // (i - 2) if i != 2 else 0"))
    second = desk.submit("p.py", "--run-dir", "run")

    for ended in (first, second):
        assert 1 == ended.code, ended
        assert "4 completed, 1 quarantined, 0 left" in ended.err, ended
    ok(
        desk.submit("p.py", "--run-dir", "run", "--retry-quarantined"),
        "5: 0 new, 4 done, 1 left",
        "5 completed, 0 quarantined",
    )
    assert b"-5\n-10\n0\n10\n5\n" == desk.rows("run")


def test_stopped_run_goes_on_by_hand(desk: Desk) -> None:
    """A run that stopped itself goes on when it is submitted again, the cause being removed."""
    desk.write(
        "p.py",
        """
        import os

        class Model(hr.Stage):
            def setup(self, worker):
                open("model").close()

            def process(self, item):
                return item

        def pipeline():
            return hr.Pipeline(name="model", sources=hr.indexed(3), stages=[Model()])
        """,
    )
    stopped = desk.submit("p.py", "--run-dir", "run")
    (desk.path / "model").touch()

    assert 1 == stopped.code, stopped
    assert "stopped" in stopped.err
    assert "No such file or directory: 'model'" in stopped.err
    ok(desk.submit("run"), "3: 0 new, 0 done, 3 left", "3 completed, 0 quarantined")


def test_local_run_is_continued_locally(desk: Desk) -> None:
    """A run continued by its directory stays on this machine, whether or not Slurm is here."""
    write_fan(desk.path)
    ok(desk.submit("fan.py", "--run-dir", "run", "-P", "ms=0", "-P", "n=5"))
    (desk.path / "bin").mkdir()
    sbatch = desk.path / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\ntouch called\nexit 1\n")
    sbatch.chmod(0o755)

    ok(desk.call("submit", "run", env={"PATH": str(sbatch.parent)}), "complete")

    assert not (desk.path / "called").exists()


@pytest.mark.ray
@pytest.mark.parametrize("engine", ["ray", "inline"])
def test_engines_agree(desk: Desk, engine: str) -> None:
    """The same pipeline gives the same bytes in Ray's workers and in the driver's process."""
    write_fan(desk.path)
    ok(desk.submit("fan.py", "--run-dir", "run", "--engine", engine, "-P", "ms=0", "-P", "n=40"))

    assert fan_result(40) == desk.rows("run")


def test_env_file(desk: Desk) -> None:
    """Stages see its variables, by either engine; the run directory holds its path alone."""
    desk.write(
        "p.py",
        """
        import os

        def length(i):
            return len(os.environ["API_TOKEN"])

        def pipeline() -> hr.Pipeline:
            return hr.Pipeline(name="env", sources=hr.indexed(2), stages=[length])
    """,
    )
    secret = desk.path / "secret.env"
    secret.write_text("API_TOKEN=correct-horse-battery\n")
    secret.chmod(0o600)

    ok(desk.submit("p.py", "--run-dir", "run", "--env-file", "secret.env"), "2 completed")

    assert b"21\n21\n" == desk.rows("run")
    held = b"".join(p.read_bytes() for p in (desk.path / "run").rglob("*") if p.is_file())
    assert b"secret.env" in held
    assert b"correct-horse" not in held
    secret.chmod(0o644)
    refused = desk.submit("p.py", "--run-dir", "other", "--env-file", "secret.env")
    assert (15, True) == (refused.code, "chmod 600" in refused.err)


def test_no_segment_says_more_than_is_published(desk: Desk) -> None:
    """What a segment says its attempt has completed is in it or in those before it."""
    write_fan(desk.path)
    options = ("--sync-interval", "0.05", "-P", "n=60", "-P", "ms=80", "-P", "calls=calls")
    ok(desk.submit("fan.py", "--run-dir", "run", *options))
    run = RunDir.open(str(desk.path / "run"))
    (attempt,) = run.all_attempts()
    published, said = 0, []
    for name in run.segments(attempt):
        segment = open_segment(run.fs, run.segment_path(name), run_id=run.run_id)
        published += len(segment.completed)
        said.append((segment.footer.progress.completed, published))
    assert len(said) > 5
    assert [] == [(n, count) for n, count in said if n > count]
    assert (60, 60) == said[-1]
