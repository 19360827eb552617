"""Typical mistakes, each with all that is printed: golden files in ``tests/e2e/mistakes``.

After a change of a message: ``HPCRESUME_TEST_GOLDEN=write pytest tests/e2e/test_mistakes.py``,
and read what has changed as somebody would who sees it for the first time.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hpcresume import errors
from tests.support.cli import Command, wait_until
from tests.support.local import INLINE, Desk
from tests.support.places import REPOSITORY, run_child
from tests.support.slurm_fakes import fake_slurm

GOLDEN = Path(__file__).parent / "mistakes"
HERE = ("submit", *INLINE, "--local-dir", "local")

GOOD = """
def pipeline(n: int = 4) -> hr.Pipeline:
    return hr.Pipeline(name="demo", sources=hr.indexed(n, int), stages=[lambda i: {"i": i}])
"""


def stages(text: str, *names: str, sources: str = "hr.indexed(3, int)") -> str:
    """Return a pipeline's file with these stages."""
    listed = ", ".join(names)
    return f"{text}\n\npipeline = hr.Pipeline(name='demo', sources={sources}, stages=[{listed}])\n"


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    Attributes:
        commands: What the user types, one after the other; the last one shows the mistake.
        error: Name of the exception that ends the last command, empty: none does.
        file: Text of ``pipeline.py``.
        slurm: Shell script that stands for each of Slurm's commands; empty: none is here.
        prepare: Makes what else is there.
    """

    commands: tuple[tuple[str, ...], ...]
    error: str = ""
    file: str = GOOD
    slurm: str = ""
    prepare: Callable[[Desk], object] = field(default=lambda _desk: None)


def _write(name: str, text: str) -> Callable[[Desk], object]:
    return lambda desk: desk.write(name, text)


def _damage_manifest(desk: Desk) -> None:
    assert 0 == desk.call(*HERE, "pipeline.py", "--run-dir", "run").code
    path = desk.path / "run" / "manifest" / "part-000001"
    path.write_bytes(path.read_bytes()[:-9])


def _break_generation(desk: Desk) -> None:
    """Put a directory where a file was: what a broken mount answers, also to root."""
    assert 0 == desk.call(*HERE, "pipeline.py", "--run-dir", "run").code
    (path,) = (desk.path / "run" / "merge").glob("gen-*2")
    path.unlink()
    path.mkdir()


SAYS = """
case "$(basename "$0")" in
  scontrol) [ "$1 $2" = "show config" ] && echo "ClusterName = demo" ;;
  sbatch) echo "sbatch: error: {}" >&2; exit 1 ;;
