"""Which nodes are taken out of an array, and that at least one is left."""

from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from hpcresume.config.settings import Request
from hpcresume.run.directory import AttemptInfo, Outcome, RunDir
from hpcresume.task import bad_node
from hpcresume.task.allocation import Allocation
from hpcresume.task.bad_node import bad_nodes, excluding, hold, is_nodes_fault, keep_away
from tests.support.places import Place
from tests.unit.launch.jobs import settings

DONE = Outcome("done", "", "finished", completed=3)
BROKEN = Outcome("broken", "read-only", "storage")


def attempt(run: RunDir, task: int, node: str, outcome: Outcome | None) -> None:
    """Record an attempt on a node, with how it ended, if it has."""
    ref = run.allocate_attempt(0, task)
    info = AttemptInfo("n", "h", "b", 1, "2024-01-01T00:00:00Z", 1, node=node)
    run.write_record(run.attempt_path(ref, "attempt.json"), info, label="attempt")
    if outcome is not None:
        run.write_record(run.attempt_path(ref, "outcome.json"), outcome, label="outcome")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Return a run directory without attempts."""
    return Place.make("sim", tmp_path).run()


def request(**values: str) -> Request:
    """Return what array tasks ask for."""
    return settings({"request": values}).settings.request


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (BROKEN, True),
        (Outcome("broken", "", "ray-start"), True),
        (Outcome("broken", "", "stage-start"), False),
        (Outcome("broken", "disk full after an hour", "storage", completed=9), False),
        (DONE, False),
    ],
)
def test_a_nodes_fault_is_one_before_any_work(outcome: Outcome, expected: bool) -> None:
    """A disk that a run itself has filled, or a stage that cannot start, is no node's fault."""
    assert expected == is_nodes_fault(outcome)


def test_bad_is_only_what_is_worse_than_another(run: RunDir) -> None:
    """A node is bad if nothing started on it while something did elsewhere."""
    attempt(run, 0, "n1", BROKEN)
    assert set() == bad_nodes(run, 0)
    attempt(run, 1, "n2", None)
    assert {"n1"} == bad_nodes(run, 0)
    assert {"n1", "n3"} == bad_nodes(run, 0, suspects=["n3", "n2"])
    attempt(run, 2, "n1", DONE)
    assert set() == bad_nodes(run, 0)


def test_nodes_that_the_user_chose_are_not_taken_out() -> None:
    """What is excluded already stays so; with a list of nodes to use nothing is added."""
    assert "a,n1,n2" == excluding(request(exclude="n2,a"), {"n1"})
    assert "a" == excluding(request(exclude="a", nodelist="n1,n2"), {"n1"})


class Array:
    """Stands in for the one call that takes nodes out of an array."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.excluded = ""
        monkeypatch.setattr(bad_node.slurm, "exclude_nodes", self._exclude)

    def _exclude(self, array: str, nodes: str) -> None:
        assert "7" == array
        self.excluded = nodes


@hypothesis_settings(max_examples=50, deadline=None)
@given(order=st.permutations([(node, step) for node in "abcd" for step in ("write", "look")]))
def test_one_node_is_always_left(order: list[tuple[str, str]]) -> None:
    """
    In whatever order the attempts of a cluster on which nothing works write their outcome and
    then look at the others', never are all nodes taken out.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        array, run = Array(monkeypatch), Place.make("sim", Path("/")).run()
        refs = {}
        for number, node in enumerate("abcd"):
            ref = refs[node] = run.allocate_attempt(0, number)
            info = AttemptInfo("n", "h", "b", 1, "2024-01-01T00:00:00Z", 1, node=node)
            run.write_record(run.attempt_path(ref, "attempt.json"), info, label="attempt")
        for node, step in order:
            path = run.attempt_path(refs[node], "outcome.json")
            if step == "write" or run.outcome(refs[node]) is None:
                run.write_record(path, BROKEN, label="outcome")
            if step == "look":
                keep_away(run, 0, Allocation(1, 0, 1, array="7", node=node), request())
                assert set(filter(None, array.excluded.split(","))) < set("abcd")


def test_only_arrays_on_slurm_are_changed(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single jobs, local tasks, and users who named their nodes are left alone."""
    array = Array(monkeypatch)
    attempt(run, 0, "n1", BROKEN)
    attempt(run, 1, "n2", DONE)
    for allocation, asked in [
        (Allocation(1, 0, 1), request()),
        (Allocation(1, 0, 1, element="9", node="n1"), request()),
        (Allocation(1, 0, 1, array="7", node="n1"), request(nodelist="n1")),
        (Allocation(1, 0, 1, array="7", node="n2"), request()),
    ]:
        assert "" == keep_away(run, 0, allocation, asked)
    assert "" == array.excluded

    assert "n1" == keep_away(run, 0, Allocation(1, 0, 1, array="7", node="n1"), request())
    assert "n1" == array.excluded


def test_a_hold_ends_with_its_time_or_a_signal() -> None:
    """It lasts as long as it is told, other wake-ups included, and no longer than a signal."""
    read, write = os.pipe()
    start = time.monotonic()
    answers = itertools.chain([False], itertools.repeat(False))
    os.write(write, b"x")
    hold(0.2, wake_fd=read, until=lambda: next(answers))
    assert time.monotonic() - start >= 0.2

    leave = threading.Event()
    waker = threading.Timer(0.1, lambda: (leave.set(), os.write(write, b"x")))
    waker.start()
    start = time.monotonic()
    hold(60, wake_fd=read, until=leave.is_set)
    waker.join()
    assert time.monotonic() - start < 30
    os.close(read)
    os.close(write)
