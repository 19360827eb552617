"""The run directory: creation, epochs, claims, marks, small records."""

from __future__ import annotations

import errno
import grp
import os
import stat
from pathlib import Path

import msgspec
import pytest

from hpcresume.errors import CorruptDataError, RunDirError, SharedStorageError
from hpcresume.fs import POSIX, TEMPORARY_PREFIX
from hpcresume.run.directory import (
    TAG,
    Outcome,
    RunDir,
    check_owner,
    fingerprint_changes,
    probe_writable,
    share_with_group,
)
from tests.support.places import RUN_ID, Place, make_run, run_info, write_file
from tests.support.simfs import ClientKilledError, SimFileSystem, SimServer


@pytest.fixture(params=["posix", "sim"])
def place(request, tmp_path: Path) -> Place:
    return Place.make(request.param, tmp_path)


@pytest.fixture
def server() -> SimServer:
    """A server with a run directory on it."""
    server = SimServer()
    make_run(SimFileSystem(server), "/run")
    return server


def client(server: SimServer) -> RunDir:
    """Return the run as another process sees it."""
    return RunDir.open("/run", SimFileSystem(server))


# -- creation and opening ---------------------------------------------------------------------


def test_a_run_is_opened_as_created(place: Place) -> None:
    """What the run is comes back, and its directory is tagged."""
    place.run()
    opened = RunDir.open(place.path("run"), place.fs)
    assert run_info() == opened.info
    assert TAG == place.fs.read(place.path("run", "CACHEDIR.TAG"))


def test_where_an_attempt_lies(tmp_path: Path) -> None:
    """Its path is the round's, the task's and its own, whatever is asked for below it."""
    run = make_run(POSIX, str(tmp_path / "run"))
    ref = run.allocate_attempt(0, 7)
    task = tmp_path / "run" / "rounds" / "0000" / "tasks" / "00007"

    assert (str(task), str(task)) == (run.task_path(0, 7), run.round_path(0, "tasks", "00007"))
    assert str(task / "e001") == run.attempt_path(ref)
    assert str(task / "e001" / "a" / "b") == run.attempt_path(ref, "a", "b")


def test_creating_again_gives_the_first_run(place: Place) -> None:
    """Of two processes that create one run, both go on with the first one's id."""
    first = make_run(place.fs, place.path("run"), "a" * 16)
    second = make_run(place.fs, place.path("run"), "b" * 16)
    assert "a" * 16 == first.run_id == second.run_id


@pytest.mark.parametrize("op", ["mkdir", "create", "write", "sync", "link", "sync_directory"])
def test_a_run_that_cannot_be_created_is_said_so(op: str) -> None:
    """Whatever call is refused: RunDirError with the remedy, and the next try succeeds."""
    fs = SimFileSystem()
    fs.fail(op, errno.EACCES)
    with pytest.raises(RunDirError, match="--run-dir"):
        make_run(fs, "/run")
    assert RUN_ID == make_run(fs, "/run").run_id


