"""The live view of ``status --watch``, drawn with rich.

Rich is a dependency already and draws one frame from plain functions, which a test can call;
textual would bring an event loop and a widget tree for a view that has no input but seven keys.
The view only draws: what it shows is read by :class:`~hpcresume.observe.status.Watcher`.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hpcresume.cli.common import human_count, human_duration, human_rate
from hpcresume.observe.words import human_share

if TYPE_CHECKING:
    from hpcresume.observe.status import Status, TaskStatus

FILTERS = ("all", "running", "waiting", "ended early", "done")
SORTS = ("state", "task", "last publish", "least done", "host")
KEYS = "s sort  r reverse  f filter  up/down page up/down scroll  q leave (the run goes on)"
_ACTIVE = ("running", "died", "lost", "broken", "saved", "superseded", "waiting", "done")
_COLOURS = {"running": "green", "waiting": "yellow", "done": "dim", "complete": "bold green"}
_FEWEST_TASKS, _MOST_FAILURES, _MOST_STAGES = 3, 3, 6
_ESCAPES = {"\x1b[A": "up", "\x1b[B": "down", "\x1b[5~": "page up", "\x1b[6~": "page down",
            "\x1bOA": "up", "\x1bOB": "down"}  # fmt: skip


@dataclass
class View:
    """What the user has chosen to see: sorting, filter, and how far down.

    Attributes:
        sort: One of :data:`SORTS`.
        filter: One of :data:`FILTERS`.
        reverse: Whether the order is turned round.
        top: First task that is shown.
        page: Tasks that the last frame had room for.
    """

    sort: str = SORTS[0]
    filter: str = FILTERS[0]
    reverse: bool = False
    top: int = 0
    page: int = _FEWEST_TASKS

    def press(self, key: str) -> bool:
        """Take a key; return whether to go on watching."""
        page = {"page up": -self.page, "page down": self.page, " ": self.page}
        moves = {"up": -1, "k": -1, "down": 1, "j": 1, **page}
        if key == "s":
            self.sort, self.top = _after(SORTS, self.sort), 0
        elif key == "f":
            self.filter, self.top = _after(FILTERS, self.filter), 0
        elif key == "r":
            self.reverse, self.top = not self.reverse, 0
        elif key in moves:
            self.top = max(0, self.top + moves[key])
        return key != "q"

    def choose(self, tasks: list[TaskStatus]) -> list[TaskStatus]:
        """Return the tasks that pass the filter, sorted."""
        chosen = [task for task in tasks if self._passes(task)]
        return sorted(chosen, key=_SORT_KEYS[self.sort], reverse=self.reverse)

    def _passes(self, task: TaskStatus) -> bool:
        if self.filter == "ended early":
            return task.state not in {"running", "waiting", "done"}
        return self.filter in {"all", task.state}


def _after(choices: tuple[str, ...], current: str) -> str:
    return choices[(choices.index(current) + 1) % len(choices)]


def _share_done(task: TaskStatus) -> float:
    if task.left is None:
        return 1.0 if task.state == "done" else 0.0
    return task.completed / max(1, task.completed + task.left)


_SORT_KEYS: dict[str, Callable[[TaskStatus], tuple[object, ...]]] = {
    "state": lambda task: (_ACTIVE.index(task.state), task.task),
    "task": lambda task: (task.task,),
    "last publish": lambda task: (-(task.published_s or -1.0), task.task),
    "least done": lambda task: (_share_done(task), task.task),
    "host": lambda task: (task.host or "~", task.task),
}


def frame(found: Status, view: View, *, width: int, height: int) -> RenderableType:
    """Return one frame of a run's view, as many lines as the terminal has at most."""
    above = [*_head(found, width), *_rates(found)]
    tables = [*_failures(found, width), *_stages(found)]
    if height < len(above) + sum(_lines(one) for one in tables) + _FEWEST_TASKS + 4:
        tables = tables[:1] if found.failures else []
    room = height - len(above) - sum(_lines(one) for one in tables) - 4
    view.page = max(_FEWEST_TASKS, room)
    return Group(*above, *tables, *_tasks(found, view), Text(KEYS[: width - 1], style="dim"))


