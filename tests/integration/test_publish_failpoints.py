"""Every point at which publishing can be stopped: nothing that was promised is ever missing.

Each case runs a process that is stopped at one failpoint and reads its promises from a pipe.
All promises so far are checked after every new one, not only at the end: lost work that is
silently done again would pass a check at the end.
"""

from __future__ import annotations

import ast
import itertools
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hpcresume.fs import POSIX, TEMPORARY_PREFIX, digest_of
from hpcresume.ledger.publishing import output_path, publish_pending
from hpcresume.ledger.store import Ledger
from hpcresume.merge.generation import load_newest, read_union
from hpcresume.output.rows import read_frame
from hpcresume.run.directory import AttemptRef, RunDir
from hpcresume.segment.segment import open_segment
from tests.support.places import REPOSITORY, RUN_ID, child_environment, make_run, row, run_child

PACKAGE = REPOSITORY / "hpcresume"
SCENARIOS = {
    "segment": "work", "part": "work", "file": "work", "ledger": "work", "generation": "merge",
    "manifest": "start", "plan": "start", "claim": "start", "mark": "start",
    "record": "start", "probe": "start",
}  # fmt: skip
"""Which scenario drives a label; every other label is published under by itself."""


def calls() -> Iterator[ast.Call]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield node


def failpoints_in_source() -> tuple[set[str], set[str], set[str]]:
    """Return literal failpoints, labels of publishing, and the steps each label has."""
    literal, labels, steps = set(), set(), set()
    for call in calls():
        labels |= {
            keyword.value.value
            for keyword in call.keywords
            if keyword.arg == "label" and isinstance(keyword.value, ast.Constant)
        }
        if not (isinstance(call.func, ast.Name) and call.func.id == "failpoint"):
            continue
        (argument,) = call.args
        if isinstance(argument, ast.Constant):
            literal.add(argument.value)
        else:
            assert isinstance(argument, ast.JoinedStr)
            prefix, suffix = argument.values
            assert "label" == ast.unparse(prefix.value)
            steps.add(suffix.value.removeprefix("."))
    return literal, labels, steps


LITERAL, LABELS, STEPS = failpoints_in_source()
ELSEWHERE = {name for name in LITERAL if name.partition(".")[0] not in SCENARIOS}
"""Failpoints of rooms above: of the array task, of the driver."""
MATRIX = sorted({f"{label}.{step}" for label in LABELS for step in STEPS} | (LITERAL - ELSEWHERE))


def test_the_matrix_covers_the_source() -> None:
    """Every label and step that this test knows is in the source, and every step of theirs."""
    expected_steps = {
        "after_create", "after_write", "after_sync", "after_close", "after_rename",
        "after_directory_sync", "after_read_back",
    }  # fmt: skip
    assert expected_steps == STEPS
    assert set(SCENARIOS) - {"ledger"} <= LABELS
    assert {"ledger.before_sync", "ledger.after_commit"} == LITERAL - ELSEWHERE


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_failpoints_of_other_rooms_are_used(name: str) -> None:
    """A failpoint that no test arms proves nothing."""
    others = (p for p in (REPOSITORY / "tests").rglob("*.py") if p != Path(__file__))
    assert any(name in path.read_text(encoding="utf-8") for path in others)


@dataclass
class Promises:
    """What the processes of one case were promised, checked against the run directory."""

    run: RunDir
    local: Path
    receipts: dict[str, tuple[str, set[int]]] = field(default_factory=dict)
    committed: set[int] = field(default_factory=set)
    generations: dict[int, set[int]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    claims: set[str] = field(default_factory=set)
    marks: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def hear(self, line: str) -> None:
        """Take in one line and check everything promised so far."""
        kind, *words = line.split(" ")
        if kind == "receipt":
            self.receipts[words[0]] = (words[1], set(map(int, words[2:])))
        elif kind == "committed":
            self.committed |= set(map(int, words))
        elif kind == "generation":
            self.generations[int(words[0])] = set(map(int, words[1:]))
        elif kind == "file":
            self.files[words[0]] = words[1]
        elif kind == "claim":
            self.claims.add(words[0])
        elif kind == "mark":
            self.marks.append(words[0])
        elif kind == "error":
            self.errors.append(words[0])
        else:
            assert kind in ("run", "done"), line
        self.check()

    def check(self) -> None:
        """Check that published implies recoverable, for everything so far."""
        for name, (digest, sources) in self.receipts.items():
            self._check_receipt(name, digest, sources)
        for path, digest in self.files.items():
            assert digest == digest_of(POSIX, path).hex()
        if self.generations:
            newest = load_newest(self.run)
            assert newest.number >= max(self.generations)
            assert set().union(*self.generations.values()) <= set(newest.completed)
        if self.receipts:
            union = read_union(self.run, max_attempts=3)
            promised = set().union(*(sources for _, sources in self.receipts.values()))
            assert promised <= set(union.completed)
            assert {} == union.bad
        assert len(self.claims) <= 1
        self._check_marks()

    def _check_marks(self) -> None:
        if not self.marks:
            return
        found = iter([kind for _, kind in self.run.marks()])
        heard = [kind for kind, _ in itertools.groupby(self.marks)]
        # In this order, with marks in between that nobody was told of.
        assert all(kind in found for kind in heard)

    def _check_receipt(self, name: str, digest: str, sources: set[int]) -> None:
        path = self.run.attempt_path(AttemptRef(0, 0, 1), name)
        assert digest == digest_of(POSIX, path).hex()
        segment = open_segment(POSIX, path, run_id=RUN_ID)
        segment.verify()
        frames = [read_frame(segment, number)[0] for number in segment.frame_numbers()]
        rows = dict(source for frame in frames for source in frame.sources())
        assert sources <= set(segment.completed)
        assert {s: row(s) for s in sources} == {s: rows[s] for s in sources}
        published = self.run.attempt_path(AttemptRef(0, 0, 1), "files")
        first = f"s{min(sources)}"
        assert first.encode() == POSIX.read(output_path(published, first, "", "f.bin"))


@pytest.fixture
def promises(tmp_path: Path) -> Promises:
    (tmp_path / "local").mkdir()
    return Promises(RunDir(str(tmp_path / "run"), None), tmp_path / "local")


def scenario_of(name: str) -> str:
    return SCENARIOS.get(name.partition(".")[0], "plain")


def run_scenario(promises: Promises, name: str, failpoints: str = "") -> int:
    """Run a scenario, hear its promises as they come, and return its exit status."""
    scenario = scenario_of(name)
    if scenario in ("work", "merge"):
        promises.run = make_run(POSIX, promises.run.path)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.failpoint_child", scenario, promises.run.path,
         str(promises.local), name.partition(".")[0]],
        stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=REPOSITORY,
        env=child_environment({"HPCRESUME_TESTING": "1", "HPCRESUME_FAILPOINTS": failpoints}),
    )  # fmt: skip
    try:
        for line in process.stdout:
            if line.startswith("run "):
                promises.run = RunDir.open(promises.run.path)
            # A line that was cut by the kill was not a promise.
            if line.endswith("\n"):
                promises.hear(line.rstrip("\n"))
        return process.wait()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def recover(promises: Promises) -> None:
    """Publish what the dead process left in its ledger, as another process does."""
    ledger = Ledger.open_verified(str(promises.local / "ledger"))
    try:
        publish_pending(
            ledger,
            promises.run,
            seq=99,
            outputs_root=str(promises.local / "outputs"),
            parts_root=str(promises.local / "parts"),
        )
    finally:
        ledger.close()
    promises.check()
    union = read_union(promises.run, max_attempts=3)
    assert promises.committed <= set(union.completed)


