"""The benchmark runs, compares results, and writes its table; nothing is timed here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.bench.__main__ import main, once
from tests.bench.cases import check, expected
from tests.bench.memory import plot as memory_plot
from tests.bench.table import Case, markdown, report


@pytest.mark.ray
@pytest.mark.timeout(280)
def test_a_tiny_benchmark(tmp_path: Path) -> None:
    """Ours and a peer do the same work, are checked, and stand in a table with their spread."""
    out = tmp_path / "bench"
    only = ("--only", "futures", "--only", "peers: hpcresume")
    main(["--tiny", "--repeat", "1", *only, "-o", str(out)])
    found = json.loads(out.with_suffix(".json").read_text())
    lines = {line["name"]: line for line in found["lines"]}
    assert {"concurrent.futures", "hpcresume"} == set(lines), found
    assert [1, 1] == [line.get("repetitions") for line in lines.values()], found
    assert all(line["min"] <= line["median"] <= line["max"] for line in lines.values())
    assert {"hpcresume", "ray"} <= set(found["versions"])
    table = out.with_suffix(".md").read_text().splitlines()
    assert {10} == {line.count("|") for line in table[3:]}


def test_a_wrong_result_is_no_figure(tmp_path: Path) -> None:
    """Rows that differ from the expected ones end the benchmark."""
    path = tmp_path / "out.jsonl"
    path.write_text('{"i":1,"y":4}\n{"i":0,"y":2}\n')
    check(path, expected(2))
    path.write_text('{"i":1,"y":4}\n{"i":0,"y":3}\n')
    with pytest.raises(AssertionError, match="other rows"):
        check(path, expected(2))


def test_what_cannot_be_measured_says_why() -> None:
    """A peer that cannot be driven here stands in the table with the reason."""

    def refuse(_: Path) -> tuple[float, dict]:
        raise OSError("no such program")

    cases = [Case("peer", "g", "s", refuse), Case("ours", "g", "s", lambda _: (2.0, {}), "peer")]
    for case in cases:
        once(case)
    text = markdown(report(cases))
    assert "| g | peer | no such program |" in text
    assert "| g | ours | 2 s |" in text


def test_a_target_is_judged() -> None:
    """The verdict is over the ratio, or over the figure where it is compared with no other."""
    slow = Case("slow", "g", "s", lambda _: (4.0, {}))
    fast = Case("fast", "g", "s", lambda _: (1.0, {}), "slow", "<= 0.25")
    alone = Case("alone", "g", "s", lambda _: (3.0, {}), target=">= 3.5")
    never = Case("never", "g", "s", lambda _: (3.0, {}), "gone", ">= 3.5")
    for case in (slow, fast, alone, never):
        once(case)
    verdicts = {
        line["name"]: line.get("verdict") for line in report([slow, fast, alone, never])["lines"]
    }
    assert {"slow": None, "fast": "met", "alone": "missed", "never": "not measured"} == verdicts


def test_the_plot_of_memory(tmp_path: Path) -> None:
    """It draws what the driver held over its sources; a table without that is refused."""
    table = tmp_path / "bench.json"
    values = {"driver": [[0, 60_000_000], [5_000_000, 70_000_000], [10_000_000, 140_000_000]]}
    lines = [{"group": "memory over 10,000,000 sources", "name": "driver", "values": values}]
    table.write_text(json.dumps({"lines": lines}))
    drawn = memory_plot(table)
    assert ["0 MB", "50 MB", "100 MB", "150 MB"] == re.findall(r">(\d+ MB)<", drawn)
    assert "10.0" in drawn
    assert 'points="56.0,118.0 266.0,106.7 476.0,27.3"' in drawn
    table.write_text(json.dumps({"lines": lines[:0]}))
    with pytest.raises(KeyError, match="does not hold"):
        memory_plot(table)
