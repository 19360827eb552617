"""The README's terminal session, played on a real Slurm: ``python -m tests.session``.

Submits a run, looks at it, preempts one array task, takes the node of another one from Slurm,
waits, and collects.  What the terminal showed replaces the README's first block and
``tests/session.svg``.  Takes root and three minutes.  Four Ray heads at once do not come up in
time on a busy machine of two cores, so stages run in the drivers here.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from tests.support.cli import Command, wait_until
from tests.support.cluster import SlurmCluster
from tests.support.places import REPOSITORY

PICTURE = REPOSITORY / "tests" / "session.svg"
README = REPOSITORY / "README.md"
BEGIN, END = "<!-- session: python -m tests.session -->\n", "<!-- end of session -->\n"
SUBMIT = (
    "submit", "squares.py", "--array", "4", "--sync-interval", "3", "-t", "10:00", "-p", "low",
)  # fmt: skip
PIPELINE = """
    import time

    import hpcresume as hr


    def square(i: int) -> dict:
        time.sleep(0.3)
        return {"i": i, "square": i * i}


    pipeline = hr.Pipeline(name="squares", sources=hr.indexed(1600, int), stages=[square])
"""


class Session:
    """A terminal in a user's directory, whose commands and output are kept.

    Args:
        cluster: The Slurm that it talks to.
    """

    def __init__(self, cluster: SlurmCluster) -> None:
        self.cluster, self.home = cluster, cluster.folder("demo")
        (self.home / "squares.py").write_text(textwrap.dedent(PIPELINE).lstrip())
        self.command = Command(self.home, {**cluster.env, "HPCRESUME_TASK__ENGINE": "inline"})
        self.lines: list[str] = []

    def type(self, *arguments: str, shown: str = "", keep: int = 40) -> str:
        """Run ``hpcresume`` as if it had been typed, and keep what both streams say."""
        process = self.command.start(*arguments)
        out, err = process.communicate(timeout=300)
        typed = shown or "hpcresume " + " ".join(arguments)
        text = (err + out).replace(str(self.home), "~").rstrip()
        self.lines += [f"$ {typed}", *text.splitlines()[:keep]]
        return out + err

    def note(self, text: str) -> None:
        """Keep a comment."""
        self.lines.append(f"# {text}")


def play(cluster: SlurmCluster) -> Session:
    """Play the session and return it.

    Raises:
        AssertionError: The run did not come through as it should.
    """
    session = Session(cluster)
    session.type(*SUBMIT)
    (run,) = (session.home / "runs").iterdir()

    def running() -> dict[int, str]:
        tasks = session.command.status(run)["tasks"]
        return {t["task"]: t["host"] for t in tasks if t["state"] == "running" and t["completed"]}

    wait_until(lambda: {1, 3} <= running().keys(), timeout_s=420, describe=lambda: f"{running()}")
    session.type("status")
    status = session.command.status(run)
    array = status["rounds"][0]["job_id"]
    bed = ("--dir", str(cluster.directory))
    session.note("somebody with a higher priority needs the node of task 1")
    session.type(
        "testbed", "preempt", f"{array}_1", *bed, shown=f"hpcresume testbed preempt {array}_1"
    )
    where = {entry.array_task: entry.node for entry in cluster.queue(array)}
    node = where[3]
    assert node is not None
    session.note("and Slurm loses the node of task 3")
    session.type("testbed", "fail-node", node, *bed, shown=f"hpcresume testbed fail-node {node}")
    session.note("nobody does anything")
    ended = session.command.wait_ended(run, timeout_s=900)
    assert "complete" == ended["state"], ended
    session.type("status", keep=12)
    session.type("collect", "-o", "squares.jsonl")
    rows = [json.loads(line) for line in (session.home / "squares.jsonl").read_text().splitlines()]
    assert [{"i": i, "square": i * i} for i in range(1600)] == rows
    session.lines += ["$ wc -l squares.jsonl", f"{len(rows)} squares.jsonl"]
    return session


def picture(lines: list[str]) -> str:
    """Return the session as an SVG picture of a terminal."""
    console = Console(record=True, width=92, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    for line in lines:
        style = "bold green" if line.startswith("$ ") else "dim" if line.startswith("# ") else ""
        console.print(Text(line, style=style), crop=False, soft_wrap=False)
    svg = console.export_svg(title="hpcresume", theme=MONOKAI, unique_id="session")
    # The picture must load nothing from elsewhere.
    return re.sub(r"@font-face \{.*?\n *\}", "", svg, flags=re.DOTALL)


def write(lines: list[str]) -> None:
    """Replace the README's session and its picture."""
    text = README.read_text(encoding="utf-8")
    block = "```text\n" + "\n".join(lines) + "\n```\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(before + BEGIN + block + END + after, encoding="utf-8")
    PICTURE.write_text(picture(lines), encoding="utf-8")


def main() -> None:
    """Play the session on a testbed of its own and write it down."""
    cluster = SlurmCluster(nodes=4, cpus_per_node=1)
    try:
        session = play(cluster)
    finally:
        cluster.close()
    write(session.lines)
    print(f"{README} and {PICTURE} hold what happened: {Path(sys.argv[0]).name}")


if __name__ == "__main__":
    main()
