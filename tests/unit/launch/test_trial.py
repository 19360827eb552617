"""A trial: which sources it takes, what it reports, and what it makes of the measurements."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import hpcresume as hr
from hpcresume.cli import cli
from hpcresume.errors import NotResumableError, PipelineError, SourcesError, UsageError
from hpcresume.launch.estimate import estimate_run, limit_seconds, spell_time, suggest
from hpcresume.launch.trial import run_trial, trial
from hpcresume.launch.trial_sample import Spread, even_positions, spread
from hpcresume.pipeline import members
from hpcresume.pipeline.sources import as_sources
from tests.unit.launch.jobs import settings

HOUR = 3600
PIPELINE = '''
import hpcresume as hr


def parse(text):
    """Print, as users do, and fail for one source."""
    print("parsing", text)
    if text == "b":
        raise ValueError("b is bad")
    return text


def fan(text):
    """Make five rows."""
    for n in range(5):
        yield {"text": text, "n": n}


def pipeline(tolerate: float = 0.0, names: str = "abcd"):
    return hr.Pipeline("letters", list(names), [parse, fan], tolerate=tolerate)
'''


def double(x):
    """Return twice the value."""
    return 2 * x


@pytest.fixture(autouse=True)
def own_temporary(tmp_path, monkeypatch):
    """Give every trial a temporary directory that can be looked at."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.chdir(tmp_path)
    yield folder
    assert [] == list(folder.iterdir()), "a trial left something"


@pytest.fixture
def run_trial_command(tmp_path):
    """Call `hpcresume trial` on the pipeline of letters, inline unless told otherwise."""
    (tmp_path / "letters.py").write_text(PIPELINE)

    def call(*args, engine=("--engine", "inline")):
        return CliRunner().invoke(cli, ["trial", "letters.py", *engine, *args])

    return call


# -- which sources ------------------------------------------------------------------------------


