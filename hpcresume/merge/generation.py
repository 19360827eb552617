"""Generations: the union of all segments, and which segment's copy of a source counts.

A generation is made from the one before it and the segments it has not folded yet, in the
order (round, task, epoch, sequence, digest).  A source belongs to the first segment that
completes it, and once a generation says so, no later one says otherwise; the exception is a
segment whose body was found bad, whose sources a later generation takes back.  Where a
segment lies, under its own name or in a pack, makes no difference.

Making a generation is idempotent and may be killed anywhere: it is one exclusive publish.
Two merges at once cannot both write generation ``n``; the second one reads the first's.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import msgspec
from pyroaring import BitMap

from hpcresume.errors import CorruptDataError, RunDirError, SharedStorageError
from hpcresume.fs import publish, storage_errors
from hpcresume.merge.packs import Key, Packs, key_of, name_of
from hpcresume.run.directory import AttemptRef, RunDir, SegmentName
from hpcresume.segment import bitmap as bitmaps
from hpcresume.segment.container import (
    DECODE_ERRORS,
    Container,
    encode_container,
    open_container,
)
from hpcresume.segment.segment import Failure, Segment, SegmentFooter, Writer, open_segment

KIND = b"GENR"
STAYS = 1 << 62
_MANY = 64
log = logging.getLogger(__name__)


class Folded(msgspec.Struct, frozen=True, array_like=True):
    """A segment that a generation has taken in.

    Attributes:
        writer: Its writer.
        name: Its name.
        won: How many sources it won.
        size_bytes: Its size; 0 where an older version did not tell.
        pack: Number of the pack that holds it; 0: none.
    """

    writer: Writer
    name: str
    won: int
    size_bytes: int = 0
    pack: int = 0


class SourceFailures(msgspec.Struct, frozen=True):
    """What is known of a source that failed and is not completed.

    Attributes:
        attempts: How many tries were charged to it.
        quarantined: Whether it will not be tried again.
        last: Its last failure.
        charged: Each charged try as (round, task, epoch, number of the try), so that a
            commit that was published twice is charged once.
    """

    attempts: int
    quarantined: bool
    last: Failure
    charged: list[tuple[int, int, int, int]] = []


_FAILURES = msgspec.msgpack.Decoder(dict[int, SourceFailures])


class GenerationFooter(msgspec.Struct, frozen=True):
    """What a generation says of itself.

    Attributes:
        run_id: The run it belongs to.
        number: Its number, from 1.
        completed: Bitmap of all completed sources.
        quarantined: Bitmap of the sources that are not tried again.
        folded: The segments taken in, with how many sources each one won.
        bad: Names of segments that were found corrupt, with the reason.
        suspects: Bitmaps of sources in flight at an unexplained death.
        stopped: Why the run does not go on by itself, empty while it does.
        finished: Whether nothing is left to do.
        withheld: Bitmap of the sources of cancelled array tasks, which wait for the user.
        ran: Seconds that an attempt worked on a source that is not settled, without finishing.
        pardoned: Array tasks (round, task) that were cancelled before the user submitted again.
        short: Bitmaps of sources by the MiB of memory that were not enough for them.
        packs: The highest number of a pack whose segments it has taken in.
    """

    run_id: str
    number: int
    completed: bytes
    quarantined: bytes
    folded: list[Folded]
    bad: dict[str, str]
    suspects: list[bytes]
    stopped: str
    finished: bool
    withheld: bytes = b""
    ran: dict[int, float] = {}
    pardoned: list[tuple[int, int]] = []
    short: dict[int, bytes] = {}
    packs: int = 0


class Union(msgspec.Struct):
    """What is done, as far as it can be seen now: a generation and what came after it.

    Attributes:
        number: The generation it began with, 0 for none.
        completed: All completed sources.
        won: For every folded segment, in order, the sources whose rows are taken from it.
        failures: Sources that failed and are not completed.
        withheld: Sources of cancelled array tasks, which wait for the user.
        ran: The longest that an attempt worked on a source without finishing it, in seconds.
        pardoned: Array tasks (round, task) that were cancelled before the user submitted again.
        short: Sources by the memory of an array task, in MiB, that was not enough for them;
            each under the most that was tried.
        fresh: Segments that the generation had not folded, and packs that it did not know.
        fresh_paths: Their paths.
        packs: The highest number of a pack that is known.
        pack_of: For segments in packs, which one.
        sizes: Sizes of folded segments in bytes, as far as they are known.
        passed_over: Highest number of a damaged generation that was passed over.
    """

    number: int = 0
    completed: BitMap = msgspec.field(default_factory=BitMap)
    won: dict[Key, BitMap] = msgspec.field(default_factory=dict)
    failures: dict[int, SourceFailures] = msgspec.field(default_factory=dict)
    suspects: list[BitMap] = msgspec.field(default_factory=list)
    bad: dict[str, str] = msgspec.field(default_factory=dict)
    stopped: str = ""
    finished: bool = False
    withheld: BitMap = msgspec.field(default_factory=BitMap)
    ran: dict[int, float] = msgspec.field(default_factory=dict)
    pardoned: list[tuple[int, int]] = msgspec.field(default_factory=list)
    short: dict[int, BitMap] = msgspec.field(default_factory=dict)
    fresh: int = 0
    fresh_paths: list[str] = msgspec.field(default_factory=list)
    packs: int = 0
    pack_of: dict[Key, int] = msgspec.field(default_factory=dict)
    sizes: dict[Key, int] = msgspec.field(default_factory=dict)
    passed_over: int = 0

    def quarantined(self) -> BitMap:
        """Return the sources that are not tried again."""
        return BitMap(i for i, failure in self.failures.items() if failure.quarantined)

    def settled(self) -> BitMap:
        """Return the sources that nothing more is done for."""
        return self.completed | self.quarantined()

    def attempts(self) -> dict[int, int]:
        """Return the tries charged so far to each source that is not completed."""
        return {index: failure.attempts for index, failure in self.failures.items()}

    def fold(self, segment: Segment, name: str, *, max_attempts: int) -> None:
        """Take in a segment; folding the same one twice changes nothing."""
        footer = segment.footer
        key = (footer.writer, name)
        if key in self.won:
            return
        failures = segment.failures()
        suspects = [bitmaps.load(data, what=name) for data in footer.suspects]
        won = segment.completed - self.completed
        self.won[key] = won
        # A segment stays beside the part that holds its rows.
        self.sizes[key] = segment.container.size_bytes if footer.part is None else STAYS
        self.completed |= won
        for group in suspects:
            self.suspects = bitmaps.refine(self.suspects, group)
        for failure in failures:
            self._count(failure, footer.writer, max_attempts)
        if footer.short_mib:
            self.note_short(bitmaps.union(suspects), footer.short_mib)
        for index in [index for index in self.failures if index in won]:
            del self.failures[index]
        for index, seconds in footer.ran.items():
            self.ran[index] = max(seconds, self.ran.get(index, 0.0))
        self.short = {mib: left for mib, group in self.short.items() if (left := group - won)}
        self.fresh += 1

    def _count(self, failure: Failure, writer: Writer, max_attempts: int) -> None:
        if failure.source in self.completed:
            return
        known = self.failures.get(failure.source)
        charge = (writer.round, writer.task, writer.epoch, failure.attempt)
        if known is not None and charge in known.charged:
            return
        charged = [*(known.charged if known else ()), charge]
        # Every step towards the memory that a source needs fails by itself: one try in all.
        is_step = failure.short_mib > 0
        is_counted = not (is_step and known is not None and self._is_short(failure.source))
        attempts = (known.attempts if known else 0) + is_counted
        given_up = not failure.retry or (attempts >= max_attempts and not is_step)
        quarantined = given_up or (known is not None and known.quarantined)
        if is_step:
            self.note_short(BitMap([failure.source]), failure.short_mib)
        self.failures[failure.source] = SourceFailures(attempts, quarantined, failure, charged)

    def interrupted(self) -> dict[int, float]:
        """Return how long the sources that are still owed were worked on in vain."""
        settled = self.settled()
        return {index: seconds for index, seconds in self.ran.items() if index not in settled}

    def note_short(self, sources: BitMap, mib: int) -> None:
        """Note that array tasks of so much memory were not enough for some sources."""
        sources = sources - self.completed
        for tried in list(self.short):
            if tried <= mib:
                self.short[tried] = self.short[tried] - sources
            else:
                sources = sources - self.short[tried]
        self.short[mib] = self.short.get(mib, BitMap()) | sources
        self.short = {tried: group for tried, group in self.short.items() if group}

    def _is_short(self, source: int) -> bool:
        return any(source in group for group in self.short.values())

    def open_suspects(self) -> list[BitMap]:
        """Return the groups of suspects that are still owed."""
        settled = self.settled()
        groups = (group - settled for group in self.suspects)
        return [group for group in groups if group]


def read_union(run: RunDir, *, max_attempts: int) -> Union:
    """Return the newest generation and every published segment that it has not folded.

    A stale directory listing gives a subset; a later call gives a superset in which no
    source has changed hands.  A damaged segment is set aside and tried again by every later
    call, with its whole body: what was damaged may have been a cache, a disk or a path.

    Args:
        run: The run.
        max_attempts: Tries after which a source is quarantined.

    Raises:
        SharedStorageError: The file system refused.
    """
    with storage_errors("read", run.path):
        while True:
            union, packs = load_newest(run), Packs(run)
            packed = take_up_packs(run, union, packs)
            names = unfolded(run, union, packed)
            for name, opened in _open_ahead(packs, union, names):
                fold_named(run, union, name, packs=packs, max_attempts=max_attempts, opened=opened)
            # What was moved into a pack meanwhile is in a newer generation.
            newest = max(union.number, union.passed_over)
            if not _are_gone(run, union, names) or run.generation_numbers()[-1:] <= [newest]:
                return union


def _open_ahead(
    packs: Packs, union: Union, names: list[SegmentName]
) -> Iterator[tuple[SegmentName, Callable[[], Segment]]]:
    """Yield segments in order, each with what returns it, or raises why it cannot be opened.

    Where there are many, some are being opened while the first ones are folded: on a shared
    file system nearly all of the time is waiting for its answers.
    """

    def opener(name: SegmentName) -> Callable[[], Segment]:
        key = key_of(name)
        return partial(packs.segment, key, union.pack_of.get(key, 0))

    readers = packs.run.fs.readers
    if readers == 1 or len(names) < _MANY:
        yield from ((name, opener(name)) for name in names)
        return
    # Only many segments are worth threads.
    from concurrent.futures import Future, ThreadPoolExecutor

    opening: deque[tuple[SegmentName, Future[Segment]]] = deque()
    with ThreadPoolExecutor(readers) as pool:
        for name in names:
            opening.append((name, pool.submit(opener(name))))
            if len(opening) >= 4 * readers:
                first, segment = opening.popleft()
                yield first, segment.result
        for name, segment in opening:
            yield name, segment.result


def _are_gone(run: RunDir, union: Union, names: list[SegmentName]) -> bool:
    """Tell whether any of these segments was neither taken in nor set aside."""
    return any(
        key_of(name) not in union.won and relative_name(run, name) not in union.bad
        for name in names
    )


def take_up_packs(run: RunDir, union: Union, packs: Packs) -> list[Key]:
    """Note what the packs hold that a generation does not know; return their segments."""
    found: list[Key] = []
    for number in run.pack_numbers():
        if number <= union.packs:
            continue
        try:
            keys = packs.open(number).blocks
        except (CorruptDataError, FileNotFoundError) as error:
            log.warning("%s", error)
        except SharedStorageError as error:
            if error.fields.get("errno") != errno.EIO:
                raise
            log.warning("%s", error)
            break
        else:
            union.pack_of.update((key, number) for key in keys if key not in union.pack_of)
            found += keys
        union.packs = number
        union.fresh += 1
    return found


def fold_named(
    run: RunDir,
    union: Union,
    name: SegmentName,
    *,
    max_attempts: int,
    packs: Packs | None = None,
    opened: Callable[[], Segment] | None = None,
) -> SegmentFooter | None:
    """Take a published segment into a union and return what it says.

    Args:
        run: The run.
        union: The union.
        name: The segment.
        max_attempts: Tries after which a source is quarantined.
        packs: The run's packs.
        opened: What returns the segment, as :meth:`Packs.segment` does.

    Returns:
        None where it is damaged or gone: the union then says so, or a later call does.

    Raises:
        SharedStorageError: The file system refused.
    """
    relative, key, packs = relative_name(run, name), key_of(name), packs or Packs(run)
    pack = union.pack_of.get(key, 0)
    try:
        segment = opened() if opened is not None else packs.segment(key, pack)
        if relative in union.bad:
            segment.verify()
        union.fold(segment, name.name, max_attempts=max_attempts)
        union.bad.pop(relative, None)
        if not pack:
            union.fresh_paths.append(run.segment_path(name))
        return segment.footer
    except (CorruptDataError, FileNotFoundError) as error:
        log.warning("%s", error)
        if pack:
            del union.pack_of[key]
            return fold_named(run, union, name, max_attempts=max_attempts, packs=packs)
        if isinstance(error, CorruptDataError):
            union.bad.setdefault(relative, str(error))
        # Otherwise it was listed, yet is gone: the listing was out of date.
    except SharedStorageError as error:
        # One file that cannot be read must not stop the run; where nothing can be read, the
        # generation or the plan says so.
        if error.fields.get("errno") != errno.EIO:
            raise
        log.warning("%s", error)
        union.bad.setdefault(relative, str(error))
    return None


def read_task_union(run: RunDir, round_: int, task: int, *, max_attempts: int) -> Union:
    """Return what earlier attempts of one array task have published.

    The round's plan already leaves out what was done before it, so an array task needs no
    other task's segments: the cost is that of its own shard, not of the run.
    """
    union = Union()
    for ref in run.attempts(round_, task):
        for name in run.segments(ref):
            try:
                segment = open_segment(run.fs, run.segment_path(name), run_id=run.run_id)
                union.fold(segment, name.name, max_attempts=max_attempts)
            except (CorruptDataError, FileNotFoundError) as error:
                log.warning("%s", error)
    return union


def newest_footer(run: RunDir, ref: AttemptRef) -> SegmentFooter | None:
    """Return what an attempt's newest whole segment says; None where it has none."""
    for name in reversed(run.segments(ref)):
        try:
            return open_segment(run.fs, run.segment_path(name), run_id=run.run_id).footer
        except (CorruptDataError, SharedStorageError, FileNotFoundError):
            # The merge step reports it; the one before tells nearly as much.
            continue
    return None


