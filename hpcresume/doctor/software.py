"""Versions of what a run uses."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata

from hpcresume.doctor.check import Check, last_line

_MODULES = ("ray", "submitit", "lmdb", "pyroaring", "filelock", "cloudpickle", "msgspec")
# In a child: a build for another processor ends whoever imports it.
_LMDB = "import lmdb; print(*lmdb.version()); print(*lmdb.version(True))"


def check_software() -> Iterator[Check]:
    """Versions of what a run uses, and whether LMDB is the hardened build."""
    versions = [f"{name} {metadata.version(name)}" for name in ("hpcresume", *_MODULES)]
    yield Check(
        "software", "versions", "ok", f"Python {platform.python_version()}, " + ", ".join(versions)
    )
    done = subprocess.run(
        [sys.executable, "-c", _LMDB], capture_output=True, text=True, timeout=60, check=False
    )
    plain, _, patched = done.stdout.strip().partition("\n")
    if done.returncode:
        yield Check(
            "software",
            "lmdb build",
            "wrong",
            f"it cannot be imported: {last_line(done.stderr) or f'exit {done.returncode}'}",
            "install the wheel for this processor: pip install --force-reinstall lmdb",
        )
    elif patched == plain:
        yield Check(
            "software",
            "lmdb build",
            "warning",
            f"LMDB {plain.replace(' ', '.')} of the system, without the package's own patches",
            "install the wheel: pip install --force-reinstall --only-binary :all: lmdb",
        )
    else:
        yield Check("software", "lmdb build", "ok", f"LMDB {patched.replace(' ', '.')}, hardened")
