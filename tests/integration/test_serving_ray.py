"""Pools of real Ray actors: every phase raising, hanging and dying, in one worker and in all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from hpcresume.engine.head import HeadResources, RayHead
from hpcresume.errors import PoolUnrecoverable
from hpcresume.serving import PhaseFailedError, Retryable, UpdateReport
from hpcresume.serving.members import RayPlaces
from hpcresume.serving.policy import Outcome
from tests.support.places import REPOSITORY, child_environment
from tests.support.serving import (
    EXPORTER_PHASES,
    QUICK,
    WORKER_PHASES,
    BoomError,
    Faulty,
    InPlace,
    PoolCase,
    eventually,
    pool_of,
    run,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(280)]

HANG_S = 4.0
PHASES = ("pause", "release", "prepare", "build", "transfer", "commit", "finalize", "restore",
          "resume")  # fmt: skip
# Long enough that a busy machine does not look like a hang to the phases that are not told to.
PATIENT = replace(QUICK, **{f"{phase}_s": 60.0 for phase in PHASES}, start_s=120, fence_s=30)


@pytest.fixture(scope="module", autouse=True)
def head() -> Iterator[None]:
    """Run a Ray head for the module, as an attempt does."""
    temp = tempfile.mkdtemp(prefix="hpcr-")
    before = dict(os.environ)
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    os.environ.update(
        PYTHONPATH=path,
        RAY_AUTH_MODE="disabled",
        RAY_enable_metrics_collection="0",
        RAY_USAGE_STATS_ENABLED="0",
    )
    started = RayHead(temp, HeadResources(cpus=2, gpus=0, memory_bytes=2 << 30))
    yield
    started.close()
    shutil.rmtree(temp, ignore_errors=True)
    os.environ.clear()
    os.environ.update(before)


def patient(*phases: str) -> object:
    """Return a policy in which these phases end soon when they hang."""
    return replace(PATIENT, **{f"{phase}_s": HANG_S for phase in phases})


FAULTS = [
    *(("worker", phase, how, which) for phase in WORKER_PHASES for how in ("raise", "hang", "die")
      for which in ("one", "all")),
    *(("exporter", phase, how, "one") for phase in EXPORTER_PHASES
      for how in ("raise", "hang", "die")),
]  # fmt: skip
NAMES = {"stage": "transfer", "export": "build"}


async def _after_a_fault(case: PoolCase, who: str, phase: str, how: str, which: str) -> None:
    """Update under a fault and check what is left against the contract."""
    old = case.pool.version
    case.faults.arm(who, phase, how, only_one=which == "one")
    name = NAMES.get(phase, phase)
    case.pool.policy = patient(name) if how == "hang" else PATIENT
    begun = time.monotonic()
    result = await case.try_update(old + 1)
    assert time.monotonic() - begun < case.pool.policy.bound_s
    case.pool.policy = PATIENT
    versions = await case.check_contract()
    report = result if isinstance(result, UpdateReport) else result.update_report
    late = phase in ("commit", "finalize", "restore", "resume")
    dead_all = which == "all" and how != "raise"
    if (
        who == "worker"
        and which == "all"
        and (dead_all or phase in ("commit", "restore", "resume"))
    ):
        assert isinstance(result, PoolUnrecoverable), result
        assert set() == versions
        return
    skipped = phase in ("pause", "release") and how != "raise"
    assert {old + 1 if late or skipped else old} == versions, report
    if how == "raise" and not (phase == "commit" and which == "one"):
        first = result.exceptions[0] if isinstance(result, ExceptionGroup) else result
        assert isinstance(first, BoomError), result
    elif not late and not skipped:
        assert isinstance(result, PhaseFailedError), result
        assert (name, old + 1) == (result.fields["phase"], result.fields["version"])
    case.faults.disarm()
    await eventually(lambda: len(case.pool.state().serving) == 2, "both serve again", 120)
    assert versions == await case.check_contract()
    # A place that is filled over and over without an answer would be given up.
    assert 2 == len({(await case.pool.call("look")).worker for _ in range(2)})


ONE = [
    pytest.param("die", WORKER_PHASES + EXPORTER_PHASES, id="die"),
    pytest.param("hang", ("stage",), id="hang-in-the-push"),
    pytest.param("raise", WORKER_PHASES + EXPORTER_PHASES, id="raise", marks=pytest.mark.slow),
    pytest.param("hang", WORKER_PHASES + EXPORTER_PHASES, id="hang", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("how", "phases"), ONE)
def test_every_phase_of_one(tmp_path: Path, how: str, phases: tuple[str, ...]) -> None:
    """
    In every phase one worker, or the exporter, raises, hangs or dies; each update ends
    within its deadline with one verified version on all that serve, and who was lost is
    replaced.
    """

    async def product() -> None:
        async with pool_of(tmp_path, n=2, places=RayPlaces(), policy=PATIENT) as case:
            chosen = [f for f in FAULTS if f[2:] == (how, "one") and f[1] in phases]
            for who, phase, _, which in chosen:
                await _after_a_fault(case, who, phase, how, which)

    run(product())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raise", "hang", "die"])
def test_every_phase_of_all(tmp_path: Path, how: str) -> None:
    """The same where it happens to all workers at once; unrecoverable means none serves."""

    async def product() -> None:
        for who, phase, _, which in (f for f in FAULTS if f[2:] == (how, "all")):
            async with pool_of(tmp_path, n=2, places=RayPlaces(), policy=PATIENT) as case:
                await _after_a_fault(case, who, phase, how, which)

    run(product())


@pytest.mark.parametrize(
    ("kind", "updates"),
    [
        pytest.param(InPlace, 3, id="in-place"),
        pytest.param(InPlace, 8, id="in-place-long", marks=pytest.mark.slow),
        pytest.param(Faulty, 8, id="staged-long", marks=pytest.mark.slow),
    ],
)
def test_random_schedules(tmp_path: Path, kind: type[Faulty], updates: int) -> None:
    """Several faults at once, by chance: the contract holds after every update, in place too."""
    rng = random.Random(7)

    async def schedule() -> None:
        brisk = replace(PATIENT, **{f"{phase}_s": 1.5 for phase in PHASES})
        async with pool_of(tmp_path, n=3, kind=kind, places=RayPlaces(), policy=PATIENT) as case:
            for version in range(2, 2 + updates):
                for who, phase, _, which in rng.sample(FAULTS, 2):
                    how = rng.choice(["raise", "hang", "die"])
                    case.faults.arm(
                        who, phase, how, only_one=which == "one", once=rng.random() < 0.3
                    )
                # A busy machine may hang, too, in the update; not while workers are replaced.
                case.pool.policy = brisk
                result = await case.try_update(version)
                case.pool.policy = PATIENT
                versions = await case.check_contract()
                if isinstance(result, PoolUnrecoverable):
                    assert set() == versions
                    return
                assert 1 == len(versions)
                case.faults.disarm()
                await eventually(lambda: len(case.pool.state().serving) == 3, "all serve", 120)

    run(schedule())


def test_the_loop_is_never_blocked(tmp_path: Path) -> None:
    """A ticker in the pool's loop never lags 100 ms while a push takes a second."""

    async def case() -> None:
        async with pool_of(tmp_path, n=2, places=RayPlaces(), policy=PATIENT) as case:
            case.faults.arm("worker", "stage", "slow")
            update = asyncio.ensure_future(case.pool.update(2))
            lags = []
            for _ in range(50):
                begun = time.monotonic()
                await asyncio.sleep(0.02)
                lags.append(time.monotonic() - begun - 0.02)
            assert not update.done()
            # A phase that hangs keeps no worker from saying how it stands.
            health = await case.pool.health(60)
            assert [1, 1] == [one.held.version for one in health.values()]
            case.faults.disarm()
            assert Outcome.COMMITTED is (await update).outcome
            # The machine itself may stall once; a blocking call would last for the whole push.
            assert sorted(lags)[-3] < 0.1, sorted(lags)[-3:]

    run(case())


