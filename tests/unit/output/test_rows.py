"""The rows of a run: order, winners, damage."""

from __future__ import annotations

import random
from itertools import chain

import orjson
import pytest

from hpcresume.output import rows as rows_module
from hpcresume.output.rows import BadSegmentError, spans, take_back_segment, union_of
from hpcresume.output.run import Run
from hpcresume.run.manifest import Manifest
from tests.support.runs import make_run


def indices(made):
    """Return the order in which sources come out, by what their rows say."""
    return [row["index"] for row in Run(made.path).rows()]


def test_rows_come_in_manifest_order_across_interleaved_segments(tmp_path):
    """Tasks whose sources alternate still give rows in manifest order."""
    made = make_run(tmp_path, sources=60, tasks=3)
    for task in range(3):
        mine = list(range(task, 60, 3))
        made.publish(made.attempt(task), [mine[10:], mine[:10]])

    assert list(range(60)) == indices(made)


def test_random_overlaps_give_every_source_once_in_order(tmp_path):
    """However frames and attempts overlap, each source's rows appear once and in order."""
    dice = random.Random(7)
    made = make_run(tmp_path, sources=300, tasks=4)
    for attempt in range(12):
        ref = made.attempt(attempt % 4)
        mine = dice.sample(range(300), 120)
        made.publish(ref, [mine[:40], mine[40:41], mine[41:]])
    made.publish(made.attempt(0), [range(300)])

    assert list(range(300)) == indices(made)


def test_frames_that_do_not_fit_in_memory_are_read_again(tmp_path, monkeypatch):
    """Interleaved frames beyond the memory bound give the same rows."""
    made = make_run(tmp_path, sources=60, tasks=3)
    for task in range(3):
        made.publish(made.attempt(task), [range(task, 60, 3)])
    monkeypatch.setattr(rows_module, "OPEN_BYTES", 1)

    assert list(range(60)) == indices(made)


def test_a_zombies_rows_never_appear(tmp_path):
    """Of two copies of a source the winner's rows are taken, whoever published later."""
    made = make_run(tmp_path, sources=6)
    first, second = made.attempt(), made.attempt()
    made.publish(second, [range(6)], rows=lambda *_: [((0, 0), "second")])
    made.merge()
    made.publish(first, [range(6)], rows=lambda *_: [((0, 0), "zombie")])

    assert ["second"] * 6 == list(Run(made.path).rows())


def test_losing_copies_are_cut_out_of_a_frame(tmp_path):
    """A frame that wins some of its sources gives the rows of those only."""
    made = make_run(tmp_path, sources=6, tasks=2)
    made.publish(made.attempt(0), [[1, 4]], rows=lambda i, _: [((0, 0), f"a{i}")])
    made.publish(made.attempt(1), [range(6)], rows=lambda i, _: [((0, 0), f"b{i}")])

    assert ["b0", "a1", "b2", "b3", "a4", "b5"] == list(Run(made.path).rows())


def test_fan_out_and_empty_sources_keep_their_order(tmp_path):
    """Rows of one source stay together in item order; a source may have none."""
    made = make_run(tmp_path, sources=4)
    made.publish(
        made.attempt(),
        [range(4)],
        rows=lambda i, _: [((0, n), f"{i}.{n}") for n in range(i)],
    )

    assert ["1.0", "2.0", "2.1", "3.0", "3.1", "3.2"] == list(Run(made.path).rows())


def test_with_source_names_source_and_item(tmp_path):
    """Wrapped rows carry the source's id and the id of the item they are."""
    made = make_run(tmp_path, sources=["a.py", 'b "2".py'], tasks=2)
    made.publish(made.attempt(0), [[1]], rows=lambda *_: [((0, 0), 1), ((0, 3), 2)])
    made.publish(made.attempt(1), [[0, 1]], rows=lambda *_: [((0, 1), None)])

    assert [
        {"source": "a.py", "item": "a.py/parse.0/split.1", "row": None},
        {"source": 'b "2".py', "item": 'b "2".py/parse.0/split.0', "row": 1},
        {"source": 'b "2".py', "item": 'b "2".py/parse.0/split.3', "row": 2},
    ] == list(Run(made.path).rows(with_source=True))


def test_withdrawn_sources_are_left_out(tmp_path):
    """A source that the listing no longer holds has no rows in the result."""
    made = make_run(tmp_path, sources=4)
    made.publish(made.attempt(), [range(4)])
    made.withdraw(1, 2)

    assert [0, 3] == indices(made)


def test_whole_frames_are_passed_on_as_one_span(tmp_path):
    """A frame that wins all its sources is one span with the frame's own bytes."""
    made = make_run(tmp_path, sources=9)
    made.publish(made.attempt(), [range(5), range(5, 9)])
    found = list(spans(made.run, made.union(), Manifest.open(made.run)))

    assert [list(range(5)), list(range(5, 9))] == [list(span.sources) for span in found]


def test_a_damaged_body_reopens_its_sources(tmp_path):
    """A frame that fails its CRC names its segment; taking it back opens its sources."""
    made = make_run(tmp_path, sources=6, tasks=2)
    ref = made.attempt(0)
    bad = made.publish(ref, [range(3)])
    made.publish(made.attempt(1), [range(2, 6)])
    made.finish()
    made.damage(ref, bad)

    with pytest.raises(BadSegmentError, match="fails its CRC"):
        list(Run(made.path).rows())

    after = union_of(made.run)
    assert ([2, 3, 4, 5], False) == (list(after.completed), after.finished)
    assert [2, 3, 4, 5] == indices(made)


def test_taking_back_twice_is_harmless(tmp_path):
    """Two readers that find the same damage write one tombstone between them."""
    made = make_run(tmp_path, sources=3)
    ref = made.attempt()
    made.damage(ref, made.publish(ref, [range(3)]))
    with pytest.raises(BadSegmentError) as caught:
        list(spans(made.run, made.union(), Manifest.open(made.run)))

    take_back_segment(made.run, caught.value)
    again = take_back_segment(made.run, caught.value)

    assert (1, []) == (again.number, list(again.completed))


def test_a_vanished_segment_reopens_its_sources(tmp_path):
    """A folded segment whose file is gone is taken back like a damaged one."""
    made = make_run(tmp_path, sources=3)
    ref = made.attempt()
    made.publish(ref, [range(3)])
    made.finish()
    made.run.fs.unlink(made.run.segment_path(made.run.segments(ref)[0]))

    with pytest.raises(BadSegmentError):
        list(Run(made.path).rows())

    assert [] == list(union_of(made.run).completed)


def test_a_missing_frame_is_found(tmp_path):
    """A segment that won a source which no chunk of it holds is not passed over."""
    made = make_run(tmp_path, sources=4)
    made.publish(made.attempt(), [[0, 1]])
    union = made.union()
    for won in union.won.values():
        won.add(3)

    with pytest.raises(BadSegmentError, match="source 3"):
        list(spans(made.run, union, Manifest.open(made.run)))


def test_spans_hold_the_rows_they_name(tmp_path):
    """Taking a span apart gives the rows that it holds as a whole."""
    made = make_run(tmp_path, sources=40, tasks=2)
    made.publish(made.attempt(0), [range(0, 40, 2), [1, 39]])
    made.publish(made.attempt(1), [range(40)])

    for span in spans(made.run, made.union(), Manifest.open(made.run)):
        lines = list(chain.from_iterable(source.rows for source in span.each()))
        assert span.rows.split(b"\n")[:-1] == lines
        assert list(span.sources) == [orjson.loads(line)["index"] for line in lines]
