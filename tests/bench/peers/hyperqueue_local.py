"""HyperQueue's LocalCluster: one Python function per source, each in a process of its own."""

import glob
import os
from importlib.metadata import version

from common import CORES, Report, read
from hyperqueue import Job
from hyperqueue.cluster import LocalCluster, WorkerConfig

PROGRAM = 'printf \'{"i":%d,"y":%d}\\n\' "$1" "$((2 * ($1 + 1)))"'


def main():
    """Run; a task is a shell that does the arithmetic, as a Python one takes 100 ms to start."""
    report = Report()
    rows = os.path.join(report.directory, "rows")
    os.makedirs(rows)
    os.chdir(report.directory)
    with LocalCluster(
        server_dir=report.directory, worker_config=WorkerConfig(cores=CORES)
    ) as cluster:
        client = cluster.client()

        def run():
            job = Job(max_fails=None)
            for i in range(report.sources):
                words = ["sh", "-c", PROGRAM, "row", str(i)]
                job.program(words, stdout=f"{rows}/{i:08d}", stderr=None)
            client.wait_for_jobs([client.submit(job)])

        report.timed("run_s", run)
    with open(report.out, "w") as out:
        out.writelines(map(read, sorted(glob.glob(f"{rows}/*"))))
    report.print(version=version("hyperqueue"))


if __name__ == "__main__":
    main()
