"""What workers print reaches the driver's streams, all of it, whatever becomes of the log."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcresume.engine.output import join
from hpcresume.engine.worker import StageWorker

WORKER = """
import os, subprocess, sys
from hpcresume.engine.output import join
print("before")
join(sys.argv[1])
for n in range(int(sys.argv[2])):
    print("out", n)
    print("err", n, file=sys.stderr)
sys.stdout.flush()
subprocess.run(["echo", "of a child"], check=True)
"""

DRIVER = """
import os, subprocess, sys, time
from hpcresume.engine.output import OutputRelay
before = set(os.listdir("/proc/self/fd"))
relay = OutputRelay()
workers = [
    subprocess.Popen([sys.executable, "-c", sys.argv[1], relay.address, sys.argv[2]],
                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(2)
]
endings = [worker.wait() for worker in workers]
relay.close()
assert endings == [0, 0], endings
assert before == set(os.listdir("/proc/self/fd"))
"""


def run_driver(lines: int, **streams: int) -> subprocess.CompletedProcess[str]:
    """Run a driver with two workers that print so many lines to each stream."""
    command = [sys.executable, "-c", DRIVER, WORKER, str(lines)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.run(command, text=True, timeout=60, check=False, **streams)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("lines", [0, 3, 20_000])
def test_all_lines_arrive_whole(lines: int) -> None:
    """Lines of both streams arrive in order and in one piece, those of children too."""
    done = run_driver(lines)
    assert 0 == done.returncode, done.stderr
    out = done.stdout.splitlines()
    assert sorted(["of a child", *(f"out {n}" for n in range(lines))] * 2) == sorted(out)
    assert sorted([f"err {n}" for n in range(lines)] * 2) == sorted(done.stderr.splitlines())


def test_beginning_of_a_line_is_handed_on_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that has stopped keeps nothing back, also where a stage closed a stream."""
    path = tmp_path / "log"
    with path.open("w") as log, path.open() as closed:
        closed.close()
        monkeypatch.setattr(sys, "stdout", closed)
        monkeypatch.setattr(sys, "stderr", log)
        print("not a whole line", end="", file=sys.stderr)
        StageWorker(None).stop()  # type: ignore[arg-type]
        assert "not a whole line" == path.read_text()


def test_who_comes_too_late_leaves_the_drivers_files_as_they_are(tmp_path: Path) -> None:
    """Where the relay's pipes were there may be anything, by the time a worker starts."""
    path = tmp_path / "ledger"
    path.write_text("kept")
    with path.open("r+") as ledger:
        number = ledger.fileno()
        with pytest.raises(BrokenPipeError):
            join(f"{os.getpid()} {number} {number}")
    assert "kept" == path.read_text()


def test_log_that_takes_no_more_stops_nobody() -> None:
    """Workers end as ever where the log's disk is full."""
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        done = run_driver(20_000, stdout=full)
    finally:
        os.close(full)
    assert 0 == done.returncode, done.stderr


HUNG = """
import os, subprocess, sys, time
from hpcresume.engine.output import OutputRelay
relay = OutputRelay()
pid, out, _ = relay.address.split()
writer = "import sys; print('x' * 99, file=sys.stderr); [print('y' * 99) for _ in range(400_000)]"
start = time.monotonic()
with open(f"/proc/{pid}/fd/{out}", "wb") as pipe:
    subprocess.run([sys.executable, "-c", writer], stdout=pipe, check=True)
assert time.monotonic() - start < 30
print("goes on", file=sys.stderr, flush=True)
sys.stdin.readline()
relay.close()
"""


def test_hung_log_holds_nobody_up_and_says_what_is_lost() -> None:
    """Workers go on printing 40 MB into a log that takes nothing; it tells of it afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-c", HUNG], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line == "goes on\n":
            break
    out, err = process.communicate("\n", timeout=60)
    assert 0 == process.returncode, err
    lost = re.search(r"hpcresume: the log hung; (\d+) bytes are lost\n", out)
    assert lost is not None
    assert 400_000 * 100 == len(out) - len(lost[0]) + int(lost[1])


def test_log_that_does_not_block_gets_everything() -> None:
    """Where the driver's stream is set not to block, what it cannot take yet comes later."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with subprocess.Popen([sys.executable, "-c", DRIVER, WORKER, "20000"], stdout=writing,
                          stderr=subprocess.DEVNULL) as driver:  # fmt: skip
        until = time.monotonic() + 30
        while select.select((), (writing,), (), 0)[1]:  # it has room
            assert time.monotonic() < until
            time.sleep(0.01)
        os.close(writing)
        with open(reading) as file:
            lines = file.read().splitlines()
    assert (0, 2 * 20_001) == (driver.returncode, len(lines))


def test_who_writes_for_ever_does_not_keep_the_driver(tmp_path: Path) -> None:
    """A process that a stage left behind is given up after a second."""
    driver = (
        "import os, subprocess, sys, time\n"
        "from hpcresume.engine.output import OutputRelay\n"
        "relay = OutputRelay()\n"
        "pid, out, _ = relay.address.split()\n"
        "writer = subprocess.Popen(['yes'], stdout=open(f'/proc/{pid}/fd/{out}', 'wb'))\n"
        "while not os.fstat(1).st_size: pass\n"
        "start = time.monotonic()\n"
        "relay.close()\n"
        "took = time.monotonic() - start\n"
        "writer.kill(); writer.wait()\n"
        "assert took < 3, took\n"
    )
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-c", driver], stdout=log, stderr=subprocess.PIPE, timeout=60,
            check=False,
        )  # fmt: skip
    assert 0 == done.returncode, done.stderr.decode()
    assert (tmp_path / "log").stat().st_size > 1 << 16
