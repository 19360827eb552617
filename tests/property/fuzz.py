"""Fuzz the readers of published files: ``python -m tests.property.fuzz segment --seconds 600``.

An input is a byte that says how much of it is sealed, then a file.  A sealed file has digests
that fit whatever stands in it, so that the fuzzer gets past them: bit 0 seals the footer,
bit 1 the blocks, bit 2 the frames within the blocks.  A reader may take a file, or refuse it
with CorruptDataError, RunDirError or SourcesError; anything else is a finding, and belongs
into the corpus that ``test_corpus.py`` replays.  Needs the package atheris.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import msgspec

from hpcresume.errors import CorruptDataError, RunDirError, SourcesError
from hpcresume.run import manifest
from hpcresume.run.manifest import Listing, Manifest, refuse_duplicates, write_part
from hpcresume.segment import bitmap, container, frame, segment
from hpcresume.segment.container import MAGIC
from hpcresume.segment.segment import open_segment
from tests.simulation.mutants import functions_of
from tests.support.places import RUN_ID, failure, make_run, segment_bytes, write_file
from tests.support.simfs import SimFileSystem

CORPUS = Path(__file__).with_name("corpus")
_TRAILER = struct.Struct("<32sQ8s")
_HEADER_BYTES = 16
READ_BY = (bitmap, container, frame, segment, manifest)
MOST_ENTRIES = 64


def sealed(data: bytes, how: int) -> bytes:
    """Return a file with digests that fit, as far as ``how`` asks and its parts can be found."""
    if len(data) < _HEADER_BYTES + _TRAILER.size or not how & 7:
        return data
    _, length, _ = _TRAILER.unpack(data[-_TRAILER.size :])
    begin = len(data) - _TRAILER.size - length
    if begin < _HEADER_BYTES:
        return data
    body, footer = bytearray(data[:begin]), data[begin : -_TRAILER.size]
    if how & 6:
        with contextlib.suppress(msgspec.MsgspecError, ValueError, TypeError, struct.error):
            footer = _seal_blocks(body, footer, frames=bool(how & 4))
    return bytes(body) + footer + _TRAILER.pack(hashlib.sha256(footer).digest(), len(footer), MAGIC)


def _seal_blocks(body: bytearray, footer: bytes, *, frames: bool) -> bytes:
    blocks, _, inner = msgspec.msgpack.decode(footer)
    fitting = []
    for offset, length, _ in blocks:
        block = memoryview(body)[offset : offset + length]
        if frames and len(block) > 4:
            block[-4:] = struct.pack("<I", google_crc32c.value(bytes(block[:-4])))
        fitting.append([offset, length, google_crc32c.value(bytes(block))])
    return msgspec.msgpack.encode([fitting, hashlib.sha256(body).digest(), inner])


def read_segment(data: bytes) -> None:
    """Read all of a segment, as merge, publisher and collect do."""
    fs = SimFileSystem()
    write_file(fs, "/s", data)
    found = open_segment(fs, "/s", run_id=RUN_ID)
    found.verify()
    for number in found.frame_numbers():
        one = found.frame(number)
        assert len(one.paths()) == sum(rows.count(b"\n") for _, rows in one.sources())


def read_manifest(data: bytes) -> None:
    """Read all of a manifest of one part, as submit, the driver and collect do."""
    run = make_run(SimFileSystem(), "/run")
    write_file(run.fs, run.part_path(1), data)
    opened = Manifest.open(run)
    opened.withdrawn()
    refuse_duplicates(opened)
    for entry in opened.entries(range(min(opened.total, MOST_ENTRIES))):
        entry.source_id.encode()
    with contextlib.suppress(KeyError):
        opened.find("s1")


READERS: dict[str, Callable[[bytes], None]] = {"segment": read_segment, "manifest": read_manifest}


def is_taken(kind: str, data: bytes) -> bool:
    """Give a fuzzer's input to a reader; tell whether the file was taken."""
    try:
        READERS[kind](sealed(data[1:], data[0]) if data else b"")
    except (CorruptDataError, RunDirError, SourcesError):
        return False
    return True


def whole_files(kind: str) -> list[bytes]:
    """Return files that the fuzzer begins with."""
    if kind == "segment":
        return [
            segment_bytes([(1, 2), (3,)]),
            segment_bytes([range(40), (50, 60)], [failure(70)]),
            segment_bytes([]),
        ]
    found = []
    for count in (0, 3, 70):
        run = make_run(SimFileSystem(), "/run")
        listing = Listing([(f"s{i}", b"p%d" % i, 1.0 + i % 2) for i in range(count)])
        write_part(run, 1, first=0, listing=listing)
        found.append(run.fs.read(run.part_path(1)))
    return found


def main() -> None:
    """Fuzz for a while; what was worth keeping is added to the corpus."""
    parser = argparse.ArgumentParser(prog="python -m tests.property.fuzz", description=__doc__)
    parser.add_argument("kind", choices=sorted(READERS))
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path, help="where inputs are kept [default: the tests']")
    options = parser.parse_args()
    try:
        import atheris
    except ImportError:
        sys.exit("fuzzing needs atheris, which is not installed. Run: pip install atheris")
    corpus = options.corpus or CORPUS / options.kind
    corpus.mkdir(parents=True, exist_ok=True)
    for whole in whole_files(options.kind):
        for how in range(8):
            data = bytes([how]) + whole
            (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    for module in READ_BY:
        for function in functions_of(module).values():
            atheris.instrument_func(function)
    flags = [f"-max_total_time={options.seconds}", "-max_len=4096", "-timeout=20"]
    atheris.Setup([sys.argv[0], str(corpus), *flags], lambda data: is_taken(options.kind, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
