"""Evaluations on this machine: rows as items finish, resumed to the item, whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import wait_until
from tests.support.evals import EvalDesk, items, stable
from tests.support.local import Ended, family, kill_family
from tests.support.model_server import Running, model_server


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[EvalDesk]:
    """A directory in which to evaluate."""
    return EvalDesk.make(tmp_path)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    """A model server."""
    pytest.importorskip("httpx")
    (tmp_path / "server").mkdir()
    with model_server(tmp_path / "server") as running:
        yield running


def ended_with(code: int, ended: Ended, *fragments: str) -> None:
    """Assert how a command ended and that it said every fragment."""
    assert code == ended.code, ended
    assert [] == [fragment for fragment in fragments if fragment not in ended.err], ended


ENGINES = ["inline", pytest.param("ray", marks=pytest.mark.ray)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("workflow", ["answer", "plain"])
def test_a_hung_item_holds_nobody_up(desk: EvalDesk, engine: str, workflow: str) -> None:
    """
    E1, E12: while one item hangs, the rows of all others are in the file for another process
    to see, with an event loop in the task or in a Ray worker, async or not.  Ctrl-C then
    leaves a result without that item, and exits with 130.
    """
    if (engine, workflow) == ("ray", "plain"):
        pytest.skip("a thread hangs in a Ray worker as it does in the task")
    desk.dataset([{"id": "h", "question": "?", "do": "hang"}, *items(12)])
    options = ("--engine", engine, "--workflow", f"flow.py:{workflow}", "--drain", 1)
    process = desk.start(*options)
    try:
        rows = desk.wait_for_rows(12, process)
        assert {f"i{n}" for n in range(12)} == {row["id"] for row in rows}
        assert {"ok"} == {row["status"] for row in rows}
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        kill_family(process.pid)
    assert 128 + signal.SIGINT == process.returncode, (out, err)
    assert "12 ok, 0 errors, 0 timeouts, 1 missing of 13" in err
    assert "hpcresume eval --resume out" in err
    assert [f"i{n}" for n in range(12)] == [row["id"] for row in desk.result()]
    summary = desk.json("summary.json")
    assert ("interrupted", 1) == (summary["status"], summary["missing"])


def test_a_hung_request_holds_nobody_up(desk: EvalDesk, server: Running) -> None:
    """
    E1: while one request hangs, the rows of all others are in the file; its own time-out then
    is its error, and the run ends by itself.
    """
    desk.dataset([{"id": "h", "question": "hang|x", "answer": ""}, *items(12)])
    process = desk.start("--endpoint", server.chat, "--item-timeout", 20)
    try:
        rows = desk.wait_for_rows(12, process)
        assert {"ok"} == {row["status"] for row in rows}
        out, err = process.communicate(timeout=120)
    finally:
        kill_family(process.pid)
    assert 1 == process.returncode, (out, err)
    hung = desk.by_id()["h"]
    assert ("timeout", None) == (hung["status"], hung["output"])
    assert "12 ok, 0 errors, 1 timeouts, 0 missing of 13" in err


def test_killed_and_resumed(desk: EvalDesk) -> None:
    """
    E2: after kill -9 of everything the rows of all finished items are there, resuming calls the
    workflow for the others only, and the result equals that of an uninterrupted run.
    """
    desk.dataset(items(60, ms=100))
    process = desk.start("--max-concurrency", 4, "--reps", 2)
    try:
        before = desk.wait_for_rows(20, process)
    finally:
        kill_family(process.pid)
        process.communicate()
    before = desk.rows()
    assert len(before) < 120
    called = desk.calls()

    ended_with(0, desk.resume(), "recovered", "120 ok, 0 errors, 0 timeouts, 0 missing of 120")

    again = {key for key, count in (desk.calls() - called).items() if count}
    finished = {f"{row['id']} {row['repetition']}" for row in before}
    assert set() == again & finished
    assert {f"i{n} {r}" for n in range(60) for r in range(2)} == set(desk.calls())
    assert before == desk.rows()[: len(before)]
    assert stable(sorted(desk.rows(), key=lambda r: (int(r["id"][1:]), r["repetition"]))) == stable(
        desk.result()
    )
    expected = [(f"i{n}", r, f"Q{n}", "ok") for n in range(60) for r in range(2)]
    keys = ("id", "repetition", "output", "status")
    assert expected == [tuple(row[key] for key in keys) for row in desk.result()]


def test_no_file_of_rows_where_none_is_wanted(desk: EvalDesk) -> None:
    """
    E8: ``--no-write-output`` leaves no file of rows, also where an earlier one was; errors are
    counted all the same, scores are written, and ``--write-output`` runs nothing again.
    """
    desk.dataset([*items(5), {"id": "bad", "question": "?", "do": "raise"}])

    def files() -> list[str]:
        names = ("workflow_output.json", "workflow_output.jsonl", "eval/rows.jsonl")
        return [name for name in names if (desk.out / name).exists()]

    ended = desk.evaluate("--no-write-output", "--scorer", "flow.py:exact", "--fail-on-error", 3)
    ended_with(0, ended, "5 ok, 1 errors", "hpcresume collect out")
    assert ([], 5) == (files(), desk.json("scores.json")["rows"]["scored"])
    called = desk.calls()
    collected = [json.loads(line) for line in desk.desk.rows("out").splitlines()]

    ended_with(0, desk.resume("--write-output"), "5 ok, 1 errors", "workflow_output.json")
    assert ["workflow_output.json", "workflow_output.jsonl"] == files()
    assert (called, collected) == (desk.calls(), desk.result())

    ended_with(0, desk.resume("--no-write-output"), "5 ok, 1 errors")
    assert ([], called) == (files(), desk.calls())


@pytest.mark.parametrize("damage", ["torn", "garbage", "gone", "halved"])
def test_the_file_is_a_view(desk: EvalDesk, damage: str) -> None:
    """
    E7: whatever was done to the JSONL file, the next start mends it from the ledger, without
    running anything again.
    """
    desk.dataset(items(5))
    ended_with(0, desk.evaluate())
    path = desk.out / "workflow_output.jsonl"
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "garbage":
        path.write_bytes(b"\xff\xfe{]\n" + whole + whole)
    else:
        path.write_bytes(whole[: -20 if damage == "torn" else len(whole) // 2])

    ended_with(0, desk.evaluate(), "5 ok")

    assert sorted(whole.splitlines()) == sorted(path.read_bytes().splitlines())
    assert {1} == set(desk.calls().values())


def test_errors_are_rows(desk: EvalDesk) -> None:
    """
    E3, E5: an item that raises, one that returns what JSON cannot hold, and one that takes too
    long have rows that say so, with type and traceback; the log names them; all others are
    as if nothing had been.
    """
    odd = [{"id": do, "question": "?", "do": do} for do in ("raise", "object", "hang")]
    desk.dataset([*odd, *items(5)])
    ended = desk.evaluate("--item-timeout", 3)
    ended_with(1, ended, "5 ok, 2 errors, 1 timeouts, 0 missing of 8", "ValueError: no answer")
    rows = desk.by_id()
    assert ["error", "error", "timeout"] == [rows[r["id"]]["status"] for r in odd]
    assert {"ok"} == {rows[f"i{n}"]["status"] for n in range(5)}
    assert "ValueError: no answer to ?" == rows["raise"]["error"]
    assert "flow.py" in rows["raise"]["traceback"]
    assert ("RowError" in rows["object"]["error"], True) == (True, rows["object"]["lossy"])
    assert "<object object" in rows["object"]["output"]
    log = "".join(p.read_text() for p in desk.out.glob("rounds/*/logs/*"))
    assert [True, True, True] == [f"item {row['id']}" in log for row in odd]
    assert "Traceback" in log
    assert "complete" in desk.desk.call("status", "out").out


def test_errors_are_retried_when_asked(desk: EvalDesk) -> None:
    """
    E11: resuming does not retry; --retry-errors runs the failed items only, their older rows
    stay until the retry is recorded, and then the last good row counts.
    """
    bad = [{"id": f"b{n}", "question": "?", "do": "raise", "n": n} for n in range(2)]
    desk.dataset([*bad, *items(3)])
    ended_with(1, desk.evaluate(), "3 ok, 2 errors")
    ended_with(1, desk.resume(), "3 ok, 2 errors")
    assert {1} == set(desk.calls().values())
    failed = {name: row for name, row in desk.by_id().items() if row["status"] == "error"}

    ended_with(1, desk.resume("--retry-errors"), "3 ok, 2 errors")
    assert {"b0 0": 2, "b1 0": 2} == {k: n for k, n in desk.calls().items() if n > 1}
    again = desk.by_id()
    assert (5, [2, 2]) == (len(desk.rows()), [again[name]["attempts"] for name in failed])

    (desk.path / "repaired").touch()
    ended_with(0, desk.resume("--retry-errors"), "5 ok, 0 errors")
    assert [3, 3] == [desk.by_id()[name]["attempts"] for name in failed]
    assert 5 == len(desk.rows())
    ended_with(0, desk.resume("--retry-errors"), "5 ok")
    assert {"b0 0": 3, "b1 0": 3} == {k: n for k, n in desk.calls().items() if n > 1}


def test_an_older_error_stays_until_the_retry_is_recorded(desk: EvalDesk) -> None:
    """E11: a kill while failed items are run again leaves their error rows in every file."""
    desk.dataset([{"id": "b", "question": "?", "do": "raise"}, *items(2)])
    ended_with(1, desk.evaluate())
    failed = desk.by_id()["b"]
    (desk.path / "flow.py").write_text(
        (desk.path / "flow.py").read_text().replace('do == "hang"', 'do in ("hang", "raise")')
    )
    process = desk.start("--retry-errors")
    try:
        wait_until(
            lambda: desk.calls()["b 0"] == 2,
            timeout_s=60,
            describe=lambda: f"{desk.calls()}, ended: {process.poll()}",
        )
    finally:
        kill_family(process.pid)
        process.communicate()
    assert failed == desk.by_id()["b"]
    process = desk.start("--drain", 1)
    try:
        wait_until(
            lambda: desk.calls()["b 0"] == 3,
            timeout_s=60,
            describe=lambda: f"{desk.calls()}, ended: {process.poll()}",
        )
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        kill_family(process.pid)
    assert 85 == process.returncode, (out, err)
    assert [failed] == [row for row in desk.rows() if row["id"] == "b"]
    assert [failed] == [row for row in desk.result() if row["id"] == "b"]


def test_scoring_is_a_second_pass(desk: EvalDesk) -> None:
    """
    A kill while scoring repeats no call of the workflow, and no score that was there; other
    scorers score the stored outputs alone; one that fails for an item leaves all others' be.
    """
    desk.dataset([*items(30, score_ms=200), {"id": "u", "question": "u", "do": "unscorable"}])
    process = desk.start("--scorer", "flow.py:exact", "--max-concurrency", 2, "--steps", "LLM_END")
    try:
        wait_until(
            lambda: len(desk.calls("scored")) >= 6,
            timeout_s=120,
            describe=lambda: f"{desk.calls('scored')}, ended: {process.poll()}",
        )
    finally:
        kill_family(process.pid)
        process.communicate()
    called, before = desk.calls(), desk.calls("scored")
    assert 31 == len(desk.result())

    ended_with(0, desk.resume(), "31 ok", "exact")

    again = desk.calls("scored")
    assert called == desk.calls()
    assert (31, True) == (len(again), sum(again.values()) <= 31 + len(before))
    scores = desk.json("scores.json")
    assert (30 / 31, 31) == (scores["scores"]["exact"]["mean"], scores["rows"]["scored"])

    ended = desk.desk.call("eval", "--rescore", "out", "--scorer", "flow.py:parts",
                           "--local-dir", desk.desk.local)  # fmt: skip
    ended_with(1, ended, "parts.length", "scorer parts failed for 1 item")
    assert called == desk.calls()
    scores = desk.json("scores.json")
    assert {"parts.length", "parts.steps"} == set(scores["scores"])
    assert [1.0, 30] == [scores["scores"]["parts.steps"][key] for key in ("mean", "items")]
    failed = next(row for row in scores["items"] if row["id"] == "u")
    assert "cannot be scored" in failed["errors"]["parts"]


FATAL = """if do == "die":
        os._exit(3)
    if do == "block":
        time.sleep(3600)
    if do == "hang":"""


@pytest.mark.ray
@pytest.mark.parametrize(
    ("do", "status", "error"),
    [
        ("die", "error", "death: "),
        pytest.param("block", "timeout", "timeout: ", marks=pytest.mark.slow),
    ],
)
def test_code_that_takes_its_worker_along(desk: EvalDesk, do: str, status: str, error: str) -> None:
    """
    With --engine ray an item whose code kills its worker, or blocks the event loop for ever,
    has a row that says so, and all other items have theirs.
    """
    flow = desk.path / "flow.py"
    flow.write_text(flow.read_text().replace('if do == "hang":', FATAL))
    desk.dataset([{"id": "d", "question": "?", "do": do}, *items(6)])
    ended_with(1, desk.evaluate("--engine", "ray", "--item-timeout", 2), "6 ok")
    dead = desk.by_id()["d"]
    assert (status, True) == (dead["status"], dead["error"].startswith(error)), dead
    assert desk.result()[0] == dead


def test_a_dataset_that_changes(desk: EvalDesk) -> None:
    """
    E10: a reordered file runs nothing, a grown one its new items, a changed item is owed again;
    the result follows the file's order.  A changed workflow is said to be, and runs what is owed.
    """
    first = list(items(4))
    desk.dataset(first)
    ended_with(0, desk.evaluate())
    desk.dataset(reversed(first))
    ended_with(0, desk.evaluate(), "4 ok")
    assert {1} == set(desk.calls().values())
    assert ["i3", "i2", "i1", "i0"] == [row["id"] for row in desk.result()]

    changed = [{**first[0], "question": "other"}, *first[1:], {"id": "n", "question": "new"}]
    desk.dataset(changed)
    flow = desk.path / "flow.py"
    flow.write_text(flow.read_text().replace("question.upper()", "question.upper() + '!'"))
    summary = "5 ok, 0 errors, 0 timeouts, 0 missing of 5"
    ended_with(0, desk.evaluate(), "changed        flow.py", summary)
    assert {"i0 0": 2, "i1 0": 1, "i2 0": 1, "i3 0": 1, "n 0": 1} == desk.calls()
    assert ["OTHER!", "Q1", "Q2", "Q3", "NEW!"] == [row["output"] for row in desk.result()]
    assert 5 == len(desk.rows())


def test_settings_that_change(desk: EvalDesk) -> None:
    """
    E10: another workflow, parameter, column, or a dataset of other items is refused with exit
    code 14 naming what differs; --force takes it; limits and concurrency are free to change.
    """
    desk.dataset(items(4))
    ended_with(0, desk.evaluate("--limit", 2), "2 ok")
    for options, said in {
        ("--workflow", "flow.py:plain"): 'workflow: "flow.py:answer" -> "flow.py:plain"',
        ("-P", f"here={desk.path}"): "params.here",
        ("--answer", "id"): 'columns.answer: "answer" -> "id"',
        ("--steps", "LLM_END"): "steps",
    }.items():
        ended_with(14, desk.evaluate(*options), said)
    ended_with(0, desk.evaluate("--max-concurrency", 2, "--reps", 2), "8 ok")
    ended_with(14, desk.evaluate(), "dataset: 4 of 8 items of the run are not in it")
    desk.dataset({"id": f"x{n}", "question": f"x{n}"} for n in range(8))
    ended_with(14, desk.evaluate(), "dataset: 8 of 8 items")
    ended_with(0, desk.evaluate("--force", "--workflow", "flow.py:plain"), "8 ok")
    assert [f"x{n}" for n in range(8)] == [row["id"] for row in desk.result()]


def test_repetitions_columns_and_steps(desk: EvalDesk) -> None:
    """
    E9: custom fields and ids are kept in both files, steps are filtered alike in both, and
    raising the repetitions runs the new ones only.
    """
    desk.dataset({"key": n, "q": f"q{n}", "gold": "Q0", "topic": [n]} for n in range(2))
    columns = ("--id-column", "key", "--question", "q", "--answer", "gold", "--steps", "TOOL_END")
    ended_with(0, desk.evaluate(*columns))
    ended_with(0, desk.evaluate(*columns, "--reps", 3), "6 ok")
    assert {f"{n} {r}": 1 for n in range(2) for r in range(3)} == desk.calls()
    result = desk.result()
    assert [(str(n), r) for n in range(2) for r in range(3)] == [
        (row["id"], row["repetition"]) for row in result
    ]
    kept = ("key", "topic", "answer", "steps")
    assert [(n, [n], "Q0", [{"kind": "TOOL_END"}]) for n in range(2) for _ in range(3)] == [
        tuple(row[key] for key in kept) for row in result
    ]
    unordered = sorted(desk.rows(), key=lambda row: (row["id"], row["repetition"]))
    assert result == unordered


def test_raw_items_keep_an_id(desk: EvalDesk) -> None:
    """E9: rows that are no objects are questions as a whole, and have ids of their own."""
    (desk.path / "data.jsonl").write_text('"one"\n"two"\n"one"\n')
    ended_with(0, desk.evaluate(), "3 ok")
    assert ["ONE", "TWO", "ONE"] == [row["output"] for row in desk.result()]
    assert 3 == len({row["id"] for row in desk.result()})


def test_a_full_disk(desk: EvalDesk) -> None:
    """
    E4: rows that the file has no room for are logged by item and kept in the ledger, the run
    goes on, and the file is whole at its end; where it cannot be mended even then, the exit
    code is that of shared storage, and resuming writes all rows without running an item.
    """
    desk.dataset(items(5))
    armed = {"HPCRESUME_TESTING": "1", "HPCRESUME_FAILPOINTS": "eval.append=enospc:2+"}
    ended_with(0, desk.evaluate(env=armed), "5 ok", "mended         4 rows")
    assert 4 == desk.json("summary.json")["checkpoint_degraded"]
    log = "".join(p.read_text() for p in desk.out.glob("rounds/*/logs/*"))
    assert 4 == log.count("its row cannot be written to the JSONL file; it is safe")
    assert 5 == len(desk.rows())

    desk.dataset(items(8))
    armed["HPCRESUME_FAILPOINTS"] = "eval.append=enospc:1+,eval.repair=enospc:2+"
    ended_with(20, desk.evaluate(env=armed), "Every row is safe", "hpcresume eval --resume")
    assert 5 == len(desk.rows())
    ended_with(0, desk.resume(), "8 ok")
    assert 3 == desk.json("summary.json")["checkpoint_degraded"]
    assert (8, {1}) == (len(desk.rows()), set(desk.calls().values()))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 85), (signal.SIGUSR2, 85), (signal.SIGINT, 130)]
)
def test_signals_end_it_in_order(desk: EvalDesk, number: signal.Signals, code: int) -> None:
    """
    E12: USR2, SIGTERM and Ctrl-C admit nothing more, let what runs finish, and write result
    and summary before the exit; resuming completes it, each item having run once.
    """
    desk.dataset(items(40, ms=200))
    process = desk.start("--max-concurrency", 4)
    try:
        desk.wait_for_rows(4, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        kill_family(process.pid)
    assert code == process.returncode, (out, err)
    done = len(desk.rows())
    assert 4 <= done < 40
    assert done == sum(desk.calls().values())
    assert (done, "interrupted") == (len(desk.result()), desk.json("summary.json")["status"])
    ended_with(0, desk.resume(), "40 ok")
    assert {f"i{n} 0": 1 for n in range(40)} == desk.calls()


def test_a_second_ctrl_c_leaves_at_once(desk: EvalDesk) -> None:
    """E12: it does not wait for the item that hangs, and loses no row that was written."""
    desk.dataset([*items(6), {"id": "h", "question": "?", "do": "hang"}])
    process = desk.start("--drain", 600)
    try:
        desk.wait_for_rows(6, process)
        wait_until(lambda: desk.calls()["h 0"], timeout_s=30, describe=desk.calls)
        process.send_signal(signal.SIGINT)
        log = next(desk.out.glob("rounds/*/logs/*"))
        wait_until(lambda: "SIGTERM" in log.read_text(), timeout_s=30, describe=log.read_text)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        kill_family(process.pid)
    assert 128 + signal.SIGINT == process.returncode, (out, err)
    assert 6 == len(desk.rows())
    assert "hpcresume eval --resume out" in err
    rows = desk.rows()
    desk.dataset(items(6))
    ended_with(0, desk.evaluate("--force"), "recovered      6 items", "6 ok")
    assert rows == desk.rows()
    assert {1} == set(desk.calls().values())


@pytest.mark.parametrize(("limit", "code"), [("true", 1), ("0.2", 1), ("3", 1)])
def test_too_many_errors_end_it_early(desk: EvalDesk, limit: str, code: int) -> None:
    """E15: more errors than --fail-on-error allows stop the run in order, long before its end."""
    bad = [{"id": f"b{n}", "question": "?", "do": "raise", "n": n} for n in range(4)]
    desk.dataset([*bad, *items(16, ms=3000)])
    ended = desk.evaluate("--fail-on-error", limit, "--max-concurrency", 4)
    ended_with(code, ended, "--fail-on-error allows", "failed: ")
    summary = desk.json("summary.json")
    assert summary["missing"] > 4
    assert 20 - summary["missing"] == len(desk.result()) == sum(desk.calls().values())


def test_errors_that_are_accepted(desk: EvalDesk) -> None:
    """Fewer errors than --fail-on-error allows, or any with `false`, leave the exit code at 0."""
    desk.dataset([{"id": "b", "question": "?", "do": "raise"}, *items(3)])
    ended_with(0, desk.evaluate("--fail-on-error", "0.5"), "3 ok, 1 errors")
    ended_with(0, desk.resume("--fail-on-error", "false"), "3 ok, 1 errors")
    ended_with(1, desk.resume("--fail-on-error", "1"), "3 ok, 1 errors")


def test_local_and_remote_report_alike(desk: EvalDesk, server: Running) -> None:
    """
    E14: callbacks get each row once, and usage sums are the same, for a workflow in the task
    and for an endpoint.
    """
    desk.dataset(items(6))
    told, usage = [], []
    for options in (("--workflow", "flow.py:answer"), ("--endpoint", server.chat)):
        ended_with(0, desk.evaluate(*options, "--on-item", "flow.py:told"), "6 ok", "usage")
        told.append(desk.calls("told"))
        usage.append(desk.json("summary.json")["usage"])
        (desk.path / "told").unlink()
        os.rename(desk.out, desk.path / f"out-{options[0][2:]}")
    assert [{f"i{n} ok": 1 for n in range(6)}] * 2 == told
    names = {"prompt_tokens": 42, "completion_tokens": 12, "total_tokens": 54}
    assert [names, names] == usage


def test_a_faulty_endpoint(desk: EvalDesk, server: Running) -> None:
    """
    Refusals, resets and half answers are asked again; what fails every time is that item's
    error, with the tries that it took, and no other item's.
    """
    faults = ["429:2|a", "500:1|b", "reset:1|c", "half:1|d", "garbage:1|e"]
    questions = [*faults, "500|never", "plain"]
    desk.dataset({"id": q, "question": q} for q in questions)
    ended = desk.evaluate("--endpoint", server.chat, "--max-attempts", 3, "-P", "stream=false")
    ended_with(1, ended, "6 ok, 1 errors", "HTTP 500")
    rows = desk.by_id()
    assert ["A", "B", "C", "D", "E", None, "PLAIN"] == [rows[q]["output"] for q in questions]
    assert [3, 2, 2, 2, 2, 3, 1] == [rows[q]["attempts"] for q in questions]
    asked = Counter(server.asked())
    assert [3, 2, 2, 2, 2, 3, 1] == [asked[q] for q in questions]
    ended_with(1, desk.resume(), "6 ok")
    assert asked == Counter(server.asked())


def test_a_large_output(desk: EvalDesk) -> None:
    """E6: a row of 50 MB is written whole, while the event loop of all others goes on."""
    large = {"id": "l", "question": "?", "do": "large"}
    desk.dataset([{"id": "t", "question": "?", "do": "tick", "s": 3}, large, *items(5, ms=50)])
    ended_with(0, desk.evaluate(), "7 ok")
    rows = desk.by_id()
    assert 50_000_000 == len(rows["l"]["output"])
    # Encoding 50 MB takes tenths of a second on a busy machine, compressing and syncing seconds.
    assert rows["t"]["output"] < 1


def test_progress_without_a_terminal(desk: EvalDesk) -> None:
    """
    E15: `status` reads a live run, and the JSONL file of one can be followed; without a
    terminal there are lines instead of a bar.
    """
    desk.dataset([{"id": "h", "question": "?", "do": "hang"}, *items(3)])
    process = desk.start("--drain", 1, "--sync-interval", 1)
    try:
        desk.wait_for_rows(3, process)
        said = bytearray()
        assert process.stderr is not None
        errors = process.stderr.fileno()
        os.set_blocking(errors, False)

        def has_line() -> bool:
            with contextlib.suppress(BlockingIOError):
                said.extend(os.read(errors, 1 << 16))
            return b"3 of 4 done, 0 errors, 1 running" in said

        wait_until(has_line, timeout_s=60, describe=said.decode)
        assert b"27 tokens" in said
        status = json.loads(desk.desk.call("status", "out", "--json").out)
        assert ("running", 4) == (status["state"], status["sources"]["total"])
        assert family(process.pid)
    finally:
        process.terminate()
        process.wait(timeout=60)
        kill_family(process.pid)


def test_what_is_no_evaluation_is_refused(desk: EvalDesk) -> None:
    """Missing options, a directory with other files, and a run of something else are refused."""
    desk.dataset(items(1))
    ended_with(2, desk.desk.call("eval"), "give one of --output-dir")
    ended_with(2, desk.desk.call("eval", "--resume", "out"), "holds no evaluation")
    ended_with(2, desk.desk.call("eval", "--output-dir", "out", "--dataset", "data.jsonl"),
               "give one of --workflow and --endpoint")  # fmt: skip
    ended_with(10, desk.evaluate("--workflow", "flow.py:absent"), "there is no 'absent'")
    assert not desk.out.exists()
    desk.out.mkdir()
    (desk.out / "precious").touch()
    ended_with(16, desk.evaluate(), "not a run directory")
    assert ["precious"] == [path.name for path in desk.out.iterdir()]


def test_an_empty_dataset(desk: EvalDesk) -> None:
    """Nothing to do is a complete run with an empty result."""
    desk.dataset([])
    ended_with(0, desk.evaluate(), "0 ok, 0 errors, 0 timeouts, 0 missing of 0")
    assert [] == desk.result()
