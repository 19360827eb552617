"""Bare Ray: one task per source, which returns its row, or ten (``fan``)."""

import sys

import ray
from common import CORES, Report, row, write_rows

FAN = 10


def fan(i):
    """Return ten rows."""
    return [{**row(i), "k": k} for k in range(FAN)]


report = Report()
is_fan = sys.argv[3:] == ["fan"]
ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False, logging_level="error")
task = ray.remote(fan if is_fan else row)
ray.get([task.remote(i) for i in range(2 * CORES)])
rows = report.timed("run_s", lambda: ray.get([task.remote(i) for i in range(report.sources)]))
write_rows(report.out, [one for each in rows for one in each] if is_fan else rows)
report.print(version=ray.__version__)
