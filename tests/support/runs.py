"""Small run directories made through the core's own API, for tests that read runs."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from pyroaring import BitMap

from hpcresume.fs import publish
from hpcresume.ids import ItemPath
from hpcresume.ledger.publishing import PublishReceipt, publish_pending
from hpcresume.ledger.store import Batch, Ledger, LedgerIdentity, LedgerState
from hpcresume.merge.generation import Union, read_union, write_generation
from hpcresume.merge.plan import Launch, PlanFooter, deal, make_shards, write_plan
from hpcresume.observe.liveness import boot_id
from hpcresume.run.directory import (
    AttemptInfo,
    AttemptRef,
    JobRecord,
    Outcome,
    RunDir,
    RunInfo,
    SegmentName,
)
from hpcresume.run.manifest import Listing, Manifest, write_indexed_part, write_part
from hpcresume.segment import bitmap as bitmaps
from hpcresume.segment.frame import FrameBuilder
from hpcresume.segment.segment import Failure, Progress, StageCount, Writer

RUN_ID = "0123456789abcdef"
STAGES = ("parse", "split")
Rows = Sequence[tuple[tuple[int, ...], Any]]


def numbered_rows(index: int, source_id: str) -> Rows:
    """One row for each source, which says whose it is."""
    return [((0, 0), {"index": index, "id": source_id})]


@dataclass
class MadeRun:
    """A run directory and what is needed to publish into it."""

    run: RunDir
    ids: list[str]
    scratch: Path
    max_attempts: int = 3
    _ledgers: int = field(default=0)

    @property
    def path(self) -> str:
        """Path of the run directory, as the command line takes it."""
        return self.run.path

    def plan(
        self,
        *,
        round_: int = 0,
        tasks: int = 1,
        generation: int = 0,
        cluster: str = "local",
        site: Mapping[str, Any] | None = None,
        code: int = 1,
    ) -> None:
        """Plan a round over what is left."""
        left = bitmaps.span(0, len(self.ids)) - self.union().settled()
        shards = make_shards(deal(left, tasks), {}, [])
        settings = {"run": {"max_attempts": self.max_attempts}, "site": dict(site or {})}
        launch = Launch(cluster=cluster, array=len(shards))
        footer = PlanFooter(
            self.run.run_id, round_, generation, code, len(left), len(shards), settings, launch
        )
        write_plan(self.run, footer, shards)

    def job(self, *, round_: int = 0, **values: Any) -> None:
        """Record what was submitted for a round."""
        record = JobRecord(**{"cluster": "local", "array": "", **values})
        path = self.run.round_path(round_, "jobs", f"{len(self.run.job_records(round_)):03d}.json")
        self.run.write_record(path, record, label="record")

    def attempt(
        self,
        task: int = 0,
        *,
        round_: int = 0,
        host: str = "",
        pid: int | None = None,
        started_at: str = "",
        array_job_id: str | None = None,
        job_id: str | None = None,
    ) -> AttemptRef:
        """Start an attempt; by default its process is this one."""
        ref = self.run.allocate_attempt(round_, task)
        info = AttemptInfo(
            nonce="n",
            host=host or socket.gethostname(),
            boot_id=boot_id(),
            pid=os.getpid() if pid is None else pid,
            started_at=started_at,
            cpus=1,
            array_job_id=array_job_id,
            job_id=job_id,
        )
        self.run.write_record(self.run.attempt_path(ref, "attempt.json"), info, label="record")
        return ref

    def end(self, ref: AttemptRef, state: str = "done", **values: Any) -> None:
        """Write how an attempt ended."""
        outcome = Outcome(**{"state": state, "reason": "", "kind": "finished", **values})
        self.run.write_record(self.run.attempt_path(ref, "outcome.json"), outcome, label="record")

    def publish(
        self,
        ref: AttemptRef,
        frames: Iterable[Iterable[int]] = (),
        *,
        seq: int = 1,
        rows: Any = numbered_rows,
        failures: Sequence[Failure] = (),
        files: Mapping[int, Sequence[tuple[tuple[int, ...], str, bytes]]] | None = None,
        stages: Sequence[StageCount] = (),
        progress: Progress | None = None,
    ) -> PublishReceipt:
        """Publish one segment through a ledger: frames of source indices."""
        self._ledgers += 1
        outputs = self.scratch / f"outputs-{self._ledgers}"
        identity = LedgerIdentity(
            self.run.run_id, Writer(ref.round, ref.task, ref.epoch), 1, list(STAGES)
        )
        ledger = Ledger.create(str(self.scratch / f"ledger-{self._ledgers}"), identity)
        encoded = [self._frame(indices, rows, files or {}, outputs) for indices in frames]
        state = LedgerState(list(stages), progress or Progress())
        ledger.commit(Batch(frames=encoded, failures=list(failures), state=state))
        receipt = publish_pending(ledger, self.run, seq=seq, outputs_root=str(outputs))
        ledger.close()
        return receipt

    def _frame(
        self,
        indices: Iterable[int],
        rows: Any,
        files: Mapping[int, Sequence[tuple[tuple[int, ...], str, bytes]]],
        outputs: Path,
    ) -> bytes:
        from hpcresume.ids import encode_path
        from hpcresume.ledger.publishing import output_path

        builder = FrameBuilder()
        for index in sorted(indices):
            source_id = self.ids[index]
            made = [
                (ItemPath(tuple(p)), orjson.dumps(row) + b"\n") for p, row in rows(index, source_id)
            ]
            builder.add(index, made)
            given = files.get(index, ())
            for path, name, data in given:
                local = Path(
                    output_path(str(outputs), source_id, encode_path(ItemPath(path)), name)
                )
                local.parent.mkdir(parents=True, exist_ok=True)
                local.write_bytes(data)
            if given:
                builder.add_files(source_id, [(ItemPath(path), name) for path, name, _ in given])
        return builder.build()

    def failure(self, index: int, *, retry: bool = True, **values: Any) -> Failure:
        """Return a failure record of a source."""
        source_id = self.ids[index]
        known = {
            "item": f"{source_id}/parse.0",
            "stage": "split",
            "kind": "ValueError",
            "message": "bad input",
            "attempt": 1,
            "traceback": 'Traceback:\n  File "p.py", line 3\nValueError: bad input\n',
        }
        return Failure(source=index, source_id=source_id, retry=retry, **{**known, **values})

    def union(self) -> Union:
        """Return what is done now."""
        return read_union(self.run, max_attempts=self.max_attempts)

    def merge(self, *, finished: bool = False, stopped: str = "") -> Union:
        """Write a generation."""
        union = self.union()
        union.finished, union.stopped = finished, stopped
        write_generation(self.run, union)
        return union

    def finish(self) -> Union:
        """Write the generation that ends the run."""
        return self.merge(finished=True)

    def withdraw(self, *indices: int) -> None:
        """Add a manifest part that withdraws sources and adds none."""
        number = self.run.part_numbers()[-1] + 1
        listing = Listing([])
        write_part(
            self.run, number, first=len(self.ids), listing=listing, withdrawn=BitMap(indices)
        )

    def damage(self, ref: AttemptRef, receipt: PublishReceipt, *, at: int = 60) -> None:
        """Flip a byte in the body of a published segment."""
        path = Path(self.run.segment_path(SegmentName(ref, receipt.name)))
        data = bytearray(path.read_bytes())
        data[at] ^= 0xFF
        path.write_bytes(bytes(data))

    def log(self, name: str, text: str, *, round_: int = 0) -> Path:
        """Write a log file."""
        path = Path(self.run.logs_path(round_, name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path


def make_run(
    directory: Path,
    *,
    sources: int | Sequence[str] = 10,
    tasks: int | None = 1,
    tolerate: float = 0.0,
    max_attempts: int = 3,
    name: str = "run",
    created_at: str = "2026-01-01T00:00:00",
) -> MadeRun:
    """Create a run directory with its manifest and, unless ``tasks`` is None, its first plan.

    Args:
        directory: Where it is made, beside what it needs of scratch.
        sources: Ids, or how many sources there are: few get ids, very many are indexed.
        tasks: Shards of round 0.
        tolerate: The pipeline's tolerance.
        max_attempts: Tries before a source is quarantined.
        name: Name of the run directory.
        created_at: When it says it was made.
    """
    info = RunInfo(1, RUN_ID, "demo", "demo.py", created_at, "0.1", {"tolerate": tolerate})
    run = RunDir.create(str(directory / name), info)
    ids = [f"s{i}.txt" for i in range(sources)] if isinstance(sources, int) else list(sources)
    if isinstance(sources, int) and sources > 100_000:
        ids = [str(i) for i in range(sources)]
        write_indexed_part(run, 1, first=0, count=sources)
    else:
        write_part(run, 1, first=0, listing=Listing((i, b"j1", 1.0) for i in ids))
    scratch = directory / f"{name}-scratch"
    scratch.mkdir()
    made = MadeRun(run, ids, scratch, max_attempts)
    assert Manifest.open(run).total == len(ids)
    if tasks is not None:
        made.plan(tasks=tasks)
    return made


def publish_raw(made: MadeRun, path: str, data: bytes) -> None:
    """Publish bytes under a name of the run directory."""
    publish(made.run.fs, made.run.join(path), [data], label="record")