def find_segment(packs: Packs, key: Key, pack: int) -> Segment:
    """Open a segment in the pack that a union names, 0 for none, or where else it lies.

    Raises:
        CorruptDataError: It is whole nowhere.
        FileNotFoundError: It is nowhere.
        SharedStorageError: The file system refused.
    """
    try:
        return packs.segment(key, pack)
    except (CorruptDataError, FileNotFoundError) as error:
        return find_elsewhere(packs, key, pack, error)


def find_elsewhere(packs: Packs, key: Key, pack: int, error: Exception) -> Segment:
    """Open the other copy of a segment: its own file, or the one in a pack by now.

    Args:
        packs: The run's packs.
        key: The segment.
        pack: The pack in which it was looked for, 0 for none.
        error: What was wrong there, raised where there is no other copy.
    """
    other = 0 if pack else load_newest(packs.run).pack_of.get(key, 0)
    try:
        return packs.segment(key, other)
    except FileNotFoundError:
        raise error from None


def relative_name(run: RunDir, name: SegmentName) -> str:
    """Return a segment's path below the run directory."""
    return run.segment_path(name).removeprefix(run.path).lstrip("/")


def unfolded(run: RunDir, union: Union, packed: Iterable[Key] = ()) -> list[SegmentName]:
    """Return the segments that a union has not taken in, in winning order.

    Args:
        run: The run; its published segments are looked for.
        union: The union.
        packed: Segments that are in packs.
    """
    names = {
        key_of(name): name
        for ref in run.all_attempts()
        for name in run.segments(ref)
        if key_of(name) not in union.won
    }
    names.update((key, name_of(key)) for key in packed if key not in union.won)
    return [names[key] for key in sorted(names, key=lambda key: (key[0], names[key].seq, key[1]))]


