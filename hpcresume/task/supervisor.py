"""The supervisor: signals, deadlines and the exit code of one attempt of an array task.

It is the process that Slurm signals.  It never imports Ray, never opens the ledger and,
once the work has begun, never touches the run directory: the driver computes, the publisher
publishes, and both may die or hang without taking this process with them.

Order of events: stop mark, claim of the round, what is left of the shard, epoch, node-local
directory, recovery of dead attempts on this node, driver; then orders and reports until the
driver ends; final publication, outcome, end of every descendant, removal of the node-local
directory, requeue of this element where that is its own business, exit.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import FrameType

import msgspec

from hpcresume import slurm
from hpcresume.config.env_file import read_env_file
from hpcresume.config.settings import Settings
from hpcresume.deadline import note_stopping, write_deadline
from hpcresume.engine.ray_places import check_ray_places
from hpcresume.errors import EXIT_SAVED, HpcResumeError
from hpcresume.failpoints import failpoint
from hpcresume.fs import reading
from hpcresume.ledger.parts import SCHEMA_NAME
from hpcresume.ledger.publishing import Death
from hpcresume.memory import MemoryGroup
from hpcresume.merge.plan import open_plan
from hpcresume.run.directory import AttemptInfo, AttemptRef, Outcome, RunDir
from hpcresume.segment import bitmap as bitmaps
from hpcresume.segment.segment import NEEDS_LONGER
from hpcresume.task.allocation import read_allocation, read_end_time
from hpcresume.task.bad_node import hold, is_nodes_fault, keep_away
from hpcresume.task.ending import (
    forbid_restart,
    kind_of_sigterm,
    look,
    make_outcome,
    why_not,
)
from hpcresume.task.messages import (
    DRIVER_REPORTS,
    PUBLISHER_REPORTS,
    AttemptSpec,
    DriverOrder,
    DriverReport,
    Ended,
    FinishBy,
    Hold,
    OutcomeWritten,
    Publish,
    Published,
    PublisherReport,
    Receipt,
    Recover,
    Recovered,
    Refused,
    Report,
    Stop,
    Work,
    WriteOutcome,
)
from hpcresume.task.process import (
    ATTEMPT_VARIABLE,
    Child,
    adopt_orphans,
    end_descendants,
    start_child,
)
from hpcresume.task.recovery import attempt_of
from hpcresume.task.schedule import Schedule
from hpcresume.task.scratch import (
    Scratch,
    choose_local,
    dead_attempts,
    end_dead,
    make_scratch,
    sweep,
)
from hpcresume.task.shard import left_of_shard
from hpcresume.task.time_limit import TimeLimit
from hpcresume.updates import interrupted

_TICK_S = 0.5
_RECOVER_S = 120.0
_FINAL_PUBLISH_S = 600.0
_END_DESCENDANTS_S = 5.0
_MARGIN_S = 3.0
_DRIVER_CLOSE_S = 5.0
_ASK_AHEAD_S = 2.0
_FIRST_ANSWER_S = 5.0
_RECENT_S = 30.0
_DRIVER_OOM_SCORE, _PUBLISHER_OOM_SCORE = 500, 200
EXIT_BROKEN = 76


def say(text: str) -> None:
    """Write a line to the array task's log."""
    print(f"hpcresume: {text}", file=sys.stderr, flush=True)


@dataclass(slots=True)
class _Signals:
    """What has been signalled; the handlers set flags and do nothing else."""

    wake_read: int
    terminate: bool = False
    look_at_time: bool = False

    @classmethod
    def install(cls) -> _Signals:
        read, write = os.pipe()
        os.set_blocking(read, False)
        os.set_blocking(write, False)
        flags = cls(read)

        def terminate(_number: int, _frame: FrameType | None) -> None:
            flags.terminate = True

        def look(_number: int, _frame: FrameType | None) -> None:
            flags.look_at_time = True

        signal.signal(signal.SIGTERM, terminate)
        signal.signal(signal.SIGINT, terminate)
        signal.signal(signal.SIGUSR2, look)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        return flags


@dataclass(slots=True)
class _State:
    report: Report | None = None
    ended: Ended | None = None
    driver_died: str | None = None
    out_of_memory: bool = False
    stop_kind: str | None = None
    stop_reason: str = ""
    stop_deadline: float = float("inf")
    driver_deadline: float = float("inf")


