"""Bare Ray: one task per source."""

import ray
from common import CORES, Report, row, write_rows

report = Report()
ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False, logging_level="error")
task = ray.remote(row)
ray.get([task.remote(i) for i in range(2 * CORES)])
rows = report.timed("run_s", lambda: ray.get([task.remote(i) for i in range(report.sources)]))
write_rows(report.out, rows)
report.print(version=ray.__version__)
