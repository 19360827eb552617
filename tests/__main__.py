"""Run every check of the project, one step after the other: ``python -m tests``.

A failed step does not end the run: all are run, the last lines say how each one went, and
the exit status is 0 only if all of them passed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ["hpcresume", "tests"]
PYTEST_STEPS = ("unit", "property", "simulation", "site", "integration", "e2e", "faults")
# pytest's last line: what passed, failed and was skipped.
PYTEST_ENDS = re.compile(r"^=+ (?P<counts>.*\bin \d[\d.]*s.*?) =+$")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
NONE_COLLECTED = 5
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
    steps = _steps(install=options.install or "install" in (options.only or []))
    if options.only:
        steps = [step for step in steps if step.name in options.only]
    _set_environment(tier=options.tier, require_slurm=options.install or bool(os.environ.get("CI")))
    os.chdir(ROOT)
    results = [_timed(step) for step in steps]
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
        help="all: the tests marked slow, too [default: ci]",
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="STEP",
        choices=[step.name for step in _steps(install=True)],
        help="run only this step; may be given several times: %(choices)s",
    )
    return parser


def _steps(*, install: bool) -> list[Step]:
    first = [Step("install", _install)] if install else []
    checks = [
        Step("ruff", lambda: _tool("ruff", "check", *PACKAGE)),
        Step("format", lambda: _tool("ruff", "format", "--check", *PACKAGE)),
        Step("mypy", lambda: _tool("mypy")),
    ]
    tests = [Step(name, _pytest(name)) for name in PYTEST_STEPS]
    return [*first, *checks, *tests, Step("matrix", _matrix)]


def _set_environment(*, tier: str, require_slurm: bool) -> None:
    os.environ["HPCRESUME_TEST_TIER"] = tier
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    os.environ["HPCRESUME_TEST_RESULTS"] = str(OUTCOMES)
    OUTCOMES.unlink(missing_ok=True)
    if require_slurm:
        # A test that needs Slurm then fails where it would have skipped.
        os.environ["HPCRESUME_TEST_REQUIRE_SLURM"] = "1"


def _timed(step: Step) -> Result:
    print(f"\n=== {step.name}", flush=True)
    start = time.monotonic()
    ending = step.run()
    result = Result(step.name, ending, time.monotonic() - start)
    print(f"--- {result}", flush=True)
    return result


def _install() -> Ending:
    from hpcresume.errors import TestbedError
    from hpcresume.testbed import packages

    try:
        packages.install(accounting=True)
    except TestbedError as error:
        print(f"error: {error}", file=sys.stderr)
        return Ending(error.exit_code)
    return Ending(0)


def _tool(module: str, *arguments: str) -> Ending:
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=False)
    return Ending(done.returncode)


def _pytest(name: str) -> Callable[[], Ending]:
    def run() -> Ending:
        command = [sys.executable, "-m", "pytest", os.path.join("tests", name)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            closing = _show(process.stdout)
        if process.returncode == NONE_COLLECTED:
            closing = "no tests were collected"
        return Ending(process.returncode, closing)

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


def _show(lines: Iterable[str]) -> str:
    """Pass the output through as it comes and return pytest's closing line."""
    closing = ""
    for line in lines:
        print(line, end="", flush=True)
        found = PYTEST_ENDS.match(COLOUR.sub("", line.rstrip()))
        closing = found["counts"] if found else closing
    return closing


if __name__ == "__main__":
    sys.exit(main())
