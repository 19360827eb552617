"""Measure a run of many trivial sources on this machine: ``python -m tests.measure``.

Prints one JSON object: sources per second beyond start-up, the driver's peak memory, files
and bytes in the run directory.  Start-up is what a run of 1,000 sources takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

PIPELINE = """
import hpcresume as hr


def double(i):
    return 2 * i


def pipeline(n: int = 1_000_000) -> hr.Pipeline:
    return hr.Pipeline(name="double", sources=hr.indexed(n), stages=[double])
"""
WARM_UP = 1000
POLL_S = 0.05


@dataclass(frozen=True)
class Measured:
    """What one run took.

    Attributes:
        sources: Number of sources.
        seconds: Wall-clock seconds from the command to its end.
        driver_bytes: Peak resident memory of the driver.
        attempt_files: Files in the run directory that belong to the attempt.
        run_bytes: Size of the run directory.
    """

    sources: int
    seconds: float
    driver_bytes: int
    attempt_files: int
    run_bytes: int


def measure(directory: Path, sources: int) -> Measured:
    """Run the pipeline once and return what it took."""
    (directory / "double.py").write_text(PIPELINE)
    run = directory / f"run-{sources}"
    command = [
        *(sys.executable, "-m", "hpcresume", "submit", "double.py", "--cluster", "local"),
        *("-P", f"n={sources}", "--run-dir", str(run), "--local-dir", str(directory)),
    ]
    start, peak = time.monotonic(), 0
    with subprocess.Popen(command, cwd=directory, stderr=subprocess.DEVNULL) as process:
        driver: psutil.Process | None = None
        while process.poll() is None:
            driver = driver or find_driver(process.pid)
            if driver is not None:
                peak = max(peak, resident(driver))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_S)
    seconds = time.monotonic() - start
    if process.returncode != 0:
        raise SystemExit(f"the run ended with exit code {process.returncode}")
    files = [path for path in run.rglob("*") if path.is_file()]
    attempt = [path for path in files if "e001" in path.parts]
    return Measured(
        sources, seconds, peak, len(attempt), sum(path.stat().st_size for path in files)
    )


def find_driver(pid: int) -> psutil.Process | None:
    """Return the driver below a submitting process, once it runs."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(pid).children(recursive=True):
            if "hpcresume.task.driver" in child.cmdline():
                return child
    return None


def resident(process: psutil.Process) -> int:
    """Return a process's resident memory, 0 once it is gone."""
    with contextlib.suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=int, default=1_000_000)
    sources = parser.parse_args().sources
    with tempfile.TemporaryDirectory(prefix="hpcresume-measure-") as name:
        start = measure(Path(name), WARM_UP)
        full = measure(Path(name), sources)
    rate = (full.sources - start.sources) / max(1e-9, full.seconds - start.seconds)
    print(json.dumps({"start_up_s": start.seconds, "sources_per_s": rate, **asdict(full)}))


if __name__ == "__main__":
    main()
