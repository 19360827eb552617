"""What a dead attempt left on a node."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyroaring import BitMap

from hpcresume.ids import Epoch, RoundIndex, TaskIndex
from hpcresume.ledger.store import Batch, InFlight, Ledger, LedgerIdentity
from hpcresume.merge.generation import read_union
from hpcresume.run.directory import AttemptRef
from hpcresume.run.manifest import Listing, write_part
from hpcresume.segment.segment import Writer
from hpcresume.task.recovery import publish_dead
from tests.support.places import Place


@pytest.mark.parametrize("alone", [False, True])
def test_a_task_that_was_killed_whole_charges_nobody(tmp_path: Path, alone: bool) -> None:
    """
    However often all of a task is killed, not even a source that ran alone has been tried by
    it; what was in flight is suspect, and runs alone next.
    """
    run = Place.make("posix", tmp_path / "shared").run()
    write_part(run, 1, first=0, listing=Listing((f"s{n}", b"", 1.0) for n in range(10)))
    for epoch in range(1, 6):
        ref = AttemptRef(RoundIndex(0), TaskIndex(0), Epoch(epoch))
        run.ensure(run.attempt_path(ref))
        directory = tmp_path / f"0-0-{epoch}"
        identity = LedgerIdentity(run.run_id, Writer(0, 0, epoch), 1, ["stage"])
        ledger = Ledger.create(str(directory / "ledger"), identity)
        ledger.commit(Batch(mark={1: InFlight(BitMap([7]), alone=alone).encode()}))
        ledger.close()
        assert 0 == publish_dead(run, str(directory))

    union = read_union(run, max_attempts=3)
    assert ({}, set(), [BitMap([7])]) == (
        union.attempts(),
        set(union.quarantined()),
        union.open_suspects(),
    )
