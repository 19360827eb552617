"""Workers as Ray actors."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions

from hpcresume.engine import children
from hpcresume.engine.calls import Inputs
from hpcresume.engine.groups import Group
from hpcresume.engine.mark import Mark, Sight
from hpcresume.engine.output import OutputRelay
from hpcresume.engine.pool import (
    Died,
    EngineDiedError,
    Event,
    Finished,
    Started,
    StartFailed,
    WorkerRef,
)
from hpcresume.engine.worker import AsyncStageWorker, StageWorker, WorkerSetup
from hpcresume.errors import InternalError
from hpcresume.memory import MemoryGroup

_OVERDUE_GRACE_S = 5.0
_LAST_WORDS_BYTES = 4000
_DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
)


@dataclass(slots=True)
class _Actor:
    handle: Any
    mark: Mark
    mark_path: str
    deadline: float
    started: bool = False
    calls: dict[Any, int] = field(default_factory=dict)


class RayPool:
    """The workers of all groups, as actors of this process's head.

    Args:
        groups: The groups.
        make_setup: Returns the set-up of a worker, given its group, its number in it, its
            mark's path and where its output goes.
        marks: Node-local directory for the workers' marks.
        check: Called at every wait; raises when Ray itself is gone.
        memory: Counts what the kernel killed because memory ran out; None: nobody knows.
    """

    call_most_s = math.inf

    def __init__(
        self,
        groups: list[Group],
        *,
        make_setup: Callable[[Group, int, str, str], WorkerSetup],
        marks: str,
        check: Callable[[], None],
        memory: MemoryGroup | None = None,
    ) -> None:
        self._groups, self._make_setup, self._marks, self._check = groups, make_setup, marks, check
        self._memory = memory or MemoryGroup()
        self._kills_before, self.oom_deaths = self._memory.kills(), 0
        self._lack = self._lacking()
        self._actors: dict[WorkerRef, _Actor] = {}
        self._refs: dict[Any, WorkerRef] = {}
        self._events: list[Event] = []
        self._output = OutputRelay()

    def start(self, worker: WorkerRef) -> None:
        """Begin to start an actor."""
        group = self._groups[worker.group]
        if self._lack and group.gpus:
            # Ray would wait for them until the set-up's time is over.
            self._events.append(StartFailed(worker, self._lack))
            return
        path = os.path.join(self._marks, f"{worker.group}-{worker.index}-{worker.start}")
        mark = Mark(path)
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": group.gpus, "max_restarts": 0}
        if group.is_async:
            options["max_concurrency"] = max(1000, group.concurrency * 2)
        kind = AsyncStageWorker if group.is_async else StageWorker
        remote = ray.remote(kind).options(**options)
        setup = self._make_setup(group, worker.index, path, self._output.address)
        handle = remote.remote(setup)
        actor = _Actor(handle, mark, path, time.monotonic() + group.setup_timeout_s)
        self._actors[worker] = actor
        self._refs[handle.start.remote()] = worker

    def submit(self, worker: WorkerRef, call: int, inputs: Inputs, *, marked: bool) -> None:
        """Hand an actor a call."""
        actor = self._actors[worker]
        ref = actor.handle.run.remote(inputs, marked)
        actor.calls[ref] = call
        self._refs[ref] = worker

    def recall(self, worker: WorkerRef) -> None:
        """Have an actor hand back what it has not begun."""
        if worker in self._actors:
            self._actors[worker].mark.recall()

    def retire(self, worker: WorkerRef) -> None:
        """Tear an actor's stages down in the background, then end it."""
        actor = self._forget(worker)
        if actor is not None:
            # A broken worker answers the calls it still holds without running them.
            actor.handle.stop.remote()
            # Runs after stop(), since calls of one actor keep their order.
            actor.handle.__ray_terminate__.remote()

    def _lacking(self) -> str:
        """Return what the workers ask for and this task has not, empty where it has."""
        asked = sum(group.gpus * group.workers for group in self._groups)
        given = ray.cluster_resources().get("GPU", 0.0)
        if asked <= given:
            return ""
        return f"its stages ask for {asked:g} GPUs and this task was given {given:g}"

    def _forget(self, worker: WorkerRef) -> _Actor | None:
        actor = self._actors.pop(worker, None)
        self._refs = {ref: owner for ref, owner in self._refs.items() if owner != worker}
        return actor

    def wait(self, timeout_s: float) -> list[Event]:
        """Return what has happened, waiting up to ``timeout_s`` for the first event."""
        self._check()
        self._kill_late()
        if self._refs and not self._events:
            refs = list(self._refs)
            ready, rest = ray.wait(refs, num_returns=1, timeout=timeout_s, fetch_local=False)
            if ready and rest:
                more, _ = ray.wait(rest, num_returns=len(rest), timeout=0, fetch_local=False)
                ready += more
            for ref in ready:
                if ref in self._refs:
                    self._collect(ref)
        elif not self._events:
            time.sleep(timeout_s)
        events, self._events = self._events, []
        return events

    def _collect(self, ref: Any) -> None:
        worker = self._refs[ref]
        actor = self._actors[worker]
        try:
            value = ray.get(ref, timeout=60)
        except _DEATHS:
            self._bury(worker, reason=self._last_words(actor))
            return
        except ray.exceptions.RayTaskError as error:
            raise InternalError(
                f"a worker's call failed outside of the user's code: {error}. "
                "This is a bug in hpcresume. Please report it with this text."
            ) from error
        except ray.exceptions.RayError as error:
            raise EngineDiedError(f"Ray failed: {error}") from error
        del self._refs[ref]
        if ref in actor.calls:
            self._events.append(Finished([actor.calls.pop(ref)], value))
        elif value is None:
            actor.started = True
            self._events.append(Started(worker))
        else:
            self._forget(worker)
            ray.kill(actor.handle)
            self._events.append(StartFailed(worker, value))

    def _bury(self, worker: WorkerRef, *, reason: str, overdue: Sight | None = None) -> None:
        actor = self._forget(worker)
        assert actor is not None
        # It may be cut off rather than dead.
        ray.kill(actor.handle)
        children.end(actor.mark_path)
        ran_out = overdue is None and self._has_run_out()
        if ran_out:
            reason = "the task's memory ran out, and the kernel killed the worker process"
        if not actor.started:
            self._events.append(StartFailed(worker, f"its process died during set-up: {reason}"))
            return
        self._salvage(actor)
        seen = overdue or actor.mark.look()
        self._events.append(
            Died(
                worker,
                reason,
                seen.source,
                seen.stage,
                overdue=overdue is not None,
                out_of_memory=ran_out,
            )
        )

    def _has_run_out(self) -> bool:
        """Tell whether the kernel has killed more than the workers that are known to be dead.

        It may have been something that a stage started; to think that it was the worker
        charges nobody.
        """
        ran_out = self._memory.kills() - self._kills_before > self.oom_deaths
        self.oom_deaths += ran_out
        return ran_out

    def _salvage(self, actor: _Actor) -> None:
        """Keep the results of calls that finished before their worker died."""
        for ref, call in list(actor.calls.items()):
            with contextlib.suppress(ray.exceptions.RayError):
                self._events.append(Finished([call], ray.get(ref, timeout=0)))

    def _last_words(self, actor: _Actor) -> str:
        with contextlib.suppress(OSError), open(actor.mark_path + ".fault", "rb") as file:
            words = file.read(_LAST_WORDS_BYTES).decode("utf-8", "replace").strip()
            if words:
                return f"the worker process crashed: {words}"
        return (
            "the worker process ended without a word: os._exit() in a stage, or SIGKILL from "
            "outside, as the kernel sends when memory runs out"
        )

    def _kill_late(self) -> None:
        """Kill the workers whose set-up or whose item ran past its time."""
        now = time.monotonic()
        for worker, actor in list(self._actors.items()):
            if not actor.started:
                if now > actor.deadline:
                    self._forget(worker)
                    ray.kill(actor.handle)
                    limit = self._groups[worker.group].setup_timeout_s
                    reason = f"its set-up took longer than setup_timeout_s={limit:g}"
                    self._events.append(StartFailed(worker, reason))
                continue
            seen = actor.mark.look()
            if seen.overdue_s > _OVERDUE_GRACE_S:
                reason = (
                    f"it ran past its timeout_s and did not let itself be interrupted for "
                    f"{_OVERDUE_GRACE_S:g} s more; the worker was killed"
                )
                self._bury(worker, reason=reason, overdue=seen)

    def close(self, timeout_s: float) -> None:
        """Tear all stages down and end the actors, in order where they answer in time."""
        stops = [actor.handle.stop.remote() for actor in self._actors.values() if actor.started]
        with contextlib.suppress(ray.exceptions.RayError):
            ray.wait(stops, num_returns=len(stops), timeout=timeout_s) if stops else None
        for actor in self._actors.values():
            with contextlib.suppress(ray.exceptions.RayError, ValueError):
                ray.kill(actor.handle)
        self._actors.clear()
        self._refs.clear()
        self._output.close()