esac
exit 0
"""
ON_SLURM = ("submit", "pipeline.py", "--cluster", "slurm", "--array", "4", "--run-dir", "run")

MISTAKES = {
    "wrong-path": Mistake(((*HERE, "pipelin.py"),), "PipelineError"),
    "wrong-name-in-the-file": Mistake(((*HERE, "pipeline.py:main"),), "PipelineError"),
    "syntax-error": Mistake(((*HERE, "pipeline.py"),), "PipelineError", "def pipeline(:\n"),
    "forgot-to-return-the-pipeline": Mistake(
        ((*HERE, "pipeline.py"),),
        "PipelineError",
        "def pipeline():\n    hr.Pipeline(name='demo', sources=[], stages=[lambda x: x])\n",
    ),
    "stage-called-instead-of-named": Mistake(
        ((*HERE, "pipeline.py"),),
        "PipelineError",
        stages("def words(text):\n    yield from text.split()\n", "words('some text')"),
    ),
    "forgot-a-parameter": Mistake(
        ((*HERE, "pipeline.py"),),
        "UsageError",
        GOOD.replace("n: int = 4", "root: str, n: int = 4"),
    ),
    "misspelt-parameter": Mistake(
        ((*HERE, "pipeline.py", "-P", "nmber=7"),), "UsageError", GOOD.replace("(n", "(number")
    ),
    "parameter-of-another-type": Mistake(((*HERE, "pipeline.py", "-P", "n=four"),), "UsageError"),
    "misspelt-command": Mistake((("sumbit", "pipeline.py"),)),
    "array-as-slurm-spells-it": Mistake(((*HERE, "pipeline.py", "--array", "0-63"),), "UsageError"),
    "no-input-files": Mistake(
        ((*HERE, "pipeline.py"),),
        "SourcesError",
        stages("", "str", sources="hr.files('/nowhere/texts', '**/*.txt')"),
    ),
    "same-id-twice": Mistake(
        ((*HERE, "pipeline.py"),), "SourcesError", stages("", "str", sources="['a', 'b', 'a']")
    ),
    "returns-a-list-and-means-several": Mistake(
        ((*HERE, "pipeline.py"), ("failures",)),
        "",
        stages(
            "def words(i):\n    return ['one', 'two']\n\n"
            "def upper(word):\n    return word.upper()\n",
            "words",
            "upper",
            sources="hr.indexed(1, int)",
        ),
    ),
    "result-that-is-no-json": Mistake(
        ((*HERE, "pipeline.py"), ("failures",)),
        "RowError",
        stages("def tags(i):\n    return {'tags': {i}}\n", "tags", sources="hr.indexed(1, int)"),
    ),
    "global-step-in-the-middle": Mistake(
        ((*HERE, "pipeline.py"),),
        "NotResumableError",
        stages(
            "class Shuffle(hr.Stage):\n    is_resumable = False\n"
            "    def process(self, item):\n        return item\n",
            "Shuffle()",
        ),
    ),
    "library-missing-on-the-node": Mistake(
        ((*HERE, "pipeline.py", "--run-dir", "run"), ("submit", "run")),
        "StageStartError",
        "import os\nif '/code/' in __file__:\n    raise ImportError('no libcuda.so.1')\n" + GOOD,
    ),
    "two-runs-in-one-directory": Mistake(
        ((*HERE, "pipeline.py", "--run-dir", "run"), (*HERE, "other.py", "--run-dir", "run")),
        "ChangedRunError",
        prepare=_write("other.py", GOOD.replace("demo", "other")),
    ),
    "other-parameters-for-the-same-run": Mistake(
        (
            (*HERE, "pipeline.py", "--run-dir", "run"),
            (*HERE, "pipeline.py", "--run-dir", "run", "-P", "n=2"),
        ),
        "ChangedRunError",
    ),
    "misspelt-setting": Mistake(
        ((*HERE, "pipeline.py"),),
        "ConfigError",
        prepare=_write("hpcresume.toml", "[run]\nmax_atempts = 5\n"),
    ),
    "not-a-run": Mistake((("status", "."),), "RunDirError"),
    "no-run-here": Mistake((("status",),), "UsageError"),
    "local-disk-missing": Mistake(
        (("submit", *INLINE, "--local-dir", "/nowhere/disk", "pipeline.py"),), "LocalStorageError"
    ),
    "results-into-a-missing-directory": Mistake(
        (
            (*HERE, "pipeline.py", "--run-dir", "run"),
            ("collect", "run", "-o", "results/out.jsonl"),
        ),
        "UsageError",
    ),
    "storage-that-does-not-answer-right": Mistake(
        (("status", "run"),), "SharedStorageError", prepare=_break_generation
    ),
    "results-as-text": Mistake(
        ((*HERE, "pipeline.py", "--run-dir", "run"), ("collect", "run", "-o", "out.txt")),
        "UsageError",
    ),
    "damaged-manifest": Mistake((("status", "run"),), "CorruptDataError", prepare=_damage_manifest),
    "no-slurm-here": Mistake((ON_SLURM,), "SlurmMissingError"),
    "no-account": Mistake(
        (ON_SLURM,),
        "SlurmRefusedError",
        slurm=SAYS.format(
            "Batch job submission failed: Invalid account or account/partition "
            "combination specified"
        ),
    ),
    "wrong-partition": Mistake(
        (ON_SLURM,),
        "SlurmRefusedError",
        slurm=SAYS.format("invalid partition specified: gpuu"),
    ),
    "controller-down": Mistake(
        (ON_SLURM,),
        "SlurmUnreachableError",
        slurm='echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1\n',
    ),
    "no-testbed": Mistake((("testbed", "preempt", "12"),), "TestbedError"),
}


def environment(desk: Desk, script: str) -> dict[str, str]:
    """Return what the user's shell says: no Slurm, or commands that answer as a script does."""
    home = {"HOME": str(desk.path), "XDG_CONFIG_HOME": str(desk.path / "config"), "COLUMNS": "100"}
    home["XDG_STATE_HOME"] = "/tmp/nobody"
    if script:
        return {**home, **fake_slurm(desk.path / "bin", script)}
    (desk.path / "bin").mkdir()
    return {**home, "PATH": str(desk.path / "bin")}


def show(desk: Desk, mistake: Mistake) -> str:
    """Return what a user sees: each command with what it prints and its exit code."""
    desk.write("pipeline.py", mistake.file)
    mistake.prepare(desk)
    env = environment(desk, mistake.slurm)
    lines = []
    for arguments in mistake.commands:
        ended = desk.call(*arguments, env=env)
        typed = " ".join(arguments).replace(" --engine inline --local-dir local", "")
        lines += [f"$ hpcresume {typed}", ended.out + ended.err.rstrip(), f"[exit {ended.code}]"]
    return normalised("\n".join(lines), desk.path) + "\n"