def _lines(one: RenderableType) -> int:
    return one.row_count + 1 if isinstance(one, Table) else 1


def _head(found: Status, width: int) -> list[RenderableType]:
    title = Text.assemble(
        (f"{found.name} ", "bold"),
        (found.state, _COLOURS.get(found.state, "bold red")),
        f"  {found.reason}" if found.reason else "",
        (f"  {found.run}", "dim"),
        overflow="ellipsis",
        no_wrap=True,
    )
    sources = found.sources
    share = human_share(sources.completed, sources.total)
    counts = Text.assemble(
        f"{sources.completed:,} of {sources.total:,} done ({share})  ",
        (f"{sources.at_risk:,} at risk  ", "yellow" if sources.at_risk else "dim"),
        (f"{sources.failing:,} failing  ", "magenta" if sources.failing else "dim"),
        (f"{sources.quarantined:,} quarantined", "red" if sources.quarantined else "dim"),
        f" ({found.tolerated:,} tolerated)  {sources.remaining:,} left",
        overflow="ellipsis",
        no_wrap=True,
    )
    return [title, bar(found, width - 1), counts]


def bar(found: Status, width: int) -> Text:
    """Return the bar over all sources: done, at risk, failing, quarantined, left."""
    sources = found.sources
    if not sources.total:
        # Of no sources all are done, as the share in words says.
        return Text("█" * width, "green", no_wrap=True)
    at_risk = min(sources.at_risk, sources.remaining - sources.failing)
    parts = [
        (sources.completed, "█", "green"),
        (max(0, at_risk), "▒", "yellow"),
        (sources.failing, "▒", "magenta"),
        (sources.quarantined, "█", "red"),
    ]
    text, filled, total = Text(no_wrap=True), 0, max(1, sources.total)
    for count, block, colour in parts:
        # The last done source must not look as if nothing were left, nor one failure vanish.
        cells = min(width - filled, max(int(count > 0), count * width // total))
        text.append(block * cells, colour)
        filled += cells
    text.append("░" * (width - filled), "dim")
    return text


def _rates(found: Status) -> list[RenderableType]:
    parts = []
    if found.rate_per_s is not None:
        parts.append(f"{human_rate(found.rate_per_s)}, about {human_duration(found.eta_s)} left")
    if found.slowest_s is not None:
        parts.append(f"task {found.slowest_task} needs {human_duration(found.slowest_s)} more")
    hours = found.core_hours
    left = "" if hours.left is None else f", about {hours.left:,.1f} left"
    parts.append(f"{hours.used:,.1f} core-hours used{left}")
    lines: list[RenderableType] = [Text("  ".join(parts), no_wrap=True, overflow="ellipsis")]
    early = [f"{count:,} {kind}" for kind, count in found.endings.items() if kind != "done"]
    if early:
        lines.append(Text("attempts ended early: " + ", ".join(early), no_wrap=True))
    if found.seen < 1:
        lines.append(Text(f"reading the run directory: {100 * found.seen:.0f} % seen", "yellow"))
    if found.unasked:
        lines.append(Text(f"not asked: {found.unasked}", "yellow", no_wrap=True))
    return lines


def _failures(found: Status, width: int) -> list[Table]:
    if not found.failures:
        return []
    table = _table("failing", "sources", "most common error", "for example", numbers=(1,))
    by_stage: dict[str, list[int]] = {}
    for place, group in enumerate(found.failures):
        by_stage.setdefault(group.stage, []).append(place)
    for stage, places in list(by_stage.items())[:_MOST_FAILURES]:
        group = found.failures[places[0]]
        count = sum(found.failures[place].sources for place in places)
        error = f"{group.kind}: {group.message}"[: max(20, width - 50)]
        table.add_row(Text(stage, "magenta"), f"{count:,}", Text(error), Text(group.example[:30]))
    return [table]


def _stages(found: Status) -> list[Table]:
    if not found.stages:
        return []
    table = _table("stage", "in", "out", "dropped", "failed", "seconds", "MiB",
                   numbers=range(1, 7))  # fmt: skip
    for one in found.stages[:_MOST_STAGES]:
        counts = (one.items_in, one.items_out, one.dropped, one.failed)
        memory = f"{one.memory_mib:,}" if one.memory_mib else ""
        table.add_row(one.name, *(f"{n:,}" for n in counts), f"{one.seconds:,.1f}", memory)
    return [table]


def _tasks(found: Status, view: View) -> list[RenderableType]:
    if not found.rounds:
        return []
    newest = found.rounds[-1]
    tasks = [task for task in found.tasks if task.round == newest.round]
    chosen = view.choose(tasks)
    view.top = max(0, min(view.top, len(chosen) - view.page))
    shown = chosen[view.top : view.top + view.page]
    states = ", ".join(
        f"{sum(task.state == state for task in tasks):,} {state}"
        for state in _ACTIVE
        if any(task.state == state for task in tasks)
    )
    job = f", job {newest.job_id}" if newest.job_id else ""
    order = f"by {view.sort}{' reversed' if view.reverse else ''}"
    place = f"{view.top + 1}-{view.top + len(shown)} of {len(chosen):,} {view.filter}, {order}"
    line = f"round {newest.round}{job}: {human_count(newest.tasks, 'task')}, {states}  [{place}]"
    table = _table("task", "state", "attempt", "host", "done", "left", "in work", "published",
                   "running", "why", numbers=(0, 2, 4, 5, 6, 7, 8))  # fmt: skip
    for task in shown:
        table.add_row(*_task_row(task))
    return [Text(line, "bold", no_wrap=True, overflow="ellipsis"), table]


def _task_row(task: TaskStatus) -> list[str | Text]:
    ago = "" if task.published_s is None else f"{human_duration(task.published_s)} ago"
    left = "" if task.left is None else f"{task.left:,}"
    started = task.attempt > 0
    return [
        str(task.task),
        Text(task.state, _COLOURS.get(task.state, "red")),
        str(task.attempt) if started else "",
        task.host,
        f"{task.completed:,}" if started else "",
        left,
        f"{task.in_flight:,}" if task.state == "running" else "",
        ago,
        human_duration(task.elapsed_s) if started else "",
        task.why,
    ]


def _table(*columns: str, numbers: range | tuple[int, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", expand=False)
    for place, name in enumerate(columns):
        justify = "right" if place in numbers else "left"
        table.add_column(name, justify=justify, no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]  # a Literal
    return table


@contextlib.contextmanager
def keyboard() -> Iterator[Callable[[float], str]]:
    """Give a function that waits so many seconds at most for a key and returns it, or nothing."""
    fd = sys.stdin.fileno()
    if not os.isatty(fd):
        nobody = threading.Event()
        yield lambda pause_s: "q" if nobody.wait(pause_s) else ""
        return
    before = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    try:
        yield lambda pause_s: _key(fd, pause_s)
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _key(fd: int, pause_s: float) -> str:
    ready, _, _ = select.select([fd], [], [], max(0.0, pause_s))
    # A terminal that is gone is always ready and holds nothing.
    text = os.read(fd, 32).decode(errors="replace") if ready else ""
    return "q" if ready and not text else _ESCAPES.get(text, text[:1])


def watch_terminal(readings: Iterable[Status], *, pause_s: float) -> Status | None:
    """Show a run until it ends or the user leaves.

    Args:
        readings: How the run stands, again and again until it ends.
        pause_s: Seconds between two readings.

    Returns:
        How the run ended; None where the user left.
    """
    console, view = Console(), View()
    with keyboard() as wait, Live(console=console, screen=True, auto_refresh=False) as live:
        for found in readings:
            due = time.monotonic() + (pause_s if found.seen == 1 else 0.0)
            key = "redraw"
            while key:
                size = console.size
                drawn = frame(found, view, width=size.width, height=size.height)
                live.update(drawn, refresh=True)
                if found.ended and found.seen == 1:
                    return found
                key = wait(max(0.0, due - time.monotonic()))
                if not view.press(key):
                    return None
    return None
