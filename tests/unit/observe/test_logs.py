"""Which log files belong to which array task."""

from __future__ import annotations

from hpcresume.observe.logs import log_files
from tests.support.runs import make_run


def test_files_are_sorted_by_array_task(tmp_path):
    """Slurm's and local names are understood; the merge job's log comes last."""
    made = make_run(tmp_path, tasks=3)
    for name in ("77_10.log", "task-2.log", "merge-80.log", "77_1.log"):
        made.log(name, "x")

    assert [(1, "77_1.log"), (2, "task-2.log"), (10, "77_10.log"), (None, "merge-80.log")] == [
        (file.task, file.name) for file in log_files(made.run)
    ]


def test_the_newest_round_with_logs_counts(tmp_path):
    """A round that has not started yet does not hide the logs of the one before."""
    made = make_run(tmp_path)
    made.log("task-0.log", "x")
    made.plan(round_=1)

    assert [0] == [file.round for file in log_files(made.run, task=0)]
    assert [] == log_files(made.run, task=5)
