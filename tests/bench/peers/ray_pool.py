"""Bare Ray: a pool of actors with chunks, recording nothing.

``rows``: each answer is a list of Python rows.  ``packed``: the worker packs its rows to bytes.
``fan``: as packed, with ten rows per source.  ``handover``: a second pool takes the first one's
items through Ray's object store, with no driver in between.  ``slow``: each source takes 10 ms of
a core.
"""

import sys

import orjson
import ray
from common import CORES, Report, burn, first, second, third, write_rows

FAN, AHEAD = 10, 3
form = sys.argv[3]
CHUNK = 100 if form == "slow" else 4096


def packed(rows):
    """Return rows as lines of JSON."""
    return b"".join([orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows])


class Worker:
    """Runs chunks."""

    def ready(self):
        """Return when it is up."""

    def rows(self, start, stop):
        """Return rows."""
        return list(map(third, map(second, map(first, range(start, stop)))))

    def packed(self, start, stop):
        """Return packed rows."""
        return packed(self.rows(start, stop))

    def fan(self, start, stop):
        """Return ten packed rows per source."""
        return packed([{**row, "k": k} for row in self.rows(start, stop) for k in range(FAN)])

    def slow(self, start, stop):
        """Return packed rows, after 10 ms of a core for each."""
        for _ in range(start, stop):
            burn()
        return self.packed(start, stop)

    def items(self, start, stop):
        """Return the items between the second and the third stage."""
        return list(map(second, map(first, range(start, stop))))

    def last(self, items):
        """Return packed rows of such items."""
        return packed(map(third, items))


def run(sources):
    """Run all chunks with a few calls ahead of each worker; yield answers as they come."""
    waiting, starts, n = [], iter(range(0, sources, CHUNK)), 0
    while True:
        while len(waiting) < AHEAD * len(actors):
            start = next(starts, None)
            if start is None:
                break
            stop, n = min(sources, start + CHUNK), n + 1
            if form == "handover":
                half = len(actors) // 2 or 1
                items = actors[n % half].items.remote(start, stop)
                waiting.append(actors[half % len(actors) + n % half].last.remote(items))
            else:
                waiting.append(getattr(actors[n % len(actors)], form).remote(start, stop))
        if not waiting:
            return
        ready, waiting = ray.wait(waiting, num_returns=1)
        yield ray.get(ready[0])


report = Report()
ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False, logging_level="error")
actors = [ray.remote(num_cpus=0)(Worker).remote() for _ in range(CORES)]
ray.get([actor.ready.remote() for actor in actors])
list(run(20 * CHUNK))
answers = report.timed("run_s", lambda: list(run(report.sources)))
if form == "rows":
    write_rows(report.out, [row for answer in answers for row in answer])
else:
    with open(report.out, "wb") as out:
        out.writelines(answers)
report.print(version=ray.__version__)
