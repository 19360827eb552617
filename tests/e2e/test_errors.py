"""What goes wrong, as a user meets it: each message says what, to which thing, and what to do."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.cli import Command, wait_until
from tests.support.fuse import fuse_mount
from tests.support.local import INLINE, Desk, Ended, flip, kill_family
from tests.support.mounts import tmpfs
from tests.support.pipelines import fan_result, write_fan
from tests.support.slurm_fakes import fake_slurm


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A user's directory."""
    return Desk.make(tmp_path)


def check(ended: Ended, code: int, *fragments: str) -> None:
    """Assert an exit code and that the message on stderr holds every fragment."""
    assert code == ended.code, ended
    assert [] == [fragment for fragment in fragments if fragment not in ended.err], ended
    assert "Traceback" not in ended.err or code == 10, ended


# -- the pipeline -------------------------------------------------------------------------------


class Case(NamedTuple):
    """A pipeline's text, how it is submitted, and what comes of it."""

    text: str
    arguments: tuple[str, ...]
    code: int
    fragments: tuple[str, ...]


GOOD = """
def pipeline(n: int = 4, min_words: int = 1) -> hr.Pipeline:
    return hr.Pipeline(name="good", sources=hr.indexed(n), stages=[lambda i: i])
"""

REFUSED = {
    "no such file": Case(GOOD, ("pipe.py",), 10, ("no such file", "Did you mean p.py?")),
    "attribute missing": Case(
        GOOD, ("p.py:pipelin",), 10, ("no 'pipelin'", "Pipelines in it: pipeline", "Give p.py:")
    ),
    "not a pipeline": Case(
        "def pipeline():\n    return 42",
        ("p.py",),
        10,
        ("42 (int), not a Pipeline", "function that returns one"),
    ),
    "does not import": Case(
        "import no_such_library",
        ("p.py",),
        10,
        ("p.py:2: ModuleNotFoundError", "No module named 'no_such_library'", "does not import"),
    ),
    "not resumable": Case(
        """
        class Shuffle(hr.Stage):
            is_resumable = False
            def process(self, item):
                return item

        class Dedup(Shuffle):
            pass

        def pipeline():
            return hr.Pipeline(name="n", sources=hr.indexed(3), stages=[Shuffle(), Dedup()])
        """,
        ("p.py",),
        11,
        ("'n': not resumable: shuffle, dedup", "belongs to no single source", "finish="),
    ),
    "duplicate ids": Case(
        """
        def pipeline():
            sources = [hr.Source("a", 1), hr.Source("b", 2), hr.Source("a", 3)]
            return hr.Pipeline(name="n", sources=sources, stages=[lambda i: i])
        """,
        ("p.py",),
        13,
        ("two sources have the id 'a'", "number 0 and number 2", "Give each source an id"),
    ),
    "unknown parameter": Case(
        GOOD,
        ("p.py", "-P", "min_wrds=3"),
        2,
        ("no parameter 'min_wrds'", "Did you mean 'min_words'?", "n, min_words"),
    ),
    "parameter of another type": Case(
        GOOD, ("p.py", "-P", "n=many"), 2, ("parameter 'n'", "'many' is not of type int")
    ),
    "parameter without a value": Case(GOOD, ("p.py", "-P", "n"), 2, ("'n'", "give KEY=VALUE")),
    "array is no number": Case(
        GOOD,
        ("p.py", "--array", "0-7"),
        2,
        ("--array '0-7'", "number of array tasks", "Did you mean 8?", "N%M"),
    ),
    "array of nothing": Case(GOOD, ("p.py", "--array", "0"), 2, ("--array '0'",)),
    "unknown option": Case(GOOD, ("p.py", "--arry", "2"), 2, ("--arry", "--array")),
    "unknown command's word": Case(GOOD, ("p.py", "--cluster", "pbs"), 2, ("'slurm'", "'pbs'")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_submit_refuses(desk: Desk, name: str) -> None:
    """What cannot run is refused before a run directory is made."""
    case = REFUSED[name]
    desk.write("p.py", case.text)

    check(desk.submit(*case.arguments), case.code, *case.fragments)
    assert not (desk.path / "runs").exists() or "duplicate" in name


def test_import_that_fails_only_on_the_node(desk: Desk) -> None:
    """A pipeline that imports here but not in the array task stops the run with the reason."""
    text = 'import os\nif "HPCRESUME_ATTEMPT" in os.environ:\n    raise OSError("no licence")'
    desk.write("p.py", text + "\n" + GOOD)

    check(desk.submit("p.py", "--run-dir", "run"), 1, "stopped", "p.py:4: OSError: no licence")
    status = json.loads(desk.call("status", "run", "--json").out)
    assert "stopped" == status["state"]
    assert "no licence" in status["reason"]
    assert (4, 0) == (status["sources"]["remaining"], status["sources"]["quarantined"])


def test_row_that_json_cannot_hold(desk: Desk) -> None:
    """Such a row fails its source, naming the type; the other sources complete."""
    desk.write(
        "p.py",
        """
        def pipeline():
            stages = [lambda i: {"i": object()} if i == 1 else i]
            return hr.Pipeline(name="rows", sources=hr.indexed(3), stages=stages)
        """,
    )

    ended = desk.submit("p.py", "--run-dir", "run", "--max-attempts", "2")
    check(ended, 1, "incomplete", "2 completed, 1 quarantined, 0 left", "hpcresume failures run")
    (failure,) = json.loads(desk.call("failures", "run", "--json").out)["failures"]
    assert ("1", 2, "RowError") == (failure["source"], failure["attempts"], failure["kind"])
    assert "a value of type builtins.object" in failure["message"]
    assert "Convert it in the last stage" in failure["message"]


def test_empty_source_list(desk: Desk) -> None:
    """A run over no sources is complete at once and says so."""
    desk.write(
        "p.py",
        """
        def pipeline():
            return hr.Pipeline(name="none", sources=[], stages=[lambda i: i])
        """,
    )

    ended = desk.submit("p.py", "--run-dir", "run", "--collect", "out.jsonl")
    check(ended, 0, "the list of sources is empty", "complete", "0 rows of 0 sources")
    assert b"" == (desk.path / "out.jsonl").read_bytes()
    assert [] == list(desk.path.glob("run/rounds/*"))


# -- settings and templates ---------------------------------------------------------------------


def test_unknown_setting(desk: Desk) -> None:
    """A key that does not exist is an error that names the file and the key meant."""
    desk.write("p.py", GOOD)
    desk.write("hpcresume.toml", "[sync]\nmax_age = 5\n")

    check(desk.submit("p.py"), 15, "hpcresume.toml", "sync.max_age", "Did you mean 'max_age_s'?")


@pytest.mark.parametrize("command", [("render",), ("submit", "--dry-run")])
def test_unknown_name_in_a_template(desk: Desk, command: tuple[str, ...]) -> None:
    """A site's template that asks for what does not exist is an error with file and line."""
    desk.write("p.py", GOOD)
    desk.write("sites/mine/site.toml", 'description = "Mine"\n')
    desk.write(
        "sites/mine/job.sh.j2",
        """\
        {% extends "job.sh.j2" %}
        {% block before %}
        module load {{ settings.site.modules }}
        {% endblock %}
        """,
    )
    site = {"HPCRESUME_SITE_PATH": str(desk.path / "sites")}

    ended = desk.call(*command, "p.py", "--site", "mine", env=site)
    check(ended, 15, "mine/job.sh.j2:3", "no attribute 'modules'", "render --explain")


def test_unknown_site(desk: Desk) -> None:
    """A site that does not exist is an error."""
    desk.write("p.py", GOOD)

    check(desk.submit("p.py", "--site", "generik"), 15, "generik", "generic")


# -- the run directory --------------------------------------------------------------------------


def submitted(desk: Desk, *arguments: str) -> Path:
    """Run the good pipeline to its end in ``run``."""
    desk.write("p.py", GOOD)
    check(desk.submit("p.py", "--run-dir", "run", *arguments), 0, "complete")
    return desk.path / "run"


@pytest.mark.parametrize("arguments", [("p.py", "--run-dir", "run"), ("run",)])
def test_run_of_another_user(desk: Desk, arguments: tuple[str, ...]) -> None:
    """A run directory that belongs to somebody else is refused: code is loaded from it."""
    if os.geteuid() != 0:
        pytest.skip("giving a directory to another user takes root")
    os.chown(submitted(desk), 65534, 65534)

    check(desk.submit(*arguments), 16, "belongs to user 65534", "Start your own run")


def test_run_that_others_may_write(desk: Desk) -> None:
    """A run directory that others can write is refused, with the command that closes it."""
    submitted(desk).chmod(0o777)

    check(desk.submit("run"), 16, "can be written by other users", "chmod go-w")


def test_run_directory_not_writable(desk: Desk) -> None:
    """Where nothing can be written the run is refused before anything starts."""
    desk.write("p.py", GOOD)
    place = desk.path / "shared"
    with tmpfs(place, size_mb=1):
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        ended = desk.submit("p.py", "--run-dir", "shared/run")
        check(ended, 16, "cannot create the run directory", "Read-only", "--run-dir")


def test_directory_that_is_no_run(desk: Desk) -> None:
    """A directory with other people's files is not made a run directory."""
    desk.write("p.py", GOOD)
    desk.write("thesis/chapter.tex", "text")

    ended = desk.submit("p.py", "--run-dir", "thesis")
    check(ended, 16, "thesis exists and is not a run directory", "--run-dir")
    assert ["chapter.tex"] == os.listdir(desk.path / "thesis")
    check(desk.call("status", "thesis"), 16, "not a run directory", "hpcresume submit")


def test_newer_format(desk: Desk) -> None:
    """A run of a newer format is refused by every command, with what to install."""
    record = submitted(desk) / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "format": 99}))

    for ended in (desk.submit("run"), desk.call("status", "run"), desk.call("merge", "run")):
        check(ended, 16, "format 99", "Install that version")