@given(total=st.integers(0, 3000), n=st.integers(1, 40))
def test_a_stream_of_unknown_length_is_sampled_evenly(total, n):
    """As many as wanted, from the first on, in order, none twice, without a wide gap."""
    kept = Spread(n)
    for item in range(total):
        kept.add(item)
    positions = [position for position, _ in kept.chosen()]

    assert total == kept.count
    assert min(n, total) == len(positions)
    assert positions == sorted(set(positions))
    assert positions[:1] == [0] * bool(total)
    gaps = [b - a for a, b in itertools.pairwise([*positions, total])]
    assert not gaps or max(gaps) <= 3 * max(1, total // len(positions))


def test_a_sample_holds_what_the_positions_say_and_lists_once():
    """A generator is read once; each sampled source keeps its own payload."""
    listing = as_sources((f"s{i}", {"i": i}) for i in range(1000))
    sample = spread(listing, 4)

    assert 1000 == sample.total
    assert [f"s{i}" for i in sample.indices] == [sample.id_of(slot) for slot in range(4)]
    assert [b'j{"i":%d}' % i for i in sample.indices] == [payload for _, payload in sample.records]


def test_indexed_sources_are_sampled_without_being_listed():
    """A billion indexed sources cost nothing to sample."""
    sample = spread(hr.indexed(10**9), 4)

    assert [0, 250_000_000, 500_000_000, 750_000_000] == sample.indices
    assert sample.records is None


@pytest.mark.parametrize(("total", "n"), [(0, 3), (2, 3), (3, 3), (10, 3)])
def test_even_positions_stay_below_the_total(total, n):
    """Fewer sources than wanted are all taken."""
    found = even_positions(total, n)

    assert min(total, n) == len(set(found))
    assert all(0 <= position < total for position in found)


# -- running ------------------------------------------------------------------------------------


def test_a_trial_reports_rows_failures_and_counts():
    """Rows are what the sink would get, a failure has its traceback, stages their counts."""

    def fan(x):
        if x == 6:
            raise ValueError("six")
        return hr.Many([x, x + 1]) if x else None

    report = trial(hr.Pipeline("t", hr.indexed(8), [double, fan]), n=4)

    assert ["0", "2", "4", "6"] == [source.source for source in report.sources]
    assert ["completed", "completed", "completed", "completed"] == [s.state for s in report.sources]
    assert [0, 2, 2, 2] == [source.rows for source in report.sources]
    assert [("2", "2/double.0/fan.0", 4), ("2", "2/double.0/fan.1", 5)] == [
        (row.source, row.item, row.row) for row in report.rows[:2]
    ]
    assert report.ok

    report = trial(hr.Pipeline("t", hr.indexed(8), [double, fan]), n=8)

    assert ["3"] == [failure.source_id for failure in report.failures]
    assert 'raise ValueError("six")' in report.failures[0].traceback
    counts = [(s.name, s.items_in, s.items_out, s.dropped, s.failed) for s in report.stages]
    assert [("double", 8, 8, 0, 0), ("fan", 8, 12, 1, 1)] == counts
    assert not report.ok


def test_each_source_is_tried_once():
    """A failure in a trial is shown, not repeated."""
    calls = []

    def fail(x):
        calls.append(x)
        raise OSError("no")

    report = trial(hr.Pipeline("t", ["a", "b"], [fail]))

    assert ["a", "b"] == sorted(calls)
    assert ["failed", "failed"] == [source.state for source in report.sources]
    assert report.estimate is None


def test_named_sources_run_in_the_order_of_the_listing():
    """Ids choose; an id given twice is one source."""
    pipeline = hr.Pipeline("t", ["a", "b", "c"], [str.upper])
    report = trial(pipeline, sources=["c", "a", "c"])

    assert [("a", "A"), ("c", "C")] == [(row.source, row.row) for row in report.rows]
    assert 3 == report.total


@pytest.mark.parametrize("listing", [["7", "8"], hr.indexed(5), []])
@pytest.mark.parametrize("name", ["9", "07", "-1", "x"])
def test_an_id_that_is_not_listed_is_refused(listing, name):
    """The error names the id; ids are compared whole."""
    with pytest.raises(SourcesError, match=f"'{name}'"):
        trial(hr.Pipeline("t", listing, [str]), sources=[name])


def test_naming_no_source_runs_none():
    """Only None stands for a spread."""
    report = trial(hr.Pipeline("t", ["a", "b"], [str]), sources=[])

    assert ([], 2) == (report.sources, report.total)


IN_A_FILE = """
import hpcresume as hr

def pipeline(n: int = 3) -> hr.Pipeline:
    return hr.Pipeline("filed", hr.indexed(n), [str])
"""


def test_a_trial_takes_what_submit_takes(tmp_path, monkeypatch):
    """A file, as text or path, or the function in it, with parameters."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "filed.py").write_text(IN_A_FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import filed

    found = [
        trial("filed.py"),
        trial(tmp_path / "filed.py", params={"n": "5"}),
        trial(filed.pipeline, params={"n": 1}),
    ]
    monkeypatch.delitem(sys.modules, "filed")

    assert [("filed", 3), ("filed", 5), ("filed", 1)] == [(r.pipeline, r.total) for r in found]


def test_what_no_trial_can_run_is_refused_with_the_way():
    """Not with an attribute that is missing."""
    with pytest.raises(PipelineError, match=r"hr\.trial\('pipeline\.py'\)"):
        trial(3)
    with pytest.raises(PipelineError, match=r"hr\.trial\(pipeline\(\)\)"):
        trial(lambda: hr.Pipeline("t", ["a"], [str]))
    with pytest.raises(PipelineError, match="no such file"):
        trial("nope.py")
    with pytest.raises(UsageError, match="made already"):
        trial(hr.Pipeline("t", ["a"], [str]), params={"n": 1})


def test_files_and_scratch_of_a_trial_are_removed(own_temporary):
    """ctx.output and ctx.scratch work in a trial and leave nothing."""
    places = []

    def write(x, ctx):
        path = ctx.output("image.bin")
        path.write_bytes(b"x")
        places.extend([path, ctx.scratch])
        return str(path)

    report = trial(hr.Pipeline("t", ["a"], [write]))

    assert report.ok
    assert all(own_temporary in place.parents for place in places)
    assert [] == [place for place in places if place.exists()]


def test_stages_in_several_groups_keep_their_sources_apart():
    """Rows of a pipeline with an async stage are attributed as those of one group are."""

    async def slow(x):
        await asyncio.sleep(0)
        return [x, x]

    report = trial(hr.Pipeline("t", ["a", "b", "c"], [str.upper, slow, tuple, list]))

    assert [("a", ["A", "A"]), ("b", ["B", "B"]), ("c", ["C", "C"])] == [
        (row.source, row.row) for row in report.rows
    ]
    assert [3, 3, 3, 3] == [stage.items_out for stage in report.stages]


@pytest.mark.parametrize(("tolerate", "ok"), [(0.0, False), (0.2, False), (0.25, True)])
def test_what_the_pipeline_tolerates_is_tolerated(tolerate, ok):
    """A share of failures up to ``tolerate`` leaves the trial a success."""

    def fail_one(x):
        return 1 // int(x)

    report = trial(hr.Pipeline("t", ["0", "1", "2", "3"], [fail_one], tolerate=tolerate))

    assert ok == report.ok


def test_no_sources_are_no_failure():
    """An empty listing is reported as such and estimates nothing."""
    report = trial(hr.Pipeline("t", [], [str]))

    assert (True, 0, [], None) == (report.ok, report.total, report.sources, report.estimate)
    assert ["str"] == [stage.name for stage in report.stages]


def test_a_stage_that_cannot_start_ends_the_trial():
    """A failing set-up charges no source and is the reason of the end."""

    class Broken(hr.Stage):
        def setup(self, worker):
            raise RuntimeError("no model")

        def process(self, item):
            return item

    report = trial(hr.Pipeline("t", ["a"], [Broken()]))

    assert "no model" in report.stopped
    assert ["not run"] == [source.state for source in report.sources]
    assert not report.ok


def test_why_a_stage_cannot_start_is_told_once(tmp_path):
    """Its worker is started three times; the traceback is printed at the end only."""
    text = (
        "import hpcresume as hr\n"
        "class Broken(hr.Stage):\n"
        "    def setup(self, worker):\n"
        "        raise RuntimeError('no model')\n"
        "    def process(self, item):\n"
        "        return item\n"
        "pipeline = hr.Pipeline('t', ['a'], [Broken()])\n"
    )
    (tmp_path / "broken.py").write_text(text)
    result = CliRunner().invoke(cli, ["trial", "broken.py", "--engine", "inline"])

    assert 1 == result.exit_code
    assert 1 == result.stderr.count("Traceback (most recent call last)")
    assert "broke its worker 3 times" in result.stderr


def test_a_chunk_deep_in_a_gzip_file_is_read_from_near_it(tmp_path, monkeypatch):
    """The time that a stage takes holds no reading of what lies before its chunk."""
    path = tmp_path / "in.jsonl.gz"
    lines = b"".join(b'{"n": %d, "x": "%0999d"}\n' % (n, n) for n in range(9000))
    path.write_bytes(gzip.compress(lines, 1))
    pipeline = hr.Pipeline("t", hr.chunks(path, rows=1000), [lambda chunk: next(iter(chunk))["n"]])
    opened = []
    real = members.MemberStream
    monkeypatch.setattr(members, "MemberStream", lambda *a: opened.append(a) or real(*a))
    report = trial(pipeline, sources=["in.jsonl.gz#8000-8999"])

    assert [8000] == [row.row for row in report.rows]
    assert 1 == len(opened), "only the listing reads from the start"


def test_a_stage_that_fails_everything_ends_the_trial():
    """Fifty like failures stop a task, so they stop a trial, which says why."""
    report = trial(hr.Pipeline("t", hr.indexed(200), [lambda x: 1 // 0]), n=100)

    assert "ZeroDivisionError" in report.stopped
    assert not report.ok


def test_exceptions_are_handed_over_while_their_frames_exist():
    """What a debugger needs: the exception of a stage, of the sources' function, of a set-up."""
    seen = []

    def note(error):
        frame = error.__traceback__
        while frame.tb_next is not None:
            frame = frame.tb_next
        seen.append((type(error).__name__, dict(frame.tb_frame.f_locals)["x"]))

    def made(x):
        return 10 // (x - 1)

    def divided(x):
        return 10 // (x + 10)

    class Broken(hr.Stage):
        def setup(self, worker):
            x = "set-up"
            raise RuntimeError(x)

        def process(self, item):
            return item

    chosen = settings().settings
    run_trial(hr.Pipeline("t", hr.indexed(2, made), [divided]), settings=chosen, on_error=note)
    assert [("ZeroDivisionError", -10), ("ZeroDivisionError", 1)] == seen

    seen.clear()
    run_trial(hr.Pipeline("t", ["a"], [Broken()]), settings=chosen, on_error=note)
    assert ("RuntimeError", "set-up") == seen[0]


def test_a_failing_teardown_is_reported(caplog):
    """A teardown that raises is told of and does not cost the rows."""

    class Server(hr.Stage):
        def process(self, item):
            return item

        def teardown(self):
            raise RuntimeError("would not go")

    report = trial(hr.Pipeline("t", ["a"], [Server()]))

    assert ["a"] == [row.row for row in report.rows]
    assert "would not go" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"n": 0}, "at least 1"), ({"engine": "fast"}, "ray or inline"), ({"engine": "ray"}, "file")],
)
def test_arguments_that_cannot_be_right_are_refused(arguments, message):
    """What cannot run is refused before anything does."""
    with pytest.raises(UsageError, match=message):
        trial(hr.Pipeline("t", ["a"], [str]), **arguments)


