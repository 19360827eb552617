"""NeMo Curator's recorder alone: record completions, then read them back as a new run does."""

import importlib.util
import os
from importlib.metadata import version

from common import Report, line


def recorder():
    """Return its class from its file, as importing the package takes all that it depends on."""
    package = importlib.util.find_spec("nemo_curator").submodule_search_locations[0]
    path = os.path.join(package, "utils", "resumability_actor.py")
    spec = importlib.util.spec_from_file_location("resumability_actor", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ResumabilityActor


def main():
    """Run."""
    report = Report()
    kind = recorder()
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