def normalised(text: str, directory: Path) -> str:
    """Return a text without what differs between two machines, users and times."""
    text = text.replace(str(directory), "~").replace(str(REPOSITORY), "HPCRESUME")
    text = text.replace(sys.prefix, "PYTHON").replace(sys.base_prefix, "PYTHON")
    text = re.sub(r"[0-9.]+( ?s\b|/s\b)", r"N\1", text)
    text = re.sub(r"0x[0-9a-f]{6,}", "0xN", text)
    text = text.replace(os.uname().nodename, "NODE")
    # On a slow machine a run says how far it is.
    text = re.sub(r"(?m)^[\d,]+ done, .* left, .*\n", "", text)
    # Which of our own lines a traceback goes through is no part of a message.
    text = re.sub(r"(?ms)^    \.\.\. \d+ lines before.*?(?=^\d+ source)", "    ...\n", text)
    # The marks below a line of a traceback differ between versions of Python.
    text = re.sub(r"(?m)^ +[~^]+\n", "", text)
    return re.sub(r"(?m)[ \t]+$", "", text)


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_printed(tmp_path: Path, name: str) -> None:
    """Every word of it, on both streams, and the exit code."""
    shown = show(Desk.make(tmp_path), MISTAKES[name])
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("HPCRESUME_TEST_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(shown)

    assert path.read_text() == shown
    if MISTAKES[name].error and MISTAKES[name].commands[-1] != ("failures",):
        code = getattr(errors, MISTAKES[name].error).exit_code
        assert shown.endswith(f"[exit {code}]\n")
        assert "Traceback" not in shown


def test_every_golden_file_has_its_mistake() -> None:
    """None is left over from a mistake that is no longer tried."""
    assert sorted(MISTAKES) == sorted(path.stem for path in GOLDEN.glob("*.txt"))


# -- the exception tree ---------------------------------------------------------------------------


def tree(base: type[errors.HpcResumeError]) -> list[type[errors.HpcResumeError]]:
    """Return all classes below one."""
    return [found for below in base.__subclasses__() for found in (below, *tree(below))]


CLASSES = {
    error.__name__: error
    for error in tree(errors.HpcResumeError)
    if error.__module__ == errors.__name__
}
# A bug cannot be provoked on purpose: a test below makes one.  A pool beyond repair ends an
# attempt, with the exit code that asks for another one, and no command.
BY_MISTAKE = sorted(set(CLASSES) - {"InternalError", "PoolUnrecoverable"})


@pytest.mark.parametrize("name", BY_MISTAKE)
def test_every_exception_ends_some_command(name: str) -> None:
    """Each class of the tree is met by one of the mistakes above, through the command line."""
    assert [one for one, mistake in MISTAKES.items() if mistake.error == name]


def test_every_exception_has_its_own_exit_code_and_says_what_it_is_for() -> None:
    """Codes are those of the tree in the module's docstring, and none is used twice."""
    drawn = dict(re.findall(r"── (\w+) +(\d+) ", errors.__doc__ or ""))

    assert {name: str(error.exit_code) for name, error in CLASSES.items()} == drawn
    assert len(CLASSES) == len({error.exit_code for error in CLASSES.values()})
    assert all(error.__doc__ for error in CLASSES.values())


@pytest.mark.parametrize("name", [n for n, m in MISTAKES.items() if m.error])
def test_a_message_says_what_happened_and_what_to_do(name: str) -> None:
    """Two sentences at least, one of them with a remedy: a word to type, or a thing to change."""
    shown = (GOLDEN / f"{name}.txt").read_text()
    message = shown.rpartition("error: ")[2] if "error: " in shown else shown

    assert 2 <= len(re.findall(r"[.:?!](?=\s|$)", message)), message
    remedies = (
        r"\b(give|submit|move|convert|restore|log in|choose|did you mean|look|to (start|try|go on)"
        r"|check|create|prints)\b"
    )
    assert re.search(remedies, message, re.IGNORECASE), message


def test_a_bug_says_that_it_is_one() -> None:
    """Exit code 70, the traceback, and whom to tell."""
    done = run_child(
        "import sys\n"
        "from hpcresume.run import directory\n"
        "from hpcresume.errors import InternalError\n"
        "def broken(*_): raise InternalError('a round was dealt twice')\n"
        "directory.RunDir.open = broken\n"
        "from hpcresume.cli import main\n"
        "sys.argv = ['hpcresume', 'status', '.']\n"
        "main()\n"
    )

    assert 70 == done.returncode
    assert "a round was dealt twice. This is a bug in hpcresume" in done.stderr
    assert "Traceback" in done.stderr


# -- Ctrl-C ---------------------------------------------------------------------------------------


def test_ctrl_c_twice_ends_at_once_and_names_the_way_on(tmp_path: Path) -> None:
    """The first drains; the second does not wait, and what was published stays."""
    desk = Desk.make(tmp_path)
    desk.write(
        "pipeline.py",
        stages(
            "import pathlib, time\n\ndef slow(i):\n    pathlib.Path('begun').touch()\n"
            "    time.sleep(60)\n    return i\n",
            "slow",
        ),
    )
    process = Command(desk.path).start(
        "submit", "--cluster", "local", "--engine", "inline", "--local-dir", str(desk.local),
        "pipeline.py", start_new_session=True,
    )  # fmt: skip
    try:
        wait_until((desk.path / "begun").exists, timeout_s=60, describe=lambda: f"{process.poll()}")
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()

    assert 130 == process.returncode, err
    assert "hpcresume submit runs/" in err
    assert "Traceback" not in err
