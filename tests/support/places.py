"""Directories, frames and segments on any file system, and children, for tests of the core."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyroaring import BitMap

from hpcresume.fs import FileSystem, PosixFileSystem, publish
from hpcresume.ids import Epoch, ItemPath, RoundIndex, TaskIndex
from hpcresume.run.directory import AttemptRef, RunDir, RunInfo, SegmentName
from hpcresume.segment import bitmap as bitmaps
from hpcresume.segment.frame import FrameBuilder
from hpcresume.segment.segment import (
    Failure,
    Progress,
    SegmentFooter,
    Writer,
    encode_segment,
)
from tests.support.simfs import SimFileSystem

REPOSITORY = Path(__file__).resolve().parents[2]
RUN_ID = "0123456789abcdef"


@dataclass(frozen=True)
class Place:
    """A directory on a POSIX or on a simulated file system."""

    fs: FileSystem
    root: str

    @classmethod
    def make(cls, kind: str, tmp_path: Path) -> Place:
        """Return an empty directory on the file system of that kind."""
        if kind == "posix":
            return cls(PosixFileSystem(), str(tmp_path))
        sim = SimFileSystem()
        sim.mkdir("/shared")
        sim.sync_directory("/")
        return cls(sim, "/shared")

    def path(self, *names: str) -> str:
        """Return a path below the directory."""
        return os.path.join(self.root, *names)

    def run(self) -> RunDir:
        """Return a new run directory."""
        return make_run(self.fs, self.path("run"))


def run_info(run_id: str = RUN_ID) -> RunInfo:
    """Return what a run is, all of it made up but the id."""
    return RunInfo(1, run_id, "test", "test.py", "2024-01-01T00:00:00Z", "0", {"stages": ["a"]})


def make_run(fs: FileSystem, path: str, run_id: str = RUN_ID) -> RunDir:
    """Create and open a run directory."""
    return RunDir.create(path, run_info(run_id), fs)


def row(source: int, n: int = 0) -> bytes:
    """Return the line that a source's ``n``-th item makes, the same in every attempt."""
    return b'{"source":%d,"n":%d}\n' % (source, n)


def frame(sources: Iterable[int], *, rows: int = 1) -> bytes:
    """Return a frame that completes the sources, each with so many rows."""
    builder = FrameBuilder()
    for source in sorted(sources):
        builder.add(source, [(ItemPath((n,)), row(source, n)) for n in range(rows)])
    return builder.build()


def failure(source: int, attempt: int = 1, **values: Any) -> Failure:
    """Return a failure record."""
    known = {"item": f"id{source}/a.0", "stage": "a", "kind": "ValueError", "message": "no"}
    return Failure(source=source, source_id=f"id{source}", attempt=attempt, **{**known, **values})


def footer_of(
    writer: Writer,
    seq: int = 1,
    *,
    suspects: Sequence[Iterable[int]] = (),
    ran: Mapping[int, float] | None = None,
    run_id: str = RUN_ID,
) -> SegmentFooter:
    """Return a footer that :func:`encode_segment` fills."""
    return SegmentFooter(
        run_id=run_id,
        writer=writer,
        seq=seq,
        completed=b"",
        chunks=[],
        has_failures=False,
        suspects=[bitmaps.dump(BitMap(group)) for group in suspects],
        stages=[],
        stage_names=["a"],
        progress=Progress(),
        code=1,
        ran=dict(ran or {}),
    )


def segment_bytes(
    chunks: Iterable[Iterable[int]] = ((1, 2), (3,)),
    failures: Sequence[Failure] = (),
    *,
    writer: Writer | None = None,
    run_id: str = RUN_ID,
) -> bytes:
    """Return a whole segment."""
    footer = footer_of(writer or Writer(0, 0, 1), run_id=run_id)
    return b"".join(encode_segment(footer, map(frame, chunks), list(failures)))


def segment_name(writer: tuple[int, int, int], seq: int, digest: str = "0" * 16) -> SegmentName:
    """Return the name of a segment of an attempt."""
    ref = AttemptRef(RoundIndex(writer[0]), TaskIndex(writer[1]), Epoch(writer[2]))
    return SegmentName(ref, f"seg-{seq:06d}-{digest}")


def publish_segment(
    run: RunDir,
    writer: tuple[int, int, int],
    seq: int,
    sources: Iterable[int] = (),
    *,
    failures: Sequence[Failure] = (),
    suspects: Sequence[Iterable[int]] = (),
    ran: Mapping[int, float] | None = None,
    short_mib: int = 0,
    digest: str = "0" * 16,
) -> SegmentName:
    """Publish a segment under the attempt of ``writer`` and return its name."""
    name = segment_name(writer, seq, digest)
    make_directories(run.fs, run.attempt_path(name.attempt))
    sources = list(sources)
    frames = [frame(sources)] if sources else []
    footer = footer_of(Writer(*writer), seq, suspects=suspects, ran=ran, run_id=run.run_id)
    footer.short_mib = short_mib
    parts = encode_segment(footer, frames, list(failures))
    publish(run.fs, run.segment_path(name), parts, label="segment")
    return name


def make_directories(fs: FileSystem, path: str) -> None:
    """Create a directory and its parents, as nothing but the file system's own calls."""
    if not fs.exists(path):
        make_directories(fs, os.path.dirname(path))
        fs.mkdir(path)


def write_file(fs: FileSystem, path: str, data: bytes) -> None:
    """Write a file as a test wants it, damaged or not, in place of what was there."""
    if fs.exists(path):
        fs.unlink(path)
    handle = fs.create(path)
    handle.write(data)
    handle.sync()
    handle.close()


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a child that imports the package under test."""
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH", ""))))
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HPCRESUME_")}
    return {**kept, "PYTHONPATH": path, **(extra or {})}


def run_child(
    script: str, *args: str, env: Mapping[str, str] | None = None, timeout_s: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run a Python script in a process of its own and return how it ended."""
    return subprocess.run(
        [sys.executable, "-c", script, *args],
        env=child_environment(env),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