def test_another_run_in_the_directory(desk: Desk) -> None:
    """Other parameters are refused by name in a directory in use, unless they are accepted."""
    submitted(desk)

    refused = desk.submit("p.py", "--run-dir", "run", "-P", "n=2")
    check(refused, 14, "made with other settings", "params.n: null -> 2", "--accept-changes")
    assert b"0\n1\n2\n3\n" == desk.rows("run")
    accepted = desk.submit("p.py", "--run-dir", "run", "-P", "n=2", "--accept-changes")
    check(accepted, 0, "accepted: params.n: null -> 2", "2 completed")
    again = desk.submit("p.py", "--run-dir", "run", "-P", "n=2")
    check(again, 0, "2 completed")
    assert b"0\n1\n" == desk.rows("run")


def test_another_pipeline_in_the_directory(desk: Desk) -> None:
    """A pipeline with other stages is refused in a directory in use."""
    submitted(desk)
    desk.write("p.py", GOOD.replace("[lambda i: i]", "[lambda i: i, str]"))

    check(desk.submit("p.py", "--run-dir", "run"), 14, "stages", "Results of both would be mixed")


def test_run_that_is_being_worked_on(desk: Desk) -> None:
    """A second submission while the first is at work is refused, naming its process."""
    calls = write_fan(desk.path).with_name("calls")
    arguments = ("fan.py", "--run-dir", "run", "-P", "ms=200", "-P", f"calls={calls}")
    first = Command(desk.path).start("submit", *INLINE, "--local-dir", str(desk.local), *arguments)
    try:
        wait_until(calls.exists, timeout_s=60, describe=lambda: f"first: {first.poll()}")
        ended = desk.submit(*arguments)
    finally:
        kill_family(first.pid)
        first.communicate()

    check(ended, 16, "is being worked on by process", "hpcresume cancel")