def finish(promises: Promises, name: str) -> None:
    """Run the scenario again without a fault: it completes, and no promise is broken."""
    assert 0 == run_scenario(promises, name)
    if scenario_of(name) == "merge":
        owners = load_newest(promises.run).won
        assert 1 == sum(0 in won for won in owners.values())


LOOPED = ("segment", "part", "ledger", "generation", "mark")
KILLS = [(name, 1) for name in MATRIX] + [
    (name, 3) for name in MATRIX if name.partition(".")[0] in LOOPED
]
# A label that is published under by itself goes through the same lines as the others.
ERRORS = [(name, "raise") for name in MATRIX if name.partition(".")[0] in SCENARIOS] + [
    (name, "enospc") for name in MATRIX
    if name.endswith((".after_write", ".after_sync", ".after_close", ".before_sync"))
    and name.partition(".")[0] in SCENARIOS
]  # fmt: skip


@pytest.mark.parametrize(("name", "hit"), KILLS)
def test_killed_there(promises: Promises, name: str, hit: int) -> None:
    """
    SIGKILL at the failpoint: what was acknowledged is there at every moment, what was
    committed is published by the next process, and that process completes the work.
    """
    status = run_scenario(promises, name, f"{name}=kill:{hit}")
    assert -signal.SIGKILL == status, f"the process was not stopped at {name}"
    if scenario_of(name) == "work" and (promises.local / "ledger" / "data.mdb").exists():
        recover(promises)
    finish(promises, name)


@pytest.mark.parametrize(("name", "action"), ERRORS)
def test_refused_there(promises: Promises, name: str, action: str) -> None:
    """
    An error of the file system at the failpoint: one typed error, nothing promised is missing,
    and the same call succeeds when it is made again.
    """
    assert 0 == run_scenario(promises, name, f"{name}={action}")
    expected = {
        "ledger": "LocalStorageError", "record": "RunDirError", "probe": "RunDirError",
    }.get(name.partition(".")[0], "SharedStorageError")  # fmt: skip
    assert [expected] == promises.errors
    if scenario_of(name) == "work":
        recover(promises)
    leftovers = list(Path(promises.run.path).rglob(f"{TEMPORARY_PREFIX}*"))
    assert [] == leftovers


def test_failpoints_are_inert_outside_of_tests(tmp_path: Path) -> None:
    """Without HPCRESUME_TESTING=1 the variable that arms failpoints does nothing."""
    code = "import sys; from hpcresume.failpoints import failpoint;failpoint('x'); print('alive')"
    armed = {"HPCRESUME_FAILPOINTS": "x=exit"}
    assert "alive\n" == run_child(code, env=armed).stdout
    assert 99 == run_child(code, env={**armed, "HPCRESUME_TESTING": "1"}).returncode


@pytest.mark.parametrize(
    ("armed", "expected"),
    [("x=raise", [1]), ("x=raise:2", [2]), ("x=raise:2+", [2, 3, 4]), (" y=exit , x=raise:4", [4])],
)
def test_a_failpoint_counts_its_hits(armed: str, expected: list[int]) -> None:
    """The number says at which hit the action is taken, a plus from which hit on."""
    code = """
from hpcresume.failpoints import failpoint
for hit in range(1, 5):
    try: failpoint("x")
    except OSError as error: print(hit)
"""
    env = {"HPCRESUME_TESTING": "1", "HPCRESUME_FAILPOINTS": armed}
    assert expected == list(map(int, run_child(code, env=env).stdout.split()))
