"""Headless Chromium, for what is shown on a page; Debian's package, installed on request."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hpcresume.errors import TestbedError

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--window-size=1100,3000", "--virtual-time-budget=30000",
    "--enable-logging=stderr",
)  # fmt: skip
_DARK = "--blink-settings=preferredColorScheme=0"


def install() -> None:
    """Install Chromium with apt, unless it is there.

    Raises:
        TestbedError: apt failed.
    """
    if shutil.which("chromium"):
        return
    line = ["apt-get", "install", "-y", "--no-install-recommends", "chromium", "fonts-dejavu-core"]
    done = subprocess.run(
        line, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, check=False
    )
    if done.returncode:
        raise TestbedError(f"{' '.join(line)} exited with {done.returncode}")


def require() -> None:
    """Skip a test without Chromium, or fail it where everything was to be installed."""
    if shutil.which("chromium"):
        return
    if os.environ.get("HPCRESUME_TEST_REQUIRE_SLURM"):
        pytest.fail("no chromium: python -m tests --install")
    pytest.skip("no chromium: python -m tests --install")


@dataclass(frozen=True)
class Page:
    """A page as the browser made it of a file.

    Attributes:
        dom: Its HTML after its scripts ran.
        complaints: What its console said.
    """

    dom: str
    complaints: list[str]

    def values(self) -> dict[str, str]:
        """Return the text of every element with ``data-value``, by that name."""
        parser = _Values()
        parser.feed(self.dom)
        return parser.found


class _Values(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._name: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._name = dict(attrs).get("data-value")

    def handle_data(self, data: str) -> None:
        if self._name is not None:
            self.found[self._name] = data.strip()
            self._name = None


def load(path: Path, *, dark: bool = False) -> Page:
    """Load a file in a browser of its own and return the page."""
    done = _run(path, "--dump-dom", *([_DARK] if dark else []))
    return Page(done.stdout, re.findall(r"^.*CONSOLE.*$", done.stderr, flags=re.MULTILINE))


def print_pdf(path: Path, pdf: Path) -> None:
    """Print a page to a file."""
    _run(path, f"--print-to-pdf={pdf}", "--no-pdf-header-footer")


def _run(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory(
        prefix="hpcr-chromium-", ignore_cleanup_errors=True
    ) as profile:
        argv = ["chromium", *_FLAGS, f"--user-data-dir={profile}", *arguments, path.as_uri()]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert 0 == done.returncode, done.stderr
    return done
