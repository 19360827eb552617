"""Probes of this node, of a run directory's file system, of Slurm and of Ray.

Each probe does what a run will do and says what came of it: ok, warning, or wrong with what
to do.  A file system that hangs takes whoever touches it along, beyond the reach of signals,
so the probes of storage run in a child that is given up when its time is over:
``python -m hpcresume.doctor storage PATH``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Literal

from hpcresume import slurm
from hpcresume.errors import HpcResumeError, LocalStorageError, SlurmMissingError, describe

State = Literal["ok", "warning", "wrong"]

STORAGE_TIMEOUT_S = 120.0
RAY_TIMEOUT_S = 120.0

_RACERS = 4
_NAMES = 64
_RENAMES = 200
_LOW_BYTES = 1 << 30
_LOW_INODES = 10_000
_SHM = "/dev/shm"  # noqa: S108  # where Ray's object store lies
_MEMORY_KINDS = ("tmpfs", "ramfs")
_NODE_KINDS = (*_MEMORY_KINDS, "ext", "xfs", "btrfs", "overlay", "zfs", "f2fs")
_MODULES = ("ray", "submitit", "lmdb", "pyroaring", "filelock", "cloudpickle", "msgspec")
# <temp>/session_<26 characters>_<pid>/sockets/plasma_store
_RAY_SOCKET = "session_" + "0" * 26 + "_0000000/sockets/plasma_store"
_OPTIONS = {
    "soft": "its errors may lose data that was acknowledged; mount it hard",
    "nolock": "locks hold on one node only; nothing that counts rests on them",
    "local_lock": "locks hold on one node only; nothing that counts rests on them",
    "localflock": "locks hold on one node only; nothing that counts rests on them",
    "noac": "every attribute is asked of the server, which is slow",
    "async": "the server may lose what it acknowledged; each file is read back for that",
}
"""Mount options worth naming, with what they mean for a run."""

# Each racer waits for its line and then tries to create every name.
_RACER = """
import os, sys
sys.stdin.readline()
won = []
for name in range(int(sys.argv[2])):
    try:
        os.close(os.open(f"{sys.argv[1]}/{name}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        continue
    won.append(name)
print(*won)
"""
# In a child: a build for another processor ends whoever imports it.
_LMDB = "import lmdb; print(*lmdb.version()); print(*lmdb.version(True))"
# Ray's own client retries for 20 s before it says that it was refused; this one says so at once.
_STRANGER = """
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


@dataclass(frozen=True, slots=True)
class Check:
    """What one probe found.

    Attributes:
        section: ``software``, ``node``, ``storage``, ``slurm`` or ``ray``.
        name: What was probed.
        state: ``ok``, ``warning`` or ``wrong``.
        found: What came of it.
        remedy: What to do; empty where all is well.
    """

    section: str
    name: str
    state: State
    found: str
    remedy: str = ""


# -- software -------------------------------------------------------------------------------


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
            f"it cannot be imported: {_last_line(done.stderr) or f'exit {done.returncode}'}",
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


# -- node -----------------------------------------------------------------------------------


def check_node(
    candidates: Iterable[str],
    environ: Mapping[str, str],
    *,
    check_local: Callable[[str], None],
    make_ray_temp: Callable[[], str],
) -> Iterator[Check]:
    """Node-local disk and the places of Ray's sockets and object store.

    Args:
        candidates: Directories that an attempt would try, with ``$VARIABLES``.
        environ: Where the variables come from.
        check_local: Raises LocalStorageError for a directory that cannot hold a ledger.
        make_ray_temp: Creates Ray's directory, or raises LocalStorageError.
    """
    found = [_candidate(text, environ, check_local) for text in candidates]
    yield from found
    if not any(check.found.startswith("usable") for check in found):
        yield Check(
            "node",
            "node-local disk",
            "wrong",
            "none of the candidates can be used",
            "name a directory on a disk of the node: task.local_dir or site.node_local",
        )
    yield _ray_sockets(make_ray_temp)
    yield _shared_memory()


def _candidate(text: str, environ: Mapping[str, str], check_local: Callable[[str], None]) -> Check:
    path = re.sub(r"\$\{?(\w+)\}?", lambda match: environ.get(match[1]) or "$", text)
    if "$" in path:
        return Check("node", text, "ok", "not set here")
    if not os.path.isdir(path):
        return Check("node", text, "ok", f"{path} does not exist here")
    if not os.access(path, os.W_OK | os.X_OK):
        return Check("node", text, "warning", f"{path} is not writable", "it is passed over")
    try:
        check_local(path)
    except LocalStorageError as error:
        return Check("node", text, "warning", str(error), "it is passed over")
    kind = mount_of(path)[1]
    where = f"usable, {path} is {kind} with {_size(shutil.disk_usage(path).free)} free"
    if kind in _MEMORY_KINDS:
        remedy = "it is memory, and may count as the job's: ask for that much more with --mem"
        return Check("node", text, "warning", where, remedy)
    return Check("node", text, "ok", where)


def _ray_sockets(make_ray_temp: Callable[[], str]) -> Check:
    try:
        temp = make_ray_temp()
    except LocalStorageError as error:
        return Check("node", "Ray's sockets", "wrong", str(error), "make /tmp writable")
    path = os.path.join(temp, _RAY_SOCKET)
    try:
        os.makedirs(os.path.dirname(path))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
    except OSError as error:
        found = f"no socket at {len(os.fsencode(path))} bytes in {temp}: {error}"
        return Check("node", "Ray's sockets", "wrong", found, "make /tmp a local directory")
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    where = os.path.dirname(temp)
    return Check("node", "Ray's sockets", "ok", f"{where}, {len(os.fsencode(path))} of 107 bytes")


def _shared_memory() -> Check:
    try:
        free = shutil.disk_usage(_SHM).free
    except OSError as error:
        return Check("node", _SHM, "warning", str(error), "Ray uses files instead, slowly")
    if free < _LOW_BYTES // 4:
        remedy = "Ray's objects go to disk, slowly; give the container more: --shm-size=2g"
        return Check("node", _SHM, "warning", f"{_size(free)} free", remedy)
    return Check("node", _SHM, "ok", f"{_size(free)} free")


def mount_of(path: str) -> tuple[str, str, frozenset[str]]:
    """Return mount point, file-system type and options of the mount that holds a path."""
    real = os.path.realpath(path)
    best = ("", "unknown", frozenset[str]())
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            fields, _, tail = line.partition(" - ")
            _, _, _, _, escaped, options, *_ = fields.split()
            point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), escaped)
            kind, _, more = tail.split()
            inside = real == point or real.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best[0]):
                best = point, kind, frozenset(f"{options},{more}".split(","))
    return best


