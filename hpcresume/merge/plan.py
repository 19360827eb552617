"""The plan of a round: what was left at one time, dealt over the tasks of its job arrays.

There is one array for each request: sources that need more memory than others are in one of
their own.  Tasks are numbered through the round, so an array's indexes are its tasks' numbers.

Shards are contiguous blocks of the sorted remainder of about equal cost, so a shard's bitmap
is a few runs and an array task reads its own blocks of the manifest only.  Below 10,000
sources of known cost they are dealt longest first instead, and so are, of more, the few that
were seen to take long.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import logging
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from pyroaring import BitMap

from hpcresume.errors import CorruptDataError
from hpcresume.fs import Receipt, ensure_directory, publish, storage_errors
from hpcresume.run.directory import RunDir
from hpcresume.segment import bitmap as bitmaps
from hpcresume.segment.container import (
    DECODE_ERRORS,
    Container,
    encode_container,
    open_container,
)

KIND = b"PLAN"
DEAL_BY_COST_BELOW = 10_000
log = logging.getLogger(__name__)


class Shard(msgspec.Struct, frozen=True):
    """What one array task is to do.

    Attributes:
        sources: Bitmap of its sources.
        attempts: Tries that earlier attempts charged, by source.
        suspects: Bitmaps of sources that were in flight at an unexplained death.
        ran: Seconds that an earlier attempt worked on a source without finishing it.
    """

    sources: bytes
    attempts: dict[int, int]
    suspects: list[bytes]
    ran: dict[int, float] = {}

    def bitmap(self) -> BitMap:
        """Return the shard's sources."""
        return bitmaps.load(self.sources, what="a shard of the plan")


class Launch(msgspec.Struct, frozen=True):
    """How the user asked for the run to be launched; every later round repeats it.

    Attributes:
        cluster: ``local`` or ``slurm``.
        array: The most array tasks of a round.
        throttle: The most array tasks that run at once; 0: all.
        site: Name of the site.
        cwd: Directory in which tasks run, so that relative parameters mean the same there.
    """

    cluster: str
    array: int
    throttle: int = 0
    site: str = "generic"
    cwd: str = ""


class ArrayPlan(msgspec.Struct, frozen=True):
    """One job array of a round: consecutive tasks with one request.

    Attributes:
        first: Its first task.
        tasks: Number of its tasks.
        memory_mib: Memory that each asks for; 0: what the settings say.
        limit: Why a source for which that is not enough cannot be given more; empty: it can.
    """

    first: int
    tasks: int
    memory_mib: int = 0
    limit: str = ""


class PlanFooter(msgspec.Struct, frozen=True):
    """What a plan says of itself.

    Attributes:
        run_id: The run it belongs to.
        round: Number of the round.
        generation: The generation whose remainder it deals, 0 for none.
        code: Number of the code snapshot to run.
        sources: Number of sources in all shards.
        tasks: Number of shards.
        settings: The resolved settings of the round, for the array tasks.
        launch: How the round is launched.
        arrays: Its job arrays, in the order of their tasks; none: one of all tasks.
        learnt: Tries charged to its sources so far, plus the MiB that were not enough for
            them: a round that raises it was of use, though it completed nothing.
    """

    run_id: str
    round: int
    generation: int
    code: int
    sources: int
    tasks: int
    settings: dict[str, Any]
    launch: Launch
    arrays: list[ArrayPlan] = []
    learnt: int = 0


