"""States on their way: packed, described, verified; through objects and through files."""

from __future__ import annotations

import array
import pickle
import stat
from pathlib import Path

import numpy as np
import pytest

from hpcresume.errors import ConfigError
from hpcresume.serving import FileTransport, ObjectTransport, StateError
from hpcresume.serving.buffers import Buffer, checksum
from hpcresume.serving.state import pack, unpack
from hpcresume.serving.transport import get_transport, register_transport

STATE = {
    "weights": np.arange(12, dtype="f4").reshape(3, 4),
    "scalar": np.float64(2.5),
    "empty": np.zeros((0, 7), dtype="i8"),
    "words": b"a text",
    "numbers": array.array("i", [1, 2, 3]),
}


def received(transport, package, chunks=None):
    """Return what a worker gets of a package."""
    given = chunks or [transport.chunk(package, n) for n in range(len(package.chunks))]
    manifest = package.manifest
    return [
        part for number, chunk in enumerate(given)
        for part in transport.unpack(manifest, number, chunk)
    ]  # fmt: skip


@pytest.mark.parametrize("chunk_bytes", [1, 50, 1 << 20])
@pytest.mark.parametrize("kind", ["object", "file"])
def test_a_state_arrives_as_it_was(tmp_path: Path, kind: str, chunk_bytes: int) -> None:
    """Names, types, shapes, bytes and order are the same after the way, in chunks of any size."""
    transport = (
        ObjectTransport(chunk_bytes)
        if kind == "object"
        else FileTransport(str(tmp_path), chunk_bytes)
    )
    package = transport.pack(3, STATE, "s1")
    parts = received(transport, package)

    assert list(STATE) == [part.name for part in parts]
    weights, scalar, empty, words, numbers = parts
    assert np.array_equal(STATE["weights"], weights.array())
    assert (2.5, (0, 7)) == (scalar.array()[()], empty.array().shape)
    assert (b"a text", [1, 2, 3]) == (bytes(words), numbers.array().tolist())
    assert not weights.array().flags.writeable
    assert 3 == package.manifest.version
    assert sum(part.data.nbytes for part in parts) == package.manifest.size_bytes


def test_the_digest_is_of_all_that_matters() -> None:
    """States differ in digest by any name, type, shape, byte or order, and by nothing else."""
    base = {"a": np.zeros(4, "f4"), "b": b"xy"}
    digest = pack(1, base).manifest.digest
    others = [
        {"a": np.zeros(4, "f4"), "c": b"xy"},
        {"a": np.zeros(4, "i4"), "b": b"xy"},
        {"a": np.zeros((2, 2), "f4"), "b": b"xy"},
        {"a": np.zeros(4, "f4"), "b": b"xz"},
        {"b": b"xy", "a": np.zeros(4, "f4")},
    ]

    assert digest == pack(2, base, chunk_bytes=1).manifest.digest
    assert 6 == len({digest, *(pack(1, other).manifest.digest for other in others)})


def test_what_differs_is_refused() -> None:
    """A chunk with a changed byte, a cut part or a missing one is refused, and named."""
    package = pack(1, {"a": b"0123456789", "b": b"xyz"})
    a, b = package.chunks[0]
    changed = Buffer(b"0123456780")

    for chunk, what in [
        ((changed, b), "part 'a' fails its checksum"),
        ((Buffer(b"012345678"), b), "part 'a' has 9 of 10 bytes"),
        ((a,), "chunk 0 has 1 of 2 parts"),
    ]:
        with pytest.raises(StateError, match=what):
            list(unpack(package.manifest, 0, chunk))


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    """A chunk's file that changed, was cut or is not seen is refused, and named."""
    transport = FileTransport(str(tmp_path))
    package = transport.pack(1, STATE, "s1")
    path = Path(transport.chunk(package, 0))
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()

    with pytest.raises(StateError, match="version 1"):
        received(transport, package)


def test_files_are_private_and_forgotten(tmp_path: Path) -> None:
    """Only the user reads a state's files; forgetting a session removes them, twice as well."""
    transport = FileTransport(str(tmp_path))
    path = Path(transport.chunk(transport.pack(1, STATE, "s1"), 0))

    assert 0o700 == stat.S_IMODE(path.parent.stat().st_mode)
    transport.forget("s1")
    transport.forget("s1")
    assert [] == list(tmp_path.iterdir())


def test_a_directory_of_its_own_goes_with_the_last_session() -> None:
    """Without a directory given, files lie in a temporary one that is removed with them."""
    transport = FileTransport()
    transport.pack(1, STATE, "s1")
    transport.pack(2, STATE, "s2")
    transport.forget("s1")
    assert Path(transport.directory).exists()
    transport.forget("s2")

    assert not Path(transport.directory).exists()


@pytest.mark.parametrize(
    ("state", "what"),
    [
        (b"only bytes", "a state is bytes"),
        (7, "a state is int"),
        ([("a", b"1"), ("a", b"2")], "two parts are named 'a'"),
        ([("a", 7)], "part 'a' is int"),
        ({"a": np.zeros((4, 4))[:, ::2]}, "not a contiguous buffer"),
        ([b"unnamed"], "not a pair"),
    ],
)
def test_what_is_no_state_is_refused(state: object, what: str) -> None:
    """What cannot be sent is refused with what to give instead."""
    with pytest.raises(StateError, match=what):
        pack(1, state)


def test_buffers_are_pickled_without_a_copy() -> None:
    """A buffer's bytes go out of band, as Ray maps them; in band for older protocols."""
    data = bytearray(b"x" * 1000)
    outside: list[pickle.PickleBuffer] = []
    text = pickle.dumps(Buffer(data), protocol=5, buffer_callback=outside.append)

    assert len(text) < 200
    assert bytes(data) == bytes(pickle.loads(text, buffers=outside).view)
    assert bytes(data) == bytes(pickle.loads(pickle.dumps(Buffer(data), protocol=4)).view)
    assert checksum(memoryview(b"123456789")) == 0xE3069283


def test_transports_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a name that is built in or registered, as module:name, or given as they are."""
    mine = ObjectTransport(7)
    monkeypatch.setattr("hpcresume.serving.transport._MAKERS", {"object": ObjectTransport})
    register_transport("mine", lambda: mine)

    assert mine is get_transport("mine")
    assert mine is get_transport(mine)
    assert ObjectTransport() == get_transport("hpcresume.serving.transport:ObjectTransport")
    with pytest.raises(ConfigError, match="Known: mine, object, torch"):
        get_transport("theirs")
    with pytest.raises(ConfigError, match="No module named 'not_there'"):
        get_transport("not_there:Transport")
