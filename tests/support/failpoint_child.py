"""A process that publishes and says what it was promised, for tests that stop it midway.

``python -m tests.support.failpoint_child SCENARIO RUN LOCAL LABEL`` writes one line for every
promise; each line is written only after the call that makes the promise has returned.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TypeVar

from pyroaring import BitMap

from hpcresume.errors import HpcResumeError
from hpcresume.fs import POSIX, ensure_directory, publish
from hpcresume.ids import ROOT
from hpcresume.ledger.publishing import output_path, publish_pending
from hpcresume.ledger.store import Batch, Ledger, LedgerIdentity, StoredBlob
from hpcresume.merge.generation import read_union, write_generation
from hpcresume.merge.plan import Launch, PlanFooter, make_shards, write_plan
from hpcresume.run.directory import RunDir, probe_writable
from hpcresume.run.manifest import Listing, write_part
from hpcresume.segment.frame import blob_of
from hpcresume.segment.segment import Writer
from hpcresume.sinks.packing import JsonlPacker, Packed, Packer, RowsPacker
from tests.support.places import RUN_ID, make_run, publish_segment, row

WRITER = Writer(0, 0, 1)
CYCLES = 5
SOURCES = 3
ResultT = TypeVar("ResultT")


def say(*words: object) -> None:
    """Write one line in one call."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def insist(call: Callable[[], ResultT]) -> ResultT:
    """Call until it succeeds; say each typed error.  Any other exception ends the process."""
    for _ in range(4):
        try:
            return call()
        except HpcResumeError as error:
            say("error", type(error).__name__)
    raise AssertionError("it never succeeded")


def open_ledger(local: str, *, has_parts: bool) -> Ledger:
    """Return the attempt's ledger, new or as a dead process left it."""
    path = os.path.join(local, "ledger")
    if os.path.exists(path):
        return Ledger.open_verified(path)
    return Ledger.create(path, LedgerIdentity(RUN_ID, WRITER, 1, ["a"], has_parts=has_parts))


def source_frame(outputs: str, packer: Packer, sources: range) -> bytes:
    """Return a frame of sources, the first of which has a file."""
    name = f"s{sources[0]}"
    local = output_path(outputs, name, "", "f.bin")
    os.makedirs(os.path.dirname(local), exist_ok=True)
    with open(local, "wb") as file:
        file.write(name.encode())
    files = {sources[0]: [(ROOT, "f.bin")]}
    return packer.pack([Packed(s, f"s{s}", [(ROOT, row(s))], files.get(s, ())) for s in sources])


def work(run_path: str, local: str, label: str) -> None:
    """Commit and publish in a loop, with rows in parts where the label is theirs."""
    has_parts, parts = label == "part", os.path.join(local, "parts")
    os.makedirs(parts, exist_ok=True)
    packer = JsonlPacker(parts) if has_parts else RowsPacker()
    run = RunDir.open(run_path)
    ledger = insist(lambda: open_ledger(local, has_parts=has_parts))
    outputs = os.path.join(local, "outputs")
    for cycle in range(CYCLES):
        sources = range(cycle * SOURCES, (cycle + 1) * SOURCES)
        frame = source_frame(outputs, packer, sources)
        blob = blob_of(frame, what="a frame")
        blobs = [] if blob is None else [StoredBlob.of(blob, parts)]
        insist(lambda frame=frame, blobs=blobs: ledger.commit(Batch(frames=[frame], blobs=blobs)))
        say("committed", *sources)
        receipt = insist(
            lambda cycle=cycle: publish_pending(
                ledger, run, seq=cycle + 1, outputs_root=outputs, parts_root=parts
            )
        )
        say("receipt", receipt.name, receipt.digest.hex(), *sources)
        ledger.release(receipt.last)
    ledger.close()


def merge(run_path: str, _local: str, _label: str) -> None:
    """Publish segments and merge after each."""
    run = RunDir.open(run_path)
    for cycle in range(CYCLES):
        # From the last writer to the first, so that every merge could change winners.
        sources = [0, cycle + 1]
        publish_segment(run, (0, CYCLES - cycle, 1), 1, sources)
        union = insist(lambda: read_union(run, max_attempts=3))
        try:
            number = insist(lambda union=union: write_generation(run, union))
        except FileExistsError:
            continue
        say("generation", number, *sorted(union.completed))


def start(run_path: str, _local: str, _label: str) -> None:
    """Do all that is done before a round begins; a second process goes on where one died."""
    run = insist(lambda: make_run(POSIX, run_path))
    say("run", run.run_id)
    insist(lambda: probe_writable(run_path))
    listing = [(f"s{n}", b"payload", 1.0) for n in range(100)]
    receipt = insist(lambda: write_part(run, 1, first=0, listing=Listing(iter(listing))))
    say("file", receipt.path, receipt.digest.hex())
    footer = PlanFooter(RUN_ID, 0, 0, 1, 100, 2, {}, Launch("slurm", 2))
    shards = make_shards([BitMap(range(50)), BitMap(range(50, 100))], {}, [])
    receipt = insist(lambda: write_plan(run, footer, shards))
    say("file", receipt.path, receipt.digest.hex())
    say("claim", insist(lambda: run.claim_round(0, str(os.getpid()))))
    for kind in ("stop", "resume", "stop"):
        insist(lambda kind=kind: run.set_mark(kind))
        say("mark", kind)


def plain(run_path: str, _local: str, label: str) -> None:
    """Publish files under a label, over new names and over names that stand for the content."""
    ensure_directory(POSIX, run_path)
    for cycle in range(CYCLES):
        for exclusive in (True, False):
            path = os.path.join(run_path, f"{label}-{cycle}-{int(exclusive)}")
            data = f"{path}\n".encode() * 1000
            receipt = insist(
                lambda path=path, data=data, exclusive=exclusive: publish(
                    POSIX, path, [data[:100], data[100:]], label=label, exclusive=exclusive
                )
            )
            say("file", receipt.path, receipt.digest.hex())


if __name__ == "__main__":
    {"work": work, "merge": merge, "start": start, "plain": plain}[sys.argv[1]](*sys.argv[2:])
    say("done")