# -- node-local disk ----------------------------------------------------------------------------


def test_no_room_on_the_nodes_disk(desk: Desk) -> None:
    """A disk too full to start is named with what it has; with room the run goes on."""
    desk.write("p.py", GOOD)
    disk = desk.path / "disk"
    arguments = ("submit", *INLINE, "p.py", "--run-dir", "run", "--local-dir")
    with tmpfs(disk, size_mb=4):
        ended = desk.call(*arguments, disk)
        check(ended, 17, f"{disk} has 4 MiB left", "needs 64 MiB", "Free some space")

    check(desk.call(*arguments, desk.local), 0, "complete")


def test_nodes_disk_that_fills_up(desk: Desk) -> None:
    """When the ledger's disk fills, what is committed is published and the rest comes later."""
    desk.write(
        "big.py",
        """
        def pipeline():
            stages = [lambda i: {"i": i, "text": "x" * 1_000_000}]
            return hr.Pipeline(name="big", sources=hr.indexed(100), stages=stages)
        """,
    )
    disk = desk.path / "disk"
    with tmpfs(disk, size_mb=90):
        ended = desk.call(
            *("submit", *INLINE, "big.py", "--run-dir", "run", "--sync-interval", "600"),
            *("--local-dir", disk),
        )

    check(ended, 0, "round 1", "100 completed, 0 quarantined, 0 left")
    logs = "".join(path.read_text() for path in desk.path.glob("run/rounds/0000/logs/*"))
    assert "its disk has" in logs
    rows = [json.loads(line)["i"] for line in desk.rows("run").splitlines()]
    assert list(range(100)) == rows


def test_local_dir_on_a_shared_file_system(desk: Desk) -> None:
    """A ledger is never opened on a file system that other nodes share, or on FUSE."""
    desk.write("p.py", GOOD)
    place = desk.path / "fuse"
    place.mkdir()
    with fuse_mount(place):
        ended = desk.call("submit", *INLINE, "p.py", "--local-dir", place)

    check(ended, 17, f"{place} is on fuse, a shared file system", "--local-dir")


