"""A database server that fails now and then, which is no reason for a testbed not to come up."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcresume.errors import TestbedError
from hpcresume.testbed import daemons
from hpcresume.testbed.state import Layout

INSTALL = """#!/bin/sh
echo once >> {calls}
[ "$(wc -l < {calls})" -gt {failures} ] && exit 0
touch {data}/left
echo "Installing tables ..."
echo "[ERROR] InnoDB: no luck"
echo "a page of general advice"
exit 1
"""


@pytest.mark.parametrize(("failures", "tries"), [(2, 3), (3, 3)])
def test_a_database_is_made_within_three_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int, tries: int
) -> None:
    """Each begins with an empty directory; after the last the error says what went wrong."""
    layout, calls = Layout(tmp_path), tmp_path / "calls"
    program = tmp_path / "mariadb-install-db"
    program.write_text(
        INSTALL.format(calls=calls, failures=failures, data=layout.database), encoding="utf-8"
    )
    program.chmod(0o755)
    monkeypatch.setattr(daemons, "SEARCH_PATH", f"{tmp_path}:{daemons.SEARCH_PATH}")
    if failures < tries:
        daemons.make_database(layout)
        assert [] == list(layout.database.iterdir())
    else:
        with pytest.raises(TestbedError, match=r"be made: \[ERROR\] InnoDB: no luck$"):
            daemons.make_database(layout)
    assert tries == len(calls.read_text().splitlines())
