"""What becomes of sources and runs that go wrong, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Command, logs_of

pytestmark = [pytest.mark.ray, pytest.mark.timeout(280)]

POISON = """
import ctypes
import os
import signal
import hpcresume as hr

BAD = {3: "raises", 11: "fails", 17: "final", 23: "exits", 29: "crashes", 37: "hangs"}


@hr.stage(timeout_s=2)
def work(i):
    how = BAD.get(i)
    if how == "raises":
        raise ValueError("as asked")
    if how == "fails":
        return hr.Failed("not good enough")
    if how == "final":
        return hr.Failed("never will be", retry=False)
    if how == "exits":
        os._exit(1)
    if how == "crashes":
        ctypes.string_at(0)
    if how == "hangs":
        libc = ctypes.PyDLL(None)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        while True:
            libc.sleep(1000)
    return i


def fan(i):
    for k in range(i % 3):
        yield {"i": i, "k": k}


def pipeline() -> hr.Pipeline:
    return hr.Pipeline(name="poison", sources=hr.indexed(60), stages=[work, fan])
"""

SETUP = """
import hpcresume as hr


class Model(hr.Stage):
    def setup(self, worker):
        raise OSError("no weights here")

    def process(self, i):
        return i


def pipeline() -> hr.Pipeline:
    return hr.Pipeline(name="setup", sources=hr.indexed(20), stages=[Model()])
"""

SERVER = '''
import os
import urllib.request
from pathlib import Path
import hpcresume as hr


class Client(hr.Stage):
    """Talks to a server that it spawns; the server dies for good in the middle."""

    workers = 1

    def __init__(self, marker, forever):
        self.marker, self.forever = Path(marker), forever

    def setup(self, worker):
        if self.forever and self.marker.exists():
            raise OSError("the server does not start any more")
        port = worker.free_port()
        self.url = f"http://127.0.0.1:{port}/"
        argv = ["python3", "-m", "http.server", str(port), "--directory", str(worker.scratch)]
        self.server = worker.spawn(argv, ready=self.url)

    def process(self, i):
        if i == 30 and not self.marker.exists():
            self.marker.write_text("")
            self.server.kill()
            self.server.wait()
        with urllib.request.urlopen(self.url) as answer:
            return {"i": i, "status": answer.status}


def pipeline(marker: str, forever: bool = False) -> hr.Pipeline:
    return hr.Pipeline(name="server", sources=hr.indexed(60), stages=[Client(marker, forever)])
'''

GROUPS = """
import hpcresume as hr


def fan(i):
    for k in range(i % 21):
        yield [i, k]


@hr.stage(workers=1)
def alone(x):
    return None if sum(x) % 5 == 0 else x


class Batch(hr.Stage):
    batch_size = 7

    def process_batch(self, items, contexts):
        return [
            hr.Many([{"item": c.item_id, "seed": c.seed}, {"x": x}])
            for x, c in zip(items, contexts)
        ]


def save(row, ctx):
    ctx.output("row.txt").write_text(str(row))
    return row


def pipeline(files: bool = False) -> hr.Pipeline:
    stages = [fan, alone, Batch(), save] if files else [fan, alone, Batch()]
    return hr.Pipeline(name="groups", sources=hr.indexed(15 if files else 200), stages=stages)
