"""The work that every peer does, and how its script reports: run in the peer's own environment.

Source ``i`` goes through three trivial stages and becomes one row.  Whatever the peer, the rows
end in one file of JSON lines, which the benchmark compares with the rows it expects.
"""

import json
import os
import sys
import time

CORES = int(os.environ.get("BENCH_CORES", "2"))


def first(i):
    """Stage 1."""
    return i + 1


def second(x):
    """Stage 2."""
    return x * 2


def third(y):
    """Stage 3: the row."""
    return {"i": y // 2 - 1, "y": y}


def row(i):
    """All three stages."""
    return third(second(first(i)))


def burn():
    """10 ms of a core."""
    until = time.thread_time() + 0.01
    while time.thread_time() < until:
        pass


def line(i):
    """The row of a source as one line of JSON."""
    return json.dumps(row(i), separators=(",", ":")) + "\n"


def lines(start, stop):
    """The lines of a range of sources, packed."""
    return "".join(map(line, range(start, stop))).encode()


def read(path):
    """The text of a file."""
    with open(path) as file:
        return file.read()


def write_rows(path, rows):
    """Write rows as the benchmark compares them."""
    with open(path, "w") as out:
        out.writelines(json.dumps(found, separators=(",", ":")) + "\n" for found in rows)


class Report:
    """Times what a script does and prints one JSON object."""

    def __init__(self):
        self.sources, self.out = int(sys.argv[1]), sys.argv[2]
        self.directory = os.path.dirname(self.out)
        self.values = {}

    def timed(self, name, call):
        """Call and note the seconds under a name."""
        start = time.perf_counter()
        result = call()
        self.values[name] = time.perf_counter() - start
        return result

    def print(self, **values):
        """Print everything noted."""
        print(json.dumps({"sources": self.sources, **self.values, **values}), flush=True)
