"""The item's context: scratch, outputs, seed, and commands with their ends."""

import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcresume.errors import PipelineError
from hpcresume.ids import ItemPath
from hpcresume.memory import MemoryGroup
from hpcresume.pipeline.child import CommandOutOfMemoryError
from hpcresume.pipeline.context import Context, item_seed


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    """A context with room for scratch and outputs."""
    made = Context(
        source_id="s",
        item_id="s/parse.0",
        attempt=2,
        seed=7,
        scratch_root=tmp_path / "scratch",
        outputs_root=tmp_path / "outputs",
        seconds_left=lambda: 12.5,
    )
    yield made
    made.close()


def is_running(pid: int) -> bool:
    """Tell whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def wait_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"


def test_scratch_is_made_when_asked_for_and_removed_at_the_end(
    context: Context, tmp_path: Path
) -> None:
    """A context that no stage asks for scratch costs no directory."""
    assert not (tmp_path / "scratch").exists()
    scratch = context.scratch
    (scratch / "file").write_text("x")

    assert scratch is context.scratch
    context.close()
    assert [] == list((tmp_path / "scratch").iterdir())


def test_two_contexts_do_not_share_scratch(context: Context, tmp_path: Path) -> None:
    """Each item has a directory of its own below one root."""
    other = Context(
        source_id="s",
        item_id="s/parse.1",
        attempt=1,
        seed=1,
        scratch_root=tmp_path / "scratch",
        outputs_root=None,
        seconds_left=lambda: None,
    )
    assert context.scratch != other.scratch
    other.close()
    assert context.scratch.is_dir()


def test_output_gives_a_path_and_remembers_the_name(context: Context, tmp_path: Path) -> None:
    """The directories of a nested name are made; each name is listed once, in order."""
    for name in ("plots/a.png", "b.txt", "plots//a.png", "./b.txt"):
        context.output(name).write_text(name)

    assert ("plots/a.png", "b.txt") == context.outputs
    assert "./b.txt" == (tmp_path / "outputs" / "b.txt").read_text()


@pytest.mark.parametrize("name", ["", ".", "/etc/passwd", "../x", "a/../../x", "a/..", "a\0b"])
def test_output_refuses_names_that_lead_elsewhere(context: Context, name: str) -> None:
    """A file of a source lies below the source's directory."""
    with pytest.raises(PipelineError, match="output"):
        context.output(name)
    assert () == context.outputs


def test_output_without_a_place_is_refused(tmp_path: Path) -> None:
    """Where a run keeps no files, asking for one is an error."""
    context = Context(
        source_id="s",
        item_id="s",
        attempt=1,
        seed=1,
        scratch_root=tmp_path,
        outputs_root=None,
        seconds_left=lambda: None,
    )
    with pytest.raises(PipelineError, match="keeps no files"):
        context.output("a")


def test_the_log_names_the_item(context: Context, caplog: pytest.LogCaptureFixture) -> None:
    """Each line tells which item it is about."""
    with caplog.at_level(logging.INFO, logger="hpcresume.stage"):
        context.log.info("read %d bytes", 5)
    assert ["s/parse.0: read 5 bytes"] == caplog.messages


def test_seconds_left_asks_the_engine(context: Context) -> None:
    """The limit is the engine's to know."""
    assert 12.5 == context.seconds_left()


def test_seeds_are_stable_and_distinct() -> None:
    """An item's seed is the same on every attempt, and its neighbours' are others."""
    seed = item_seed("run", "s", "parse", ItemPath((0,)))
    others = {
        item_seed("run2", "s", "parse", ItemPath((0,))),
        item_seed("run", "s2", "parse", ItemPath((0,))),
        item_seed("run", "s", "parse2", ItemPath((0,))),
        item_seed("run", "s", "parse", ItemPath((1,))),
        item_seed("run", "sp", "arse", ItemPath((0,))),
    }

    # The value is part of what a resumed run relies on.
    assert 6630159306824492371 == seed
    assert (5, False) == (len(others), seed in others)
    assert 0 <= seed < 2**63


