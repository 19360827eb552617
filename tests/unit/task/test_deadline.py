"""The deadline that stages can ask for."""

from pathlib import Path

from hpcresume.deadline import seconds_left, write_deadline


def test_no_deadline_is_none(tmp_path: Path) -> None:
    """Where nobody has said by when, there is no limit."""
    assert seconds_left(str(tmp_path)) is None


def test_the_newest_deadline_counts(tmp_path: Path, monkeypatch) -> None:
    """A limit that was changed is the one that stages see, also after it has passed."""
    monkeypatch.setattr("hpcresume.deadline.time.monotonic", lambda: 1000.0)
    write_deadline(str(tmp_path), 1600.0)
    assert 600.0 == seconds_left(str(tmp_path))
    write_deadline(str(tmp_path), 990.5)
    assert -9.5 == seconds_left(str(tmp_path))
    assert ["deadline"] == [path.name for path in tmp_path.iterdir()]
