"""NeMo Curator's recorder alone: record completions, then read them back as a new run does."""

import os
from importlib.metadata import version

from common import Report, line
from nemo_curator.utils import resumability_actor


def main():
    """Run."""
    report = Report()
    kind = resumability_actor.ResumabilityActor
    kind = kind.__ray_metadata__.modified_class
    base = os.path.join(report.directory, "checkpoint")
    os.makedirs(base)

    def record():
        actor = kind(base, writer_id="first")
        for start in range(0, report.sources, 500):
            ids = [f"{i:016x}" for i in range(start, min(report.sources, start + 500))]
            actor.apply_deltas([(f"0_{i}", i, 1) for i in ids])
            actor.apply_deltas([(f"0_{i}_0", i, -1) for i in ids])
        actor.close()

    report.timed("run_s", record)
    union = report.timed("noop_s", lambda: kind(base, writer_id="second"))
    done = union.are_completed([f"{i:016x}" for i in range(report.sources)])
    with open(report.out, "w") as out:
        out.writelines(line(i) for i, is_done in enumerate(done) if is_done)
    report.print(version=version("nemo-curator"))


if __name__ == "__main__":
    main()