def test_run_returns_what_the_command_wrote(context: Context) -> None:
    """Output is text, input can be given, and there is nothing to read otherwise."""
    done = context.run(["cat"], input="hello")

    assert ("hello", "", 0) == (done.stdout, done.stderr, done.returncode)
    assert "" == context.run(["cat"]).stdout
    assert b"raw" == context.run(["cat"], input=b"raw").stdout


def test_run_can_write_elsewhere(context: Context) -> None:
    """Arguments of Popen are passed on."""
    with (context.scratch / "out").open("wb") as out:
        context.run(["pwd"], stdout=out, cwd=context.scratch)
    assert f"{context.scratch.resolve()}\n" == (context.scratch / "out").read_text()


def test_a_failing_command_raises_with_its_last_words(context: Context) -> None:
    """The message holds the tail of standard error, and survives pickling."""
    script = "for i in $(seq 500); do echo line $i >&2; done; exit 3"
    with pytest.raises(subprocess.CalledProcessError) as caught:
        context.run(["sh", "-c", script])

    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert 3 == error.returncode
        assert "line 500" in str(error)
        assert "line 400\n" not in str(error)


@pytest.mark.parametrize(
    ("script", "kills", "is_starved"),
    [
        ("kill -9 $$", [4, 5], True),
        ("sh -c 'kill -9 $$'; exit $?", [4, 5], True),
        ("kill -9 $$", [4, 4], False),
        ("exit 1", [4, 5], False),
    ],
)
def test_a_command_that_memory_ran_out_for(
    context: Context, monkeypatch, script: str, kills: list[int], is_starved: bool
) -> None:
    """It died of SIGKILL, and the kernel says that it killed something meanwhile."""
    monkeypatch.setattr(MemoryGroup, "kills", lambda _self: kills.pop(0) if kills else 5)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        context.run(["sh", "-c", script])
    assert is_starved is isinstance(caught.value, CommandOutOfMemoryError)
    assert is_starved is str(caught.value).startswith("memory ran out, and the kernel killed it:")


def test_a_failing_command_may_be_looked_at(context: Context) -> None:
    """With check=False the status is returned."""
    assert 3 == context.run(["sh", "-c", "exit 3"], check=False).returncode


def test_a_command_past_its_limit_is_killed_with_all_it_started(context: Context) -> None:
    """The whole group ends, and the message holds what was written until then."""
    script = "echo started >&2; sleep 600 & echo $! > pid; wait"
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        context.run(["sh", "-c", script], timeout_s=1.0, cwd=context.scratch)

    wait_gone(int((context.scratch / "pid").read_text()))
    assert "started" in str(caught.value)
    assert "started" in str(pickle.loads(pickle.dumps(caught.value)))


class InterruptedByTestError(Exception):
    pass


def test_an_exception_while_waiting_kills_the_group(context: Context) -> None:
    """What a stage started does not outlive the stage."""

    def interrupt(*_: object) -> None:
        raise InterruptedByTestError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(InterruptedByTestError):
            context.run(["sh", "-c", "echo $$ > pid; exec sleep 600"], cwd=context.scratch)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    wait_gone(int((context.scratch / "pid").read_text()))


def test_a_command_has_a_group_of_its_own(context: Context) -> None:
    """A signal to this process's group does not reach it."""
    code = "import os; print(os.getpgid(0))"

    assert os.getpgid(0) != int(context.run([sys.executable, "-c", code]).stdout)


def test_a_command_does_not_see_slurm_or_mpi(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that looks for its rank in the environment finds none."""
    for name in ("SLURM_JOB_ID", "SLURM_PROCID", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "yes")
    seen = dict(line.partition("=")[::2] for line in context.run(["env"]).stdout.splitlines())

    assert "yes" == seen["KEPT"]
    assert [] == [name for name in seen if name.startswith(("SLURM_", "PMI", "OMPI_"))]
