"""Run every check of the project, one step after the other: ``python -m tests``.

A failed step does not end the run: all are run, the last lines say how each one went, and
the exit status is 0 only if all of them passed.

With ``--release`` the steps that depend on Slurm or Python run inside another release of
Debian, which is built first.  The tier ``all`` does that for two of them, in one as an
ordinary user.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcresume.errors import TestbedError
from hpcresume.testbed import packages, releases
from tests.bench import counts
from tests.support import browser
from tests.support.cli import as_user

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ["hpcresume", "tests"]
# Most of them wait, for Slurm and for Ray; each process has clusters of its own.
TWO_AT_ONCE = ["--numprocesses=2", "--dist=worksteal", "--durations=15"]
PYTEST_STEPS = {
    "unit": ["tests/unit", *TWO_AT_ONCE],
    "property": ["tests/property"],
    "simulation": ["tests/simulation", *TWO_AT_ONCE],
    "site": ["tests/site"],
    "integration": ["tests/integration", "tests/bench", *TWO_AT_ONCE],
    "e2e": ["tests/e2e", *TWO_AT_ONCE],
    "faults": ["tests/faults", *TWO_AT_ONCE],
    "slurm": ["tests/e2e", "-m", "slurm", *TWO_AT_ONCE],
}
PYTEST_DEFAULT = [name for name in PYTEST_STEPS if name != "slurm"]
DEFAULT_STEPS = ("ruff", "format", "mypy", *PYTEST_DEFAULT, "matrix")
# What may differ with the versions of Slurm and Python.
RELEASE_STEPS = ("unit", "property", "slurm")
# The other releases of the tier "all", and the options with which they are run.
RELEASES = {"trixie": ["--user", "daemon"], "sid": []}
# pytest's last line: what passed, failed and was skipped.
PYTEST_ENDS = re.compile(r"^=+ (?P<counts>.*\bin \d[\d.]*s.*?) =+$")
# The last line of this very command, run inside another release.
ENDS = re.compile(r"^(?P<counts>\d+ steps in .*)$")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
NONE_COLLECTED = 5
EX_USAGE = 2
OUTCOMES, MATRIX = ROOT / ".test-outcomes", ROOT / "fault-matrix.md"
"""How every test of this run ended, and the rows of the fault matrix with their results."""


@dataclass(frozen=True)
class Step:
    """One check: a name and what runs it, returning an exit status and a closing line."""

    name: str
    run: Callable[[], Ending]


@dataclass(frozen=True)
class Ending:
    """How a step ended."""

    status: int
    closing: str = ""


@dataclass(frozen=True)
class Result:
    """A step that has been run."""

    name: str
    ending: Ending
    seconds: float

    def __str__(self) -> str:
        verdict = "ok" if self.ending.status == 0 else f"FAILED ({self.ending.status})"
        return f"{self.name:14}{verdict:14}{self.seconds:8.1f} s  {self.ending.closing}".rstrip()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen steps and return the exit status."""
    options = _parser().parse_args(argv)
    os.chdir(ROOT)
    _set_environment(options)
    if options.release:
        return _inside(options)
    if options.user and not _can_run_python():
        print(f"error: {options.user} may not run {sys.executable}: use --release", file=sys.stderr)
        return EX_USAGE
    chosen = options.only or _default(options)
    steps = {**_checks(), **{name: _release(name) for name in RELEASES}}
    results = [_timed(Step(name, steps[name])) for name in steps if name in chosen]
    print("\n=== summary")
    for result in results:
        print(result)
    failed = [result.name for result in results if result.ending.status]
    total = sum(result.seconds for result in results)
    verdict = f"FAILED: {', '.join(failed)}" if failed else "all passed"
    print(f"{len(results)} steps in {total:.0f} s: {verdict}", flush=True)
    return 1 if failed or not results else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests", description=__doc__)
    parser.add_argument(
        "--install",
        action="store_true",
        help="first install the Debian packages that the Slurm tests need; takes root",
    )
    parser.add_argument(
        "--tier",
        choices=["ci", "all"],
        default=os.environ.get("HPCRESUME_TEST_TIER", "ci"),
        help="all: the tests marked slow, and other releases, too [default: ci]",
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="STEP",
        choices=[*_checks(), *RELEASES],
        help="run only this step; may be given several times: %(choices)s",
    )
    parser.add_argument(
        "--release",
        choices=releases.NAMES,
        help=f"run inside this release of Debian; by default {', '.join(RELEASE_STEPS)}",
    )
    parser.add_argument(
        "--user",
        help="run hpcresume and its jobs as this user in the tests on Slurm; root starts them",
    )
    return parser


