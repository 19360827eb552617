"""A discrete-event model of 10,000 array tasks and 10^9 sources: ``python -m tests.bench.model``.

What no test machine shows is computed from what one does show: the costs of one array task are
measured (``measured.json``, which the benchmark writes), and this model adds very many of them
up, with nodes that fail and tasks that are preempted.

Assumptions, all of them:

1. Work: every source takes the same seconds of a core, and a task keeps all of its cores busy.
   Nodes differ: what a task takes is lognormal with ``spread`` around the mean.
2. Slurm starts at most 500 jobs a second (Slurm's High Throughput Computing guide) on ``slots``
   places.  A task that waits again does so for ``requeue_s``; the queue holds nobody else.
3. Preemption hits each running task with one rate, as a Poisson process: 10 % a day, the middle
   of the 5 to 15 % a day that Google observed of preemptible machines and published in the
   documentation of Compute Engine.  It comes with a grace that is long enough to publish.
4. A node fails 6.5 times in 1,000 days, as on Meta's RSC-1 (Kokolis et al., "Revisiting
   Reliability in Large-Scale Machine Learning Research Clusters", HPCA 2025, arXiv 2410.21680).
   A task has one node; failures are independent.  Slurm notices after ``SlurmdTimeout``, 300 s.
5. An attempt takes ``start_s`` before its first source, as measured.  It publishes every
   ``interval_s`` and at its end.  Preempted it loses nothing that it completed; with its node it
   loses what it completed since the last publication.  Time limits are as preemption, and left
   out.
6. Calls on the run directory are those that the kernel counted: of an attempt and of each of its
   workers, while it starts, and of each publication.  Caches on the nodes answer some of them, so
   the server sees fewer.  Within an interval an attempt publishes at any moment alike.  Bytes are
   rows and state; they are written once and read back once.
7. The shared file system keeps up: nothing waits for it.  A task computes on while it publishes,
   so a slow one only makes more of ``interval_s`` be at risk.
8. A merge lists two directories of every attempt, one after another, and reads every segment, 16
   at a time; each takes ``merge_s_per_segment`` of its processor, and each of its three calls
   (stat, open, read) answers after ``latency_s``.
9. Where preemption requeues, the same array task goes on.  Where it cancels, its remainder waits
   for the end of the array, and the merge step deals all remainders anew over as many tasks as
   they keep busy for 60 s each.
10. Static shards, for comparison, have the same work, cores, queue and faults, and record a shard
    when all of it is done; what was interrupted starts again from its first source, in the same
    array or in one that nobody has to submit.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

from hpcresume.fs import POSIX
from tests.bench.plot import Axis, curves

MEASURED = Path(__file__).with_name("measured.json")
DAY = 86400.0
BUCKET_S = 10.0
MIN_TASK_S = 60.0
SEED = 1
PLOT = Path(__file__).with_name("model.svg")


@dataclass(frozen=True)
class Costs:
    """What one array task costs, as measured.

    Attributes:
        start_s: From the start of its process to its first source.
        calls_per_attempt: On names in the run directory, without publications.
        calls_per_publication: The same of each.
        calls_per_worker: The same of each worker after the first.
        state_bytes: Published bytes of a source beyond its row.
        merge_s_per_segment: Of a merge's processor.
    """

    start_s: float
    calls_per_attempt: float
    calls_per_publication: float
    calls_per_worker: float
    state_bytes: float
    merge_s_per_segment: float

    @classmethod
    def read(cls, path: Path = MEASURED) -> Costs:
        """Read them from where the benchmark wrote them."""
        found = json.loads(path.read_text())
        return cls(**{each.name: float(found[each.name]) for each in fields(cls)})


@dataclass(frozen=True)
class Setting:
    """A run and the cluster it is on; the module says where the figures come from."""

    tasks: int = 10_000
    sources: int = 10**9
    cores: int = 8
    source_s: float = 1.0
    row_bytes: float = 200.0
    slots: int = 10_000
    spread: float = 0.05
    starts_per_s: float = 500.0
    requeue_s: float = 60.0
    preempted_per_day: float = 0.10
    failures_per_day: float = 0.0065
    noticed_s: float = 300.0
    interval_s: float = 60.0
    latency_s: float = 0.001
    cancels: bool = False
    is_static: bool = False
    seed: int = SEED

    @property
    def ideal_s(self) -> float:
        """Seconds with all slots busy from the first moment to the last."""
        return self.sources * self.source_s / self.cores / min(self.slots, self.tasks)


@dataclass
class Load:
    """Calls and bytes over time, in buckets of ten seconds."""

    steps: dict[int, float] = field(default_factory=dict)

    def spread(self, start: float, end: float, total: float) -> None:
        """Add an amount that is alike at every moment from ``start`` to ``end``."""
        if total and end > start:
            rate = total / (end - start)
            for at, sign in ((start, 1.0), (end, -1.0)):
                # What of its first bucket lies before it does not count.
                bucket, part = int(at // BUCKET_S), at % BUCKET_S / BUCKET_S
                self.steps[bucket] = self.steps.get(bucket, 0.0) + sign * rate * (1 - part)
                self.steps[bucket + 1] = self.steps.get(bucket + 1, 0.0) + sign * rate * part

    def per_second(self) -> list[float]:
        """Return the mean of each bucket."""
        last = max(self.steps, default=0)
        return list(itertools.accumulate(self.steps.get(bucket, 0.0) for bucket in range(last + 1)))


@dataclass
class Result:
    """What a simulated run came to.

    Attributes:
        makespan_s: From submission to the end of the last merge.
        ideal_s: The same with nothing lost.
        rounds: Job arrays.
        attempts: Starts of array tasks.
        preempted: Of these ended by preemption.
        failed: Ended by their node.
        lost_core_s: Work that was done again, in seconds of a core.
        publications: How many segments there are.
        merge_s: Time of all merges.
        calls: On names in the run directory per second, by bucket.
        bytes: Published per second, by bucket.
    """

    makespan_s: float
    ideal_s: float
    rounds: int = 0
    attempts: int = 0
    preempted: int = 0
    failed: int = 0
    lost_core_s: float = 0.0
    publications: float = 0.0
    merge_s: float = 0.0
    calls: Sequence[float] = ()
    bytes: Sequence[float] = ()

    @property
    def efficiency(self) -> float:
        """Ideal over simulated time."""
        return self.ideal_s / self.makespan_s


@dataclass(frozen=True)
class _Ended:
    at: float
    left: float
    ready: float
    is_cancelled: bool


class Model:
    """One run."""

    def __init__(self, setting: Setting, costs: Costs) -> None:
        self.setting, self.costs = setting, costs
        self.random = random.Random(setting.seed)
        self.result = Result(0.0, setting.ideal_s)
        self.calls, self.bytes = Load(), Load()

    def run(self) -> Result:
        """Simulate rounds until nothing is left."""
        setting = self.setting
        mean = setting.sources * setting.source_s / setting.cores / setting.tasks
        left = self._uneven([mean] * setting.tasks)
        now = 0.0
        while len(left):
            self.result.rounds += 1
            before = self.result.publications, self.result.attempts
            now, rest = self._round(now, left)
            merge_s = self._merge_s(
                self.result.publications - before[0], self.result.attempts - before[1]
            )
            self.result.merge_s += merge_s
            now += merge_s
            left = self._deal(rest)
            now += setting.requeue_s if len(left) else 0.0
        self.result.makespan_s = now
        self.result.calls, self.result.bytes = self.calls.per_second(), self.bytes.per_second()
        return self.result

    def _uneven(self, seconds: list[float]) -> list[float]:
        spread = self.setting.spread
        if not spread:
            return seconds
        normal = NormalDist(-spread * spread / 2, spread)
        # The same numbers with every version of Python.
        return [each * math.exp(normal.inv_cdf(self._uniform())) for each in seconds]

    def _uniform(self) -> float:
        """Return a number between 0 and 1, neither of them."""
        return self.random.random() or 0.5

    def _merge_s(self, segments: float, attempts: int) -> float:
        latency_s = self.setting.latency_s
        if self.setting.is_static:
            return 0.0
        waits_s = 2 * attempts * latency_s + 3 * segments * latency_s / POSIX.readers
        return waits_s + segments * self.costs.merge_s_per_segment

    def _deal(self, rest: list[float]) -> list[float]:
        """Return the seconds of the next round's tasks."""
        if not rest or self.setting.is_static:
            return rest
        total = sum(rest)
        tasks = min(self.setting.tasks, max(1, math.ceil(total / MIN_TASK_S)))
        return self._uneven([total / tasks] * tasks)

    def _round(self, begin: float, work: list[float]) -> tuple[float, list[float]]:
        """Simulate a job array; return its end and what is left of its tasks, in seconds."""
        setting = self.setting
        slots = [begin] * min(setting.slots, len(work))
        waiting = [(begin, task, seconds) for task, seconds in enumerate(work)]
        heapq.heapify(waiting)
        rest: list[float] = []
        next_start = end = begin
        while waiting:
            ready, task, seconds = heapq.heappop(waiting)
            start = max(ready, heapq.heappop(slots), next_start)
            next_start = start + 1 / setting.starts_per_s
            ended = self._attempt(start, seconds, work[task])
            end = max(end, ended.at)
            heapq.heappush(slots, ended.ready)
            if ended.left and ended.is_cancelled:
                rest.append(ended.left)
            elif ended.left:
                heapq.heappush(waiting, (ended.ready, task, ended.left))
        return end, rest

    def _attempt(self, start: float, left: float, whole: float) -> _Ended:
        setting, result = self.setting, self.result
        preempted = self._after(setting.preempted_per_day)
        failed = self._after(setting.failures_per_day)
        lasts = min(self.costs.start_s + left, preempted, failed)
        is_preempted, is_failed = lasts == preempted, lasts == failed
        done = max(0.0, lasts - self.costs.start_s)
        kept = left
        if setting.is_static and (is_preempted or is_failed):
            kept = left - whole
        elif is_failed:
            kept = done // setting.interval_s * setting.interval_s
        elif is_preempted:
            kept = done
        result.attempts += 1
        result.preempted += is_preempted
        result.failed += is_failed
        result.lost_core_s += (done - max(0.0, kept)) * setting.cores
        self._publish(start, start + lasts, max(0.0, kept), is_last=not is_failed)
        pause = setting.requeue_s if is_preempted or is_failed else 0.0
        pause += setting.noticed_s if is_failed else 0.0
        is_cancelled = is_preempted and setting.cancels
        return _Ended(start + lasts, left - kept, start + lasts + pause, is_cancelled)

    def _after(self, per_day: float) -> float:
        return -math.log(self._uniform()) * DAY / per_day if per_day else math.inf

    def _publish(self, start: float, end: float, kept: float, *, is_last: bool) -> None:
        setting, costs = self.setting, self.costs
        if setting.is_static:
            return
        # One more at the end of whatever ends in order; none of what a node takes with it.
        publications = kept // setting.interval_s + is_last
        self.result.publications += publications
        workers = costs.calls_per_worker * (setting.cores - 1)
        first = start + costs.start_s
        self.calls.spread(start, first, costs.calls_per_attempt + workers)
        self.calls.spread(first, end, publications * costs.calls_per_publication)
        sources = kept * setting.cores / setting.source_s
        self.bytes.spread(first, end, sources * (setting.row_bytes + costs.state_bytes))


