"""``hr.Parts`` from submit to collect: through kills, a full disk, and both engines."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support.cli import Command, wait_until
from tests.support.local import INLINE, Desk, kill_family
from tests.support.mounts import tmpfs

PIPELINE = """
import os, time

def pipeline(form: str = "jsonl", n: int = 200, ms: int = 0, calls: str = "", split: bool = False,
             size: int = 256 << 20, kb: int = 0):
    def work(i):
        if calls:
            with open(calls, "a") as file:
                file.write(f"{i}\\n")
        time.sleep(ms / 1000)
        return i

    def fan(i):
        for k in range(i % 5):
            yield {"i": i, "k": k, "text": "x" * (i % 7) + "y" * (1024 * kb)}

    last = hr.stage(lambda row: row, name="last", workers=1) if split else (lambda row: row)
    return hr.Pipeline(name="parts", sources=hr.indexed(n), stages=[work, fan, last],
                       sink=hr.Parts(form, size=size))
"""


def expected(n: int = 200, kb: int = 0) -> list[dict]:
    """Return the rows that the pipeline makes of ``n`` sources."""
    tail = "y" * (1024 * kb)
    return [{"i": i, "k": k, "text": "x" * (i % 7) + tail} for i in range(n) for k in range(i % 5)]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A user's directory with the pipeline."""
    made = Desk.make(tmp_path)
    made.write("parts.py", PIPELINE)
    return made


def collected(desk: Desk) -> list[dict]:
    """Return the rows of one file, after comparing them with those of the directory of parts."""
    rows = [json.loads(line) for line in desk.rows("run").splitlines()]
    ended = desk.call("collect", "run", "-o", "out", "--layout", "parts")
    assert 0 == ended.code, ended
    found = []
    for path in (desk.path / "out").iterdir():
        if path.suffix == ".parquet":
            found += pq.read_table(path).to_pylist()
        else:
            found += [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == sorted(found, key=lambda row: (row["i"], row["k"]))
    return rows


@pytest.mark.parametrize(("form", "split"), [("jsonl", False), ("jsonl", True), ("parquet", True)])
def test_one_run(desk: Desk, form: str, split: bool) -> None:
    """Rows come out in source order, also where stages of two requests meet in the driver."""
    ended = desk.submit(
        "parts.py", "--run-dir", "run", "-P", f"form={form}", "-P", f"split={split}"
    )
    assert 0 == ended.code, ended
    assert expected() == collected(desk)


@pytest.mark.ray
def test_workers_of_ray(desk: Desk) -> None:
    """Several processes encode into one part of one schema, whole at every publication."""
    command = ("submit", "--cluster", "local", "--local-dir", desk.local, "parts.py")
    ended = desk.call(*command, "--run-dir", "run", "-P", "form=parquet", "-P", "n=2000")
    assert 0 == ended.code, ended
    assert expected(2000) == collected(desk)
    assert [] == list(desk.local.glob("hpcresume-*/*/*"))


@pytest.mark.parametrize(("form", "interval"), [("jsonl", "600"), ("parquet", "1")])
def test_everything_killed(desk: Desk, form: str, interval: str) -> None:
    """
    After a kill -9 of everything, before or after the first parts are published, the same
    command completes the run with each row once, and leaves nothing on the node.
    """
    calls = desk.path / "calls"
    arguments = (
        *(*INLINE, "--local-dir", str(desk.local), "parts.py", "--run-dir", "run"),
        *("--sync-interval", interval, "-P", f"form={form}", "-P", "ms=20", "-P", f"calls={calls}"),
    )
    process = Command(desk.path).start("submit", *arguments)

    def worked() -> bool:
        has_parts = interval == "600" or bool(
            list(desk.path.glob("run/rounds/*/tasks/*/e*/part-*"))
        )
        return has_parts and calls.exists() and len(calls.read_text().splitlines()) >= 60

    try:
        wait_until(worked, timeout_s=60, describe=lambda: f"ended: {process.poll()}")
    finally:
        kill_family(process.pid)
        process.communicate()

    ended = desk.call("submit", *arguments)

    assert 0 == ended.code, ended
    assert expected() == collected(desk)
    assert [] == list(desk.local.glob("hpcresume-*/*/*"))


def test_deaths_of_driver_and_refusals(desk: Desk) -> None:
    """
    The driver dies, and the publisher is refused after a part has its name and before its
    segment: the run goes on by itself and holds each row once.
    """
    faults = "ledger.after_commit=kill:4,part.after_rename=raise"
    fault = {"HPCRESUME_TESTING": "1", "HPCRESUME_FAILPOINTS": faults}
    arguments = ("parts.py", "--run-dir", "run", "-P", "form=parquet", "-P", "n=40", "-P", "ms=20")
    desk.submit(*arguments, env=fault)
    ended = desk.submit(*arguments)
    assert 0 == ended.code, ended
    assert expected(40) == collected(desk)


def test_nodes_disk_that_fills_up(desk: Desk) -> None:
    """When blobs do not fit the node's disk, what is committed is published; the rest follows."""
    disk = desk.path / "disk"
    with tmpfs(disk, size_mb=90):
        ended = desk.call(
            *("submit", *INLINE, "--local-dir", disk, "parts.py", "--run-dir", "run"),
            *("--sync-interval", "600", "-P", "kb=500", "-P", "n=130"),
        )
    assert 0 == ended.code, ended
    assert "round 1" in ended.err
    logs = "".join(path.read_text() for path in desk.path.glob("run/rounds/0000/logs/*"))
    assert "the node-local disk refused" in logs
    assert [row["i"] for row in expected(130)] == [
        json.loads(line)["i"] for line in desk.rows("run").splitlines()
    ]


def test_files_per_attempt(desk: Desk) -> None:
    """Parts end at their size; a segment and a part per publication, whatever the sources."""
    size = 1 << 20
    ended = desk.submit(
        "parts.py", "--run-dir", "run", "-P", "kb=20", "-P", f"size={size}", "-P", "n=600"
    )
    assert 0 == ended.code, ended
    directory = desk.path / "run/rounds/0000/tasks/00000/e001"
    parts = [os.path.getsize(path) for path in directory.glob("part-*")]
    attempt = json.loads(desk.call("status", "run", "--json").out)
    assert len(parts) >= 2, attempt
    assert len(list(directory.iterdir())) <= 6 + 2 * math.ceil(sum(parts) / size)
    assert expected(600, kb=20) == collected(desk)


def test_trial_shows_rows(desk: Desk) -> None:
    """A trial of a Parquet pipeline shows its rows and writes nothing."""
    ended = desk.call(
        "trial", "parts.py", "--engine", "inline", "-n", "7", "-P", "form=parquet", "--json"
    )
    assert 0 == ended.code, ended
    report = json.loads(ended.out)
    assert {"i", "k", "text"} == set(report["rows"][0]["row"])
    assert ["local", "parts.py"] == sorted(
        name for name in os.listdir(desk.path) if not name.startswith((".", "__"))
    )
