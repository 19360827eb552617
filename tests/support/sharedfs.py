"""A shared file system whose faults are switched on and off: a FUSE pass-through; needs root.

``SharedFs`` mounts a directory through a server in a process of its own, spoken over
/dev/fuse.  Rules make calls fail, fail after their effect, take half of a write, report an
old size, or hang; listings can be frozen; what was never synced can be lost, as by a file
server that restarts.  The server notes every call that breaks the rule that a published
name never changes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fnmatch
import json
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.places import REPOSITORY, child_environment

# linux/fuse.h, protocol 7.31
_IN, _OUT = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ")
_ATTR, _ENTRY, _ATTR_OUT = (
    struct.Struct("<6Q10I"),
    struct.Struct("<4QII"),
    struct.Struct("<QII"),
)
_OPEN_OUT, _IO, _SETATTR = struct.Struct("<QII"), struct.Struct("<QQIIQII"), struct.Struct("<IIQQ")
_OPS = {
    1: "lookup", 3: "getattr", 4: "setattr", 9: "mkdir", 10: "unlink", 11: "rmdir", 12: "rename",
    13: "link", 14: "open", 15: "read", 16: "write", 17: "statfs", 18: "release", 20: "fsync",
    25: "flush", 26: "init", 27: "opendir", 28: "readdir", 29: "releasedir", 30: "fsyncdir",
    32: "lock", 33: "lock", 35: "create", 45: "rename2",
}  # fmt: skip
_NO_ANSWER = frozenset({2, 36, 42})  # FORGET, INTERRUPT, BATCH_FORGET
_BIG_WRITES, _POSIX_LOCKS, _FLOCK_LOCKS, _DONT_MASK = 1 << 5, 1 << 1, 1 << 10, 1 << 6
_DETACH = 2
_RENAME_NOREPLACE = 1


@dataclass
class Rule:
    """A fault.

    Attributes:
        op: The call: ``write``, ``fsync``, ``flush`` (what close waits for), ``rename``,
            ``fsyncdir``, ``lookup``, ``getattr``, ``readdir``, ``mkdir``, ``lock`` ...
        action: An errno's name, ``hang``, ``short`` (half of a write), or ``old-size``.
        names: Pattern of the file's name; of a rename, the new one.
        after: Whether the call takes effect first: a reply that is lost.
        times: How often; 0: always.
        skip: How many matching calls are let through first.
    """

    op: str
    action: str
    names: str = "*"
    after: bool = False
    times: int = 0
    skip: int = 0
    seen: int = 0

    def due(self, op: str, name: str) -> bool:
        """Count a call and tell whether the fault strikes it."""
        if self.op != op or not fnmatch.fnmatch(name, self.names):
            return False
        self.seen += 1
        hit = self.seen - self.skip
        return hit > 0 and (self.times == 0 or hit <= self.times)


@dataclass
class _Node:
    name: str
    parent: _Node | None
    number: int
    inode: int = -1
    children: dict[str, _Node] = field(default_factory=dict)

    def path(self) -> str:
        """Return the path below the backing directory."""
        return self.name if self.parent is None else os.path.join(self.parent.path(), self.name)


class _HangError(Exception):
    pass


class _Server:
    """The pass-through; single-threaded but for the calls that hang."""

    def __init__(self, backing: str, device: int, *, locks: str) -> None:
        self._device, self._locks = device, locks
        root = _Node(backing, None, 1)
        self._nodes = {1: root}
        self._files: dict[int, tuple[int, _Node]] = {}
        self._listings: dict[int, list[str]] = {}
        self._frozen: dict[str, list[str]] | None = None
        self._rules: list[Rule] = []
        self._hits: dict[str, int] = {}
        self._guard = threading.Lock()
        self._released = threading.Event()
        self._synced: dict[int, int] | None = None
        self._undo: list[tuple[str, Callable[[], None]]] = []
        self._graves = os.path.join(os.path.dirname(backing), "graves")
        self.violations: list[str] = []

    def serve(self) -> None:
        # Reading fails once the file system is unmounted.
        with contextlib.suppress(OSError):
            while True:
                request = os.read(self._device, 1 << 20)
                with self._guard:
                    self._take(request)

    def _take(self, request: bytes) -> None:
        _, opcode, unique, *_ = _IN.unpack_from(request)
        if opcode in _NO_ANSWER:
            return
        try:
            self._answer(unique, 0, self._handle(request, faults=True))
        except _HangError:
            threading.Thread(target=self._later, args=(request, unique), daemon=True).start()
        except OSError as error:
            self._answer(unique, -(error.errno or errno.EIO), b"")

    def _later(self, request: bytes, unique: int) -> None:
        self._released.wait()
        with self._guard:
            try:
                self._answer(unique, 0, self._handle(request, faults=False))
            except OSError as error:
                self._answer(unique, -(error.errno or errno.EIO), b"")

    def _answer(self, unique: int, error: int, body: bytes) -> None:
        # The caller may have gone, or the whole connection.
        with contextlib.suppress(OSError):
            os.write(self._device, _OUT.pack(_OUT.size + len(body), error, unique) + body)

    # -- control ----------------------------------------------------------------------------

    def control(self, order: dict[str, Any]) -> Any:
        """Obey an order of the test."""
        with self._guard:
            if "rules" in order:
                self._rules = [Rule(**rule) for rule in order["rules"]]
                self._hits = {}
                self._released.set()
                self._released = threading.Event()
            if "freeze" in order:
                self._frozen = {} if order["freeze"] else None
            if order.get("volatile"):
                self._synced, self._undo = {}, []
                os.makedirs(self._graves, exist_ok=True)
            if order.get("restart"):
                self._restart()
            return {"hits": self._hits, "violations": self.violations}

    def _restart(self) -> None:
        """Lose what was never synced: content beyond the last fsync, names since the last."""
        synced = self._synced or {}
        for _, undo in reversed(self._undo):
            with contextlib.suppress(OSError):
                undo()
        for directory, _, names in os.walk(self._nodes[1].path()):
            for name in names:
                path = os.path.join(directory, name)
                size = synced.get(os.lstat(path).st_ino)
                if size is not None:
                    os.truncate(path, min(size, os.path.getsize(path)))
        self._synced, self._undo = {}, []

    # -- requests ---------------------------------------------------------------------------

    def _handle(self, request: bytes, *, faults: bool) -> bytes:
        _, opcode, _, nodeid, uid, gid, _, _ = _IN.unpack_from(request)
        op, body = _OPS.get(opcode, ""), request[_IN.size :]
        if not op:
            raise OSError(errno.ENOSYS, "")
        if op == "rename2":
            if struct.unpack_from("<QI", body)[1]:
                raise OSError(errno.EINVAL, "")
            op, body = "rename", body[:8] + body[16:]
        node = self._nodes[nodeid] if op != "init" else self._nodes[1]
        rule = self._fault(op, self._name_of(op, node, body)) if faults else None
        action = rule.action if rule else ""
        if action == "hang":
            raise _HangError
        if rule and action in errno.errorcode.values() and not rule.after:
            raise OSError(getattr(errno, action), "")
        answer: bytes = getattr(self, f"_{op}")(node, body, uid, gid, action)
        if rule and rule.after:
            raise OSError(getattr(errno, action), "")
        return answer

    def _fault(self, op: str, name: str) -> Rule | None:
        for rule in self._rules:
            if rule.due(op, name):
                key = f"{op}:{rule.action}"
                self._hits[key] = self._hits.get(key, 0) + 1
                return rule
        return None

    def _name_of(self, op: str, node: _Node, body: bytes) -> str:
        if op in {"lookup", "unlink", "rmdir"}:
            return os.fsdecode(body.split(b"\0")[0])
        if op in {"mkdir", "link"}:
            return os.fsdecode(body[8:].split(b"\0")[0])
        if op == "create":
            return os.fsdecode(body[16:].split(b"\0")[0])
        if op == "rename":
            return os.fsdecode(body[8:].split(b"\0")[1])
        return node.name if node.parent else ""

    def _init(self, _node: _Node, body: bytes, *_: Any) -> bytes:
        flags = _BIG_WRITES
        if self._locks != "local":
            flags |= _POSIX_LOCKS | _FLOCK_LOCKS
        return struct.pack("<IIIIHHIIHH32x", 7, 31, 1 << 17, flags, 16, 12, 1 << 17, 1, 0, 0)

    def _lock(self, *_: Any) -> bytes:
        if self._locks == "enosys":
            raise OSError(errno.ENOSYS, "")
        return b""

    def _attributes(self, path: str, action: str = "", fd: int | None = None) -> bytes:
        s = os.fstat(fd) if fd is not None else os.lstat(path)
        size = s.st_size // 2 if action == "old-size" else s.st_size
        whole = [int(t) for t in (s.st_atime, s.st_mtime, s.st_ctime)]
        return _ATTR.pack(
            s.st_ino, size, s.st_blocks, *whole, 0, 0, 0,
            s.st_mode, s.st_nlink, s.st_uid, s.st_gid, 0, 4096, 0,
        )  # fmt: skip

    def _entry(self, parent: _Node, name: str, action: str = "") -> bytes:
        path = os.path.join(parent.path(), name)
        inode = os.lstat(path).st_ino
        node = parent.children.get(name)
        if node is None or node.inode != inode:
            node = _Node(name, parent, len(self._nodes) + 1, inode)
            parent.children[name] = self._nodes[node.number] = node
        return _ENTRY.pack(node.number, 0, 0, 0, 0, 0) + self._attributes(path, action)

    def _lookup(self, node: _Node, body: bytes, _u: int, _g: int, action: str) -> bytes:
        return self._entry(node, os.fsdecode(body.rstrip(b"\0")), action)

    def _getattr(self, node: _Node, body: bytes, _u: int, _g: int, action: str) -> bytes:
        flags, _, handle = struct.unpack_from("<IIQ", body)
        fd = self._files[handle][0] if flags & 1 and handle in self._files else None
        return _ATTR_OUT.pack(0, 0, 0) + self._attributes(node.path(), action, fd)

    def _setattr(self, node: _Node, body: bytes, *_: Any) -> bytes:
        valid, _, _, size = _SETATTR.unpack_from(body)
        mode, _, uid, gid, _ = struct.unpack_from("<5I", body, 68)
        path = node.path()
        if valid & 1:
            os.chmod(path, stat.S_IMODE(mode))
        if valid & 6:
            os.chown(path, uid if valid & 2 else -1, gid if valid & 4 else -1)
        if valid & 8:
            self._check_changed(node, "truncate")
            os.truncate(path, size)
        return _ATTR_OUT.pack(0, 0, 0) + self._attributes(path)

    def _mkdir(self, node: _Node, body: bytes, uid: int, gid: int, _a: str) -> bytes:
        mode, _ = struct.unpack_from("<II", body)
        name = os.fsdecode(body[8:].rstrip(b"\0"))
        path = os.path.join(node.path(), name)
        os.mkdir(path)
        os.chown(path, uid, gid)
        os.chmod(path, stat.S_IMODE(mode))
        self._note(node, lambda: shutil.rmtree(path))
        return self._entry(node, name)

    def _create(self, node: _Node, body: bytes, uid: int, gid: int, _a: str) -> bytes:
        flags, mode, _, _ = struct.unpack_from("<4I", body)
        name = os.fsdecode(body[16:].rstrip(b"\0"))
        path = os.path.join(node.path(), name)
        fd = os.open(path, (flags & ~os.O_APPEND) | os.O_CREAT | os.O_EXCL, 0o600)
        os.fchown(fd, uid, gid)
        os.fchmod(fd, stat.S_IMODE(mode))
        self._note(node, lambda: os.unlink(path))
        if self._synced is not None:
            self._synced[os.fstat(fd).st_ino] = 0
        entry = self._entry(node, name)
        self._files[fd] = fd, node.children[name]
        return entry + _OPEN_OUT.pack(fd, 0, 0)

    def _open(self, node: _Node, body: bytes, *_: Any) -> bytes:
        flags, _ = struct.unpack_from("<II", body)
        if flags & (os.O_WRONLY | os.O_RDWR):
            self._check_changed(node, "open for writing")
        fd = os.open(node.path(), flags & ~(os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW))
        self._files[fd] = fd, node
        return _OPEN_OUT.pack(fd, 0, 0)

    def _read(self, _node: _Node, body: bytes, *_: Any) -> bytes:
        handle, offset, size, *_rest = _IO.unpack_from(body)
        return os.pread(self._files[handle][0], size, offset)

    def _write(self, _node: _Node, body: bytes, _u: int, _g: int, action: str) -> bytes:
        handle, offset, size, *_rest = _IO.unpack_from(body)
        data = body[_IO.size : _IO.size + size]
        if action == "short":
            data = data[: max(1, len(data) // 2)]
        return struct.pack("<II", os.pwrite(self._files[handle][0], data, offset), 0)

    def _flush(self, *_: Any) -> bytes:
        return b""

    def _fsync(self, _node: _Node, body: bytes, *_: Any) -> bytes:
        fd = self._files[struct.unpack_from("<Q", body)[0]][0]
        if self._synced is not None:
            status = os.fstat(fd)
            self._synced[status.st_ino] = status.st_size
        return b""

    def _release(self, _node: _Node, body: bytes, *_: Any) -> bytes:
        handle = struct.unpack_from("<Q", body)[0]
        os.close(self._files.pop(handle)[0])
        return b""

    def _opendir(self, node: _Node, _body: bytes, *_: Any) -> bytes:
        path = node.path()
        names = sorted(os.listdir(path))
        if self._frozen is not None:
            names = self._frozen.setdefault(path, names)
        number = max(self._listings, default=0) + 1
        self._listings[number] = names
        return _OPEN_OUT.pack(number, 0, 0)

    def _readdir(self, _node: _Node, body: bytes, *_: Any) -> bytes:
        handle, offset, size, *_rest = _IO.unpack_from(body)
        out = b""
        for position, name in list(enumerate(self._listings[handle], 1))[offset:]:
            raw = os.fsencode(name)
            entry = struct.pack("<QQII", position, position, len(raw), 0) + raw
            entry += bytes(-len(entry) % 8)
            if len(out) + len(entry) > size:
                break
            out += entry
        return out

    def _releasedir(self, _node: _Node, body: bytes, *_: Any) -> bytes:
        self._listings.pop(struct.unpack_from("<Q", body)[0], None)
        return b""

    def _fsyncdir(self, node: _Node, *_: Any) -> bytes:
        path = node.path()
        self._undo = [entry for entry in self._undo if entry[0] != path]
        return b""

    def _unlink(self, node: _Node, body: bytes, *_: Any) -> bytes:
        name = os.fsdecode(body.rstrip(b"\0"))
        path = os.path.join(node.path(), name)
        self._check_changed(_Node(name, node, 0), "unlink")
        if self._synced is None:
            os.unlink(path)
        else:
            grave = os.path.join(self._graves, str(len(os.listdir(self._graves))))
            os.rename(path, grave)
            self._note(node, lambda: os.rename(grave, path))
        node.children.pop(name, None)
        return b""

    def _rmdir(self, node: _Node, body: bytes, *_: Any) -> bytes:
        name = os.fsdecode(body.rstrip(b"\0"))
        self._check_changed(_Node(name, node, 0), "rmdir")
        os.rmdir(os.path.join(node.path(), name))
        node.children.pop(name, None)
        return b""

    def _rename(self, node: _Node, body: bytes, *_: Any) -> bytes:
        target = self._nodes[struct.unpack_from("<Q", body)[0]]
        old, new = map(os.fsdecode, body[8:].split(b"\0")[:2])
        source, aim = os.path.join(node.path(), old), os.path.join(target.path(), new)
        self._check_changed(_Node(old, node, 0), "rename away")
        if os.path.lexists(aim):
            self._check_changed(_Node(new, target, 0), "rename over")
        os.rename(source, aim)
        moved = node.children.pop(old, None)
        if moved is not None:
            moved.name, moved.parent = new, target
            target.children[new] = moved
        self._note(target, lambda: os.rename(aim, source))
        return b""

    def _link(self, node: _Node, body: bytes, *_: Any) -> bytes:
        existing = self._nodes[struct.unpack_from("<Q", body)[0]]
        name = os.fsdecode(body[8:].rstrip(b"\0"))
        path = os.path.join(node.path(), name)
        os.link(existing.path(), path)
        self._note(node, lambda: os.unlink(path))
        return self._entry(node, name)

    def _statfs(self, *_: Any) -> bytes:
        s = os.statvfs(self._nodes[1].path())
        return struct.pack(
            "<5Q4I24x", s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree,
            s.f_bsize, 255, s.f_frsize, 0,
        )  # fmt: skip

    def _note(self, directory: _Node, undo: Callable[[], None]) -> None:
        if self._synced is not None:
            self._undo.append((directory.path(), undo))

    def _check_changed(self, node: _Node, what: str) -> None:
        """Note a call that would change a published name; logs alone are appended to."""
        path = os.path.relpath(node.path(), self._nodes[1].path())
        parts = path.split(os.sep)
        if "logs" not in parts and not any(part.startswith(".") for part in parts):
            self.violations.append(f"{what} {path}")


@dataclass
class SharedFs:
    """A mounted shared file system.

    Attributes:
        path: Where it is mounted.
        backing: Where its files are, out of reach of every fault.
    """

    path: Path
    backing: Path
    _control: socket.socket

    def _order(self, **order: Any) -> Any:
        self._control.sendall(json.dumps(order).encode() + b"\n")
        reply = b""
        while not reply.endswith(b"\n"):
            data = self._control.recv(1 << 16)
            assert data, "the file server has died"
            reply += data
        return json.loads(reply)

    def fault(self, *rules: Rule) -> None:
        """Replace the faults; what hangs goes on."""
        self._order(rules=[asdict(rule) for rule in rules])

    def heal(self) -> None:
        """Take every fault away."""
        self.fault()
        self._order(freeze=False)

    def freeze_listings(self) -> None:
        """Answer every listing as it is when it is next asked for, from then on."""
        self._order(freeze=True)

    def make_volatile(self) -> None:
        """From now on, what is not synced is lost by a restart."""
        self._order(volatile=True)

    def restart(self) -> None:
        """Lose what was not synced, as a file server that restarts."""
        self._order(restart=True)

    def hits(self) -> dict[str, int]:
        """Return how often each fault struck, by ``op:action``."""
        return dict(self._order()["hits"])

    def violations(self) -> list[str]:
        """Return the calls that changed, or could have changed, a published file."""
        return list(self._order()["violations"])


@contextlib.contextmanager
def shared_fs(place: Path, *, locks: str = "local") -> Iterator[SharedFs]:
    """Mount a shared file system below ``place``; skip where that is not allowed.

    Args:
        place: A directory; ``backing`` and ``shared`` are made in it.
        locks: ``local`` (kept by this kernel), ``enosys``, or ``noop`` (they exclude nobody).
    """
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("faults of a shared file system are made with FUSE: no access to /dev/fuse")
    backing, mount = place / "backing", place / "shared"
    for path in (backing, mount):
        path.mkdir(mode=0o755)
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.support.sharedfs"),
            *(str(backing), str(mount), str(theirs.fileno()), locks),
        ],
        pass_fds=(theirs.fileno(),),
        cwd=REPOSITORY,
        env=child_environment(),
        start_new_session=True,
    )
    theirs.close()
    try:
        ready = ours.recv(64)
        if ready != b"ready\n":
            pytest.skip(f"mounting FUSE: {ready.decode() or 'the server died'}")
        yield SharedFs(mount, backing, ours)
    finally:
        ours.close()
        # With its server the connection dies: whatever hangs in it gets an error.
        process.send_signal(signal.SIGKILL)
        process.wait()
        ctypes.CDLL(None).umount2(os.fsencode(mount), _DETACH)


def main(argv: Sequence[str]) -> None:
    """Mount, say so, serve until the mount is gone, and obey orders."""
    backing, mount, control, locks = argv[1], argv[2], socket.socket(fileno=int(argv[3])), argv[4]
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
    if libc.mount(b"hpcresume-test", os.fsencode(mount), b"fuse", 0, options.encode()):
        control.sendall(os.strerror(ctypes.get_errno()).encode())
        return
    os.umask(0)
    server = _Server(backing, device, locks=locks)
    threading.Thread(target=server.serve, daemon=True).start()
    control.sendall(b"ready\n")
    for line in control.makefile("rb"):
        control.sendall(json.dumps(server.control(json.loads(line))).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv)
