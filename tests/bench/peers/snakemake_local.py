"""Snakemake: one job per source, then the command again with nothing to do."""

import glob
import os
import subprocess
import sys
from importlib.metadata import version

from common import CORES, Report, read

SNAKEFILE = """
rule all:
    input: expand("rows/{{i}}", i=range({sources}))
rule row:
    output: "rows/{{i}}"
    params: y=lambda wildcards: 2 * (int(wildcards.i) + 1)
    shell: "echo '{{{{\\"i\\":{{wildcards.i}},\\"y\\":{{params.y}}}}}}' > {{output}}"
"""


def main():
    """Run."""
    report = Report()
    with open(os.path.join(report.directory, "Snakefile"), "w") as out:
        out.write(SNAKEFILE.format(sources=report.sources))
    command = [os.path.join(os.path.dirname(sys.executable), "snakemake"), "--quiet", "all"]
    environment = {**os.environ, "HOME": report.directory, "XDG_CACHE_HOME": report.directory}

    def run():
        subprocess.run(
            [*command, "--cores", str(CORES)], cwd=report.directory, env=environment, check=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    report.timed("run_s", run)
    report.timed("noop_s", run)
    paths = sorted(glob.glob(f"{report.directory}/rows/*"), key=lambda p: int(os.path.basename(p)))
    with open(report.out, "w") as out:
        out.writelines(map(read, paths))
    report.print(version=version("snakemake"))


if __name__ == "__main__":
    main()
