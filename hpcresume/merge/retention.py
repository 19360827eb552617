"""Retention: small segments are folded into packs, and what a pack holds may be removed.

Order of events, and what a kill between two of them leaves behind:

  1. a merge reads small segments that its generation counts, and verifies each -> nothing
  2. it publishes them as the next pack     -> a pack that the next generation takes up
  3. the generation says which pack holds them -> each of them twice
  4. :func:`remove_held` notes that segments are removed, so that attempts ask the generation
     what is done, which makes the names of packs and generations durable, too
  5. it reads each segment back from its pack, whole, and removes its own name

The newest segment of an attempt stays where it is: it tells how the attempt stood.  Whoever
comes upon a name that is gone finds the segment in the pack that the newest generation names.
A merge folds at most ``FOLD_BYTES``, and no segment above ``SMALL_BYTES``, so that what is
large is written once.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

from hpcresume.errors import CorruptDataError, SharedStorageError
from hpcresume.fs import reading, storage_errors
from hpcresume.merge.generation import Union, load_newest, open_generation, write_generation
from hpcresume.merge.packs import InMemory, Key, Packs, key_of, name_of, open_as, write_pack
from hpcresume.run.directory import RunDir, SegmentName

SMALL_BYTES = 1 << 20
FOLD_BYTES = 256 << 20
FOLD_AT_LEAST = 16
_FEWEST = 2
log = logging.getLogger(__name__)


def fold_small(run: RunDir, union: Union, *, at_least: int | None = None) -> int:
    """Publish small segments that a union counts as a pack, and note in it that they are there.

    Where that fails nothing is lost, and the next merge tries again.

    Args:
        run: The run.
        union: What is about to become a generation.
        at_least: Fewer segments than this are not worth a file; by default ``FOLD_AT_LEAST``.

    Returns:
        How many segments were folded.
    """
    chosen = list(_choose(run, union, most_bytes=FOLD_BYTES))
    if len(chosen) < (FOLD_AT_LEAST if at_least is None else at_least):
        return 0
    folded: list[Key] = []

    def segments() -> Iterator[tuple[Key, bytes]]:
        for key in chosen:
            data = _read_whole(run, key)
            if data is not None:
                folded.append(key)
                yield key, data

    number = union.packs + 1
    try:
        write_pack(run, number, segments())
    except (FileExistsError, SharedStorageError) as error:
        log.warning("segments stay where they are: %s", error)
        return 0
    union.packs = number
    union.pack_of.update(dict.fromkeys(folded, number))
    return len(folded)


def _choose(run: RunDir, union: Union, *, most_bytes: int) -> Iterator[Key]:
    """Yield small segments that are in no pack yet, up to so many bytes of them."""
    newest: dict[object, int] = {}
    for key in union.won:
        newest[key[0]] = max(newest.get(key[0], 0), name_of(key).seq)
    total = 0
    for key in union.won:
        if key in union.pack_of or name_of(key).seq == newest[key[0]]:
            continue
        size = union.sizes.get(key) or _size_of(run, union, key)
        if size > SMALL_BYTES:
            continue
        total += size
        if total > most_bytes:
            return
        yield key


def _size_of(run: RunDir, union: Union, key: Key) -> int:
    """Return the size of a segment that an older version's generation does not tell."""
    path = run.segment_path(name_of(key))
    with contextlib.suppress(FileNotFoundError), storage_errors("look at", path, missing=True):
        union.sizes[key] = run.fs.size(path)
    return union.sizes.get(key, SMALL_BYTES + 1)


def _read_whole(run: RunDir, key: Key) -> bytes | None:
    """Return a segment's bytes if its whole body is what it should be."""
    path = run.segment_path(name_of(key))
    try:
        with reading(path):
            data = run.fs.read(path)
        segment = open_as(InMemory(data), path, run, key)
        if segment.footer.part is not None:
            return None
        segment.verify()
    except (CorruptDataError, FileNotFoundError) as error:
        log.warning("not folded: %s", error)
        return None
    return data


def foldable(run: RunDir, union: Union) -> list[SegmentName]:
    """Return the segments that the next pack would hold, none where it is not worth one."""
    chosen = list(_choose(run, union, most_bytes=sys.maxsize))
    return [name_of(key) for key in chosen] if len(chosen) >= _FEWEST else []


def fold_rest(run: RunDir, *, at_least: int = _FEWEST) -> None:
    """Fold all small segments of the newest generation, in as many packs as it takes.

    Raises:
        SharedStorageError: The file system refused a generation.
    """
    while True:
        union = load_newest(run)
        if not fold_small(run, union, at_least=at_least):
            return
        with contextlib.suppress(FileExistsError):
            write_generation(run, union)


def held(run: RunDir, union: Union) -> list[SegmentName]:
    """Return the segments that a generation finds in packs, and that lie under their own name.

    The newest of each attempt is not among them.
    """
    return [
        name
        for ref in run.all_attempts()
        for name in run.segments(ref)[:-1]
        if key_of(name) in union.pack_of
    ]


def remove_held(run: RunDir) -> list[SegmentName]:
    """Remove the own names of segments that packs hold; return which were removed.

    Safe at any moment, whoever writes or reads: nothing is removed that was not read back
    whole from a pack whose name is durable.

    Raises:
        SharedStorageError: The file system refused; what is left can be removed later.
        CorruptDataError: The newest generation is gone, or was damaged just now.
    """
    union = load_newest(run)
    names = held(run, union)
    if not names:
        return []
    run.note_removals()
    with storage_errors("read", run.generation_path(union.number)):
        open_generation(run, union.number)
    packs, removed = Packs(run), []
    for name in names:
        key = key_of(name)
        if not _is_held(packs, key, union.pack_of[key]):
            continue
        path = run.segment_path(name)
        with storage_errors("remove", path), contextlib.suppress(FileNotFoundError):
            run.fs.unlink(path)
        removed.append(name)
    return removed


def _is_held(packs: Packs, key: Key, number: int) -> bool:
    try:
        packs.segment(key, number).verify()
    except (CorruptDataError, FileNotFoundError) as error:
        log.warning("not removed: %s", error)
        return False
    return True