def open_generation(run: RunDir, number: int) -> Container[GenerationFooter]:
    """Open a generation; reads its footer only.

    Raises:
        CorruptDataError: The generation is damaged or of another run.
    """
    path = run.generation_path(number)
    container = open_container(run.fs, path, KIND, GenerationFooter)
    if container.footer.run_id != run.run_id or container.footer.number != number:
        raise CorruptDataError(
            f"{path} belongs to another run or generation. It is ignored.", path=path
        )
    return container


def load_newest(run: RunDir) -> Union:
    """Return the newest whole generation as a union; an empty one where there is none.

    A damaged generation is passed over: all it says is in the segments.
    """
    passed_over = 0
    for number in reversed(run.generation_numbers()):
        try:
            union = _load(run, number)
        except (CorruptDataError, FileNotFoundError) as error:
            log.warning("%s", error)
            passed_over = max(passed_over, number)
        else:
            union.passed_over = passed_over
            return union
    return Union(passed_over=passed_over)


def _load(run: RunDir, number: int) -> Union:
    container = open_generation(run, number)
    footer = container.footer
    if len(container.blocks) != len(footer.folded) + 1:
        raise CorruptDataError(
            f"{container.path}: its blocks do not match its segments. It is ignored.",
            path=container.path,
        )
    won = {
        (entry.writer, entry.name): bitmaps.load(container.read_block(i), what=container.path)
        for i, entry in enumerate(footer.folded)
    }
    keys = {(entry.writer, entry.name): entry for entry in footer.folded}
    try:
        failures = _FAILURES.decode(container.read_block(len(footer.folded)))
    except DECODE_ERRORS as error:
        raise CorruptDataError(
            f"{container.path}: its failures cannot be decoded ({error}). It is ignored.",
            path=container.path,
        ) from error
    return Union(
        number=number,
        completed=bitmaps.load(footer.completed, what=container.path),
        won=won,
        failures=failures,
        suspects=[bitmaps.load(data, what=container.path) for data in footer.suspects],
        bad=dict(footer.bad),
        stopped=footer.stopped,
        finished=footer.finished,
        withheld=_load_optional(footer.withheld, what=container.path),
        ran=dict(footer.ran),
        pardoned=footer.pardoned,
        short={mib: bitmaps.load(data, what=container.path) for mib, data in footer.short.items()},
        packs=footer.packs,
        pack_of={key: entry.pack for key, entry in keys.items() if entry.pack},
        sizes={key: entry.size_bytes for key, entry in keys.items()},
    )


