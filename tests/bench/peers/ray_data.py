"""Ray Data: map over a range, written as JSON files, with its checkpoint where it has one."""

import glob
import os

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from common import CORES, Report, read, row


def main():
    """Run."""
    report = Report()
    ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False, logging_level="error")
    source, rows = (os.path.join(report.directory, name) for name in ("source", "rows"))
    os.makedirs(source)
    per_file = -(-report.sources // 20)
    for n, start in enumerate(range(0, report.sources, per_file)):
        ids = range(start, min(report.sources, start + per_file))
        pq.write_table(pa.table({"i": list(ids)}), f"{source}/{n:02d}.parquet")
    checkpointed = False
    context = ray.data.DataContext.get_current()
    try:
        from ray.data.checkpoint import CheckpointConfig

        path = os.path.join(report.directory, "checkpoint")
        context.checkpoint_config = CheckpointConfig(id_column="i", checkpoint_path=path)
        checkpointed = True
    except ImportError:
        pass

    def run():
        ray.data.read_parquet(source).map(lambda r: row(r["i"])).write_json(rows)

    report.timed("run_s", run)
    with open(report.out, "w") as out:
        out.writelines(map(read, sorted(glob.glob(f"{rows}/**/*.json", recursive=True))))
    report.print(version=ray.__version__, checkpointed=checkpointed)


if __name__ == "__main__":
    main()
