"""Bare Ray: how long until one actor has answered one call."""

import time

import ray
from common import CORES, Report, line


class Worker:
    """Answers."""

    def line(self, i):
        """Return the row of a source."""
        return line(i)


def start():
    """Start Ray and return an actor's first answer."""
    ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False, logging_level="error")
    return ray.get(ray.remote(Worker).remote().line.remote(0))


report = Report()
with open(report.out, "w") as out:
    out.write(report.timed("run_s", start))
    answered = time.time()
report.print(version=ray.__version__, answered=answered)
