"""The wheel carries the data that the package reads."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[3]


def _data(folder: Path) -> set[str]:
    return {
        f"{folder.name}/{path.relative_to(folder)}" for path in folder.rglob("*") if path.is_file()
    }


def test_the_wheel_holds_templates_and_sites_and_finds_them(tmp_path):
    """Every file of templates/ and site/ is in the wheel, and found once it is installed."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    found = installed / "hpcresume" / "_data"
    expected = _data(ROOT / "templates") | _data(ROOT / "site")
    assert expected == _data(found / "templates") | _data(found / "site")
    script = "from hpcresume.config import data_dir; print(data_dir('site'))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(found / "site") == done.stdout.strip()
