"""The publisher: the only process of an attempt that writes to the run directory.

It is expendable.  When shared storage hangs it cannot be killed, so nobody waits for it
without a deadline; the supervisor leaves it behind and starts another.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys

import msgspec

from hpcresume.errors import CorruptDataError, HpcResumeError
from hpcresume.fs import POSIX, FileSystem
from hpcresume.ids import Epoch, RoundIndex, TaskIndex
from hpcresume.ledger.publishing import publish_pending
from hpcresume.ledger.store import Ledger
from hpcresume.run.directory import AttemptRef, RunDir
from hpcresume.task.messages import (
    PUBLISHER_ORDERS,
    AttemptSpec,
    Channel,
    OutcomeWritten,
    Publish,
    PublisherOrder,
    PublisherReport,
    Receipt,
    Recover,
    Recovered,
    Refused,
    WriteOutcome,
)
from hpcresume.task.process import die_with_parent, ignore_job_signals
from hpcresume.task.recovery import publish_dead


class Publisher:
    """Carries out the supervisor's orders, one at a time."""

    def __init__(self, spec: AttemptSpec, fs: FileSystem = POSIX) -> None:
        self._spec = spec
        self._run = RunDir.open(spec.run, fs)
        self._ref = AttemptRef(RoundIndex(spec.round), TaskIndex(spec.task), Epoch(spec.epoch))
        self._ledger: Ledger | None = None
        self._verified = False

    def carry_out(self, order: PublisherOrder) -> PublisherReport:
        """Carry out an order and report."""
        try:
            if isinstance(order, Publish):
                return self._publish(order)
            if isinstance(order, Recover):
                return self._recover(order.directory)
            return self._write_outcome(order)
        except CorruptDataError as error:
            return Refused(str(error), damaged=True)
        except (HpcResumeError, OSError) as error:
            return Refused(str(error))

    def _publish(self, order: Publish) -> Receipt:
        ledger = self._open(verified=order.driver_died)
        receipt = publish_pending(
            ledger,
            self._run,
            seq=order.seq,
            after=order.after,
            max_bytes=order.max_bytes,
            outputs_root=self._spec.outputs,
            parts_root=self._spec.parts,
            death=order.death,
            interrupted_at=order.interrupted_at,
        )
        newest = self._run.newest_epoch(self._ref)
        return Receipt(receipt.last, receipt.sources, newest, self._run.stop_requested())

    def _open(self, *, verified: bool) -> Ledger:
        if verified and not self._verified:
            if self._ledger is not None:
                self._ledger.close()
            self._ledger, self._verified = Ledger.open_verified(self._spec.ledger), True
        elif self._ledger is None:
            # Its writer is alive, and another process may read beside it.
            self._ledger = Ledger(self._spec.ledger)
        return self._ledger

    def _recover(self, directory: str) -> Recovered:
        return Recovered(directory, publish_dead(self._run, directory))

    def _write_outcome(self, order: WriteOutcome) -> OutcomeWritten:
        path = self._run.attempt_path(self._ref, "outcome.json")
        with contextlib.suppress(FileExistsError):
            self._run.write_record(path, order.outcome, label="outcome")
        return OutcomeWritten(self._run.stop_requested())


def main(argv: list[str]) -> None:
    """Serve orders until the pipe closes."""
    spec_path, read_fd, write_fd, parent = argv[1], int(argv[2]), int(argv[3]), int(argv[4])
    ignore_job_signals()
    die_with_parent(parent)
    os.umask(0o077)
    logging.basicConfig(stream=sys.stderr, format="hpcresume publisher: %(message)s")
    with open(spec_path, "rb") as file:
        spec = msgspec.json.decode(file.read(), type=AttemptSpec)
    channel, publisher = Channel(read_fd, write_fd), Publisher(spec)
    while not channel.closed:
        select.select([channel.read_fd], [], [])
        for order in channel.receive(PUBLISHER_ORDERS):
            channel.send(publisher.carry_out(order))


if __name__ == "__main__":
    main(sys.argv)
