"""Publishing, on the machine's file system and on a simulated server that misbehaves."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path

import pytest

from hpcresume.errors import CorruptDataError, SharedStorageError
from hpcresume.fs import (
    TEMPORARY_PREFIX,
    PosixFileSystem,
    digest_of,
    ensure_directory,
    list_names,
    publish,
    read_exact,
    storage_errors,
)
from tests.support.places import Place
from tests.support.simfs import ClientKilledError, SimFileSystem, SimServer

PARTS = [b"one ", b"", b"two ", b"three"]
WHOLE = b"".join(PARTS)


@pytest.fixture(params=["posix", "sim"])
def place(request, tmp_path: Path) -> Place:
    return Place.make(request.param, tmp_path)


@pytest.fixture
def sim() -> SimFileSystem:
    fs = SimFileSystem()
    fs.mkdir("/d")
    fs.sync_directory("/")
    return fs


def leftovers(fs: SimFileSystem) -> list[str]:
    return [p for p in fs.server.files() if TEMPORARY_PREFIX in p]


# -- on both file systems ---------------------------------------------------------------------


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_receipt_says_what_is_there(place: Place, exclusive: bool) -> None:
    """The receipt holds name, size and SHA-256 of the file, and no temporary name is left."""
    receipt = publish(place.fs, place.path("f"), PARTS, label="t", exclusive=exclusive)

    assert (place.path("f"), len(WHOLE)) == (receipt.path, receipt.size_bytes)
    assert hashlib.sha256(WHOLE).digest() == receipt.digest == digest_of(place.fs, receipt.path)
    assert WHOLE == place.fs.read(place.path("f"))
    assert ["f"] == place.fs.listdir(place.root)


def test_a_taken_name_is_refused_and_kept(place: Place) -> None:
    """An exclusive publish of other content leaves the first content and no garbage."""
    publish(place.fs, place.path("f"), [b"first"], label="t", exclusive=True)

    with pytest.raises(FileExistsError):
        publish(place.fs, place.path("f"), [b"second"], label="t", exclusive=True)

    assert b"first" == place.fs.read(place.path("f"))
    assert ["f"] == place.fs.listdir(place.root)


def test_a_taken_name_with_the_same_content_is_a_success(place: Place) -> None:
    """Publishing the same bytes under the same new name twice proves the same thing twice."""
    first = publish(place.fs, place.path("f"), PARTS, label="t", exclusive=True)
    second = publish(place.fs, place.path("f"), PARTS, label="t", exclusive=True)

    assert first == second
    assert ["f"] == place.fs.listdir(place.root)


def test_an_error_while_the_content_is_made_leaves_nothing(place: Place) -> None:
    """An exception of the content's iterator passes through; neither name is left."""

    def parts():
        yield b"half"
        raise CorruptDataError("bad frame")

    with pytest.raises(CorruptDataError, match="bad frame"):
        publish(place.fs, place.path("f"), parts(), label="t")

    assert [] == place.fs.listdir(place.root)


def test_a_foreign_error_is_not_the_storages(place: Place) -> None:
    """An OSError of whoever makes the content (a missing input file) stays what it is."""

    def parts():
        yield b"half"
        raise FileNotFoundError(errno.ENOENT, "gone", "input.jsonl")

    with pytest.raises(FileNotFoundError, match=r"input\.jsonl"):
        publish(place.fs, place.path("f"), parts(), label="t")

    assert [] == place.fs.listdir(place.root)


def test_a_missing_directory_is_a_storage_error(place: Place) -> None:
    """Publishing into a directory that does not exist names the path and the errno."""
    with pytest.raises(SharedStorageError) as caught:
        publish(place.fs, place.path("none", "f"), PARTS, label="t")

    assert errno.ENOENT == caught.value.fields["errno"]
    assert place.path("none", "f") == caught.value.fields["path"]


def test_directories_are_created_with_their_parents_once(place: Place) -> None:
    """Missing parents are made; existing ones are left alone."""
    ensure_directory(place.fs, place.path("a", "b", "c"))
    ensure_directory(place.fs, place.path("a", "b", "c"))

    assert ["b"] == place.fs.listdir(place.path("a"))
    assert [] == place.fs.listdir(place.path("a", "b", "c"))