def _load_optional(data: bytes, *, what: str) -> BitMap:
    return bitmaps.load(data, what=what) if data else BitMap()


def write_generation(run: RunDir, union: Union) -> int:
    """Publish a union as the next generation and return its number.

    Raises:
        FileExistsError: Another merge published that number first.
        SharedStorageError: The file system refused.
    """
    _keep_names(run, union.fresh_paths)
    # A damaged generation keeps its number: nothing is overwritten.
    number = max(union.number, union.passed_over) + 1
    keys = list(union.won)
    footer = GenerationFooter(
        run_id=run.run_id,
        number=number,
        completed=bitmaps.dump(union.completed),
        quarantined=bitmaps.dump(union.quarantined()),
        folded=[_entry(union, key) for key in keys],
        bad=union.bad,
        suspects=[bitmaps.dump(group) for group in union.open_suspects()],
        stopped=union.stopped,
        finished=union.finished,
        withheld=bitmaps.dump(union.withheld),
        ran=union.interrupted(),
        pardoned=union.pardoned,
        short={mib: bitmaps.dump(group) for mib, group in sorted(union.short.items())},
        packs=union.packs,
    )

    def blocks() -> Iterator[bytes]:
        for key in keys:
            yield bitmaps.dump(union.won[key])
        yield msgspec.msgpack.encode(union.failures)

    parts = encode_container(KIND, blocks(), footer)
    publish(run.fs, run.generation_path(number), parts, label="generation", exclusive=True)
    union.number = number
    return number


