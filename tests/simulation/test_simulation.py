"""Simulated runs by the thousand, and the same engine under Hypothesis for short examples."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from hpcresume.launch.drive import merge_step, submit_to_slurm
from hpcresume.merge.generation import load_newest
from hpcresume.run.directory import RunDir
from tests.simulation.__main__ import past_seeds
from tests.simulation.simulation import (
    EVENTS,
    Simulation,
    folding,
    ready,
    resolved,
    simulate,
    submitted,
)
from tests.simulation.world import RUN, Process
from tests.support.places import REPOSITORY
from tests.support.simfs import SimFileSystem

SEEDS = int(os.environ.get("HPCRESUME_TEST_SEEDS", "20000"))


@pytest.mark.timeout(3600)
def test_no_seed_breaks_an_invariant() -> None:
    """
    Runs with zombies, kills, restarts, rot and stale listings: what is published can be read at
    every step, nobody's result changes hands, and every run comes to its end once faults stop.
    """
    jobs = len(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "tests.simulation", "--seeds", str(SEEDS)]
    done = subprocess.run(
        [*command, "--jobs", str(jobs)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
        check=False,
    )  # fmt: skip
    print(done.stdout)
    assert 0 == done.returncode, done.stdout


def test_seeds_that_failed_once() -> None:
    """Every seed that has found something is run again."""
    for seed in past_seeds():
        simulate(seed)


def test_a_seed_is_a_run() -> None:
    """The same seed makes the same run, whatever ran before it."""
    seeds = (3, 11, 42)
    first = [simulate(seed, tracing=True).world.trace for seed in seeds]
    second = [simulate(seed, tracing=True).world.trace for seed in reversed(seeds)]
    assert first == second[::-1]
    assert all(first)


class Machine(RuleBasedStateMachine):
    """A run in which every step is Hypothesis's choice, so that a failure shrinks."""

    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()
        self._sim: Simulation | None = None

    @initialize(seed=st.integers(0, 200), links=st.booleans())
    def begin(self, seed: int, links: bool) -> None:
        """Submit a run of a few sources."""
        sim = self._sim = Simulation(random.Random(seed))
        sim.world.fault_rate, sim.world.server.hard_links = 0.0, links
        sim.is_calm = False
        self._links = links
        self._stack.enter_context(sim.world.installed())
        self._stack.enter_context(sim.cluster.installed(resolved()))
        self._stack.enter_context(folding(sim.folds))
        sim.prepare()

    def _pick(self, which: int) -> Process | None:
        alive = self._sim.world.runnable()
        return alive[which % len(alive)] if alive else None

    @rule(calls=st.integers(1, 60))
    def go_on(self, calls: int) -> None:
        """Let Slurm or a process go on."""
        self._sim.go_on(calls)

    @rule(which=st.integers(0, 5), calls=st.integers(1, 60))
    def run_one(self, which: int, calls: int) -> None:
        """Let one process go on."""
        self._sim.cluster.notice_ends()
        if process := self._pick(which):
            self._sim.world.run(process, calls)

    @rule(
        which=st.integers(0, 5),
        calls=st.integers(1, 40),
        kind=st.sampled_from(["error", "kill", "freeze"]),
    )
    def fault(self, which: int, calls: int, kind: str) -> None:
        """Let a call of a process go wrong."""
        if process := self._pick(which):
            process.fault_in = calls
            self._sim.world.fates = [kind]

    @rule(event=st.sampled_from(EVENTS))
    @precondition(lambda self: self._sim is not None)
    def happen(self, event: str) -> None:
        """Let something happen; a server without links keeps what it has."""
        if event != "restart" or self._links:
            self._sim.happen(event)

    def teardown(self) -> None:
        """Let the faults stop; the run comes to its end."""
        with self._stack:
            if self._sim is not None:
                self._sim.drain()


Machine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestMachine = Machine.TestCase


def test_cancelled_tasks_do_not_end_a_run() -> None:
    """
    Where a merge withholds cancelled tasks while somebody submits, nothing is left to deal, and
    the run is not finished for that.
    """
    sim = Simulation(random.Random(1))
    sim.world.fault_rate, sim.events = 0.0, []
    with sim.world.installed(), sim.cluster.installed(resolved()):
        sim.world.server.root = submitted(sim.count, sim.array).clone().root
        sim.oracle.begin()
        sim.cluster.begin(min(sim.count, sim.array))
        for element in sim.cluster.elements:
            element.state = "CANCELLED"
        run = RunDir.open(RUN, SimFileSystem(sim.world.server))
        assert "stopped" == merge_step(run).state

        assert "stopped" == submit_to_slurm(ready(run, sim.array)).state

        assert not load_newest(run).finished
