"""Rows 58 to 60, and what else another user of the node or of the file system could try."""

from __future__ import annotations

import json
import os
import secrets
import stat
import sys
from pathlib import Path

import psutil
import pytest

from hpcresume.errors import RunDirError
from hpcresume.run.directory import check_owner
from tests.faults.rig import Rig, make_rig
from tests.support.cli import Command
from tests.support.local import Desk
from tests.support.stranger import Stranger

slow = pytest.mark.slow
SECRET = "correct-horse-" + secrets.token_hex(8)


@pytest.fixture
def open_rig(public: Path, tmp_path: Path):
    """A run, and a node-local directory, in a place where everybody may make files."""
    with make_rig(tmp_path, run=public / "run") as made:
        made.local.chmod(0o1777)
        yield made


def test_row_58_another_user_sees_and_changes_nothing(
    open_rig: Rig, public: Path, stranger: Stranger
) -> None:
    """
    While an attempt works in directories that everybody may write, another user can neither
    list, read, write, replace nor signal anything of it.
    """
    attempt = open_rig.prepare().begin()
    local = next(open_rig.local.glob("hpcresume-*"))
    for path in (open_rig.run, local, *open_rig.local.glob("hr-*")):
        assert not any(stranger.can(test, path) for test in ("-r", "-w", "-x"))
        assert 0 != stranger.call("mv", path, public / "gone").returncode
        assert 0 != stranger.call("ln", "-s", "/etc", path / "planted").returncode
    for process in psutil.Process(attempt.process.pid).children():
        assert 0 != stranger.call("kill", "-0", process.pid).returncode
        assert 0 != stranger.call("cat", f"/proc/{process.pid}/environ").returncode

    assert 0 == attempt.wait()
    open_rig.verdict(executions=1)


def test_row_58_planted_run_directory(public: Path, tmp_path: Path, stranger: Stranger) -> None:
    """A directory, or a link, that another user put where a run is to be made is refused."""
    desk = Desk.make(tmp_path)
    desk.write("p.py", PLAIN)
    (tmp_path / "mine").mkdir(mode=0o700)
    for name, command in {
        "theirs": ("mkdir", "-m", "777"),
        "link": ("ln", "-s", tmp_path / "mine"),
    }.items():
        assert 0 == stranger.call(*command, public / name).returncode
    theirs = desk.submit("p.py", "--run-dir", public / "theirs")
    # A link in a sticky directory is followed by its owner alone, where the kernel guards it.
    assert 16 == theirs.code, theirs
    assert f"belongs to user {stranger.uid}" in theirs.err
    assert [] == os.listdir(public / "theirs")


def test_row_58_directory_that_can_be_exchanged(public: Path, stranger: Stranger) -> None:
    """A run directory below one that another user can write is refused: it could be exchanged."""
    run = public / "run"
    run.mkdir(mode=0o700)
    check_owner(run)
    public.chmod(0o777)
    assert 0 == stranger.call("mv", run, public / "moved").returncode
    assert 0 == stranger.call("mv", public / "moved", run).returncode

    with pytest.raises(RunDirError, match="could put another directory"):
        check_owner(run)


PLAIN = """
def pipeline():
    return hr.Pipeline(name="p", sources=hr.indexed(4), stages=[lambda i: i])
"""


def test_row_58_site_of_another_user(public: Path, tmp_path: Path, stranger: Stranger) -> None:
    """Lines of a site file run in the user's jobs: one that another user wrote is refused."""
    desk = Desk.make(tmp_path)
    desk.write("p.py", PLAIN)
    site = "mkdir $1/evil && echo 'description = \"x\"' > $1/evil/site.toml"
    assert 0 == stranger.call("sh", "-c", site, "sh", public).returncode

    ended = desk.submit(
        "p.py", "--run-dir", "run", "--site", "evil", env={"HPCRESUME_SITE_PATH": str(public)}
    )

    assert 15 == ended.code, ended
    assert f"is owned by user {stranger.uid}" in ended.err
    assert not (tmp_path / "run").exists()


def test_row_58_whatever_the_umask(rig: Rig) -> None:
    """With umask 0 in the user's shell nothing of a run is open to others."""
    before = os.umask(0)
    try:
        rig.prepare(ms=0)
        assert 0 == rig.start().wait()
        rig.verdict(executions=1)
    finally:
        os.umask(before)


def holders(secret: str, *places: Path) -> list[str]:
    """Return the files below some directories, and the command lines, that hold a text."""
    wanted = secret.encode()
    found = []
    for pid in psutil.pids():
        path = Path(f"/proc/{pid}/cmdline")
        try:
            found += [str(path)] if wanted in path.read_bytes() else []
        except OSError:
            continue
    for place in places:
        files = (path for path in place.rglob("*") if path.is_file())
        found += [str(path) for path in files if wanted in path.read_bytes()]
    return found


def test_row_58_secrets(rig: Rig) -> None:
    """A secret that stages get is in no command line, no log and no file of the run."""
    env_file = rig.desk / "secret.env"
    env_file.write_text(f"API_TOKEN={SECRET}\n")
    env_file.chmod(0o600)
    attempt = rig.prepare(task={"env_file": str(env_file)}).begin()
    while_working = holders(SECRET, rig.run, rig.local)

    assert 0 == attempt.wait()
    rig.verdict(executions=1)
    env_file.unlink()
    assert [] == while_working
    assert [] == holders(SECRET, rig.desk, rig.local)


