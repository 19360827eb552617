"""Node-local disks in memory: a stand-in for LMDB below the ledger's own code.

``hpcresume.ledger.store`` runs as it is; what it calls of ``lmdb``, ``os`` and ``shutil`` is
answered here.  Transactions are atomic; a crash of the node keeps what was synced, damages
the file, or loses the disk; a death of processes loses nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import types
from collections.abc import Callable, Iterator
from typing import Any

import lmdb

from hpcresume.ledger import store
from hpcresume.task import recovery

Tables = dict[str, dict[bytes, bytes]]


class Disks:
    """The databases of all nodes, by the path of their directory.

    Attributes:
        on_event: Called before each commit and each sync, with the path and what it is;
            it may raise, or let others run.
        on_delete: Called with the path and the number of a commit that is deleted.
    """

    def __init__(self) -> None:
        self.files: dict[str, Database] = {}
        self.on_event: Callable[[str, str], None] = lambda _path, _what: None
        self.on_delete: Callable[[str, bytes], None] = lambda _path, _key: None

    def remove(self, prefix: str) -> None:
        """Remove everything below a directory."""
        for path in [path for path in self.files if path.startswith(f"{prefix}/")]:
            del self.files[path]

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        """Let the ledger's code see these disks."""
        kept = store.lmdb, store.os, store.shutil, recovery.os
        store.lmdb, store.os = _Lmdb(self), _Os(self)
        store.shutil, recovery.os = _Shutil, _Os(self)
        try:
            yield
        finally:
            store.lmdb, store.os, store.shutil, recovery.os = kept


class Database:
    """One ledger's file."""

    def __init__(self) -> None:
        self.tables: Tables = {}
        self.synced: Tables = {}
        self.damage = ""

    def crash(self, damage: str) -> None:
        """Lose what was not synced; ``damage``: none, ``structure``, ``value`` or ``empty``."""
        self.tables = {name: dict(table) for name, table in self.synced.items()}
        self.damage = damage
        if damage == "value":
            self.flip()

    def flip(self) -> None:
        """Flip a bit of some value, which the engine reads without noticing."""
        for name in ("commits", "in_flight", "state"):
            for key, value in self.tables.get(name, {}).items():
                self.tables[name][key] = value[:-1] + bytes([value[-1] ^ 4])
                return

    def copy(self) -> Tables:
        return {name: dict(table) for name, table in self.tables.items()}


class _Shutil:
    @staticmethod
    def disk_usage(_path: str) -> Any:
        return types.SimpleNamespace(free=1 << 40)


class _Path:
    join = staticmethod(os.path.join)
    basename = staticmethod(os.path.basename)

    def __init__(self, disks: Disks) -> None:
        self._disks = disks

    def getsize(self, path: str) -> int:
        database = self._disks.files.get(os.path.dirname(path))
        if database is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return 0 if database.damage == "empty" else 4096

    def exists(self, path: str) -> bool:
        return os.path.dirname(path) in self._disks.files


class _Os:
    def __init__(self, disks: Disks) -> None:
        self._disks, self.path = disks, _Path(disks)

    def makedirs(self, path: str, mode: int) -> None:
        del mode
        if path in self._disks.files:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        self._disks.files[path] = Database()

    def rename(self, source: str, target: str) -> None:
        self._disks.files[target] = self._disks.files.pop(source)


class _Verify:
    VerifyError = lmdb.verify.VerifyError

    def __init__(self, disks: Disks) -> None:
        self._disks = disks

    def verify(self, path: str) -> list[str]:
        return ["a page is zero"] if self._disks.files[path].damage == "structure" else []


class _Lmdb:
    """What the ledger uses of the module ``lmdb``."""

    Error, MapFullError, MapResizedError = lmdb.Error, lmdb.MapFullError, lmdb.MapResizedError

    def __init__(self, disks: Disks) -> None:
        self._disks, self.verify = disks, _Verify(disks)

    def open(self, path: str, **_options: Any) -> _Environment:
        database = self._disks.files.get(path)
        assert database is not None, f"{path}: no such directory"
        assert database.damage in {"", "value"}, f"{path}: the engine was given a damaged file"
        return _Environment(self._disks, path, database)


class _Environment:
    def __init__(self, disks: Disks, path: str, database: Database) -> None:
        self._disks, self._path, self._database = disks, path, database

    def open_db(self, name: bytes) -> str:
        self._database.tables.setdefault(name.decode(), {})
        return name.decode()

    @contextlib.contextmanager
    def begin(self, *, write: bool = False) -> Iterator[_Transaction]:
        if not write:
            yield _Transaction(self._disks, self._path, self._database.tables)
            return
        self._disks.on_event(self._path, "begin")
        before = self._database.copy()
        try:
            yield _Transaction(self._disks, self._path, self._database.tables)
        except BaseException:
            self._database.tables = before
            raise

    def sync(self, _force: bool) -> None:
        self._disks.on_event(self._path, "sync")
        self._database.synced = self._database.copy()

    def reader_check(self) -> int:
        return 0

    def close(self) -> None:
        """Nothing is held."""


class _Transaction:
    def __init__(self, disks: Disks, path: str, tables: Tables) -> None:
        self._disks, self._path, self._tables = disks, path, tables

    def put(self, key: bytes, value: bytes, *, db: str, append: bool = False) -> None:
        assert not append or key > max(self._tables[db], default=b""), "appended out of order"
        self._tables[db][key] = bytes(value)

    def get(self, key: bytes, *, db: str) -> bytes | None:
        return self._tables[db].get(key)

    def delete(self, key: bytes, *, db: str) -> None:
        self._tables[db].pop(key, None)

    def cursor(self, db: str) -> _Cursor:
        return _Cursor(self._disks, self._path, self._tables[db])


class _Cursor:
    def __init__(self, disks: Disks, path: str, table: dict[bytes, bytes]) -> None:
        self._disks, self._path, self._table = disks, path, table
        self._key = b""

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        return iter(sorted(self._table.items()))

    def _seek(self, keys: list[bytes], position: int) -> bool:
        self._key = keys[position] if keys else b""
        return bool(keys)

    def first(self) -> bool:
        return self._seek(sorted(self._table), 0)

    def last(self) -> bool:
        return self._seek(sorted(self._table), -1)

    def next(self) -> bool:
        return self._seek([key for key in sorted(self._table) if key > self._key], 0)

    def set_range(self, key: bytes) -> bool:
        return self._seek([found for found in sorted(self._table) if found >= key], 0)

    def key(self) -> bytes:
        return self._key

    def value(self) -> bytes:
        return self._table[self._key]

    def delete(self) -> None:
        self._disks.on_delete(self._path, self._key)
        del self._table[self._key]
        self.next()
