"""What must hold, checked whenever anything visible changes.

The oracle keeps its own account of what was committed and what was promised, and reads each
published file once, when its name appears.  It is told of every name that appears or goes, of
every commit, release, receipt and sweep, and of every restart; so what it says holds at every
step, not only at the end, where lost work would have been done again without a word.

I1 published implies recoverable; I2 values; I3 generations only grow; I4 one winner per
source; I5 the remainder is exact; I6 files are written once; I7 one writer per file and
epoch; I8 the ledger keeps what it acknowledged; L1-L3 progress, bounded repetition, and
quarantine for what deserves it, and for nothing else.
"""

from __future__ import annotations

import os
import re
import struct
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pyroaring import BitMap

from hpcresume.errors import CorruptDataError
from hpcresume.merge.generation import Union, _load
from hpcresume.merge.packs import Packs
from hpcresume.merge.plan import open_plan
from hpcresume.run.directory import AttemptRef, RunDir
from hpcresume.segment.segment import Segment, Writer, open_segment
from hpcresume.task.messages import Work
from tests.simulation.world import RUN, Process, ViolationError, World
from tests.support.places import RUN_ID, row, run_info
from tests.support.simfs import SimFileSystem

if TYPE_CHECKING:
    from tests.simulation.cluster import Element

_SEGMENT = re.compile(RUN + r"/rounds/(\d+)/tasks/(\d+)/e(\d+)/(seg-(\d+)-[0-9a-f]{16})")
_GENERATION = re.compile(RUN + r"/merge/gen-(\d+)")
_PACK = re.compile(RUN + r"/merge/pack-(\d+)")
_PLAN = re.compile(RUN + r"/rounds/(\d+)/plan")
Charge = tuple[int, int]
"""A source, and the number of the try that failed."""


def rows_of(source: int) -> bytes:
    """Return the rows that a source must have in the result."""
    return b"".join(row(source, n) for n in range(source % 3))


@dataclass
class SegmentSeen:
    """A published segment, as it was when its name appeared."""

    writer: Writer
    seq: int
    name: str
    completed: BitMap
    charges: dict[Charge, bool]
    node: Any
    size: int


@dataclass
class Committed:
    """What one ledger acknowledged: sources and charges by commit; ``lost``: no longer owed."""

    writer: Writer
    commits: dict[int, tuple[BitMap, dict[Charge, bool]]] = field(default_factory=dict)
    lost: bool = False
    known: dict[int, int] = field(default_factory=dict)