# -- Slurm --------------------------------------------------------------------------------------


def test_no_slurm_here(desk: Desk) -> None:
    """Without sbatch --cluster slurm is refused, with the other ways."""
    desk.write("p.py", GOOD)
    tools = desk.path / "bin"
    tools.mkdir()

    ended = desk.call("submit", "p.py", "--cluster", "slurm", env={"PATH": str(tools)})
    check(ended, 30, "no sbatch on PATH", "Nothing was submitted", "--cluster local")
    assert not (desk.path / "runs").exists()


def test_slurm_does_not_answer(desk: Desk) -> None:
    """Without the cluster's name the site is not known: nothing is made, by no other settings."""
    desk.write("p.py", GOOD)
    env = fake_slurm(
        desk.path / "bin",
        """
        echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2
        exit 1
        """,
    )

    ended = desk.call("submit", "p.py", "--cluster", "slurm", "--run-dir", "run", env=env)
    check(ended, 31, "Slurm did not answer `scontrol", "Unable to contact slurm controller")
    assert not (desk.path / "run").exists()
    check(desk.submit("p.py", "--run-dir", "run"), 0, "complete")


def test_slurm_refuses(desk: Desk) -> None:
    """What sbatch refuses is passed on in its own words."""
    desk.write("p.py", GOOD)
    env = fake_slurm(
        desk.path / "bin",
        """
        [ "$(basename "$0")" = sbatch ] || exit 0
        echo "sbatch: error: invalid partition specified: nosuch" >&2
        exit 1
        """,
    )

    ended = desk.call("submit", "p.py", "--cluster", "slurm", "-p", "nosuch", env=env)
    check(ended, 32, "invalid partition specified: nosuch")


# -- damage -------------------------------------------------------------------------------------


def test_damaged_segment(desk: Desk) -> None:
    """A damaged segment is set aside by collect, its sources open again, and run again."""
    write_fan(desk.path)
    check(desk.submit("fan.py", "--run-dir", "run", "-P", "ms=0"), 0, "200 completed")
    segment = max(desk.path.glob("run/rounds/*/tasks/*/e*/seg-*"))
    flip(segment, range(segment.stat().st_size // 3, segment.stat().st_size // 3 + 1))

    damaged = desk.call("collect", "run", "-o", "run.jsonl")
    check(damaged, 1, segment.name, "fails its CRC", "open again", "hpcresume submit")
    check(desk.submit("run"), 0, "complete", "200 completed")
    assert fan_result(200) == desk.rows("run")


def test_damaged_ledger(desk: Desk) -> None:
    """The damaged ledger of a dead attempt is set aside, and what only it held is run again."""
    calls = write_fan(desk.path).with_name("calls")
    arguments = (
        *("fan.py", "--run-dir", "run", "--sync-interval", "600"),
        *("-P", "ms=15", "-P", f"calls={calls}"),
    )
    first = Command(desk.path).start("submit", *INLINE, "--local-dir", str(desk.local), *arguments)
    try:
        wait_until(
            lambda: calls.exists() and calls.read_text().count("\n") > 60,
            timeout_s=60,
            describe=lambda: f"first: {first.poll()}",
        )
    finally:
        kill_family(first.pid)
        first.communicate()
    (ledger,) = desk.local.glob("hpcresume-*/*/0-0-1/ledger/data.mdb")
    # Every page of it: the header's magic stays, so that LMDB itself would open it.
    flip(ledger, range(4096 + 64, ledger.stat().st_size, 512))

    ended = desk.submit(*arguments)
    check(ended, 0, "complete", "200 completed, 0 quarantined")
    # Whoever comes first finds it: the launcher, or the next attempt on this node.
    logs = "".join(path.read_text() for path in desk.path.glob("run/rounds/0001/logs/*"))
    assert "set aside" in ended.err + logs
    assert fan_result(200) == desk.rows("run")


def test_damaged_run_record(desk: Desk) -> None:
    """A run.json that cannot be decoded is named, with what can be done."""
    (submitted(desk) / "run.json").write_bytes(b'{"format": 1, "run')

    check(desk.call("status", "run"), 22, "run.json cannot be decoded", "damaged", "--run-dir")


def test_sbatch_options_of_a_local_run_are_refused(desk: Desk) -> None:
    """Options after -- go to sbatch; where there is none they are not passed over in silence."""
    submitted(desk)

    check(desk.submit("p.py", "--", "--licenses=scratch"), 2, "--licenses=scratch", "sbatch")
