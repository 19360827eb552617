"""Node-local disk, and the places that Ray needs on this node."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping

from hpcresume.doctor.check import Check, show_size
from hpcresume.engine.ray_places import (
    SHARED_MEMORY,
    check_shared_memory,
    check_socket,
    socket_length,
)
from hpcresume.errors import LocalStorageError

_LOW_BYTES = 256 << 20
MEMORY_KINDS = ("tmpfs", "ramfs")


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
    where = f"usable, {path} is {kind} with {show_size(shutil.disk_usage(path).free)} free"
    if kind in MEMORY_KINDS:
        remedy = "it is memory, and may count as the job's: ask for that much more with --mem"
        return Check("node", text, "warning", where, remedy)
    return Check("node", text, "ok", where)


def _ray_sockets(make_ray_temp: Callable[[], str]) -> Check:
    try:
        temp = make_ray_temp()
    except LocalStorageError as error:
        return Check("node", "Ray's sockets", "wrong", str(error), "make /tmp writable")
    try:
        check_socket(temp)
    except LocalStorageError as error:
        return Check("node", "Ray's sockets", "wrong", str(error), "make /tmp a local directory")
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    found = f"{os.path.dirname(temp)}, {socket_length(temp)} of 107 bytes"
    return Check("node", "Ray's sockets", "ok", found)


def _shared_memory() -> Check:
    try:
        check_shared_memory()
        free = shutil.disk_usage(SHARED_MEMORY).free
    except (LocalStorageError, OSError) as error:
        remedy = "Ray does not start here: leave the node out, or take --engine inline"
        return Check("node", SHARED_MEMORY, "wrong", str(error), remedy)
    if free < _LOW_BYTES:
        remedy = "Ray's objects go to disk, slowly; give the container more: --shm-size=2g"
        return Check("node", SHARED_MEMORY, "warning", f"{show_size(free)} free", remedy)
    return Check("node", SHARED_MEMORY, "ok", f"{show_size(free)} free")


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