def test_what_submit_would_refuse_is_refused():
    """A stage that is not resumable is named."""

    class Shuffle(hr.Stage):
        is_resumable = False

        def process(self, item):
            return item

    with pytest.raises(NotResumableError, match="shuffle"):
        trial(hr.Pipeline("t", ["a"], [Shuffle()]))


def test_memory_is_that_of_this_process():
    """Inline, the peak is this process's, in bytes."""
    report = trial(hr.Pipeline("t", ["a"], [str]))

    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    assert resident // 2 < report.stages[0].peak_memory_bytes < 64 * resident


# -- what it would cost -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400), ("90:30", 5430), ("4:00:00", 14400), ("1-12", 129600),
        ("1-12:30", 131400), ("1-12:30:15", 131415), ("", None), ("UNLIMITED", None),
    ],
)  # fmt: skip
def test_time_limits_are_read_as_sbatch_reads_them(text, seconds):
    """All six spellings; no limit is None."""
    assert seconds == limit_seconds(text)


@pytest.mark.parametrize("seconds", [600, 3600, 86400, 131415])
def test_a_spelled_time_reads_back(seconds):
    """What is suggested means what was computed."""
    assert seconds == limit_seconds(spell_time(seconds))


@pytest.mark.parametrize(
    ("work_s", "limit_s", "most", "expected"),
    [
        (10, None, 1001, (1, 600, 1)),  # little work: one task, the shortest limit
        (100 * HOUR, None, 1001, (150, HOUR + 600, 1)),  # an hour each, with the margin
        (100 * HOUR, None, 15, (15, 10 * HOUR + 600, 1)),  # fewer tasks are longer
        (100 * HOUR, 4 * HOUR, 15, (15, 4 * HOUR, 3)),  # the limit makes rounds
        (100 * HOUR, HOUR, 1001, (167, HOUR, 1)),  # the limit makes more tasks
        (100 * HOUR, 200, 1001, (1000, 200, 0)),  # no time left to work
    ],
)
def test_suggestions_fit_limit_and_array(work_s, limit_s, most, expected):
    """Tasks of about an hour where nothing forbids it, never over the limit."""
    assert expected == suggest(work_s, sources=1000, fixed_s=350, limit_s=limit_s, most=most)


