"""Curves as SVG for the README, readable on light and dark ground."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEFT, TOP, WIDE, HIGH, NAMES = 56, 16, 420, 170, 100
COLOURS = ("#c44", "#27a")


@dataclass(frozen=True)
class Axis:
    """One axis, from 0.

    Attributes:
        ticks: Where values are written; the last one is its end.
        form: How a value is written, as for ``format``: ``{:g} h``.
        title: What it shows.
    """

    ticks: Sequence[float]
    form: str
    title: str = ""

    def part(self, value: float) -> float:
        """Return where a value lies, from 0 to 1."""
        return value / self.ticks[-1]


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], across: Axis, up: Axis) -> str:
    """Return up to two named lines of (across, up) as SVG."""
    size = f"0 0 {LEFT + WIDE + NAMES} {TOP + HIGH + 44}"
    style = "text{fill:#777}line{stroke:#999}polyline{fill:none;stroke-width:2}"
    form = 'font-family="sans-serif" font-size="11"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" {form}>']
    parts.append(f"<style>{style}</style>")
    for tick in up.ticks:
        y = TOP + HIGH * (1 - up.part(tick))
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + WIDE}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 4, up.form.format(tick), "end"))
    for tick in across.ticks:
        x = LEFT + WIDE * across.part(tick)
        parts.append(_text(x, TOP + HIGH + 16, across.form.format(tick), "middle"))
    parts.append(_text(LEFT + WIDE / 2, TOP + HIGH + 36, across.title, "middle"))
    for (name, values), colour in zip(lines.items(), COLOURS[-len(lines) :], strict=True):
        points = [(LEFT + WIDE * across.part(x), TOP + HIGH * (1 - up.part(y))) for x, y in values]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline stroke="{colour}" points="{line}"/>')
        x, y = points[-1]
        parts.append(f'<text x="{x + 6:.0f}" y="{y + 4:.0f}" style="fill:{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
