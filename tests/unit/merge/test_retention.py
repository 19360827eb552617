"""Packs: what is folded, where readers find it, and what may be removed."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from pyroaring import BitMap

from hpcresume.errors import CorruptDataError, SharedStorageError
from hpcresume.merge import retention
from hpcresume.merge.generation import load_newest, read_union, take_back, write_generation
from hpcresume.merge.packs import InMemory, Packs, key_of
from hpcresume.merge.retention import fold_rest, fold_small, foldable, held, remove_held
from hpcresume.output.rows import BadSegmentError, spans, take_back_segment
from hpcresume.run.directory import RunDir, SegmentName
from hpcresume.run.manifest import Manifest, write_indexed_part
from tests.support.places import failure, make_run, publish_segment, row, segment_name, write_file
from tests.support.simfs import ClientKilledError, SimFileSystem, SimServer

SOURCES = 8


@pytest.fixture
def run() -> RunDir:
    """A run of which two attempts have published four segments each."""
    made = make_run(SimFileSystem(SimServer(ordered=True)), "/run")
    write_indexed_part(made, 1, first=0, count=SOURCES)
    for task in (0, 1):
        for seq in (1, 2, 3, 4):
            publish_segment(made, (0, task, 1), seq, [task * 4 + seq - 1])
    return made


def merge(run: RunDir, *, at_least: int = 1) -> int:
    """Write a generation as a merge does; return how many segments were folded."""
    union = read_union(run, max_attempts=3)
    folded = fold_small(run, union, at_least=at_least)
    write_generation(run, union)
    return folded


def collected(run: RunDir) -> dict[int, bytes]:
    """Return the rows of the result by source."""
    while True:
        union = read_union(run, max_attempts=3)
        try:
            return {
                each.source: each.rows[0] + b"\n"
                for span in spans(run, union, Manifest.open(run))
                for each in span.each()
            }
        except BadSegmentError as error:
            take_back_segment(run, error)


def loose(run: RunDir) -> list[tuple[int, int]]:
    """Return task and number of the segments that lie under their own names."""
    return [
        (name.attempt.task, name.seq) for ref in run.all_attempts() for name in run.segments(ref)
    ]


def everything(*but: int) -> dict[int, bytes]:
    return {source: row(source) for source in range(SOURCES) if source not in but}


def segments(run: RunDir) -> Iterator[SegmentName]:
    return (name for ref in run.all_attempts() for name in run.segments(ref))


def damage(run: RunDir, path: str, at: int) -> None:
    data = run.fs.read(path)
    write_file(run.fs, path, data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])


def test_what_a_pack_holds_is_removed_and_the_result_stays(run: RunDir) -> None:
    """All but the newest segment of each attempt go; winners, counts and rows are the same."""
    assert 6 == merge(run)
    before = load_newest(run)

    removed = remove_held(run)

    assert [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)] == [
        (name.attempt.task, name.seq) for name in removed
    ]
    assert [(0, 4), (1, 4)] == loose(run)
    assert everything() == collected(run)
    after = read_union(run, max_attempts=3)
    assert (before.won, before.completed, 0) == (after.won, after.completed, after.fresh)
    assert [] == remove_held(run)


def test_a_segment_in_a_pack_is_the_same_byte_for_byte(run: RunDir) -> None:
    """A pack holds whole segments, each with its own footer and digests."""
    name = segment_name((0, 1, 1), 2)
    data = run.fs.read(run.segment_path(name))
    merge(run)
    segment = Packs(run).open(1).segment(key_of(name))
    path = segment.container.path
    assert run.pack_path(1) == path
    assert data == segment.container.fs.read(path)
    assert len(data) == segment.container.fs.size(path) == InMemory(data).size("")


def test_few_or_large_segments_are_not_folded(run: RunDir, monkeypatch) -> None:
    """Fewer than are worth a file stay; so does a large one, and what exceeds a merge's share."""
    assert 0 == merge(run, at_least=7)
    size = run.fs.size(run.segment_path(segment_name((0, 0, 1), 1)))
    monkeypatch.setattr(retention, "SMALL_BYTES", size - 1)
    assert [] == foldable(run, load_newest(run))
    monkeypatch.setattr(retention, "SMALL_BYTES", 1 << 20)
    monkeypatch.setattr(retention, "FOLD_BYTES", 4 * size)
    assert 6 == len(foldable(run, load_newest(run)))
    union = load_newest(run)
    assert 4 == fold_small(run, union, at_least=1)