def test_a_directory_under_a_file_is_a_storage_error(place: Place) -> None:
    """Creating a directory below a file raises a typed error."""
    publish(place.fs, place.path("f"), PARTS, label="t")

    with pytest.raises(SharedStorageError):
        ensure_directory(place.fs, place.path("f", "g"))


def test_listing_hides_private_names_and_missing_directories(place: Place) -> None:
    """Names are sorted, hidden ones are left out, and no directory means no names."""
    for name in ("b", "a", f"{TEMPORARY_PREFIX}x"):
        place.fs.create(place.path(name)).close()

    assert ["a", "b"] == list_names(place.fs, place.root)
    assert [] == list_names(place.fs, place.path("none"))


def test_reading_past_the_end_is_corruption(place: Place) -> None:
    """An exact read of a shorter file raises; reads within it give exactly what was asked."""
    publish(place.fs, place.path("f"), PARTS, label="t")

    assert WHOLE[4:7] == read_exact(place.fs, place.path("f"), 4, 3)
    assert b"" == read_exact(place.fs, place.path("f"), 0, 0)
    with pytest.raises(CorruptDataError):
        read_exact(place.fs, place.path("f"), len(WHOLE) - 1, 2)


@pytest.mark.parametrize("op", ["rename", "link", "read", "size", "listdir", "unlink"])
def test_missing_names_raise_enoent(place: Place, op: str) -> None:
    """Both file systems answer ENOENT for a name that is not there."""
    path = place.path("none")
    args = (path, place.path("x")) if op in ("rename", "link") else (path,)

    with pytest.raises(FileNotFoundError):
        getattr(place.fs, op)(*args)


def test_creating_twice_raises_eexist(place: Place) -> None:
    """Create, link and mkdir never take a name that exists."""
    place.fs.create(place.path("f")).close()
    place.fs.mkdir(place.path("d"))

    for call in (
        lambda: place.fs.create(place.path("f")),
        lambda: place.fs.mkdir(place.path("d")),
        lambda: place.fs.link(place.path("f"), place.path("d")),
    ):
        with pytest.raises(FileExistsError):
            call()


# -- POSIX only -------------------------------------------------------------------------------


def test_files_and_directories_are_private(tmp_path: Path) -> None:
    """Whatever the umask, files are 0600 and directories 0700."""
    fs = PosixFileSystem()
    old = os.umask(0)
    try:
        ensure_directory(fs, str(tmp_path / "d"))
        publish(fs, str(tmp_path / "d" / "f"), PARTS, label="t")
    finally:
        os.umask(old)

    assert 0o700 == stat.S_IMODE((tmp_path / "d").stat().st_mode)
    assert 0o600 == stat.S_IMODE((tmp_path / "d" / "f").stat().st_mode)


def test_a_symbolic_link_is_not_followed_when_creating(tmp_path: Path) -> None:
    """A link planted where a file is to be created is refused."""
    (tmp_path / "f").symlink_to(tmp_path / "target")

    with pytest.raises(OSError, match="File exists"):
        PosixFileSystem().create(str(tmp_path / "f"))

    assert not (tmp_path / "target").exists()


def test_short_reads_are_put_together(tmp_path: Path, monkeypatch) -> None:
    """A read in pieces returns all that was asked for, and stops at the end of the file."""
    (tmp_path / "f").write_bytes(bytes(range(200)))

    assert bytes(range(50, 150)) == PosixFileSystem().read(str(tmp_path / "f"), 50, 100)
    assert bytes(range(150, 200)) == PosixFileSystem().read(str(tmp_path / "f"), 150, 100)
    assert b"" == PosixFileSystem().read(str(tmp_path / "f"), 500, 100)


# -- the simulated server ---------------------------------------------------------------------


