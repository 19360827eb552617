"""One attempt of an array task: what supervisor, driver and publisher do, in their order.

The publisher is the shipped one.  Supervisor and driver are modelled: they call the shipped
parts (claim, what is left, epoch, ledger, accounting, frames) in the order in which the
shipped ones do, without processes, pipes and Ray.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pyroaring import BitMap

from hpcresume.engine.admission import _halves
from hpcresume.ids import ROOT, ItemPath, child
from hpcresume.ledger.accounting import Accounting, Ack, Verdict
from hpcresume.ledger.publishing import Death
from hpcresume.ledger.store import Batch, InFlight, Ledger, LedgerIdentity
from hpcresume.merge.plan import open_plan
from hpcresume.run.directory import AttemptInfo, AttemptRef, Outcome, RunDir
from hpcresume.segment import bitmap as bitmaps
from hpcresume.segment.frame import FrameBuilder
from hpcresume.segment.segment import Failure, Writer
from hpcresume.task.messages import (
    AttemptSpec,
    OutcomeWritten,
    Publish,
    PublisherOrder,
    PublisherReport,
    Receipt,
    Recover,
    Recovered,
    Refused,
    Work,
    WriteOutcome,
)
from hpcresume.task.publisher import Publisher
from hpcresume.task.recovery import attempt_of
from hpcresume.task.shard import left_of_shard
from tests.simulation.oracle import Committed
from tests.simulation.world import RUN, Process, Scratch
from tests.support.places import RUN_ID, row

if TYPE_CHECKING:
    from tests.simulation.cluster import Element
    from tests.simulation.simulation import Simulation

_PATIENCE = 4
_INFO = AttemptInfo("0" * 16, "host", "boot", 1, "now", 1)


class _DriverDiedError(Exception):
    """The driver was killed by a source it worked on."""


class _Publisher:
    """The publisher's process, with its orders and reports."""

    def __init__(self, parent: Process, spec: AttemptSpec) -> None:
        self.orders: deque[PublisherOrder] = deque()
        self.reports: deque[PublisherReport] = deque()
        self._spec = spec
        name = f"publisher of {parent.name}"
        self.process = parent.world.start(name, self._serve, parent.node)
        parent.children.append(self.process)

    def _serve(self, process: Process) -> None:
        publisher = Publisher(self._spec, process.client)
        while True:
            process.wait(lambda: bool(self.orders))
            self.reports.append(publisher.carry_out(self.orders.popleft()))