@cache
def simulate(setting: Setting, costs: Costs) -> Result:
    """Simulate a run."""
    return Model(setting, costs).run()


BASE = Setting()
VARIED = {
    "as above": BASE,
    "nothing preempted, no node fails": replace(BASE, preempted_per_day=0, failures_per_day=0),
    "each task preempted once a day": replace(BASE, preempted_per_day=1.0),
    "the same, and cancelled instead of requeued": replace(
        BASE, preempted_per_day=1.0, cancels=True
    ),
    "nodes fail ten times as often": replace(BASE, failures_per_day=0.065),
    "2,000 tasks run at once": replace(BASE, slots=2000),
    "published every 10 minutes": replace(BASE, interval_s=600.0),
    "a shared file system of 10 ms a call": replace(BASE, latency_s=0.01),
}
"""What is varied, one thing at a time."""
PREEMPTIONS = (0.0, 0.05, 0.1, 0.15, 0.3, 0.6, 1.0)
"""A day: none, the published range, and beyond it."""


def table(costs: Costs) -> str:
    """Return what the model gives as a Markdown table."""
    lines = [
        (
            "| | hours | static shards | done again, core-hours | calls/s, mean and most "
            "| published, MB/s | segments | merging |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, setting in VARIED.items():
        ours = simulate(setting, costs)
        static = simulate(replace(setting, is_static=True), costs)
        lines.append(
            f"| {name} | {ours.makespan_s / 3600:.1f} | {static.makespan_s / 3600:.1f} "
            f"| {ours.lost_core_s / 3600:,.1f} | {fmean(ours.calls):,.0f}, {max(ours.calls):,.0f} "
            f"| {max(ours.bytes) / 1e6:,.0f} | {ours.publications:,.0f} "
            f"| {ours.merge_s / 60:,.0f} min |"
        )
    return "\n".join(lines) + "\n"


def text(costs: Costs) -> str:
    """Return the README's words about the model."""
    ours, static = simulate(BASE, costs), simulate(replace(BASE, is_static=True), costs)
    return (
        f"{BASE.tasks:,} array tasks of {BASE.cores} cores with {BASE.sources:,} inputs of "
        f"{BASE.source_s:g} s and rows of {BASE.row_bytes:g} bytes, {BASE.preempted_per_day:.0%} "
        f"of the tasks preempted a day, {1000 * BASE.failures_per_day:g} failures in 1,000 days "
        f"of a node: {ours.makespan_s / 3600:.1f} hours, where {ours.ideal_s / 3600:.1f} are "
        f"ideal and static shards take {static.makespan_s / 3600:.1f}.\n\n{table(costs)}"
    )


def plot(costs: Costs) -> str:
    """Return makespan over preemption as SVG."""
    settings = {"static shards": replace(BASE, is_static=True), "hpcresume": BASE}
    hours = {
        name: [
            (rate, simulate(replace(setting, preempted_per_day=rate), costs).makespan_s / 3600)
            for rate in PREEMPTIONS
        ]
        for name, setting in settings.items()
    }
    most = math.ceil(max(taken for line in hours.values() for _, taken in line) / 4) * 4
    return curves(
        hours,
        Axis((0, 0.25, 0.5, 0.75, 1), "{:g}", "preemptions of each array task in a day"),
        Axis(range(0, most + 1, 4), "{:g} h"),
    )


CALLS = "calls on the run directory"


def calibrate(bench: Path) -> dict[str, float]:
    """Return the costs that a table of the benchmark holds.

    Raises:
        KeyError: A line is missing, or was not measured.
    """
    lines = json.loads(bench.read_text())["lines"]

    def line(group: str, name: str) -> dict[str, Any]:
        for each in lines:
            if each["group"] == group and each["name"].startswith(name) and "median" in each:
                return each
        raise KeyError(f"{bench} has no figure for {group}: {name}")

    publication = line(CALLS, "each further publication")["median"]
    union = line("asking what is left", "hpcresume, union")
    return {
        "start_s": round(line("time to first result", "hpcresume")["median"], 2),
        "calls_per_attempt": line(CALLS, "few sources")["median"] - publication,
        "calls_per_publication": publication,
        "calls_per_worker": line(CALLS, "each further worker")["median"],
        "state_bytes": round(line("left in the run directory", "beyond its row")["median"], 2),
        "merge_s_per_segment": round(union["values"]["cpu_s"] / union["values"]["segments"], 6),
    }


def main(argv: list[str] | None = None) -> None:
    """Print what the model gives, and write the README's plot."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.model", description=main.__doc__)
    parser.add_argument("--calibrate", type=Path, metavar="BENCH.JSON", help="take costs from it")
    given = parser.parse_args(argv)
    if given.calibrate:
        MEASURED.write_text(json.dumps(calibrate(given.calibrate), indent=1) + "\n")
    costs = Costs.read()
    PLOT.write_text(plot(costs))
    print(text(costs), end="")


if __name__ == "__main__":
    main()
