"""What the three processes of an attempt say to each other: JSON lines over pipes.

The supervisor orders, driver and publisher report.  A pipe that closes is a death.
"""

from __future__ import annotations

import contextlib
import os
from typing import TypeVar

import msgspec

from hpcresume.ledger.publishing import Death
from hpcresume.run.directory import Outcome


class AttemptSpec(msgspec.Struct, frozen=True):
    """What driver and publisher need to know of their attempt.

    Attributes:
        run: Path of the run directory.
        round: Number of the round.
        task: Number of the array task.
        epoch: Number of the attempt.
        local: Node-local directory of the attempt.
        ray_temp: Ray's own directory.
        code: Number of the code snapshot.
        cpus: Cores of the task.
        gpus: GPUs of the task.
        memory_bytes: Memory of the task.
        memory_mib: The same as Slurm gave it; 0: this is not Slurm, or nobody knows.
        memory_limit: Why a source that needs more cannot be given it; empty: it can.
        engine: ``ray`` or ``inline``.
        workers: Number of workers, 0: as many as the cores allow.
        max_attempts: Tries per source.
        chunk_target_s: Work that one call is to hold.
        chunk_max: Most sources in one call.
    """

    run: str
    round: int
    task: int
    epoch: int
    local: str
    ray_temp: str
    code: int
    cpus: int
    gpus: int
    memory_bytes: int
    memory_mib: int
    memory_limit: str
    engine: str
    workers: int
    max_attempts: int
    chunk_target_s: float
    chunk_max: int

    @property
    def ledger(self) -> str:
        """Directory of the ledger."""
        return os.path.join(self.local, "ledger")

    @property
    def outputs(self) -> str:
        """Directory of the files of ``ctx.output``."""
        return os.path.join(self.local, "outputs")

    @property
    def parts(self) -> str:
        """Directory of the blobs of ``hr.Parts``."""
        return os.path.join(self.local, "parts")


class Work(msgspec.Struct, frozen=True):
    """What is left of the shard.

    Attributes:
        sources: Bitmap of its sources.
        attempts: Tries charged so far, by source.
        suspects: Bitmaps of sources that were in flight at an unexplained death.
        ran: Seconds that an attempt worked on a source without finishing it.
    """

    sources: bytes
    attempts: dict[int, int]
    suspects: list[bytes]
    ran: dict[int, float]


