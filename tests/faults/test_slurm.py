"""Row 25: what Slurm itself does to a job before anything of it has run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cli import Command, logs_of, wait_until
from tests.support.cluster import SlurmCluster, cluster
from tests.support.pipelines import fan_result, write_fan

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]


def break_prolog(broken: SlurmCluster) -> Path:
    """Give every node a prolog that fails while a file is there, and return the file."""
    flag, script = broken.root / "broken", broken.root / "prolog.sh"
    flag.touch()
    script.write_text(f"#!/bin/sh\n[ ! -e {flag} ]\n")
    script.chmod(0o755)
    with broken.conf.open("a", encoding="utf-8") as conf:
        conf.write(f"Prolog={script}\n")
    broken.run("scontrol", "reconfigure")
    broken.wait_until(
        lambda: str(script) in broken.run("scontrol", "show", "config"),
        timeout_s=30,
        describe=broken.evidence,
    )
    return flag


@pytest.mark.slow
def test_row_25_held_after_its_prolog() -> None:
    """
    A node's prolog fails, and Slurm holds the task: ``status`` names it and the remedy, and
    after that the run goes on by itself.
    """
    with cluster() as own:
        flag = break_prolog(own)
        directory = own.folder("run")
        write_fan(directory)
        command, run = Command(directory, own.env), directory / "run"
        command.run(
            *("submit", "fan.py", "--run-dir", "run", "--engine", "inline", "-P", "ms=0"),
            *("--local-dir", str(own.scratch), "--array", "1", "-c", "1"),
        )

        def reason() -> str:
            found = str(command.status(run).get("reason", ""))
            return found if "are held" in found else ""

        said = wait_until(reason, timeout_s=120, describe=own.evidence)
        flag.unlink()
        for node in own.nodes:
            if "DRAIN" in own.node_state(node):
                own.resume(node)
        release = said.rpartition("`scontrol release ")[2].rstrip("`")
        own.run("scontrol", "release", release)

        status = command.wait_ended(run)
        assert "complete" == status["state"], logs_of(run)
        command.run("collect", str(run), "-o", "out.jsonl")
        assert fan_result() == (directory / "out.jsonl").read_bytes()
