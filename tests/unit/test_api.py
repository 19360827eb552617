"""The commands as Python functions."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import typing
from pathlib import Path

import pytest

import hpcresume as hr
from hpcresume.errors import ConfigError, PipelineError, RunDirError, UsageError
from hpcresume.observe.reading import Reader
from hpcresume.observe.report import attempts_that_ran
from hpcresume.run.directory import RunDir
from hpcresume.segment.segment import Progress
from tests.support.places import REPOSITORY
from tests.support.runs import make_run

PIPELINE = """
import hpcresume as hr

def square(x: int) -> dict:
    if x == 3:
        raise ValueError("three")
    return {"x": x, "square": x * x}

def pipeline(n: int = 6) -> hr.Pipeline:
    return hr.Pipeline(name="squares", sources=hr.indexed(n, int), stages=[hr.stage(square)])
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A directory that holds pipeline.py, as the current one."""
    (tmp_path / "pipeline.py").write_text(PIPELINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPCRESUME_TASK__LOCAL_DIR", str(tmp_path))
    return tmp_path


def test_submit_runs_and_the_run_mirrors_the_commands(written):
    """Submit, status, rows, failures, collect and report of a local run, without a word."""
    run = hr.submit(
        "pipeline.py",
        params={"n": 5},
        cluster="local",
        settings={"task": {"engine": "inline"}, "run": {"max_attempts": 1}},
    )

    assert ("incomplete", 4) == (run.status()["state"], hr.status(run)["sources"]["completed"])
    assert [0, 1, 4, 16] == [row["square"] for row in run.rows()]
    assert [("3", "square", "ValueError")] == [
        (one.source, one.stage, one.kind) for one in run.failures()
    ]
    report = run.collect("out.jsonl")
    assert (4, 1) == (report.rows, report.quarantined)
    run.report("report.html")
    assert "squares" in (written / "report.html").read_text()
    assert "incomplete" == run.wait()["state"]
    assert run.status() == hr.status(run.path)


def test_submitting_again_goes_on(written):
    """The same call continues the same run, as the command does."""
    first = hr.submit("pipeline.py", cluster="local", settings={"task": {"engine": "inline"}})
    again = hr.submit("pipeline.py", cluster="local", retry_quarantined=True,
                      settings={"task": {"engine": "inline"}})  # fmt: skip

    assert first.path == again.path
    assert 5 == again.status()["sources"]["completed"]


def test_a_pipeline_function_is_taken_from_its_file(written, monkeypatch):
    """A function that was imported from a file stands for file.py:name, each time."""
    monkeypatch.syspath_prepend(str(written))
    monkeypatch.delitem(sys.modules, "pipeline", raising=False)
    import pipeline

    run, again = (
        hr.submit(pipeline.pipeline, cluster="local", settings={"task": {"engine": "inline"}})
        for _ in range(2)
    )
    monkeypatch.delitem(sys.modules, "pipeline")

    assert run.path == again.path
    assert 5 == run.status()["sources"]["completed"]


def test_a_notebooks_pipeline_is_refused_with_the_way_out():
    """What a cell defines has no file: the message says how to write it to one."""
    cell = types.ModuleType("__main__")
    exec(compile(PIPELINE, "<ipython-input-3>", "exec"), cell.__dict__)
    cell.pipeline.__module__ = "notebook_cell"
    sys.modules["notebook_cell"] = cell
    try:
        with pytest.raises(PipelineError, match=r"'pipeline' is defined in a notebook") as caught:
            hr.submit(cell.pipeline)
    finally:
        del sys.modules["notebook_cell"]

    assert "%%writefile pipeline.py" in str(caught.value)
    assert "hr.submit('pipeline.py')" in str(caught.value)


def test_at_the_prompt_it_is_the_same():
    """A script on stdin is a prompt, too: the error is that of exit code 10."""
    code = (
        PIPELINE + "\ntry: hr.submit(pipeline)\nexcept hr.HpcResumeError as e: print(e.exit_code)"
    )
    done = subprocess.run(
        [sys.executable, "-"],
        input=code,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )

    assert ("10\n", 0) == (done.stdout, done.returncode), done.stderr


def test_what_is_no_pipeline_function_is_refused(written):
    """A Pipeline object, and a function within a function, cannot be built by array tasks."""
    built = hr.Pipeline(name="p", sources=hr.indexed(1, int), stages=[hr.stage(lambda x: x)])

    def inner() -> hr.Pipeline:
        return built

    with pytest.raises(PipelineError, match="a Pipeline cannot be submitted"):
        hr.submit(built)
    with pytest.raises(PipelineError, match="within a function"):
        hr.submit(inner)


@pytest.mark.parametrize(
    "wrong", [{"array": 0}, {"array": "3"}, {"array": True}, {"cluster": "pbs"}]
)
def test_wrong_arguments_are_usage_errors(written, wrong):
    """As on the command line."""
    with pytest.raises(UsageError):
        hr.submit("pipeline.py", **wrong)


INLINE = {"task": {"engine": "inline"}}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"engine": "inline"}, r"settings=\{'task': \{'engine': \.\.\.\}\}"),
        ({"partitio": "long"}, "Did you mean partition"),
        ({"zzz": 1}, "Known are time, partition"),
    ],
)
def test_a_keyword_that_is_none_names_the_way(written, wrong, says):
    """What belongs into settings is said to, and a slip gets the nearest name."""
    with pytest.raises(UsageError, match=says):
        hr.submit("pipeline.py", cluster="local", **wrong)


def test_a_wrong_setting_is_no_word_of_the_command_line(written):
    """The caller has none: the message names the argument."""
    with pytest.raises(
        ConfigError, match=r"^hr\.submit\(settings=\.\.\.\): unknown key task\.nope"
    ):
        hr.submit("pipeline.py", settings={"task": {"nope": 1}})
    with pytest.raises(ConfigError, match=r"^request\.time = .soon. \(hr\.submit\)"):
        hr.submit("pipeline.py", time="soon")
    with pytest.raises(ConfigError, match="task"):
        hr.submit("pipeline.py", settings={"task": 3})


def test_what_an_array_task_may_ask_for_is_what_the_settings_know():
    """The typed keywords are the keys of ``[request]``."""
    from hpcresume.api import Request
    from hpcresume.config.layers import schema

    assert set(schema()["request"]) == set(Request.__annotations__)


def test_a_run_is_submitted_as_its_directory_is(written):
    """``hr.submit(run)`` goes on, wherever the caller is by then."""
    run = hr.submit("pipeline.py", cluster="local", settings=INLINE, reservation=None)

    assert run.path == hr.submit(run, cluster="local", settings=INLINE).path


def test_an_attempt_is_told_of_from_its_start_to_its_end(written):
    """Its start is recorded to less than a second, so that a report of a short run is right."""
    before = time.time()
    run = hr.submit("pipeline.py", params={"n": 3}, cluster="local", settings=INLINE)
    after = time.time()
    reader = Reader(RunDir.open(str(run.path)))
    reader.refresh()
    (ran,) = attempts_that_ran(reader, after)

    assert before <= ran.start < ran.end <= after
    assert re.search(r"\.\d{6}\+00:00$", reader.rounds[0].attempts[0].info.started_at)


def test_submit_from_a_thread_runs_without_signal_handlers(written):
    """Only the main thread may set them; its own are left alone."""
    before, ended = signal.getsignal(signal.SIGINT), []

    def run():
        ended.append(hr.submit("pipeline.py", params={"n": 3}, cluster="local", settings=INLINE))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()

    assert ["complete"] == [one.status()["state"] for one in ended]
    assert before == signal.getsignal(signal.SIGINT)


# -- an opened run ------------------------------------------------------------------------------


def test_a_run_stays_where_it_was_opened(tmp_path, monkeypatch):
    """A relative path is that of the directory in which it was given."""
    made = make_run(tmp_path, sources=3)
    made.publish(made.attempt(), [[0, 1]])
    monkeypatch.chdir(Path(made.path).parent)
    run = hr.Run(Path(made.path).name)
    monkeypatch.chdir("/")

    assert made.path == str(run.path)
    assert (2, 3) == (len(list(run.rows())), run.status()["sources"]["total"])


def test_the_home_directory_is_meant_by_a_tilde(tmp_path, monkeypatch):
    """In the run's path and in what it writes, as in hr.files."""
    made = make_run(tmp_path, sources=3)
    made.publish(made.attempt(), [[0, 1]])
    home = Path(made.path).parent
    monkeypatch.setenv("HOME", str(home))
    run = hr.Run(f"~/{Path(made.path).name}")
    run.collect("~/out.jsonl", files="~/linked")
    run.report("~/report.html")

    assert made.path == str(run.path)
    assert 2 == len((home / "out.jsonl").read_text().splitlines())
    assert (home / "report.html").exists()