@pytest.mark.parametrize("op", ["mkdir", "create", "write", "sync", "link", "sync_directory"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_creation_that_was_killed_is_taken_up(op: str, nth: int) -> None:
    """A process killed at any call of the creation: the next one creates or opens the run."""
    server = SimServer()
    dying = SimFileSystem(server)
    dying.on(op, dying.kill, first=nth)
    try:
        make_run(dying, "/run")
    except ClientKilledError:
        assert RUN_ID == make_run(SimFileSystem(server), "/run").run_id
    else:
        assert nth > 2, "every call is made at least twice"


def test_a_created_run_survives_the_server(server: SimServer) -> None:
    """Once created, the run is there after the server restarts."""
    server.restart()
    assert RUN_ID == client(server).run_id


def test_what_is_no_run_is_refused(place: Place) -> None:
    """A directory without run.json, or none at all, is not a run directory."""
    for path in (place.root, place.path("none")):
        with pytest.raises(RunDirError, match="not a run directory"):
            RunDir.open(path, place.fs)


def test_a_run_from_the_future_is_refused(place: Place) -> None:
    """A newer format names the version that is needed; unknown fields do not matter."""
    place.fs.mkdir(place.path("run"))
    write_file(place.fs, place.path("run", "run.json"), b'{"format": 99, "new": 1}')
    with pytest.raises(RunDirError, match="format 99"):
        RunDir.open(place.path("run"), place.fs)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'{"format": 1}', b'{"format": "9"}', b'{"format": null}', b"\xff"]
)
def test_a_damaged_run_json_is_corrupt(place: Place, data: bytes) -> None:
    """Whatever stands in run.json: CorruptDataError, never another exception."""
    place.fs.mkdir(place.path("run"))
    write_file(place.fs, place.path("run", "run.json"), data)
    with pytest.raises(CorruptDataError):
        RunDir.open(place.path("run"), place.fs)


def test_every_truncation_of_run_json_is_corrupt(place: Place) -> None:
    """run.json cut short anywhere does not open."""
    run = place.run()
    path = run.join("run.json")
    data = place.fs.read(path)
    for length in range(len(data)):
        write_file(place.fs, path, data[:length])
        with pytest.raises(CorruptDataError):
            RunDir.open(run.path, place.fs)


def test_an_unreadable_run_says_whose_it_is() -> None:
    """A run that may not be read is not called corrupt."""
    fs = SimFileSystem()
    run = make_run(fs, "/run")
    fs.fail("read", errno.EACCES)
    with pytest.raises(RunDirError, match="belongs to the user"):
        RunDir.open(run.path, fs)


# -- attempts ---------------------------------------------------------------------------------


def test_epochs_count_up(place: Place) -> None:
    """Each attempt of a task has the next epoch; other tasks and rounds have their own."""
    run = place.run()
    assert [1, 2, 3] == [run.allocate_attempt(0, 4).epoch for _ in range(3)]
    assert 1 == run.allocate_attempt(0, 5).epoch == run.allocate_attempt(1, 4).epoch
    assert [4, 5] == run.tasks(0)
    assert [1, 2, 3] == [ref.epoch for ref in run.attempts(0, 4)]
    assert 5 == len(list(run.all_attempts()))


def test_more_than_999_attempts(place: Place) -> None:
    """Epochs order as numbers, not as text."""
    run = place.run()
    ref = run.allocate_attempt(0, 0)
    for epoch in (999, 1000):
        place.fs.mkdir(os.path.join(run.task_path(0, 0), f"e{epoch}"))
    assert 1001 == run.allocate_attempt(0, 0).epoch
    assert 1001 == run.newest_epoch(ref)


def test_two_instances_never_share_an_epoch(server: SimServer) -> None:
    """A second instance that comes between listing and create takes another epoch."""
    first, second = client(server), client(server)
    taken = []
    first.allocate_attempt(0, 0)
    first.fs.on("mkdir", lambda: taken.append(second.allocate_attempt(0, 0)), contains="e002")

    mine = first.allocate_attempt(0, 0)

    assert {2, 3} == {mine.epoch, taken[0].epoch}


def test_a_stale_listing_costs_a_try_only(server: SimServer) -> None:
    """An instance that sees no earlier attempts finds the next free epoch by name."""
    first, second = client(server), client(server)
    first.allocate_attempt(0, 0)
    second.fs.hold_listings()
    second.attempts(0, 0)
    for _ in range(3):
        first.allocate_attempt(0, 0)
    assert 5 == second.allocate_attempt(0, 0).epoch


def test_a_lost_reply_costs_one_number(server: SimServer) -> None:
    """mkdir was done and its retry says EEXIST: the next number is taken."""
    run = client(server)
    run.fs.fail("mkdir", errno.EEXIST, contains="e001", when="after")
    assert 2 == run.allocate_attempt(0, 0).epoch


