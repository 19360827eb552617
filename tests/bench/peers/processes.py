"""Plain processes, each with its share of the sources and nothing to tell anybody: what the
machine gives.
"""

import platform
from itertools import pairwise
from multiprocessing import get_context

from common import CORES, Report, burn, lines


def work(start, stop):
    """Return the packed rows of some sources, after 10 ms of a core for each."""
    for _ in range(start, stop):
        burn()
    return lines(start, stop)


def main():
    """Run."""
    report = Report()
    edges = [report.sources * i // CORES for i in range(CORES + 1)]
    with get_context("spawn").Pool(CORES) as pool:
        pool.starmap(work, [(0, 1)] * 2 * CORES, chunksize=1)
        answers = report.timed("run_s", lambda: pool.starmap(work, pairwise(edges), chunksize=1))
    with open(report.out, "wb") as out:
        out.writelines(answers)
    report.print(version=platform.python_version())


if __name__ == "__main__":
    main()
