"""A shard's sources, as they are wanted: in order, bounded, not too heavy."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from pyroaring import BitMap

from hpcresume.run.manifest import Listing, Manifest, write_indexed_part, write_part
from hpcresume.task.feed import ShardFeed
from tests.support.places import Place


def manifest_of(directory: Path, weights: list[float]) -> Manifest:
    """Return a manifest of sources with these weights; source i is 10 bytes."""
    run = Place.make("posix", directory).run()
    listing = Listing((f"s{i}", b"x" * 10, weight) for i, weight in enumerate(weights))
    write_part(run, 1, first=0, listing=listing)
    return Manifest.open(run)


def test_in_index_order_and_bounded(tmp_path: Path) -> None:
    """Sources come in index order, as many and as large as asked for, and then none."""
    feed = ShardFeed(manifest_of(tmp_path, [1.0] * 10), BitMap([1, 2, 5, 6, 7]))
    first = feed.take(2, 1000, weight_max=1)
    second = feed.take(9, 15, weight_max=float("inf"))
    assert first is not None
    assert second is not None
    assert ([1, 2], [5, 6], 1) == (list(first.sources), list(second.sources), feed.left())
    assert (2, None) == (first.total_weight(), first.weight)
    assert [("s1", b"x" * 10), ("s2", b"x" * 10)] == first.records
    third = feed.take(9, 1000, weight_max=1)
    assert third is not None
    assert [7] == list(third.sources)
    assert feed.take(9, 1000, weight_max=1) is None


def test_heavy_sources_are_passed_over(tmp_path: Path) -> None:
    """What is too heavy stays, and is taken, the lightest first, once it is not."""
    feed = ShardFeed(manifest_of(tmp_path, [1.0, 9.0, 2.0, 5.0, 1.0]), BitMap(range(5)))
    taken = []
    for weight_max in (3, 3, 3, 6, 6, 10):
        inputs = feed.take(2, 1000, weight_max=weight_max)
        taken.append([] if inputs is None else list(inputs.sources))
    assert [[0], [2], [4], [3], [], [1]] == taken
    assert 0 == feed.left()


def test_equal_sources_fit_or_do_not(tmp_path: Path) -> None:
    """Where all weigh the same nothing is read to find out that none fits."""
    run = Place.make("posix", tmp_path).run()
    write_indexed_part(run, 1, first=0, count=100)
    feed = ShardFeed(Manifest.open(run), BitMap(range(100)))
    assert feed.take(10, 1, weight_max=0.9) is None
    assert 100 == feed.left()
    taken = feed.take(10, 1, weight_max=1)
    assert taken is not None
    assert list(range(10)) == list(taken.sources)


@pytest.mark.parametrize(("weights", "expected"), [([1.0, 1.0], None), ([1.0, 4.0], 5.0)])
def test_given_sources_know_their_weight(
    tmp_path: Path, weights: list[float], expected: float | None
) -> None:
    """Sources that are asked for by index come with the sum of their weights."""
    feed = ShardFeed(manifest_of(tmp_path, weights), BitMap())
    assert expected == feed.give([0, 1]).weight
    assert weights == [feed.weight(0), feed.weight(1)]


def test_every_source_of_a_large_shard_is_given_once(tmp_path: Path) -> None:
    """However many are asked for at a time, the shard's sources come in order, each once."""
    run = Place.make("posix", tmp_path).run()
    write_indexed_part(run, 1, first=0, count=40_000)
    shard = BitMap(range(0, 40_000, 3))
    feed = ShardFeed(Manifest.open(run), shard)
    taken: list[int] = []
    for count in itertools.cycle((1, 700, 5000)):
        inputs = feed.take(count, 1)
        if inputs is None:
            break
        assert 0 < len(inputs) <= count
        taken += inputs.sources
    assert (list(shard), 0) == (taken, feed.left())
