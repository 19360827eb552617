"""A run with very many array tasks, for what reads runs: ``python -m tests.support.many DIR``.

Files are written as an attempt's publisher writes them, but without a ledger and without fsync.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from hpcresume.merge.plan import Launch, PlanFooter, deal, make_shards, write_plan
from hpcresume.observe.status import Watcher
from hpcresume.run.directory import AttemptInfo, AttemptRef, Outcome, RunDir, RunInfo
from hpcresume.run.manifest import write_indexed_part
from hpcresume.segment import bitmap as bitmaps
from hpcresume.segment.frame import FrameBuilder
from hpcresume.segment.segment import (
    Failure,
    Progress,
    SegmentFooter,
    StageCount,
    Writer,
    encode_segment,
)

ENDS = {0: ("saved", "preempted"), 1: ("saved", "time-limit"), 2: ("", "")}
PER_TASK = 100


def make_many(directory: Path, *, tasks: int, segments: int = 3) -> RunDir:
    """Create a run of ``tasks`` array tasks with 100 sources each, at work for ten minutes.

    Of every hundred tasks three had an attempt before: preempted, at its time limit, and died
    without a word.  Every fiftieth is done, every tenth has not started.
    """
    info = RunInfo(1, "0123456789abcdef", "many", "many.py", "2026-01-01T00:00:00", "0.1", {})
    run = RunDir.create(str(directory), info)
    total = tasks * PER_TASK
    write_indexed_part(run, 1, first=0, count=total)
    shards = make_shards(deal(bitmaps.span(0, total), tasks), {}, [])
    settings = {"run": {"max_attempts": 3}, "sync": {"max_age_s": 60.0}}
    launch = Launch(cluster="local", array=tasks)
    write_plan(run, PlanFooter(run.run_id, 0, 0, 1, total, tasks, settings, launch), shards)
    for task in range(tasks):
        if task % 10 != 9:
            _make_task(run, task, segments)
    return run


def _make_task(run: RunDir, task: int, segments: int) -> None:
    sources, epoch, began = range(task * PER_TASK, (task + 1) * PER_TASK), 1, 600.0
    if task % 100 in ENDS:
        state, kind = ENDS[task % 100]
        ref = _make_attempt(run, task, epoch, began_s=900.0)
        publish(run, ref, sources[:20], done=20, left=80, elapsed_s=200, age_s=700)
        if state:
            outcome = Outcome(state, kind, kind, completed=20, elapsed_s=220.0)
            _write(run.attempt_path(ref, "outcome.json"), outcome)
        sources, epoch = sources[20:], 2
    ref = _make_attempt(run, task, epoch, began_s=began)
    size, done = len(sources) // (segments + (task % 50 != 0)), 0
    for number in range(segments):
        is_last = task % 50 == 0 and number == segments - 1
        part = list(sources[done:] if is_last else sources[done : done + size])
        done += len(part)
        failing = [part.pop(0)] if task % 100 == 7 and number == 0 else []
        elapsed_s, seq = 600.0 * (number + 1) / segments - 20, number + 1
        publish(run, ref, part, done=done, left=len(sources) - done, elapsed_s=elapsed_s,
                age_s=600 - elapsed_s, seq=seq, failing=failing)  # fmt: skip
    if task % 50 == 0:
        done_outcome = Outcome("done", "", "finished", completed=done, elapsed_s=590.0)
        _write(run.attempt_path(ref, "outcome.json"), done_outcome)


def _make_attempt(run: RunDir, task: int, epoch: int, *, began_s: float) -> AttemptRef:
    ref = AttemptRef(0, task, epoch)
    Path(run.attempt_path(ref)).mkdir(parents=True)
    at = datetime.fromtimestamp(time.time() - began_s, UTC).isoformat(timespec="seconds")
    info = AttemptInfo("n", f"node{task // 4:04d}", "boot", 1, at, 4)
    _write(run.attempt_path(ref, "attempt.json"), info)
    return ref


def publish(
    run: RunDir, ref: AttemptRef, sources, *, done: int, left: int, elapsed_s: float,
    age_s: float, seq: int = 1, failing=(),
) -> None:  # fmt: skip
    """Publish one segment of an attempt."""
    builder = FrameBuilder()
    for source in sources:
        builder.add(source, [])
    stages = [
        StageCount("parse", done, done, 0, len(failing), done * 0.5, 180, {-1: done}),
        StageCount(
            "embed", done, done, 0, 0, done * 3.0, 2100, {1: done // 2, 2: done - done // 2}
        ),
    ]
    footer = SegmentFooter(
        run.run_id, Writer(ref.round, ref.task, ref.epoch), seq, b"", [], False, [], stages,
        ["parse", "embed"], Progress(elapsed_s, time.time() - age_s, 4, done, 0, left), 1,
    )  # fmt: skip
    failures = [
        Failure(s, str(s), str(s), "parse", "UnicodeDecodeError", "invalid byte 0xe9", 1)
        for s in failing
    ]
    data = b"".join(encode_segment(footer, [builder.build()], failures))
    Path(run.attempt_path(ref, f"seg-{seq:06d}-{seq:016x}")).write_bytes(data)


def _write(path: str, record: msgspec.Struct) -> None:
    Path(path).write_bytes(msgspec.json.encode(record))


def main(argv: list[str]) -> None:
    """Make such a run, and measure how long readings of it take."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tasks", type=int, default=10_000)
    options = parser.parse_args(argv)
    if not options.directory.exists():
        make_many(options.directory, tasks=options.tasks)
    run = RunDir.open(str(options.directory))
    watcher = Watcher(run)
    for name in ("first reading", "second", "third"):
        start = time.perf_counter()
        found = watcher.read()
        print(f"{name}: {time.perf_counter() - start:.2f} s, {found.state}, {found.sources}")
    watcher = Watcher(run)
    seen = 0.0
    while seen < 1:
        start = time.perf_counter()
        seen = watcher.read(budget_s=0.5).seen
        print(f"with a budget of 0.5 s: {time.perf_counter() - start:.2f} s, {seen:.0%} seen")


if __name__ == "__main__":
    main(sys.argv[1:])
