"""A run's report: what it says, and what a browser makes of it."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from html import unescape
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from hpcresume.cli import cli
from hpcresume.cli.status import status_lines
from hpcresume.cli.watch import View, frame
from hpcresume.errors import UsageError
from hpcresume.observe.reading import Reader
from hpcresume.observe.report import (
    attempts_that_ran,
    throughput,
    work_published_twice,
    write_report,
)
from hpcresume.observe.status import read_status
from hpcresume.segment.segment import Progress, StageCount
from tests.support import browser
from tests.support.many import PER_TASK, make_many
from tests.support.runs import MadeRun, make_run

FIGURES = ("timeline", "throughput", "at-work", "rounds", "endings", "spread", "durations")
STARTED = "2026-01-01T00:00:00+00:00"
STARTED_AT = datetime.fromisoformat(STARTED).timestamp()


def written(made: MadeRun) -> str:
    """Return the report of a run as it is in its file."""
    output = made.scratch / "report.html"
    write_report(made.run, output)
    return output.read_text()


def seen(made: MadeRun) -> str:
    """Return the words of a run's report, without its tags, styles and scripts."""
    text = re.sub(r"<(style|script)\b.*?</\1>", "", written(made), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", "", text)).split())


def data_of(page: str) -> dict:
    """Return what a page's plots are drawn from."""
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(data)


def read(made: MadeRun) -> Reader:
    """Return a reader that has read a run."""
    reader = Reader(made.run)
    reader.refresh()
    return reader


def publish_in_steps(made: MadeRun, steps: int, *, step_s: float) -> None:
    """Publish all sources in equal steps, by one attempt that then is done."""
    ref, each = made.attempt(started_at=STARTED), len(made.ids) // steps
    for n in range(steps):
        elapsed_s, done = (n + 1) * step_s, (n + 1) * each
        progress = Progress(elapsed_s, STARTED_AT + elapsed_s, completed=done)
        made.publish(ref, [range(n * each, done)], seq=n + 1, progress=progress)
    made.end(ref, completed=len(made.ids), elapsed_s=steps * step_s)


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
    assert nasty == data_of(text)["status"]["failures"][0]["message"]


def test_a_run_that_has_not_begun_has_a_report(tmp_path):
    """Without a round, and with one that nobody started."""
    for tasks in (None, 2):
        made = make_run(tmp_path, sources=3, tasks=tasks, name=f"run{tasks}")
        output = tmp_path / f"{tasks}.html"
        result = CliRunner().invoke(cli, ["report", made.path, "-o", str(output)])

        assert (0, True) == (result.exit_code, "planned" in output.read_text())


def completed_in(bins) -> float:
    """Return how many sources the parts of a run amount to."""
    return sum(rate * (end - start) for start, end, rate, _ in bins)


def test_throughput_adds_up_to_what_was_completed(tmp_path):
    """Rate times width, over all parts of the run, is the number of completed sources."""
    run = make_many(tmp_path / "run", tasks=20)
    reader = Reader(run)
    reader.refresh()
    attempts = [attempt for round_ in reader.rounds for attempt in round_.attempts]
    ran = attempts_that_ran(reader, attempts[0].started_at + 900)

    completed = sum(attempt.completed for attempt in attempts)
    assert completed == pytest.approx(completed_in(throughput(reader, ran)), rel=1e-6)


def test_what_was_completed_after_the_last_publication_is_counted(tmp_path):
    """An outcome tells more than the last segment's progress, a lost node's rows as well."""
    made = make_run(tmp_path, sources=30, tasks=2)
    done, died = made.attempt(0, started_at=STARTED), made.attempt(1, pid=2**22 + 1,
                                                                   started_at=STARTED)  # fmt: skip
    made.publish(done, [range(10)], progress=Progress(10, STARTED_AT + 10, completed=7))
    made.end(done, completed=10, elapsed_s=20)
    made.publish(died, [range(20, 25)], progress=Progress(12, STARTED_AT + 12, completed=3))
    reader = read(made)
    bins = throughput(reader, attempts_that_ran(reader, STARTED_AT + 60))

    assert completed_in(bins) == pytest.approx(10 + 5)


def test_a_step_is_shared_out_by_time(tmp_path):
    """A part that holds a hundredth of a step has a hundredth of its sources, not a half."""
    made = make_run(tmp_path, sources=40)
    ref = made.attempt(started_at=STARTED)
    for seq, (at, sources) in enumerate([(0.99, range(20)), (1.99, range(20, 40))], 1):
        progress = Progress(at, STARTED_AT + at, completed=sources.stop)
        made.publish(ref, [sources], seq=seq, progress=progress)
    made.end(ref, completed=40, elapsed_s=160)  # a second for each part
    reader = read(made)
    rates = [rate for _, _, rate, _ in throughput(reader, attempts_that_ran(reader, STARTED_AT))]

    assert [20.2, 19.8, 0.0] == [pytest.approx(rate, abs=1e-4) for rate in rates[:3]]


def two_attempts_of_two_seconds(directory: Path) -> MadeRun:
    """Two tasks that ran side by side for two seconds and completed 20 sources each."""
    made = make_run(directory, sources=40, tasks=2)
    for task in (0, 1):
        ref = made.attempt(task, started_at=STARTED)
        for n in range(4):
            elapsed_s, first = 0.5 * (n + 1), 20 * task + 5 * n
            progress = Progress(elapsed_s, STARTED_AT + elapsed_s, completed=5 * (n + 1))
            made.publish(ref, [range(first, first + 5)], seq=n + 1, progress=progress)
        made.end(ref, completed=20, elapsed_s=1.9375)
    made.finish()
    return made


def test_a_run_of_seconds_is_drawn_to_the_millisecond(tmp_path):
    """Parts of the run lie one after another, and no attempt is rounded to nothing."""
    data = data_of(written(two_attempts_of_two_seconds(tmp_path)))

    starts = [start for start, *_ in data["throughput"]]
    assert len(starts) == len(set(starts))
    assert [1.938, 1.938] == [round(one[4] - one[3], 3) for one in data["attempts"]]


def test_the_axes_of_a_short_run_end_where_its_numbers_do(tmp_path):
    """In Chromium: two tasks at work are two on the axis, and its rate is not added up."""
    browser.require()
    made = two_attempts_of_two_seconds(tmp_path)
    highest = max(rate for _, _, rate, _ in data_of(written(made))["throughput"])

    dom = browser.load(made.scratch / "report.html").dom
    assert 2 == max(ticks(dom, "at-work"))
    assert highest / 2 <= max(ticks(dom, "throughput")) <= highest


def ticks(dom: str, figure: str) -> list[float]:
    """Return the numbers along the y axis of a figure."""
    (drawn,) = re.findall(rf'<figure id="{figure}">.*?</figure>', dom, re.DOTALL)
    (labels,) = re.findall(r'<g aria-label="y-axis tick label".*?</g>', drawn, re.DOTALL)
    return [float(text.replace(",", "")) for text in re.findall(r"<text[^>]*>([^<]*)<", labels)]


def test_throughput_is_the_same_after_segments_were_folded_into_packs(tmp_path):
    """`hpcresume clean` removes segments; how the run went is read out of the packs."""
    made = make_run(tmp_path, sources=40)
    publish_in_steps(made, 10, step_s=20)
    made.finish()
    before = data_of(written(made))["throughput"]
    cleaned = CliRunner().invoke(cli, ["clean", made.path, "--yes"])

    assert (0, 1) == (
        cleaned.exit_code,
        len(made.run.segments(read(made).rounds[0].attempts[0].ref)),
    )
    assert before == data_of(written(made))["throughput"]


def test_only_what_was_published_twice_is_said_to_be_counted(tmp_path):
    """What was only committed on a lost node is nowhere in the run, and the page says so."""
    text = seen(make_run(tmp_path))

    assert "Work that was published twice" in text
    assert "only committed on a lost node was done again too and cannot be counted" in text


@pytest.mark.parametrize(("complete", "said"), [(True, " and was survived"), (False, "")])
def test_an_early_end_was_survived_only_by_a_run_that_is_complete(tmp_path, complete, said):
    """A run that nobody continued says that an attempt ended early, and no more."""
    made = make_run(tmp_path, sources=4)
    first = made.attempt(started_at=STARTED)
    made.publish(first, [range(2)], progress=Progress(completed=2))
    made.end(first, "saved", kind="preempted", completed=2, elapsed_s=3)
    if complete:
        second = made.attempt(started_at=STARTED)
        made.publish(second, [range(2, 4)])
        made.end(second, completed=2, elapsed_s=3)
        made.finish()
    text = seen(made)

    assert f"1ended early{said}: 1 preempted" in text
    assert "took over" not in text


def test_the_time_of_a_run_that_goes_on_ends_now(tmp_path):
    """Between two attempts a run gets older; one that has ended took until its last attempt."""
    made = make_run(tmp_path, sources=4)
    hour_ago = datetime.fromtimestamp(datetime.now(UTC).timestamp() - 3600, UTC).isoformat()
    first = made.attempt(started_at=hour_ago)
    made.publish(first, [range(2)])
    made.end(first, "saved", kind="preempted", completed=2, elapsed_s=3)
    # It runs, for it is this process, and has not told since when.
    second = made.attempt()
    goes_on = seen(made)
    made.publish(second, [range(2, 4)])
    made.finish()

    assert "1 h 00 minfrom the first attempt to the present" in goes_on
    assert "3 sfrom the first attempt to the end of the last" in seen(made)


def test_failed_items_are_called_what_they_are(tmp_path):
    """Three bad items in each of twelve tries are 36 items, and not 36 tries."""
    made = make_run(tmp_path, sources=4)
    ref = made.attempt(started_at=STARTED)
    stages = [StageCount("parse", items_in=40, failed=36)]
    made.publish(ref, failures=[made.failure(n) for n in range(4)], stages=stages)
    made.end(ref)
    text = seen(made)

    assert (True, False) == ("failed items" in text, "failed tries" in text)
    assert [36] == [one.failed for one in work_published_twice(read(made))]


def test_the_share_is_rounded_down_wherever_it_is_shown(tmp_path):
    """Two of three are 66.6 % on the page, in the status and in its view."""
    made = make_run(tmp_path, sources=3)
    made.publish(made.attempt(), [range(2)])
    found, console = read_status(made.run), Console(width=120)
    with console.capture() as captured:
        console.print(frame(found, View(), width=120, height=40))

    for text in (seen(made), "\n".join(status_lines(found)), captured.get()):
        assert "(66.6 %)" in text


def test_the_bar_of_a_run_without_sources_is_as_full_as_its_share(tmp_path):
    """Of no sources all are done, in words and in the bar."""
    text = written(make_run(tmp_path, sources=0, tasks=None))

    assert 'aria-label="100.0 % done"' in text
    assert '<i class="done" style="width: 100%">' in text


def test_a_run_without_sources_says_that_nothing_was_to_do(tmp_path):
    """Beside its state, as `status` says it."""
    made = make_run(tmp_path, sources=0, tasks=None)
    made.finish()

    assert "there are no sources: nothing to do 0 of 0 sources completed (100.0 %)" in seen(made)


def test_tracebacks_are_those_of_the_largest_groups(tmp_path):
    """In the order of the table; what has none, as a returned Failed, is not shown as one."""
    made = make_run(tmp_path, sources=20, max_attempts=9)
    sizes = {"small": 1, "largest": 6, "silent": 5, "third": 3, "second": 4}
    kinds = [kind for kind, size in sizes.items() for _ in range(size)]
    failures = [
        made.failure(n, message=kind, traceback="" if kind == "silent" else f"trace of {kind}")
        for n, kind in enumerate(kinds)
    ]
    made.publish(made.attempt(), failures=failures)

    assert ["largest", "second", "third"] == re.findall(r"<code>trace of (\w+)<", written(made))


def test_versions_of_the_code_are_told_of(tmp_path):
    """With the rounds that ran each; a run of one version says nothing of it."""
    made = make_run(tmp_path, sources=4)
    made.publish(made.attempt(), [range(2)])
    assert "versions of the pipeline's code" not in seen(made)
    made.plan(round_=1, code=2)
    made.publish(made.attempt(round_=1), [range(2, 4)])

    expected = "Attempts ran 2 versions of the pipeline's code or its parameters: 0001 in round 0; "
    assert f"{expected}0002 in round 1." in seen(made)


def test_work_that_does_not_count_is_told_by_how_its_attempt_ended(tmp_path):
    """A zombie that completed what another attempt had published first."""
    made = make_run(tmp_path, sources=10)
    first, second = made.attempt(), made.attempt()
    made.publish(first, [range(4)], progress=Progress(completed=4))
    made.end(first, "saved", kind="preempted", completed=4)
    made.publish(second, [range(2, 8)], progress=Progress(completed=6))
    made.end(second, completed=6)
    reader = Reader(made.run)
    reader.refresh()

    found = {one.ending: (one.completed, one.again) for one in work_published_twice(reader)}
    assert {"preempted": (4, 0), "done": (6, 2)} == found
    assert 8 == read_status(made.run).sources.completed


def test_a_page_that_cannot_be_written_is_named(tmp_path):
    """The message names the file, and the run is not affected."""
    made = make_run(tmp_path, sources=PER_TASK)

    with pytest.raises(UsageError, match=r"missing/r\.html.*not affected"):
        write_report(made.run, tmp_path / "missing" / "r.html")
