"""The engine over a real Ray head: deaths, hangs, set-up, Ray's own death, what is left."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from hpcresume.doctor.ray_head import STRANGER
from tests.support.cli import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(280)]

STAGES = '''
import ctypes
import os
import signal
import subprocess
import sys
import time
import hpcresume as hr


def hang_in_c():
    """Sleep in C with the interpreter's lock held and signals blocked."""
    libc = ctypes.PyDLL(None)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    while True:
        libc.sleep(1000)


@hr.stage(timeout_s=1)
def work(x, ctx):
    if x == "exit":
        os._exit(1)
    if x == "segfault":
        ctypes.string_at(0)
    if x == "hang":
        hang_in_c()
    if x == "sleep":
        time.sleep(1000)
    if x == "raise":
        raise ValueError("as asked")
    return {"x": x, "try": ctx.attempt, "omp": os.environ["OMP_NUM_THREADS"]}


@hr.stage(max_concurrency=4, timeout_s=1)
async def blocking(x):
    if x == "sleep":
        hang_in_c()
    return {"x": x}


def printing(x):
    print("prints", x, "and", "more")
    print("complains", x, file=sys.stderr)
    subprocess.run(["echo", "starts", str(x)], check=True)
    return x


def steady(x):
    time.sleep(0.01)
    return x


class Failing(hr.Stage):
    workers = 1

    def setup(self, worker):
        raise OSError("no licence server")

    def process(self, x):
        return x


class Slow(hr.Stage):
    setup_timeout_s = 1

    def setup(self, worker):
        hang_in_c()

    def process(self, x):
        return x


class Gpu(hr.Stage):
    gpus = 1

    def process(self, x):
        return x


class Server(hr.Stage):
    def setup(self, worker):
        worker.spawn(["sleep", "98765"], ready=None)

    def process(self, x):
        os._exit(3)


STAGES = {"printing": printing, "steady": steady, "work": work, "blocking": blocking,
          "failing": Failing, "slow": Slow, "gpu": Gpu, "server": Server}


def pipeline(stage: str = "work") -> hr.Pipeline:
    return hr.Pipeline(name="t", sources=["unused"], stages=[STAGES[stage]])
'''

HOST = '''
"""Runs executors over one head on orders from stdin, as the driver does; one JSON line each."""
import json, logging, os, sys, tempfile, time
from pathlib import Path
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # Ray prints its workers' output
from hpcresume.doctor.ray_head import STRANGER
from hpcresume.engine.ray_environment import prepare_environment
prepare_environment()
import psutil
import ray
from hpcresume.engine.executor import Executor, Limits, StageBrokenError
from hpcresume.engine.groups import make_groups
from hpcresume.engine.head import HeadResources, RayHead
from hpcresume.engine.pool import EngineDiedError
from hpcresume.engine.ray_pool import RayPool
from hpcresume.engine.worker import WorkerSetup
from hpcresume.pipeline.load import load_snapshot
from tests.unit.engine.pools import ListFeed, Outcomes

logging.basicConfig(stream=sys.stderr, level=logging.INFO)
root = Path(sys.argv[1])
head = RayHead(sys.argv[2], HeadResources(cpus=2, gpus=0, memory_bytes=2 << 30))

def say(**values):
    print(json.dumps(values), file=answers, flush=True)

def run(order):
    code = root / "code" / order["stage"]
    stages = load_snapshot(code).pipeline.stages
    groups = make_groups(stages, cpus=2, workers=order.get("workers", 0))
    (root / 'marked').mkdir(exist_ok=True)
    marks = tempfile.mkdtemp(dir=root / 'marked')
    def setup(group, index, mark, output):
        return WorkerSetup(code=str(code), run_id="r", first=group.first,
            count=len(group.stages), index=index, cpus=group.cpus, gpus=group.gpus,
            scratch=str(root / "scratch"), outputs=str(root / "out"), parts=str(root / "parts"),
            mark=mark, output=output, local=str(root))
    pool = RayPool(groups, make_setup=setup, marks=marks, check=head.check)
    outcomes = Outcomes()
    executor = Executor(groups, pool, ListFeed(order["payloads"]), outcomes,
        Limits(max_attempts=order.get("attempts", 2),
               chunk_target_s=order.get("call_s", 0.01)))
    start, broken, stopped = time.monotonic(), None, []
    def tick():
        if executor.completed >= order.get("stop_at", 1 << 30) and not stopped:
            stopped.append(time.monotonic())
            executor.stop()
        return True
    try:
        executor.start()
        executor.run(tick)
    except StageBrokenError as error:
        broken = [error.fields["kind"], str(error)]
    drained = time.monotonic() - stopped[0] if stopped else None
    pool.close(5)
    failures = [[f.source, f.attempt, f.kind, f.message, f.stage] for f in outcomes.failures]
    say(rows=outcomes.rows, failures=failures, broken=broken, seconds=time.monotonic() - start,
        drained=drained, marks=len(outcomes.open))

