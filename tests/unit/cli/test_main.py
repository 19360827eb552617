"""The command itself: help, errors and exit codes, imports."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import types

import click
import pytest

import hpcresume.cli as cli_module
from hpcresume.cli.common import human_bytes, human_count, human_duration, human_rate, last_run, say
from hpcresume.errors import InternalError, LocalStorageError, UsageError
from hpcresume.observe.words import human_seconds, human_share
from tests.support.runs import make_run

HEAVY = ("ray", "submitit", "pyarrow", "jinja2", "rich", "lmdb", "psutil", "cloudpickle")
SLOW = (*HEAVY, "asyncio", "ctypes", "importlib.metadata", "multiprocessing", "secrets", "socket")
"""What a command that has nothing to run does not wait for."""


def run_python(code, *arguments):
    """Run code in a fresh interpreter and return what it printed."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def modules_of(*arguments):
    """Return the modules that a command has imported when it ends."""
    code = (
        "import sys\n"
        "from hpcresume.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print('LOADED', *sys.modules)"
    )
    return set(run_python(code, *arguments).partition("LOADED")[2].split())


@pytest.fixture
def raising(monkeypatch):
    """Install a command `status` that raises what it is given."""

    def install(error):
        @click.command()
        def status():
            raise error

        module = types.ModuleType("raising_command")
        module.status = status
        monkeypatch.setitem(sys.modules, "raising_command", module)
        monkeypatch.setitem(cli_module.COMMANDS, "status", ("raising_command:status", "Raise."))

    return install


def test_help_lists_every_command_without_importing_any():
    """`hpcresume --help` names the commands and imports neither them nor anything heavy."""
    loaded = run_python(
        "import sys, click\n"
        "from hpcresume.cli import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('LOADED', *sys.modules)"
    )
    text, _, modules = loaded.partition("LOADED")

    assert [] == [name for name in cli_module.COMMANDS if f"\n  {name} " not in text]
    own = {name for name in modules.split() if name.startswith("hpcresume.")}
    assert {"hpcresume.cli", "hpcresume.errors"} == own


@pytest.mark.parametrize(
    "command", ["status", "failures", "collect", "logs", "cancel", "clean", "completion"]
)
def test_commands_show_an_example_and_import_nothing_heavy(command):
    """Every command's help has an example; importing it stays fast."""
    loaded = run_python(
        "import sys\n"
        "from hpcresume.cli import cli\n"
        f"try: cli.main(['{command}', '--help'])\n"
        "except SystemExit: pass\n"
        "print('LOADED', *sys.modules)"
    )
    text, _, modules = loaded.partition("LOADED")

    assert "Example:" in text
    assert f"hpcresume {command}" in text
    assert set() == set(HEAVY) & set(modules.split())


def test_status_imports_nothing_slow(tmp_path):
    """Reading a run needs neither Ray nor the ledger's engine."""
    made = make_run(tmp_path)
    made.publish(made.attempt(), [range(3)])
    modules = modules_of("status", made.path)

    assert "hpcresume.observe.status" in modules
    assert set() == set(SLOW) & modules


def test_a_complete_run_is_known_as_one_without_what_would_run_it(tmp_path):
    """Submitting it again and merging it once more import nothing that takes long."""
    pipeline, run = tmp_path / "twice.py", tmp_path / "run"
    pipeline.write_text(
        "import hpcresume as hr\n"
        "def twice(i): return 2 * i\n"
        "pipeline = hr.Pipeline(name='p', sources=hr.indexed(3), stages=[twice])\n"
    )
    submit = ("submit", pipeline, "--cluster", "local", "--engine", "inline")
    submit += ("--run-dir", run, "--local-dir", tmp_path)
    modules_of(*submit)
    again, merge = modules_of(*submit), modules_of("merge", run)

    assert "hpcresume.launch.foreground" in again
    assert set() == set(SLOW) & (again | merge)


def test_a_deliberate_error_is_its_message_and_exit_code(hpcresume, raising):
    """An error with a remedy shows its message on stderr and no traceback."""
    raising(LocalStorageError("the disk /x is full. Nothing can be written. Free some space."))
    result = hpcresume("status")

    assert (17, "") == (result.exit_code, result.stdout)
    assert "error: the disk /x is full. Nothing can be written. Free some space.\n" == result.stderr


def test_debug_adds_the_traceback(hpcresume, raising):
    """With --debug the traceback comes before the message."""
    raising(LocalStorageError("full"))
    result = hpcresume("--debug", "status")

    assert 17 == result.exit_code
    assert "Traceback (most recent call last)" in result.stderr


@pytest.mark.parametrize("error", [ZeroDivisionError("oops"), InternalError("oops")])
def test_anything_else_is_called_a_bug(hpcresume, raising, error):
    """An unexpected exception ends with exit code 70, a traceback and the word bug."""
    raising(error)
    result = hpcresume("status")

    assert 70 == result.exit_code
    assert "Traceback" in result.stderr
    assert "This is a bug in hpcresume" in result.stderr


def test_ctrl_c_exits_130(hpcresume, raising):
    """An interrupt is no error and no bug."""
    raising(KeyboardInterrupt())
    result = hpcresume("status")

    assert (130, "interrupted\n") == (result.exit_code, result.stderr)


def test_an_unknown_command_is_a_usage_error(hpcresume):
    """A command that does not exist ends with exit code 2 and is named."""
    result = hpcresume("stat")

    assert 2 == result.exit_code
    assert "stat" in result.stderr


