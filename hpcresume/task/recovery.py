"""What dead attempts left on this node: published under their own epochs, then swept."""

from __future__ import annotations

import contextlib
import logging
import os
import re

from hpcresume.errors import CorruptDataError, HpcResumeError
from hpcresume.ids import Epoch, RoundIndex, TaskIndex
from hpcresume.ledger.publishing import Death, publish_pending
from hpcresume.ledger.store import Ledger, set_aside
from hpcresume.run.directory import AttemptRef, RunDir
from hpcresume.task.scratch import dead_attempts, end_dead, sweep

log = logging.getLogger(__name__)
_NAME = re.compile(r"(\d+)-(\d+)-(\d+)")


def attempt_of(directory: str) -> AttemptRef | None:
    """Return the attempt that a node-local directory belongs to, by its name."""
    match = _NAME.fullmatch(os.path.basename(directory))
    if match is None:
        return None
    round_, task, epoch = map(int, match.groups())
    return AttemptRef(RoundIndex(round_), TaskIndex(task), Epoch(epoch))


def publish_dead(run: RunDir, directory: str) -> int:
    """Publish what the ledger of a dead attempt still holds; return how many sources.

    A damaged ledger is set aside: what was published before stays, the rest is computed
    again.

    Raises:
        SharedStorageError: The run directory refused; nothing is lost, try again.
    """
    path = os.path.join(directory, "ledger")
    if not os.path.exists(os.path.join(path, "data.mdb")):
        return 0
    try:
        ledger = Ledger.open_verified(path)
    except CorruptDataError as error:
        log.warning("%s", error)
        set_aside(path)
        return 0
    with contextlib.closing(ledger):
        try:
            return _publish_ledger(run, ledger, directory)
        except CorruptDataError as error:
            # A value was damaged, which only reading it tells.
            log.warning("%s", error)
    set_aside(path)
    return 0


def _publish_ledger(run: RunDir, ledger: Ledger, directory: str) -> int:
    identity = ledger.identity()
    if identity.run_id != run.run_id:
        return 0
    writer = identity.writer
    ref = AttemptRef(RoundIndex(writer.round), TaskIndex(writer.task), Epoch(writer.epoch))
    known = run.segments(ref)
    seq, after, sources = known[-1].seq + 1 if known else 1, 0, 0
    while True:
        receipt = publish_pending(
            ledger,
            run,
            seq=seq,
            after=after,
            max_bytes=run.part_bytes() or 1 << 40,
            outputs_root=os.path.join(directory, "outputs"),
            parts_root=os.path.join(directory, "parts"),
            # Its supervisor died with it, which no source's code does: all of it was killed.
            death=Death(charges=False),
        )
        # What was released has numbers, too, and nothing of it is pending.
        is_all = receipt.last in {after, ledger.last_sequence()}
        seq, after, sources = seq + 1, receipt.last, sources + receipt.sources
        if is_all:
            return sources


def recover_node(run: RunDir, local: str) -> int:
    """Publish and sweep everything that dead attempts of a run left here.

    Done before a round is planned on this machine, so that nothing is dealt again that
    only waited to be published.

    Returns:
        How many sources that brought.
    """
    found = 0
    for directory in dead_attempts(local, run_id=run.run_id):
        end_dead(directory)
        try:
            found += publish_dead(run, directory)
        except HpcResumeError as error:
            log.warning("could not recover %s: %s", directory, error)
            continue
        sweep(directory)
    return found