@pytest.mark.parametrize(
    "ask",
    [
        lambda run: list(run.rows()),
        lambda run: run.status(),
        lambda run: run.failures(),
        lambda run: run.collect("out.jsonl"),
        lambda run: run.wait(),
        lambda run: run.merge(),
        lambda run: run.cancel(),
        lambda run: run.clean(remove=True),
        lambda run: run.log_lines("s1.txt"),
        lambda run: run.report("report.html"),
    ],
)
def test_a_run_that_has_gone_is_no_empty_run(tmp_path, monkeypatch, ask):
    """No result is replaced by that of no sources, and nobody waits for it."""
    monkeypatch.chdir(tmp_path)
    made = make_run(tmp_path, sources=3)
    made.publish(made.attempt(), [[0, 1]])
    (tmp_path / "out.jsonl").write_text("earlier")
    run = hr.Run(made.path)
    shutil.rmtree(made.path)

    with pytest.raises(RunDirError, match="not a run directory"):
        ask(run)
    assert "earlier" == (tmp_path / "out.jsonl").read_text()


def test_waiting_ends_when_the_run_goes(tmp_path):
    """What is removed while somebody waits for it never ends by itself."""
    made = make_run(tmp_path, sources=3)
    made.publish(made.attempt(), [[0]], progress=Progress(completed=1, left=2))
    run = hr.Run(made.path)
    remover = threading.Timer(0.2, (Path(made.path) / "run.json").unlink)
    remover.start()

    with pytest.raises(RunDirError, match="not a run directory"):
        run.wait(poll_s=0.05, timeout_s=30)
    remover.join()


