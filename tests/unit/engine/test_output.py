"""What workers print reaches the driver's streams, all of it, whatever becomes of the log."""

from __future__ import annotations

import os
import subprocess
import sys
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


def test_who_writes_for_ever_does_not_keep_the_driver(tmp_path: Path) -> None:
    """A process that a stage left behind is given up after a second."""
    driver = (
        "import subprocess, sys, time\n"
        "from hpcresume.engine.output import OutputRelay\n"
        "relay = OutputRelay()\n"
        "pid, out, _ = relay.address.split()\n"
        "writer = subprocess.Popen(['yes'], stdout=open(f'/proc/{pid}/fd/{out}', 'wb'))\n"
        "time.sleep(0.2)\n"
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
