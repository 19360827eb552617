"""A run's status as OpenMetrics text, for a node exporter's directory of text files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from hpcresume.errors import UsageError
from hpcresume.fs import replace_file
from hpcresume.observe.status import ENDED_STATES, Status

_STATES = ("planned", "waiting", "running", *sorted(ENDED_STATES))
Sample = tuple[Mapping[str, str], float]


def openmetrics(found: Status) -> str:
    """Return a status as OpenMetrics text; every sample names the run and the pipeline."""
    lines = []
    for name, text, samples in _families(found):
        lines += [f"# TYPE {name} gauge", f"# HELP {name} {text}"]
        for labels, value in samples:
            known = {"pipeline": found.name, "run": found.run, **labels}
            pairs = ",".join(f'{key}="{_escaped(label)}"' for key, label in known.items())
            lines.append(f"{name}{{{pairs}}} {float(value)!r}")
    return "\n".join([*lines, "# EOF", ""])


def _families(found: Status) -> Iterator[tuple[str, str, list[Sample]]]:
    """Yield name, help and samples; gauges all, since a run begun anew may count less."""
    sources = {"total": found.sources.total, "completed": found.sources.completed,
               "failing": found.sources.failing, "quarantined": found.sources.quarantined,
               "remaining": found.sources.remaining, "at_risk": found.sources.at_risk}  # fmt: skip
    yield "hpcresume_sources", "Sources by how they stand.", _by("state", sources)
    states = {state: int(state == found.state) for state in _STATES}
    yield "hpcresume_run_state", "1 for the state that the run is in.", _by("state", states)
    newest = found.rounds[-1].round if found.rounds else -1
    tasks: dict[str, int] = {}
    for task in found.tasks:
        if task.round == newest:
            tasks[task.state] = tasks.get(task.state, 0) + 1
    yield "hpcresume_tasks", "Array tasks of the newest round by state.", _by("state", tasks)
    yield "hpcresume_round", "Number of the newest round.", [({}, newest)]
    yield "hpcresume_attempts_ended", "Attempts by how they ended.", _by("how", found.endings)
    yield "hpcresume_core_hours_used", "Core-hours of all attempts.", [({}, found.core_hours.used)]
    for name, text, value in (
        ("core_hours_left", "Core-hours that the rest takes.", found.core_hours.left),
        ("rate_per_second", "Sources completed per second.", found.rate_per_s),
        ("eta_seconds", "Seconds until the rest is done.", found.eta_s),
    ):
        if value is not None:
            yield f"hpcresume_{name}", text, [({}, value)]
    seconds = {stage.name: stage.seconds for stage in found.stages}
    yield "hpcresume_stage_busy_seconds", "Seconds in each stage's code.", _by("stage", seconds)


def _by(label: str, values: Mapping[str, float]) -> list[Sample]:
    return [({label: key}, value) for key, value in values.items()]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def write_metrics(found: Status, path: Path) -> None:
    """Replace a file with the status as OpenMetrics text; a reader finds the old or the new one.

    Raises:
        UsageError: It cannot be written.
    """
    try:
        # The exporter is another user, and the umask of who watches may keep it out.
        replace_file(str(path), openmetrics(found).encode(), mode=0o644)
    except OSError as error:
        raise UsageError(
            f"cannot write the metrics to {path}: {error.strerror or error}. The run is not "
            "affected. Give --metrics a file in a directory that you may write.",
            path=str(path),
        ) from error
