"""A file system in memory that does to its users what network file systems do.

One :class:`SimServer` holds the files; each :class:`SimFileSystem` is a client of it, with the
calls of :class:`hpcresume.fs.FileSystem`.  Content and names are durable only once synced, and
:meth:`SimServer.restart` drops the rest.  :meth:`SimFileSystem.on` makes a call fail before or
after its effect, kills the client there, or runs anything else.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from hpcresume.fs import READ_BYTES

ResultT = TypeVar("ResultT")


class ClientKilledError(BaseException):
    """The simulated process is dead; nothing it does from here on has an effect."""


@dataclass(eq=False)
class _File:
    volatile: bytearray = field(default_factory=bytearray)
    durable: bytes = b""


@dataclass(eq=False)
class _Directory:
    names: dict[str, _File | _Directory] = field(default_factory=dict)
    durable: dict[str, _File | _Directory] = field(default_factory=dict)


@dataclass(eq=False)
class _Rule:
    op: str
    contains: str
    when: str
    action: Callable[[], None]
    first: int
    times: int
    hits: int = 0

    def due(self, op: str, path: str, when: str) -> bool:
        if (op, when) != (self.op, self.when) or self.contains not in path:
            return False
        self.hits += 1
        return self.first <= self.hits < self.first + self.times


class SimServer:
    """The file server: what survives its restart is what was synced.

    Attributes:
        hard_links: Whether it knows hard links.
        ordered: Whether syncing a directory also keeps the names that lead to it, as on
            file systems that journal metadata in order; without it each name needs a sync
            of its own directory, which is all that POSIX says.
    """

    def __init__(self, *, hard_links: bool = True, ordered: bool = False) -> None:
        self.root, self.hard_links, self.ordered = _Directory(), hard_links, ordered
        self.boots = 0
        # Directories are never renamed nor removed, but lost by a restart.
        self._directories: dict[str, _Directory] = {}

    def clone(self) -> SimServer:
        """Return a server with the same files, all of them durable."""
        other = SimServer(hard_links=self.hard_links, ordered=self.ordered)
        _copy(self.root, other.root)
        return other

    def restart(self) -> None:
        """Lose everything that was not synced; open files become stale."""
        self.boots += 1
        self._directories.clear()
        self._drop(self.root)

    def _drop(self, directory: _Directory) -> None:
        directory.names = dict(directory.durable)
        for node in directory.names.values():
            if isinstance(node, _Directory):
                self._drop(node)
            else:
                node.volatile = bytearray(node.durable)

    def find(self, path: str) -> _File | _Directory:
        """Return what a path names.

        Raises:
            FileNotFoundError: Nothing.
        """
        known = self._directories.get(path)
        if known is not None:
            return known
        above, _, name = path.rpartition("/")
        if not name:
            return self.root if not above else self.find(above)
        directory = self._directories.get(above) or self.find(above)
        if not isinstance(directory, _Directory):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        node = directory.names.get(name)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if isinstance(node, _Directory):
            self._directories[path] = node
        return node

    def file(self, path: str) -> _File:
        """Return the file of a path."""
        node = self.find(path)
        if isinstance(node, _Directory):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        return node

    def directory(self, path: str) -> _Directory:
        """Return the directory of a path."""
        node = self.find(path)
        if isinstance(node, _File):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return node

    def keep_names_to(self, path: str) -> None:
        """Make the names durable that lead to a path."""
        node = self.root
        for name in filter(None, path.split("/")):
            node.durable[name] = node.names[name]
            node = node.names[name]

    def is_durable(self, path: str) -> bool:
        """Tell whether a file would be there, and whole, after a restart."""
        node: _File | _Directory | None = self.root
        for name in filter(None, path.split("/")):
            node = node.durable.get(name) if isinstance(node, _Directory) else None
        return isinstance(node, _File) and node.durable == bytes(node.volatile)

    def rot(self, path: str, offset: int, mask: int = 1) -> None:
        """Flip bits of one byte, in memory and on disk."""
        node = self.file(path)
        node.volatile[offset] ^= mask
        node.durable = bytes(node.volatile)

    def files(self) -> dict[str, bytes]:
        """Return the content of every file by path, temporary ones included."""

        def walk(directory: _Directory, prefix: str) -> Iterator[tuple[str, bytes]]:
            for name, node in directory.names.items():
                if isinstance(node, _Directory):
                    yield from walk(node, f"{prefix}/{name}")
                else:
                    yield f"{prefix}/{name}", bytes(node.volatile)

        return dict(walk(self.root, ""))


def _copy(source: _Directory, target: _Directory) -> None:
    for name, node in source.names.items():
        if isinstance(node, _File):
            target.names[name] = _File(bytearray(node.volatile), bytes(node.volatile))
        else:
            target.names[name] = _Directory()
            _copy(node, target.names[name])
    target.durable = dict(target.names)


class _Handle:
    def __init__(self, client: SimFileSystem, path: str, file: _File) -> None:
        self._client, self._path, self._file = client, path, file
        self._boot = client.server.boots

    def _check(self) -> None:
        if self._boot != self._client.server.boots:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), self._path)

    def write(self, data: bytes) -> None:
        def effect() -> None:
            self._check()
            self._file.volatile += data

        self._client._call("write", self._path, effect, torn=lambda: self._tear(data))

    def _tear(self, data: bytes) -> None:
        self._file.volatile += data[: len(data) // 2]

    def sync(self) -> None:
        def effect() -> None:
            self._check()
            self._file.durable = bytes(self._file.volatile)

        self._client._call("sync", self._path, effect)

    def close(self) -> None:
        self._client._call("close", self._path, self._check)


class SimFileSystem:
    """One client of a server."""

    # Every call has its place in the order of events.
    readers = 1

    def __init__(self, server: SimServer | None = None) -> None:
        self.server = server or SimServer()
        self.calls: list[tuple[str, str]] = []
        self._rules: list[_Rule] = []
        self._listings: dict[str, list[str]] | None = None
        self._dead = False

    # -- faults -----------------------------------------------------------------------------

    def on(
        self,
        op: str,
        action: Callable[[], None],
        *,
        contains: str = "",
        when: str = "before",
        first: int = 1,
        times: int = 1,
    ) -> None:
        """Run ``action`` before or after the effect of the ``first`` call of ``op`` and on.

        ``when`` is ``before``, ``after``, or for ``write`` also ``torn``: half the data.
        """
        self._rules.append(_Rule(op, contains, when, action, first, times))

    def fail(self, op: str, number: int, *, contains: str = "", when: str = "before",
             first: int = 1, times: int = 1) -> None:  # fmt: skip
        """Let a call fail with an errno, before or after its effect."""

        def action() -> None:
            raise OSError(number, os.strerror(number))

        self.on(op, action, contains=contains, when=when, first=first, times=times)

    def kill(self) -> None:
        """End this client: the call in progress does not return, later ones do nothing."""
        self._dead = True
        raise ClientKilledError

    def hold_listings(self) -> None:
        """Answer ``listdir`` from now on as of the first time it is asked."""
        self._listings = {}

    def refresh_listings(self) -> None:
        """Let listings be up to date again."""
        self._listings = None

    def _call(self, op: str, path: str, effect: Callable[[], ResultT],
                 *, torn: Callable[[], None] | None = None) -> ResultT:  # fmt: skip
        if self._dead:
            raise ClientKilledError
        self.calls.append((op, path))
        if torn is not None:
            for rule in self._rules:
                if rule.due(op, path, "torn"):
                    torn()
                    rule.action()
        self._act(op, path, "before")
        result = effect()
        self._act(op, path, "after")
        return result

    def _act(self, op: str, path: str, when: str) -> None:
        for rule in self._rules:
            if rule.due(op, path, when):
                rule.action()

    # -- the calls of FileSystem ------------------------------------------------------------

    def create(self, path: str) -> _Handle:
        """Create a file that must not exist."""

        def effect() -> _Handle:
            directory, name = self._parent(path)
            if name in directory.names:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
            file = directory.names[name] = _File()
            return _Handle(self, path, file)

        return self._call("create", path, effect)

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return up to ``length`` bytes from ``offset`` on."""

        def effect() -> bytes:
            data = bytes(self.server.file(path).volatile)
            return data[offset:] if length is None else data[offset : offset + length]

        return self._call("read", path, effect)

    def pieces(self, path: str) -> Iterator[bytes]:
        """Yield the content in order."""
        offset = 0
        while piece := self.read(path, offset, READ_BYTES):
            yield piece
            offset += len(piece)

    def size(self, path: str) -> int:
        """Return a file's size in bytes."""
        return self._call("size", path, lambda: len(self.server.file(path).volatile))

    def rename(self, source: str, target: str) -> None:
        """Rename a file, replacing ``target``."""

        def effect() -> None:
            file = self.server.file(source)
            old, name = self._parent(source)
            new, new_name = self._parent(target)
            del old.names[name]
            new.names[new_name] = file

        self._call("rename", target, effect)

    def link(self, source: str, target: str) -> None:
        """Give a file a second name that must not exist."""

        def effect() -> None:
            if not self.server.hard_links:
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), target)
            directory, name = self._parent(target)
            if name in directory.names:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
            directory.names[name] = self.server.file(source)

        self._call("link", target, effect)

    def unlink(self, path: str) -> None:
        """Remove a name."""

        def effect() -> None:
            self.server.file(path)
            directory, name = self._parent(path)
            del directory.names[name]

        self._call("unlink", path, effect)

    def mkdir(self, path: str) -> None:
        """Create a directory that must not exist."""

        def effect() -> None:
            directory, name = self._parent(path)
            if name in directory.names:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
            directory.names[name] = _Directory()

        self._call("mkdir", path, effect)

    def listdir(self, path: str) -> list[str]:
        """Return the names in a directory, as of an earlier time while listings are held."""

        def effect() -> list[str]:
            if self._listings is not None and path in self._listings:
                return list(self._listings[path])
            names = list(self.server.directory(path).names)
            if self._listings is not None:
                self._listings[path] = names
            return list(names)

        return self._call("listdir", path, effect)

    def exists(self, path: str) -> bool:
        """Tell whether a name exists."""

        def effect() -> bool:
            try:
                self.server.find(path)
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

        return self._call("exists", path, effect)

    def sync_directory(self, path: str) -> None:
        """Make a directory's names durable."""

        def effect() -> None:
            directory = self.server.directory(path)
            directory.durable = dict(directory.names)
            if self.server.ordered:
                self.server.keep_names_to(path)

        self._call("sync_directory", path, effect)

    def drop_cache(self, path: str) -> None:
        """Do nothing: there is no cache of content."""

    def _parent(self, path: str) -> tuple[_Directory, str]:
        return self.server.directory(os.path.dirname(path)), os.path.basename(path)