say(pid=os.getpid(), address=ray.get_runtime_context().gcs_address,
    session=ray._private.worker._global_node.get_session_dir_path(),
    daemons={c.name(): c.pid for c in psutil.Process().children()})
for line in sys.stdin:
    order = json.loads(line)
    if order.get("close"):
        head.close()
        say(closed=True)
        break
    try:
        run(order)
    except EngineDiedError as error:
        say(died=str(error), code=error.exit_code)
        os._exit(error.exit_code)
'''


@dataclass
class Host:
    """A process with a Ray head that runs executors on order."""

    process: subprocess.Popen[str]
    temp: Path
    log: Path
    hello: dict[str, Any] = field(default_factory=dict)

    def order(self, **order: Any) -> dict[str, Any]:
        """Give an order and return its answer."""
        self.send(**order)
        return self.answer()

    def send(self, **order: Any) -> None:
        """Give an order."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Return the next answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the host ended:\n{self.log.read_text()[-3000:]}"
        found: dict[str, Any] = json.loads(line)
        return found


def write_code(root: Path) -> None:
    """Write a snapshot of the pipeline for every stage of the file."""
    from hpcresume.pipeline.load import load_pipeline, parse_target, write_snapshot

    file = root / "staged.py"
    file.write_text(STAGES)
    stages = ("printing", "steady", "work", "blocking", "failing", "slow", "gpu", "server")
    for stage in stages:
        code = root / "code" / stage
        code.mkdir(parents=True)
        write_snapshot(load_pipeline(parse_target(str(file), root), {"stage": stage}), code)


@contextlib.contextmanager
def running_host(root: Path) -> Iterator[Host]:
    """Start a head in a process of its own; end it by its pid."""
    write_code(root)
    temp = Path(tempfile.mkdtemp(prefix="hr-", dir="/tmp"))
    host = root / "host.py"
    host.write_text(textwrap.dedent(HOST))
    with (root / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(host), str(root), str(temp)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONDONTWRITEBYTECODE": "1"},
        )
    made = Host(process, temp, root / "log")
    try:
        made.hello = made.answer()
        yield made
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()
        process.communicate()
        shutil.rmtree(temp, ignore_errors=True)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Return the module's head."""
    with running_host(tmp_path_factory.mktemp("host")) as made:
        yield made


def charges(answer: dict[str, Any]) -> dict[int, list[tuple[int, str]]]:
    """Return attempt and kind of every charge, by source."""
    found: dict[int, list[tuple[int, str]]] = {}
    for source, attempt, kind, _, _ in answer["failures"]:
        found.setdefault(source, []).append((attempt, kind))
    return found


def test_deaths_and_hangs_are_charged_to_who_caused_them(host: Host) -> None:
    """Exit, crash, a hang in C and a time-out each cost their own source its attempts."""
    payloads: list[Any] = list(range(40))
    payloads[5], payloads[13], payloads[21], payloads[30] = "exit", "segfault", "hang", "sleep"
    answer = host.order(stage="work", payloads=payloads)
    assert {
        5: [(1, "death"), (2, "death")],
        13: [(1, "death"), (2, "death")],
        21: [(1, "timeout"), (2, "timeout")],
        30: [(1, "timeout"), (2, "timeout")],
    } == charges(answer)
    assert set(map(str, set(range(40)) - {5, 13, 21, 30})) == answer["rows"].keys()
    messages = {source: message for source, _, _, message, _ in answer["failures"]}
    assert "os._exit" in messages[5]
    assert "Segmentation fault" in messages[13]
    assert "the worker was killed" in messages[21]
    assert "timeout_s=1" in messages[30]
    assert {"work"} == {stage for *_, stage in answer["failures"]}


def test_threads_are_as_many_as_the_stages_cores(host: Host) -> None:
    """OMP_NUM_THREADS follows ``cpus``; the first try is number 1."""
    answer = host.order(stage="work", payloads=["a"])
    assert {"0": [{"x": "a", "try": 1, "omp": "1"}]} == answer["rows"]


def test_what_stages_print_is_in_the_log(host: Host) -> None:
    """Lines of stages and of what they start come through whole and once, by the run's end."""
    host.order(stage="printing", payloads=list(range(60)))
    lines = host.log.read_text().splitlines()
    for n in range(60):
        for line in (f"prints {n} and more", f"complains {n}", f"starts {n}"):
            assert 1 == lines.count(line), line


def test_stop_ends_long_calls(host: Host) -> None:
    """Workers that hold seconds of work hand it back, and keep what they have begun."""
    answer = host.order(stage="steady", payloads=[0] * 4000, call_s=4.0, stop_at=200)
    assert 200 <= len(answer["rows"]) < 2000
    assert answer["drained"] < 1.5
    assert (0, []) == (answer["marks"], answer["failures"])


def test_async_stage_that_blocks_is_killed_and_found(host: Host) -> None:
    """A coroutine that never gives the loop back is found by the driver; others complete."""
    payloads: list[Any] = list(range(12))
    payloads[4] = "sleep"
    answer = host.order(stage="blocking", payloads=payloads, attempts=1)
    assert {4: [(1, "timeout")]} == charges(answer)
    assert 11 == len(answer["rows"])


def test_setup_that_fails(host: Host) -> None:
    """The stage cannot start, nobody is charged, and the reason has the user's error."""
    answer = host.order(stage="failing", payloads=[1, 2])
    assert ([], {}) == (answer["failures"], answer["rows"])
    kind, reason = answer["broken"]
    assert "stage-start" == kind
    assert "OSError: no licence server" in reason


def test_setup_that_takes_too_long(host: Host) -> None:
    """A set-up is killed at its limit, also where it hangs in C."""
    answer = host.order(stage="slow", payloads=[1], workers=1)
    assert "setup_timeout_s=1" in answer["broken"][1]
    assert answer["seconds"] < 60


def test_gpu_that_is_not_there(host: Host) -> None:
    """A stage that asks for more GPUs than the task has is told so at once."""
    answer = host.order(stage="gpu", payloads=[1])
    assert "ask for 1 GPUs and this task was given 0" in answer["broken"][1]
    assert answer["seconds"] < 10


def test_server_of_a_dead_worker_ends_with_it(host: Host) -> None:
    """What a worker spawned does not outlive it, though it has a process group of its own."""
    host.order(stage="server", payloads=[1], attempts=1, workers=1)

    def servers() -> list[psutil.Process]:
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if process.info["cmdline"] == ["sleep", "98765"]
        ]

    wait_until(lambda: not servers(), timeout_s=20, describe=lambda: str(servers()))


def test_stranger_without_the_token_is_refused(host: Host) -> None:
    """Another process of the node cannot use the head without the attempt's token."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    stranger = subprocess.run(
        [sys.executable, "-c", STRANGER, host.hello["address"]],
        env={**kept, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "refused\n" == stranger.stdout, stranger.stderr


def test_a_head_of_one_node_has_no_autoscaler_and_no_dashboard(host: Host) -> None:
    """Of Ray's own programs only those run that serve one node."""
    processes = psutil.Process(host.process.pid).children(recursive=True)
    commands = [" ".join(process.cmdline()) for process in processes]
    assert any("raylet" in command for command in commands)
    needless = ("autoscaler", "dashboard/dashboard.py")
    assert [] == [c for c in commands if any(name in c for name in needless)]


def shm_of(pids: set[int]) -> set[str]:
    """Return the shared memory that processes hold."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            found |= {
                line.split()[-1]
                for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
                if "/dev/shm/" in line and "(deleted)" not in line
            }
    return found


@pytest.mark.parametrize("when", ["starting", "working"])
@pytest.mark.parametrize("daemon", ["raylet", "gcs_server"])
def test_death_of_ray_is_noticed_at_once_and_leaves_nothing(
    tmp_path: Path, daemon: str, when: str
) -> None:
    """The driver ends with 75 within seconds, naming what died; no process stays."""
    with running_host(tmp_path) as made:
        made.send(stage="work", payloads=["sleep"] * 40, attempts=1)
        if when == "working":
            wait_until(
                lambda: list((tmp_path / "marked").rglob("*.children")),
                timeout_s=60,
                describe=made.log.read_text,
            )
        processes = psutil.Process(made.process.pid).children(recursive=True)
        os.kill(made.hello["daemons"][daemon], signal.SIGKILL)
        start = time.monotonic()
        assert 75 == made.process.wait(timeout=60)
        assert time.monotonic() - start < 20
        assert f"Ray's {daemon} died" in made.process.stdout.read() + made.log.read_text()
        _, alive = psutil.wait_procs(processes, timeout=45)
        assert [] == alive


def test_nothing_is_left_after_close(tmp_path: Path) -> None:
    """After the end: no process, no socket, no shared memory, no directory."""
    with running_host(tmp_path) as made:
        made.order(stage="work", payloads=[1, 2, 3])
        processes = psutil.Process(made.process.pid).children(recursive=True)
        shared = shm_of({process.pid for process in processes} | {made.process.pid})
        assert {"closed": True} == made.order(close=True)
        made.process.wait(timeout=30)
        _, alive = psutil.wait_procs(processes, timeout=30)
        assert [] == alive
        assert not made.temp.exists()
        assert [] == [name for name in shared if Path(name).exists()]