# -- supervisor to driver ---------------------------------------------------------------------


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Admit nothing more; end when drained, or at ``deadline`` (monotonic seconds)."""

    deadline: float


class FinishBy(msgspec.Struct, frozen=True, tag=True):
    """Start no source that is not expected to finish by ``deadline`` (monotonic seconds)."""

    deadline: float


class Hold(msgspec.Struct, frozen=True, tag=True):
    """Admit nothing for now, or go on: too much is at risk on this node."""

    on: bool


class Published(msgspec.Struct, frozen=True, tag=True):
    """Commits up to ``last`` are published and may be deleted."""

    last: int


# -- driver to supervisor ---------------------------------------------------------------------


class Report(msgspec.Struct, frozen=True, tag=True):
    """How the driver stands.

    Attributes:
        last: Sequence number of the last commit on disk.
        committed: Sources committed so far.
        unpublished_bytes: Bytes of frames handed to the ledger since the last receipt.
        in_flight: Sources that workers hold.
        failing: Sources that failed and will be tried again.
        quarantined: Sources given up.
        left: Sources that are not settled.
        ready: Whether the workers have started.
        lacks_time: Whether nothing runs because no source that is left is expected to finish
            in time.
        oom_deaths: Workers that died because memory ran out.
    """

    last: int
    committed: int
    unpublished_bytes: int
    in_flight: int
    failing: int
    quarantined: int
    left: int
    ready: bool
    lacks_time: bool
    oom_deaths: int = 0


class Ended(msgspec.Struct, frozen=True, tag=True):
    """The driver is done; everything it committed is on its disk.

    Attributes:
        kind: As in :class:`~hpcresume.run.directory.Outcome`.
        reason: For people.
        stage: The stage that is broken, if one is.
        last: Sequence number of the last commit.
    """

    kind: str
    reason: str
    last: int
    stage: str = ""


# -- supervisor to publisher --------------------------------------------------------------------


class Publish(msgspec.Struct, frozen=True, tag=True):
    """Publish the commits after ``after``.

    Attributes:
        after: Commits up to here are published.
        seq: Number of the segment.
        max_bytes: Size of one segment.
        driver_died: Verify the ledger first.
        death: How the driver died, if not on purpose: what was in flight is recorded.
        interrupted_at: When the attempt was stopped with sources in work (monotonic seconds).
    """

    after: int
    seq: int
    max_bytes: int
    driver_died: bool = False
    death: Death | None = None
    interrupted_at: float | None = None


class Recover(msgspec.Struct, frozen=True, tag=True):
    """Publish what the ledger of a dead attempt still holds."""

    directory: str


class WriteOutcome(msgspec.Struct, frozen=True, tag=True):
    """Publish how the attempt ended."""

    outcome: Outcome


# -- publisher to supervisor --------------------------------------------------------------------


class Receipt(msgspec.Struct, frozen=True, tag=True):
    """Commits up to ``last`` are published.

    Attributes:
        last: Sequence number of the last commit covered.
        sources: Completed sources in the segment.
        newest_epoch: The newest attempt of this task that the run directory shows.
        stop: Whether the run directory holds a stop mark.
    """

    last: int
    sources: int
    newest_epoch: int
    stop: bool


class Recovered(msgspec.Struct, frozen=True, tag=True):
    """The ledger of a dead attempt is published, or was damaged and set aside."""

    directory: str
    sources: int


class OutcomeWritten(msgspec.Struct, frozen=True, tag=True):
    """The outcome is published.

    Attributes:
        stop: Whether the run directory holds a stop mark.
    """

    stop: bool


class Refused(msgspec.Struct, frozen=True, tag=True):
    """An order could not be carried out.

    Attributes:
        reason: For people.
        damaged: Whether the ledger is damaged, so that trying again is useless.
    """

    reason: str
    damaged: bool = False


DriverOrder = Stop | FinishBy | Hold | Published
DriverReport = Report | Ended
PublisherOrder = Publish | Recover | WriteOutcome
PublisherReport = Receipt | Recovered | OutcomeWritten | Refused
MessageT = TypeVar("MessageT")

# A union has no place in type[...]; a typed decoder says what each end receives.
DRIVER_ORDERS: msgspec.json.Decoder[DriverOrder] = msgspec.json.Decoder(DriverOrder)
DRIVER_REPORTS: msgspec.json.Decoder[DriverReport] = msgspec.json.Decoder(DriverReport)
PUBLISHER_ORDERS: msgspec.json.Decoder[PublisherOrder] = msgspec.json.Decoder(PublisherOrder)
PUBLISHER_REPORTS: msgspec.json.Decoder[PublisherReport] = msgspec.json.Decoder(PublisherReport)


class Channel:
    """One end of a pair of pipes; reading never blocks."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.read_fd, self._write_fd, self._buffer = read_fd, write_fd, b""
        self.closed = False
        os.set_blocking(read_fd, False)

    def send(self, message: msgspec.Struct) -> None:
        """Send a message; a dead receiver is noticed when reading, not here."""
        with contextlib.suppress(BrokenPipeError):
            data = msgspec.json.encode(message) + b"\n"
            while data:
                data = data[os.write(self._write_fd, data) :]

    def receive(self, decoder: msgspec.json.Decoder[MessageT]) -> list[MessageT]:
        """Return the messages that have arrived; sets ``closed`` when the other end is gone."""
        while not self.closed:
            try:
                data = os.read(self.read_fd, 1 << 16)
            except BlockingIOError:
                break
            self.closed = not data
            self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        return [decoder.decode(line) for line in lines]

    def close(self) -> None:
        """Close both pipes."""
        for fd in (self.read_fd, self._write_fd):
            with contextlib.suppress(OSError):
                os.close(fd)