class Plan:
    """An opened plan."""

    def __init__(self, container: Container[PlanFooter]) -> None:
        self._container = container

    @property
    def footer(self) -> PlanFooter:
        """The verified footer."""
        return self._container.footer

    @property
    def arrays(self) -> list[ArrayPlan]:
        """The round's job arrays, in the order of their tasks."""
        return self.footer.arrays or [ArrayPlan(0, self.footer.tasks)]

    def array_of(self, task: int) -> ArrayPlan:
        """Return the job array that a task is an element of.

        Raises:
            IndexError: The round has no such task.
        """
        for one in self.arrays:
            if one.first <= task < one.first + one.tasks:
                return one
        raise IndexError(f"round {self.footer.round} has no task {task}")

    def shard(self, task: int) -> Shard:
        """Return one array task's shard.

        Raises:
            CorruptDataError: The shard's block is damaged.
            IndexError: The round has no such task.
        """
        data = self._container.read_block(task)
        try:
            return msgspec.msgpack.decode(data, type=Shard)
        except DECODE_ERRORS as error:
            raise CorruptDataError(
                f"{self._container.path}: shard {task} cannot be decoded ({error}). "
                "Submit the run again: a new plan is made.",
                path=self._container.path,
            ) from error


def array_name(run: RunDir, round_: int) -> str:
    """Return the name of a round's job array in Slurm, unique to run and round."""
    return f"hpcresume-{run.run_id}-{round_}"


def merge_name(run: RunDir, round_: int) -> str:
    """Return the name of a round's merge jobs in Slurm."""
    return f"{array_name(run, round_)}-merge"


def twin_name(run: RunDir, round_: int) -> str:
    """Return the name of the jobs that run when a merge job of the round dies."""
    return f"{array_name(run, round_)}-twin"


def open_plan(run: RunDir, round_: int) -> Plan:
    """Open a round's plan; reads its footer only.

    Raises:
        CorruptDataError: The plan is damaged or of another run.
        SharedStorageError: It is not there, or the file system refused.
    """
    with storage_errors("read", run.plan_path(round_)):
        return _open_plan(run, round_)


def _open_plan(run: RunDir, round_: int) -> Plan:
    container = open_container(run.fs, run.plan_path(round_), KIND, PlanFooter)
    if container.footer.run_id != run.run_id:
        raise CorruptDataError(
            f"{container.path} belongs to run {container.footer.run_id}. "
            "A file of another run was copied here. Remove it.",
            path=container.path,
        )
    return Plan(container)


def whole_plans(run: RunDir) -> Iterator[Plan]:
    """Yield the plans of a run, the newest first; a damaged one is passed over.

    What a damaged plan dealt is in the remainder, and its number is not used again.
    """
    for round_ in reversed(run.rounds()):
        try:
            yield _open_plan(run, round_)
        except (CorruptDataError, FileNotFoundError) as error:
            log.warning("%s", error)


def is_damaged(run: RunDir, round_: int) -> bool:
    """Tell whether a round's plan is there and cannot be read, so that its number is lost."""
    try:
        _open_plan(run, round_)
    except CorruptDataError:
        return True
    except FileNotFoundError:
        return False
    return False


def newest_plan(run: RunDir) -> Plan | None:
    """Return the newest round's plan, None before the first."""
    return next(whole_plans(run), None)


def deal(
    remainder: BitMap,
    shards: int,
    weight_of: Callable[[int], float] | None = None,
    measured: Mapping[int, float] | None = None,
) -> list[BitMap]:
    """Deal a remainder over at most ``shards`` shards of equal cost, none of them empty.

    Up to a number of sources the longest go first, each to the least loaded shard.  Above it
    only those that are known to be slow do, and the others fill the shards up in contiguous
    blocks.

    Args:
        remainder: The sources to deal.
        shards: The most shards wanted, at least 1.
        weight_of: Expected cost of a source; None where all cost the same, which is 1.
        measured: Cost of the sources that have been seen to take long, in the same unit.
    """
    shards = min(shards, len(remainder))
    if shards == 0:
        return []
    slow = {index: cost for index, cost in (measured or {}).items() if index in remainder}
    if weight_of is None and not slow:
        return _blocks(remainder, [1.0] * shards)
    weight_of = weight_of or (lambda _: 1.0)
    if len(remainder) < DEAL_BY_COST_BELOW:
        costs = {index: slow[index] if index in slow else weight_of(index) for index in remainder}
        return [shard for shard in _longest_first(costs, shards)[0] if shard]
    quick = remainder - BitMap(slow)
    dealt, loads = _longest_first(slow, shards)
    blocks = _blocks(quick, _room(loads, sum(map(weight_of, quick))), weight_of)
    both = (one | other for one, other in zip(dealt, blocks, strict=True))
    return [shard for shard in both if shard]


