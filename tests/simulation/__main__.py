"""Run simulated runs by the thousand: ``python -m tests.simulation --seeds 20000``.

A seed that fails is printed with the line that runs it again; ``--trace`` shows what happened.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tests.simulation.simulation import simulate
from tests.simulation.world import ViolationError

SEEDS_FILE = Path(__file__).with_name("seeds.txt")
_COLLECT_EVERY = 200


def past_seeds() -> list[int]:
    """Return the seeds that failed once, which are always run again."""
    lines = SEEDS_FILE.read_text(encoding="utf-8").splitlines()
    return [int(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]


def failures(seeds: Iterable[int]) -> Iterator[tuple[int, ViolationError]]:
    """Run seeds and yield those that fail."""
    gc.collect()
    gc.disable()  # a run makes many small cycles at once; they are collected now and then
    try:
        for number, seed in enumerate(seeds):
            if number % _COLLECT_EVERY == 0:
                gc.collect()
            try:
                simulate(seed)
            except ViolationError as error:
                yield seed, error
    finally:
        gc.enable()


def say(seed: int, error: ViolationError) -> None:
    """Print the line that runs a failing seed again."""
    print(f"python -m tests.simulation --seeds 1 --from {seed} --trace   # {error}", flush=True)


def run_here(seeds: Iterable[int], *, most: int) -> int:
    """Run seeds in this process; return how many failed."""
    failed = 0
    for seed, error in failures(seeds):
        say(seed, error)
        failed += 1
        if failed >= most:
            break
    return failed


def run_beside(first: int, count: int, jobs: int, most: int) -> int:
    """Run seeds in several processes; return how many of these found a failure."""
    share = -(-count // jobs)
    command = [sys.executable, "-m", "tests.simulation", "--jobs", "1", "--most", str(most)]
    processes = [
        subprocess.Popen(
            [*command, "--from", str(start), "--seeds", str(min(share, first + count - start))]
        )
        for start in range(first, first + count, share)
    ]
    return sum(process.wait() != 0 for process in processes)


def trace(seed: int) -> int:
    """Run one seed and print what happened in it."""
    try:
        found, status = simulate(seed, tracing=True), 0
    except ViolationError as error:
        found, status = error.simulation, 1
        say(seed, error)
    print("\n".join(found.world.trace or []))
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return 1 if a seed failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many [default: 1000]")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes [default: 1]")
    parser.add_argument("--most", type=int, default=10, help="failures to stop after [default: 10]")
    parser.add_argument("--trace", action="store_true", help="show what happens in the first seed")
    options = parser.parse_args(argv)
    if options.trace:
        return trace(options.first)
    start = time.monotonic()
    if options.jobs > 1:
        failed = run_beside(options.first, options.seeds, options.jobs, options.most)
    else:
        seeds = range(options.first, options.first + options.seeds)
        failed = run_here(seeds, most=options.most)
    seconds = time.monotonic() - start
    print(f"{options.seeds} seeds in {seconds:.0f} s, {seconds / options.seeds * 1e3:.1f} ms each: "
          f"{f'{failed} failed' if failed else 'none failed'}", flush=True)  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONHASHSEED", "0")
    sys.exit(main())
