"""Reads a run directory again and again, each time only what may have changed.

What has ended is read once: attempts with an outcome, and rounds that a later one follows.
Of the others one look is a listing and an attempt to open the outcome.  A look at all of
10,000 array tasks may take long on a busy file server, so a budget can end it early; the next
one goes on where it stopped, and :attr:`Reader.seen` tells how much has been looked at.
"""

from __future__ import annotations

import time
from collections import deque
from datetime import datetime
from functools import cached_property

import msgspec

from hpcresume.errors import CorruptDataError, SharedStorageError
from hpcresume.merge.generation import Union, fold_named, load_newest, take_up_packs
from hpcresume.merge.packs import Packs, key_of, name_of
from hpcresume.merge.plan import PlanFooter, open_plan
from hpcresume.run.directory import (
    OUTCOME,
    AttemptInfo,
    AttemptRef,
    JobRecord,
    Outcome,
    RunDir,
    SegmentName,
)
from hpcresume.run.manifest import Manifest
from hpcresume.segment.segment import Progress, SegmentFooter, Writer, open_segment

MAX_ATTEMPTS = 3
# At a publication a minute: what was done over the last quarter of an hour.
_POINTS = 16


class AttemptFiles(msgspec.Struct):
    """What files say of one attempt.

    Attributes:
        ref: The attempt.
        info: Who runs it, once it has said so.
        outcome: How it ended, once it has.
        footer: What its newest segment says.
        points: How it stood when it sealed each of its last segments.
        alive: Whether its process runs; None where nobody here can tell.
        won: Sources whose rows are taken from its segments, as far as these were looked at.
    """

    ref: AttemptRef
    info: AttemptInfo | None = None
    outcome: Outcome | None = None
    footer: SegmentFooter | None = None
    points: deque[Progress] = msgspec.field(default_factory=lambda: deque(maxlen=_POINTS))
    alive: bool | None = False
    won: int = 0
    known: set[str] = msgspec.field(default_factory=set)

    @property
    def writer(self) -> Writer:
        """The attempt as a writer of segments."""
        return Writer(self.ref.round, self.ref.task, self.ref.epoch)

    @property
    def state(self) -> str:
        """``running``, ``died``, or the state of its outcome."""
        if self.outcome is not None:
            return self.outcome.state
        return "died" if self.alive is False else "running"

    @property
    def progress(self) -> Progress | None:
        """How it stood when it sealed its newest segment."""
        return self.footer.progress if self.footer else None

    @property
    def completed(self) -> int:
        """Sources that it completed, as far as it has told."""
        if self.outcome is not None:
            return self.outcome.completed
        # It tells now and then, and what it has completed since is published, too.
        return max(self.won, self.footer.progress.completed) if self.footer else 0

    @property
    def started_at(self) -> float | None:
        """Wall-clock seconds of its start, for people only."""
        try:
            return datetime.fromisoformat(self.info.started_at).timestamp() if self.info else None
        except ValueError:
            return None

    def elapsed_s(self, now: float) -> float:
        """Return how long it ran, or has run by now, as far as files tell."""
        if self.outcome is not None:
            return self.outcome.elapsed_s
        started = self.started_at
        if started is None:
            return self.footer.progress.elapsed_s if self.footer else 0.0
        if self.state == "running":
            return max(0.0, now - started)
        # Nobody saw it die; it lived at least until then.
        last = self.footer.progress.written_at if self.footer else started
        return max(0.0, last - started)


class RoundFiles(msgspec.Struct, dict=True):
    """What files say of a round; ``tasks`` holds the attempts of each array task.

    What is derived from ``tasks`` is kept until :meth:`changed`.
    """

    number: int
    plan: PlanFooter
    jobs: list[JobRecord] = msgspec.field(default_factory=list)
    owner: str | None = None
    tasks: dict[int, list[AttemptFiles]] = msgspec.field(default_factory=dict)

    @cached_property
    def attempts(self) -> list[AttemptFiles]:
        """All attempts, by array task, then epoch."""
        return [attempt for task in sorted(self.tasks) for attempt in self.tasks[task]]

    @cached_property
    def newest(self) -> dict[int, AttemptFiles]:
        """The newest attempt of each array task that has one."""
        return {task: self.tasks[task][-1] for task in sorted(self.tasks) if self.tasks[task]}

    @cached_property
    def live(self) -> list[AttemptFiles]:
        """Attempts that run."""
        return [attempt for attempt in self.attempts if attempt.state == "running"]

    def changed(self) -> None:
        """Forget what was derived from ``tasks``."""
        for name in ("attempts", "newest", "live"):
            self.__dict__.pop(name, None)

    @property
    def on_slurm(self) -> bool:
        """Whether it was submitted to Slurm."""
        return self.plan.launch.cluster == "slurm"

    @property
    def merges_itself(self) -> bool:
        """Whether the site lets merge jobs submit the next round."""
        return bool(self.plan.settings.get("site", {}).get("submit_from_compute", True))