class Supervisor:
    """One attempt of one array task."""

    def __init__(self, run: RunDir, round_: int, task: int, environ: Mapping[str, str]) -> None:
        # First of all: until then submitit's handlers would act on signals.
        self._signals = _Signals.install()
        self._run, self._round, self._task, self._environ = run, round_, task, environ
        self._plan = open_plan(run, round_)
        self._array = self._plan.array_of(task)
        self._settings = msgspec.convert(self._plan.footer.settings, Settings)
        self._allocation = read_allocation(environ)
        # Off Slurm the group may hold much else, whose kills say nothing of this task.
        is_confined = self._allocation.memory_mib > 0
        self._memory = MemoryGroup.of_this_process() if is_confined else MemoryGroup()
        self._kills_before = 0
        self._state = _State()
        part_bytes = run.part_bytes()
        sync = self._settings.sync
        self._sync = msgspec.structs.replace(sync, max_bytes=part_bytes) if part_bytes else sync
        self._schedule = Schedule(self._sync)
        self._holding = False
        self._limit = TimeLimit(
            lambda: read_end_time(self._allocation, environ),
            near_s=self._stop_budget_s + _ASK_AHEAD_S,
        )
        self._signalled_at: float | None = None
        self._told_deadline: float | None = None
        self._ready_at: float | None = None
        self._interrupted_at: float | None = None
        self._start = time.monotonic()
        self._started_at = datetime.now(UTC).isoformat(timespec="microseconds")
        self._progress_fd = int(environ.get("HPCRESUME_PROGRESS_FD", "-1"))
        self._recovered: list[AttemptRef] = []
        self._driver: Child | None = None
        self._driver_start = 0.0

    def run(self) -> int:
        """Run the attempt and return the exit status."""
        if self._run.stop_requested():
            say("the run holds a stop mark; nothing is started")
            return 0
        owner = self._claim()
        if owner is not None:
            say(f"round {self._round} belongs to {owner}, not to this job; nothing is started")
            return 0
        if not self._work():
            say("nothing is left of this shard")
            return 0
        ref = self._run.allocate_attempt(self._round, self._task)
        try:
            scratch = self._prepare(ref)
        except HpcResumeError as error:
            return self._cannot_start(ref, error)
        return self._supervise(ref, scratch)

    def _claim(self) -> str | None:
        """Return the array that owns the round, where it is not this one."""
        mine = self._allocation.claim
        if mine is None:
            return None
        owner = self._run.claim_round(self._round, mine, first=self._array.first)
        return None if owner == mine else owner

    def _work(self) -> Work | None:
        """Return what is left of the shard, None when that is nothing."""
        limit = self._settings.run.max_attempts
        return left_of_shard(
            self._run,
            self._plan,
            self._task,
            max_attempts=limit,
            memory_mib=self._allocation.memory_mib,
            recovered=self._recovered,
        )

    def _prepare(self, ref: AttemptRef) -> Scratch:
        info = AttemptInfo(
            nonce=secrets.token_hex(8),
            host=socket.gethostname(),
            node=self._allocation.node,
            boot_id=_boot_id(),
            pid=os.getpid(),
            started_at=self._started_at,
            cpus=self._allocation.cpus,
            job_id=self._allocation.element,
            array_job_id=self._allocation.claim,
            restart_count=self._allocation.restart_count,
            memory_mib=self._allocation.memory_mib,
        )
        self._run.write_record(self._run.attempt_path(ref, "attempt.json"), info, label="attempt")
        task, site = self._settings.task, self._settings.site
        if task.env_file:
            os.environ.update(read_env_file(task.env_file))
        self._local = choose_local(task.local_dir, site.node_local, self._environ)
        name = f"{ref.round}-{ref.task}-{ref.epoch}"
        attempt = f"{self._run.run_id}-{name}"
        scratch = make_scratch(self._local, run_id=self._run.run_id, name=name, attempt=attempt)
        try:
            if task.engine == "ray":
                check_ray_places(scratch.ray_temp)
        except HpcResumeError:
            scratch.remove()
            raise
        os.environ[ATTEMPT_VARIABLE] = attempt
        self._inherit_schema(scratch)
        self._spec_path = os.path.join(scratch.path, "spec.json")
        _write_private(self._spec_path, msgspec.json.encode(self._make_spec(ref, scratch)))
        say(f"round {ref.round}, task {ref.task}, attempt {ref.epoch} on {info.node or info.host}")
        return scratch

    def _inherit_schema(self, scratch: Scratch) -> None:
        """Give the workers the schema that an earlier attempt inferred for parts of Parquet."""
        path = self._run.schema_path()
        with contextlib.suppress(FileNotFoundError), reading(path):
            data = self._run.fs.read(path)
            _write_private(os.path.join(scratch.path, "parts", SCHEMA_NAME), data)

    def _make_spec(self, ref: AttemptRef, scratch: Scratch) -> AttemptSpec:
        task, allocation = self._settings.task, self._allocation
        return AttemptSpec(
            run=os.path.abspath(self._run.path),
            round=ref.round,
            task=ref.task,
            epoch=ref.epoch,
            local=scratch.path,
            ray_temp=scratch.ray_temp,
            code=self._plan.footer.code,
            cpus=allocation.cpus,
            gpus=allocation.gpus,
            memory_bytes=allocation.memory_bytes,
            memory_mib=allocation.memory_mib,
            memory_limit=self._array.limit,
            engine=task.engine,
            workers=task.workers,
            max_attempts=self._settings.run.max_attempts,
            chunk_target_s=task.chunk_target_s,
            chunk_max=task.chunk_max_sources,
        )

    def _cannot_start(self, ref: AttemptRef, error: HpcResumeError) -> int:
        say(f"this attempt cannot start here: {error}")
        outcome = Outcome("broken", str(error), "storage", elapsed_s=self._elapsed())
        path = self._run.attempt_path(ref, "outcome.json")
        self._run.write_record(path, outcome, label="outcome")
        self._leave_bad_node()
        return EXIT_BROKEN

    def _leave_bad_node(self) -> None:
        """See to it that this node does not take one element after the other."""
        exclude = self._keep_away()
        left = self._settings.task.backoff_s - self._elapsed()
        if not exclude and self._allocation.element is not None and left > 0:
            say(f"this node is held for {left:.0f} s, so that it does not take the next task")
            signals = self._signals
            hold(left, wake_fd=signals.wake_read, until=lambda: signals.terminate)
            # By now others may have started elsewhere, which shows that it is this node's fault.
            exclude = self._keep_away()
        if exclude:
            say(f"pending elements of this array keep away from {exclude}")

    def _keep_away(self) -> str:
        return keep_away(self._run, self._round, self._allocation, self._settings.request)

    def _elapsed(self) -> float:
        return round(time.monotonic() - self._start, 3)

    def _supervise(self, ref: AttemptRef, scratch: Scratch) -> int:
        adopt_orphans()
        self._ref, self._scratch = ref, scratch
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._signals.wake_read, selectors.EVENT_READ)
        if self._allocation.element is not None:
            self._limit.look()
            self._limit.turn()
        self._publisher = self._start_publisher()
        self._recover_dead()
        work = self._work()
        if work is None:
            self._state.ended = Ended("finished", "an earlier attempt had done it all", 0)
        elif self._signals.terminate:
            self._stop("terminated", "SIGTERM", self._settings.task.drain_s)
            self._state.ended = Ended("terminated", "SIGTERM before the work began", 0)
        elif self._is_too_long(work):
            self._ready_at = time.monotonic()
            reason = "every source that is left has run longer than the time limit leaves"
            self._state.ended = Ended("time-limit", reason, 0)
        else:
            _write_private(os.path.join(scratch.path, "work"), msgspec.msgpack.encode(work))
            self._work_with(self._start_driver())
        return self._finish()

    def _start_driver(self) -> Child:
        failpoint("supervisor.before_driver")
        self._kills_before = self._memory.kills()
        self._driver = start_child(
            "hpcresume.task.driver", self._spec_path, oom_score=_DRIVER_OOM_SCORE
        )
        self._driver_start = time.monotonic()
        self._selector.register(self._driver.channel.read_fd, selectors.EVENT_READ)
        return self._driver

    def _is_too_long(self, work: Work) -> bool:
        """Tell whether no source that is left can finish; nothing needs to start then."""
        if not work.ran:
            return False
        if self._allocation.element is not None:
            # The driver starts these sources first, and is to know what time it has.
            self._limit.wait(_FIRST_ANSWER_S)
        finish_by = self._finish_by(self._limit.end)
        if finish_by is None or len(work.ran) < len(bitmaps.load(work.sources, what="the shard")):
            return False
        return NEEDS_LONGER * min(work.ran.values()) > finish_by - time.monotonic()

    def _work_with(self, driver: Child) -> None:
        self._heed_signals()
        while not self._is_over():
            self._step(driver)

    def _start_publisher(self) -> Child:
        child = start_child(
            "hpcresume.task.publisher", self._spec_path, oom_score=_PUBLISHER_OOM_SCORE
        )
        self._selector.register(child.channel.read_fd, selectors.EVENT_READ)
        return child

    def _recover_dead(self) -> None:
        """Publish and sweep what dead attempts of this run left on this node."""
        for directory in dead_attempts(self._local, run_id=self._run.run_id):
            if self._signals.terminate:
                return
            end_dead(directory)
            self._publisher.channel.send(Recover(directory))
            answer = self._await(_RECOVER_S, until_signalled=True)
            if isinstance(answer, Recovered):
                say(f"recovered {answer.sources} sources of a dead attempt in {directory}")
                sweep(directory)
                ref = attempt_of(directory)
                self._recovered += [ref] if ref is not None else []
            else:
                why = answer.reason if isinstance(answer, Refused) else "no answer in time"
                say(f"could not recover {directory}: {why}")

    def _await(self, timeout_s: float, *, until_signalled: bool = False) -> PublisherReport | None:
        """Return the publisher's next report, None when it does not come in time."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and not self._publisher.channel.closed:
            if until_signalled and self._signals.terminate:
                break
            self._wait(min(_TICK_S, deadline - time.monotonic()))
            reports = self._publisher.channel.receive(PUBLISHER_REPORTS)
            if reports:
                return reports[-1]
        return None

    def _wait(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(max(0.0, timeout_s)):
            if key.fd == self._signals.wake_read:
                with contextlib.suppress(BlockingIOError):
                    os.read(key.fd, 4096)

    def _step(self, driver: Child) -> None:
        self._wait(_TICK_S)
        self._heed_signals()
        for report in driver.channel.receive(DRIVER_REPORTS):
            self._hear_driver(report)
        if driver.channel.closed:
            self._note_driver_end(driver)
        elif self._state.report is None:
            self._check_start(driver)
        self._serve_publisher()
        self._tell_parent()

    def _check_start(self, driver: Child) -> None:
        """End a driver whose Ray head does not come up."""
        limit = self._settings.task.start_timeout_s
        if time.monotonic() - self._driver_start > limit and self._state.ended is None:
            driver.kill()
            reason = f"the Ray head did not come up within start_timeout_s={limit:g}"
            self._state.ended = Ended("ray-start", reason, 0)

    def _is_over(self) -> bool:
        state = self._state
        if state.ended is not None or state.driver_died is not None:
            return True
        # A driver that a stage blocks does not hear the order; its commits need time, too.
        latest = min(state.stop_deadline, state.driver_deadline + _DRIVER_CLOSE_S) + _MARGIN_S
        return time.monotonic() > latest

    def _heed_signals(self) -> None:
        if self._signals.terminate and self._state.stop_kind is None:
            self._stop("terminated", "SIGTERM", self._settings.task.drain_s)
        if self._signals.look_at_time:
            self._signals.look_at_time = False
            self._signalled_at = time.monotonic()
            self._limit.look()
        if self._allocation.element is not None:
            self._limit.turn()
        if self._state.stop_kind is None:
            self._heed_time()

    def _heed_time(self) -> None:
        """Stop where the time limit is near, or leaves too little for any source.

        USR2 is a reason to ask again, not to stop: it comes up to a minute early, and limits
        can be changed.  Where nobody knows the end, USR2 stops.
        """
        limit, now, report = self._limit, time.monotonic(), self._state.report
        if limit.end is None:
            asked = self._allocation.element is None or limit.is_newer_than(self._signalled_at or 0)
            if self._signalled_at is not None and asked:
                self._stop("time-limit", "SIGUSR2", self._settings.task.drain_s)
            return
        self._tell_deadline(limit.end)
        left = limit.end - now
        drain_s = max(1.0, min(left - 2 * _MARGIN_S, self._settings.task.drain_s))
        if left < self._stop_budget_s and self._is_confirmed(left):
            self._stop("time-limit", "the time limit is near", drain_s)
        elif report is not None and report.lacks_time:
            # The limit may have been raised since it was asked for last.
            if not limit.is_newer_than(now - _RECENT_S):
                limit.look()
                return
            reason = f"no source that is left is expected to finish in the {left:.0f} s left"
            self._stop("time-limit", reason, drain_s)

    def _is_confirmed(self, left: float) -> bool:
        """Tell whether Slurm was asked just now, or there is no more time to wait for it."""
        asked_after = time.monotonic() + left - self._stop_budget_s - _ASK_AHEAD_S
        return self._limit.is_newer_than(asked_after) or left < self._stop_budget_s - _MARGIN_S

    @property
    def _stop_budget_s(self) -> float:
        """How long before the end of the time limit no more sources are admitted at all."""
        return self._settings.task.drain_s + 2 * _MARGIN_S

    def _finish_by(self, end: float | None) -> float | None:
        """Return when the last source must be finished, so that the rest can be published."""
        return None if end is None else end - 2 * _MARGIN_S - self._settings.task.drain_s / 2

    def _stop(self, kind: str, reason: str, drain_s: float) -> None:
        state = self._state
        if state.stop_kind is not None:
            return
        state.stop_kind, state.stop_reason = kind, reason
        state.stop_deadline = time.monotonic() + drain_s
        say(f"{reason}: no more sources are admitted; up to {drain_s:.0f} s to drain")
        self._tell_deadline(state.stop_deadline)
        note_stopping(self._scratch.path)
        # Half of the budget is for what runs, half for publishing what it leads to.
        state.driver_deadline = time.monotonic() + drain_s / 2
        self._order_driver(Stop(state.driver_deadline))

    def _tell_deadline(self, deadline: float) -> None:
        """Let stages and driver know by when they must be done, where that has changed."""
        if deadline != self._told_deadline:
            self._told_deadline = deadline
            write_deadline(self._scratch.path, deadline)
            finish_by = self._finish_by(self._limit.end)
            if finish_by is not None:
                self._order_driver(FinishBy(finish_by))

    def _order_driver(self, order: DriverOrder) -> None:
        if self._driver is not None:
            self._driver.channel.send(order)

    def _hear_driver(self, report: DriverReport) -> None:
        if isinstance(report, Ended):
            self._state.ended = report
            if report.kind == "terminated":
                self._interrupted_at = time.monotonic()
            return
        self._state.report = report
        if report.ready and self._ready_at is None:
            self._ready_at = time.monotonic()
        self._schedule.note_commits(report, time.monotonic())

    def _note_driver_end(self, driver: Child) -> None:
        if self._state.ended is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                driver.process.wait(timeout=5)
            self._state.driver_died = f"the driver {driver.describe_end()}"
            self._state.out_of_memory = self._ran_out_of_memory()
            if self._state.out_of_memory:
                self._state.driver_died += f": {self._shortage()}"
            for stage, step in interrupted(self._scratch.path).items():
                self._state.driver_died += f"; stage {stage!r} was in the middle of its {step}"
            say(self._state.driver_died)

    def _ran_out_of_memory(self) -> bool:
        """Tell whether the kernel killed more for want of memory than workers died of it."""
        report = self._state.report
        explained = report.oom_deaths if report is not None else 0
        return self._memory.kills() - self._kills_before > explained

    def _shortage(self) -> str:
        more = self._array.limit or "What was in flight gets more in the next round"
        return f"{self._allocation.memory_mib} MiB were not enough. {more}"

    def _death(self) -> Death | None:
        """Return how the driver died, for what it had in flight; None if that was on purpose."""
        if not self._state.out_of_memory:
            return Death() if self._interrupted_at is None else None
        message = f"memory ran out while the task worked on this source alone: {self._shortage()}"
        short_mib = 0 if self._array.limit else self._allocation.memory_mib
        return Death("out-of-memory", message, short_mib)

    def _serve_publisher(self) -> None:
        for report in self._publisher.channel.receive(PUBLISHER_REPORTS):
            self._hear_publisher(report)
        now = time.monotonic()
        self._check_publisher(now)
        if self._schedule.is_due(self._state.report, now):
            self._order_publication()
        self._hold_if_at_risk(now)

    def _check_publisher(self, now: float) -> None:
        """Start another publisher where this one died or hangs."""
        if self._publisher.channel.closed:
            say(f"the publisher {self._publisher.describe_end()}; another one is started")
            self._replace_publisher()
        elif self._schedule.is_hung(now):
            say("shared storage does not answer; the publisher is left behind")
            self._publisher.kill()
            self._replace_publisher()

    def _replace_publisher(self) -> None:
        self._selector.unregister(self._publisher.channel.read_fd)
        self._publisher.channel.close()
        self._publisher = self._start_publisher()
        self._schedule.take_refusal(time.monotonic())

    def _order_publication(self, *, driver_died: bool = False) -> None:
        seq = self._schedule.begin(time.monotonic())
        self._publisher.channel.send(
            Publish(
                self._schedule.receipt,
                seq,
                self._sync.max_bytes,
                driver_died,
                self._death() if driver_died else None,
                self._interrupted_at,
            )
        )

    def _hear_publisher(self, report: PublisherReport) -> None:
        if isinstance(report, Refused):
            say(f"cannot publish: {report.reason}")
            self._schedule.take_refusal(time.monotonic(), damaged=report.damaged)
        elif isinstance(report, Receipt):
            self._take_receipt(report)

    def _take_receipt(self, receipt: Receipt) -> None:
        self._schedule.take_receipt(receipt, self._state.report, time.monotonic())
        self._order_driver(Published(receipt.last))
        if receipt.newest_epoch > self._ref.epoch:
            self._stop("superseded", f"attempt {receipt.newest_epoch} has started", 2 * _TICK_S)
        if receipt.stop:
            self._stop("stopped", "the run holds a stop mark", self._settings.task.drain_s)

    def _hold_if_at_risk(self, now: float) -> None:
        """Take no more sources while what is committed cannot be published."""
        hold = self._schedule.must_hold(now)
        if hold != self._holding:
            self._holding = hold
            say("too much is unpublished; no sources are taken" if hold else "publishing again")
            self._order_driver(Hold(hold))

    def _tell_parent(self) -> None:
        """Send progress to the launcher, where one watches."""
        if self._progress_fd >= 0 and self._state.report is not None:
            data = msgspec.json.encode(
                {"task": self._task, **msgspec.to_builtins(self._state.report)}
            )
            try:
                os.write(self._progress_fd, data + b"\n")
            except OSError:
                self._progress_fd = -1

    def _finish(self) -> int:
        """Publish the rest, write the outcome, leave nothing behind; return the exit status."""
        self._leave_driver()
        # A driver that ended before it had a ledger left nothing to publish.
        has_ledger = os.path.exists(os.path.join(self._scratch.path, "ledger", "data.mdb"))
        published = not has_ledger or self._publish_rest()
        outcome = self._make_outcome(published=published)
        say(f"{outcome.state}: {outcome.reason}")
        self._publisher.channel.send(WriteOutcome(outcome))
        written = self._await(self._budget_s(_RECOVER_S))
        if not isinstance(written, OutcomeWritten):
            say("the outcome could not be written")
        self._tell_parent()
        stuck = end_descendants(_END_DESCENDANTS_S)
        if stuck:
            say(f"processes blocked in the kernel are left behind: {stuck}")
        if published:
            self._scratch.remove()
        if outcome.state == "done":
            forbid_restart(self._allocation, stopped=self._state.stop_kind is not None)
        if outcome.state in {"done", "superseded"}:
            return 0
        if outcome.state == "broken":
            if is_nodes_fault(outcome):
                self._leave_bad_node()
            return EXIT_BROKEN
        self._requeue_if_ours(
            outcome, stop_mark=written.stop if isinstance(written, OutcomeWritten) else None
        )
        return EXIT_SAVED

    def _leave_driver(self) -> None:
        """End a driver that did not drain in time: what it committed is published without it."""
        if self._driver is None:
            return
        # The end of its pipe would wake every wait from now on.
        self._selector.unregister(self._driver.channel.read_fd)
        if self._state.ended is None and self._state.driver_died is None:
            self._interrupted_at = time.monotonic()
            self._driver.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._driver.process.wait(timeout=_MARGIN_S)

    def _budget_s(self, at_most_s: float) -> float:
        """Return how long something may still take before Slurm ends this process."""
        state = self._state
        if state.stop_kind is None:
            return at_most_s
        return min(at_most_s, max(_MARGIN_S, state.stop_deadline + _MARGIN_S - time.monotonic()))

    def _publish_rest(self) -> bool:
        """Publish until nothing is left or time is up; return whether nothing is left."""
        schedule, begun = self._schedule, time.monotonic()
        deadline = begun + self._budget_s(_FINAL_PUBLISH_S)
        while (now := time.monotonic()) < deadline and not schedule.damaged:
            if not schedule.in_flight and now >= schedule.retry_at:
                if schedule.is_rest_published(self._state.ended):
                    return True
                self._order_publication(driver_died=self._state.ended is None)
            self._wait(min(_TICK_S, max(0.01, schedule.retry_at - now)))
            for report in self._publisher.channel.receive(PUBLISHER_REPORTS):
                self._hear_publisher(report)
            self._check_publisher(now)
            self._heed_signals()
            if self._state.stop_kind is not None:
                limit = max(begun, self._state.stop_deadline) + _MARGIN_S
                deadline = min(deadline, limit)
        return False

    def _make_outcome(self, *, published: bool) -> Outcome:
        state = self._state
        if state.stop_kind == "terminated" and self._allocation.element is not None:
            view = look(self._allocation, timeout_s=self._budget_s(_MARGIN_S))
            state.stop_kind, state.stop_reason = kind_of_sigterm(view), f"SIGTERM: {view}"
        kind = "out-of-memory" if state.out_of_memory else "driver-died"
        return make_outcome(
            ended=state.ended,
            died=(kind, state.driver_died) if state.driver_died else None,
            stop=(state.stop_kind, state.stop_reason) if state.stop_kind else None,
            published=published,
            completed=self._schedule.sources,
            elapsed_s=self._elapsed(),
            usable_s=self._usable_s(),
        )

    def _usable_s(self) -> float:
        """Return how long a fresh attempt can work under the time limit as it was given."""
        finish_by = self._finish_by(self._limit.first_end)
        if finish_by is None or self._ready_at is None:
            return 0.0
        return round(max(0.0, finish_by - self._ready_at), 3)

    def _requeue_if_ours(self, outcome: Outcome, *, stop_mark: bool | None) -> None:
        """Requeue this element after a stop that Slurm will not restart by itself."""
        element, allowed = self._allocation.element, self._settings.site.requeue
        if element is None:
            return
        refused = why_not(
            outcome, allowed=allowed, stop_mark=stop_mark, view=lambda: look(self._allocation)
        )
        if refused:
            say(f"not requeued, the merge step takes over: {refused}")
            return
        try:
            slurm.requeue(element)
            say(f"requeued {element}")
        except HpcResumeError as error:
            say(f"not requeued, the merge step takes over: {error}")


def _write_private(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)


def _boot_id() -> str:
    with (
        contextlib.suppress(OSError),
        open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f,
    ):
        return f.read().strip()
    return ""


def run_task(path: str, round_: int, task: int, environ: Mapping[str, str]) -> int:
    """Run one attempt of an array task in this process and return its exit status."""
    os.umask(0o077)
    return Supervisor(RunDir.open(path), round_, task, environ).run()


def run_element(argument: str) -> None:
    """Run this element of a job array; what submitit calls, with ``<round> <run directory>``.

    Never returns: submitit would write a result file and call it success.
    """
    round_, _, path = argument.partition(" ")
    _exit_with(lambda: run_task(path, int(round_), int(os.environ["HPCRESUME_TASK"]), os.environ))


def _exit_with(action: Callable[[], int]) -> None:
    try:
        status = action()
    except HpcResumeError as error:
        say(str(error))
        status = error.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _exit_with(lambda: run_task(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), os.environ))
