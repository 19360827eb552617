"""Commands named as Slurm's, for what a Slurm says that no testbed says on request."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

SLURM_COMMANDS = ("sbatch", "squeue", "scontrol", "sacct", "scancel", "sinfo")


def fake_slurm(directory: Path, body: str) -> dict[str, str]:
    """Put commands named as Slurm's first on the path; return the environment."""
    directory.mkdir()
    for name in SLURM_COMMANDS:
        path = directory / name
        path.write_text(f"#!/bin/sh\n{textwrap.dedent(body)}")
        path.chmod(0o755)
    return {"PATH": f"{directory}{os.pathsep}{os.environ['PATH']}"}