def test_collect_takes_what_the_command_takes(tmp_path):
    """The layout of parts is for runs that have some, and goes with nothing else."""
    made = make_run(tmp_path, sources=3)
    made.publish(made.attempt(), [[0, 1]])
    run = hr.Run(made.path)

    for wrong in (
        {"layout": "parts"},
        {"layout": "two"},
        {"layout": "parts", "with_source": True},
        {"layout": "parts", "files": "linked"},
    ):
        with pytest.raises(UsageError):
            run.collect(tmp_path / "out", **wrong)


def test_parts_are_collected_into_a_directory(written):
    """As with --layout parts: the same rows, in files."""
    text = (written / "pipeline.py").read_text()
    parts = text.replace("[hr.stage(square)])", '[hr.stage(square)], sink=hr.Parts("jsonl"))')
    (written / "pipeline.py").write_text(parts)
    run = hr.submit("pipeline.py", params={"n": 3}, cluster="local", settings=INLINE)
    report = run.collect("parts", layout="parts")

    assert (True, 3) == (report.complete, report.rows)
    assert any((written / "parts").iterdir())


def test_the_types_that_methods_return_can_be_looked_up():
    """``typing.get_type_hints`` finds them, and hpcresume has their names."""
    functions = [hr.submit, hr.status, *(f for _, f in inspect.getmembers(hr.Run, callable))]
    hints = [typing.get_type_hints(f) for f in functions if inspect.isfunction(f)]
    returned = {one.get("return") for one in hints}

    named = {hr.Cleaned, hr.CollectReport, hr.Standing, hr.Stopped, list[hr.FailedSource]}
    assert named <= returned


def test_status_of_no_run_says_so(tmp_path):
    """The error is the command's."""
    with pytest.raises(RunDirError, match="not a run directory"):
        hr.status(tmp_path)


def test_wait_gives_up_in_time(tmp_path):
    """With a limit it returns how the run stands, running or not."""
    made = make_run(tmp_path, sources=3)
    made.publish(made.attempt(), [[0]], progress=Progress(completed=1, left=2))

    assert "running" == hr.Run(made.path).wait(timeout_s=0)["state"]


def test_a_limit_below_the_pause_is_kept(tmp_path):
    """The last look is at the limit, not a whole pause later."""
    made = make_run(tmp_path, sources=3)
    made.publish(made.attempt(), [[0]], progress=Progress(completed=1, left=2))
    start = time.monotonic()
    found = hr.Run(made.path).wait(timeout_s=0.2, poll_s=60)

    assert "running" == found["state"]
    assert 0.2 <= time.monotonic() - start < 30


def test_cancel_leaves_the_stop_mark(tmp_path):
    """Nothing of it runs, so nobody is asked to end; cancelling twice does no harm."""
    made = make_run(tmp_path, sources=3)
    made.publish(made.attempt(pid=2**22 + 1), [[0, 1]])
    run = hr.Run(made.path)

    assert ([], []) == (run.cancel().jobs, run.cancel().processes)
    assert made.run.stop_requested()


