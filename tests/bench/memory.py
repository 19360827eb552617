"""What the driver holds over very many sources, as a plot.

``python -m tests.bench --only memory -o bench`` writes the points into its table, and
``python -m tests.bench.memory bench.json`` draws them.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from tests.bench.plot import Axis, curves

PLOT = Path(__file__).with_name("memory.svg")
_STEP_MB = 50


def plot(bench: Path) -> str:
    """Return the driver's anonymous memory over completed sources as SVG.

    Raises:
        KeyError: The table does not hold it.
    """
    for line in json.loads(bench.read_text())["lines"]:
        if line["group"].startswith("memory over") and "driver" in line.get("values", {}):
            points = [(done / 1e6, held / 1e6) for done, held in line["values"]["driver"]]
            break
    else:
        raise KeyError(f"{bench} does not hold what the driver held over its sources")
    most = _STEP_MB * math.ceil(max(held for _, held in points) / _STEP_MB)
    end = max(done for done, _ in points)
    return curves(
        {"driver": points},
        Axis([end * part / 5 for part in range(6)], "{:.1f}", "million inputs completed"),
        Axis(range(0, most + 1, _STEP_MB), "{:g} MB"),
    )


def main(argv: list[str] | None = None) -> None:
    """Write the README's plot of memory."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.memory", description=main.__doc__)
    parser.add_argument("bench", type=Path, metavar="BENCH.JSON")
    PLOT.write_text(plot(parser.parse_args(argv).bench))


if __name__ == "__main__":
    main()
