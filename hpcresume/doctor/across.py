"""What two nodes see of each other's files: one job of two tasks, conducted from here.

Orders travel over srun's standard input, which every task reads, and answers come back on its
output.  So what is measured does not depend on the file system that is measured, nor on the
nodes' clocks: the reader starts to look when the writer has said that it is done.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from hpcresume import slurm
from hpcresume.doctor.check import Check, answer, last_line, read_back
from hpcresume.errors import HpcResumeError

WAIT_S = 300
"""Seconds to wait for two free nodes."""

_LIMIT_MIN = 5
_ANSWER_S = 90.0
_LOOK_S = 60.0
_POLL_S = 0.005
_LATE_S = 1.0
_CLOCK_S = 2.0
_NAMES = 64
_FILES = 5
_RENAMES = 200
_ROUNDS = 5
_SIZE = 4096
_WRITER, _READER = 0, 1


class _NoAnswerError(HpcResumeError):
    """The tasks do not answer: srun ended, or a node hangs."""


class _RefusedError(HpcResumeError):
    """The file system refused something on one of the nodes."""


def check_across(
    path: str,
    *,
    nodes: int,
    options: Sequence[str] = (),
    python: Sequence[str] = (),
    wait_s: int = WAIT_S,
) -> Iterator[Check]:
    """Submit a job of two nodes and find out what they see of each other's files.

    Args:
        path: A directory that both nodes see; a directory below it is made and removed.
        nodes: How many nodes; the first two are compared.
        options: Further options of srun: account, partition and the like.
        python: The words that start Python on a node; empty: this interpreter.
        wait_s: Give up when no nodes are free for so long.
    """
    folder = ""
    try:
        folder = tempfile.mkdtemp(prefix=".hpcresume-doctor-", dir=_existing(path))
        with _Tasks(folder, nodes, options, python, wait_s) as tasks:
            tasks.await_start()
            for probe in _PROBES:
                yield probe(tasks)
    except OSError as error:
        remedy = "check owner, mode, space and quota, or use another directory"
        yield Check("nodes", "write", "wrong", str(error), remedy)
    except _RefusedError as error:
        remedy = "put runs on a file system that every node sees and may write"
        yield Check("nodes", "shared directory", "wrong", str(error), remedy)
    except _NoAnswerError as error:
        remedy = "give what your jobs ask for in hpcresume.toml, [request]; see: sinfo, squeue --me"
        yield Check("nodes", "srun", "wrong", str(error), remedy)
    except HpcResumeError as error:
        yield Check("nodes", "srun", "wrong", str(error), "run it where srun works")
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _existing(path: str) -> str:
    path = os.path.abspath(path)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


class _Tasks:
    """The two tasks of a running job."""

    def __init__(
        self,
        folder: str,
        nodes: int,
        options: Sequence[str],
        python: Sequence[str],
        wait_s: int,
    ) -> None:
        self.folder, self._wait_s = folder, wait_s
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed at the end
        size = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
        size += ["--cpus-per-task=1", f"--time={_LIMIT_MIN}", f"--immediate={wait_s}"]
        command = [*(python or [sys.executable]), "-m", "hpcresume.doctor", "across", folder]
        self._srun = slurm.srun(
            [*size, "--job-name=hpcresume-doctor", *options], command, errors=self._errors
        )
        assert self._srun.stdout is not None
        os.set_blocking(self._srun.stdout.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._srun.stdout, selectors.EVENT_READ)
        self._rest = b""

    def __enter__(self) -> Self:
        return self

    def await_start(self) -> None:
        """Wait until both tasks run."""
        self._collect({_WRITER, _READER}, time.monotonic() + self._wait_s + _ANSWER_S)

    def __exit__(self, *_: object) -> None:
        assert self._srun.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._srun.stdin.close()
        try:
            self._srun.wait(timeout=10)
        except subprocess.TimeoutExpired:
            # srun hands it on to the tasks, or gives up waiting for nodes.
            self._srun.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._srun.wait(timeout=10)
        self._selector.close()
        self._errors.close()

    def ask(self, task: int, do: str, **values: object) -> dict[str, Any]:
        """Have one task do something and return what came of it."""
        return self._ask({task}, do, values)[task]

    def ask_both(self, do: str, **values: object) -> dict[int, dict[str, Any]]:
        """Have both tasks do something at the same time."""
        return self._ask({_WRITER, _READER}, do, values)

    def _ask(
        self, wanted: set[int], do: str, values: Mapping[str, object]
    ) -> dict[int, dict[str, Any]]:
        assert self._srun.stdin is not None
        order = {"to": sorted(wanted), "do": do, **values}
        try:
            self._srun.stdin.write(json.dumps(order).encode() + b"\n")
            self._srun.stdin.flush()
        except BrokenPipeError:
            raise self._gone() from None
        return self._collect(wanted, time.monotonic() + _ANSWER_S)

    def _collect(self, wanted: set[int], deadline: float) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        while set(found) != wanted:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                text = "the nodes do not answer; the file system may hang on one of them"
                raise _NoAnswerError(text)
            for line in self._lines():
                if "error" in line:
                    raise _RefusedError(line["error"])
                if line["task"] in wanted:
                    found[line["task"]] = line
        return found

    def _lines(self) -> Iterator[dict[str, Any]]:
        assert self._srun.stdout is not None
        data = os.read(self._srun.stdout.fileno(), 1 << 16)
        if not data:
            raise self._gone()
        *lines, self._rest = (self._rest + data).split(b"\n")
        # A prologue of the centre may print, too.
        yield from (json.loads(line) for line in lines if line.startswith(b'{"task"'))

    def _gone(self) -> _NoAnswerError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._srun.wait(timeout=10)
        why = last_line(read_back(self._errors)) or f"exit status {self._srun.returncode}"
        return _NoAnswerError(f"srun ended: {why}")


# -- what is looked at ----------------------------------------------------------------------


def _which(tasks: _Tasks) -> Check:
    names = [tasks.ask(task, "name")["node"] for task in (_WRITER, _READER)]
    if len(set(names)) == 1:
        remedy = "what follows holds for one node only; ask for nodes that are free"
        return Check("nodes", "two nodes", "warning", f"both tasks run on {names[0]}", remedy)
    return Check("nodes", "two nodes", "ok", " and ".join(names))


def _visibility(tasks: _Tasks) -> Check:
    """A new file: seconds until the other node lists it, and until it can open it."""
    late = 0.0
    for number in range(_FILES):
        name = f"seen-{number}"
        # A node that has looked for a name in vain may remember that it is absent.
        tasks.ask(_READER, "prime", name=name)
        written = tasks.ask(_WRITER, "write", name=name)
        seen = tasks.ask(_READER, "look", name=name)
        if seen["digest"] != written["digest"]:
            found = f"after {_LOOK_S:g} s the other node does not see it, or sees other bytes"
            remedy = "the merge job would not find results; use another --run-dir"
            return Check("nodes", "a new file", "wrong", found, remedy)
        late = max(late, seen["after_s"])
    if late > _LATE_S:
        found = f"another node sees it up to {late:.1f} s later"
        remedy = "a merge may leave out what is so new, for the next one to find; nothing is lost"
        return Check("nodes", "a new file", "warning", found, remedy)
    return Check("nodes", "a new file", "ok", f"another node sees it within {late:.3f} s")


def _rename(tasks: _Tasks) -> Check:
    """One node replaces a name again and again while the other reads it."""
    tasks.ask(_WRITER, "fill", name="name")
    tasks.ask(_READER, "look", name="name")
    reader = tasks.ask_both("replace", name="name")[_READER]
    if reader["bad"]:
        found = f"{reader['bad']} of {reader['reads']} reads saw half a file"
        remedy = "results could be seen half; use another --run-dir"
        return Check("nodes", "rename", "wrong", found, remedy)
    if reader["absent"] or not reader["final"]:
        found = f"{reader['absent']} of {reader['reads']} reads found no file in between"
        remedy = "nothing that counts is ever replaced; status may say less for a moment"
        return Check("nodes", "rename", "warning", found, remedy)
    found = f"{_RENAMES} replacements, {reader['reads']} reads on another node, each whole"
    return Check("nodes", "rename", "ok", found)


def _exclusive(tasks: _Tasks) -> Check:
    """Both nodes create the same names at once; each must have one winner."""
    won = [name for found in tasks.ask_both("race").values() for name in found["won"]]
    if sorted(won) == list(range(_NAMES)):
        found = f"two nodes, {_NAMES} names, one winner each"
        return Check("nodes", "exclusive create", "ok", found)
    remedy = "attempts cannot be told apart here; use another --run-dir"
    found = f"two nodes won {len(won)} of {_NAMES} names"
    return Check("nodes", "exclusive create", "wrong", found, remedy)


def _lock(tasks: _Tasks) -> Check:
    """Whether a lock that one node holds excludes the other."""
    tasks.ask(_WRITER, "write", name="lock")
    tasks.ask(_READER, "look", name="lock")
    first = tasks.ask(_WRITER, "lock", name="lock")["got"]
    second = tasks.ask(_READER, "lock", name="lock")["got"]
    tasks.ask(_WRITER, "unlock")
    remedy = "nothing that counts rests on locks; two merges at once may do work twice"
    if first != "locked":
        return Check("nodes", "flock", "warning", first, remedy)
    if second == "locked":
        return Check("nodes", "flock", "warning", "locks hold on one node only", remedy)
    return Check("nodes", "flock", "ok", "a lock excludes the other node")


def _clocks(tasks: _Tasks) -> Check:
    """How far the clocks are apart; the smallest of several answers to one order counts."""
    rounds = [tasks.ask_both("clock") for _ in range(_ROUNDS)]
    apart = min(abs(found[_WRITER]["now"] - found[_READER]["now"]) for found in rounds)
    if apart > _CLOCK_S:
        remedy = "a task may take its time limit for later or nearer by as much; tell the centre"
        return Check("nodes", "clocks", "warning", f"{apart:.1f} s apart", remedy)
    return Check("nodes", "clocks", "ok", f"at most {apart:.2f} s apart")


_PROBES: tuple[Callable[[_Tasks], Check], ...] = (
    _which,
    _visibility,
    _rename,
    _exclusive,
    _lock,
    _clocks,
)


# -- what a task does -----------------------------------------------------------------------


def take_part(folder: str) -> None:
    """Be one of the tasks: obey the orders on standard input until it ends."""
    me = int(os.environ["SLURM_PROCID"])
    part = _Part(folder, writer=me == _WRITER)
    answer({"task": me, "ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        if me in order["to"]:
            try:
                found = getattr(part, f"do_{order['do']}")(order.get("name", ""))
            except OSError as error:
                found = {"error": f"on {_node()}: {error}"}
            answer({"task": me, **found})


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


class _Part:
    """What one task does; each method answers one order."""

    def __init__(self, folder: str, *, writer: bool) -> None:
        self._folder, self._writer = Path(folder), writer
        self._locked: int | None = None

    def do_name(self, _name: str) -> dict[str, object]:
        """Say which node this is."""
        return {"node": _node()}

    def do_prime(self, name: str) -> dict[str, object]:
        """Look for a name that is not there yet."""
        return {"there": name in os.listdir(self._folder) or (self._folder / name).exists()}

    def do_write(self, name: str) -> dict[str, object]:
        """Publish a file as a run does: temporary name, fsync, rename, fsync."""
        data = os.urandom(_SIZE)
        self._publish(name, data)
        return {"digest": data[:16].hex()}

    def do_fill(self, name: str) -> dict[str, object]:
        """Publish a file of one and the same byte."""
        self._publish(name, b"\1" * _SIZE)
        return {}

    def _publish(self, name: str, data: bytes) -> None:
        with open(self._folder / f"{name}.new", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(self._folder / f"{name}.new", self._folder / name)
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):
            os.fsync(fd)
        os.close(fd)

    def do_look(self, name: str) -> dict[str, object]:
        """Say when a name is listed and can be read whole."""
        start, digest = time.monotonic(), ""
        while time.monotonic() - start < _LOOK_S:
            if name in os.listdir(self._folder):
                with contextlib.suppress(FileNotFoundError):
                    data = (self._folder / name).read_bytes()
                    digest = data[:16].hex() if len(data) == _SIZE else ""
            if digest:
                break
            time.sleep(_POLL_S)
        return {"digest": digest, "after_s": time.monotonic() - start}

    def do_replace(self, name: str) -> dict[str, object]:
        """Replace a file many times, or read it until its last content is there."""
        if self._writer:
            for number in range(_RENAMES):
                self._publish(name, bytes([number % 251 + 1]) * _SIZE)
            self._publish(name, bytes(_SIZE))
            return {}
        start, reads, bad, absent, final = time.monotonic(), 0, 0, 0, False
        while not final and time.monotonic() - start < _LOOK_S:
            reads += 1
            try:
                data = (self._folder / name).read_bytes()
            except OSError:
                absent += 1
                continue
            bad += len(data) != _SIZE or len(set(data)) != 1
            final = data == bytes(_SIZE)
        return {"reads": reads, "bad": bad, "absent": absent, "final": final}

    def do_race(self, _name: str) -> dict[str, object]:
        """Create as many of the names as possible."""
        won = []
        for number in range(_NAMES):
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self._folder / f"race-{number}", flags, 0o600))
                won.append(number)
        return {"won": won}

    def do_lock(self, name: str) -> dict[str, object]:
        """Lock a file, and keep it so."""
        fd = os.open(self._folder / name, os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            got = "excluded"
        except OSError as error:
            got = f"{error.strerror}"
        else:
            self._locked = fd
            return {"got": "locked"}
        os.close(fd)
        return {"got": got}

    def do_unlock(self, _name: str) -> dict[str, object]:
        """Let go of the lock."""
        if self._locked is not None:
            os.close(self._locked)
        return {}

    def do_clock(self, _name: str) -> dict[str, object]:
        """Say what time it is here."""
        return {"now": time.time()}