@pytest.mark.parametrize("op", ["create", "write", "sync", "close"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_error_before_the_name_leaves_no_name(
    sim: SimFileSystem, op: str, number: int, when: str
) -> None:
    """
    Whatever call fails before the final name is given: a typed error with its errno, no file,
    and the same call succeeds once the fault is gone.
    """
    sim.fail(op, number, when=when)

    with pytest.raises(SharedStorageError) as caught:
        publish(sim, "/d/f", PARTS, label="t")

    assert number == caught.value.fields["errno"]
    assert "/d/f" not in sim.server.files()
    assert WHOLE == sim.read(publish(sim, "/d/f", PARTS, label="t").path)


def test_a_file_is_never_synced_twice(sim: SimFileSystem) -> None:
    """After a failed fsync the retry uses a new temporary file: the kernel dropped the pages."""
    sim.fail("sync", errno.EIO)
    with pytest.raises(SharedStorageError):
        publish(sim, "/d/f", PARTS, label="t")
    publish(sim, "/d/f", PARTS, label="t")

    synced = [path for op, path in sim.calls if op == "sync"]
    assert 2 == len(synced) == len(set(synced))


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOENT, errno.EEXIST, errno.EIO])
def test_a_lost_reply_is_recognised(sim: SimFileSystem, exclusive: bool, number: int) -> None:
    """A rename or link that was done although it failed is found out by its digest."""
    sim.fail("link" if exclusive else "rename", number, when="after")

    receipt = publish(sim, "/d/f", PARTS, label="t", exclusive=exclusive)

    assert WHOLE == sim.read(receipt.path)


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_naming_that_failed_is_an_error(sim: SimFileSystem, exclusive: bool) -> None:
    """A rename or link without an effect leaves neither the name nor garbage."""
    sim.fail("link" if exclusive else "rename", errno.EIO)

    with pytest.raises(SharedStorageError):
        publish(sim, "/d/f", PARTS, label="t", exclusive=exclusive)

    assert {} == sim.server.files()


def test_a_taken_name_that_cannot_be_read_is_not_ours(sim: SimFileSystem) -> None:
    """Whether a taken name holds our content cannot be told where it cannot be read."""
    publish(sim, "/d/f", [b"other"], label="t")
    sim.fail("read", errno.ESTALE, contains="/d/f")

    with pytest.raises(SharedStorageError):
        publish(sim, "/d/f", PARTS, label="t", exclusive=True)

    assert b"other" == sim.read("/d/f")


@pytest.mark.parametrize("op", ["sync_directory", "read"])
def test_no_receipt_without_proof(sim: SimFileSystem, op: str) -> None:
    """When the directory cannot be synced or the file not read back, there is no receipt."""
    sim.fail(op, errno.EIO)

    with pytest.raises(SharedStorageError):
        publish(sim, "/d/f", PARTS, label="t")

    assert WHOLE == sim.read(publish(sim, "/d/f", PARTS, label="t").path)


def test_a_receipt_only_if_the_read_back_is_equal(sim: SimFileSystem) -> None:
    """A byte that changes on its way to storage is noticed."""
    sim.on("sync_directory", lambda: sim.server.rot("/d/f", 3))

    with pytest.raises(SharedStorageError, match="reads back differently"):
        publish(sim, "/d/f", PARTS, label="t")


