"""Who asks for how much memory in the next round."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pyroaring import BitMap

from hpcresume.launch.ladder import Demand, Ladder, fold, make_ladder
from tests.unit.launch.jobs import settings

ALL = BitMap(range(100))


def ladder(
    *,
    base: int = 1000,
    step: float = 1.5,
    most: int = 0,
    missing: str = "",
    grants: Callable[[int], bool] = lambda _mib: True,
) -> Ladder:
    return Ladder(base, step, most, missing, grants)


def sizes(demands: list[Demand]) -> list[tuple[int, list[int] | int, bool]]:
    """Return each demand's memory, its sources (their number where many) and if it is limited."""
    return [
        (d.memory_mib, list(d.sources) if len(d.sources) < 10 else len(d.sources), bool(d.limit))
        for d in demands
    ]


def test_nobody_was_short() -> None:
    """One request for all."""
    assert [(0, 100, False)] == sizes(ladder().sort(ALL, {}))


def test_only_the_short_ask_for_more() -> None:
    """Each step is that much more than what was tried; the others ask for the usual."""
    demands = ladder().sort(ALL, {1000: BitMap([3, 4]), 1500: BitMap([5])})
    assert [(0, 97, False), (1500, [3, 4], False), (2250, [5], False)] == sizes(demands)


def test_the_default_of_slurm_is_not_known() -> None:
    """Then what was tried is what the array task was given."""
    demands = ladder(base=0).sort(ALL, {2711: BitMap([3])})
    assert [(0, 99, False), (4067, [3], False)] == sizes(demands)


def test_submitted_again_with_more() -> None:
    """Whoever asks for more for all has given these more too."""
    assert [(0, 100, False)] == sizes(ladder(base=4000).sort(ALL, {1000: BitMap([3])}))


def test_sources_that_are_done_ask_for_nothing() -> None:
    """Only what is left counts."""
    assert [(0, 100, False)] == sizes(ladder().sort(ALL, {1000: BitMap([200])}))


def test_nothing_but_the_short_is_left() -> None:
    """There is no array without sources."""
    assert [(1500, [3], False)] == sizes(ladder().sort(BitMap([3]), {1000: BitMap([3])}))


def test_the_last_step_is_the_most_allowed() -> None:
    """The cap cuts the last step short; at the cap there is no more, and it is said why."""
    below = ladder(most=1200).sort(ALL, {1000: BitMap([3])})
    assert [(0, 99, False), (1200, [3], False)] == sizes(below)
    (_, capped) = ladder(most=1200).sort(ALL, {1200: BitMap([3])})
    assert (1200, [3], True) == sizes([capped])[0]
    assert "site.memory_max = 1200M allows no more" in capped.limit


def test_the_request_is_the_cap() -> None:
    """Then nobody goes anywhere, from the first round on."""
    assert [(0, 100, True)] == sizes(ladder(most=1000).sort(ALL, {}))
    assert [(0, 100, True)] == sizes(ladder(most=1000).sort(ALL, {1000: BitMap([3])}))


def test_slurm_grants_no_more() -> None:
    """It is asked about the next step only, and its no ends the ladder."""
    asked: list[int] = []

    def grants(mib: int) -> bool:
        asked.append(mib)
        return mib < 2000

    demands = ladder(grants=grants).sort(ALL, {1000: BitMap([3]), 1500: BitMap([4])})
    assert [1500, 2250] == asked
    assert [(0, 98, False), (1500, [3, 4], True)] == sizes(demands)
    assert "Slurm grants no 2250 MiB" in demands[1].limit


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ({"memory_style": "none"}, "takes no --mem"),
        ({"forbidden": ["mem"]}, "takes no --mem"),
        ({"memory_step": 1.0}, "memory_step = 1 asks for no more"),
    ],
)
def test_no_ladder_here(site: dict[str, object], said: str) -> None:
    """Where memory cannot be asked for, all stay together, and the reason is kept."""
    made = make_ladder(settings({"site": site}).settings, lambda _mib: True)
    (demand,) = made.sort(ALL, {1000: BitMap([3])})
    assert (0, ALL) == (demand.memory_mib, demand.sources)
    assert said in demand.limit


def test_the_ladder_of_the_settings() -> None:
    """Sizes are what sbatch takes them for."""
    given = settings({"request": {"mem": "2G"}, "site": {"memory_max": "3T", "memory_step": 2.0}})
    made = make_ladder(given.settings, lambda _mib: True)
    assert (2048, 3 << 20, 2.0) == (made.base_mib, made.max_mib, made.step)
    assert (4096, "") == made.above(2048)


def test_fewer_jobs_than_requests() -> None:
    """Where the site takes fewer jobs, those that ask for least get more than they need."""
    demands = [Demand(0, BitMap([1])), Demand(5, BitMap([2])), Demand(9, BitMap([3]), "no")]
    assert [(5, [1, 2], False), (9, [3], True)] == sizes(fold(demands, 2))
    assert [(9, [1, 2, 3], True)] == sizes(fold(demands, 1)) == sizes(fold(demands, 0))
    assert demands == fold(demands, 3)
