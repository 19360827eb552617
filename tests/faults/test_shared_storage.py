"""Rows 27 to 42: the file system that holds the run directory fails, lies, lags or hangs."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from hpcresume.errors import EXIT_SAVED
from tests.faults.rig import Rig, make_rig
from tests.support.cli import Command
from tests.support.local import Desk
from tests.support.sharedfs import Rule, SharedFs, shared_fs

slow = pytest.mark.slow
EVERYTHING = (
    "lookup", "getattr", "create", "open", "read", "write", "fsync", "flush", "opendir",
    "readdir", "mkdir", "rename", "link", "fsyncdir",
)  # fmt: skip


def hits(rig: Rig) -> int:
    """Return how often faults struck."""
    assert rig.shared is not None
    return sum(rig.shared.hits().values())


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(Rule("write", "ENOSPC", ".tmp-*", times=1), id="27-full-at-write"),
        pytest.param(Rule("fsync", "EDQUOT", ".tmp-*", times=1), id="28-quota-at-fsync"),
        pytest.param(Rule("flush", "EDQUOT", ".tmp-*", times=1), id="29-quota-at-close"),
        pytest.param(Rule("write", "short", ".tmp-*"), id="30-short-writes", marks=slow),
        pytest.param(Rule("fsync", "EIO", ".tmp-*", times=1), id="31-eio-at-fsync", marks=slow),
        pytest.param(Rule("rename", "ESTALE", "seg-*", times=2), id="32-stale-rename", marks=slow),
        pytest.param(Rule("open", "ESTALE", "seg-*", times=2), id="32-stale-open", marks=slow),
        pytest.param(
            Rule("opendir", "ESTALE", "e0*", times=2), id="32-stale-readdir", marks=slow
        ),
        pytest.param(
            Rule("rename", "ENOENT", "seg-*", after=True), id="33-rename-reply-lost"
        ),
        pytest.param(Rule("fsyncdir", "EINVAL"), id="35-no-directory-sync", marks=slow),
        pytest.param(
            Rule("lookup", "old-size", "seg-*", times=2), id="39-old-size", marks=slow
        ),
    ],
)
def test_row(shared_rig: Rig, rule: Rule) -> None:
    """
    The attempt goes on through it, publishes under a new name, and ends as if nothing had
    happened: each source executed once, the result exact.
    """
    assert shared_rig.shared is not None
    attempt = shared_rig.prepare().begin()
    shared_rig.shared.fault(rule)

    assert 0 == attempt.wait(), attempt.describe()

    assert hits(shared_rig)
    outcome = shared_rig.outcome()
    assert outcome is not None
    assert ("done", shared_rig.n) == (outcome.state, outcome.completed)
    shared_rig.verdict(executions=1)