def test_a_closed_pipe_ends_quietly(tmp_path):
    """`hpcresume failures | head -1` shows no traceback when the reader has left."""
    made = make_run(tmp_path, sources=3000)
    made.publish(made.attempt(), failures=[made.failure(i) for i in range(3000)])
    process = subprocess.Popen(
        [sys.executable, "-m", "hpcresume", "failures", made.path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.readline()
    process.stdout.close()
    stderr = process.stderr.read().decode()
    process.stderr.close()

    assert 141 == process.wait(timeout=60)
    assert "" == stderr


def test_a_closed_terminal_ends_quietly(tmp_path):
    """A command whose terminal has gone is no bug, and does not fail over saying anything."""
    made = make_run(tmp_path, sources=3)
    # The last two are an error, and bad usage, which are said there too.
    for words in (["status", made.path], ["status", str(tmp_path)], ["status", "--nosuch"]):
        terminal, side = pty.openpty()
        os.close(terminal)
        process = subprocess.Popen(
            [sys.executable, "-m", "hpcresume", *words], stdout=side, stderr=side
        )
        os.close(side)
        assert 129 == process.wait(timeout=60), words


def test_without_stderr_nothing_is_said(monkeypatch, capsys):
    """After `2>&-` what is for people does not mix with data."""
    monkeypatch.setattr(sys, "stderr", None)
    say("for people", err=True)
    assert "" == capsys.readouterr().out


def test_the_real_command_reports_a_wrong_directory(tmp_path):
    """As a process: message on stderr, nothing on stdout, exit code 16."""
    done = subprocess.run(
        [sys.executable, "-m", "hpcresume", "status", tmp_path, "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (16, "") == (done.returncode, done.stdout)
    assert f"error: {tmp_path} is not a run directory" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(hpcresume, shell):
    """The script of each shell asks this command for its completions."""
    result = hpcresume("completion", shell)

    assert 0 == result.exit_code
    assert "_HPCRESUME_COMPLETE" in result.stdout


def test_completing_a_command_imports_none():
    """Pressing tab names commands without importing them."""
    code = (
        "import sys\n"
        "from hpcresume.cli import cli\n"
        "from click.shell_completion import BashComplete\n"
        "found = BashComplete(cli, {}, 'hpcresume', '_X').get_completions([], 'c')\n"
        "print(*(item.value for item in found))\n"
        "print('hpcresume.cli.collect' in sys.modules)\n"
    )

    assert "collect cancel clean completion\nFalse\n" == run_python(code)


# -- which run is meant -------------------------------------------------------------------------


def test_the_last_run_is_the_newest_of_runs(tmp_path):
    """Without a name the run created last in runs/ is meant."""
    (tmp_path / "runs").mkdir()
    make_run(tmp_path / "runs", name="b", created_at="2026-01-02T00:00:00", tasks=None)
    make_run(tmp_path / "runs", name="a", created_at="2026-01-03T00:00:00", tasks=None)

    assert tmp_path / "runs" / "a" == last_run(tmp_path)


def test_inside_a_run_directory_that_run_is_meant(tmp_path):
    """A run directory that is the current one needs no name."""
    made = make_run(tmp_path, tasks=None)

    assert tmp_path / "run" == last_run(tmp_path / "run")
    assert str(tmp_path / "run") == made.path


def test_no_run_at_all_says_what_to_give(tmp_path):
    """Where there is no run, and where runs/ holds garbage, the error says what to do."""
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "run.json").write_text("{")

    with pytest.raises(UsageError, match="hpcresume submit"):
        last_run(tmp_path)


# -- numbers for people -------------------------------------------------------------------------


def test_numbers_for_people():
    """Counts, sizes, durations and rates read well at every magnitude."""
    assert ("1 row", "1,234 rows") == (human_count(1, "row"), human_count(1234, "row"))
    assert ("999 bytes", "1.5 KiB", "2.0 TiB") == (
        human_bytes(999),
        human_bytes(1536),
        human_bytes(2 << 40),
    )
    assert ("?", "59 s", "1 min 01 s", "2 h 05 min", "3 d 04 h") == tuple(
        map(human_duration, (None, 59.4, 61, 7500, 3 * 86400 + 4 * 3600))
    )
    assert ("?", "0.0/s", "1,500.0/s", "30.0/min", "36.0/h") == tuple(
        map(human_rate, (None, 0.0, 1500, 0.5, 0.01))
    )


def test_short_durations_have_the_unit_of_what_is_shown():
    """Three digits below a minute, none of them a power of ten; longer ones as elsewhere."""
    expected = (
        "250 µs",
        "1 ms",
        "999 ms",
        "1 s",
        "59.9 s",
        "1 min 00 s",
        "20 min 34 s",
        "2 d 00 h",
    )
    given = (0.00025, 0.0009996, 0.9994, 0.9996, 59.94, 59.96, 1234.4, 2 * 86400)

    assert expected == tuple(map(human_seconds, given))


def test_a_share_is_rounded_down():
    """Only all is 100 %, and all of nothing is all."""
    given = ((999_999, 1_000_000), (1, 3), (3, 3), (0, 7), (0, 0))

    assert ("99.9 %", "33.3 %", "100.0 %", "0.0 %", "100.0 %") == tuple(
        human_share(part, total) for part, total in given
    )
