"""The worker: servers that become ready, die early, die later, and end with it."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hpcresume as hr
from hpcresume.deadline import note_stopping
from hpcresume.errors import PipelineError, StageStartError
from tests.unit.pipeline.test_context import is_running, wait_gone

SERVER = """
import http.server, os, sys
print("serving", os.environ.get("SLURM_JOB_ID"), os.environ.get("MODEL"), flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    tries = 0
    def do_GET(self):
        Handler.tries += 1
        self.send_response(503 if Handler.tries < 3 else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[hr.Worker]:
    """A worker that ends whatever a test started with it."""
    made = hr.Worker(index=0, cpus=1, gpus=0, scratch=tmp_path / "worker")
    yield made
    made.close()


def serve(port: int) -> list[str]:
    return [sys.executable, "-c", SERVER, str(port)]


def output_of(worker: hr.Worker) -> str:
    return "".join(path.read_text() for path in worker.scratch.glob("*.log"))


def test_a_server_is_ready_when_its_port_accepts(worker: hr.Worker) -> None:
    """spawn returns a running process; check finds nothing wrong."""
    port = worker.free_port()
    process = worker.spawn(serve(port), ready=f"tcp://127.0.0.1:{port}")

    assert process.poll() is None
    assert os.getpgid(process.pid) == process.pid
    assert worker.check() is None


def test_a_server_is_ready_when_it_answers_below_500(
    worker: hr.Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """503 is not ready, 404 is; a site's proxy is not asked."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    port = worker.free_port()
    process = worker.spawn(serve(port), ready=f"http://127.0.0.1:{port}/health?x=1")

    assert process.poll() is None
    assert '"GET /health?x=1 HTTP/1.1" 404' in output_of(worker)
    assert 2 == output_of(worker).count(" 503 ")


def test_a_function_may_tell_readiness(worker: hr.Worker) -> None:
    """Anything that a server does can be waited for."""
    mark = worker.scratch / "mark"
    worker.spawn(["sh", "-c", f"touch {mark}; exec sleep 600"], ready=mark.exists)

    assert mark.exists()


def test_a_servers_environment_is_clean_and_extended(
    worker: hr.Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's variables are gone, those given are there."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    port = worker.free_port()
    worker.spawn(serve(port), ready=f"tcp://127.0.0.1:{port}", env={"MODEL": "small"})

    assert output_of(worker).startswith("serving None small\n")


def test_an_early_death_is_told_with_the_last_words(worker: hr.Worker) -> None:
    """The stage cannot start, and the message says what the server said."""
    with pytest.raises(StageStartError) as caught:
        worker.spawn(["sh", "-c", "echo no such model >&2; exit 4"], ready="tcp://127.0.0.1:9")
    assert [] == [w for w in ("no such model", "exit status 4") if w not in str(caught.value)]


def test_a_server_that_is_late_is_killed_with_its_group(worker: hr.Worker) -> None:
    """After timeout_s the group is gone and the message holds its output."""
    script = "echo loading; sleep 600 & echo $! > pid; wait"
    with pytest.raises(StageStartError, match=r"not ready after 1 s(?s:.*)loading"):
        worker.spawn(
            ["sh", "-c", f"cd {worker.scratch}; {script}"],
            ready="tcp://127.0.0.1:9",
            timeout_s=1,
        )
    wait_gone(int((worker.scratch / "pid").read_text()))
    assert worker.check() is None


def test_a_failing_readiness_function_kills_the_server(worker: hr.Worker) -> None:
    """Its own exception reaches the stage, and nothing is left running."""
    pids: list[int] = []

    def fail() -> bool:
        pids.extend(int(p.name) for p in Path("/proc").glob("[0-9]*") if is_child(p))
        raise LookupError("broken probe")

    def is_child(path: Path) -> bool:
        try:
            return b"sleep\x00612" in (path / "cmdline").read_bytes()
        except OSError:
            return False

    with pytest.raises(LookupError, match="broken probe"):
        worker.spawn(["sleep", "612"], ready=fail)
    assert [] == [pid for pid in pids if is_running(pid)]


def test_a_missing_program_is_told(worker: hr.Worker) -> None:
    """The error names the command."""
    with pytest.raises(StageStartError, match="no-such-program-here"):
        worker.spawn(["no-such-program-here"], ready=None)


@pytest.mark.parametrize("ready", ["tcp://localhost", "ftp://h:1", "localhost:80"])
def test_an_unknown_kind_of_readiness_is_refused(worker: hr.Worker, ready: str) -> None:
    """Nothing is started for it."""
    with pytest.raises(PipelineError, match="spawn"):
        worker.spawn(["sleep", "600"], ready=ready)
    assert [] == list(worker.scratch.iterdir())


def test_check_names_each_server_that_died(worker: hr.Worker) -> None:
    """A server killed in the middle breaks the worker, with how it ended."""
    alive = worker.spawn(["sleep", "600"], ready=None)
    killed = worker.spawn(["sleep", "601"], ready=None)
    killed.kill()
    wait_gone(killed.pid)

    with pytest.raises(hr.WorkerBroken, match="sleep 601 ended with signal SIGKILL") as caught:
        worker.check()
    assert "sleep 600" not in caught.value.reason
    assert alive.poll() is None


def test_close_ends_everything_and_removes_the_scratch(tmp_path: Path) -> None:
    """Groups end also where a member ignores SIGTERM's leader; the directory is gone."""
    worker = hr.Worker(index=0, cpus=1, gpus=0, scratch=tmp_path / "worker")
    pid = tmp_path / "pid"
    script = f"(trap '' TERM; echo $BASHPID > {pid}; while :; do sleep 1; done) & wait"
    process = worker.spawn(["bash", "-c", script], ready=lambda: pid.exists() and pid.read_text())
    child = int(pid.read_text())

    worker.close()

    wait_gone(child)
    assert process.returncode is not None
    assert not (tmp_path / "worker").exists()


def test_ports_are_not_handed_out_twice(worker: hr.Worker) -> None:
    """Two servers of one worker do not get the same port."""
    ports = [worker.free_port() for _ in range(50)]

    assert (50, True) == (len(set(ports)), all(1024 <= p < 65536 for p in ports))


def test_a_worker_knows_that_its_attempt_is_stopping(tmp_path: Path) -> None:
    """From the moment the attempt takes no more sources on; without an attempt never."""
    worker = hr.Worker(index=0, cpus=1, gpus=0, scratch=tmp_path / "worker", attempt=tmp_path)
    before = worker.is_stopping
    note_stopping(str(tmp_path))

    assert (False, True) == (before, worker.is_stopping)
    assert not hr.Worker(index=0, cpus=1, gpus=0, scratch=tmp_path / "worker").is_stopping
