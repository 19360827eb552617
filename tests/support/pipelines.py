"""Pipelines of known answer, as files that tests hand to the command."""

from __future__ import annotations

import json
from pathlib import Path

FAN = '''
import os
import time
import hpcresume as hr


def pipeline(n: int = 200, ms: int = 10, calls: str = "") -> hr.Pipeline:
    """Source i gives i % 21 rows; every execution of a source is counted in ``calls``."""

    def work(i):
        if calls:
            fd = os.open(calls, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.write(fd, b"%d\\n" % i)
            os.close(fd)
        time.sleep(ms / 1000)
        return i

    def fan(i):
        for k in range(i % 21):
            yield {"i": i, "k": k}

    return hr.Pipeline(name="fan", sources=hr.indexed(n), stages=[work, fan])
'''


def write_fan(directory: Path) -> Path:
    """Write the fan-out pipeline and return its path."""
    path = directory / "fan.py"
    path.write_text(FAN)
    return path


def fan_result(n: int = 200) -> bytes:
    """Return what collecting the fan-out pipeline over ``n`` sources gives."""
    rows = ({"i": i, "k": k} for i in range(n) for k in range(i % 21))
    return b"".join(json.dumps(row, separators=(",", ":")).encode() + b"\n" for row in rows)