@pytest.mark.parametrize("op", ["mkdir", "listdir", "sync_directory", "exists"])
def test_a_refused_allocation_is_typed(server: SimServer, op: str) -> None:
    """Whatever call fails: SharedStorageError, and the next try gives an attempt."""
    run = client(server)
    run.fs.fail(op, errno.EIO)
    with pytest.raises(SharedStorageError):
        run.allocate_attempt(0, 0)
    assert run.allocate_attempt(0, 0).epoch >= 1


@pytest.mark.parametrize("call", range(1, 8))
def test_an_allocated_attempt_survives_the_server(server: SimServer, call: int) -> None:
    """The server restarts at any call; an epoch that was given out is not given out again."""
    run = client(server)
    countdown = [call]

    def tick() -> None:
        countdown[0] -= 1
        if countdown[0] == 0:
            server.restart()

    for op in ("mkdir", "sync_directory"):
        run.fs.on(op, tick, times=99)
    try:
        ref = run.allocate_attempt(0, 0)
    except SharedStorageError:
        ref = run.allocate_attempt(0, 0)
    server.restart()

    assert ref in client(server).attempts(0, 0)
    assert ref.epoch != client(server).allocate_attempt(0, 0).epoch


def test_the_newest_epoch_tells_a_stale_attempt(place: Place) -> None:
    """An attempt sees that a later one was started."""
    run = place.run()
    first = run.allocate_attempt(0, 0)
    assert 1 == run.newest_epoch(first)
    run.allocate_attempt(0, 0)
    assert 2 == run.newest_epoch(first)


def test_foreign_names_are_not_ours(place: Place) -> None:
    """Temporary files and names of other patterns are neither segments nor generations."""
    run = place.run()
    ref = run.allocate_attempt(0, 0)
    for name in ("seg-000001", "seg-000002-" + "g" * 16, f"{TEMPORARY_PREFIX}1", "x",
                 "seg-000003-" + "a" * 16):  # fmt: skip
        write_file(place.fs, run.attempt_path(ref, name), b"")
    for name in ("gen-x", "gen-1.bak", "gen-000007"):
        write_file(place.fs, run.join("merge", name), b"")

    assert [3] == [name.seq for name in run.segments(ref)]
    assert [7] == run.generation_numbers()


# -- claims -----------------------------------------------------------------------------------


def claimable(run: RunDir) -> RunDir:
    run.fs.mkdir(run.round_path(0))
    run.fs.sync_directory(run.join("rounds"))
    return run


def test_the_first_array_owns_the_round(place: Place) -> None:
    """Elements of the first array get its id back, those of any other see whose it is."""
    run = claimable(place.run())
    assert ["11", "11", "11"] == [run.claim_round(0, owner) for owner in ("11", "12", "11")]
    assert ["claim"] == place.fs.listdir(run.round_path(0))


def test_each_request_has_an_owner(place: Place) -> None:
    """The arrays of one round's requests own their tasks side by side."""
    run = claimable(place.run())
    assert ["11", "12"] == [run.claim_round(0, "11"), run.claim_round(0, "12", first=7)]
    assert ["11", "12"] == [run.claim_round(0, "13"), run.claim_round(0, "13", first=7)]
    assert ["claim", "claim-00007"] == sorted(place.fs.listdir(run.round_path(0)))


def test_two_arrays_claim_at_once(server: SimServer) -> None:
    """Two that claim at the same moment agree on one owner."""
    first, second = claimable(client(server)), client(server)
    seen = []
    first.fs.on("link", lambda: seen.append(second.claim_round(0, "2")))
    assert ["2", "2"] == [first.claim_round(0, "1"), *seen]


@pytest.mark.parametrize("number", [errno.EEXIST, errno.ESTALE, errno.EIO])
def test_a_claim_whose_reply_was_lost(server: SimServer, number: int) -> None:
    """A claim that succeeded although the call failed is ours."""
    run = claimable(client(server))
    run.fs.fail("link", number, when="after")
    assert "1" == run.claim_round(0, "1")


