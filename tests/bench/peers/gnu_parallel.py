"""GNU parallel with a job log, one shell per source, then ``--resume`` with nothing to do."""

import os
import subprocess

from common import CORES, Report

PROGRAM = 'printf \'{"i":%d,"y":%d}\\n\' {} $((2 * ({} + 1)))'


def main():
    """Run."""
    report = Report()
    environment = {**os.environ, "HOME": report.directory}
    command = [
        "parallel",
        "--will-cite",
        f"-j{CORES}",
        "--joblog",
        "log",
        "--resume",
        "-k",
        PROGRAM,
    ]
    sources = "\n".join(map(str, range(report.sources)))

    def run(out):
        subprocess.run(
            command, input=sources, text=True, cwd=report.directory, env=environment, stdout=out,
            check=True,
        )  # fmt: skip

    with open(report.out, "w") as out:
        report.timed("run_s", lambda: run(out))
    report.timed("noop_s", lambda: run(subprocess.DEVNULL))
    words = subprocess.run(["parallel", "--version"], capture_output=True, text=True, check=True)
    report.print(version=words.stdout.split("\n")[0].split()[-1])


if __name__ == "__main__":
    main()