# -- storage --------------------------------------------------------------------------------


def check_storage(path: str, *, timeout_s: float = STORAGE_TIMEOUT_S) -> Iterator[Check]:
    """Whether a run directory can live at ``path``, found out by a child that may hang.

    Args:
        path: The run directory, or where it would be made; need not exist.
        timeout_s: The child is given up after this many seconds.
    """
    command = [sys.executable, "-m", "hpcresume.doctor", "storage", os.path.abspath(path)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        late = False
        try:
            child.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            # Not waited for: it may be beyond the reach of the signal.
            child.kill()
            late = True
        answers = [json.loads(line) for line in _read(out).splitlines() if line.endswith("}")]
        complaint = _last_line(_read(err))
    yield from (Check(**answer) for answer in answers if "state" in answer)
    begun = answers[-1].get("begin", "") if answers else "start"
    if late:
        found = f"no answer within {timeout_s:g} s (at: {begun})"
        remedy = f"the file system of {path} hangs; wait for it, or use another --run-dir"
        yield Check("storage", begun or "end", "wrong", found, remedy)
    elif child.returncode:
        yield Check("storage", begun, "wrong", complaint, "check owner, mode, space and quota")


def _storage_child(path: str) -> None:
    """Write one JSON line before each probe and one for each result."""
    for name, probe in _PROBES.items():
        _answer({"begin": name})
        for check in probe(_existing(path)):
            _answer(asdict(check))
    with contextlib.ExitStack() as stack:
        _answer({"begin": "write"})
        try:
            folder = tempfile.mkdtemp(prefix=".hpcresume-doctor-", dir=_existing(path))
        except OSError as error:
            remedy = "check owner, mode, space and quota, or use another --run-dir"
            _answer(asdict(Check("storage", "write", "wrong", str(error), remedy)))
            return
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for name, trial in _TRIALS.items():
            _answer({"begin": name})
            _answer(asdict(_tried(name, trial, folder)))


def _tried(name: str, trial: Callable[[str], Check], folder: str) -> Check:
    try:
        return trial(folder)
    except OSError as error:
        remedy = "results are published with this call; use another --run-dir"
        return Check("storage", name, "wrong", describe(error), remedy)


def _existing(path: str) -> str:
    """Return the path or its nearest parent that exists."""
    while not os.path.lexists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return path


def _owners(path: str) -> Iterator[Check]:
    """Owner and mode of the directory and of everything above it."""
    real = os.path.realpath(path)
    chain = [real, *map(str, Path(real).parents)]
    open_to = []
    for part in chain:
        status = os.stat(part)
        others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if status.st_uid not in {os.geteuid(), 0}:
            open_to.append(f"{part} is owned by user {status.st_uid}")
        elif others and not status.st_mode & stat.S_ISVTX:
            open_to.append(f"{part} has mode {stat.S_IMODE(status.st_mode):04o}")
    if open_to:
        remedy = "whoever can write there can replace your results and code: chmod go-w"
        yield Check("storage", "owners", "warning", "; ".join(open_to), remedy)
    else:
        found = f"{real} and its parents are yours or the system's"
        yield Check("storage", "owners", "ok", found)


def _space(path: str) -> Iterator[Check]:
    """Free bytes and inodes; a quota may be less."""
    space = os.statvfs(path)
    free = space.f_bavail * space.f_frsize
    state: State = "warning" if free < _LOW_BYTES else "ok"
    remedy = "results may not fit; free space or use another --run-dir" if state != "ok" else ""
    yield Check("storage", "space", state, f"{_size(free)} free, a quota may be less", remedy)
    if space.f_files:
        scarce = space.f_favail < _LOW_INODES
        remedy = "a run makes a few files per attempt; remove files" if scarce else ""
        found = f"{space.f_favail:,} files can be made"
        yield Check("storage", "inodes", "warning" if scarce else "ok", found, remedy)


def _file_system(path: str) -> Iterator[Check]:
    """Type and mount options."""
    point, kind, options = mount_of(path)
    if kind.startswith(_NODE_KINDS):
        remedy = "on a cluster, put runs where every node sees them" if slurm.available() else ""
        state: State = "warning" if slurm.available() else "ok"
        found = f"{kind} at {point}, a file system of this node"
        yield Check("storage", "file system", state, found, remedy)
    else:
        yield Check("storage", "file system", "ok", f"{kind} at {point}")
    for option in sorted(options):
        meaning = _OPTIONS.get(option.partition("=")[0])
        if meaning and option != "local_lock=none":
            yield Check("storage", f"mount option {option}", "warning", "set", meaning)


_PROBES: dict[str, Callable[[str], Iterator[Check]]] = {
    "owners": _owners,
    "space": _space,
    "file system": _file_system,
}


def _exclusive(folder: str) -> Check:
    """Several processes create the same names; each name must have one winner."""
    race = os.path.join(folder, "race")
    os.mkdir(race)
    racers = [
        subprocess.Popen(
            [sys.executable, "-S", "-c", _RACER, race, str(_NAMES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(_RACERS)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = [int(name) for racer in racers for name in racer.communicate()[0].split()]
    if sorted(won) == list(range(_NAMES)):
        found = f"{_RACERS} processes, {_NAMES} names, one winner each"
        return Check("storage", "exclusive create", "ok", found)
    found = f"{_RACERS} processes won {len(won)} of {_NAMES} names"
    remedy = "attempts cannot be told apart here; use another --run-dir"
    return Check("storage", "exclusive create", "wrong", found, remedy)


def _rename(folder: str) -> Check:
    """A name that is replaced again and again is never absent and never half."""
    name, bad = os.path.join(folder, "name"), 0
    over = threading.Event()

    def replace() -> None:
        try:
            for number in range(_RENAMES):
                _write(f"{name}.new", bytes([number % 256]) * 4096, sync=False)
                os.rename(f"{name}.new", name)
        finally:
            over.set()

    _write(name, b"\0" * 4096, sync=False)
    writer = threading.Thread(target=replace)
    writer.start()
    while not over.is_set():
        try:
            data = Path(name).read_bytes()
        except OSError:
            bad += 1
        else:
            bad += len(data) != 4096 or len(set(data)) != 1
    writer.join()
    if bad or "name" not in os.listdir(folder) or os.path.exists(f"{name}.new"):
        remedy = "results could be seen half; use another --run-dir"
        return Check("storage", "rename", "wrong", f"{bad} reads saw none or half a file", remedy)
    return Check("storage", "rename", "ok", f"{_RENAMES} replacements, each whole and visible")


def _sync_file(folder: str) -> Check:
    """Write, fsync and read back."""
    path, data = os.path.join(folder, "sync"), os.urandom(1 << 20)
    took = _write(path, data, sync=True)
    if Path(path).read_bytes() != data:
        remedy = "this file system loses data; use another --run-dir"
        return Check("storage", "fsync", "wrong", "it reads back differently", remedy)
    return Check("storage", "fsync", "ok", f"1 MiB in {took * 1000:.0f} ms, reads back the same")


def _sync_directory(folder: str) -> Check:
    """Fsync a directory."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        found = f"fsync of a directory: {error.strerror}"
        remedy = "names are made sure of by reading back alone"
        return Check("storage", "fsync of a directory", "warning", found, remedy)
    finally:
        os.close(fd)
    return Check("storage", "fsync of a directory", "ok", "works")


def _hard_link(folder: str) -> Check:
    """A second name for a file, which must be new."""
    path = os.path.join(folder, "one")
    _write(path, b"x", sync=False)
    try:
        os.link(path, f"{path}.two")
    except OSError as error:
        found = f"{error.strerror}"
        remedy = "names that must be new are created instead; collect copies files"
        return Check("storage", "hard links", "warning", found, remedy)
    return Check("storage", "hard links", "ok", "work")


def _flock(folder: str) -> Check:
    """Whether a lock excludes another holder, on this node."""
    path = os.path.join(folder, "lock")
    with open(path, "wb") as first, open(path, "rb+") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            code = errno.errorcode.get(error.errno or 0, "?")
            remedy = "nothing that counts rests on locks; two merges at once may do work twice"
            return Check("storage", "flock", "warning", f"{code}: {error.strerror}", remedy)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Check("storage", "flock", "ok", "works on this node")
    return Check("storage", "flock", "warning", "a lock excludes nobody", "nothing rests on it")


_TRIALS: dict[str, Callable[[str], Check]] = {
    "exclusive create": _exclusive,
    "rename": _rename,
    "fsync": _sync_file,
    "fsync of a directory": _sync_directory,
    "hard links": _hard_link,
    "flock": _flock,
}


def _write(path: str, data: bytes, *, sync: bool) -> float:
    """Write a file and return the seconds it took."""
    started = time.monotonic()
    with open(path, "wb", buffering=0) as file:
        file.write(data)
        if sync:
            os.fsync(file.fileno())
    return time.monotonic() - started


# -- Slurm ----------------------------------------------------------------------------------


def check_slurm() -> Iterator[Check]:
    """What the live Slurm is set to, where there is one."""
    if not slurm.available():
        remedy = "nothing, for runs on this machine; on a cluster: module load slurm"
        yield Check("slurm", "commands", "warning", "there is no sbatch on the path", remedy)
        return
    try:
        config, partitions = slurm.config(), slurm.partitions()
    except SlurmMissingError as error:
        yield Check("slurm", "commands", "warning", str(error))
        return
    except HpcResumeError as error:
        yield Check("slurm", "controller", "wrong", str(error), "scontrol ping")
        return
    cluster, version = config.get("ClusterName", "?"), config.get("SLURM_VERSION", "?")
    yield Check("slurm", "controller", "ok", f"{cluster}, Slurm {version}")
    for key in ("JobRequeue", "KillWait", "MaxArraySize", "MaxBatchRequeue", "MinJobAge"):
        if key in config:
            yield Check("slurm", key, "ok", config[key])
    yield _preemption(config, partitions)
    yield _accounting()


def _preemption(config: Mapping[str, str], partitions: Iterable[slurm.Partition]) -> Check:
    mode, kind = config.get("PreemptMode", "OFF"), config.get("PreemptType", "")
    if mode == "OFF" or not kind or kind.endswith("/none"):
        return Check("slurm", "preemption", "ok", "off")
    where = [
        f"{partition.name} {partition.preempt_mode} with {partition.grace_s or 0} s of grace"
        for partition in partitions
        if partition.preempt_mode not in {None, "OFF"}
    ]
    # Slurm 22.05 has the option under another name.
    words = config.get("PreemptParameters", "") + config.get("SlurmctldParameters", "")
    sent = "the job's own signal" if "send_user_signal" in words else "SIGTERM"
    found = f"{kind}, {mode}, announced by {sent}; {'; '.join(where) or 'no partition'}"
    if any(partition.preempt_mode == "CANCEL" for partition in partitions):
        remedy = "preempted tasks do not come back by themselves; the merge job deals them anew"
        return Check("slurm", "preemption", "warning", found, remedy)
    return Check("slurm", "preemption", "ok", found)


def _accounting() -> Check:
    try:
        slurm.accounting("1")
    except HpcResumeError as error:
        remedy = "how a job ended is asked of the controller, for as long as MinJobAge"
        return Check("slurm", "sacct", "warning", str(error), remedy)
    return Check("slurm", "sacct", "ok", "answers")


# -- Ray ------------------------------------------------------------------------------------


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
                yield Check("ray", "head", "wrong", _last_line(_read(err)) or "no answer", remedy)
        finally:
            watchdog.cancel()
            _end(head)
    shutil.rmtree(temp, ignore_errors=True)


def _stranger(address: str, *, timeout_s: float) -> Check:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    stranger = subprocess.Popen(
        [sys.executable, "-c", _STRANGER, address],
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
    found = f"not found out: {_last_line(err) or 'no answer'}"
    remedy = "whether other users of the node are kept out is open; see the versions above"
    return Check("ray", "token", "warning", found, remedy)


def _ray_child(temp: str) -> None:
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


# -- shared ---------------------------------------------------------------------------------


def _answer(values: Mapping[str, object]) -> None:
    os.write(1, json.dumps(values).encode() + b"\n")


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _size(size_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


if __name__ == "__main__":
    {"storage": _storage_child, "ray": _ray_child}[sys.argv[1]](sys.argv[2])