@given(
    work_s=st.floats(0, 1e9), sources=st.integers(1, 10**9), most=st.integers(1, 10**5),
    limit_s=st.none() | st.floats(60, 1e6),
)  # fmt: skip
def test_suggestions_hold_the_work(work_s, sources, most, limit_s):
    """Whatever the figures: tasks times rounds times limit hold the work, within the bounds."""
    fixed_s = 100.0
    array, time_s, rounds = suggest(
        work_s, sources=sources, fixed_s=fixed_s, limit_s=limit_s, most=most
    )

    assert 1 <= array <= min(most, sources)
    assert limit_s is None or time_s <= limit_s
    if rounds:
        room = (int(limit_s) + 1 if rounds > 1 else time_s) - fixed_s
        assert work_s <= array * rounds * room * 1.001


def test_an_estimate_counts_cores_gpus_and_the_slowest_stage():
    """Core-seconds times sources; the time of a task is that of its slowest stage."""

    @hr.stage(max_concurrency=10)
    async def ask(x):
        return x

    class Model(hr.Stage):
        gpus = 1
        workers = 1

        def process(self, item):
            return item

    pipeline = hr.Pipeline("t", ["a"], [str, ask, Model()])
    chosen = settings({"request": {"cpus_per_task": 4}}).settings
    found = estimate_run(pipeline, [1.0, 10.0, 2.0], settings=chosen, sources=3600, start_s=5)

    assert 4.0 == found.core_seconds_per_source  # 1, a tenth of 10, and 2
    assert (4.0, 2.0) == (found.core_hours, found.gpu_hours)
    assert (3, 1, 4) == (found.array, found.rounds, found.cpus_per_task)  # 2 s each, by the model


