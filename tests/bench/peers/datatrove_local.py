"""datatrove's LocalPipelineExecutor: one rank per source, then the run again with all done."""

import glob
import os
from importlib.metadata import version

from common import CORES, Report, line, read
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger


class Row(PipelineStep):
    """Writes the row of its rank."""

    name = type = "row"

    def __init__(self, directory):
        super().__init__()
        self.directory = directory

    def run(self, data=None, rank=0, world_size=1):
        """Write one file."""
        with open(f"{self.directory}/{rank:08d}", "w") as out:
            out.write(line(rank))
        return iter(())


def main():
    """Run."""
    logger.remove()
    report = Report()
    rows = os.path.join(report.directory, "rows")
    os.makedirs(rows)

    def run():
        LocalPipelineExecutor(
            pipeline=[Row(rows)],
            tasks=report.sources,
            workers=CORES,
            logging_dir=os.path.join(report.directory, "log"),
        ).run()

    saved = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    report.timed("run_s", run)
    report.timed("noop_s", run)
    os.dup2(saved, 1)
    with open(report.out, "w") as out:
        out.writelines(map(read, sorted(glob.glob(f"{rows}/*"))))
    report.print(version=version("datatrove"))


if __name__ == "__main__":
    main()
