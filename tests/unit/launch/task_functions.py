"""What the elements of the tests' job arrays run."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def record(argument: str) -> None:
    """Note where this runs in the file ``argument``, or do what ``argument`` says."""
    if argument.startswith("exit "):
        os._exit(int(argument.removeprefix("exit ")))
    if argument == "signal parent":
        for number in (signal.SIGTERM, signal.SIGUSR2):
            os.kill(os.getppid(), number)
        os._exit(7)
    mask = os.umask(0)
    with Path(argument).open("a", encoding="utf-8") as file:
        print(
            f"task={os.environ['HPCRESUME_TASK']} executor={os.environ['SUBMITIT_EXECUTOR']} "
            f"account={os.environ.get('SBATCH_ACCOUNT')} umask={mask:o}",
            file=file,
        )
    sys.stdout.flush()