def test_kill_9(tmp_path: Path) -> None:
    """
    A worker killed while it answers: that request is retryable, all others are
    answered, and its successor serves only what was pushed to it, here through files.
    """

    async def case() -> None:
        options = {"places": RayPlaces(), "policy": PATIENT, "transport": "file"}
        async with pool_of(tmp_path, n=2, **options) as case:
            await case.pool.update(2)
            case.faults.arm("worker", "waiting", "raise", only_one=False)
            async with case.pool.lease() as lease:
                pid = (await lease.call("pid")).value
                case.faults.disarm()
                asked = asyncio.ensure_future(lease.call("wait_for_abort"))
                await eventually(lambda: "worker.waiting" in case.faults.events(), "it waits")
                os.kill(pid, signal.SIGKILL)
                with pytest.raises(Retryable) as raised:
                    await asked
                assert raised.value.begun
            assert {2} == {(await case.pool.call("look")).version for _ in range(6)}
            await eventually(lambda: len(case.pool.state().serving) == 2, "it is replaced", 120)
            assert {2} == await case.check_contract()

    run(case())


def test_the_state_outlives_the_exporter(tmp_path: Path) -> None:
    """What was pushed stays with the pool: a worker that is replaced after the exporter's death
    gets it."""

    async def case() -> None:
        async with pool_of(tmp_path, n=2, places=RayPlaces(), policy=PATIENT) as case:
            await case.pool._exporting.holder.kill(20)
            seat = case.pool._seats["worker-1"]
            await seat.member.kill(20)
            await eventually(lambda: len(case.pool.state().serving) == 2, "it is replaced", 120)
            assert {1} == await case.check_contract()

    run(case())


HOST = """
import asyncio, os, sys
import ray
ray.init(address="local", num_cpus=1, include_dashboard=False, _temp_dir=sys.argv[1])
from hpcresume.serving import ServingPool, StatefulWorker

class Mine(StatefulWorker):
    def pid(self):
        return os.getpid()

async def main():
    pool = ServingPool(Mine, 2)
    await pool.start()
    await pool.update(1)
    pids = {(await pool.call("pid")).value for _ in range(4)}
    print(*[m.member._pid for m in pool._seats.values()], flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


def test_workers_end_with_the_process_of_their_pool() -> None:
    """A pool whose process is killed leaves no worker behind that would serve on."""
    temp = tempfile.mkdtemp(prefix="hpcr-")
    process = subprocess.Popen(
        [sys.executable, "-c", HOST, temp],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=child_environment({"RAY_AUTH_MODE": "disabled"}),
    )
    try:
        assert process.stdout is not None
        line = ""
        while not (words := line.split()) or not all(word.isdigit() for word in words):
            line = process.stdout.readline()
            assert line, "the pool did not come up"
        workers = [psutil.Process(int(pid)) for pid in line.split()]
        process.kill()
        process.wait()
        gone, alive = psutil.wait_procs(workers, timeout=60)
        assert (2, []) == (len(gone), alive)
    finally:
        process.kill()
        process.wait()
        for other in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if temp in " ".join(other.cmdline()):
                    other.kill()
        shutil.rmtree(temp, ignore_errors=True)
