"""A run's report: one HTML page that needs no network.

What the page shows as numbers is ``status --json``; the plots add what only all attempts
together tell: when each one ran, how fast the run was over time, and what was done twice.
Plots are drawn in the reader's browser by Observable Plot, which is small enough to be carried
within the page, draws SVG that prints, and takes its colours from the page.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import orjson

from hpcresume.errors import CorruptDataError, SharedStorageError, UsageError
from hpcresume.fs import replace_file
from hpcresume.observe.failures import failed_sources
from hpcresume.observe.reading import AttemptFiles, Reader
from hpcresume.observe.status import ENDED_STATES, Status, Watcher, ending
from hpcresume.observe.words import human_duration, human_rate
from hpcresume.run.directory import RunDir
from hpcresume.segment.segment import Progress, open_segment

_MOST_ATTEMPTS = 600
"""Attempts that the timeline draws: more would be thinner than a pixel."""
_MOST_FOOTERS = 50_000
_BINS = 160
_STRAGGLERS, _EXAMPLES = 10, 3


@dataclass(frozen=True)
class Ran:
    """One attempt as the report shows it; times are wall-clock seconds."""

    round: int
    task: int
    attempt: int
    start: float
    end: float
    ending: str
    host: str
    completed: int

    @property
    def elapsed_s(self) -> float:
        """How long it ran."""
        return self.end - self.start


@dataclass(frozen=True)
class Twice:
    """Attempts that ended alike: sources they completed, and those of them that do not count."""

    ending: str
    attempts: int
    completed: int
    again: int
    failed: int


def write_report(run: RunDir, output: Path) -> Status:
    """Write the report of a run, which may still be under way, and return how it stands.

    Raises:
        UsageError: The file cannot be written.
        SharedStorageError: The run directory cannot be read.
    """
    watcher = Watcher(run)
    status = watcher.read()
    page = render_page(watcher.reader, status)
    try:
        replace_file(str(output), page.encode(), mode=0o644)
    except OSError as error:
        raise UsageError(
            f"cannot write the report to {output}: {error.strerror or error}. The run is not "
            "affected. Give -o a file in a directory that you may write.",
            path=str(output),
        ) from error
    return status


def render_page(reader: Reader, status: Status) -> str:
    """Return the report as one HTML page."""
    from jinja2 import Environment, StrictUndefined

    attempts = [attempt for round_ in reader.rounds for attempt in round_.attempts]
    now = time.time()
    ran = [one for attempt in attempts if (one := _ran(attempt, now)) is not None]
    drawn = _drawn(ran)
    page = files("hpcresume") / "observe" / "page"
    assets = {
        "css": "report.css", "script": "report.js", "d3": "d3.min.js", "plot": "plot.umd.min.js"
    }  # fmt: skip
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string((page / "report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        **{name: (page / file).read_text(encoding="utf-8") for name, file in assets.items()},
        **_words(reader, status, ran),
        data=_plots(reader, status, attempts, ran, drawn),
        shown=len(drawn),
        sampled=len(drawn) < len(ran),
        twice=work_done_twice(reader),
        **_FORMATS,
        percent=lambda part: f"{100 * part / max(1, status.sources.total):.2f}",
    )


def _words(reader: Reader, status: Status, ran: list[Ran]) -> dict[str, Any]:
    """Return what the page says in words and tables."""
    total, info = status.sources.total, reader.run.info
    early = {kind: n for kind, n in status.endings.items() if kind != "done"}
    longest = sorted(ran, key=lambda one: -one.elapsed_s)
    failed = failed_sources(reader.manifest, reader.union)
    settings = reader.rounds[-1].plan.settings if reader.rounds else {}
    return {
        "status": status,
        "ended": ENDED_STATES,
        "share": f"{100 * status.sources.completed / total:.1f} %" if total else "100 %",
        "span_s": max((r.end for r in ran), default=0) - min((r.start for r in ran), default=0),
        "attempts": len(ran),
        "tasks": len({(one.round, one.task) for one in ran}),
        "early": sum(early.values()),
        "early_kinds": ", ".join(f"{n:,} {kind}" for kind, n in early.items()),
        "stragglers": longest[:_STRAGGLERS] if len(ran) > 1 else [],
        "median_s": statistics.median(one.elapsed_s for one in ran) if ran else 0.0,
        "examples": _one_of_each(failed),
        "settings": list(_flat("", settings)),
        "target": info.target,
        "created_by": info.version,
        "version": _version(),
        "made_at": datetime.now(UTC).isoformat(sep=" ", timespec="seconds"),
    }


def _one_of_each(failed: list[Any]) -> list[Any]:
    kinds = {(one.stage, one.kind, one.message): one for one in reversed(failed)}
    return list(kinds.values())[:_EXAMPLES]


def _plots(
    reader: Reader, status: Status, attempts: list[AttemptFiles], ran: list[Ran], drawn: list[Ran]
) -> str:
    """Return what the plots are drawn from, as JSON that may stand within a page."""
    # The page needs no line for each of 10,000 tasks a second time.
    plain = {**status.to_dict(), "tasks": []}
    data = {
        "status": plain,
        "attempts": [
            (
                r.round,
                r.task,
                r.attempt,
                round(r.start),
                round(r.end),
                r.ending,
                r.host,
                r.completed,
            )
            for r in drawn
        ],
        "throughput": throughput(reader.run, attempts, ran),
        "durations": [round(one.elapsed_s) for one in ran],
    }
    text = orjson.dumps(data, option=orjson.OPT_NON_STR_KEYS).decode()
    return text.replace("<", "\\u003c")


def _ran(attempt: AttemptFiles, now: float) -> Ran | None:
    start = attempt.started_at
    if start is None:
        return None
    return Ran(
        round=attempt.ref.round,
        task=attempt.ref.task,
        attempt=attempt.ref.epoch,
        start=start,
        end=start + attempt.elapsed_s(now),
        ending=ending(attempt),
        host=attempt.info.host if attempt.info else "",
        completed=attempt.completed,
    )


def _drawn(ran: list[Ran]) -> list[Ran]:
    """Return the attempts that the timeline draws, whole tasks: eventful, long, and a sample."""
    if len(ran) <= _MOST_ATTEMPTS:
        return ran
    tasks: dict[tuple[int, int], list[Ran]] = {}
    for one in ran:
        tasks.setdefault((one.round, one.task), []).append(one)
    by_events = sorted(tasks, key=lambda key: -len(tasks[key]))
    by_length = sorted(tasks, key=lambda key: -max(one.elapsed_s for one in tasks[key]))
    third = _MOST_ATTEMPTS // 6
    evenly = list(tasks)[:: max(1, len(tasks) // third)]
    chosen = {*by_events[:third], *by_length[:third], *evenly[:third]}
    return [one for key in sorted(chosen) for one in tasks[key]]


# -- what all attempts together tell --------------------------------------------------------------


def throughput(
    run: RunDir, attempts: list[AttemptFiles], ran: list[Ran]
) -> list[tuple[float, float, float, int]]:
    """Return start, end, sources per second and attempts at work of equal parts of the run."""
    begin, end = min((r.start for r in ran), default=0), max((r.end for r in ran), default=0)
    if end <= begin:
        return []
    width = (end - begin) / _BINS
    done, at_work = [0.0] * _BINS, [0] * _BINS

    def place(at: float) -> int:
        return min(_BINS - 1, max(0, int((at - begin) / width)))

    for one in ran:
        for number in range(place(one.start), place(one.end) + 1):
            at_work[number] += 1
    per_attempt = max(2, _MOST_FOOTERS // max(1, len(attempts)))
    for attempt in attempts:
        for start, stop, sources in _steps(run, attempt, most=per_attempt):
            first, last = place(start), place(stop)
            for number in range(first, last + 1):
                done[number] += sources / (last - first + 1)
    return [
        (
            round(begin + n * width, 1),
            round(begin + (n + 1) * width, 1),
            done[n] / width,
            at_work[n],
        )
        for n in range(_BINS)
    ]


def _steps(run: RunDir, attempt: AttemptFiles, *, most: int) -> Iterator[tuple[float, float, int]]:
    """Yield when an attempt completed how many sources, from some of its segments."""
    at, completed = attempt.started_at or 0.0, 0
    for progress in _progress(run, attempt, most=most):
        if progress.completed > completed:
            yield at, max(at, progress.written_at), progress.completed - completed
        at, completed = max(at, progress.written_at), max(completed, progress.completed)


def _progress(run: RunDir, attempt: AttemptFiles, *, most: int) -> Iterator[Progress]:
    names = sorted(run.segments(attempt.ref), key=lambda name: name.seq)
    step = max(1, len(names) // most)
    # The last one tells how far it came.
    for name in [*names[:-1][::step], *names[-1:]]:
        try:
            yield open_segment(run.fs, run.segment_path(name), run_id=run.run_id).footer.progress
        except (CorruptDataError, SharedStorageError, FileNotFoundError):
            # A damaged one leaves a gap in a curve; the status tells of it.
            continue


def work_done_twice(reader: Reader) -> list[Twice]:
    """Return what attempts completed that does not count, and failed tries, by how they ended."""
    counted: Counter[Any] = Counter()
    for (writer, _), won in reader.union.won.items():
        counted[writer] += len(won)
    groups: dict[str, list[AttemptFiles]] = {}
    for round_ in reader.rounds:
        for attempt in round_.attempts:
            groups.setdefault(ending(attempt), []).append(attempt)
    return [
        Twice(
            kind,
            len(group),
            sum(one.completed for one in group),
            sum(max(0, one.completed - counted[one.writer]) for one in group),
            sum(stage.failed for one in group if one.footer for stage in one.footer.stages),
        )
        for kind, group in sorted(groups.items(), key=lambda entry: -len(entry[1]))
    ]


# -- words ----------------------------------------------------------------------------------------


def _flat(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{name}.", value)
        elif value not in ("", [], {}, None):
            yield f"{prefix}{name}", str(value)


def _per_item(stage: Any) -> str:
    if not stage.items_in:
        return ""
    seconds = stage.seconds / stage.items_in
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _version() -> str:
    try:
        return version("hpcresume")
    except PackageNotFoundError:  # a checkout on PYTHONPATH has no metadata
        return "0+checkout"


_FORMATS: dict[str, Any] = {
    "count": "{:,}".format,
    "hours": "{:,.2f}".format,
    "duration": human_duration,
    "rate": human_rate,
    "per_item": _per_item,
}
