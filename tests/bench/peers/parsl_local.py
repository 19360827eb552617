"""Parsl's HighThroughputExecutor with checkpoints of every task, one app per source."""

import os
import sys

import parsl
from common import CORES, Report, write_rows
from parsl.config import Config
from parsl.executors import HighThroughputExecutor
from parsl.providers import LocalProvider


@parsl.python_app(cache=True)
def app(i, path):
    """Return the row of a source."""
    import sys

    sys.path.insert(0, path)
    from common import row

    return row(i)


def main():
    """Run."""
    report, here = Report(), os.path.dirname(os.path.abspath(__file__))
    executor = HighThroughputExecutor(
        label="local",
        address="127.0.0.1",
        loopback_address="127.0.0.1",
        max_workers_per_node=CORES,
        provider=LocalProvider(init_blocks=1, max_blocks=1),
    )
    directory = os.path.join(report.directory, "runinfo")
    try:
        from parsl.dataflow.memoization import BasicMemoizer

        kept = {"memoizer": BasicMemoizer(checkpoint_mode="task_exit")}
    except ImportError:
        kept = {"checkpoint_mode": "task_exit"}
    config = Config(run_dir=directory, executors=[executor], initialize_logging=False, **kept)
    with parsl.load(config):
        app(-1, here).result()
        rows = report.timed(
            "run_s", lambda: [f.result() for f in [app(i, here) for i in range(report.sources)]]
        )
    write_rows(report.out, rows)
    report.print(version=parsl.__version__)


if __name__ == "__main__":
    sys.exit(main())
