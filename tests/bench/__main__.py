"""Measure hpcresume beside its peers: ``python -m tests.bench``.

Lines of one group are measured in turn, so that whatever else the machine does hits all of
them; the table has medians with the least and the most, and the load while measuring.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.bench.cases import TINY, Bench, Sizes
from tests.bench.environments import UnavailableError
from tests.bench.table import Case, markdown, report

CACHE = Path.home() / ".cache" / "hpcresume" / "bench"


def main(argv: list[str] | None = None) -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--only", metavar="TEXT", action="append", help="lines that contain it")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--cores", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--tiny", action="store_true", help="little work, to see that it runs")
    parser.add_argument("--environments", type=Path, default=CACHE, help="where peers are kept")
    parser.add_argument("-o", "--output", type=Path, default=Path("bench"), help="without suffix")
    given = parser.parse_args(argv)
    # Who installs a program does not compile it anew at each start.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    bench = Bench(TINY if given.tiny else Sizes(), given.cores, given.environments)
    cases = [case for case in bench.cases() if wanted(case, given.only)]
    if not cases:
        parser.error("no line has this text")
    run(cases, given.repeat, say=lambda text: print(text, file=sys.stderr, flush=True))
    found = report(cases)
    given.output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    given.output.with_suffix(".md").write_text(markdown(found))
    print(markdown(found))


def wanted(case: Case, texts: list[str] | None) -> bool:
    """Tell whether a line is asked for."""
    name = f"{case.group}: {case.name}"
    return not texts or any(text.lower() in name.lower() for text in texts)


def run(cases: list[Case], repeat: int, *, say: Callable[[str], None]) -> None:
    """Measure every line so often, those of a group in turn."""
    for group in dict.fromkeys(case.group for case in cases):
        members = [case for case in cases if case.group == group]
        for number in range(repeat):
            for case in members:
                if not case.unavailable:
                    said = once(case)
                    say(f"{group}: {case.name} ({number + 1} of {repeat}): {said}")


def once(case: Case) -> str:
    """Measure a line once and return what came of it; the reason where that cannot be done."""
    directory = Path(tempfile.mkdtemp(prefix="hpcresume-bench-"))
    try:
        load = os.getloadavg()[0]
        figure, case.values = case.measure(directory)
    except (UnavailableError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        case.reason, case.unavailable = str(error), isinstance(error, UnavailableError)
        return case.reason
    else:
        case.figures.append(figure)
        case.loads.append(load)
        return f"{figure:.6g} {case.unit}"
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
