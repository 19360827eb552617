"""The live view of ``status --watch``: what a frame shows, keys, and a real terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
from rich.console import Console

from hpcresume.cli.watch import FILTERS, SORTS, View, bar, frame
from hpcresume.observe.status import Watcher, read_status
from hpcresume.segment.segment import Progress
from tests.support.many import make_many
from tests.support.places import REPOSITORY
from tests.support.runs import make_run


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """How a run of 200 array tasks stands that was preempted, timed out and lost here and there."""
    run = make_many(tmp_path_factory.mktemp("many") / "run", tasks=200, segments=2)
    return Watcher(run).read()


def drawn(found, view=None, *, width=120, height=40):
    """Return the lines of one frame."""
    console = Console(width=width, height=height, force_terminal=False)
    with console.capture() as captured:
        console.print(frame(found, view or View(), width=width, height=height))
    return captured.get().splitlines()


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 60), (60, 16)])
def test_a_frame_fits_the_terminal(many, size):
    """Whatever the terminal's size, a frame has no more lines and no wider ones."""
    width, height = size
    lines = drawn(many, width=width, height=height)

    assert len(lines) <= height
    assert max(map(len, lines)) <= width


def test_a_frame_tells_how_the_run_stands(many):
    """Counts, rate, slowest task, core-hours, failing stage with its error, and each task."""
    text = "\n".join(drawn(many, width=160, height=60))

    sources = many.sources
    assert f"{sources.completed:,} of 20,000 done" in text
    assert re.search(r"\d+\.\d/s, about .* left  task \d+ needs .* more", text)
    assert re.search(r"core-hours used, about [\d.,]+ left", text)
    assert "attempts ended early: 2 preempted, 2 time-limit, 2 died" in text
    assert re.search(r"parse +2 +UnicodeDecodeError: invalid byte 0xe9", text)
    assert re.search(r"running +1 +node\d+ +\d+ +\d+ +4 +.* ago", text)


def test_ended_early_filters_and_every_order_holds(many):
    """The filters part the tasks by state, and every order shows the same tasks."""
    tasks = many.tasks
    view = View()
    chosen = {}
    for name in FILTERS:
        view.filter = name
        chosen[name] = len(view.choose(tasks))
    view.filter = "all"
    orders = []
    for name in SORTS:
        view.sort = name
        orders.append([task.task for task in view.choose(tasks)])

    assert 200 == chosen["all"]
    assert 200 == sum(count for name, count in chosen.items() if name != "all")
    assert [list(range(200))] * len(SORTS) == [sorted(order) for order in orders]
    assert len({tuple(order) for order in orders}) > 2


def test_a_refresh_costs_a_tenth_of_a_millisecond_for_each_task(tmp_path):
    """So that a view of 10,000 tasks is drawn anew within a second; three times that is let go."""
    watcher, view = Watcher(make_many(tmp_path / "run", tasks=1000, segments=1)), View()
    watcher.read()
    took_s = []
    for _ in range(3):
        began_s = time.process_time()
        drawn(watcher.read(), view)
        took_s.append(time.process_time() - began_s)

    assert min(took_s) < 0.3


def test_keys_sort_filter_and_scroll(many):
    """s, f and r change order, filter and direction; a page down scrolls to other tasks."""
    view = View()
    first = drawn(many, view)
    view.press("page down")
    second = drawn(many, view)
    view.press("s")
    view.press("f")
    view.press("r")

    assert first[-3:] != second[-3:]
    assert (SORTS[1], FILTERS[1], True, 0) == (view.sort, view.filter, view.reverse, view.top)
    assert view.press("x")
    assert not view.press("q")


def test_one_failure_among_a_million_is_seen_in_the_bar(tmp_path):
    """No count above 0 vanishes from the bar, and the bar has the width that it was given."""
    made = make_run(tmp_path, sources=2000)
    made.publish(made.attempt(), [range(1500)], failures=[made.failure(1999, retry=False)])
    text = bar(read_status(made.run), 40)

    assert 40 == len(text.plain)
    assert "red" in {span.style for span in text.spans if span.end > span.start}


def test_the_bar_of_a_run_without_sources_is_full(tmp_path):
    """Of no sources all are done: the bar says what the share and the state beside it say."""
    made = make_run(tmp_path, sources=0)
    made.finish()
    found = read_status(made.run)

    assert "█" * 40 == bar(found, 40).plain
    text = "\n".join(drawn(found))
    assert "complete  there are no sources: nothing to do" in text
    assert "0 of 0 done (100.0 %)" in text


def screen_of(arguments, keys=b""):
    """Run a command in a terminal of its own until it ends; return its status and output."""
    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "hpcresume", *arguments],
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "30"},
        cwd=REPOSITORY,
        start_new_session=True,
    )
    os.close(secondary)
    seen, sent, deadline = b"", not keys, time.monotonic() + 60
    while time.monotonic() < deadline:
        ready, _, _ = select.select([primary], [], [], 0.1)
        if ready:
            try:
                seen += os.read(primary, 65536)
            except OSError:  # its other end is closed
                break
        if not sent and b"q leave" in seen:
            os.write(primary, keys)
            sent = True
    os.close(primary)
    return process.wait(timeout=60), seen.decode(errors="replace")


def test_on_a_terminal_the_view_ends_with_the_runs_exit_code(tmp_path):
    """The view takes the whole screen, gives it back, and leaves the last counts behind."""
    made = make_run(tmp_path, sources=2)
    made.publish(made.attempt(), [[0]], failures=[made.failure(1, retry=False)])
    made.finish()
    code, seen = screen_of(["status", made.path, "--watch"])

    assert 1 == code
    assert "\x1b[?1049h" in seen
    assert "1 of 2 completed" in seen.split("\x1b[?1049l")[-1]


def test_q_leaves_a_run_that_goes_on(tmp_path):
    """q ends the view with exit code 0 and says that the run goes on."""
    made = make_run(tmp_path, sources=2)
    made.attempt()
    made.publish(made.attempt(), [[0]], progress=Progress(elapsed_s=10, completed=1, left=1))
    code, seen = screen_of(["status", made.path, "--watch"], keys=b"q")

    assert 0 == code
    assert "left; the run goes on" in seen.split("\x1b[?1049l")[-1]


def test_elsewhere_watching_prints_plain_lines(tmp_path, hpcresume):
    """Not on a terminal there is no colour, no cursor movement, and one line a reading."""
    made = make_run(tmp_path, sources=1)
    made.publish(made.attempt(), [[0]])
    made.finish()
    result = hpcresume("status", made.path, "--watch")

    assert "\x1b" not in result.stdout
    assert re.fullmatch(r"[\d-]+ [\d:]+ complete, 1 of 1 source done, .*\n", result.stdout)