def test_the_rest_is_folded_in_as_many_packs_as_it_takes(run: RunDir, monkeypatch) -> None:
    """Each pack is as large as one merge folds, and every generation in between is whole."""
    merge(run, at_least=9)
    size = run.fs.size(run.segment_path(segment_name((0, 0, 1), 1)))
    monkeypatch.setattr(retention, "FOLD_BYTES", 2 * size)
    fold_rest(run)
    assert ([1, 2, 3], 4) == (run.pack_numbers(), load_newest(run).number)
    assert 6 == len(remove_held(run))
    assert everything() == collected(run)


def test_nothing_is_written_twice(run: RunDir) -> None:
    """A merge folds what came since, not what packs hold."""
    assert 6 == merge(run)
    publish_segment(run, (0, 1, 1), 5, [7])
    assert 1 == merge(run)
    assert 0 == merge(run)
    assert [6, 1] == [len(Packs(run).open(n).blocks) for n in run.pack_numbers()]


def test_a_merge_killed_before_its_generation(run: RunDir) -> None:
    """The next merge takes up a pack that no generation knows, and folds nothing again."""
    union = read_union(run, max_attempts=3)
    fold_small(run, union, at_least=1)

    assert [] == held(run, load_newest(run))
    assert 0 == merge(run)
    assert 6 == len(remove_held(run))
    assert everything() == collected(run)


def test_a_lost_generation_loses_nothing_that_was_removed(run: RunDir) -> None:
    """Without its generation a pack still gives its segments, in the same order of winners."""
    publish_segment(run, (1, 0, 1), 1, [0, 5])
    publish_segment(run, (1, 0, 1), 2, failures=[failure(9)])
    merge(run)
    remove_held(run)
    before = load_newest(run)
    damage(run, run.generation_path(before.number), 20)

    found = read_union(run, max_attempts=3)

    assert before.won == found.won
    assert {9: 1} == found.attempts()
    write_generation(run, found)
    assert before.pack_of == load_newest(run).pack_of
    assert everything() == collected(run)


def test_a_body_that_went_bad_is_not_folded(run: RunDir) -> None:
    """It stays where it is, where `collect` finds it and reopens its sources."""
    bad = segment_name((0, 0, 1), 2)
    union = read_union(run, max_attempts=3)
    damage(run, run.segment_path(bad), 40)
    assert 5 == fold_small(run, union, at_least=1)
    write_generation(run, union)
    remove_held(run)
    assert everything(1) == collected(run)
    assert 1 not in load_newest(run).completed


def test_a_pack_that_went_bad_before_the_removal(run: RunDir) -> None:
    """What cannot be read back from it stays under its own name, and counts."""
    bad = segment_name((0, 0, 1), 2)
    merge(run)
    pack = Packs(run).open(1)
    damage(run, run.pack_path(1), pack.container.blocks[pack.blocks[key_of(bad)]].offset + 40)

    assert 5 == len(remove_held(run))

    assert (0, 2) in loose(run)
    assert everything() == collected(run)


def test_a_pack_that_went_bad_after_the_removal(run: RunDir) -> None:
    """The sources of the segment that is damaged are open again; all others are read."""
    bad = segment_name((0, 0, 1), 2)
    merge(run)
    remove_held(run)
    pack = Packs(run).open(1)
    damage(run, run.pack_path(1), pack.container.blocks[pack.blocks[key_of(bad)]].offset + 40)

    assert everything(1) == collected(run)

    assert [1] == list(BitMap(range(SOURCES)) - load_newest(run).completed)
    publish_segment(run, (1, 0, 1), 1, [1])
    assert everything() == collected(run)


def test_a_whole_pack_that_is_lost(run: RunDir) -> None:
    """Its sources are open again, and nothing else; a merge goes on without it."""
    merge(run)
    remove_held(run)
    write_file(run.fs, run.pack_path(1), b"")
    assert everything(0, 1, 2, 4, 5, 6) == collected(run)
    merge(run)


def test_a_reader_that_began_before(run: RunDir) -> None:
    """Rows that are read while segments are folded and removed are those of the union read."""
    write_generation(run, read_union(run, max_attempts=3))
    union = read_union(run, max_attempts=3)
    reader = spans(run, union, Manifest.open(run))
    first = next(reader)
    publish_segment(run, (1, 0, 1), 1, [0])
    merge(run)
    remove_held(run)
    sources = [*first.sources, *(source for span in reader for source in span.sources)]
    assert list(range(SOURCES)) == sources


