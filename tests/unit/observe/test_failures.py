"""What is told of sources that failed."""

from __future__ import annotations

from hpcresume.observe.failures import failed_sources
from hpcresume.run.manifest import Manifest
from tests.support.runs import make_run


def test_quarantined_sources_come_first_in_manifest_order(tmp_path):
    """Each failed source is listed once, with its last failure and all its attempts."""
    made = make_run(tmp_path, sources=6)
    failures = [
        made.failure(5, retry=False),
        made.failure(1),
        made.failure(2, retry=False),
        made.failure(1, message="again", attempt=2),
    ]
    made.publish(made.attempt(), [[0]], failures=failures)
    found = failed_sources(Manifest.open(made.run), made.union())

    assert [
        ("s2.txt", "quarantined", 1, "bad input"),
        ("s5.txt", "quarantined", 1, "bad input"),
        ("s1.txt", "failing", 2, "again"),
    ] == [(f.source, f.state, f.attempts, f.message) for f in found]


def test_completed_and_withdrawn_sources_are_not_listed(tmp_path):
    """A source that succeeded later, or is no longer listed, is no failure."""
    made = make_run(tmp_path, sources=3)
    made.publish(made.attempt(), failures=[made.failure(0), made.failure(1)])
    made.publish(made.attempt(), [[0]])
    made.withdraw(1)

    assert [] == failed_sources(Manifest.open(made.run), made.union())
