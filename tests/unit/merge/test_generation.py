"""Merging: union, winners, failures, generations, and taking a bad segment back."""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
from pathlib import Path

import pytest
from pyroaring import BitMap

from hpcresume.errors import RunDirError, SharedStorageError
from hpcresume.fs import PosixFileSystem
from hpcresume.merge.generation import (
    Union,
    load_newest,
    open_generation,
    read_union,
    take_back,
    unfolded,
    write_generation,
)
from hpcresume.run.directory import RunDir, SegmentName
from hpcresume.segment import container
from hpcresume.segment.segment import Writer, open_segment
from tests.support.places import (
    Place,
    failure,
    make_directories,
    make_run,
    publish_segment,
    segment_name,
    write_file,
)


@pytest.fixture(params=["posix", "sim"])
def run(request, tmp_path: Path) -> RunDir:
    return Place.make(request.param, tmp_path).run()


@pytest.fixture
def sim(tmp_path: Path) -> RunDir:
    return Place.make("sim", tmp_path).run()


def union_of(run: RunDir) -> Union:
    return read_union(run, max_attempts=3)


def winners(union: Union) -> dict[int, tuple[Writer, str]]:
    """Return who each completed source belongs to; fails where two segments have one source."""
    found: dict[int, tuple[Writer, str]] = {}
    for key, won in union.won.items():
        for source in won:
            assert source not in found, f"source {source} belongs to {found[source]} and {key}"
            found[source] = key
    assert BitMap(found) == union.completed
    return found


def key(name: SegmentName) -> tuple[Writer, str]:
    ref = name.attempt
    return Writer(ref.round, ref.task, ref.epoch), name.name


def merge(run: RunDir) -> Union:
    """Unite and write the next generation."""
    union = union_of(run)
    write_generation(run, union)
    return union


def spoil_body(run: RunDir, name: SegmentName) -> None:
    """Damage a byte of a segment's body, which its footer does not show."""
    data = bytearray(run.fs.read(run.segment_path(name)))
    data[40] ^= 1
    write_file(run.fs, run.segment_path(name), bytes(data))


# -- union ------------------------------------------------------------------------------------


class _TwoAtOnce(PosixFileSystem):
    """Answers the first that asks for a segment's size only when a second one asks."""

    def __init__(self) -> None:
        self.first, self.second = threading.Lock(), threading.Event()

    def size(self, path: str) -> int:
        if "seg-" in path:
            if not self.first.acquire(blocking=False):
                self.second.set()
            elif not self.second.wait(60):
                raise OSError(errno.ETIME, "nobody else asked")
        return super().size(path)


