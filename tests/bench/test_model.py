"""The model of very large runs: against closed forms, and against what the README says of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.model import PLOT, Costs, Setting, calibrate, plot, simulate, text
from tests.support.places import REPOSITORY

HOUR = 3600.0
VALUES = {"segments": 1000, "cpu_s": 0.5}
FREE = Costs(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
CALM = Setting(
    tasks=100, slots=100, sources=100 * 3600, cores=1, spread=0.0, starts_per_s=math.inf,
    preempted_per_day=0.0, failures_per_day=0.0, requeue_s=0.0, noticed_s=0.0, latency_s=0.0,
)  # fmt: skip
"""Tasks of one hour each, at once, to which nothing happens."""


@pytest.mark.parametrize(("slots", "hours"), [(100, 1), (50, 2), (30, 4)])
def test_a_calm_run_takes_its_waves(slots: int, hours: int) -> None:
    """Without faults and costs a run takes as many times a task's as there are waves."""
    found = simulate(replace(CALM, slots=slots), FREE)
    assert pytest.approx(hours * HOUR) == found.makespan_s
    assert (1, 100, 0.0) == (found.rounds, found.attempts, found.lost_core_s)


def test_costs_add_up() -> None:
    """Starts, the pace of Slurm, merges, calls and bytes are those of all tasks together."""
    costs = Costs(10.0, 80.0, 14.0, 5.0, 8.0, 0.001)
    setting = replace(CALM, cores=2, sources=200 * 3600, starts_per_s=10.0, latency_s=0.016)

    found = simulate(setting, costs)

    segments = 100 * 61
    merge_s = segments * 0.001 + 2 * 100 * 0.016 + 3 * segments * 0.001
    assert pytest.approx(merge_s) == found.merge_s
    assert pytest.approx(9.9 + 10 + HOUR + merge_s) == found.makespan_s
    assert segments == found.publications
    assert pytest.approx(100 * (80 + 5) + 14 * segments) == 10 * sum(found.calls)
    assert pytest.approx(200 * 3600 * (200 + 8)) == 10 * sum(found.bytes)


def test_what_is_preempted_goes_on() -> None:
    """Preempted at a rate, a task ends as late as its pauses say, and does nothing twice."""
    setting = replace(CALM, tasks=5000, slots=5000, sources=5000 * 3600, preempted_per_day=24.0)
    found = simulate(setting, FREE)
    # A Poisson process: one preemption in each hour of work, whatever came before.
    assert pytest.approx(5000, rel=0.05) == found.preempted
    assert found.attempts == 5000 + found.preempted
    assert 0.0 == found.lost_core_s
    assert pytest.approx(HOUR) == found.makespan_s


def test_static_shards_begin_anew() -> None:
    """The work of one that begins anew is (exp(rate x time) - 1) / rate, as for any restart."""
    setting = replace(
        CALM, tasks=20_000, slots=20_000, sources=20_000 * 3600, preempted_per_day=24.0,
        is_static=True,
    )  # fmt: skip
    found = simulate(setting, FREE)
    expected = (math.e - 1) * HOUR * 20_000
    assert pytest.approx(expected, rel=0.03) == 20_000 * HOUR + found.lost_core_s


def test_a_node_takes_half_an_interval() -> None:
    """With its node a task loses half of what it does between two publications, on average."""
    setting = replace(
        CALM, tasks=10_000, slots=10_000, sources=10_000 * 3600, failures_per_day=24.0,
        interval_s=120.0,
    )  # fmt: skip
    found = simulate(setting, FREE)
    assert found.failed > 5000
    assert pytest.approx(60.0 * found.failed, rel=0.05) == found.lost_core_s


def test_what_was_cancelled_is_dealt_anew() -> None:
    """Remainders of cancelled tasks are one round of all tasks, where they used to be few."""
    setting = replace(CALM, preempted_per_day=6.0, cancels=True)
    ours, static = simulate(setting, FREE), simulate(replace(setting, is_static=True), FREE)
    assert 1 < ours.rounds
    assert 0.0 == ours.lost_core_s
    assert ours.makespan_s < 1.5 * HOUR < 2 * HOUR <= static.makespan_s


def test_the_readme_says_what_the_model_gives() -> None:
    """Its words and its table are those of the model with the measured costs."""
    words = (REPOSITORY / "README.md").read_text()
    _, _, rest = words.partition("<!-- model: python -m tests.bench.model -->\n")
    assert text(Costs.read()) == rest.partition("<!-- end of model -->")[0]


@pytest.mark.slow
def test_the_plot_is_the_models() -> None:
    """The README's picture is drawn from the same costs."""
    assert plot(Costs.read()) == PLOT.read_text()


def test_costs_come_from_the_benchmark(tmp_path: Path) -> None:
    """A table without one of the figures is refused by its name."""
    calls = "calls on the run directory"
    figures = [
        ("time to first result", "hpcresume, array task", 3.0), (calls, "few sources, 9", 100.0),
        (calls, "each further publication", 14.0), (calls, "each further worker", 5.0),
        ("left in the run directory", "beyond its row", 8.0),
        ("asking what is left", "hpcresume, union and remainder of 9", 0.9),
    ]  # fmt: skip
    lines = [
        {"group": group, "name": name, "median": median, "values": VALUES}
        for group, name, median in figures
    ]
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"lines": lines}))
    assert Costs(3.0, 86.0, 14.0, 5.0, 8.0, 0.0005) == Costs(**calibrate(path))
    path.write_text(json.dumps({"lines": lines[:-1]}))
    with pytest.raises(KeyError, match="hpcresume, union"):
        calibrate(path)