NAMES = """
IDS = ["../../escaped", "a\\nb", "$(touch pwned)", "`touch pwned`", "'; touch pwned; '",
       "-rf", ".", "..", "con/../../x", "\\x00nul", "\\u202e", "x" * 3000]

def save(payload, ctx):
    ctx.output("row.txt").write_text(payload)
    return {"id": ctx.source_id}

def pipeline():
    sources = [hr.Source(text, text) for text in IDS]
    return hr.Pipeline(name="names", sources=sources, stages=[save])
"""


def test_row_58_hostile_names(tmp_path: Path) -> None:
    """Ids that look like paths, options or shell commands name sources and nothing else."""
    desk = Desk.make(tmp_path)
    desk.write("p.py", NAMES)
    run = "run $(touch pwned) 'a' \"b\";c"

    ended = desk.submit("p.py", "--run-dir", run)
    assert 0 == ended.code, ended
    done = desk.call("collect", run, "-o", "out.jsonl", "--files", "files")

    assert 0 == done.code, done
    ids = [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    space: dict[str, list[str]] = {}
    exec(NAMES.partition("def save")[0], space)  # the pipeline's own list
    assert space["IDS"] == ids
    assert [] == list(tmp_path.rglob("pwned"))
    expected = {"files", "local", "out.jsonl", "p.py", run}
    assert expected == {name for name in os.listdir(tmp_path) if not name.startswith(".")}
    assert len(ids) == len(list((tmp_path / "files").rglob("row.txt")))


def test_shared_group(public: Path, tmp_path: Path, stranger: Stranger) -> None:
    """
    ``--shared-group``: a member of the group reads how the run stands and its results, and
    can neither write to it nor continue it; who is not a member sees nothing.
    """
    desk = Desk.make(tmp_path)
    desk.write("p.py", PLAIN)
    run = public / "run"
    group = next(line.split(":") for line in Path("/etc/group").read_text().splitlines()[1:])
    ended = desk.submit("p.py", "--run-dir", run, "--shared-group", group[0])
    assert 0 == ended.code, ended

    member = {"group": int(group[2])}
    found = stranger.call("find", run, "!", "-readable", as_group=member["group"])
    unread = {Path(line).name for line in found.stdout.splitlines()}
    assert {"0001", "task-00000.log"} == unread
    assert "" == stranger.call("find", run, "-writable", as_group=member["group"]).stdout
    assert 0 != stranger.call("ls", run).returncode
    if stranger.can("-x", sys.executable):
        code = [sys.executable, "-P", "-m", "hpcresume"]
        told = stranger.call(*code, "status", run, as_group=member["group"])
        assert "complete" in told.stdout, told
        refused = stranger.call(*code, "merge", run, "--requeue", as_group=member["group"])
        assert 16 == refused.returncode, refused
    assert b"0\n1\n2\n3\n" == desk_rows(desk, run)


def desk_rows(desk: Desk, run: Path) -> bytes:
    """Return what collecting a run gives."""
    Command(desk.path).run("collect", str(run), "-o", "out.jsonl")
    return (desk.path / "out.jsonl").read_bytes()


STRANGER_TO_RAY = """
import sys
import ray
try:
    ray.init(sys.argv[1], logging_level="error", log_to_driver=False)
except BaseException as error:
    print("refused", type(error).__name__, flush=True)
else:
    print("let in", flush=True)
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("token", ["", "0" * 64], ids=["60-no-token", "60-wrong-token"])
def test_row_ray(public: Path, tmp_path: Path, stranger: Stranger, token: str) -> None:
    """
    Another user of the node finds the port of an attempt's Ray head and is refused; the
    attempt's token is in no command line, no log and no file.
    """
    with make_rig(tmp_path, run=public / "run", engine="ray", n=400) as rig:
        attempt = rig.prepare(ms=100).begin()
        (temp,) = rig.local.glob("hr-*")
        assert 0o700 == stat.S_IMODE(temp.stat().st_mode)
        raylet = raylet_of(attempt.process.pid)
        right = raylet.environ()["RAY_AUTH_TOKEN"]
        flag = "--gcs-address="
        (address,) = (w.removeprefix(flag) for w in raylet.cmdline() if w.startswith(flag))
        env = {"PATH": os.environ["PATH"], "HOME": str(public), "RAY_USAGE_STATS_ENABLED": "0"}
        env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}
        env |= {} if token else {"RAY_AUTH_MODE": "disabled"}
        told = stranger.python("-c", STRANGER_TO_RAY, address, env=env)
        assert attempt.process.poll() is None
        assert "let in" not in told.stdout, told
        assert "refused" in told.stdout or 0 != told.returncode, told
        assert [] == holders(right, rig.run, rig.local)
        assert 0 == attempt.wait(timeout_s=120)
        rig.verdict(executions=1)


def raylet_of(supervisor: int) -> psutil.Process:
    """Return the raylet of an attempt."""
    found = psutil.Process(supervisor).children(recursive=True)
    return next(process for process in found if process.name() == "raylet")
