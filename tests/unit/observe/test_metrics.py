"""A run's status as OpenMetrics text."""

from __future__ import annotations

import stat

import pytest
from click.testing import CliRunner
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from hpcresume.cli import cli
from hpcresume.errors import UsageError
from hpcresume.observe.metrics import openmetrics, write_metrics
from hpcresume.observe.status import read_status
from hpcresume.segment.segment import Progress, StageCount
from tests.support.runs import make_run


def samples(text):
    """Return each sample's value by its name and its labels but for those that all have."""
    found = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            rest = tuple(v for k, v in one.labels.items() if k not in {"pipeline", "run"})
            found[(one.name, *rest)] = one.value
    return found


def test_the_text_is_openmetrics_and_says_what_status_says(tmp_path):
    """The reference parser reads it, and every count is that of `status --json`."""
    made = make_run(tmp_path, sources=10, name='a "quoted"\\ run')
    progress = Progress(elapsed_s=2.0, in_flight=2, completed=5, left=4)
    made.publish(
        made.attempt(),
        [range(4)],
        failures=[made.failure(8, retry=False)],
        progress=progress,
        stages=[StageCount("parse", 5, 5, 0, 0, 1.5)],
    )
    found = read_status(made.run)
    read = samples(openmetrics(found))

    sources = found.to_dict()["sources"]
    assert sources == {k[1]: v for k, v in read.items() if k[0] == "hpcresume_sources"}
    assert [1.0] == [v for k, v in read.items() if k == ("hpcresume_run_state", "running")]
    assert (2.5, 1.5) == (
        read[("hpcresume_rate_per_second",)],
        read[("hpcresume_stage_busy_seconds", "parse")],
    )
    assert found.eta_s == read[("hpcresume_eta_seconds",)]


def test_labels_survive_quotes_and_backslashes(tmp_path):
    """A run directory may be called anything."""
    made = make_run(tmp_path, name='a "quoted"\\ run')
    families = list(text_string_to_metric_families(openmetrics(read_status(made.run))))

    assert {made.path} == {one.labels["run"] for family in families for one in family.samples}


def test_the_file_is_replaced_at_once_and_can_be_read_by_the_exporter(tmp_path):
    """Nothing else is left beside it, and its mode lets another user read it."""
    made = make_run(tmp_path, sources=1)
    target = tmp_path / "metrics" / "run.prom"
    target.parent.mkdir()
    target.write_text("old")
    result = CliRunner().invoke(cli, ["status", made.path, "--metrics", str(target)])

    assert 0 == result.exit_code
    assert ["run.prom"] == [path.name for path in target.parent.iterdir()]
    assert "hpcresume_sources" in target.read_text()
    assert 0o644 == stat.S_IMODE(target.stat().st_mode)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    """The message names the file and says that the run goes on."""
    made = make_run(tmp_path, sources=1)
    target = tmp_path / "missing" / "run.prom"

    with pytest.raises(UsageError, match=r"missing/run\.prom.*run is not affected"):
        write_metrics(read_status(made.run), target)