def test_a_claim_that_was_given_survives_the_server(server: SimServer) -> None:
    """No two arrays are told that they own the round, whenever the server restarts."""
    run = claimable(client(server))
    run.fs.on("sync_directory", server.restart)
    with pytest.raises(SharedStorageError):
        run.claim_round(0, "1")
    assert "2" == client(server).claim_round(0, "2")
    server.restart()
    assert "2" == client(server).claim_round(0, "1")


# -- marks ------------------------------------------------------------------------------------


def test_the_newest_mark_counts(place: Place) -> None:
    """Stop, resume and stop again; repeating the newest one writes nothing."""
    run = place.run()
    assert not run.stop_requested()
    run.set_mark("resume")
    assert [] == run.marks()
    for kind, stopped in (("stop", True), ("stop", True), ("resume", False), ("stop", True)):
        run.set_mark(kind)
        assert stopped == run.stop_requested()
    assert [(1, "stop"), (2, "resume"), (3, "stop")] == run.marks()


def test_a_stop_and_a_resume_at_once(server: SimServer) -> None:
    """Of two different marks at one moment, stop counts; the next resume counts again."""
    first, second = client(server), client(server)
    first.set_mark("stop")
    first.set_mark("resume")
    first.fs.on("link", lambda: second.set_mark("stop"))
    first.set_mark("stop")
    write_file(first.fs, first.join("control", "0003-resume"), b"resume")
    assert first.stop_requested()
    second.set_mark("resume")
    assert not first.stop_requested()


def test_a_mark_despite_a_stale_listing(server: SimServer) -> None:
    """A process whose listing is old sees newer marks by name, and writes after them."""
    stale, other = client(server), client(server)
    stale.fs.hold_listings()
    assert not stale.stop_requested()
    for kind in ("stop", "resume", "stop", "resume"):
        other.set_mark(kind)
    assert not stale.stop_requested()
    stale.set_mark("stop")
    assert other.stop_requested()
    assert (5, "stop") == other.marks()[-1]


def test_a_mark_survives_the_server(server: SimServer) -> None:
    """A stop that was set is still set after the server restarted."""
    client(server).set_mark("stop")
    server.restart()
    assert client(server).stop_requested()


# -- records ----------------------------------------------------------------------------------


OUTCOME = Outcome("done", "all done", "finished", completed=7)


def test_a_record_is_read_as_written(place: Place) -> None:
    """A record comes back; a second one under the name is refused."""
    run = place.run()
    ref = run.allocate_attempt(0, 0)
    assert run.outcome(ref) is None
    run.write_record(run.attempt_path(ref, "outcome.json"), OUTCOME, label="record")
    assert OUTCOME == run.outcome(ref)
    with pytest.raises(FileExistsError):
        run.write_record(run.attempt_path(ref, "outcome.json"),
                         msgspec.structs.replace(OUTCOME, completed=8), label="record")  # fmt: skip
    assert OUTCOME == run.outcome(ref)


def test_a_record_makes_its_directory_durably(server: SimServer) -> None:
    """The directory of a record survives the server's restart with it."""
    run = client(server)
    path = run.round_path(3, "jobs", "1.json")
    run.write_record(path, OUTCOME, label="record")
    server.restart()
    assert OUTCOME == run.read_record(path, Outcome)


@pytest.mark.parametrize("data", [b"", b"{", b'{"state": 1}', b"\xff\xfe", b"[" * 100_000])
def test_a_record_that_is_not_whole_is_none(place: Place, data: bytes) -> None:
    """Half a record, or another one, is no record."""
    run = place.run()
    ref = run.allocate_attempt(0, 0)
    write_file(place.fs, run.attempt_path(ref, "outcome.json"), data)
    assert run.outcome(ref) is None


