"""Whether a Ray head starts on this node, and whom it lets in."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

from hpcresume.doctor.check import Check, last_line, read_back
from hpcresume.errors import LocalStorageError

RAY_TIMEOUT_S = 120.0

# Ray's own client retries for 20 s before it says that it was refused; this one says so at once.
STRANGER = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(address=sys.argv[1]).internal_kv_keys(b"", b"", timeout=30)
except AuthenticationError:
    print("refused")
else:
    print("let in")
"""


def check_ray(
    make_ray_temp: Callable[[], str], *, timeout_s: float = RAY_TIMEOUT_S
) -> Iterator[Check]:
    """Whether a Ray head starts here and refuses who lacks its token.

    Args:
        make_ray_temp: Creates Ray's directory, or raises LocalStorageError.
        timeout_s: For the head to come up, and again for the refusal.
    """
    try:
        temp = make_ray_temp()
    except LocalStorageError as error:
        yield Check("ray", "head", "wrong", str(error), "make /tmp writable")
        return
    command = [sys.executable, "-m", "hpcresume.doctor", "ray", temp]
    with tempfile.TemporaryFile() as err:
        started = time.monotonic()
        head = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
            start_new_session=True,
        )
        watchdog = threading.Timer(timeout_s, head.kill)
        watchdog.start()
        try:
            assert head.stdout is not None
            address = head.stdout.readline().strip()
            watchdog.cancel()
            if address:
                found = f"up in {time.monotonic() - started:.1f} s"
                yield Check("ray", "head", "ok", found)
                yield _stranger(address, timeout_s=timeout_s)
            else:
                head.wait(timeout=10)
                remedy = "without Ray a run takes --engine inline"
                yield Check(
                    "ray", "head", "wrong", last_line(read_back(err)) or "no answer", remedy
                )
        finally:
            watchdog.cancel()
            _end(head)
    shutil.rmtree(temp, ignore_errors=True)


def _stranger(address: str, *, timeout_s: float) -> Check:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    stranger = subprocess.Popen(
        [sys.executable, "-c", STRANGER, address],
        env={**environment, "RAY_AUTH_MODE": "disabled"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = stranger.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        stranger.kill()
        out, err = stranger.communicate()
    if "refused" in out:
        return Check("ray", "token", "ok", "a client without the token is refused")
    if "let in" in out:
        remedy = "other users of the node could run code as you; install ray >= 2.59"
        return Check("ray", "token", "wrong", "a client without the token was let in", remedy)
    found = f"not found out: {last_line(err) or 'no answer'}"
    remedy = "whether other users of the node are kept out is open; see the versions above"
    return Check("ray", "token", "warning", found, remedy)


def keep_head(temp: str) -> None:
    """Bring a head up, say where, and keep it until stdin ends."""
    from hpcresume.engine.ray_environment import prepare_environment

    prepare_environment()
    import ray

    from hpcresume.engine.head import HeadResources, RayHead

    head = RayHead(temp, HeadResources(cpus=1, gpus=0, memory_bytes=1 << 30))
    try:
        os.write(1, f"{ray.get_runtime_context().gcs_address}\n".encode())
        sys.stdin.read()
    finally:
        head.close()


def _end(process: subprocess.Popen[str]) -> None:
    """End a head by closing its stdin, and by force if that does not help."""
    try:
        process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