class Oracle:
    """Checks one world."""

    def __init__(self, world: World, sources: int, max_attempts: int) -> None:
        self._world, self._server = world, world.server
        self.sources, self.max_attempts = BitMap(range(sources)), max_attempts
        self._client = SimFileSystem(world.server)
        self._run = RunDir(RUN, run_info(), self._client)
        self.segments: dict[str, SegmentSeen] = {}
        self.generations: dict[int, Union] = {}
        self._all_generations: dict[int, list[Union]] = defaultdict(list)
        self._names: dict[str, Any] = {}
        self._promised: dict[Writer, BitMap] = defaultdict(BitMap)
        self._promised_charges: dict[Writer, set[Charge]] = defaultdict(set)
        self._acknowledged: set[str] = set()
        self.ledgers: dict[str, Committed] = {}
        self.rotten: set[str] = set()
        self.rotten_generations = False
        self._forgotten = False
        self._allocated: dict[Writer, Process] = {}
        self.executed: dict[int, int] = defaultdict(int)
        self.true_charges: dict[int, set[tuple[Writer, int]]] = defaultdict(set)
        self._alone: dict[int, set[tuple[Writer, int]]] = defaultdict(set)
        self.is_stopped = False
        self.resumed = 0
        self._owners: dict[int, str] = {}
        self._rotten_segments: list[SegmentSeen] = []
        self._seen: dict[tuple[Writer, str], BitMap] = {}
        self._relied_on = 0
        self.plans: list[str] = []
        self.packs: list[str] = []
        self._rotted_at: dict[str, int] = {}
        self._removed = False

    def fail(self, text: str) -> None:
        """Say what does not hold.

        Raises:
            ViolationError: Always.
        """
        raise ViolationError(text)

    def begin(self) -> None:
        """Take up what is there."""
        for path in self._server.files():
            self._names[path] = (self._server.find(path), None)

    # -- names ----------------------------------------------------------------------------------

    def before(self, op: str, path: str, process: Process) -> None:
        """A call is about to change a name."""
        if os.path.basename(path).startswith("."):
            return
        known = self._names.get(path)
        if op == "rename" and known is not None:
            self.fail(f"I6: {process.name} renames over {path}")
        if op == "unlink" and known is not None and known[1] is not process:
            if not (match := _SEGMENT.fullmatch(path)) or process.name != "clean":
                self.fail(f"I6: {process.name} removes {path}")
            self._see_removal(path, match, process)

    def after(self, op: str, path: str, process: Process) -> None:
        """A name has appeared or is gone."""
        if os.path.basename(path).startswith("."):
            return
        if op == "unlink":
            self._names.pop(path, None)
            self.segments.pop(path, None)
            return
        self._names[path] = (self._server.find(path), process)
        if _PACK.fullmatch(path):
            self.packs.append(path)
        if op == "create":
            return  # written in place, on a file system without links; readers check it
        if match := _SEGMENT.fullmatch(path):
            self._see_segment(path, match)
        elif match := _GENERATION.fullmatch(path):
            self._see_generation(int(match[1]))
        elif match := _PLAN.fullmatch(path):
            self._see_plan(int(match[1]))
        elif match := _PACK.fullmatch(path):
            self._see_pack(int(match[1]))

    def _see_segment(self, path: str, match: re.Match[str]) -> None:
        writer = Writer(int(match[1]), int(match[2]), int(match[3]))
        try:
            segment = open_segment(self._client, path, run_id=RUN_ID)
            segment.container.verify()
            self._check_rows(segment)
            charges = {(f.source, f.attempt): f.retry for f in segment.failures()}
        except CorruptDataError as error:
            self.fail(f"I2: a segment was given its name before it was whole: {error}")
        if segment.footer.writer != writer:
            self.fail(f"I7: {path} says it is by {segment.footer.writer}")
        if not segment.completed <= self.sources:
            self.fail(f"I4: {path} completes what is no source")
        node = self._server.file(path)
        self._seen[writer, match[4]] = segment.completed
        self.segments[path] = SegmentSeen(
            writer, int(match[5]), match[4], segment.completed, charges, node, len(node.volatile)
        )

    def _check_rows(self, segment: Segment) -> None:
        for number in segment.frame_numbers():
            for source, found in segment.frame(number).sources():
                if found != rows_of(source):
                    self.fail(f"I2: source {source} has other rows in {segment.container.path}")

    def _see_pack(self, number: int) -> None:
        try:
            pack = Packs(self._run).open(number)
            for key in pack.blocks:
                pack.segment(key).verify()
                self._check_rows(pack.segment(key))
        except CorruptDataError as error:
            self.fail(f"I2: a pack was given its name with a segment that is not whole: {error}")

    def _see_removal(self, path: str, match: re.Match[str], process: Process) -> None:
        """The own name of a segment is about to be removed; some pack has to hold it."""
        self._removed = True
        key = Writer(int(match[1]), int(match[2]), int(match[3])), match[4]
        for pack in self.packs:
            if self._holds(pack, key):
                node = self._server.file(pack)
                if (seen := self.segments.get(path)) is not None:
                    size = len(node.volatile)
                    self.segments[f"{pack}#{path}"] = replace(seen, node=node, size=size)
                return
        # What went bad after it had been read back could not be known.
        if not any(self._rotted_at.get(pack, -1) >= process.born for pack in self.packs):
            self.fail(f"I1: {process.name} removes {path}, which no pack holds for good")
        self.rotten.add(path)

    def _holds(self, path: str, key: tuple[Writer, str]) -> bool:
        number = int(path.rpartition("-")[2])
        try:
            Packs(self._run).open(number).segment(key).verify()
        except (CorruptDataError, FileNotFoundError):
            return False
        return self._server.is_durable(path)

    def available(self, writer: Writer) -> BitMap:
        """Return the sources that a writer's visible, whole segments complete."""
        return BitMap().union(*(s.completed for s in self.segments.values() if s.writer == writer))

    def _available_charges(self, writer: Writer) -> set[Charge]:
        return {c for s in self.segments.values() if s.writer == writer for c in s.charges}

    # -- promises -------------------------------------------------------------------------------

    def resumes(self) -> None:
        """Somebody is about to take back stop marks."""
        self.resumed += 1
        self.is_stopped = False

    def stopped(self, resumed: int) -> None:
        """A stop mark was acknowledged; ``resumed``: how often it was taken back before."""
        going_on = any(p.name == "submit" and p.alive for p in self._world.processes)
        self.is_stopped = self.resumed == resumed and not going_on

    def promised_of(self, element: Element) -> BitMap:
        """Return the sources that earlier attempts of an array task had receipts for."""
        return BitMap().union(
            *(
                sources
                for writer, sources in self._promised.items()
                if (writer.round, writer.task) == (element.round, element.task)
                and not self._is_rotten(writer)
            )
        )

    def starts(self, element: Element, *, stopped: bool, done: BitMap, work: Work) -> None:
        """An attempt that sees everything begins to work."""
        if stopped and self.is_stopped:
            self.fail(f"I5: task {element.round}/{element.task} starts in spite of a stop mark")
        again = BitMap.deserialize(work.sources) & done
        # What was removed is told by the newest generation alone.
        excused = self._removed and self.rotten_generations
        if again - BitMap().union(*(s.completed for s in self._rotten_segments)) and not excused:
            self.fail(f"L2: {list(again)} had a receipt, and their task works on them again")

    def allocated(self, ref: AttemptRef, process: Process, array: str) -> None:
        """An attempt was given its epoch."""
        owner = self._owners.setdefault(ref.round, array)
        if owner != array:
            self.fail(f"I5: arrays {owner} and {array} both work on round {ref.round}")
        writer = Writer(ref.round, ref.task, ref.epoch)
        if writer in self._allocated:
            self.fail(f"I7: {writer} was given out twice")
        self._allocated[writer] = process

    def committed(self, path: str, seq: int, sources: BitMap, charges: dict[Charge, bool]) -> None:
        """A ledger acknowledged a commit."""
        ledger = self.ledgers[path]
        if seq in ledger.commits:
            self.fail(f"I8: commit {seq} of {path} was numbered twice")
        for source, attempt in charges:
            if attempt <= ledger.known.get(source, 0):
                self.fail(f"L3: try {attempt} of source {source} was charged before")
        ledger.commits[seq] = (sources, charges)

    def charging(self, path: str, charges: dict[Charge, bool]) -> None:
        """A ledger is about to commit failures; it may, even where it says nothing of it."""
        writer = self.ledgers[path].writer
        for source, attempt in charges:
            self.true_charges[source].add((writer, attempt))

    def alone(self, writer: Writer, source: int) -> None:
        """A driver works on one source alone; if it dies now, that is charged to the source."""
        self._alone[source].add((writer, 0))

    def receipt(self, path: str, after: int, last: int) -> None:
        """Publishing the commits after one up to another was acknowledged."""
        ledger = self.ledgers.get(path)
        if ledger is None or ledger.lost:
            return
        for seq, (sources, charges) in ledger.commits.items():
            if after < seq <= last:
                self._promised[ledger.writer] |= sources
                self._promised_charges[ledger.writer].update(charges)
        self._check_promises(ledger.writer)

    def lose(self, path: str) -> None:
        """A ledger is gone with its disk, or damaged: what only it held is not owed."""
        if path in self.ledgers:
            self.ledgers[path].lost = True

    def released(self, path: str, key: bytes) -> None:
        """A ledger deletes a commit."""
        ledger = self.ledgers.get(path)
        if ledger is None or ledger.lost:
            return
        (seq,) = struct.unpack(">Q", key)
        commit = ledger.commits.get(seq)
        if commit is not None and not self._is_safe(ledger.writer, *commit):
            self.fail(f"I1: {path} releases commit {seq}, which is not published")

    def swept(self, path: str) -> None:
        """A ledger's directory is removed."""
        ledger = self.ledgers.pop(path, None)
        if ledger is None or ledger.lost:
            return
        for seq, commit in ledger.commits.items():
            if not self._is_safe(ledger.writer, *commit):
                self.fail(f"I1: {path} is removed, and commit {seq} of it is not published")

    def _is_safe(self, writer: Writer, sources: BitMap, charges: dict[Charge, bool]) -> bool:
        if self._is_rotten(writer):
            return True
        return sources <= self.available(writer) and set(charges) <= self._available_charges(writer)

    def _is_rotten(self, writer: Writer) -> bool:
        prefix = f"{RUN}/rounds/{writer.round:04d}/tasks/{writer.task:05d}/e{writer.epoch:03d}/"
        return any(path.startswith(prefix) for path in self.rotten)

    def _check_promises(self, writer: Writer) -> None:
        if self._is_rotten(writer):
            return
        lost = self._promised[writer] - self.available(writer)
        if lost:
            self.fail(f"I1: {writer} had a receipt for {list(lost)}, which cannot be read")
        if not self._promised_charges[writer] <= self._available_charges(writer):
            self.fail(f"I1: {writer} had a receipt for failures that cannot be read")

    def acknowledged(self, path: str) -> None:
        """A file was published, and its publisher was told so."""
        self._acknowledged.add(path)
        self._check_acknowledged()

    def relied_on(self, number: int) -> None:
        """A merge goes by a generation from now on."""
        self._relied_on = max(self._relied_on, number)
        self._check_relied_on()

    def _check_relied_on(self) -> None:
        union = self.generations.get(self._relied_on)
        if union is None or self.rotten:
            return
        seen = {(s.writer, s.name) for s in self.segments.values()}
        for key in union.won:
            if key not in seen:
                self.fail(f"I1: generation {self._relied_on} counts {key}, which is gone")

    def _check_acknowledged(self) -> None:
        for path in self._acknowledged:
            if path not in self._names:
                self.fail(f"I1: {path} was acknowledged and is gone")

    def restarted(self) -> None:
        """The file server has lost what was not synced."""
        for path, (node, _) in list(self._names.items()):
            try:
                found = self._server.find(path)
            except OSError:
                found = None
            if found is not node:
                del self._names[path]
                for place in self._places(path):
                    del self.segments[place]
                if match := _GENERATION.fullmatch(path):
                    self.generations.pop(int(match[1]), None)
                    self._forgotten = True
        for path, segment in list(self.segments.items()):
            if len(segment.node.volatile) != segment.size:
                del self.segments[path]
        for writer in list(self._promised):
            self._check_promises(writer)
        self._check_acknowledged()
        self._check_relied_on()

    def rotted(self, path: str) -> None:
        """A byte of a file has changed."""
        self.rotten.add(path)
        self._rotted_at[path] = self._world.moments
        for place in self._places(path):
            self._rotten_segments.append(self.segments.pop(place))
            self.rotten.add(place.rpartition("#")[2])
        if match := _GENERATION.fullmatch(path):
            self.rotten_generations = True
            self.generations.pop(int(match[1]), None)

    def _places(self, path: str) -> list[str]:
        """Return the segments that lie in a file: itself, or what is left of them in a pack."""
        return [place for place in self.segments if place.partition("#")[0] == path]

    # -- generations ----------------------------------------------------------------------------

    def _see_generation(self, number: int) -> None:
        union = _load(self._run, number)
        # A merge may have read one that a restart of the server then forgot.
        below = max((known for known in self.generations if known < number), default=0)
        before = self.generations.get(below)
        if before is None and number > 1 and not (self.rotten_generations or self._forgotten):
            self.fail(f"I3: generation {number} has none before it")
        self.generations[number] = union
        self._all_generations[number].append(union)
        won = list(union.won.values())
        if sum(map(len, won)) != len(union.completed) or BitMap().union(*won) != union.completed:
            self.fail(f"I4: generation {number} gives a source to two writers, or to none")
        if not union.completed <= self.sources:
            self.fail(f"I4: generation {number} completes what is no source")
        for key, sources in union.won.items():
            if not sources <= self._seen[key]:
                self.fail(f"I2: generation {number} has {list(sources)} from {key}, which never "
                          "completed all of them")  # fmt: skip
        self._check_counts(number, union)
        if before is not None:
            self._check_growth(number, before, union)

    def _check_growth(self, number: int, before: Union, union: Union) -> None:
        gone = [key for key in before.won if key not in union.won]
        for writer, name in gone:
            if not any(path.endswith(f"e{writer.epoch:03d}/{name}") for path in union.bad):
                self.fail(f"I3: generation {number} forgets {writer}, {name}")
        for key, won in before.won.items():
            if key in union.won and not won <= union.won[key]:
                self.fail(f"I3: generation {number} takes sources from {key}")
        if gone or self.rotten:
            return
        done = before.completed.copy()
        fresh = [key for key in union.won if key not in before.won]
        seen = {(s.writer, s.name): s for s in self.segments.values()}
        for key in sorted(fresh, key=lambda key: (key[0], seen[key].seq, key[1])):
            expected = seen[key].completed - done
            if union.won[key] != expected:
                self.fail(f"I3: {key} won {list(union.won[key])}, not {list(expected)}")
            done |= expected

    def _check_counts(self, number: int, union: Union) -> None:
        if self.rotten:
            return
        seen = {(s.writer, s.name): s for s in self.segments.values()}
        charges: dict[int, set[tuple[Writer, int]]] = defaultdict(set)
        final = set()
        for writer, name in union.won:
            for (source, attempt), retry in seen[writer, name].charges.items():
                if source not in union.completed:
                    charges[source].add((writer, attempt))
                    final |= set() if retry else {source}
        found = {source: failure.attempts for source, failure in union.failures.items()}
        expected = {source: len(tries) for source, tries in charges.items()}
        if found != expected:
            self.fail(f"L3: generation {number} counts {found} failed tries, not {expected}")
        quarantined = {s for s, n in expected.items() if n >= self.max_attempts} | final
        if set(union.quarantined()) != quarantined:
            self.fail(f"L3: generation {number} quarantines {list(union.quarantined())}, not "
                      f"{sorted(quarantined)}")  # fmt: skip
        for source, tries in charges.items():
            if not tries <= self.true_charges[source] | self._alone[source]:
                self.fail(f"L3: source {source} is charged for what it did not do")

    def _see_plan(self, round_: int) -> None:
        self.plans.append(f"{RUN}/rounds/{round_:04d}/plan")
        plan = open_plan(self._run, round_)
        dealt = [plan.shard(task).bitmap() for task in range(plan.footer.tasks)]
        everything = BitMap().union(*dealt)
        if sum(map(len, dealt)) != len(everything) or not all(dealt):
            self.fail(f"I5: round {round_} deals a source twice, or an empty shard")
        for union in self._all_generations.get(plan.footer.generation, [Union()]):
            left = self.sources - union.settled() - union.withheld
            if left == everything:
                self._check_shards(plan, union)
                return
            # What was published since that generation may be left out, too.
            if everything <= left and left - everything <= self._settled_by_segments():
                return
        if not self.rotten_generations:
            self.fail(f"I5: round {round_} deals {list(everything)}, which is not what "
                      f"generation {plan.footer.generation} leaves")  # fmt: skip

    def _settled_by_segments(self) -> BitMap:
        done = BitMap().union(*(segment.completed for segment in self.segments.values()))
        charged = BitMap(s for each in self.segments.values() for s, _ in each.charges)
        return done | charged

    def _check_shards(self, plan: Any, union: Union) -> None:
        suspects, known = BitMap().union(*union.open_suspects()), union.attempts()
        # What was published since that generation may be known, too.
        charges = Counter(s for each in self.segments.values() for s, _ in each.charges)
        for task in range(plan.footer.tasks):
            shard = plan.shard(task)
            mine = shard.bitmap()
            for source in mine:
                least, told = known.get(source, 0), shard.attempts.get(source, 0)
                if not least <= told <= max(least, charges[source]):
                    self.fail(f"L3: shard {task} knows of {told} failed tries of {source}, "
                              f"not of {least} to {charges[source]}")  # fmt: skip
            groups = [BitMap.deserialize(data) for data in shard.suspects]
            if not suspects & mine <= BitMap().union(*groups) <= mine:
                self.fail(f"L3: shard {task} does not know its suspects")

    # -- what a merge is told, and the end ------------------------------------------------------

    def promised(self) -> dict[Writer, BitMap]:
        """Return the sources that whole writers had receipts for."""
        return {
            writer: sources.copy()
            for writer, sources in self._promised.items()
            if not self._is_rotten(writer)
        }

    def read(self, union: Union, promised: dict[Writer, BitMap]) -> None:
        """A reader that sees everything has read the union; ``promised``: before it began."""
        whole = (s for writer, s in promised.items() if not self._is_rotten(writer))
        lost = BitMap().union(*whole) - union.completed
        if lost:
            self.fail(f"I1: {list(lost)} had a receipt, and a merge does not find them")

    def worked(self, source: int) -> None:
        """A source was worked on."""
        self.executed[source] += 1

    def finished(self, union: Union, rows: dict[int, bytes], poison: set[int]) -> None:
        """The run says that nothing is left to do."""
        settled = union.settled()
        if settled != self.sources:
            self.fail(f"L1: the run ended without {list(self.sources - settled)}")
        wrong = set(union.quarantined()) - poison
        for source in wrong:
            tries = self.true_charges[source] | self._alone[source]
            if len(tries) < self.max_attempts:
                self.fail(f"L3: source {source} was quarantined after {len(tries)} failed tries")
        if set(rows) != set(union.completed):
            self.fail("I2: the result has other sources than the union")
        for source, found in rows.items():
            if found != rows_of(source):
                self.fail(f"I2: source {source} has other rows in the result")
