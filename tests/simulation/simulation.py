"""One simulated run from its first round to its end: ``simulate(seed)``.

A seed draws a small run, how much goes wrong, and what: often only a few kinds of faults at
once, since a world in which everything fails hides what one fault alone would show.  After
a while the faults stop, and the run has to come to its end.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hpcresume.config import load_settings
from hpcresume.launch.drive import merge_step, submit_to_slurm
from hpcresume.launch.rounds import reopen
from hpcresume.merge import retention
from hpcresume.merge.generation import Union, load_newest
from hpcresume.merge.plan import Launch
from hpcresume.output.rows import BadSegmentError, spans, take_back_segment, union_of
from hpcresume.run.directory import RunDir
from hpcresume.run.manifest import Manifest, write_indexed_part
from tests.simulation.cluster import Cluster, Element, Job
from tests.simulation.oracle import Oracle
from tests.simulation.task import Attempt
from tests.simulation.world import RUN, Node, Process, ViolationError, World, tokens
from tests.support.places import make_run, run_info
from tests.support.simfs import SimFileSystem, SimServer

EVENTS = (
    "kill", "freeze", "thaw", "zombie", "preempt", "crash", "restart", "rot", "merge", "collect",
    "cancel", "submit", "scancel", "stale", "blind", "lost reply", "another array", "clean",
)  # fmt: skip
THEMES = (
    ("zombie", "stale"), ("zombie", "kill", "freeze", "thaw"),
    ("restart",), ("restart", "merge"), ("crash",),
    ("rot", "collect", "merge"), ("another array", "lost reply", "merge"), ("cancel", "submit"),
    ("scancel", "merge", "submit"), ("preempt", "stale", "merge"),
    ("clean", "merge"), ("clean", "merge", "collect"), ("clean", "merge", "preempt", "zombie"),
    ("clean", "merge", "rot", "collect"), ("clean", "merge", "restart", "stale"),
)  # fmt: skip
"""What shows more together than among everything else."""
MAX_SUBMITS = 40


@cache
def resolved() -> Any:
    """Return the default settings."""
    return load_settings(site=None, start_dir=Path("/"), environ={}, flags={})


class Simulation:
    """One run in one world."""

    def __init__(self, chance: random.Random, *, tracing: bool = False) -> None:
        self.chance = chance
        self.max_attempts = resolved().settings.run.max_attempts
        self.count = chance.randrange(1, 10)
        self.array = chance.randrange(1, 4)
        self.world = World(chance, tracing=tracing)
        self.world.oracle = self.oracle = Oracle(self.world, self.count, self.max_attempts)
        self.world.disks.on_delete = self.oracle.released
        self.world.nodes = [Node(f"n{i}") for i in range(chance.randrange(1, 4))]
        self.cluster = Cluster()
        self.draining = False
        self._sight = RunDir(RUN, run_info(), SimFileSystem(self.world.server))
        self.nobody = SimpleNamespace(alive=False)
        self.attempts: list[tuple[Process, Attempt]] = []
        self._draw_sources()
        self._draw_faults()

    def _draw_sources(self) -> None:
        weights = self.chance.choice(
            ((1, 0, 0, 0, 0), (1, 0, 0, 0, 0), (24, 3, 1, 1, 1), (24, 6, 3, 2, 0), (8, 0, 0, 0, 2))
        )
        names = ("good", "flaky", "poison", "hopeless", "killer")
        kinds = self.chance.choices(names, weights, k=self.count)
        self.kinds = dict(enumerate(kinds))
        self.killers = {s for s, kind in self.kinds.items() if kind == "killer"}
        self.hopeless = {s for s, kind in self.kinds.items() if kind == "hopeless"}

    def _draw_faults(self) -> None:
        chance, world = self.chance, self.world
        world.fault_rate = chance.choice((0, 0, 0.003, 0.01, 0.03, 0.08))
        world.fates = chance.sample(("error", "kill", "freeze"), chance.randrange(1, 4))
        world.server.hard_links = chance.random() < 0.8
        self.mean_calls = chance.choice((2, 8, 40, 400))
        self.folds = chance.choice((1, 1, 3))
        wanted = list(chance.choice(THEMES))
        if chance.random() < 0.5:
            wanted = chance.sample(EVENTS, chance.choice((0, 1, 2, 4, 8, len(EVENTS))))
        self.event_rate = chance.choice((0.05, 0.2, 0.4)) if wanted else 0.0
        self.events = wanted
        if not world.server.hard_links:
            # Without links an exclusive name is made in place, and a server that forgets it
            # while its maker cleans up behind a failed write lets two make it.
            self.events = [event for event in self.events if event != "restart"]
        self.is_calm = not self.events and not world.fault_rate

    def fails(self, source: int, attempt: int) -> bool:
        """Tell whether a try of a source fails."""
        kind = self.kinds[source]
        return kind in {"poison", "hopeless"} or (kind == "flaky" and attempt == 1)

    # -- the processes --------------------------------------------------------------------------

    def start_attempt(self, element: Element, node: Node | None = None) -> Process:
        """Start an element of an array on some node."""
        attempt = Attempt(self, element)
        name = f"task {element.round}/{element.task} of {element.array}, {element.restarts}"
        process = self.world.start(name, attempt, node or self.chance.choice(self.world.nodes))
        element.state, element.process = "RUNNING", process
        self.attempts.append((process, attempt))
        return process

    def start_merge(self, job: Job | None = None) -> Process:
        """Start a merge, as a job or by hand."""

        def body(process: Process) -> Any:
            promised = self.oracle.promised()
            step = merge_step(RunDir.open(RUN, process.client))
            if not (process.was_stale or process.faults):
                self.oracle.read(step.standing.union, promised)
            self.oracle.relied_on(step.standing.union.number)
            return step.state

        process = self.world.start("merge", body, self.chance.choice(self.world.nodes))
        if job is not None:
            job.state, job.process = "RUNNING", process
        return process

    def start_submit(self) -> Process:
        """Somebody submits the run again by hand."""

        def body(process: Process) -> Any:
            run = RunDir.open(RUN, process.client)
            self.oracle.resumes()
            run.set_mark("resume")
            reopen(run, quarantined=False)
            return submit_to_slurm(ready(run, self.array)).state

        return self.world.start("submit", body, self.chance.choice(self.world.nodes))

    def start_collect(self) -> Process:
        """Somebody collects the results so far."""
        node = self.chance.choice(self.world.nodes)
        return self.world.start(
            "collect", lambda p: self._collect(RunDir.open(RUN, p.client)), node
        )

    def _collect(self, run: RunDir) -> tuple[Union, dict[int, bytes]]:
        while True:
            union = union_of(run)
            rows: dict[int, bytes] = {}
            try:
                for span in spans(run, union, Manifest.open(run)):
                    for each in span.each():
                        if each.source in rows:
                            self.oracle.fail(f"I4: source {each.source} is in the result twice")
                        rows[each.source] = b"".join(line + b"\n" for line in each.rows)
            except BadSegmentError as error:
                take_back_segment(run, error)
                continue
            return union, rows

    def start_clean(self) -> Process:
        """Somebody removes what packs hold."""

        def body(process: Process) -> None:
            run = RunDir.open(RUN, process.client)
            retention.fold_rest(run, at_least=1)
            retention.remove_held(run)

        return self.world.start("clean", body, self.chance.choice(self.world.nodes))

    def start_cancel(self) -> Process:
        """Somebody cancels the run."""

        def body(process: Process) -> None:
            resumed = self.oracle.resumed
            going_on = any(p.name == "submit" and p.alive for p in self.world.processes)
            RunDir.open(RUN, process.client).set_mark("stop")
            if not going_on:
                self.oracle.stopped(resumed)

        return self.world.start("cancel", body, self.chance.choice(self.world.nodes))

    # -- what happens ---------------------------------------------------------------------------

    def prepare(self) -> None:
        """Create the run and submit it, or begin where both were done."""
        is_submitted = self.chance.random() < 0.8
        array = self.array if is_submitted else None
        self.world.server.root = submitted(self.count, array).clone().root
        self.oracle.begin()
        if is_submitted:
            self.cluster.begin(min(self.count, self.array))
        else:
            self.start_submit()

    def step(self) -> None:
        """Let one thing happen."""
        if self.events and self.chance.random() < self.event_rate:
            self.happen(self.chance.choice(self.events))
            return
        self.go_on(int(self.chance.expovariate(1 / self.mean_calls)) + 1)

    def go_on(self, calls: int) -> bool:
        """Let some process go on, or Slurm start one; return whether anything could."""
        self.cluster.notice_ends()
        runnable = self.world.runnable()
        starts = self._starts()
        if not runnable and not starts:
            return False
        if starts and (not runnable or self.chance.random() < 0.5):
            self.chance.choice(starts)()
        else:
            self.world.run(self.chance.choice(runnable), calls)
        return True

    def _starts(self) -> list[Any]:
        tasks = [partial(self.start_attempt, element) for element in self.cluster.pending()]
        return tasks + [partial(self.start_merge, job) for job in self.cluster.due()]

    def happen(self, event: str) -> None:
        """Let something go wrong, or somebody do something."""
        self.world.note(f"event: {event}")
        getattr(self, "_event_" + event.replace(" ", "_"))()

    def _any_process(self) -> Process | None:
        alive = [process for process in self.world.processes if process.alive]
        return self.chance.choice(alive) if alive else None

    def _event_kill(self) -> None:
        if process := self._any_process():
            process.kill()

    def _event_freeze(self) -> None:
        if process := self._any_process():
            for each in (process, *process.children):
                each.frozen = True

    def _event_thaw(self) -> None:
        frozen = [process for process in self.world.processes if process.frozen]
        if frozen:
            self.chance.choice(frozen).frozen = False

    def _event_zombie(self) -> None:
        running = [e for e in self.cluster.elements if e.state == "RUNNING"]
        if running:
            self.cluster.requeue(self.chance.choice(running))

    def _event_preempt(self) -> None:
        if self.attempts:
            self.chance.choice(self.attempts)[1].stop = True

    def _event_crash(self) -> None:
        damages = ("", "", "", "structure", "value", "empty", "gone")
        self.crash(self.chance.choice(self.world.nodes), self.chance.choice(damages))

    def crash(self, node: Node, damage: str) -> None:
        """A node loses power; ``gone``: its disk does not come back."""
        for element in self.cluster.elements:
            if element.process is not None and element.process.node is node:
                self.cluster.requeue(element)
        for process in list(self.world.processes):
            if process.node is node:
                process.kill()
        node.refresh()
        for path, database in list(self.world.disks.files.items()):
            if not path.startswith(f"/{node.name}/"):
                continue
            if damage == "gone":
                del self.world.disks.files[path]
            else:
                database.crash(damage)
            if damage:
                self.oracle.lose(path)
        if damage == "gone":
            node.scratch.clear()

    def _event_restart(self) -> None:
        self.world.server.restart()
        self.oracle.restarted()

    def _event_rot(self) -> None:
        paths = sorted({path.partition("#")[0] for path in self.oracle.segments})
        paths += self.oracle.packs
        if self.oracle.packs and self.chance.random() < 0.3:
            paths = self.oracle.packs
        elif self.chance.random() < 0.2:
            paths += [f"{RUN}/merge/gen-{number:06d}" for number in self.oracle.generations]
            paths += self.oracle.plans
        if paths:
            path = self.chance.choice(paths)
            try:
                size = len(self.world.server.file(path).volatile)
            except FileNotFoundError:  # lost by a restart: the oracle has judged that
                return
            self.world.server.rot(path, self.chance.randrange(size), 1 << self.chance.randrange(8))
            self.oracle.rotted(path)

    def _event_merge(self) -> None:
        self.start_merge()

    def _event_clean(self) -> None:
        self.start_clean()

    def _event_collect(self) -> None:
        self.start_collect()

    def _event_cancel(self) -> None:
        self.start_cancel()

    def _event_submit(self) -> None:
        self.start_submit()

    def _event_scancel(self) -> None:
        waiting = [e for e in self.cluster.elements if e.state in {"PENDING", "RUNNING"}]
        if waiting:
            element = self.chance.choice(waiting)
            element.state = "CANCELLED"
            if element.process is not None:
                element.process.kill()

    def _event_stale(self) -> None:
        node = self.chance.choice(self.world.nodes)
        if node.stale:
            node.refresh()
        else:
            node.stale = True
            for process in self.world.processes:
                process.was_stale = process.was_stale or process.node is node

    def _event_blind(self) -> None:
        self.cluster.blind_for += 1

    def _event_lost_reply(self) -> None:
        self.cluster.loses_reply = True

    def _event_another_array(self) -> None:
        """An sbatch that was given up takes effect after all."""
        if self.cluster.elements:
            known = self.cluster.elements[-1]
            twin = [e for e in self.cluster.elements if e.array == known.array]
            self.cluster.elements += [Element(f"{known.array}9", e.round, e.task) for e in twin]
            self.cluster.copy_name(known.array, f"{known.array}9")

    # -- the end --------------------------------------------------------------------------------

    def drain(self) -> None:
        """Let the faults stop; the run has to come to its end."""
        self._calm_down()
        for _ in range(MAX_SUBMITS):
            while self.go_on(400):
                pass
            if load_newest(self._sight).finished:
                union, rows = self._final_collect()
                if union.finished:
                    self.oracle.finished(union, rows, self._poison())
                    self._retire(rows)
                    return
            self.start_submit()
        raise ViolationError(f"L1: not finished after {MAX_SUBMITS} submissions: {self.kinds}")

    def _retire(self, rows: dict[int, bytes]) -> None:
        """Somebody cleans the finished run; then its newest generation may be damaged."""
        if self.chance.random() < 0.6:
            return
        self._to_its_end(self.start_clean())
        if self.chance.random() < 0.5:
            path = f"{RUN}/merge/gen-{load_newest(self._sight).number:06d}"
            size = len(self.world.server.file(path).volatile)
            self.world.server.rot(path, self.chance.randrange(size))
        _, again = self._final_collect()
        if again != rows and not self.oracle.rotten:
            self.oracle.fail(f"I2: {len(rows)} sources in the result, and after cleaning not these")

    def _to_its_end(self, process: Process) -> None:
        while process.alive:
            self.world.run(process, 1 << 60)
        if process.error is not None:
            raise ViolationError(f"{process.name} failed without a fault: {process.error}")

    def _poison(self) -> set[int]:
        return {s for s, kind in self.kinds.items() if kind in {"poison", "hopeless", "killer"}}

    def _calm_down(self) -> None:
        self.world.note("drain")
        self.draining = True
        self.world.fault_rate, self.events = 0.0, []
        self.cluster.blind_for, self.cluster.loses_reply = 0, False
        self.cluster.hidden.clear()
        for node in self.world.nodes:
            node.refresh()
        for process in self.world.processes:
            process.fault_in = 1 << 60
            if process.frozen and self.chance.random() < 0.3:
                process.kill()
            process.frozen = False

    def _final_collect(self) -> tuple[Union, dict[int, bytes]]:
        process = self.start_collect()
        self._to_its_end(process)
        return process.result  # type: ignore[no-any-return]

    def execute(self, steps: int) -> None:
        """Run from the first submission to the end.

        Raises:
            ViolationError: An invariant does not hold.
        """
        with self.world.installed(), self.cluster.installed(resolved()), folding(self.folds):
            self.prepare()
            for _ in range(steps):
                self.step()
            self.drain()
            self._check_executions()

    def _check_executions(self) -> None:
        if self.is_calm and not self.killers:
            for source, times in self.oracle.executed.items():
                tries = len(self.oracle.true_charges[source])
                expected = tries if source in self._poison() else tries + 1
                if times != expected:
                    self.oracle.fail(f"L2: source {source} ran {times} times without a fault")


def ready(run: RunDir, array: int) -> Any:
    """Return what `submit` has made ready."""
    return SimpleNamespace(
        prepared=SimpleNamespace(
            run=run,
            manifest=Manifest.open(run),
            loaded=SimpleNamespace(pipeline=SimpleNamespace(finish=None)),
            code=1,
        ),
        resolved=resolved(),
        launch=Launch("slurm", array),
    )


@contextlib.contextmanager
def folding(at_least: int) -> Iterator[None]:
    """Let merges fold segments into packs from so few on, and little at once."""
    kept = retention.FOLD_AT_LEAST, retention.FOLD_BYTES
    retention.FOLD_AT_LEAST, retention.FOLD_BYTES = at_least, 2000
    try:
        yield
    finally:
        retention.FOLD_AT_LEAST, retention.FOLD_BYTES = kept


@cache
def submitted(count: int, array: int | None) -> SimServer:
    """Return a server with a run of so many sources, submitted to an array or not yet."""
    # With a chance of its own: whoever is the first to need this must not draw otherwise.
    with tokens(random.Random(0)):
        return _prepare(count, array)


def _prepare(count: int, array: int | None) -> SimServer:
    server = SimServer(ordered=True)
    run = make_run(SimFileSystem(server), RUN)
    run.fs.mkdir(f"{RUN}/code/0001")
    write_indexed_part(run, 1, first=0, count=count)
    if array is not None:
        cluster = Cluster()
        with cluster.installed(resolved()):
            submit_to_slurm(ready(run, array))
        assert [e.task for e in cluster.elements] == list(range(min(count, array)))
    return server


STEPS = (0, 15, 40, 80)


def simulate(seed: int, *, tracing: bool = False) -> Simulation:
    """Run one seed.

    Raises:
        ViolationError: An invariant does not hold.
    """
    chance = random.Random(seed)
    simulation = Simulation(chance, tracing=tracing)
    try:
        simulation.execute(chance.choice(STEPS))
    except ViolationError as error:
        error.simulation = simulation  # type: ignore[attr-defined]
        raise
    return simulation
