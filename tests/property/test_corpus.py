"""What fuzzing has kept: each input is taken or refused as it was when it was found."""

from __future__ import annotations

import struct

import pytest

from tests.property.fuzz import CORPUS, READERS, is_taken, sealed, whole_files


@pytest.mark.parametrize("kind", sorted(READERS))
def test_every_input_is_taken_or_refused(kind: str) -> None:
    """No input raises anything but the errors that name damage; some of each kind are there."""
    taken = [is_taken(kind, path.read_bytes()) for path in sorted((CORPUS / kind).iterdir())]
    assert {False, True} == set(taken)
    assert len(taken) > 20


@pytest.mark.parametrize("kind", sorted(READERS))
def test_a_sealed_file_is_read_inside(kind: str) -> None:
    """The fuzzer's sealing makes digests fit: whole files stay whole, a changed one is read."""
    for whole in whole_files(kind):
        assert all(is_taken(kind, bytes([how]) + whole) for how in range(4))
    changed = bytearray(whole_files(kind)[1])
    changed[-60] ^= 0xFF
    assert sealed(bytes(changed), 0) == bytes(changed)
    assert sealed(bytes(changed), 1)[:-48] == bytes(changed)[:-48]
    assert sealed(bytes(changed), 1)[-48:-16] != bytes(changed)[-48:-16]


def test_a_footer_of_absurd_length_is_left_alone() -> None:
    """Sealing does not believe a length that the file cannot hold."""
    whole = whole_files("segment")[0]
    absurd = whole[:-16] + struct.pack("<Q", 1 << 62) + whole[-8:]
    assert absurd == sealed(absurd, 7)
    assert not is_taken("segment", b"\7" + absurd)
