"""A run's report: what it says, and what a browser makes of it."""

from __future__ import annotations

import json
import re
from html import unescape

import pytest
from click.testing import CliRunner

from hpcresume.cli import cli
from hpcresume.errors import UsageError
from hpcresume.observe.reading import Reader
from hpcresume.observe.report import throughput, work_done_twice, write_report
from hpcresume.observe.status import read_status
from hpcresume.segment.segment import Progress
from tests.support import browser
from tests.support.many import PER_TASK, make_many
from tests.support.runs import make_run

FIGURES = ("timeline", "throughput", "at-work", "rounds", "endings", "spread", "durations")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of a run of 60 array tasks, and what `status --json` says of it."""
    directory = tmp_path_factory.mktemp("report")
    run = make_many(directory / "run", tasks=60, segments=2)
    output = directory / "report.html"
    write_report(run, output)
    said = CliRunner().invoke(cli, ["status", run.path, "--json"])
    return output, json.loads(said.stdout)


def test_the_page_loads_without_a_complaint_and_draws_every_plot(page):
    """In Chromium, light and dark: no message on the console, and an SVG in each figure."""
    browser.require()
    output, _ = page
    for dark in (False, True):
        shown = browser.load(output, dark=dark)

        assert [] == shown.complaints
        assert "data-errors" not in shown.dom
        assert 'data-drawn="yes"' in shown.dom
        for figure in FIGURES:
            assert re.search(rf'<figure id="{figure}">.*?<svg', shown.dom, re.DOTALL), figure


def test_the_numbers_are_those_of_status(page):
    """Sources by state, core-hours and attempts, as a reader of the page sees them."""
    browser.require()
    output, status = page
    values = browser.load(output).values()

    for name in ("completed", "total", "remaining", "failing", "quarantined"):
        assert f"{status['sources'][name]:,}" == values[name]
    early = sum(count for kind, count in status["endings"].items() if kind != "done")
    assert (status["state"], f"{early:,}") == (values["state"], values["early"])
    # Attempts at work went on between the two.
    assert float(values["core-hours"].replace(",", "")) == pytest.approx(
        status["core_hours"]["used"], rel=0.05
    )


def test_the_page_prints(page, tmp_path):
    """A browser makes a PDF of it."""
    browser.require()
    pdf = tmp_path / "report.pdf"
    browser.print_pdf(page[0], pdf)

    assert pdf.read_bytes().startswith(b"%PDF")


def test_the_page_is_complete_in_itself_and_small(page):
    """No address of anything else is loaded, and what carries the plots is half a megabyte."""
    text = page[0].read_text()

    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*\b(?:src|href)=\"([^\"]*)", text)
    assert ["data:,"] == loaded
    assert "default-src 'none'" in text
    assert len(text) < 1_000_000


@pytest.mark.slow
def test_ten_thousand_tasks_fit_into_five_megabytes(tmp_path):
    """A million sources in 10,000 array tasks: the page stays small and still draws."""
    browser.require()
    run = make_many(tmp_path / "run", tasks=10_000)
    output = tmp_path / "report.html"
    write_report(run, output)

    assert output.stat().st_size < 5_000_000
    assert 'data-drawn="yes"' in browser.load(output).dom


def test_what_users_wrote_is_text_and_no_markup(tmp_path):
    """A message with a tag in it ends neither the page's script nor its table."""
    made = make_run(tmp_path, sources=3)
    nasty = "</script><script>alert(1)</script>"
    made.publish(made.attempt(), [[0]], failures=[made.failure(1, message=nasty, traceback=nasty)])
    output = tmp_path / "report.html"
    write_report(made.run, output)
    text = output.read_text()

    assert nasty not in text
    assert nasty in unescape(text)
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert nasty == json.loads(data)["status"]["failures"][0]["message"]


def test_a_run_that_has_not_begun_has_a_report(tmp_path):
    """Without a round, and with one that nobody started."""
    for tasks in (None, 2):
        made = make_run(tmp_path, sources=3, tasks=tasks, name=f"run{tasks}")
        output = tmp_path / f"{tasks}.html"
        result = CliRunner().invoke(cli, ["report", made.path, "-o", str(output)])

        assert (0, True) == (result.exit_code, "planned" in output.read_text())


def test_throughput_adds_up_to_what_was_completed(tmp_path):
    """Rate times width, over all parts of the run, is the number of completed sources."""
    run = make_many(tmp_path / "run", tasks=20)
    reader = Reader(run)
    reader.refresh()
    attempts = [attempt for round_ in reader.rounds for attempt in round_.attempts]
    from hpcresume.observe.report import _ran

    ran = [
        one for attempt in attempts if (one := _ran(attempt, 0.0 + attempts[0].started_at + 900))
    ]
    bins = throughput(run, attempts, ran)
    total = sum(rate * (end - start) for start, end, rate, _ in bins)

    assert sum(attempt.completed for attempt in attempts) == pytest.approx(total, rel=0.02)


def test_work_that_does_not_count_is_told_by_how_its_attempt_ended(tmp_path):
    """A zombie that completed what another attempt had published first, and failed tries."""
    made = make_run(tmp_path, sources=10)
    first, second = made.attempt(), made.attempt()
    made.publish(first, [range(4)], progress=Progress(completed=4))
    made.end(first, "saved", kind="preempted", completed=4)
    made.publish(second, [range(2, 8)], progress=Progress(completed=6))
    made.end(second, completed=6)
    reader = Reader(made.run)
    reader.refresh()

    found = {one.ending: (one.completed, one.again) for one in work_done_twice(reader)}
    assert {"preempted": (4, 0), "done": (6, 2)} == found
    assert 8 == read_status(made.run).sources.completed


def test_a_page_that_cannot_be_written_is_named(tmp_path):
    """The message names the file, and the run is not affected."""
    made = make_run(tmp_path, sources=PER_TASK)

    with pytest.raises(UsageError, match=r"missing/r\.html.*not affected"):
        write_report(made.run, tmp_path / "missing" / "r.html")