def test_clean_says_what_it_would_remove_and_removes_it(tmp_path):
    """Nothing goes that is not asked for: temporary files and folded segments, or all of it."""
    made = make_run(tmp_path, sources=3)
    ref = made.attempt()
    for source in range(3):
        made.publish(ref, [[source]], seq=source + 1)
    made.end(ref)
    made.finish()
    garbage = Path(made.run.attempt_path(ref)) / ".tmp-1234"
    garbage.write_bytes(b"x" * 100)
    small = [Path(made.run.segment_path(name)) for name in made.run.segments(ref)[:-1]]
    size_bytes, run = 100 + sum(path.stat().st_size for path in small), hr.Run(made.path)

    would, kept = run.clean(), [path.exists() for path in (garbage, *small)]
    cleaned = run.clean(remove=True)

    paths = sorted(map(str, (garbage, *small)))
    assert hr.Cleaned(paths, 2, size_bytes, removed=False) == would
    assert hr.Cleaned(paths, 2, size_bytes, removed=True) == cleaned
    assert ([True] * 3, [False] * 3) == (kept, [Path(path).exists() for path in paths])
    assert 3 == len(list(run.rows()))
    assert [made.path] == run.clean(everything=True, remove=True).paths
    assert not run.path.exists()


def test_a_run_in_use_is_not_cleaned(tmp_path):
    """The error is the command's, whose exit code is that of run directories."""
    made = make_run(tmp_path)
    made.attempt()

    with pytest.raises(RunDirError, match=r"in use \(running\)"):
        hr.Run(made.path).clean(everything=True, remove=True)
    assert Path(made.path).exists()


def test_merge_unites_what_was_published(written):
    """It returns the generation's counts, and a second merge finds nothing new."""
    run = hr.submit("pipeline.py", cluster="local", settings={"task": {"engine": "inline"}})
    found = [run.merge().union for _ in range(2)]

    assert [(5, found[0].number)] * 2 == [(len(one.completed), one.number) for one in found]


def test_log_lines_of_a_source(tmp_path):
    """Only lines of tasks that had the source, and not those of a longer id."""
    made = make_run(tmp_path, sources=4, tasks=2)
    made.log("task-00000.log", "INFO s1.txt/parse.0: ok\nINFO s1.txt.bak: no\nINFO s0.txt: no\n")
    made.log("task-00001.log", "INFO s1.txt: not mine\n")
    found = hr.Run(made.path).log_lines("s1.txt")

    assert 1 == len(found)
    assert found[0].endswith("task-00000.log:1:INFO s1.txt/parse.0: ok")
    with pytest.raises(UsageError, match="no source 'nope'"):
        hr.Run(made.path).log_lines("nope")


# -- the end of a run ---------------------------------------------------------------------------


def ends(directory):
    """Return the states that the command on-end was told of."""
    path = directory / "ends.jsonl"
    return (
        [json.loads(line)["state"] for line in path.read_text().splitlines()]
        if path.exists()
        else []
    )


def test_the_command_is_told_of_each_end_once(written):
    """It gets the status on stdin; submitting a run that has ended tells it nothing again."""
    command = f"sh -c 'cat >> {written}/ends.jsonl; echo >> {written}/ends.jsonl'"
    settings = {"task": {"engine": "inline"}, "run": {"on_end": command, "max_attempts": 1}}
    hr.submit("pipeline.py", cluster="local", settings=settings)
    hr.submit("pipeline.py", cluster="local", settings=settings)
    once = ends(written)
    text = (written / "pipeline.py").read_text()
    (written / "pipeline.py").write_text(text.replace("x == 3", "x == 99"))
    hr.submit("pipeline.py", cluster="local", settings=settings, retry_quarantined=True)

    assert (["incomplete"], ["incomplete", "complete"]) == (once, ends(written))


def test_a_command_that_fails_changes_nothing(written, caplog):
    """Its exit code is logged; the run is as it is."""
    settings = {"task": {"engine": "inline"}, "run": {"on_end": "sh -c 'exit 3'"}}
    run = hr.submit("pipeline.py", params={"n": 3}, cluster="local", settings=settings)

    assert "complete" == run.status()["state"]
    assert "exited with 3" in caplog.text


@pytest.mark.parametrize(
    ("command", "why"), [("no-such-command x", "no command"), ("a 'b", "closing")]
)
def test_a_command_that_cannot_run_is_refused_at_once(written, command, why):
    """Hours later nobody would see it."""
    with pytest.raises(UsageError, match=f"--on-end.*{why}"):
        hr.submit("pipeline.py", cluster="local", settings={"run": {"on_end": command}})