def test_a_merge_with_an_old_generation_looks_again(run: RunDir) -> None:
    """Segments that go while it reads were folded by a generation that it then begins with."""
    other = RunDir(run.path, run.info, SimFileSystem(run.fs.server))

    def between() -> None:
        merge(other)
        remove_held(other)

    run.fs.on("size", between, contains="seg-000001")
    assert list(range(SOURCES)) == list(read_union(run, max_attempts=3).completed)


def test_an_old_listing_shows_what_was_removed(run: RunDir) -> None:
    """A node that sees names that are gone, and no pack, reads what is done all the same."""
    merge(run, at_least=9)
    node = RunDir(run.path, run.info, SimFileSystem(run.fs.server))
    node.fs.hold_listings()
    assert everything() == collected(node)
    union = load_newest(run)
    fold_small(run, union, at_least=1)
    write_generation(run, union)
    remove_held(run)

    assert everything() == collected(node)
    assert SOURCES == len(load_newest(run).completed)


def test_another_merge_that_folds_first(run: RunDir) -> None:
    """Its pack has the number; this merge leaves its segments where they are."""
    mine = read_union(run, max_attempts=3)
    publish_segment(run, (0, 1, 1), 5, [7])
    assert 7 == fold_small(run, read_union(run, max_attempts=3), at_least=1)
    assert 0 == fold_small(run, mine, at_least=1)
    assert {} == mine.pack_of


def test_a_pack_that_cannot_be_written_stops_nobody(run: RunDir) -> None:
    """A full disk leaves segments where they are; the generation is another matter."""
    run.fs.fail("write", errno.ENOSPC, contains="merge")
    assert 0 == merge(run)
    assert 6 == merge(run)


def test_a_removal_that_fails_goes_on_later(run: RunDir) -> None:
    """It says what refused; the rest is removed the next time, also where a reply was lost."""
    merge(run)
    run.fs.fail("unlink", errno.EIO, contains="seg-000002", when="after")
    with pytest.raises(SharedStorageError, match="cannot remove"):
        remove_held(run)
    left = [name for name in segments(run) if name.seq < 4]
    assert left == remove_held(run)
    assert [(0, 4), (1, 4)] == loose(run)
    assert everything() == collected(run)


def test_taking_back_looks_into_packs(run: RunDir) -> None:
    """Sources of a bad segment go to another copy, wherever that lies."""
    publish_segment(run, (1, 0, 1), 1, [0])
    publish_segment(run, (1, 0, 1), 2, [])
    merge(run)
    remove_held(run)
    union = load_newest(run)
    take_back(run, union, segment_name((0, 0, 1), 1), "bad")
    assert SOURCES == len(union.completed)
    assert [0] == list(union.won[key_of(segment_name((1, 0, 1), 1))])


def test_a_pack_of_another_run(run: RunDir) -> None:
    """It is not opened, and a merge goes on without it."""
    other = make_run(run.fs, "/other", run_id="f" * 16)
    publish_segment(other, (0, 0, 1), 1, [3])
    publish_segment(other, (0, 0, 1), 2, [4])
    merge(other)
    write_file(run.fs, run.pack_path(1), other.fs.read(other.pack_path(1)))
    with pytest.raises(CorruptDataError, match="belongs to another run"):
        Packs(run).open(1)
    assert SOURCES == len(read_union(run, max_attempts=3).completed)


def test_nothing_is_removed_before_its_pack_is_durable(run: RunDir) -> None:
    """
    A merge dies after each of its renames, before a sync: what a removal then relies on is
    there after a restart of the file server.
    """
    merge(run, at_least=9)
    run.note_removals()
    dying = RunDir(run.path, run.info, SimFileSystem(run.fs.server))
    union = load_newest(run)
    fold_small(run, union, at_least=1)
    dying.fs.on("sync_directory", dying.fs.kill)
    with pytest.raises(ClientKilledError):
        write_generation(dying, union)
    # The pack's name, too, is as if its sync had not happened.
    directory = run.fs.server.directory(run.join("merge"))
    directory.durable = {n: f for n, f in directory.durable.items() if "gen-000001" in n}

    remove_held(run)
    for ref in run.all_attempts():
        run.fs.sync_directory(run.attempt_path(ref))
    run.fs.server.restart()

    assert [(0, 4), (1, 4)] == loose(run)
    assert everything() == collected(run)