def _entry(union: Union, key: Key) -> Folded:
    won, size, pack = union.won[key], union.sizes.get(key, 0), union.pack_of.get(key, 0)
    return Folded(*key, len(won), size, pack)


def _keep_names(run: RunDir, paths: list[str]) -> None:
    """Make the names durable that a generation relies on.

    A segment is seen as soon as it is renamed, and its writer may die before it has synced
    the directory: a file server that restarts then would forget what a generation counts.
    """
    for directory in sorted({os.path.dirname(path) for path in paths}):
        with storage_errors("sync", directory):
            run.fs.sync_directory(directory)
    for path in paths:
        with storage_errors("look for", path):
            if not run.fs.exists(path):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def take_back(run: RunDir, union: Union, bad: SegmentName, why: str) -> None:
    """Remove a segment whose body is bad and give its sources to other copies, or reopen them.

    Raises:
        RunDirError: The union does not hold the segment.
    """
    lost = union.won.pop(key_of(bad), None)
    union.pack_of.pop(key_of(bad), None)
    if lost is None:
        raise RunDirError(
            f"{relative_name(run, bad)} is not part of generation {union.number}. "
            "Run: hpcresume merge RUN",
            path=run.segment_path(bad),
        )
    union.bad[relative_name(run, bad)] = why
    union.completed -= lost
    union.finished = False
    packs = Packs(run)
    for key in list(union.won):
        if not lost:
            break
        try:
            segment = find_segment(packs, key, union.pack_of.get(key, 0))
        except (CorruptDataError, FileNotFoundError) as error:
            log.warning("%s", error)
            continue
        found = segment.completed & lost
        union.won[key] |= found
        union.completed |= found
        lost -= found
