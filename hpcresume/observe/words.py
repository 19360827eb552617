"""Numbers as people read them."""

from __future__ import annotations


def human_count(count: int, noun: str = "") -> str:
    """Return ``1,234 sources``; the noun is given in its singular."""
    text = f"{count:,}"
    return f"{text} {noun}{'' if count == 1 else 's'}" if noun else text


def human_bytes(size_bytes: float) -> str:
    """Return a size with a binary unit, ``1.5 MiB``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "bytes" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def human_duration(seconds: float | None) -> str:
    """Return a duration in its two largest units, ``2 h 05 min``; ``?`` where unknown."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def human_seconds(seconds: float) -> str:
    """Return a duration that may be short, ``1.5 ms``; from a minute on as the long ones."""
    # The unit is that of what is shown: 0.9996 s are 1 s, not 1000 ms.
    shown = float(f"{seconds:.3g}")
    if shown >= 60:
        return human_duration(seconds)
    if shown >= 1:
        return f"{shown:.3g} s"
    if shown >= 1e-3:
        return f"{shown * 1e3:.3g} ms"
    return f"{shown * 1e6:.3g} µs"


def human_share(part: int, total: int) -> str:
    """Return a part in percent, rounded down so that only all is 100; all of nothing is all."""
    tenths = 1000 * part // total if total else 1000
    return f"{tenths // 10}.{tenths % 10} %"


def human_rate(per_s: float | None) -> str:
    """Return a rate in the unit that leaves a readable number; ``?`` where unknown."""
    if per_s is None:
        return "?"
    if per_s >= 1 or per_s == 0:
        return f"{per_s:,.1f}/s"
    if per_s * 60 >= 1:
        return f"{per_s * 60:.1f}/min"
    return f"{per_s * 3600:.1f}/h"
