"""More memory for the sources that ran out of it, and for no others.

A source that does not fit into an array task's memory goes to a task of the next round that
asks for ``site.memory_step`` times as much, up to ``site.memory_max`` or to what Slurm grants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import msgspec
from pyroaring import BitMap

from hpcresume.config.settings import Settings
from hpcresume.launch.directives import mebibytes


class Demand(msgspec.Struct, frozen=True):
    """Sources that ask for the same memory.

    Attributes:
        memory_mib: What their array tasks ask for; 0: what the settings say.
        sources: The sources.
        limit: Why they cannot be given more if that is not enough; empty: they can.
    """

    memory_mib: int
    sources: BitMap
    limit: str = ""


class Ladder(msgspec.Struct, frozen=True):
    """How much memory comes after how much.

    Attributes:
        base_mib: What every array task asks for; 0: Slurm's default.
        step: Factor from one step to the next.
        max_mib: The most to ask for; 0: what Slurm grants.
        missing: Why there is no ladder here; empty where there is one.
        is_granted: Whether Slurm would take a request for so much.
    """

    base_mib: int
    step: float
    max_mib: int
    missing: str
    is_granted: Callable[[int], bool]

    def above(self, tried_mib: int) -> tuple[int, str]:
        """Return the memory to ask for next, or what was tried and why there is no more."""
        if self.max_mib and tried_mib >= self.max_mib:
            return tried_mib, (
                f"site.memory_max = {self.max_mib}M allows no more. "
                "Raise it, submit with a larger --mem, or split the source"
            )
        wanted = math.ceil(tried_mib * self.step)
        if self.max_mib:
            wanted = min(wanted, self.max_mib)
        if not self.is_granted(wanted):
            return tried_mib, (
                f"Slurm grants no {wanted} MiB to such a request. "
                "Choose larger nodes (-p, -C), or split the source"
            )
        return wanted, ""

    def sort(self, remainder: BitMap, short: Mapping[int, BitMap]) -> list[Demand]:
        """Return what a round's sources ask for, least memory first.

        Args:
            remainder: The round's sources.
            short: Sources by the memory in MiB that was not enough for them.
        """
        if self.missing:
            return [Demand(0, remainder, self.missing)]
        limit = self.above(self.base_mib)[1] if 0 < self.max_mib <= self.base_mib else ""
        found = {0: Demand(0, remainder, limit)}
        for tried, group in sorted(short.items()):
            sources = group & remainder
            # Whoever submitted again with more memory gave these more as well.
            if not sources or tried < self.base_mib:
                continue
            wanted, limit = self.above(tried)
            wanted = 0 if wanted == self.base_mib else wanted
            rest = found[0]
            found[0] = Demand(0, rest.sources - sources, rest.limit)
            same = found.get(wanted, Demand(wanted, BitMap()))
            found[wanted] = Demand(wanted, same.sources | sources, limit or same.limit)
        return [demand for _, demand in sorted(found.items()) if demand.sources]


def make_ladder(settings: Settings, is_granted: Callable[[int], bool]) -> Ladder:
    """Return the ladder of a run on Slurm.

    Args:
        settings: Say what is asked for and what the site takes.
        is_granted: Whether Slurm would take a request for so many MiB.
    """
    site = settings.site
    missing = ""
    if site.memory_style == "none" or "mem" in site.forbidden:
        missing = (
            f"site {site.name!r} takes no --mem, so no more can be asked for. "
            "Ask for more cores (-c), or split the source"
        )
    elif site.memory_step <= 1:
        missing = (
            f"site.memory_step = {site.memory_step:g} asks for no more. "
            "Submit with a larger --mem, or split the source"
        )
    base = mebibytes(settings.request.mem) if settings.request.mem else 0
    most = mebibytes(site.memory_max) if site.memory_max else 0
    return Ladder(base, site.memory_step, most, missing, is_granted)


def fold(demands: list[Demand], most: int) -> list[Demand]:
    """Return at most ``most`` demands: those that ask for least join those above them."""
    while len(demands) > max(1, most):
        least, above, *rest = demands
        joined = Demand(above.memory_mib, least.sources | above.sources, above.limit)
        demands = [joined, *rest]
    return demands
