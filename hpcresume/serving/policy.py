"""What an update may take and risk, and what is told of it afterwards."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields
from typing import get_args

from hpcresume.errors import ConfigError
from hpcresume.serving.worker import PauseMode


class Phase(enum.StrEnum):
    """A step that workers or exporter take together."""

    PAUSE = "pause"
    RELEASE = "release"
    PREPARE = "prepare"
    BUILD = "build"
    TRANSFER = "transfer"
    COMMIT = "commit"
    FINALIZE = "finalize"
    RESTORE = "restore"
    RESUME = "resume"
    FENCE = "fence"
    """Not one of theirs: they are killed, and known to be dead when it ends."""


class WorkerState(enum.StrEnum):
    """How a worker stands in its pool.  Into SERVING leads a verified push, and nothing else."""

    STARTING = "starting"
    STALE = "stale"
    """It runs and holds no state that may be served."""
    SERVING = "serving"
    PAUSED = "paused"
    STAGED = "staged"
    TAINTED = "tainted"
    """What it holds is not known."""
    DEAD = "dead"
    RETIRED = "retired"
    """The pool is closed."""


class Outcome(enum.StrEnum):
    """How an update ended."""

    COMMITTED = "committed"
    ROLLED_BACK = "rolled_back"
    UNRECOVERABLE = "unrecoverable"


@dataclass(frozen=True, slots=True)
class UpdatePolicy:
    """Deadlines of the phases in seconds, and what an update may do.

    Attributes:
        pause_s: Longer than the longest request, where requests are drained.
        release_s: Limit of that phase, as are the others of that form.
        fence_s: How long the death of a killed worker is waited for.
        start_s: How long a worker or the exporter may take to be made.
        total_s: For all phases up to the commit together; the clean-up has its own limits.
        cancel_s: What a phase that runs is given when the update is cancelled.
        retries: How often a push that touched workers, or a commit, is tried again.
        min_serving: Workers without which the pool cannot go on.
        replace_dead: Start another worker in the place of a dead one.
        replacements: How often a place is filled again without having served in between.
        pause: ``drain`` waits for requests in flight; ``abort`` has them answered at once;
            ``keep`` has the worker's own ``pause`` hold them, to go on after the update.
        overlap: Push before the pause, so that it spans the commit alone; workers then hold
            two states while they serve, and cannot be ``in_place``.  None: where the
            worker's class is not, and has no ``release`` of its own, which makes room.
    """

    pause_s: float = 60
    release_s: float = 60
    prepare_s: float = 60
    build_s: float = 120
    transfer_s: float = 600
    commit_s: float = 60
    finalize_s: float = 30
    restore_s: float = 60
    resume_s: float = 60
    fence_s: float = 10
    start_s: float = 600
    total_s: float = 900
    cancel_s: float = 5
    retries: int = 1
    min_serving: int = 1
    replace_dead: bool = True
    replacements: int = 3
    pause: PauseMode = "drain"
    overlap: bool | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name.endswith("_s") and not value > 0:
                raise ConfigError(f"UpdatePolicy: {one.name}={value!r}; it has to be above 0.")
        if self.min_serving < 1 or self.retries < 0 or self.replacements < 0:
            raise ConfigError(
                f"UpdatePolicy: min_serving={self.min_serving} has to be at least 1, "
                f"retries={self.retries} and replacements={self.replacements} at least 0."
            )
        if self.pause not in get_args(PauseMode):
            raise ConfigError(
                f"UpdatePolicy: pause={self.pause!r}; give 'drain', 'abort' or 'keep'."
            )

    def limit_s(self, phase: Phase) -> float:
        """Return how long a phase may take."""
        limit: float = getattr(self, f"{phase.value}_s")
        return limit

    @property
    def bound_s(self) -> float:
        """Seconds after which an update has returned or raised, whatever happens."""
        tries = 1 + self.retries
        forward = self.pause_s + self.release_s + self.prepare_s + self.build_s
        forward = min(self.total_s, forward + self.transfer_s * tries)
        # What was overwritten may have to be pushed and committed again.
        commit = 2 * self.commit_s * tries + self.transfer_s
        clean_up = 2 * self.finalize_s + self.restore_s + self.resume_s
        steps = 11 + 3 * tries
        return forward + commit + clean_up + steps * self.fence_s + 5


@dataclass(slots=True)
class CleanupError:
    """What failed while service was restored.

    Attributes:
        label: The phase and who failed in it.
        error: The exception.
    """

    label: str
    error: BaseException


@dataclass(slots=True)
class UpdateReport:
    """What became of an update.

    Attributes:
        outcome: Whether the new version is served, or the old one, or nothing.
        from_version: Version that was served before, None where none was.
        to_version: Version that was asked for.
        workers: How each worker stands at the end.
        fenced: Workers that were killed, each with the reason.
        phases_s: Seconds that each phase took.
        gap_s: Seconds in which no worker took requests.
        primary: What the update failed of.
        cleanup: What failed while service was restored.
        size_bytes: Size of the state.
    """

    outcome: Outcome | None
    from_version: int | None
    to_version: int
    workers: dict[str, WorkerState] = field(default_factory=dict)
    fenced: dict[str, str] = field(default_factory=dict)
    phases_s: dict[str, float] = field(default_factory=dict)
    gap_s: float = 0.0
    primary: BaseException | None = None
    cleanup: list[CleanupError] = field(default_factory=list)
    size_bytes: int = 0

    @property
    def version(self) -> int | None:
        """Version that is served now, None where none is."""
        if self.outcome is Outcome.COMMITTED:
            return self.to_version
        return self.from_version if self.outcome is Outcome.ROLLED_BACK else None

    @property
    def is_degraded(self) -> bool:
        """Whether fewer workers serve than took part."""
        return any(state is not WorkerState.SERVING for state in self.workers.values())

    def __str__(self) -> str:
        states = ", ".join(f"{name} {state}" for name, state in self.workers.items())
        text = f"version {self.from_version} -> {self.to_version}: {self.outcome}; {states}"
        for name, reason in self.fenced.items():
            text += f"; {name} was fenced: {reason}"
        return text
