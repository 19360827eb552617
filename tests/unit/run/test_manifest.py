"""The manifest: every source has an index that never changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyroaring import BitMap

from hpcresume.errors import CorruptDataError, SourcesError
from hpcresume.run.directory import RunDir
from hpcresume.run.manifest import (
    BLOCK_BYTES,
    BLOCK_SOURCES,
    Entry,
    Listing,
    Manifest,
    refuse_duplicates,
    remove_part,
    repeated_positions,
    write_indexed_part,
    write_part,
)
from tests.support.places import Place, make_run, write_file


@pytest.fixture(params=["posix", "sim"])
def run(request, tmp_path: Path) -> RunDir:
    return Place.make(request.param, tmp_path).run()


def write(run: RunDir, number: int, first: int, ids: list[str], **more) -> Listing:
    listing = Listing((i, i.encode("utf-8", "replace"), 1.0) for i in ids)
    write_part(run, number, first=first, listing=listing, **more)
    return listing


def names(count: int, prefix: str = "s") -> list[str]:
    return [f"{prefix}{n}" for n in range(count)]


@pytest.mark.parametrize("count", [0, 1, BLOCK_SOURCES - 1, BLOCK_SOURCES, 2 * BLOCK_SOURCES + 1])
def test_sources_are_found_by_index_and_id(run: RunDir, count: int) -> None:
    """At the edges of blocks and beyond: each source has the index of its listing."""
    write(run, 1, 0, names(count))
    manifest = Manifest.open(run)
    assert count == manifest.total
    for index in {0, 1, BLOCK_SOURCES - 1, BLOCK_SOURCES, count - 1} & set(range(count)):
        assert Entry(index, f"s{index}", b"s%d" % index, 1.0) == manifest.entry(index)
        assert index == manifest.find(f"s{index}")
    for missing in (f"s{count}", "", "none"):
        with pytest.raises(KeyError):
            manifest.find(missing)
    for outside in (-1, count):
        with pytest.raises(IndexError):
            manifest.entry(outside)


def test_ascending_access_reads_each_block_once(tmp_path: Path) -> None:
    """Reading all sources in order reads every block of the part once."""
    run = Place.make("sim", tmp_path).run()
    write(run, 1, 0, names(3 * BLOCK_SOURCES))
    manifest = Manifest.open(run)
    run.fs.calls.clear()
    assert names(3 * BLOCK_SOURCES) == [
        e.source_id for e in manifest.entries(range(manifest.total))
    ]
    assert 3 == len([op for op, _ in run.fs.calls if op == "read"])


def test_blocks_of_large_payloads_are_small(tmp_path: Path) -> None:
    """Whatever the payloads' sizes, a block in memory is bounded, and every source is found."""
    run = Place.make("sim", tmp_path).run()
    large = {5: 3 * BLOCK_BYTES // 2, 6: BLOCK_BYTES // 2, 8: BLOCK_BYTES // 2}
    sources = [(f"s{i}", b"x" * large.get(i, 1), 1.0) for i in range(BLOCK_SOURCES + 20)]
    write_part(run, 1, first=0, listing=Listing(iter(sources)))
    manifest = Manifest.open(run)
    (part,) = manifest.parts

    assert [0, 6, 9, BLOCK_SOURCES + 9] == part.footer.starts
    assert all(block.length < 2 * BLOCK_BYTES for block in part.container.blocks)
    for index in (0, 5, 6, 8, 9, BLOCK_SOURCES + 8, BLOCK_SOURCES + 9, BLOCK_SOURCES + 19):
        assert Entry(index, *sources[index]) == manifest.entry(index)
        assert index == manifest.find(f"s{index}")


def test_growth_keeps_every_index(run: RunDir) -> None:
    """A second part adds sources; those of the first keep their indices."""
    write(run, 1, 0, names(5))
    before = list(Manifest.open(run).entries(range(5)))
    write(run, 2, 5, names(3, "new"), withdrawn=BitMap([1, 4]))
    manifest = Manifest.open(run)
    assert before == list(manifest.entries(range(5)))
    assert (8, 6) == (manifest.total, manifest.find("new1"))
    assert [1, 4] == list(manifest.withdrawn())


def test_a_part_is_written_once(run: RunDir) -> None:
    """A second process that lists other sources into the same part is refused."""
    write(run, 1, 0, names(2))
    with pytest.raises(FileExistsError):
        write(run, 1, 0, names(3))
    assert 2 == Manifest.open(run).total


def test_weights_are_summed(run: RunDir) -> None:
    """The footer knows the total weight and whether all weights are 1."""
    listing = Listing([("a", b"", 1.0), ("b", b"", 2.5)])
    write_part(run, 1, first=0, listing=listing)
    manifest = Manifest.open(run)
    assert (3.5, False) == (manifest.parts[0].footer.weight, manifest.uniform)
    assert 2.5 == manifest.entry(1).weight


def test_the_digest_of_a_listing_tells_ids_and_payloads_apart() -> None:
    """Moving bytes between ids and payloads, or changing the order, changes the digest."""

    def digest(*sources: tuple[str, bytes]) -> bytes:
        listing = Listing((i, p, 1.0) for i, p in sources)
        list(listing.blocks())
        return listing.digest()

    different = [
        digest(("ab", b"c")), digest(("a", b"bc")), digest(("a", b"b"), ("c", b"")),
        digest(("c", b""), ("a", b"b")), digest(),
    ]  # fmt: skip
    assert len(different) == len(set(different))
    assert digest(("ab", b"c")) == digest(("ab", b"c"))


def test_indexed_sources_cost_nothing(run: RunDir) -> None:
    """A thousand million sources made from their index take less than 500 bytes."""
    receipt = write_indexed_part(run, 1, first=0, count=10**9)
    manifest = Manifest.open(run)
    assert receipt.size_bytes < 500
    assert (10**9, True) == (manifest.total, manifest.is_indexed(10**9 - 1))
    assert Entry(123_456_789, "123456789", b"", 1.0) == manifest.entry(123_456_789)
    assert 7 == manifest.find("7")


@pytest.mark.parametrize("wrong", ["007", "-1", "1000", "\u00b2", "\u0663", "x", "", "1 "])
def test_an_indexed_source_has_one_id(run: RunDir, wrong: str) -> None:
    """Only the decimal form of the index is the id; other digits and signs are no source."""
    write_indexed_part(run, 1, first=0, count=1000)
    with pytest.raises(KeyError):
        Manifest.open(run).find(wrong)


def test_too_many_sources_are_refused(run: RunDir) -> None:
    """More than 2**32 sources do not fit an index."""
    with pytest.raises(SourcesError, match="32-bit"):
        write_indexed_part(run, 1, first=1, count=1 << 32)
    assert [] == run.part_numbers()


def test_an_id_that_is_no_unicode_is_refused(run: RunDir) -> None:
    """The id of a file name that is not UTF-8 is refused by name, and no part is left."""
    with pytest.raises(SourcesError, match="not valid Unicode"):
        write(run, 1, 0, ["fine", "bad\udcff"])
    assert [] == run.part_numbers()


@pytest.mark.parametrize("ids", ["", "a/b/c", "ünï", "with\nnewline", "x" * 5000, "a.0/b.1"])
def test_any_other_text_is_an_id(run: RunDir, ids: str) -> None:
    """Slashes, newlines, long and empty ids are kept as they are."""
    write(run, 1, 0, ["first", ids])
    manifest = Manifest.open(run)
    assert (ids, 1) == (manifest.entry(1).source_id, manifest.find(ids))


# -- duplicates -------------------------------------------------------------------------------


def test_duplicates_are_refused_by_both_positions(run: RunDir) -> None:
    """Two sources with one id, in different parts: the error names the id and both numbers."""
    write(run, 1, 0, names(5000))
    write(run, 2, 5000, ["other", "s17"])
    with pytest.raises(SourcesError, match=r"'s17': number 17 and number 5001") as caught:
        refuse_duplicates(Manifest.open(run))
    assert (17, 5001) == caught.value.fields["positions"]


def test_a_withdrawn_source_may_come_back(run: RunDir) -> None:
    """A source that a listing dropped and a later one lists again is no duplicate."""
    write(run, 1, 0, names(3))
    write(run, 2, 3, ["s1"], withdrawn=BitMap([1]))
    refuse_duplicates(Manifest.open(run))


def test_ids_that_only_share_a_digest_are_no_duplicates(run: RunDir, monkeypatch) -> None:
    """The digest finds candidates; the ids decide."""
    monkeypatch.setattr("hpcresume.run.manifest.id_digest", len)
    write(run, 1, 0, ["aa", "bb", "c"])
    manifest = Manifest.open(run)
    assert {2} == repeated_positions(manifest.parts[0].digests())
    refuse_duplicates(manifest)
    assert 1 == manifest.find("bb")


def test_a_refused_part_can_be_removed(run: RunDir) -> None:
    """After its sources were refused the part is taken away and may be written anew."""
    write(run, 1, 0, ["a", "a"])
    remove_part(run.fs, run, 1)
    write(run, 1, 0, ["a", "b"])
    refuse_duplicates(Manifest.open(run))


# -- damage -----------------------------------------------------------------------------------


def test_a_missing_part_is_found(run: RunDir) -> None:
    """A manifest without one of its earlier parts is not a smaller run."""
    write(run, 1, 0, names(5))
    write(run, 2, 5, names(5, "t"))
    run.fs.unlink(run.part_path(1))
    with pytest.raises(CorruptDataError, match="missing"):
        Manifest.open(run)


def test_a_part_of_another_run_is_refused(run: RunDir) -> None:
    """A manifest copied from another run names that run."""
    other = make_run(run.fs, run.path + "-other", "f" * 16)
    write(other, 1, 0, names(3))
    write_file(run.fs, run.part_path(1), run.fs.read(other.part_path(1)))
    with pytest.raises(CorruptDataError, match="belongs to run ffffffffffffffff"):
        Manifest.open(run)


def test_every_damage_to_a_part_is_found(tmp_path: Path) -> None:
    """Any byte flipped, any truncation: CorruptDataError on opening, or on reading the block."""
    run = Place.make("sim", tmp_path).run()
    write(run, 1, 0, names(4))
    data = run.fs.read(run.part_path(1))
    # The high bytes of the format version mean a newer format, which is refused as that.
    flips = [position for position in range(len(data)) if not 12 <= position < 16]
    damaged = [data[:n] for n in range(len(data))]
    damaged += [data[:p] + bytes([data[p] ^ 0x55]) + data[p + 1 :] for p in flips]
    for content in damaged:
        write_file(run.fs, run.part_path(1), content)
        with pytest.raises(CorruptDataError):
            read_all(run)


def read_all(run: RunDir) -> None:
    manifest = Manifest.open(run)
    list(manifest.entries(range(manifest.total)))
    refuse_duplicates(manifest)
    manifest.parts[0].container.verify()
