"""Runs over the chunks of large files: killed within a file, grown, changed, damaged."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import hpcresume as hr
from tests.support.cli import Command, wait_until
from tests.support.local import Desk, Ended, kill_family

NUMBERS = """
    import os
    import time
    from pathlib import Path

    def held():
        calls, gate = Path("calls"), Path("gate")
        read = calls.stat().st_size // 10 if calls.exists() else 0
        return gate.exists() and read >= int(gate.read_text())

    def total(chunk):
        while held():
            time.sleep(0.05)
        rows = total = 0
        for row in chunk:
            rows, total = rows + 1, total + row["n"]
        with open("calls", "a") as calls:
            calls.write(f"{chunk.first:09d}\\n")
        return {"first": chunk.first, "rows": rows, "total": total}

    def pipeline(path: Path, rows: int = 1000):
        return hr.Pipeline(name="numbers", sources=hr.chunks(path, rows=rows), stages=[total])
"""


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A user's directory with the pipeline in it."""
    desk = Desk.make(tmp_path)
    desk.write("totals.py", NUMBERS)
    return desk


def write_numbers(path: Path, numbers: range, *, mode: str = "wb") -> None:
    """Write a JSONL.gz file whose line n holds n, badly compressible."""
    random.seed(numbers.start)

    def blocks() -> Iterator[bytes]:
        for start in range(numbers.start, numbers.stop, 1000):
            part = range(start, min(start + 1000, numbers.stop))
            noise = random.randbytes(40 * len(part)).hex().encode()
            yield b"".join(
                b'{"n":%d,"noise":"%s"}\n' % (n, noise[80 * i : 80 * i + 80])
                for i, n in enumerate(part)
            )

    with open(path, mode) as raw, gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=1) as file:
        for block in blocks():
            file.write(block)


def expected(count: int, rows: int) -> bytes:
    """Return the result of an uninterrupted run."""
    ranges = [range(first, min(first + rows, count)) for first in range(0, count, rows)]
    values = ({"first": r.start, "rows": len(r), "total": sum(r)} for r in ranges)
    return b"".join(json.dumps(v, separators=(",", ":")).encode() + b"\n" for v in values)


def ok(ended: Ended, *fragments: str) -> None:
    """Assert that a command succeeded and said every fragment."""
    assert 0 == ended.code, ended
    assert [] == [fragment for fragment in fragments if fragment not in ended.err], ended


def calls_of(desk: Desk) -> list[int]:
    """Return the first rows of the chunks that were read, in order."""
    path = desk.path / "calls"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def completed(desk: Desk) -> int:
    """Return how many chunks are published."""
    run = desk.path / "run"
    if not (run / "run.json").exists():
        return 0
    return int(hr.Run(run).status()["sources"]["completed"])


def killed_again_and_again(desk: Desk, count: int, rows: int, kills: int, *options: str) -> None:
    """Kill a run everywhere in its file, each time as soon as some more is published."""
    total = -(-count // rows)
    command = (
        *("submit", "totals.py", "--run-dir", "run", "--cluster", "local", *options),
        *("--local-dir", str(desk.local), "--sync-interval", "1"),
        *("-P", "path=in.jsonl.gz", "-P", f"rows={rows}"),
    )
    done, gate = 0, desk.path / "gate"
    for _ in range(kills):
        # It cannot end before it is killed: so many chunks more are read, and then none.
        more = random.randint(total // (3 * kills), total // (2 * kills))
        gate.write_text(str(len(calls_of(desk)) + more))
        process = Command(desk.path).start(*command)
        try:
            wait_until(
                lambda process=process, done=done: (
                    process.poll() is not None or completed(desk) > done
                ),
                timeout_s=280,
                describe=lambda process=process: f"{completed(desk)} done, {process.poll()}",
            )
        finally:
            kill_family(process.pid)
        process.communicate()
        assert done < completed(desk) < total
        done = completed(desk)
    gate.unlink()
    before = len(calls_of(desk))
    ok(
        desk.call(*command, timeout_s=900),
        f"{total:,}: 0 new, {done:,} done, {total - done:,} left",
    )
    assert expected(count, rows) == desk.rows("run")
    # What was published is not read again; at most what the kill left behind in the ledger.
    assert len(calls_of(desk)) - before <= total - done


def test_killed_within_a_file(desk: Desk) -> None:
    """A run killed twice in the middle of one file has the bytes of an uninterrupted one."""
    random.seed()
    write_numbers(desk.path / "in.jsonl.gz", range(200_000))
    killed_again_and_again(desk, 200_000, 400, 2, "--engine", "inline")
    assert 1 == len(list(desk.path.glob("run/restarts/*/*")))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3000)
def test_killed_five_times_in_ten_million_lines(desk: Desk) -> None:
    """The same with 10 million lines, Ray and chunks of 5,000."""
    random.seed()
    write_numbers(desk.path / "in.jsonl.gz", range(10_000_000))
    killed_again_and_again(desk, 10_000_000, 5000, 5)


def test_a_file_that_grew(desk: Desk) -> None:
    """Complete chunks are kept; the last one, which has more rows, and new ones are run."""
    path = desk.path / "in.jsonl.gz"
    write_numbers(path, range(2500))
    command = ("totals.py", "--run-dir", "run", "-P", f"path={path}")
    ok(desk.submit(*command), "3: 3 new")
    write_numbers(path, range(2500, 4200), mode="ab")

    ok(desk.submit(*command), "1 chunks have more rows", "5: 3 new, 2 done, 3 left")

    assert [0, 1000, 2000, 2000, 3000, 4000] == sorted(calls_of(desk))
    assert expected(4200, 1000) == desk.rows("run")


def test_a_file_that_was_replaced(desk: Desk) -> None:
    """Other content in the place of chunks that are done is refused, and one of them named."""
    path = desk.path / "in.jsonl.gz"
    write_numbers(path, range(2500))
    command = ("totals.py", "--run-dir", "run", "-P", f"path={path}")
    ok(desk.submit(*command))
    write_numbers(path, range(1, 2501))

    refused = desk.submit(*command)

    assert 14 == refused.code, refused
    assert "'in.jsonl.gz#0-999'" in refused.err
    ok(desk.submit(*command, "--accept-changes"), "3: 3 new")


def test_a_file_that_is_cut_while_the_run_goes_on(desk: Desk) -> None:
    """Chunks that can no longer be read are quarantined by name, all others are done."""
    path = desk.path / "in.jsonl"
    path.write_text("".join(f'{{"n":{n}}}\n' for n in range(5000)))
    desk.write(
        "totals.py",
        NUMBERS.replace("rows = total = 0", f"rows = total = 0; os.truncate({str(path)!r}, 30000)"),
    )
    ended = desk.submit("totals.py", "--run-dir", "run", "-P", f"path={path}")
    failures = desk.call("failures", "run")

    assert 1 == ended.code, ended
    assert "in.jsonl#3000-3999" in failures.out
    assert "are not what was listed" in failures.out
    assert [0, 1000] == sorted(set(calls_of(desk)))


def test_a_half_written_file_starts_nothing(desk: Desk) -> None:
    """Submit names it, and leaves no run behind."""
    path = desk.path / "in.jsonl.gz"
    write_numbers(path, range(2500))
    os.truncate(path, path.stat().st_size - 9)
    ended = desk.submit("totals.py", "--run-dir", "run", "-P", f"path={path}")

    assert 13 == ended.code, ended
    assert f"{path} cannot be read" in ended.err
    assert not (desk.path / "run").exists()