@pytest.mark.parametrize("op", ["sync_directory", "rename"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_restart_of_the_server_around_the_rename(sim: SimFileSystem, op: str, when: str) -> None:
    """A server that restarts between rename and directory sync: no receipt for a lost file."""
    sim.on(op, sim.server.restart, when=when)

    try:
        receipt = publish(sim, "/d/f", PARTS, label="t")
    except SharedStorageError:
        assert "/d/f" not in sim.server.files()
        receipt = publish(sim, "/d/f", PARTS, label="t")
    sim.server.restart()

    assert receipt.digest == digest_of(sim, "/d/f")


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("call", range(1, 14))
def test_a_restart_before_any_call_never_loses_a_receipt(exclusive: bool, call: int) -> None:
    """
    A server that loses unsynced data before each call in turn: what has a receipt is there
    after another restart, in directories that were made on the way too.
    """
    fs = SimFileSystem()
    restarts = [call]

    def maybe_restart() -> None:
        restarts[0] -= 1
        if restarts[0] == 0:
            fs.server.restart()

    for op in ("mkdir", "create", "write", "sync", "close", "rename", "link", "unlink",
               "sync_directory", "read"):  # fmt: skip
        fs.on(op, maybe_restart, times=99)
    for _ in range(3):
        try:
            ensure_directory(fs, "/a/b")
            receipt = publish(fs, "/a/b/f", [WHOLE], label="t", exclusive=exclusive)
            break
        except SharedStorageError:
            continue
    fs.server.restart()

    assert receipt.digest == digest_of(fs, "/a/b/f")


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize(
    ("op", "when"),
    [(op, when) for op in ("create", "sync", "close", "name", "sync_directory", "read")
     for when in ("before", "after")] + [("write", "torn")],
)  # fmt: skip
def test_a_kill_leaves_a_whole_file_or_none(exclusive: bool, op: str, when: str) -> None:
    """A process killed at any call leaves the whole file, or none under the final name."""
    server = SimServer()
    dying, next_one = SimFileSystem(server), SimFileSystem(server)
    name_op = "link" if exclusive else "rename"
    dying.mkdir("/d")
    dying.on(name_op if op == "name" else op, dying.kill, when=when)

    with pytest.raises(ClientKilledError):
        publish(dying, "/d/f", PARTS, label="t", exclusive=exclusive)

    assert server.files().get("/d/f", WHOLE) == WHOLE
    assert [] == [n for n in list_names(next_one, "/d") if n != "f"]
    assert WHOLE == next_one.read(
        publish(next_one, "/d/f", PARTS, label="t", exclusive=exclusive).path
    )


@pytest.mark.parametrize("hard_links", [True, False])
def test_of_two_writers_one_wins(hard_links: bool) -> None:
    """Two processes that publish under one new name: one succeeds, its content stays."""
    server = SimServer(hard_links=hard_links)
    first, second = SimFileSystem(server), SimFileSystem(server)
    first.mkdir("/d")
    # The second comes when the first has written its file and is about to name it.
    first.on("link", lambda: publish(second, "/d/f", [b"second"], label="t", exclusive=True))

    with pytest.raises(FileExistsError):
        publish(first, "/d/f", [b"first"], label="t", exclusive=True)

    assert {"/d/f": b"second"} == server.files()


@pytest.mark.parametrize("op", ["write", "sync", "close"])
def test_without_hard_links_a_failed_copy_frees_the_name(op: str) -> None:
    """Where links are not possible, a copy that fails midway does not block the name."""
    fs = SimFileSystem(SimServer(hard_links=False))
    fs.mkdir("/d")
    fs.fail(op, errno.ENOSPC, contains="/d/f")

    with pytest.raises(SharedStorageError):
        publish(fs, "/d/f", PARTS, label="t", exclusive=True)

    assert {} == fs.server.files()
    assert WHOLE == fs.read(publish(fs, "/d/f", PARTS, label="t", exclusive=True).path)


def test_a_temporary_that_cannot_be_removed_does_no_harm(sim: SimFileSystem) -> None:
    """The file counts although its temporary name stays; listings do not show that."""
    sim.fail("unlink", errno.EIO, times=9)

    publish(sim, "/d/f", PARTS, label="t", exclusive=True)

    assert ["f"] == list_names(sim, "/d")
    assert 1 == len(leftovers(sim))


def test_an_error_of_the_storage_keeps_its_cause() -> None:
    """The typed error names what was tried, on what, and the errno."""
    with pytest.raises(SharedStorageError, match="cannot read /x: No space") as caught:  # noqa: SIM117
        with storage_errors("read", "/x"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert errno.ENOSPC == caught.value.fields["errno"]


# -- the simulation is itself tested ----------------------------------------------------------


def test_the_server_forgets_what_was_not_synced(sim: SimFileSystem) -> None:
    """After a restart: synced names hold synced content, other names are gone."""
    handle = sim.create("/d/kept")
    handle.write(b"durable")
    handle.sync()
    handle.write(b" lost")
    sim.sync_directory("/d")
    sim.create("/d/lost").sync()

    sim.server.restart()

    assert {"/d/kept": b"durable"} == sim.server.files()
    with pytest.raises(OSError, match="Stale"):
        handle.write(b"x")


def test_held_listings_are_out_of_date_until_refreshed(sim: SimFileSystem) -> None:
    """A client with held listings sees the names of earlier, and opens the new ones."""
    sim.hold_listings()
    assert [] == sim.listdir("/d")
    publish(sim, "/d/f", PARTS, label="t")

    assert [] == sim.listdir("/d")
    assert sim.exists("/d/f")
    sim.refresh_listings()
    assert ["f"] == sim.listdir("/d")