"""


def submit(directory: Path, text: str, *arguments: str, rc: int, engine: str = "ray") -> Path:
    """Run a pipeline to its end and return its run directory."""
    (directory / "pipe.py").write_text(text)
    run = directory / f"run-{engine}"
    run_it = ["submit", "pipe.py", "--cluster", "local", "--engine", engine]
    Command(directory).run(*run_it, "--run-dir", str(run), *arguments, rc=rc)
    return run


def failures(run: Path) -> dict[int, dict[str, Any]]:
    """Return what ``failures --json`` says, by index."""
    found = Command(run.parent).json("failures", str(run), rc=None)
    return {failure["index"]: failure for failure in found["failures"]}


def test_each_bad_source_is_quarantined_for_its_own_reason(tmp_path: Path) -> None:
    """
    A source that raises, returns Failed, exits, crashes or hangs ends quarantined after its
    attempts with the reason; all others complete with their rows.
    """
    run = submit(tmp_path, POISON, "--max-attempts", "2", "--collect", "out.jsonl", rc=1)
    found = failures(run)
    assert {
        3: ("quarantined", 2, "ValueError"),
        11: ("quarantined", 2, "Failed"),
        17: ("quarantined", 1, "Failed"),
        23: ("quarantined", 2, "death"),
        29: ("quarantined", 2, "death"),
        37: ("quarantined", 2, "timeout"),
    } == {i: (f["state"], f["attempts"], f["kind"]) for i, f in found.items()}
    assert {"work"} == {failure["stage"] for failure in found.values()}
    for index, words in {
        3: "as asked",
        11: "not good enough",
        17: "never will be",
        23: "os._exit",
        29: "Segmentation fault",
        37: "timeout_s",
    }.items():
        assert words in found[index]["message"]
    assert 'raise ValueError("as asked")' in found[3]["traceback"]
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    good = [i for i in range(60) if i not in found]
    assert [{"i": i, "k": k} for i in good for k in range(i % 3)] == rows
    status = Command(tmp_path).status(run)
    assert ("incomplete", 54, 6) == (
        status["state"],
        status["sources"]["completed"],
        status["sources"]["quarantined"],
    )


def test_setup_that_fails_stops_the_run_and_charges_nobody(tmp_path: Path) -> None:
    """The run ends ``stopped`` with the user's error as the reason."""
    run = submit(tmp_path, SETUP, rc=1)
    status = Command(tmp_path).status(run)
    assert "stopped" == status["state"], logs_of(run)
    assert "no weights here" in status["reason"]
    assert {} == failures(run)
    assert 20 == status["sources"]["remaining"]


def test_server_killed_in_the_middle_is_replaced(tmp_path: Path) -> None:
    """A spawned server that dies costs no source a try: its worker is replaced."""
    marker = f"marker={tmp_path / 'marker'}"
    run = submit(tmp_path, SERVER, "-P", marker, rc=0)
    assert {} == failures(run)
    assert 60 == Command(tmp_path).status(run)["sources"]["completed"]


def test_server_that_dies_for_good_stops_the_run(tmp_path: Path) -> None:
    """It charges no source, and the run ends ``stopped`` with the reason."""
    marker = f"marker={tmp_path / 'marker'}"
    run = submit(tmp_path, SERVER, "-P", marker, "-P", "forever=true", rc=1)
    status = Command(tmp_path).status(run)
    assert "stopped" == status["state"], logs_of(run)
    assert "does not start any more" in status["reason"]
    assert {} == failures(run)
    assert 0 < status["sources"]["completed"] < 60


def test_groups_of_workers_give_what_one_process_gives(tmp_path: Path) -> None:
    """Fan-out, a stage in a group of its own and batches: the same bytes as inline."""
    for engine in ("ray", "inline"):
        out = str(tmp_path / f"{engine}.jsonl")
        submit(tmp_path, GROUPS, "--collect", out, rc=0, engine=engine)
    by_ray = [json.loads(line) for line in (tmp_path / "ray.jsonl").read_text().splitlines()]
    inline = [json.loads(line) for line in (tmp_path / "inline.jsonl").read_text().splitlines()]
    # Seeds differ between runs by design; everything else is the same.
    assert len(by_ray) == 2 * sum((i + k) % 5 != 0 for i in range(200) for k in range(i % 21))
    seeds = [row.pop("seed", None) for row in by_ray + inline]
    assert len(seeds) / 2 + 1 == len(set(seeds))
    assert inline == by_ray


def test_files_of_sources_are_collected(tmp_path: Path) -> None:
    """``ctx.output`` files of every item come with ``collect --files``."""
    run = submit(tmp_path, GROUPS, "-P", "files=true", rc=0)
    command = Command(tmp_path)
    command.run("collect", str(run), "-o", "out.jsonl", "--files", "files")
    rows = (tmp_path / "out.jsonl").read_text().splitlines()
    written = sorted(path.read_text() for path in (tmp_path / "files").rglob("row.txt"))
    assert sorted(str(json.loads(row)) for row in rows) == written
    assert written