class Attempt:
    """One attempt; called as a process's body."""

    def __init__(self, simulation: Simulation, element: Element) -> None:
        self._sim, self._element = simulation, element
        self._world, self._oracle = simulation.world, simulation.world.oracle
        self._chance = simulation.world.chance
        self.stop = False
        self._receipt = self._seq = self._last = self._refusals = 0
        self._completed = 0
        self._asked: Publish | None = None
        self._damaged = False

    def __call__(self, process: Process) -> Any:
        """Run the attempt; return 0, 85 or ``requeue``."""
        self._process = process
        stopped, done = self._oracle.is_stopped, self._oracle.promised_of(self._element)
        run = self._run = RunDir.open(RUN, process.client)
        element = self._element
        self._plan = open_plan(run, element.round)
        if run.stop_requested():
            return 0
        if run.claim_round(element.round, element.array) != element.array:
            return 0
        work = self._left()
        if work is None:
            return 0
        if not (process.was_stale or process.faults):
            self._oracle.starts(self._element, stopped=stopped, done=done, work=work)
        ref = self._ref = run.allocate_attempt(element.round, element.task)
        self._oracle.allocated(ref, process, element.array)
        run.write_record(run.attempt_path(ref, "attempt.json"), _INFO, label="attempt")
        self._oracle.acknowledged(run.attempt_path(ref, "attempt.json"))
        name = f"{ref.round}-{ref.task}-{ref.epoch}"
        path = f"/{process.node.name}/{name}"
        process.node.scratch[name] = Scratch(path, ref, process)
        self._spec = _spec(path, ref, self._sim.max_attempts)
        self._publisher = _Publisher(process, self._spec)
        work = self._left(self._recover_dead())
        died = work is not None and self._drive(work)
        return self._finish(name, died=died)

    def _left(self, recovered: tuple[AttemptRef, ...] = ()) -> Work | None:
        return left_of_shard(
            self._run,
            self._plan,
            self._element.task,
            max_attempts=self._sim.max_attempts,
            memory_mib=0,
            recovered=recovered,
        )

    # -- the publisher --------------------------------------------------------------------------

    def _await(self) -> PublisherReport | None:
        """Return the publisher's next report; None when it is dead or patience is over."""
        publisher, turns = self._publisher, 0
        while not publisher.reports:
            turns += 1
            if not publisher.process.alive or turns > _PATIENCE * (8 if self._sim.draining else 1):
                return None
            publisher_now = publisher

            def ready(p: _Publisher = publisher_now) -> bool:
                return bool(p.reports) or not p.process.alive or not p.process.runnable

            self._process.waits_for = ready
            self._process.pause()
        return publisher.reports.popleft()

    def _await_receipt(self) -> None:
        """Work slowly enough for a publication to come in between."""
        report = self._await()
        if report is None:
            self._replace_publisher()
        else:
            self._take(report)

    def _take(self, report: PublisherReport) -> None:
        self._hear(report)
        if self._receipt:
            self._ledger.release(self._receipt)

    def _replace_publisher(self) -> None:
        """Leave a publisher behind, dead or hanging, and start another."""
        if self._chance.random() < 0.5:
            self._publisher.process.kill()
        self._publisher = _Publisher(self._process, self._spec)
        self._refusals += 1
        self._asked = None

    def _recover_dead(self) -> tuple[AttemptRef, ...]:
        recovered = []
        node = self._process.node
        for name, scratch in sorted(node.scratch.items()):
            if scratch.holder.alive or name not in node.scratch:
                continue
            # The lock is taken while it is worked on, so two sweeps do not meet.
            scratch.holder = self._process
            known = self._world.disks.files.get(f"{scratch.path}/ledger")
            damaged = known is not None and known.damage
            self._publisher.orders.append(Recover(scratch.path))
            answer = self._await()
            if isinstance(answer, Recovered):
                if damaged:
                    self._oracle.lose(f"{scratch.path}/ledger")
                else:
                    self._oracle.receipt(f"{scratch.path}/ledger", 0, 1 << 60)
                self._sweep(name)
                recovered.append(attempt_of(scratch.path))
            else:
                scratch.holder = self._sim.nobody
                if answer is None:
                    self._replace_publisher()
        return tuple(ref for ref in recovered if ref is not None)

    def _sweep(self, name: str) -> None:
        scratch = self._process.node.scratch.pop(name)
        self._oracle.swept(f"{scratch.path}/ledger")
        self._world.disks.remove(scratch.path)

    def _order_publication(self, *, driver_died: bool = False) -> None:
        self._seq += 1
        most = self._chance.choice((1, 200, 1 << 30))
        death = Death() if driver_died else None
        self._asked = Publish(self._receipt, self._seq, most, driver_died, death)
        self._publisher.orders.append(self._asked)

    def _hear(self, report: PublisherReport) -> None:
        asked, self._asked = self._asked, None
        if isinstance(report, Refused):
            self._refusals += 1
            self._damaged = self._damaged or report.damaged
        elif isinstance(report, Receipt) and asked is not None:
            self._refusals = 0
            self._oracle.receipt(self._spec.ledger, asked.after, report.last)
            self._receipt = report.last
            self._completed += report.sources
            if report.newest_epoch > self._ref.epoch or report.stop:
                self.stop = True

    # -- the driver -----------------------------------------------------------------------------

    def _drive(self, work: Work) -> bool:
        """Work on what is left; return whether the driver died."""
        ref = self._ref
        writer = Writer(ref.round, ref.task, ref.epoch)
        self._oracle.ledgers[self._spec.ledger] = Committed(writer)
        self._ledger = Ledger.create(self._spec.ledger, LedgerIdentity(RUN_ID, writer, 1, ["a"]))
        self._tries = dict(work.attempts)
        known = self._plan.shard(self._element.task).attempts
        self._oracle.ledgers[self._spec.ledger].known = dict(known)
        try:
            for number, (sources, exclusive) in enumerate(self._calls(work), 1):
                if self.stop:
                    return False
                self._call(number, sources, exclusive=exclusive)
                self._serve_publisher()
                if self._asked is not None and self._chance.random() < 0.5:
                    self._await_receipt()
        except _DriverDiedError:
            return True
        return False

    def _calls(self, work: Work) -> Iterator[tuple[list[int], bool]]:
        """Yield the calls of a shard: suspects in halves, then the rest, then retries."""
        sources = bitmaps.load(work.sources, what="the shard")
        suspects = [bitmaps.load(group, what="suspects") & sources for group in work.suspects]
        for group in suspects:
            for half in _halves(group):
                yield list(half), True
        rest = list(sources - bitmaps.union(suspects))
        while rest:
            size = self._chance.randrange(1, 4)
            yield rest[:size], False
            del rest[:size]
        while self._again:
            again = sorted(self._again)
            self._again.clear()
            yield again, False

    def _call(self, number: int, sources: list[int], *, exclusive: bool) -> None:
        ledger, sim = self._ledger, self._sim
        alone = exclusive and len(sources) == 1
        writer = self._oracle.ledgers[self._spec.ledger].writer
        if alone:
            self._oracle.alone(writer, sources[0])
        ledger.commit(Batch(mark={number: InFlight(BitMap(sources), alone=alone).encode()}))
        for source in sources:
            self._oracle.worked(source)
            if source in sim.killers:
                raise _DriverDiedError
        failed = [s for s in sources if sim.fails(s, self._tries.get(s, 0) + 1)]
        good = self._account([s for s in sources if s not in failed])
        failures = [self._failure(source) for source in failed]
        batch = Batch(frames=[good] if good else [], failures=failures, unmark=[number])
        done = BitMap(s for s in sources if s not in failed)
        if len(done) > 1 and self._chance.random() < 0.3:
            # A call of several groups: what it completes is committed before it ends.
            batch.unmark, then = [], Batch(unmark=[number])
        else:
            then = None
        self._commit(batch, done)
        if then is not None:
            ledger.commit(then)

    def _commit(self, batch: Batch, done: BitMap) -> None:
        charges = {(f.source, f.attempt): f.retry for f in batch.failures}
        self._oracle.charging(self._spec.ledger, charges)
        self._last = self._ledger.commit(batch)
        if self._spec.ledger in self._oracle.ledgers:
            self._oracle.committed(self._spec.ledger, self._last, done, charges)

    def _failure(self, source: int) -> Failure:
        attempt = self._tries.get(source, 0) + 1
        self._tries[source] = attempt
        retry = source not in self._sim.hopeless
        if retry and attempt < self._sim.max_attempts:
            self._again.add(source)
        return Failure(
            source, str(source), str(source), "a", "ValueError", "no", attempt, retry=retry
        )

    @property
    def _again(self) -> set[int]:
        return self.__dict__.setdefault("_retries", set())

    def _account(self, sources: list[int]) -> bytes | None:
        """Return the frame of sources whose items came back in any order, and repeatedly."""
        if not sources:
            return None
        frame = FrameBuilder()
        if self._chance.random() < 0.25:
            sources = self._acknowledged(sources)
        for source in sources:
            rows = [(ItemPath((n,)), row(source, n)) for n in range(source % 3)]
            frame.add(source, rows)
        return frame.build()

    def _acknowledged(self, sources: list[int]) -> list[int]:
        accounting, chance = Accounting(), self._chance
        acks = []
        for source in sources:
            items = [child(ROOT, n) for n in range(chance.randrange(3))]
            if chance.random() < 0.3:
                # A try that failed before; what it still says comes late.
                acks.append(Ack(source, 1, ROOT, (child(ROOT, 7),)))
                accounting.admit(source, 1)
                accounting.acknowledge(Ack(source, 1, child(ROOT, 7), failed=True))
            acks.append(Ack(source, 2, ROOT, tuple(items)))
            acks += [Ack(source, 2, item) for item in items]
        acks += chance.sample(acks, len(acks) // 3)
        chance.shuffle(acks)
        done: list[int] = []
        admitted = set()
        missing = {source: {a for a in acks if a.source == source} for source in sources}
        for ack in acks:
            if ack.source not in admitted and chance.random() < 0.7:
                admitted.add(ack.source)
                done += self._heard(accounting.admit(ack.source, 2), ack.source, missing)
            missing[ack.source].discard(ack)
            if accounting.acknowledge(ack) is Verdict.COMPLETE:
                done += self._heard(Verdict.COMPLETE, ack.source, missing, admitted)
        for source in sources:
            if source not in admitted:
                done += self._heard(accounting.admit(source, 2), source, missing)
        if sorted(done) != sources:
            self._oracle.fail(f"accounting completed {sorted(done)} of {sources}")
        return sources

    def _heard(
        self,
        verdict: Verdict,
        source: int,
        missing: dict[int, set[Ack]],
        admitted: set[int] | None = None,
    ) -> list[int]:
        if verdict is not Verdict.COMPLETE:
            return []
        if any(ack.attempt == 2 for ack in missing[source]):
            self._oracle.fail(f"accounting completed {source} before all of it came back")
        if admitted is not None and source not in admitted:
            self._oracle.fail(f"accounting completed {source} before it was admitted")
        return [source]

    def _serve_publisher(self) -> None:
        publisher = self._publisher
        if not publisher.process.alive:
            self._replace_publisher()
        elif publisher.reports:
            self._take(publisher.reports.popleft())
        elif self._asked is None and self._chance.random() < 0.4:
            self._order_publication()
        elif self._asked is not None and self._chance.random() < 0.05:
            self._replace_publisher()

    # -- the end --------------------------------------------------------------------------------

    def _finish(self, name: str, *, died: bool) -> Any:
        has_ledger = self._spec.ledger in self._world.disks.files
        published = not has_ledger or self._publish_rest(died=died)
        state = "done" if published and not died and not self.stop else "saved"
        outcome = Outcome(state if published else "lost", "", "finished")
        self._publisher.orders.append(WriteOutcome(outcome))
        if isinstance(self._await(), OutcomeWritten):
            path = self._run.attempt_path(self._ref, "outcome.json")
            self._oracle.acknowledged(path)
        for publisher in self._process.children:
            publisher.kill()
        if published:
            self._sweep(name)
        if state == "done":
            return 0
        return "requeue" if self._completed and self._chance.random() < 0.7 else 85

    def _publish_rest(self, *, died: bool) -> bool:
        before = -1
        while self._refusals < 6 and not self._damaged:
            if self._asked is None:
                enough = self._receipt == before if died else self._receipt >= self._last
                if before >= 0 and enough and not self._refusals:
                    return True
                before = self._receipt if not self._refusals else -1
                self._order_publication(driver_died=died)
            report = self._await()
            if report is None:
                self._replace_publisher()
            else:
                self._hear(report)
        return False


def _spec(path: str, ref: AttemptRef, max_attempts: int) -> AttemptSpec:
    return AttemptSpec(
        run=RUN, round=ref.round, task=ref.task, epoch=ref.epoch, local=path, ray_temp="",
        code=1, cpus=1, gpus=0, memory_bytes=0, memory_mib=0, memory_limit="",
        engine="inline", workers=0, max_attempts=max_attempts, chunk_target_s=1, chunk_max=1,
    )  # fmt: skip


__all__ = ["Attempt", "contextlib"]
