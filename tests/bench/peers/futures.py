"""``concurrent.futures``: a pool of processes, one call per source."""

import platform
from concurrent.futures import ProcessPoolExecutor

from common import CORES, Report, row, write_rows


def main():
    """Run."""
    report = Report()
    with ProcessPoolExecutor(CORES) as pool:
        list(pool.map(row, range(2 * CORES)))
        rows = report.timed(
            "run_s",
            lambda: [f.result() for f in [pool.submit(row, i) for i in range(report.sources)]],
        )
    write_rows(report.out, rows)
    report.print(version=platform.python_version())


if __name__ == "__main__":
    main()
