"""Runs made without running them, and plain Python to compare with."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyroaring import BitMap

from hpcresume.fs import publish
from hpcresume.run.directory import RunDir, RunInfo
from hpcresume.run.manifest import write_indexed_part
from hpcresume.segment import bitmap as bitmaps
from hpcresume.segment.container import encode_container
from hpcresume.segment.segment import KIND, Progress, SegmentFooter, Writer

WRITERS, SEGMENTS = 64, 1300
COPY = """
import sys
with open(sys.argv[1], "rb") as source, open(sys.argv[2], "wb") as target:
    for line in source:
        target.write(line)
"""
UNION = """
import json, resource, sys, time
from hpcresume.merge.generation import read_union
from hpcresume.run.directory import RunDir
from hpcresume.run.manifest import Manifest
run = RunDir.open(sys.argv[1])
start, cpu = time.perf_counter(), time.process_time()
union = read_union(run, max_attempts=3)
total = Manifest.open(run).total
from hpcresume.segment.bitmap import span
left = span(0, total) - union.settled()
seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
found = {"completed": len(union.completed), "left": len(left), "peak_mib": peak, "cpu_s": cpu_s}
print(json.dumps({"s": seconds, **found}))
"""


def union_s(
    directory: Path, sources: int, *, is_cold: bool = False
) -> tuple[float, dict[str, Any]]:
    """Return the seconds that union and remainder of 64 writers take in a new process.

    Args:
        directory: Where the run is made.
        sources: How many they are.
        is_cold: Whether the kernel is to forget what it holds of the segments.
    """
    run = RunDir.create(str(directory / "run"), RunInfo(1, "0" * 16, "u", "u", "", "0", {}))
    write_indexed_part(run, 1, first=0, count=sources)
    share, done = sources // WRITERS, 0
    per_writer = -(-SEGMENTS // WRITERS)
    for writer in range(WRITERS):
        ref = run.allocate_attempt(0, writer)
        for n in range(per_writer):
            first = writer * share + n * share // per_writer
            last = writer * share + (n + 1) * share // per_writer
            # Chunks end in any order, and one in a thousand is missing.
            completed = bitmaps.span(first, last) - BitMap(range(first, last, 1000))
            done += len(completed)
            footer = SegmentFooter(
                run.run_id, Writer(0, writer, 1), n + 1, bitmaps.dump(completed), [], False, [], [],
                ["a"], Progress(), 1,
            )  # fmt: skip
            path = run.attempt_path(ref, f"seg-{n + 1:06d}-{writer:016x}")
            publish(run.fs, path, encode_container(KIND, (), footer), label="segment")
            if is_cold:
                run.fs.drop_cache(path)
    script = [sys.executable, "-c", UNION, run.path]
    found = json.loads(subprocess.run(script, capture_output=True, check=True).stdout)
    assert (done, sources - done) == (found["completed"], found["left"])
    return found["s"], found | {"segments": WRITERS * per_writer}


def batch(source: int, rows: int = 20_000) -> Any:
    """Return the batch that a source makes in the pipeline of the benchmark."""
    ids = np.arange(source * rows, (source + 1) * rows)
    return pa.record_batch({"id": ids, "x": np.sqrt(ids), "s": pa.array(ids).cast("string")})


def plain_parquet(directory: Path, sources: int) -> float:
    """Return the batches per second of pyarrow writing the same to one file."""
    start = time.perf_counter()
    with pq.ParquetWriter(directory / "out.parquet", batch(0).schema, compression="zstd") as writer:
        for source in range(sources):
            writer.write_batch(batch(source))
    return sources / (time.perf_counter() - start)


def check_batches(directory: Path, sources: int) -> None:
    """Compare a directory of parts with the batches that are expected."""
    ids = np.sort(pq.read_table(directory, columns=["id"]).column("id").to_numpy())
    assert np.array_equal(ids, np.arange(sources * 20_000)), f"{directory} holds other rows"
