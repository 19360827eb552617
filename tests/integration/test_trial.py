"""Trials as processes: on Ray, under the debugger, and ended by a signal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.cli import Command, wait_until
from tests.support.places import child_environment

MARK = "HPCRESUME_TRIAL_UNDER_TEST"
PIPELINE = '''
import json
import os
import pathlib
import signal
import hpcresume as hr


def parse(text):
    """Fail in the standard library for one source, end the process for another."""
    item = {"text": text}
    if text == "bad":
        json.loads("{")
    if text == "deadly":
        os._exit(1)
    if text == "endless":
        pathlib.Path("started").touch()
        signal.pause()
    if text == "session":
        from ray._private.worker import _global_node
        item["session"] = _global_node.get_session_dir_path()
    return item


@hr.stage(cpus=0.5)  # other resources: a worker of its own
def later(item):
    print("later", item["text"])
    return item


def pipeline(names: str = "a,bad,c"):
    return hr.Pipeline("demo", names.split(","), [parse, later])
'''


@pytest.fixture
def command(tmp_path):
    """The command in a directory with a pipeline, with a temporary directory of its own."""
    (tmp_path / "temporary").mkdir()
    (tmp_path / "demo.py").write_text(PIPELINE)
    environment = child_environment({"TMPDIR": str(tmp_path / "temporary"), MARK: str(tmp_path)})
    return Command(tmp_path, environment)


def left_behind(directory: Path) -> list[str]:
    """Return what the trials in a directory left: files, and processes that still run."""
    files = sorted(path.name for path in directory.iterdir())
    found = [str(path) for path in (directory / "temporary").iterdir()]
    marker = f"{MARK}={directory}".encode()
    for process in psutil.process_iter():
        try:
            environ = Path(f"/proc/{process.pid}/environ").read_bytes()
        except OSError:
            continue
        if marker in environ.split(b"\0"):
            found.append(f"{process.pid} {process.name()}")
    return found + [name for name in files if name not in {"demo.py", "temporary", "started"}]


def none_left(directory: Path) -> None:
    """Wait until nothing of a trial is left; Ray's processes end after the one they served."""
    wait_until(
        lambda: not left_behind(directory),
        timeout_s=20,
        describe=lambda: "\n".join(left_behind(directory)),
    )


@pytest.mark.ray
def test_a_trial_on_ray_finds_the_deadly_source_and_leaves_nothing(command, tmp_path):
    """Failures and a killed worker are charged to their sources; files and processes go."""
    process = command.start("trial", "demo.py", "-P", "names=a,bad,session,deadly,e", "--json")
    out, err = process.communicate(timeout=200)
    found = json.loads(out)

    assert 1 == process.returncode, err
    states = {source["source"]: source["state"] for source in found["sources"]}
    assert {
        "a": "completed", "bad": "failed", "session": "completed", "deadly": "failed",
        "e": "completed",
    } == states  # fmt: skip
    kinds = {failure["source"]: failure["kind"] for failure in found["failures"]}
    assert {"bad": "JSONDecodeError", "deadly": "death"} == kinds
    traceback = next(f["traceback"] for f in found["failures"] if f["source"] == "bad")
    assert f'File "{tmp_path / "demo.py"}"' in traceback
    assert "later a" in err
    assert all(stage["peak_memory_bytes"] > 1 << 20 for stage in found["stages"])
    session = next(row["row"]["session"] for row in found["rows"] if "session" in row["row"])
    assert not Path(session).parent.exists()
    none_left(tmp_path)


def test_a_trial_as_a_process_keeps_stdout_for_rows(command, tmp_path):
    """Inline: rows on stdout, the rest on stderr, exit code 0, no file made."""
    process = command.start("trial", "demo.py", "--engine", "inline", "-P", "names=a,b")
    out, err = process.communicate(timeout=60)

    assert 0 == process.returncode, err
    assert ["a", "b"] == [json.loads(line)["source"] for line in out.splitlines()]
    assert "later a\nlater b\n" in err
    none_left(tmp_path)


def debug(command: Command, orders: str) -> tuple[int, str, str]:
    """Run a trial under the debugger with orders on stdin; return code, stdout and stderr."""
    process = command.start("trial", "demo.py", "--pdb", stdin=subprocess.PIPE)
    out, err = process.communicate(orders, timeout=60)
    return process.returncode, out, err


def test_the_debugger_opens_where_the_users_code_raised(command, tmp_path):
    """The frame is the user's, though json raised; `c` goes on with the other sources."""
    code, out, err = debug(command, "p item\np text\nc\n")

    assert 1 == code, err
    assert "demo.py(13)parse()\n-> json.loads" in err
    assert "(Pdb) {'text': 'bad'}\n(Pdb) 'bad'\n" in err
    assert ["a", "c"] == [json.loads(line)["source"] for line in out.splitlines()]
    none_left(tmp_path)


def test_quitting_the_debugger_ends_the_trial(command, tmp_path):
    """`q` runs no further source and says so."""
    code, _, err = debug(command, "q\n")

    assert 1 == code, err
    assert "stopped: it was ended by hand" in err
    none_left(tmp_path)


def test_the_debugger_works_on_a_terminal(command, tmp_path):
    """With a terminal the debugger prompts and answers there, and stdout stays data."""
    main, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "hpcresume", "trial", "demo.py", "--pdb"],
        cwd=tmp_path,
        env={**command.env, "TERM": "dumb"},
        stdin=child,
        stdout=subprocess.PIPE,
        stderr=child,
    )
    os.close(child)
    try:
        assert "-> json.loads" in read_until(main, "(Pdb) ")
        os.write(main, b"p item\n")
        assert "{'text': 'bad'}" in read_until(main, "(Pdb) ")
        os.write(main, b"c\n")
        read_until(main, "nothing was written")
        rows = process.stdout.read().splitlines()
        code = process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        os.close(main)

    assert 1 == code
    assert ["a", "c"] == [json.loads(line)["source"] for line in rows]


def read_until(terminal: int, text: str, *, timeout_s: float = 60) -> str:
    """Return what a terminal shows up to a text; fail with it when time is up."""
    shown, deadline = "", time.monotonic() + timeout_s
    while text not in shown:
        ready, _, _ = select.select([terminal], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"no {text!r} within {timeout_s:g} s in {shown!r}"
        shown += os.read(terminal, 4096).decode()
    return shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_trial_and_leaves_nothing(command, tmp_path, number):
    """The temporary directory goes also when the trial is ended in the middle."""
    process = command.start("trial", "demo.py", "--engine", "inline", "-P", "names=endless")
    try:
        wait_until(
            (tmp_path / "started").exists,
            timeout_s=60,
            describe=lambda: f"status {process.poll()}",
        )
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()

    assert (130, "") == (process.returncode, out), err
    none_left(tmp_path)