# -- the command --------------------------------------------------------------------------------


def test_the_command_prints_rows_as_json_lines_and_nothing_else(run_trial_command):
    """stdout is data: three rows of each source; what the user prints goes to stderr."""
    result = run_trial_command("--source", "a", "--source", "d")
    rows = [json.loads(line) for line in result.stdout.splitlines()]

    assert 0 == result.exit_code, result.stderr
    assert ["a", "a", "a", "d", "d", "d"] == [row["source"] for row in rows]
    expected = {"source": "a", "item": "a/parse.0/fan.1", "row": {"text": "a", "n": 1}}
    assert expected == rows[1]
    assert "parsing a" in result.stderr
    assert "2 of 2 sampled sources completed, 0 failed" in result.stderr


def test_the_command_shows_failures_and_exits_1(run_trial_command):
    """A failure has item, stage, message and traceback; the exit code tells of it."""
    result = run_trial_command("-n", "4")

    assert 1 == result.exit_code
    assert "failed: b in parse: ValueError: b is bad" in result.stderr
    assert 'raise ValueError("b is bad")' in result.stderr
    assert "3 of 4 sampled sources completed, 1 failed" in result.stderr


def test_parameters_reach_the_pipeline(run_trial_command):
    """-P is converted as submit does it; a tolerated failure exits 0."""
    result = run_trial_command("-P", "tolerate=0.25")

    assert 0 == result.exit_code, result.stderr
    assert "1 failed (1 tolerated)" in result.stderr


def test_json_is_one_object(run_trial_command):
    """--json has all of it: sources, rows, failures, stages, estimate."""
    result = run_trial_command("--json", "-t", "2:00:00", "-c", "3")
    found = json.loads(result.stdout)

    assert (1, 1, False) == (result.exit_code, found["schema"], found["ok"])
    assert (4, 4, 3) == (found["total"], found["sampled"], found["completed"])
    assert [{"source": "b", "state": "failed", "rows": 0}] == found["sources"][1:2]
    assert ["b"] == [failure["source"] for failure in found["failures"]]
    assert [("parse", 4, 3), ("fan", 3, 15)] == [
        (stage["name"], stage["in"], stage["out"]) for stage in found["stages"]
    ]
    assert (4, 3, 1, "0:10:00", 1) == tuple(
        found["estimate"][key] for key in ("sources", "cpus_per_task", "array", "time", "rounds")
    )


def test_the_estimate_is_a_command_to_copy(run_trial_command):
    """What is suggested is spelled as `submit` takes it."""
    result = run_trial_command("--source", "a")

    assert "  hpcresume submit letters.py --array 1 -t 0:10:00        1 round" in result.stderr


def test_an_empty_listing_exits_0(run_trial_command):
    """Nothing to do is said, not failed."""
    result = run_trial_command("-P", "names=")

    assert (0, "") == (result.exit_code, result.stdout)
    assert "the list of sources is empty" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--pdb", "--engine", "ray"), 2, "--pdb cannot"),
        (("--source", "z"), 13, "no source has the id 'z'"),
        (("-n", "0"), 2, "at least 1"),
        (("-t", "soon"), 15, "soon"),
        (("-P", "root=x"), 2, "root"),
    ],
)
def test_mistakes_have_their_exit_codes(run_trial_command, arguments, code, message):
    """Each is refused with its own code and names what is wrong."""
    result = run_trial_command(*arguments, engine=())

    assert code == result.exit_code, result.stderr
    assert message in result.stderr


def test_help_has_an_example():
    """`hpcresume trial --help` shows how it is called."""
    result = CliRunner().invoke(cli, ["trial", "--help"])

    assert 0 == result.exit_code
    assert "hpcresume trial pipeline.py --source pages/17.html --pdb" in result.stdout
