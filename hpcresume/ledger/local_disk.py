"""Which directories may hold a ledger: those of a file system that lives on this node."""

from __future__ import annotations

import os
import re
import shutil

from hpcresume.errors import LocalStorageError

# LMDB maps its file and locks it with process-shared mutexes; neither works across nodes.
_SHARED_KINDS = (
    "nfs", "lustre", "gpfs", "beegfs", "cifs", "smb", "fuse", "ceph", "9p", "afs", "pvfs",
    "orangefs", "wekafs", "panfs", "virtiofs", "vboxsf",
)  # fmt: skip
# The kernel writes a space in a mount point as \040.
_OCTAL = re.compile(r"\\([0-7]{3})")


def file_system_kind(path: str) -> str:
    """Return the type of the file system that holds ``path``, ``unknown`` if Linux hides it."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    best, kind = -1, "unknown"
    real = os.path.realpath(path)
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            fields, _, tail = line.partition(" - ")
            _, _, number, _, escaped, *_ = fields.split()
            mount_point = _OCTAL.sub(lambda match: chr(int(match[1], 8)), escaped)
            inside = real == mount_point or real.startswith(mount_point.rstrip("/") + "/")
            if inside and (len(mount_point), number == wanted) >= (best, True):
                best, kind = len(mount_point), tail.split()[0]
    return kind


def check_local(path: str, *, need_bytes: int = 64 << 20) -> None:
    """Refuse a directory that cannot hold a ledger.

    Raises:
        LocalStorageError: It is on a shared or FUSE file system, or too little space is left.
    """
    try:
        kind = file_system_kind(path)
        free = shutil.disk_usage(path).free
    except OSError as error:
        raise LocalStorageError(
            f"cannot use {path} as node-local disk: {error.strerror or error}. "
            "The ledger is kept there until it is published. "
            "Give another directory with --local-dir or task.local_dir.",
            path=path,
        ) from error
    if kind.startswith(_SHARED_KINDS):
        raise LocalStorageError(
            f"{path} is on {kind}, a shared file system. LMDB corrupts its file there. "
            "Give a directory on a disk of the node with --local-dir or task.local_dir.",
            path=path,
            kind=kind,
        )
    if free < need_bytes:
        raise LocalStorageError(
            f"{path} has {free >> 20} MiB left; an attempt needs {need_bytes >> 20} MiB to start. "
            "Free some space, or give another directory with --local-dir or task.local_dir.",
            path=path,
            free=free,
        )
