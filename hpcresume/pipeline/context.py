"""What a stage is given besides its item: the item's context and its worker.

The engine makes both and closes both; a stage only uses them.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from hpcresume.deadline import is_stopping
from hpcresume.errors import PipelineError, StageStartError
from hpcresume.ids import ItemPath, encode_path
from hpcresume.pipeline.child import (
    Argument,
    child_environment,
    command_text,
    exit_status,
    file_tail,
    run_command,
    signal_group,
    status_text,
)
from hpcresume.pipeline.sentinels import WorkerBroken

_LOGGER = logging.getLogger("hpcresume.stage")
_POLL_S = 0.05
_PROBE_TIMEOUT_S = 2.0
_TERM_GRACE_S = 5.0


def item_seed(run_id: str, source_id: str, stage: str, path: ItemPath) -> int:
    """Return an item's seed: 63 bits, the same on every attempt."""
    parts = (run_id, source_id, stage, encode_path(path))
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return int.from_bytes(digest.digest(), "big") >> 1


class Context:
    """One item's view of the run.

    Attributes:
        source_id: Id of the source that the item descends from.
        item_id: Id of the item, ``<source>/<stage>.<n>/...``.
        attempt: Which try of the source this is, from 1.
        seed: 63-bit integer, the same on every attempt of this item.
    """

    __slots__ = (
        "_outputs",
        "_outputs_root",
        "_scratch",
        "_scratch_root",
        "_seconds_left",
        "attempt",
        "item_id",
        "seed",
        "source_id",
    )

    def __init__(
        self,
        *,
        source_id: str,
        item_id: str,
        attempt: int,
        seed: int,
        scratch_root: Path,
        outputs_root: str | os.PathLike[str] | None,
        seconds_left: Callable[[], float | None],
    ) -> None:
        self.source_id = source_id
        self.item_id = item_id
        self.attempt = attempt
        self.seed = seed
        self._scratch_root = scratch_root
        self._outputs_root = outputs_root
        self._seconds_left = seconds_left
        self._scratch: Path | None = None
        self._outputs: dict[str, None] | None = None

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger whose lines begin with the item's id."""
        return _PrefixedLog(_LOGGER, {"prefix": self.item_id})

    @property
    def scratch(self) -> Path:
        """An empty node-local directory of this item, removed after it."""
        if self._scratch is None:
            self._scratch_root.mkdir(parents=True, exist_ok=True)
            self._scratch = Path(tempfile.mkdtemp(prefix="item-", dir=self._scratch_root))
        return self._scratch

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names that were asked for through :meth:`output`, each once, in order."""
        return tuple(self._outputs or ())

    def output(self, name: str | os.PathLike[str]) -> Path:
        """Return where to write a file that belongs to this item's source.

        The file is published before the source counts as complete, and only the files of
        the attempt that completed it are kept.

        Args:
            name: Relative path with ``/``; its directories are made.

        Raises:
            PipelineError: The name is empty, absolute, or leads out with ``..``; or the
                pipeline runs where files are not kept.
        """
        if self._outputs_root is None:
            raise PipelineError(
                f"item {self.item_id}: output({os.fspath(name)!r}) has nowhere to go. "
                "This run keeps no files. Return the data as rows."
            )
        relative = _checked_output(name, self.item_id)
        path = Path(self._outputs_root, relative)
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._outputs is None:
            self._outputs = {}
        self._outputs[str(relative)] = None
        return path

    def run(
        self,
        argv: Sequence[Argument],
        *,
        timeout_s: float | None = None,
        check: bool = True,
        **popen: Any,
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command in a process group of its own and wait for it.

        Standard output and error are captured as text unless ``popen`` says otherwise, and
        nothing of Slurm or MPI is left in the environment, so that the command does not take
        itself for a rank of this job.  In an async stage: ``await asyncio.to_thread(ctx.run,
        ...)``.

        Args:
            argv: Program and arguments; no shell.
            timeout_s: Kill the group after this many seconds.
            check: Raise when the command ends with a status other than 0.
            **popen: Arguments of ``subprocess.Popen``, or ``input``.

        Raises:
            subprocess.CalledProcessError: The status is not 0; the message holds the last
                lines of standard error.
            subprocess.TimeoutExpired: It ran past ``timeout_s``; the same.
            FileNotFoundError: There is no such program.
        """
        return run_command(argv, timeout_s=timeout_s, check=check, popen=popen)

    def seconds_left(self) -> float | None:
        """Return the seconds until this item has to be done; None where there is no limit."""
        return self._seconds_left()

    def close(self) -> None:
        """Remove the scratch directory if one was made; for whoever made the context."""
        if self._scratch is not None:
            # What cannot be removed goes with the attempt's directory.
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None