class Reader:
    """Reads one run; every :meth:`refresh` brings what it knows up to date.

    Attributes:
        run: The run.
        rounds: Its rounds, oldest first.
        union: What is done.
    """

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.rounds: list[RoundFiles] = []
        self.union = Union()
        self._manifest: tuple[list[int], Manifest] | None = None
        self._to_look: deque[tuple[RoundFiles, int]] = deque()
        self._queued: set[tuple[int, int]] = set()
        self._looked: set[tuple[int, int]] = set()
        self._segments: dict[tuple[Writer, str], SegmentName] = {}
        self._generation = -1

    @property
    def manifest(self) -> Manifest:
        """The run's sources."""
        numbers = self.run.part_numbers()
        if self._manifest is None or self._manifest[0] != numbers:
            self._manifest = (numbers, Manifest.open(self.run))
        return self._manifest[1]

    @property
    def seen(self) -> float:
        """The part of the array tasks that has been looked at, from 0 to 1."""
        return len(self._looked) / len(self._queued) if self._queued else 1.0

    @property
    def max_attempts(self) -> int:
        """Tries after which a source is quarantined."""
        settings = self.rounds[-1].plan.settings if self.rounds else {}
        return int(settings.get("run", {}).get("max_attempts", MAX_ATTEMPTS))

    def refresh(self, *, budget_s: float | None = None) -> None:
        """Read what may have changed, for about ``budget_s`` seconds at most: one task at least.

        Raises:
            CorruptDataError: The plan of a round is damaged.
            SharedStorageError: The file system refused.
        """
        end = None if budget_s is None else time.monotonic() + budget_s
        self._note_rounds()
        self._note_generation()
        for _ in range(len(self._to_look)):
            round_, task = self._to_look.popleft()
            if self._look_at(round_, task):
                self._to_look.append((round_, task))
            if end is not None and time.monotonic() > end:
                break
        for round_ in self.rounds:
            round_.changed()

    def _note_rounds(self) -> None:
        # What happened in a round until the next one came has not been listed yet.
        changed = self.rounds[-1:]
        for number in self.run.rounds()[len(self.rounds) :]:
            changed.append(RoundFiles(number, open_plan(self.run, number).footer))
        self.rounds += [one for one in changed if one not in self.rounds[-1:]]
        for round_ in changed:
            round_.jobs = self.run.job_records(round_.number)
            round_.owner = self.run.round_owner(round_.number)
            self._note_tasks(round_)

    def _note_tasks(self, round_: RoundFiles) -> None:
        for task in self.run.tasks(round_.number):
            if (round_.number, task) not in self._queued:
                self._queued.add((round_.number, task))
                self._to_look.appendleft((round_, int(task)))

    def _note_generation(self) -> None:
        """Begin anew from a generation that is new, with what it has not folded."""
        numbers = self.run.generation_numbers()
        newest = max(numbers, default=0)
        if newest == self._generation:
            return
        self._generation = newest
        self.union, packs = load_newest(self.run), Packs(self.run)
        packed = take_up_packs(self.run, self.union, packs)
        for name in [*map(name_of, packed), *self._segments.values()]:
            if key_of(name) not in self.union.won:
                fold_named(self.run, self.union, name, packs=packs, max_attempts=self.max_attempts)

    def _look_at(self, round_: RoundFiles, task: int) -> bool:
        """Look at one array task; return whether it has to be looked at again."""
        known = round_.tasks.setdefault(task, [])
        for ref in self.run.attempts(round_.number, task)[len(known) :]:
            known.append(AttemptFiles(ref))
        for attempt in known:
            if attempt.outcome is None:
                self._read(attempt)
        self._looked.add((round_.number, task))
        if not known:
            return True
        # Restarted ones go on in the same round only; one that is done never does.
        ended = known[-1].outcome is not None and known[-1].outcome.state == "done"
        return not ended and round_ is self.rounds[-1]

    def _read(self, attempt: AttemptFiles) -> None:
        if attempt.info is None:
            attempt.info = self.run.attempt_info(attempt.ref)
        found = self.run.published(attempt.ref)
        if OUTCOME in found:
            attempt.outcome = self.run.outcome(attempt.ref)
            # What an attempt publishes, it publishes before its outcome: now all of it is there.
            found = self.run.published(attempt.ref)
        fresh = (SegmentName(attempt.ref, name) for name in found if name not in attempt.known)
        names = [name for name in fresh if name.seq >= 0]
        newest = max((name.seq for name in names), default=0)
        for name in sorted(names, key=lambda name: name.seq):
            footer = self._take_in(attempt, name, is_newest=name.seq == newest)
            attempt.won += len(self.union.won.get((attempt.writer, name.name), ()))
            if footer is not None:
                attempt.footer = footer
                attempt.points.append(footer.progress)

    def _take_in(
        self, attempt: AttemptFiles, name: SegmentName, *, is_newest: bool
    ) -> SegmentFooter | None:
        """Fold a segment that no generation has; of the others only the newest is read."""
        key = (attempt.writer, name.name)
        attempt.known.add(name.name)
        self._segments[key] = name
        if key not in self.union.won:
            return fold_named(self.run, self.union, name, max_attempts=self.max_attempts)
        if not is_newest:
            return None
        try:
            path = self.run.segment_path(name)
            return open_segment(self.run.fs, path, run_id=self.run.run_id).footer
        except (CorruptDataError, SharedStorageError, FileNotFoundError):
            # Merging or collecting reports it; here it only tells of progress.
            return None
