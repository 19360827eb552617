"""Repetitions, medians, and the table that comes of them."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

OURS = ("hpcresume", "ray", "lmdb", "pyarrow", "orjson", "pyroaring")


@dataclass
class Case:
    """One line of the table.

    Attributes:
        name: What is measured.
        group: Lines of one group are measured in turn, and compared with each other.
        unit: Of the figure.
        measure: Runs it once in an empty directory and returns the figure and further values;
            checks the output on the way.
        against: Name of the line that its ratio is to; empty: none.
        target: What the ratio should be, or the figure where it is to no other: ``>= 0.8``.
        figures: One for each repetition that succeeded.
        loads: The machine's load before each.
        values: What else the last one gave.
        reason: Why the last repetition that failed did so.
        unavailable: Whether it cannot be measured here at all.
    """

    name: str
    group: str
    unit: str
    measure: Callable[[Path], tuple[float, dict[str, Any]]]
    against: str = ""
    target: str = ""
    figures: list[float] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    unavailable: bool = False

    def plain(self, ratio: float | None) -> dict[str, Any]:
        """Return the line as JSON values."""
        line: dict[str, Any] = {"name": self.name, "group": self.group, "unit": self.unit}
        if self.figures:
            line |= {
                "median": statistics.median(self.figures),
                "min": min(self.figures),
                "max": max(self.figures),
                "repetitions": len(self.figures),
                "load": [min(self.loads), max(self.loads)],
            }
        if ratio is not None:
            line |= {"against": self.against, "ratio": ratio}
        judged = ratio if self.against else line.get("median")
        if self.target:
            line |= {"target": self.target, "verdict": verdict(judged, self.target)}
        return line | ({"reason": self.reason} if self.reason else {}) | {"values": self.values}


def verdict(value: float | None, target: str) -> str:
    """Tell whether a target such as ``<= 1.25`` is met."""
    if value is None:
        return "not measured"
    relation, _, bound = target.partition(" ")
    is_met = value >= float(bound) if relation == ">=" else value <= float(bound)
    return "met" if is_met else "missed"


def header() -> dict[str, Any]:
    """Return the machine, the versions and the time."""
    model = next(
        (line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), ""
    )
    return {
        "machine": f"{len(os.sched_getaffinity(0))} cores, {model or platform.machine()}",
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in OURS},
        "at": datetime.now(UTC).isoformat(timespec="minutes"),
    }


def _cpuinfo() -> Iterator[str]:
    path = Path("/proc/cpuinfo")
    yield from path.read_text().splitlines() if path.exists() else ()


def report(cases: list[Case]) -> dict[str, Any]:
    """Return everything as JSON values."""
    medians = {
        (case.group, case.name): statistics.median(case.figures) for case in cases if case.figures
    }
    lines = []
    for case in cases:
        own = medians.get((case.group, case.name))
        other = medians.get((case.group, case.against))
        ratio = own / other if own is not None and other else None
        lines.append(case.plain(ratio))
    return {"schema": 1, **header(), "lines": lines}


def markdown(found: dict[str, Any]) -> str:
    """Return the report as a Markdown table."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    text = [
        f"{found['machine']}, {found['memory_gib']} GiB, {found['system']}.",
        f"{versions}; {found['at']}.",
        "",
        "| | | median | min to max | n | load | ratio | target | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in found["lines"]:
        name = f"{line['name']}{_version(line)}"
        if "median" not in line:
            text.append(
                f"| {line['group']} | {name} | {line.get('reason', 'not run')} | | | | | | |"
            )
            continue
        spread = f"{_short(line['min'])} to {_short(line['max'])}"
        low, high = line["load"]
        ratio = f"{line['ratio']:.2f} of {line['against']}" if "ratio" in line else ""
        text.append(
            f"| {line['group']} | {name} | {_short(line['median'])} {line['unit']} | {spread} "
            f"| {line['repetitions']} | {low:.0f} to {high:.0f} | {ratio} "
            f"| {line.get('target', '')} | {line.get('verdict', '')} |"
        )
    return "\n".join(text) + "\n"


def _version(line: dict[str, Any]) -> str:
    return f" {line['values']['version']}" if "version" in line["values"] else ""


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
