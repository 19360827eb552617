"""Sources whose items travel through several groups."""

from __future__ import annotations

from array import array

import pytest

from hpcresume.engine.assembly import Assembly
from hpcresume.engine.calls import ChunkResult, Inputs
from hpcresume.engine.pace import Pace
from hpcresume.ids import ItemPath
from hpcresume.segment.frame import decode_frame
from hpcresume.sinks.packing import RowsPacker

ITEM, ROW = ItemPath((0,)), ItemPath((0, 0))
_PACKER = RowsPacker()


@pytest.mark.parametrize("calls", [[[0, 1], [2, 3]], [[2, 3], [0, 1]], [[0, 2], [1, 3]]])
def test_answers_in_any_order_are_framed_in_the_order_of_their_sources(
    calls: list[list[int]],
) -> None:
    """Rows of calls that end in another order, or lie between each other, stay their sources'."""
    frames: list[tuple[bytes, int]] = []
    tell = lambda frame, sources: frames.append((frame, sources))  # noqa: E731
    assembly = Assembly(100, tell, Pace(), lambda: 0.0, _PACKER)
    onward = []
    for sources in sorted(calls):
        first = Inputs(array("I", sources), ids=[f"s{n}" for n in sources])
        assembly.admit(first)
        column = ITEM, [b"item"] * len(sources)
        onward.append(assembly.take(first, ChunkResult(column=column), has_rows=False))
    for inputs in sorted(onward, key=lambda given: calls.index(list(given.sources))):
        rows = [b"%d\n" % source for source in inputs.sources]
        assembly.take(inputs, ChunkResult(column=(ROW, rows)), has_rows=True)
    assembly.flush()

    ((frame, sources),) = frames
    found = decode_frame(frame, what="test")
    assert (4, 0) == (sources, len(assembly))
    assert [(n, b"%d\n" % n) for n in range(4)] == list(found.sources())
    assert [ROW] * 4 == found.paths()


def test_files_of_an_earlier_group_stay_with_their_source() -> None:
    """A source that has files is framed with them, wherever its call's others are."""
    frames: list[bytes] = []
    assembly = Assembly(100, lambda frame, _: frames.append(frame), Pace(), lambda: 0.0, _PACKER)
    first = Inputs(array("I", [0, 1]), ids=["s0", "s1"])
    assembly.admit(first)
    emitted = {slot: [(ITEM, b"item")] for slot in (0, 1)}
    made = ChunkResult(emitted=emitted, files={1: [(ITEM, "x.png")]})
    onward = assembly.take(first, made, has_rows=False)
    assembly.take(onward, ChunkResult(column=(ROW, [b"0\n", b"1\n"])), has_rows=True)
    assembly.flush()

    (found,) = (decode_frame(frame, what="test") for frame in frames)
    assert [(0, b"0\n"), (1, b"1\n")] == list(found.sources())
    assert {"s1": [("0", "x.png")]} == found.files()