# -- owner and mode ---------------------------------------------------------------------------


def test_a_directory_that_others_can_write_is_refused(tmp_path: Path) -> None:
    """Code is loaded from a run directory: group or world writable ones are refused."""
    tmp_path.chmod(0o700)
    check_owner(tmp_path)
    for mode in (0o770, 0o702):
        tmp_path.chmod(mode)
        with pytest.raises(RunDirError, match="chmod go-w"):
            check_owner(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    """A run directory of another user is refused, root's eyes or not."""
    os.chown(tmp_path, 12345, -1)
    with pytest.raises(RunDirError, match="belongs to user 12345"):
        check_owner(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
@pytest.mark.parametrize(
    ("owner", "group", "mode", "refused"),
    [
        (0, 0, 0o775, False),
        (0, 12345, 0o1777, False),
        (0, 12345, 0o775, True),
        (0, 0, 0o757, True),
        (12345, 12345, 0o755, True),
        (12345, 12345, 0o1777, True),
    ],
    ids=["private-group", "sticky", "group", "world", "owner", "owner-of-sticky"],
)
def test_a_directory_that_others_could_exchange_is_refused(
    tmp_path: Path, owner: int, group: int, mode: int, refused: bool
) -> None:
    """Who can write the directory above could put another one in the place of the run's."""
    above = tmp_path / "above"
    run = above / "run"
    run.mkdir(mode=0o700, parents=True)
    above.chmod(mode)
    os.chown(above, owner, group)
    if not refused:
        check_owner(run)
        return
    with pytest.raises(RunDirError, match="could put another directory"):
        check_owner(run)


def test_a_shared_run_directory_is_read_by_its_group(tmp_path: Path) -> None:
    """What is published below it can be read by the group, and written by its owner alone."""
    group = grp.getgrgid(os.getegid()).gr_name
    run = make_run(POSIX, str(tmp_path / "alone"))
    assert 0o600 == stat.S_IMODE(os.stat(run.join("run.json")).st_mode)
    (tmp_path / "run").mkdir(mode=0o700)
    share_with_group(tmp_path / "run", group)
    run = make_run(POSIX, str(tmp_path / "run"))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").rglob("*")}
    assert {0o640, 0o2750} == modes
    check_owner(run.path)


def test_no_such_group(tmp_path: Path) -> None:
    """A group that does not exist is refused with how to list one's own."""
    with pytest.raises(RunDirError, match=r"no such group.*id -Gn"):
        share_with_group(tmp_path, "no-such-group")


def test_a_writable_directory_is_judged_by_writing(tmp_path: Path) -> None:
    """The probe leaves nothing behind; a directory that is gone is refused."""
    probe_writable(str(tmp_path))
    assert [] == list(tmp_path.iterdir())
    with pytest.raises(RunDirError, match="cannot write to"):
        probe_writable(str(tmp_path / "none"))


# -- fingerprint ------------------------------------------------------------------------------


def test_changes_are_named() -> None:
    """Every entry that differs gives one line with its dotted name; equal ones give none."""
    old = {"stages": ["a", "b"], "sink": {"kind": "rows"}, "params": {"n": 1, "gone": True}}
    new = {"stages": ["a", "c"], "sink": {"kind": "rows"}, "params": {"n": 2, "new": 3}}
    assert [] == fingerprint_changes(old, old)
    assert [
        'stages[1]: "b" -> "c"',
        "params.n: 1 -> 2",
        "params.gone: true -> null",
        "params.new: null -> 3",
    ] == fingerprint_changes(old, new)


def test_an_added_stage_is_one_change() -> None:
    """Lists of another length are shown by their names."""
    old = {"stages": [{"name": "a"}]}
    new = {"stages": [{"name": "a"}, {"name": "b"}]}
    assert ['stages: ["a"] -> ["a","b"]'] == fingerprint_changes(old, new)
