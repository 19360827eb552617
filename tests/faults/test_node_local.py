"""Rows 43 to 53: the node's own disk, and what lies on it, is full, damaged or in the way."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpcresume.errors import LocalStorageError
from hpcresume.task.scratch import MAX_RAY_TEMP_BYTES, make_ray_temp, make_scratch
from tests.faults.rig import Rig
from tests.support.local import Desk, flip
from tests.support.stranger import Stranger

slow = pytest.mark.slow


def truncate(path: Path) -> None:
    """Cut a file in the middle."""
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    """Leave nothing in a file."""
    os.truncate(path, 0)


def zero_pages(path: Path) -> None:
    """Replace ten pages by zeros, the first two apart."""
    data = bytearray(path.read_bytes())
    data[8192 : 8192 + 10 * 4096] = bytes(len(data[8192 : 8192 + 10 * 4096]))
    path.write_bytes(data)


def flip_value(path: Path) -> None:
    """Flip a bit within every row, also of pages that are free."""
    flip(path, [found.start() for found in re.finditer(rb'\{"i":', path.read_bytes())])


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(truncate, id="45-truncated"),
        pytest.param(empty, id="45-empty", marks=slow),
        pytest.param(zero_pages, id="45-zero-pages", marks=slow),
        pytest.param(flip_value, id="45-bit-flip"),
    ],
)
def test_row_damaged_ledger(rig: Rig, damage: Callable[[Path], None]) -> None:
    """
    The ledger that a dead attempt left is damaged: it is set aside and said so, no process
    dies of it, and what it alone held is computed again.
    """
    attempt = rig.prepare(ms=20, sync={"max_age_s": 600.0, "first_age_s": 600.0}).begin(
        committed=15
    )
    attempt.kill()
    (ledger,) = rig.local.glob("hpcresume-*/*/*/ledger/data.mdb")
    damage(ledger)
    second = rig.start()

    assert 0 == second.wait(), second.describe()

    assert "is damaged" in second.log.read_text()
    rig.verdict(executions=2)


@pytest.mark.slow
def test_row_47_stage_forks(rig: Rig) -> None:
    """A stage that forks children of its own in the driver's process does not harm the ledger."""
    (rig.desk / "forks.py").write_text(
        "import multiprocessing\n"
        "import hpcresume as hr\n\n"
        "def double(i):\n"
        "    return 2 * i\n\n"
        "def work(i):\n"
        "    with multiprocessing.get_context('fork').Pool(2) as pool:\n"
        "        return pool.map(double, [i])[0]\n\n"
        "def pipeline():\n"
        "    return hr.Pipeline(name='forks', sources=hr.indexed(6), stages=[work])\n"
    )
    ended = Desk(rig.desk).call(
        *("submit", "forks.py", "--cluster", "local", "--engine", "inline", "--run-dir", "run"),
        *("--local-dir", rig.local, "--collect", "out.jsonl"),
    )

    assert 0 == ended.code, ended
    assert "0\n2\n4\n6\n8\n10\n" == (rig.desk / "out.jsonl").read_text()
    rig.check_nothing_remains()


def test_row_52_long_directory(tmp_path: Path) -> None:
    """Where the node-local directory's name is too long for sockets, Ray's lies elsewhere."""
    deep = tmp_path / ("x" * 100)
    deep.mkdir()

    made = make_ray_temp(str(deep))

    assert len(made) <= MAX_RAY_TEMP_BYTES
    assert 0o700 == os.stat(made).st_mode & 0o777
    assert [] == os.listdir(deep)
    os.rmdir(made)


@pytest.mark.parametrize("kind", ["directory", "link"], ids=["52-taken-name", "52-planted-link"])
def test_row_taken_name(public: Path, stranger: Stranger, tmp_path: Path, kind: str) -> None:
    """Another user took the name of our directory on the node: refused, nothing is written."""
    (tmp_path / "victim").mkdir(mode=0o700)
    name = public / f"hpcresume-{os.geteuid()}"
    command = {"directory": ["mkdir", "-m", "777"], "link": ["ln", "-s", tmp_path / "victim"]}
    assert 0 == stranger.call(*command[kind], name).returncode

    with pytest.raises(LocalStorageError, match=r"another user.*--local-dir"):
        make_scratch(str(public), run_id="r", name="0-0-1", attempt="a")

    assert [] == os.listdir(name)


@pytest.fixture
def noexec(tmp_path: Path) -> Iterator[Path]:
    """A node-local directory on which nothing can be executed."""
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    place = tmp_path / "noexec"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec,size=512m", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.slow
@pytest.mark.ray
def test_row_52_noexec(noexec: Path, tmp_path: Path) -> None:
    """Nothing is executed on node-local disk, so it may be mounted noexec."""
    desk = Desk(tmp_path)
    desk.write(
        "p.py",
        """
        def pipeline():
            return hr.Pipeline(name="p", sources=hr.indexed(4), stages=[lambda i: i])
        """,
    )
    ended = desk.call(
        *("submit", "p.py", "--cluster", "local", "--run-dir", "run", "--local-dir", noexec),
        *("--collect", "out.jsonl"),
    )

    assert 0 == ended.code, ended
    assert "0\n1\n2\n3\n" == (tmp_path / "out.jsonl").read_text()


@pytest.mark.slow
def test_row_53_left_by_the_dead(rig: Rig) -> None:
    """
    What a dead attempt left on the node is swept by the next one of that run; what belongs
    to a living attempt of another run stays.
    """
    dead = rig.prepare().begin()
    dead.kill()
    (left,) = (path.parent for path in rig.local.glob("hpcresume-*/*/*/lock"))
    other = left.parent.parent / "other-run" / "0-0-1"
    other.mkdir(parents=True, mode=0o700)
    (other / "lock").touch()

    assert 0 == rig.start().wait()

    assert not left.exists()
    assert other.exists()
    (other / "lock").unlink()
    other.rmdir()
    other.parent.rmdir()
    rig.verdict(executions=2)