def test_many_segments_are_opened_side_by_side(tmp_path: Path) -> None:
    """Their answers are awaited together, and the union is as if one came after the other."""
    run = Place.make("posix", tmp_path).run()
    # Each of them completes what the one before did, and one more.
    names = [publish_segment(run, (0, n, 1), 1, range(n // 2, n + 1)) for n in range(80)]
    spoilt = Path(run.segment_path(names[70]))
    spoilt.write_bytes(spoilt.read_bytes()[:-1])
    one = PosixFileSystem()
    one.readers = 1
    expected = union_of(RunDir.open(run.path, one))

    found = union_of(RunDir.open(run.path, _TwoAtOnce()))

    assert expected.won == found.won
    assert (expected.bad, expected.fresh_paths) == (found.bad, found.fresh_paths)
    assert (80, 79) == (len(found.completed), len(found.won))


def test_an_empty_run(run: RunDir) -> None:
    """Nothing published: nothing completed, and a generation says so."""
    union = union_of(run)
    assert (0, [], {}, 0) == (union.number, list(union.completed), union.won, union.fresh)
    assert 1 == write_generation(run, union)
    assert [] == list(load_newest(run).completed)


def test_the_union_of_several_writers(run: RunDir) -> None:
    """What three writers completed is completed, each source belonging to one segment."""
    publish_segment(run, (0, 0, 1), 1, [1, 2])
    publish_segment(run, (0, 1, 1), 1, [3])
    publish_segment(run, (0, 1, 1), 2, [4, 5])
    union = union_of(run)
    assert [1, 2, 3, 4, 5] == sorted(winners(union))
    assert 3 == union.fresh


def test_folding_twice_changes_nothing(run: RunDir) -> None:
    """A segment taken in again, its failures too, counts once."""
    name = publish_segment(run, (0, 0, 1), 1, [1], failures=[failure(2)], suspects=[[3, 4]])
    union = union_of(run)
    segment = open_segment(run.fs, run.segment_path(name), run_id=run.run_id)
    before = (winners(union), dict(union.failures), list(union.suspects), union.fresh)
    union.fold(segment, name.name, max_attempts=3)
    assert before == (winners(union), union.failures, union.suspects, union.fresh)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_the_smallest_writer_wins(sim: RunDir, order: tuple[int, ...]) -> None:
    """Round, then task, then epoch, then sequence, in whatever order they were published."""
    writers = [((0, 2, 1), 1), ((0, 2, 2), 1), ((1, 0, 1), 1), ((0, 2, 1), 2)]
    names = {}
    for i in order:
        writer, seq = writers[i]
        names[i] = publish_segment(sim, writer, seq, [7, 10 + i])
    found = winners(union_of(sim))
    assert key(names[0]) == found[7]
    assert [7, 10, 11, 12, 13] == sorted(found)


def test_the_name_decides_between_copies_of_one_sequence(run: RunDir) -> None:
    """Two segments of one writer with one number: the smaller name wins, always the same."""
    second = publish_segment(run, (0, 0, 1), 1, [1, 2], digest="b" * 16)
    first = publish_segment(run, (0, 0, 1), 1, [1, 3], digest="a" * 16)
    found = winners(union_of(run))
    assert (key(first), key(second)) == (found[1], found[2])


def test_the_order_of_discovery_does_not_matter(sim: RunDir) -> None:
    """Directory listings in any order give one union."""
    chance = random.Random(7)
    for writer in itertools.product((0, 1), (0, 1, 2), (1, 2)):
        for seq in (1, 2):
            sources = chance.sample(range(30), 6)
            publish_segment(sim, writer, seq, sources, failures=[failure(chance.randrange(40))])
    listdir = sim.fs.listdir
    seen = []
    for seed in range(5):
        sim.fs.listdir = lambda path, s=seed: random.Random(s).sample(
            (names := listdir(path)), len(names)
        )
        union = union_of(sim)
        seen.append((winners(union), union.failures))
    assert [seen[0]] * 5 == seen


def test_a_stale_listing_gives_a_subset(sim: RunDir) -> None:
    """What a stale view holds is right, and a later view adds to it without a change."""
    publish_segment(sim, (0, 1, 1), 1, [1, 2])
    sim.fs.hold_listings()
    assert [1, 2] == sorted(union_of(sim).completed)
    publish_segment(sim, (0, 1, 1), 2, [3])
    publish_segment(sim, (0, 0, 1), 1, [1, 9])
    stale = merge(sim)
    assert [1, 2] == sorted(stale.completed)
    sim.fs.refresh_listings()
    later = winners(union_of(sim))
    assert winners(stale).items() <= later.items()
    assert [1, 2, 3, 9] == sorted(later)


def test_a_listed_segment_that_is_gone(sim: RunDir) -> None:
    """A name that is listed and no longer there (removed since) is a subset, not an error."""
    gone = publish_segment(sim, (0, 0, 1), 1, [1])
    publish_segment(sim, (0, 0, 1), 2, [2])
    sim.fs.hold_listings()
    union_of(sim)
    sim.fs.unlink(sim.segment_path(gone))
    union = union_of(sim)
    assert ([2], {}) == (sorted(union.completed), union.bad)


@pytest.mark.parametrize("op", ["listdir", "size", "read"])
@pytest.mark.parametrize("number", [errno.ETIMEDOUT, errno.ESTALE, errno.EACCES])
def test_storage_that_does_not_answer_is_typed(sim: RunDir, op: str, number: int) -> None:
    """An error of the file system stops the merge as such; nothing is called corrupt."""
    publish_segment(sim, (0, 0, 1), 1, [1])
    sim.fs.fail(op, number, contains="/rounds" if op == "listdir" else "seg-")
    with pytest.raises(SharedStorageError):
        union_of(sim)
    assert [1] == sorted(union_of(sim).completed)


def test_a_segment_that_cannot_be_read_is_set_aside_for_now(sim: RunDir) -> None:
    """
    One file that gives EIO does not stop the run: its sources are owed until a later merge can
    read it, and then they count.
    """
    publish_segment(sim, (0, 0, 1), 1, [1])
    publish_segment(sim, (0, 1, 1), 1, [2])
    sim.fs.fail("read", errno.EIO, contains="tasks/00000")
    union = merge(sim)
    assert ([2], 1) == (sorted(union.completed), len(union.bad))
    union = merge(sim)
    assert ([1, 2], {}) == (sorted(union.completed), union.bad)


def test_what_reads_well_again_counts_again(run: RunDir) -> None:
    """A segment that was set aside and is whole now is taken in, behind what came meanwhile."""
    bad = publish_segment(run, (0, 0, 1), 1, [1, 2])
    data = run.fs.read(run.segment_path(bad))
    write_file(run.fs, run.segment_path(bad), data[:-10])
    merge(run)
    later = publish_segment(run, (1, 0, 1), 1, [1])
    merge(run)
    write_file(run.fs, run.segment_path(bad), data)

    union = merge(run)

    assert {1: key(later), 2: key(bad)} == winners(union)
    assert {} == load_newest(run).bad


def test_a_segment_with_a_bad_body_stays_set_aside(run: RunDir) -> None:
    """What was taken back is taken in again only with a whole body."""
    bad = publish_segment(run, (0, 0, 1), 1, [1, 2])
    union = merge(run)
    spoil_body(run, bad)
    take_back(run, union, bad, "its body is bad")
    write_generation(run, union)
    assert ([], 1) == (sorted(union_of(run).completed), len(union_of(run).bad))
    spoil_body(run, bad)  # back again
    assert ([1, 2], {}) == (sorted(union_of(run).completed), union_of(run).bad)


def test_a_generation_keeps_the_names_it_counts_on(sim: RunDir) -> None:
    """
    A segment whose writer died between rename and sync of the directory is durable once a
    generation counts it, whatever the file server forgets.
    """
    sim.fs.server.ordered = True
    name = publish_segment(sim, (0, 0, 1), 1, [1])
    path = sim.segment_path(name)
    data = sim.fs.read(path)
    sim.fs.unlink(path)
    sim.fs.sync_directory(os.path.dirname(path))
    write_file(sim.fs, path, data)
    merge(sim)
    sim.fs.server.restart()
    assert sim.fs.exists(path)


# -- generations ------------------------------------------------------------------------------


def test_a_generation_is_read_as_written(run: RunDir) -> None:
    """Winners, failures, suspects and reasons survive in the generation alone."""
    publish_segment(run, (0, 0, 1), 1, [1, 2], failures=[failure(5), failure(6, retry=False)],
                    suspects=[[8, 9]])  # fmt: skip
    union = union_of(run)
    union.stopped, union.finished = "for a reason", True
    assert 1 == write_generation(run, union)

    loaded = load_newest(run)

    assert winners(union) == winners(loaded)
    assert union.failures == loaded.failures
    assert [BitMap([8, 9])] == loaded.suspects
    assert ("for a reason", True, 1, 0) == (
        loaded.stopped, loaded.finished, loaded.number, loaded.fresh,
    )  # fmt: skip
    assert [] == unfolded(run, loaded)
    assert [6] == list(BitMap.deserialize(open_generation(run, 1).footer.quarantined))


def test_a_winner_never_changes(run: RunDir) -> None:
    """A segment with a smaller key that appears after a generation does not take sources."""
    late = publish_segment(run, (1, 0, 1), 1, [1, 2])
    before = winners(merge(run))
    early = publish_segment(run, (0, 0, 1), 1, [1, 2, 3])

    after = winners(merge(run))

    assert before == {source: key(late) for source in (1, 2)}
    assert {**before, 3: key(early)} == after == winners(load_newest(run))


def test_generations_grow(sim: RunDir) -> None:
    """Twenty merges over growing sets of segments: each contains the one before it."""
    chance = random.Random(3)
    before: dict = {}
    for number in range(1, 21):
        for _ in range(chance.randrange(3)):
            writer = (chance.randrange(2), chance.randrange(3), chance.randrange(1, 3))
            publish_segment(sim, writer, chance.randrange(1, 999), chance.sample(range(60), 8),
                            digest=f"{chance.getrandbits(64):016x}")  # fmt: skip
        after = winners(merge(sim))
        assert before.items() <= after.items()
        assert number == load_newest(sim).number
        before = after


def test_two_merges_at_once(sim: RunDir) -> None:
    """Both read generation 0; one writes generation 1, the other is told and reads it."""
    publish_segment(sim, (0, 0, 1), 1, [1])
    first = union_of(sim)
    publish_segment(sim, (0, 1, 1), 1, [2])
    second = union_of(sim)
    write_generation(sim, second)
    with pytest.raises(FileExistsError):
        write_generation(sim, first)
    assert [1, 2] == sorted(load_newest(sim).completed)


def test_two_merges_with_the_same_result(sim: RunDir) -> None:
    """Two merges that saw the same write the same bytes, and both succeed."""
    publish_segment(sim, (0, 0, 1), 1, [1])
    first, second = union_of(sim), union_of(sim)
    assert [1, 1] == [write_generation(sim, first), write_generation(sim, second)]
    assert [1] == sim.generation_numbers()


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "other run", "other number"])
def test_a_damaged_generation_is_passed_over(run: RunDir, damage: str) -> None:
    """
    All that the newest generation says is in the one before it and in the segments; the next
    one gets a number of its own, since nothing is overwritten.
    """
    publish_segment(run, (0, 1, 1), 1, [1])
    merge(run)
    publish_segment(run, (0, 0, 1), 1, [1, 2], failures=[failure(7)])
    expected = winners(merge(run))
    path = run.generation_path(2)
    data = run.fs.read(path)
    if damage == "other run":
        other = make_run(run.fs, run.path + "-other", "f" * 16)
        for _ in range(2):
            merge(other)
            publish_segment(other, (0, 0, 1), 1, [50])
        data = run.fs.read(other.generation_path(2))
    damaged = {
        "truncated": data[:-1], "empty": b"", "other run": data,
        "flipped": data[:20] + bytes([data[20] ^ 1]) + data[21:],
        "other number": run.fs.read(run.generation_path(1)),
    }[damage]  # fmt: skip
    write_file(run.fs, path, damaged)

    union = union_of(run)

    assert expected == winners(union)
    assert {7: 1} == union.attempts()
    assert 3 == write_generation(run, union)
    assert (3, expected) == ((loaded := load_newest(run)).number, winners(loaded))
    assert 4 == write_generation(run, union_of(run))


def test_all_generations_damaged(run: RunDir) -> None:
    """With every generation gone bad the segments alone give the union."""
    publish_segment(run, (0, 0, 1), 1, [1, 2])
    expected = winners(merge(run))
    write_file(run.fs, run.generation_path(1), b"")
    assert expected == winners(union_of(run))
    assert 2 == write_generation(run, union_of(run))


def test_every_damage_to_a_generation_is_found(sim: RunDir) -> None:
    """Any byte flipped or cut: the generation is not used, and the union stays right."""
    publish_segment(sim, (0, 0, 1), 1, [1, 2], failures=[failure(4)])
    expected = winners(merge(sim))
    path = sim.generation_path(1)
    data = sim.fs.read(path)
    # Blocks are read too, so every byte but the header's version counts here.
    flipped = (data[:p] + bytes([data[p] ^ 0x10]) + data[p + 1 :]
               for p in range(len(data)))  # fmt: skip
    for damaged in itertools.chain(flipped, (data[:n] for n in range(len(data)))):
        write_file(sim.fs, path, damaged)
        union = union_of(sim)
        assert (expected, {4: 1}, 0) == (winners(union), union.attempts(), union.number)


def test_a_generation_from_the_future_stops_the_merge(run: RunDir, monkeypatch) -> None:
    """A newer hpcresume's generation is not passed over: that would undo its merge."""
    monkeypatch.setattr(container, "FORMAT_VERSION", 9)
    merge(run)
    monkeypatch.undo()
    with pytest.raises(RunDirError, match="format 9"):
        union_of(run)


# -- failures and quarantine ------------------------------------------------------------------


def test_failures_are_counted_over_writers(run: RunDir) -> None:
    """Tries of several writers add up; the last allowed one quarantines."""
    for task in range(3):
        publish_segment(run, (0, task, 1), 1, failures=[failure(5, attempt=task + 1)])
        union = union_of(run)
        assert {5: task + 1} == union.attempts()
        assert [5] * (task == 2) == list(union.quarantined())
    assert [5] == list(union.settled())


def test_a_commit_that_was_published_twice_is_charged_once(run: RunDir) -> None:
    """A publish repeated after a lost receipt holds the same failures: no innocent charge."""
    for digest in "abc":
        publish_segment(run, (0, 0, 1), 1, failures=[failure(5)], digest=digest * 16)
    union = merge(run)
    assert ({5: 1}, []) == (union.attempts(), list(union.quarantined()))
    publish_segment(run, (0, 0, 1), 1, failures=[failure(5)], digest="d" * 16)
    assert {5: 1} == union_of(run).attempts()


def test_two_attempts_of_one_task_are_charged_both(run: RunDir) -> None:
    """Two epochs that each tried the source once are two tries."""
    publish_segment(run, (0, 0, 1), 1, failures=[failure(5)])
    publish_segment(run, (0, 0, 2), 1, failures=[failure(5)])
    assert {5: 2} == union_of(run).attempts()


def test_failures_are_counted_over_generations(run: RunDir) -> None:
    """What a generation counted is not counted again, and later tries add to it."""
    publish_segment(run, (0, 0, 1), 1, failures=[failure(5)])
    merge(run)
    assert {5: 1} == union_of(run).attempts()
    publish_segment(run, (1, 0, 1), 1, failures=[failure(5, attempt=2, message="again")])
    merge(run)
    loaded = load_newest(run)
    assert {5: 2} == loaded.attempts()
    assert "again" == loaded.failures[5].last.message


def test_no_retry_quarantines_at_once(run: RunDir) -> None:
    """A failure that is not to be tried again settles the source, whatever comes later."""
    publish_segment(run, (0, 0, 1), 1, failures=[failure(5, retry=False)])
    publish_segment(run, (0, 0, 1), 2, failures=[failure(5, attempt=2)])
    assert [5] == list(union_of(run).quarantined())


@pytest.mark.parametrize("completed_by", [(0, 0, 1), (0, 1, 1), (0, 2, 1)])
def test_a_completion_outweighs_failures(run: RunDir, completed_by: tuple[int, int, int]) -> None:
    """A source that anyone completed has not failed, in whatever order the two are found."""
    publish_segment(run, (0, 1, 1), 1, failures=[failure(5), failure(5, 2), failure(5, 3)])
    assert [5] == list(union_of(run).quarantined())
    publish_segment(run, completed_by, 2, [5])
    union = merge(run)
    assert ({}, []) == (union.failures, list(union.quarantined()))
    assert {} == load_newest(run).failures


def test_the_same_segment_may_hold_both(run: RunDir) -> None:
    """A source that failed first and completed on its next try, in one segment."""
    publish_segment(run, (0, 0, 1), 1, [5], failures=[failure(5)])
    assert {} == union_of(run).failures


# -- interrupted sources ----------------------------------------------------------------------


def test_the_longest_interruption_counts_until_settled(run: RunDir) -> None:
    """
    The longest that any attempt ran on a source is kept, in whatever order segments come and
    from one generation to the next, until the source is completed or quarantined.
    """
    publish_segment(run, (0, 0, 1), 1, [], ran={1: 30.0, 2: 5.0, 3: 7.0})
    publish_segment(run, (0, 0, 2), 1, [], ran={1: 20.0, 2: 50.0})
    assert {1: 30.0, 2: 50.0, 3: 7.0} == merge(run).interrupted()

    publish_segment(run, (1, 0, 1), 1, [1], failures=[failure(3, retry=False)], ran={2: 40.0})
    merge(run)

    loaded = load_newest(run)
    assert ({2: 50.0}, {2: 50.0}) == (loaded.ran, union_of(run).interrupted())


# -- suspects ---------------------------------------------------------------------------------


def test_suspects_are_owed_until_settled(run: RunDir) -> None:
    """A group of suspects shrinks as its sources complete or are quarantined, then is gone."""
    publish_segment(run, (0, 0, 1), 1, [1], suspects=[[1, 2, 3], [4]])
    union = merge(run)
    assert [BitMap([2, 3]), BitMap([4])] == union.open_suspects()
    publish_segment(run, (1, 0, 1), 1, [2], failures=[failure(4, retry=False)])
    union = merge(run)
    assert [BitMap([3])] == union.open_suspects() == load_newest(run).suspects
    publish_segment(run, (1, 0, 1), 2, [3])
    assert [] == union_of(run).open_suspects()


def test_suspects_are_narrowed_down(run: RunDir) -> None:
    """
    Each death leaves smaller groups: what a second death names is cut out of the first one's,
    so that halving comes to an end.
    """
    publish_segment(run, (0, 0, 1), 1, suspects=[range(1, 9)])
    publish_segment(run, (0, 0, 2), 1, suspects=[range(1, 5)])
    assert [BitMap(range(1, 5)), BitMap(range(5, 9))] == union_of(run).open_suspects()
    publish_segment(run, (0, 0, 3), 1, suspects=[[3, 4, 12]])
    assert [BitMap([3, 4]), BitMap([1, 2]), BitMap(range(5, 9)), BitMap([12])] == (
        union_of(run).open_suspects()
    )


# -- bad segments -----------------------------------------------------------------------------


def test_a_corrupt_segment_is_set_aside(run: RunDir) -> None:
    """Its sources stay in the remainder, the others count, and the reason is kept."""
    bad = publish_segment(run, (0, 0, 1), 1, [1, 2])
    publish_segment(run, (0, 1, 1), 1, [2, 3])
    data = run.fs.read(run.segment_path(bad))
    write_file(run.fs, run.segment_path(bad), data[:-10])

    union = merge(run)

    assert [2, 3] == sorted(winners(union))
    (relative,) = union.bad
    assert run.segment_path(bad) == run.join(relative)
    assert union.bad == load_newest(run).bad


def test_a_segment_of_another_run_is_set_aside(run: RunDir) -> None:
    """A segment copied from another run's directory is not merged."""
    other = make_run(run.fs, run.path + "-other", "f" * 16)
    foreign = publish_segment(other, (0, 0, 1), 1, [1])
    make_directories(run.fs, run.attempt_path(foreign.attempt))
    write_file(run.fs, run.segment_path(foreign), run.fs.read(other.segment_path(foreign)))
    union = union_of(run)
    assert ([], 1) == (list(union.completed), len(union.bad))


def test_a_segment_in_a_foreign_directory_is_set_aside(run: RunDir) -> None:
    """A segment that was moved is not where its rows will be looked for: not merged."""
    moved = publish_segment(run, (0, 0, 1), 1, [1])
    target = segment_name((0, 3, 1), 1)
    make_directories(run.fs, run.attempt_path(target.attempt))
    write_file(run.fs, run.segment_path(target), run.fs.read(run.segment_path(moved)))
    union = union_of(run)
    assert {1: key(moved)} == winners(union)
    assert 1 == len(union.bad)


def test_a_bad_body_gives_its_sources_to_other_copies(run: RunDir) -> None:
    """Taking a segment back: sources with another copy change hands, the rest reopen."""
    bad = publish_segment(run, (0, 0, 1), 1, [1, 2, 3, 4])
    second = publish_segment(run, (0, 1, 1), 1, [2, 9])
    third = publish_segment(run, (0, 2, 1), 1, [2, 3])
    union = merge(run)
    assert {1, 2, 3, 4} == {s for s, k in winners(union).items() if k == key(bad)}

    spoil_body(run, bad)
    take_back(run, union, bad, "its body is bad")
    write_generation(run, union)

    expected = {2: key(second), 9: key(second), 3: key(third)}
    assert expected == winners(union) == winners(load_newest(run)) == winners(union_of(run))
    assert ["its body is bad"] == list(union_of(run).bad.values())
    assert not union.finished


def test_a_reopened_source_is_completed_anew(run: RunDir) -> None:
    """After a take-back a new segment completes the source; the bad one stays away."""
    bad = publish_segment(run, (0, 0, 1), 1, [1])
    union = merge(run)
    spoil_body(run, bad)
    take_back(run, union, bad, "bad")
    write_generation(run, union)
    assert [] == sorted(union_of(run).completed)
    new = publish_segment(run, (1, 0, 1), 1, [1])
    assert {1: key(new)} == winners(merge(run)) == winners(union_of(run))


def test_a_copy_that_is_damaged_itself_takes_nothing(run: RunDir) -> None:
    """Where the other copy does not open, the source reopens."""
    bad = publish_segment(run, (0, 0, 1), 1, [1])
    other = publish_segment(run, (0, 1, 1), 1, [1])
    union = merge(run)
    write_file(run.fs, run.segment_path(other), b"")
    take_back(run, union, bad, "bad")
    assert [] == sorted(winners(union))


def test_what_was_never_taken_cannot_be_taken_back(run: RunDir) -> None:
    """Taking back twice, or what no generation holds, is refused."""
    bad = publish_segment(run, (0, 0, 1), 1, [1])
    union = merge(run)
    take_back(run, union, bad, "bad")
    with pytest.raises(RunDirError, match="not part of generation"):
        take_back(run, union, bad, "bad")


# -- what publishing leaves behind ------------------------------------------------------------


@pytest.mark.parametrize("op", ["create", "write", "sync", "close", "link", "sync_directory"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_generation_that_could_not_be_written(sim: RunDir, op: str, when: str) -> None:
    """Whatever call fails, the run is as before or one generation further; retrying works."""
    publish_segment(sim, (0, 0, 1), 1, [1, 2])
    expected = winners(merge(sim))
    publish_segment(sim, (0, 0, 1), 2, [3])
    union = union_of(sim)
    sim.fs.fail(op, errno.EIO, when=when, contains="/merge")
    try:
        write_generation(sim, union)
    except SharedStorageError:
        assert union.number == 1
    assert expected.items() <= winners(load_newest(sim)).items()
    again = merge(sim)
    assert [1, 2, 3] == sorted(winners(again))


def test_nothing_published_ever_changes(sim: RunDir) -> None:
    """Merging, taking back and merging again leaves every earlier file as it was."""
    bad = publish_segment(sim, (0, 0, 1), 1, [1, 2])
    publish_segment(sim, (0, 1, 1), 1, [2])
    merge(sim)
    before = sim.fs.server.files()
    union = union_of(sim)
    take_back(sim, union, bad, "bad")
    write_generation(sim, union)
    merge(sim)
    assert before.items() <= sim.fs.server.files().items()


# -- memory -----------------------------------------------------------------------------------


def short_of(union: Union) -> dict[int, list[int]]:
    """Return the sources by the memory that was not enough for them."""
    return {mib: list(sources) for mib, sources in sorted(union.short.items())}


def test_steps_towards_enough_memory_are_one_try(run: RunDir) -> None:
    """A source that fails with more and more memory is charged once and never given up for it."""
    for round_, mib in enumerate((900, 1350, 2025, 3038)):
        step = failure(7, attempt=round_ + 1, kind="out-of-memory", short_mib=mib)
        publish_segment(run, (round_, 0, 1), 1, failures=[step])
        union = merge(run)
        assert ({7: 1}, {mib: [7]}) == (union.attempts(), short_of(union))
        assert [] == list(union.quarantined())

    publish_segment(run, (4, 0, 1), 1, failures=[failure(7, attempt=2, kind="out-of-memory")])
    publish_segment(run, (4, 0, 1), 2, failures=[failure(7, attempt=3, kind="out-of-memory")])
    assert ({7: 3}, [7]) == (union_of(run).attempts(), list(union_of(run).quarantined()))


def test_a_step_after_other_failures_is_a_try(run: RunDir) -> None:
    """It is charged the first time, and does not quarantine by itself."""
    publish_segment(run, (0, 0, 1), 1, failures=[failure(7, attempt=1), failure(7, attempt=2)])
    step = failure(7, attempt=3, kind="out-of-memory", short_mib=900)
    publish_segment(run, (0, 0, 1), 2, failures=[step])
    union = union_of(run)
    assert ({7: 3}, []) == (union.attempts(), list(union.quarantined()))


def test_suspects_that_memory_ran_out_for(run: RunDir) -> None:
    """Nobody is charged; all want more, each by the most that was tried for it."""
    publish_segment(run, (0, 0, 1), 1, [1], suspects=[[1, 2, 3]], short_mib=900)
    publish_segment(run, (0, 1, 1), 1, suspects=[[3, 4]], short_mib=600)
    publish_segment(run, (1, 0, 1), 1, [2], suspects=[[4]], short_mib=1350)
    union = merge(run)
    assert ({}, {900: [3], 1350: [4]}) == (union.attempts(), short_of(union))
    assert short_of(union) == short_of(load_newest(run))


def test_what_completes_wants_no_memory(run: RunDir) -> None:
    """Whatever memory it was that sufficed."""
    publish_segment(run, (0, 0, 1), 1, suspects=[[2, 3]], short_mib=900)
    merge(run)
    publish_segment(run, (0, 0, 1), 2, [3])
    publish_segment(run, (1, 0, 1), 1, [2])
    assert {} == short_of(merge(run)) == short_of(load_newest(run))


def test_order_of_segments_does_not_matter_for_memory(sim: RunDir) -> None:
    """A late segment of an earlier round lowers nothing that a later one found out."""
    publish_segment(sim, (1, 0, 1), 1, suspects=[[4]], short_mib=1350)
    merge(sim)
    publish_segment(sim, (0, 0, 2), 1, suspects=[[4, 5]], short_mib=900)
    assert {900: [5], 1350: [4]} == short_of(union_of(sim))
