"""A round on this machine: supervisors as child processes, as many as the cores hold.

They are started directly and not through submitit's local executor: that one adds a process
per task which does not pass signals on, leaves its task running when it dies, and ends tasks
after a default of five minutes.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import IO, Any

import msgspec

from hpcresume.config.settings import Settings
from hpcresume.fs import ensure_directory
from hpcresume.merge.plan import Plan
from hpcresume.run.directory import AttemptInfo, JobRecord, RunDir

_OUTPUTS = (1, 2)
_TICK_S = 0.5
_KILL_AFTER_S = 5.0


class TaskProgress(msgspec.Struct):
    """What an array task last said.

    Attributes:
        committed: Sources completed by its current attempt.
        in_flight: Sources that workers hold.
        failing: Sources that failed and will be tried again.
        quarantined: Sources given up.
        left: Sources that are not settled.
    """

    committed: int = 0
    in_flight: int = 0
    failing: int = 0
    quarantined: int = 0
    left: int = 0


class _Running(msgspec.Struct):
    task: int
    process: subprocess.Popen[bytes]
    progress: int
    buffer: bytes = b""


class LocalRound(msgspec.Struct):
    """One round's array tasks on this machine.

    Attributes:
        on_progress: Called with what each task last said; True: interrupt, as by SIGTERM.
        interrupted: The signal that asked to stop, 0 while none did.
        forced: Whether a second one came, which kills all tasks at once.
        progress: What each task last said.
    """

    run: RunDir
    round: int
    plan: Plan
    settings: Settings
    on_progress: Callable[[dict[int, TaskProgress]], bool | None]
    interrupted: int = 0
    forced: bool = False
    progress: dict[int, TaskProgress] = msgspec.field(default_factory=dict)
    _running: dict[int, _Running] = msgspec.field(default_factory=dict)
    _job: JobRecord | None = None

    def execute(self) -> None:
        """Run all tasks of the round; returns when the last one has ended."""
        cpus, parallel = share_cores(self.plan.footer.tasks, self.settings)
        ensure_directory(self.run.fs, self.run.logs_path(self.round))
        self._record()
        waiting = list(range(self.plan.footer.tasks))
        with self._signals(), selectors.DefaultSelector() as selector:
            try:
                while waiting or self._running:
                    while waiting and len(self._running) < parallel and not self.interrupted:
                        self._start(waiting.pop(0), cpus, selector)
                    if self.interrupted:
                        waiting.clear()
                    self._listen(selector)
            finally:
                self._end_all()

    def _record(self) -> None:
        self._job = JobRecord(
            cluster="local",
            array=f"{os.uname().nodename}:{os.getpid()}",
            tasks=self.plan.footer.tasks,
            submitted_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self._write_job(self._job)

    def note_end(self) -> None:
        """Note that this process drives the round no more, though it may live on."""
        if self._job is not None:
            self._write_job(msgspec.structs.replace(self._job, has_ended=True))

    def _write_job(self, job: JobRecord) -> None:
        name = f"local-{os.getpid()}-{time.time_ns()}.json"
        self.run.write_record(self.run.round_path(self.round, "jobs", name), job, label="jobs")

    def _start(self, task: int, cpus: int, selector: selectors.BaseSelector) -> None:
        read, write = os.pipe()
        log = self._open_log(task)
        environ = {
            **os.environ,
            "HPCRESUME_PROGRESS_FD": str(write),
            "HPCRESUME_CPUS": str(cpus),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        process = subprocess.Popen(
            [
                *(sys.executable, "-u", "-P", "-m", "hpcresume.task.supervisor"),
                *(self.run.path, str(self.round), str(task)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environ,
            pass_fds=(write,),
            cwd=self.plan.footer.launch.cwd or None,
            # The terminal's Ctrl-C is for the launcher, which tells the tasks in order.
            start_new_session=True,
        )
        log.close()
        os.close(write)
        os.set_blocking(read, False)
        self._running[read] = _Running(task, process, read)
        self.progress.setdefault(task, TaskProgress())
        selector.register(read, selectors.EVENT_READ)

    def _open_log(self, task: int) -> IO[bytes]:
        path = self.run.logs_path(self.round, f"task-{task:05d}.log")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        return os.fdopen(fd, "ab", buffering=0)

    def _listen(self, selector: selectors.BaseSelector) -> None:
        for key, _ in selector.select(_TICK_S):
            running = self._running[key.fd]
            with contextlib.suppress(BlockingIOError):
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fd)
                    self._reap(running)
                    continue
                self._note(running, data)
        if self.on_progress(self.progress) and not self.interrupted:
            self._interrupt(signal.SIGTERM)

    def _note(self, running: _Running, data: bytes) -> None:
        *lines, running.buffer = (running.buffer + data).split(b"\n")
        for line in lines:
            said = msgspec.json.decode(line, type=dict[str, Any])
            names = TaskProgress.__struct_fields__
            self.progress[running.task] = TaskProgress(**{name: said[name] for name in names})

    def _reap(self, running: _Running) -> None:
        """Wait for a supervisor whose pipe is closed, with all its processes."""
        os.close(running.progress)
        del self._running[running.progress]
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.process.wait(timeout=60)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # Python lets only the main thread set handlers
            return
        terminals = [fd for fd in _OUTPUTS if os.isatty(fd)]

        def interrupt(number: int, _frame: object) -> None:
            if number == signal.SIGHUP:
                _leave(terminals)
            self._interrupt(number)

        # Slurm signals a batch script's processes with USR2 where `--signal` asks for it.
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2]
        # What nohup, or a shell for what runs in the background, had ignored stays so.
        numbers = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]
        before = [signal.signal(number, interrupt) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _interrupt(self, number: int) -> None:
        self.forced, self.interrupted = bool(self.interrupted), self.interrupted or number
        for running in list(self._running.values()):
            with contextlib.suppress(ProcessLookupError):
                running.process.send_signal(signal.SIGKILL if self.forced else signal.SIGTERM)

    def _end_all(self) -> None:
        """End what an error left running; nothing is left after an ordinary end."""
        for running in self._running.values():
            running.process.terminate()
        for running in self._running.values():
            try:
                running.process.wait(timeout=self.settings.task.drain_s + _KILL_AFTER_S)
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()


def _leave(terminals: list[int]) -> None:
    """Write to nowhere instead of to terminals that are gone, where each write would fail."""
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    for fd in terminals:
        if not os.isatty(fd):
            os.dup2(null, fd)
    os.close(null)


def share_cores(tasks: int, settings: Settings) -> tuple[int, int]:
    """Return the cores of one array task, and how many tasks run at once, on this machine."""
    cores = len(os.sched_getaffinity(0))
    cpus = settings.request.cpus_per_task or max(1, cores // max(1, tasks))
    return min(cpus, cores), max(1, cores // cpus)


def living_attempts(run: RunDir) -> list[AttemptInfo]:
    """Return the attempts of a run whose supervisor is alive on this machine."""
    found = []
    for ref in run.all_attempts():
        info = run.attempt_info(ref)
        if info is None or run.outcome(ref) is not None or info.host != os.uname().nodename:
            continue
        if info.job_id is None and os.fsencode(run.path) in _arguments_of(info.pid):
            found.append(info)
    return found


def _arguments_of(pid: int) -> list[bytes]:
    """Return the command line of a process; empty where there is none to be seen."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read().split(b"\0")
    return []