def share(total: int, sizes: Sequence[int]) -> list[int]:
    """Share a number of tasks out among groups of sources, in proportion, at least one each.

    The result is above ``total`` only where there are more groups than tasks, and no share
    above its group's size.
    """
    shares = [1] * len(sizes)
    for _ in range(min(total, sum(sizes)) - len(sizes)):
        # The one whose tasks would hold the most goes next.
        neediest = max(range(len(sizes)), key=lambda n: (sizes[n] - shares[n]) / shares[n])
        shares[neediest] += 1
    return shares


def _longest_first(costs: Mapping[int, float], shards: int) -> tuple[list[BitMap], list[float]]:
    """Give each source to the least loaded shard; return the shards and their loads."""
    heap = [(0.0, 0, shard) for shard in range(shards)]
    dealt, loads = [BitMap() for _ in range(shards)], [0.0] * shards
    for cost, index in sorted(((cost, index) for index, cost in costs.items()), reverse=True):
        load, count, shard = heapq.heappop(heap)
        dealt[shard].add(index)
        loads[shard] = load + cost
        heapq.heappush(heap, (load + cost, count + 1, shard))
    return dealt, loads


def _room(loads: Sequence[float], more: float) -> list[float]:
    """Return what each shard has room for, so that ``more`` makes all of them equal."""
    mean = (sum(loads) + more) / len(loads)
    room = [max(0.0, mean - load) for load in loads]
    return room if any(room) else [1.0] * len(loads)


def _blocks(
    sources: BitMap, room: Sequence[float], weight_of: Callable[[int], float] | None = None
) -> list[BitMap]:
    """Cut sources into contiguous blocks, one for each room and as costly in proportion."""
    ends = list(itertools.accumulate(room))
    costs = array("d", itertools.accumulate(map(weight_of, sources)) if weight_of else ())
    if costs and costs[-1] > 0:
        cuts = [bisect.bisect_left(costs, costs[-1] * end / ends[-1]) + 1 for end in ends[:-1]]
    else:
        cuts = [int(len(sources) * end / ends[-1]) for end in ends[:-1]]
    return [sources[start:end] for start, end in itertools.pairwise([0, *cuts, len(sources)])]


def make_shards(
    dealt: list[BitMap],
    attempts: Mapping[int, int],
    suspects: list[BitMap],
    ran: Mapping[int, float] | None = None,
) -> list[Shard]:
    """Return the shards of a deal, each with what earlier attempts learnt of its sources."""
    charged, ran = BitMap(attempts), ran or {}
    interrupted = BitMap(ran)
    shards = []
    for sources in dealt:
        groups = [bitmaps.dump(found) for group in suspects if (found := group & sources)]
        tries = {index: attempts[index] for index in charged & sources}
        seconds = {index: ran[index] for index in interrupted & sources}
        shards.append(Shard(bitmaps.dump(sources), tries, groups, seconds))
    return shards


def write_plan(run: RunDir, footer: PlanFooter, shards: list[Shard]) -> Receipt:
    """Publish a round's plan.

    Raises:
        FileExistsError: Another process made this round's plan first.
        SharedStorageError: The file system refused.
    """

    def blocks() -> Iterator[bytes]:
        for shard in shards:
            yield msgspec.msgpack.encode(shard)

    ensure_directory(run.fs, run.round_path(footer.round))
    parts = encode_container(KIND, blocks(), footer)
    return publish(run.fs, run.plan_path(footer.round), parts, label="plan", exclusive=True)
