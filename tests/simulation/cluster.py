"""A Slurm that may be down, forget replies, requeue what still runs, and lose nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from hpcresume import slurm
from hpcresume.errors import SlurmUnreachableError
from hpcresume.launch import drive, submitit_executor
from hpcresume.slurm import JobId
from tests.simulation.world import Process
from tests.support.places import RUN_ID

ENDED = {"COMPLETED", "FAILED", "CANCELLED"}


@dataclass(eq=False)
class Element:
    """One element of an array: PENDING, RUNNING, or ended."""

    array: str
    round: int
    task: int
    state: str = "PENDING"
    process: Process | None = None
    restarts: int = 0


@dataclass(eq=False)
class Job:
    """A merge job: what it waits for (a kind and ids), and how it stands."""

    id: str
    name: str
    kind: str
    after: list[str]
    state: str = "PENDING"
    process: Process | None = None


def _entry(  # noqa: PLR0917  # the columns of squeue
    job: str, array: str, task: int | None, name: str, state: str, dependency: str = ""
) -> slurm.QueueEntry:
    return slurm.QueueEntry(
        job_id=JobId(job), array_job_id=array, array_task=task, name=name, state=state,
        reason=None, node=None, dependency=dependency if state == "PENDING" else None,
    )  # fmt: skip


@dataclass
class Cluster:
    """What the controller knows.

    Attributes:
        blind_for: Queries that are not answered.
        loses_reply: The next submission takes effect, and its reply is lost.
        hidden: Arrays that a query does not show yet.
    """

    elements: list[Element] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    blind_for: int = 0
    loses_reply: bool = False
    hidden: set[str] = field(default_factory=set)
    _next: int = 100
    _names: dict[str, str] = field(default_factory=dict)

    def begin(self, tasks: int) -> None:
        """Take up a run whose first array and merge jobs are submitted."""
        name = f"hpcresume-{RUN_ID}-0"
        self._names["101"] = name
        self.elements = [Element("101", 0, task) for task in range(tasks)]
        self.jobs = [
            Job("102", f"{name}-merge", "afterany", ["101"]),
            Job("103", f"{name}-twin", "afternotok", ["102"]),
        ]
        self._next = 103

    def queue(self, *_jobs: Any, name: str | None = None, **_how: Any) -> list[Any]:
        """Answer ``squeue`` for a job name."""
        if self.blind_for:
            self.blind_for -= 1
            raise SlurmUnreachableError("squeue did not answer")
        found = [
            _entry(f"{e.array}_{e.task}", e.array, e.task, self._names[e.array], e.state)
            for e in self.elements
            if name in (None, self._names[e.array]) and e.array not in self.hidden
        ]
        found += [
            _entry(j.id, j.id, None, j.name, j.state, f"{j.kind}:{':'.join(j.after)}")
            for j in self.jobs
            if name in (None, j.name)
        ]
        return found

    def submit_array(self, job: Any, _resolved: Any, *, function: Any, argument: str) -> str:
        """Answer ``sbatch`` for an array."""
        del function
        number = self._number()
        self._names[number] = job.name
        round_ = int(argument.split(" ", maxsplit=1)[0])
        self.elements += [Element(number, round_, task) for task in range(job.tasks)]
        self._lose_reply(number)
        return number

    def submit_merge(self, job: Any, _resolved: Any, *, script: Any) -> str:
        """Answer ``sbatch`` for a merge job."""
        del script
        number = self._number()
        kind, *after = job.dependency.split(":")
        self.jobs.append(Job(number, job.name, kind, after))
        return number

    def copy_name(self, array: str, other: str) -> None:
        """Give another array the job name of one."""
        self._names[other] = self._names[array]

    def _number(self) -> str:
        if self.blind_for:
            self.blind_for -= 1
            raise SlurmUnreachableError("sbatch did not answer")
        self._next += 1
        return str(self._next)

    def _lose_reply(self, number: str) -> None:
        if self.loses_reply:
            self.loses_reply = False
            self.hidden.add(number)
            raise SlurmUnreachableError("sbatch did not answer in time")

    def cancel(self, jobs: Any) -> None:
        """Answer ``scancel``: what waits or runs ends."""
        for element in self.elements:
            if element.array in jobs and element.state not in ENDED:
                element.state = "CANCELLED"
                if element.process is not None:
                    element.process.kill()
        for job in self.jobs:
            if job.id in jobs and job.state == "PENDING":
                job.state = "CANCELLED"

    def cancelled_tasks(self, _run: Any, plan: Any, _remainder: Any) -> list[int]:
        """Answer how a round's elements have ended."""
        found = (e for e in self.elements if e.round == plan.footer.round)
        return sorted({e.task for e in found if e.state == "CANCELLED"})

    def notice_ends(self) -> None:
        """Take note of processes that have ended."""
        for element in self.elements:
            process = element.process
            if element.state == "RUNNING" and process is not None and not process.alive:
                element.state = "COMPLETED" if process.result == 0 else "FAILED"
                if process.result == "requeue":
                    self.requeue(element)
        for job in self.jobs:
            if job.state == "RUNNING" and job.process is not None and not job.process.alive:
                fine = job.process.error is None and not job.process.killed
                job.state = "COMPLETED" if fine else "FAILED"

    def requeue(self, element: Element) -> None:
        """Put an element back into the queue, whether or not its process lives."""
        element.state, element.process = "PENDING", None
        element.restarts += 1

    def pending(self) -> list[Element]:
        """Return the elements that could be started."""
        return [element for element in self.elements if element.state == "PENDING"]

    def due(self) -> list[Job]:
        """Return the merge jobs whose dependency is fulfilled."""
        return [job for job in self.jobs if job.state == "PENDING" and self._is_due(job)]

    def _is_due(self, job: Job) -> bool:
        if job.kind == "afterany":
            return all(e.state in ENDED for e in self.elements if e.array in job.after)
        (other,) = [j for j in self.jobs if j.id in job.after]
        if other.state == "COMPLETED":
            job.state = "CANCELLED"
        return other.state == "FAILED"

    @contextlib.contextmanager
    def installed(self, resolved: Any) -> Iterator[None]:
        """Let the launcher see this cluster."""
        pipeline = SimpleNamespace(pipeline=SimpleNamespace(finish=None))
        patches = [
            (slurm, "queue", self.queue),
            (submitit_executor, "submit_round", self.submit_array),
            (submitit_executor, "submit_merge", self.submit_merge),
            (slurm, "cancel", self.cancel),
            (drive, "check_owner", lambda _path: None),
            (drive, "foresee", lambda _resolved, **_how: None),
            (drive, "cancelled_tasks", self.cancelled_tasks),
            (drive, "one_at_a_time", lambda _run: contextlib.nullcontext()),
            (drive, "load_snapshot", lambda _path: pipeline),
            (drive, "reload_settings", lambda _plan: resolved),
        ]
        kept = [(where, name, getattr(where, name)) for where, name, _ in patches]
        for where, name, value in patches:
            setattr(where, name, value)
        try:
            yield
        finally:
            for where, name, value in kept:
                setattr(where, name, value)