def _can_run_python() -> bool:
    argv = [*as_user(Path("/")), sys.executable, "-c", "import hpcresume"]
    return subprocess.run(argv, cwd="/", capture_output=True, check=False).returncode == 0


def _default(options: argparse.Namespace) -> list[str]:
    first = ["install"] if options.install else []
    others = list(RELEASES) if options.tier == "all" else []
    return [*first, *DEFAULT_STEPS, *others]


def _checks() -> dict[str, Callable[[], Ending]]:
    return {
        "install": _install,
        "ruff": lambda: _tool("ruff", "check", *PACKAGE),
        "format": lambda: _tool("ruff", "format", "--check", *PACKAGE),
        "mypy": lambda: _tool("mypy"),
        **{name: _pytest(arguments) for name, arguments in PYTEST_STEPS.items()},
        "matrix": _matrix,
    }


def _set_environment(options: argparse.Namespace) -> None:
    os.environ["HPCRESUME_TEST_TIER"] = options.tier
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    os.environ["HPCRESUME_TEST_RESULTS"] = str(OUTCOMES)
    if "matrix" in (options.only or DEFAULT_STEPS):
        OUTCOMES.unlink(missing_ok=True)
    if options.user:
        os.environ["HPCRESUME_TEST_USER"] = options.user
    if options.install or options.release or os.environ.get("CI"):
        # A test that needs Slurm then fails where it would have skipped.
        os.environ["HPCRESUME_TEST_REQUIRE_SLURM"] = "1"


def _inside(options: argparse.Namespace) -> int:
    """Run the steps inside a release, in the checkout as it is seen there."""
    try:
        if options.install:
            packages.install_release_tools()
        release = releases.prepare(options.release, tell=lambda line: print(line, flush=True))
    except TestbedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    steps = [f"--only={name}" for name in options.only or RELEASE_STEPS]
    argv = ["python", "-m", "tests", *steps]
    command = releases.command(release, argv, directory=releases.SOURCE)
    return subprocess.run(command, env=releases.environment(), check=False).returncode


def _release(name: str) -> Callable[[], Ending]:
    def run() -> Ending:
        arguments = ["-m", "tests", "--release", name, "--install", *RELEASES[name]]
        return _shown([sys.executable, *arguments], ENDS)

    return run


def _timed(step: Step) -> Result:
    print(f"\n=== {step.name}", flush=True)
    start = time.monotonic()
    ending = step.run()
    result = Result(step.name, ending, time.monotonic() - start)
    print(f"--- {result}", flush=True)
    return result


def _install() -> Ending:
    try:
        packages.install(accounting=True)
        browser.install()
        counts.install()
    except TestbedError as error:
        print(f"error: {error}", file=sys.stderr)
        return Ending(error.exit_code)
    return Ending(0)


def _tool(module: str, *arguments: str) -> Ending:
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=False)
    return Ending(done.returncode)


def _pytest(arguments: list[str]) -> Callable[[], Ending]:
    def run() -> Ending:
        ending = _shown([sys.executable, "-m", "pytest", *arguments], PYTEST_ENDS)
        if ending.status == NONE_COLLECTED:
            return Ending(ending.status, "no tests were collected")
        return ending

    return run


def _matrix() -> Ending:
    """Write each row of the fault matrix with how its tests ended in this run."""
    from tests.faults.matrix import read_outcomes, results_table

    table = results_table(read_outcomes(OUTCOMES))
    MATRIX.write_text(table, encoding="utf-8")
    print(table, end="")
    words = {word: table.count(f"| {word}") for word in ("passed", "FAILED", "not run")}
    closing = ", ".join(f"{count} rows {word}" for word, count in words.items() if count)
    return Ending(int(words["FAILED"] > 0), f"{closing}: {MATRIX.name}")


def _shown(command: list[str], ends: re.Pattern[str]) -> Ending:
    """Run a command, pass its output through as it comes, and return its closing line."""
    closing = ""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            found = ends.match(COLOUR.sub("", line.rstrip()))
            closing = found["counts"] if found else closing
    return Ending(process.returncode, closing)


if __name__ == "__main__":
    sys.exit(main())
