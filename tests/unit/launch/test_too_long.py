"""A run whose sources need longer than the time limit stops, and says which and how long."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcresume.config import load_settings
from hpcresume.config.settings import Settings
from hpcresume.launch.rounds import Standing, plan_round, reopen, settle
from hpcresume.merge.plan import Launch, newest_plan, open_plan
from hpcresume.run.directory import AttemptRef, Outcome, RunDir
from hpcresume.run.manifest import Listing, Manifest, write_part
from tests.support.places import Place, publish_segment

USABLE_S = 100.0


class Rounds:
    """A run of ten sources, round by round, without anything running."""

    def __init__(self, directory: Path) -> None:
        """Make the run."""
        self.run: RunDir = Place.make("posix", directory).run()
        write_part(self.run, 1, first=0, listing=Listing((f"s{i}", b"", 1.0) for i in range(10)))
        self.manifest = Manifest.open(self.run)
        found = load_settings(site=None, start_dir=directory, environ={}, flags={})
        self.settings: Settings = found.settings

    def plan(self, tasks: int = 1) -> int:
        """Plan a round over what is left, by hand."""
        reopen(self.run, quarantined=False)
        standing = settle(self.run, self.manifest, self.settings)
        return plan_round(
            self.run, self.manifest, standing, after=newest_plan(self.run),
            settings=self.settings, code=1, launch=Launch("slurm", tasks),
        )  # fmt: skip

    def attempt(
        self,
        round_: int,
        done: list[int],
        ran: dict[int, float],
        *,
        task: int = 0,
        usable_s: float = USABLE_S,
    ) -> None:
        """Let a task's attempt complete some sources and be interrupted on others."""
        ref: AttemptRef = self.run.allocate_attempt(round_, task)
        publish_segment(self.run, (round_, task, ref.epoch), 1, done, ran=ran)
        outcome = Outcome("saved", "", "time-limit", completed=len(done), usable_s=usable_s)
        self.run.write_record(self.run.attempt_path(ref, "outcome.json"), outcome, label="outcome")

    def settle(self) -> Standing:
        """Unite and decide, as the merge step does."""
        return settle(self.run, self.manifest, self.settings, judge=True)


@pytest.fixture
def rounds(tmp_path: Path) -> Rounds:
    """Return a run."""
    return Rounds(tmp_path)


def test_only_long_sources_are_left(rounds: Rounds) -> None:
    """The run stops at once, naming the sources, their seconds, the limit and the command."""
    rounds.attempt(rounds.plan(), [0, 1, 2, 3, 4, 5, 6, 7], {8: 98.0, 9: 99.6})

    reason = rounds.settle().stopped

    assert "2 sources need longer than the time limit, which leaves 100 s for work" in reason
    assert "'s9' (100 s), 's8' (98 s)" in reason
    assert f"hpcresume submit {rounds.run.path} --time" in reason


@pytest.mark.parametrize(
    ("ran", "usable_s"),
    [
        ({8: 98.0}, USABLE_S),  # source 9 was never started
        ({8: 98.0, 9: 60.0}, USABLE_S),  # source 9 had little more than half of the time
        ({8: 98.0, 9: 99.0}, 0.0),  # nobody knows the limit
    ],
)
def test_others_may_finish(rounds: Rounds, ran: dict[int, float], usable_s: float) -> None:
    """While a source is left that has not had nearly the whole time, the run goes on."""
    rounds.attempt(rounds.plan(), [0, 1, 2, 3, 4, 5, 6, 7], ran, usable_s=usable_s)
    assert "" == rounds.settle().stopped


def test_a_longer_limit_takes_them_up(rounds: Rounds) -> None:
    """
    After a submission by hand they are planned again, with half of what they ran so that they
    are started once more even where the limit is the old one, and the run goes on.
    """
    rounds.attempt(rounds.plan(), list(range(9)), {9: 99.0})
    assert rounds.settle().stopped
    round_ = rounds.plan()
    assert {9: 49.5} == open_plan(rounds.run, round_).shard(0).ran
    rounds.attempt(round_, [], {9: 50.0}, usable_s=1000.0)
    assert "" == rounds.settle().stopped
    rounds.attempt(round_, [9], {}, usable_s=1000.0)
    standing = rounds.settle()
    assert (0, "") == (len(standing.remainder), standing.stopped)


def test_the_limit_is_that_of_the_longest_attempt(rounds: Rounds) -> None:
    """An attempt that began late does not make the limit shorter for the others."""
    round_ = rounds.plan(tasks=2)
    rounds.attempt(round_, list(range(9)), {}, usable_s=200.0)
    rounds.attempt(round_, [], {9: 99.0}, task=1, usable_s=100.0)
    assert "" == rounds.settle().stopped
