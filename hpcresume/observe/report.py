"""A run's report: one HTML page that needs no network.

What the page shows as numbers is ``status --json``; the plots add what only all attempts
together tell: when each one ran, how fast the run was over time, and what was published twice.
Plots are drawn in the reader's browser by Observable Plot, which is small enough to be carried
within the page, draws SVG that prints, and takes its colours from the page.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from hpcresume.errors import CorruptDataError, SharedStorageError, UsageError
from hpcresume.fs import replace_file
from hpcresume.merge.packs import Packs, key_of
from hpcresume.observe.failures import FailedSource, failed_sources
from hpcresume.observe.reading import AttemptFiles, Reader
from hpcresume.observe.status import FailureGroup, Status, Watcher, ending
from hpcresume.observe.words import human_duration, human_rate, human_seconds, human_share
from hpcresume.run.directory import RunDir, SegmentName
from hpcresume.segment.segment import Progress, Writer

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
    """Attempts that ended alike, and what they did beyond what counts.

    Attributes:
        ending: How they ended.
        attempts: How many there are.
        completed: Sources that they completed and published.
        again: Those of them that another attempt had published first.
        failed: Items that failed, over all their tries.
    """

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

    now = time.time()
    ran = attempts_that_ran(reader, now)
    drawn, total = _drawn(ran), status.sources.total
    page = files("hpcresume") / "observe" / "page"
    assets = {
        "css": "report.css", "script": "report.js", "d3": "d3.min.js", "plot": "plot.umd.min.js"
    }  # fmt: skip
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string((page / "report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        **{name: (page / file).read_text(encoding="utf-8") for name, file in assets.items()},
        **_words(reader, status, ran, now),
        data=_plots(reader, status, ran, drawn),
        shown=len(drawn),
        sampled=len(drawn) < len(ran),
        twice=work_published_twice(reader),
        **_FORMATS,
        # Of no sources all are done, as the share in words says.
        percent=lambda part: f"{100 * part / total:.2f}" if total else "100",
    )


def _words(reader: Reader, status: Status, ran: list[Ran], now: float) -> dict[str, Any]:
    """Return what the page says in words and tables."""
    sources, info = status.sources, reader.run.info
    early = {kind: n for kind, n in status.endings.items() if kind != "done"}
    longest = sorted(ran, key=lambda one: -one.elapsed_s)
    failed = failed_sources(reader.manifest, reader.union)
    settings = reader.rounds[-1].plan.settings if reader.rounds else {}
    return {
        "status": status,
        "share": human_share(sources.completed, sources.total),
        "span_s": _span_s(ran, now=None if status.ended else now),
        "attempts": len(ran),
        "tasks": len({(one.round, one.task) for one in ran}),
        "early": sum(early.values()),
        "early_kinds": ", ".join(f"{n:,} {kind}" for kind, n in early.items()),
        "stragglers": longest[:_STRAGGLERS] if len(ran) > 1 else [],
        "median_s": statistics.median(one.elapsed_s for one in ran) if ran else 0.0,
        "examples": _tracebacks(status.failures, failed),
        "codes": _codes(reader),
        "settings": list(_flat("", settings)),
        "target": info.target,
        "created_by": info.version,
        "version": _version(),
        "made_at": datetime.now(UTC).isoformat(sep=" ", timespec="seconds"),
    }


def _span_s(ran: list[Ran], *, now: float | None) -> float:
    """Return the seconds from the first start to now, or to the last end where it has ended."""
    if not ran:
        return 0.0
    end = max(one.end for one in ran) if now is None else now
    # The clock of another host may be ahead.
    return max(0.0, end - min(one.start for one in ran))


def _tracebacks(groups: list[FailureGroup], failed: list[FailedSource]) -> list[FailedSource]:
    """Return one source with a traceback of each of the largest groups that have one."""
    first: dict[tuple[str, str, str], FailedSource] = {}
    for one in failed:
        if one.traceback.strip():
            first.setdefault((one.stage, one.kind, one.message), one)
    found = (first.get((group.stage, group.kind, group.message)) for group in groups)
    return list(islice(filter(None, found), _EXAMPLES))


def _codes(reader: Reader) -> dict[str, list[int]]:
    """Return the code snapshots that attempts ran, each with its rounds."""
    codes: dict[str, list[int]] = {}
    for round_ in reader.rounds:
        if round_.attempts:
            codes.setdefault(f"{round_.plan.code:04d}", []).append(round_.number)
    return codes


def _plots(reader: Reader, status: Status, ran: list[Ran], drawn: list[Ran]) -> str:
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
                round(r.start, 3),
                round(r.end, 3),
                r.ending,
                r.host,
                r.completed,
            )
            for r in drawn
        ],
        "throughput": throughput(reader, ran),
        "durations": [round(one.elapsed_s, 1) for one in ran],
    }
    text = orjson.dumps(data, option=orjson.OPT_NON_STR_KEYS).decode()
    return text.replace("<", "\\u003c")


def attempts_that_ran(reader: Reader, now: float) -> list[Ran]:
    """Return the attempts that have told when they started; ``now`` ends those that run."""
    found = (_ran(attempt, now) for attempt in _attempts(reader))
    return [one for one in found if one is not None]


def _attempts(reader: Reader) -> list[AttemptFiles]:
    return [attempt for round_ in reader.rounds for attempt in round_.attempts]


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


def throughput(reader: Reader, ran: list[Ran]) -> list[tuple[float, float, float, int]]:
    """Return start, end, sources per second and attempts at work of equal parts of the run.

    Rate times width, over all parts, is what the attempts completed: what one completed between
    two publications is shared out by how much of that time lies in which part.
    """
    begin, end = min((r.start for r in ran), default=0), max((r.end for r in ran), default=0)
    if end <= begin:
        return []
    width = (end - begin) / _BINS
    edges = [begin + n * width for n in range(_BINS)] + [end]
    done, at_work = [0.0] * _BINS, [0] * _BINS

    def place(at: float) -> int:
        return min(_BINS - 1, max(0, int((at - begin) / width)))

    for one in ran:
        for number in range(place(one.start), place(one.end) + 1):
            at_work[number] += 1
    for start, stop, sources in _steps(reader, ran):
        # The clock of another host may be ahead, or an attempt not have told when it began.
        since, until = (min(end, max(begin, at)) for at in (start, stop))
        first, last = place(since), place(until)
        if first == last:
            done[first] += sources
            continue
        for n in range(first, last + 1):
            inside = max(0.0, min(until, edges[n + 1]) - max(since, edges[n]))
            done[n] += sources * inside / (until - since)
    return [(edges[n], edges[n + 1], done[n] / width, at_work[n]) for n in range(_BINS)]


def _steps(reader: Reader, ran: list[Ran]) -> Iterator[tuple[float, float, int]]:
    """Yield from when to when attempts completed how many sources, from some of their segments."""
    attempts, segments = _attempts(reader), _Segments(reader)
    ends = {(one.round, one.task, one.attempt): one.end for one in ran}
    most = max(2, _MOST_FOOTERS // max(1, len(attempts)))
    for attempt in attempts:
        at, completed = attempt.started_at or 0.0, 0
        for progress in segments.progress(attempt, most=most):
            if progress.completed > completed:
                yield at, max(at, progress.written_at), progress.completed - completed
            at, completed = max(at, progress.written_at), max(completed, progress.completed)
        if attempt.completed > completed:
            ref = attempt.ref
            end = ends.get((ref.round, ref.task, ref.epoch), at)
            yield at, max(at, end), attempt.completed - completed


class _Segments:
    """Opens an attempt's segments, under their own names and in packs."""

    def __init__(self, reader: Reader) -> None:
        self._run, self._pack_of = reader.run, reader.union.pack_of
        self._packs = Packs(reader.run)
        self._packed: dict[Writer, list[str]] = defaultdict(list)
        for writer, name in self._pack_of:
            self._packed[writer].append(name)

    def progress(self, attempt: AttemptFiles, *, most: int) -> Iterator[Progress]:
        """Yield how an attempt stood when it sealed its segments, about ``most`` of them."""
        listed = {segment.name for segment in self._run.segments(attempt.ref)}
        held = self._packed.get(attempt.writer, [])
        names = [SegmentName(attempt.ref, name) for name in {*listed, *held}]
        names.sort(key=lambda name: name.seq)
        step = max(1, len(names) // most)
        # The last one tells how far it came.
        for name in [*names[:-1][::step], *names[-1:]]:
            key = key_of(name)
            number = 0 if name.name in listed else self._pack_of[key]
            try:
                yield self._packs.segment(key, number).footer.progress
            except (CorruptDataError, SharedStorageError, FileNotFoundError):
                # A damaged one leaves a gap in a curve; the status tells of it.
                continue


def work_published_twice(reader: Reader) -> list[Twice]:
    """Return what attempts published that does not count, and failed items, by how they ended."""
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
    return human_seconds(stage.seconds / stage.items_in) if stage.items_in else ""


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