@dataclass(frozen=True, slots=True)
class _Server:
    process: subprocess.Popen[bytes]
    argv: tuple[str, ...]
    output: Path

    def ended(self) -> str | None:
        """Return how the process ended, with its last words; None while it runs."""
        status = exit_status(self.process)
        if status is None:
            return None
        return f"{command_text(self.argv)} ended with {status_text(status)}{self.last_words()}"

    def last_words(self) -> str:
        tail = file_tail(self.output)
        return f". Its last words:\n{tail}" if tail else ", without a word"


class Worker:
    """The process that a stage's instance lives in.

    Attributes:
        index: Number of this worker among those of its stage, from 0.
        cpus: Cores it holds.
        gpus: GPUs it holds.
        attempt: Node-local directory of the attempt, None where there is no attempt.
    """

    def __init__(
        self,
        *,
        index: int,
        cpus: float,
        gpus: float,
        scratch: Path,
        attempt: Path | None = None,
    ) -> None:
        self.index = index
        self.cpus = cpus
        self.gpus = gpus
        self.attempt = attempt
        self._scratch = scratch
        self._servers: list[_Server] = []
        self._ports: set[int] = set()

    @property
    def scratch(self) -> Path:
        """A node-local directory that lives as long as the worker."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        return self._scratch

    @property
    def is_stopping(self) -> bool:
        """Whether the attempt takes no more sources, and ends when what is in flight is done."""
        return self.attempt is not None and is_stopping(str(self.attempt))

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger whose lines begin with the worker's number."""
        return _PrefixedLog(_LOGGER, {"prefix": f"worker {self.index}"})

    def free_port(self) -> int:
        """Return a TCP port that was free just now, never the same one twice."""
        while True:
            with socket.socket() as probe:
                probe.bind(("", 0))
                port: int = probe.getsockname()[1]
            if port not in self._ports:
                self._ports.add(port)
                return port

    def spawn(
        self,
        argv: Sequence[Argument],
        *,
        ready: str | Callable[[], bool] | None,
        timeout_s: float = 60,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a server in a process group of its own and wait until it is ready.

        Its output goes to a file in :attr:`scratch`; it ends with the worker.

        Args:
            argv: Program and arguments; no shell.
            ready: ``http(s)://...``, polled until it answers with a status below 500;
                ``tcp://host:port``, until it accepts; a function, until it returns True;
                None: do not wait.
            timeout_s: Give up after this many seconds.
            env: Variables to set over this process's environment, which loses what is
                Slurm's and MPI's.

        Raises:
            StageStartError: It ended early or was not ready in time; the message holds the
                last lines of its output, and its group is killed.
            PipelineError: ``ready`` is none of the above.
        """
        is_ready = _readiness(ready)
        server = self._start([os.fspath(part) for part in argv], env)
        try:
            _await_ready(server, is_ready, timeout_s)
        except BaseException:
            _end([server], grace_s=0)
            raise
        self._servers.append(server)
        return server.process

    def check(self) -> None:
        """Raise when a spawned process has died.

        Raises:
            WorkerBroken: Names each of them, with its last words.
        """
        dead = [ended for server in self._servers if (ended := server.ended()) is not None]
        if dead:
            raise WorkerBroken("; ".join(dead))

    def close(self) -> None:
        """End what was spawned (SIGTERM, 5 s later SIGKILL) and remove the scratch directory."""
        servers, self._servers = self._servers, []
        _end(servers, grace_s=_TERM_GRACE_S)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _start(self, argv: list[str], env: Mapping[str, str] | None) -> _Server:
        program = "".join(c for c in Path(argv[0]).name if c.isalnum() or c in "._-")
        handle, name = tempfile.mkstemp(prefix=f"{program}-", suffix=".log", dir=self.scratch)
        with open(handle, "wb") as output:
            try:
                process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=child_environment(env),
                    process_group=0,
                )
            except OSError as error:
                raise StageStartError(
                    f"{command_text(argv)} cannot be started: {error.strerror}. "
                    "The stage needs it. Check the program's name and that it is on PATH here."
                ) from error
        return _Server(process, tuple(argv), Path(name))


class _PrefixedLog(logging.LoggerAdapter[logging.Logger]):
    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        prefix = (self.extra or {})["prefix"]
        return f"{prefix}: {msg}", kwargs


def _checked_output(name: str | os.PathLike[str], item_id: str) -> PurePosixPath:
    text = os.fspath(name)
    path = PurePosixPath(text)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in text:
        raise PipelineError(
            f"item {item_id}: output({text!r}) is not a name under the source's own directory. "
            "Give a relative path without '..'."
        )
    return path


def _readiness(ready: str | Callable[[], bool] | None) -> Callable[[], bool]:
    if ready is None:
        return lambda: True
    if callable(ready):
        return ready
    url = urlsplit(ready)
    if url.scheme == "tcp" and url.hostname and url.port:
        host, port = url.hostname, url.port
        return lambda: _accepts(host, port)
    if url.scheme in ("http", "https") and url.hostname:
        return lambda: _answers(ready)
    raise PipelineError(
        f"spawn(ready={ready!r}): give http://host:port/path, tcp://host:port or a function."
    )


def _accepts(host: str, port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((host, port), timeout=_PROBE_TIMEOUT_S).close()
        return True
    return False


def _answers(text: str) -> bool:
    """Ask directly: a site's proxy variables must not be in the way of a local server."""
    connection = _connection(text)
    url = urlsplit(text)
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    try:
        connection.request("GET", target)
        return connection.getresponse().status < 500
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _connection(text: str) -> http.client.HTTPConnection:
    url = urlsplit(text)
    assert url.hostname is not None
    if url.scheme == "http":
        return http.client.HTTPConnection(url.hostname, url.port, timeout=_PROBE_TIMEOUT_S)
    import ssl

    # Whether it answers is asked, not who it is: local servers sign for themselves.
    unverified = ssl.create_default_context()
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(
        url.hostname, url.port, timeout=_PROBE_TIMEOUT_S, context=unverified
    )


def _await_ready(server: _Server, is_ready: Callable[[], bool], timeout_s: float) -> None:
    pause = threading.Event()
    deadline = time.monotonic() + timeout_s
    while True:
        answered = is_ready()
        ended = server.ended()
        if ended is not None:
            raise StageStartError(
                f"{ended}\nIt ended before it was ready, so the stage cannot start."
            )
        if answered:
            return
        if time.monotonic() >= deadline:
            raise StageStartError(
                f"{command_text(server.argv)} was not ready after {timeout_s:g} s"
                f"{server.last_words()}\nThe stage cannot start without it. "
                "Give spawn() a longer timeout_s if it was on its way."
            )
        pause.wait(_POLL_S)


def _end(servers: Iterable[_Server], *, grace_s: float) -> None:
    servers = list(servers)
    pause = threading.Event()
    deadline = time.monotonic() + grace_s
    if grace_s:
        for server in servers:
            signal_group(server.process, signal.SIGTERM)
    while time.monotonic() < deadline and any(exit_status(s.process) is None for s in servers):
        pause.wait(_POLL_S)
    for server in servers:
        signal_group(server.process, signal.SIGKILL)
    for server in servers:
        server.process.wait()
