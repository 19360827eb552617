"""The ledger's LMDB: a queue of committed work that is not published yet.

One process writes it (the driver); the publisher reads it.  Three databases:

``commits``    u64 sequence -> CRC-32C and one group commit: chunk frames and failures
``in_flight``  u64 call     -> whether it runs alone, since when, and the sources that a worker
                            holds
``state``      who writes it, counters and progress

Every value has a CRC-32C over its key and data in front.

A commit is deleted once its receipt has come, so the file stays as small as what is at risk.
The environment is opened without sync-per-transaction: group commits call ``sync`` when
they return, and marks, which matter only when a process of this attempt dies, do not wait
for the disk.  A process's death loses nothing that was committed; after a crash of the node
the file is verified before the engine opens it, and set aside if it is damaged.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

import google_crc32c
import lmdb
import lmdb.verify
import msgspec
from pyroaring import BitMap

from hpcresume.errors import CorruptDataError, LocalStorageError
from hpcresume.failpoints import failpoint
from hpcresume.segment import bitmap as bitmaps
from hpcresume.segment.container import DECODE_ERRORS
from hpcresume.segment.frame import Blob
from hpcresume.segment.segment import Failure, Progress, StageCount, Writer

INITIAL_MAP_BYTES = 64 << 20
_READ_BYTES = 64 << 20
_KEY = struct.Struct(">Q")
_CRC = struct.Struct("<I")
_MARK = struct.Struct(">?d")
ResultT = TypeVar("ResultT")


class LedgerIdentity(msgspec.Struct, frozen=True):
    """Whose ledger it is.

    Attributes:
        run_id: The run.
        writer: Round, task and epoch.
        code: Number of the code snapshot.
        stage_names: Names of the stages.
        has_parts: Whether rows lie in blobs beside the ledger, and become parts.
    """

    run_id: str
    writer: Writer
    code: int
    stage_names: list[str]
    has_parts: bool = False


class LedgerState(msgspec.Struct):
    """Counters and progress as of the last commit."""

    stages: list[StageCount] = []
    progress: Progress = Progress()


class Commit(msgspec.Struct, array_like=True):
    """One group commit."""

    frames: list[bytes] = []
    failures: list[Failure] = []


_COMMIT = msgspec.msgpack.Decoder(Commit)


class StoredBlob(NamedTuple):
    """A blob on this node: path of its file, and offset and length in it."""

    path: str
    offset: int
    length: int

    @classmethod
    def of(cls, blob: Blob, directory: str) -> StoredBlob:
        """Return a committed frame's blob as one in the directory of an attempt's blobs."""
        return cls(os.path.join(directory, blob.file), blob.offset, blob.length)


@dataclass(slots=True)
class Batch:
    """What one transaction is to write."""

    frames: list[bytes] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    mark: dict[int, bytes] = field(default_factory=dict)
    unmark: list[int] = field(default_factory=list)
    state: LedgerState | None = None
    blobs: list[StoredBlob] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        """Bytes of frames in the batch."""
        return sum(map(len, self.frames))

    @property
    def durable(self) -> bool:
        """Whether the batch holds results, which are synced."""
        return bool(self.frames or self.failures)


@dataclass(frozen=True, slots=True)
class InFlight:
    """A call that a worker held.

    Attributes:
        sources: Its sources.
        alone: It held one source that had been in flight at a death before, and nothing
            else ran.
        since: When the worker began with it, on the node's monotonic clock; 0 while it waits
            behind another call.
    """

    sources: BitMap
    alone: bool = False
    since: float = 0.0

    def encode(self) -> bytes:
        """Return the mark's bytes."""
        return _MARK.pack(self.alone, self.since) + bitmaps.dump(self.sources)

    @classmethod
    def decode(cls, data: bytes, *, what: str) -> InFlight:
        """Return a mark from its bytes."""
        alone, since = _MARK.unpack_from(data)
        return cls(bitmaps.load(data[_MARK.size :], what=what), alone, since)


class Ledger:
    """An open ledger."""

    def __init__(self, path: str, *, map_size: int = INITIAL_MAP_BYTES) -> None:
        self.path = path
        self._env = lmdb.open(
            path,
            map_size=map_size,
            max_dbs=3,
            mode=0o600,
            sync=False,
            metasync=False,
            writemap=False,
            max_spare_txns=1,
        )
        self._commits = self._env.open_db(b"commits")
        self._in_flight = self._env.open_db(b"in_flight")
        self._state = self._env.open_db(b"state")

    @classmethod
    def create(
        cls, path: str, identity: LedgerIdentity, *, map_size: int = INITIAL_MAP_BYTES
    ) -> Ledger:
        """Create an attempt's ledger.

        Raises:
            LocalStorageError: The disk refused.
        """
        try:
            os.makedirs(path, mode=0o700)
            ledger = cls(path, map_size=map_size)
        except (OSError, lmdb.Error) as error:
            raise _disk_error(path, error) from error
        value = _seal(b"identity", msgspec.json.encode(identity))
        ledger._write(lambda txn: txn.put(b"identity", value, db=ledger._state))
        ledger._sync()
        return ledger

    @classmethod
    def open_verified(cls, path: str) -> Ledger:
        """Open a ledger that another process wrote, after verifying its file without the engine.

        The engine dies on a damaged file (SIGBUS, SIGABRT) or takes it for an empty one.

        Raises:
            CorruptDataError: The file is damaged; it must be set aside.
        """
        data = os.path.join(path, "data.mdb")
        try:
            if os.path.getsize(data) == 0:
                raise _damaged(path, "its file is empty")
            problems = lmdb.verify.verify(path)
        except (OSError, lmdb.verify.VerifyError) as error:
            raise _damaged(path, str(error)) from error
        if problems:
            raise _damaged(path, problems[0])
        try:
            ledger = cls(path, map_size=max(INITIAL_MAP_BYTES, os.path.getsize(data)))
        except lmdb.Error as error:
            raise _damaged(path, str(error)) from error
        try:
            ledger._env.reader_check()
            ledger.identity()
        except lmdb.Error as error:
            ledger.close()
            raise _damaged(path, str(error)) from error
        except CorruptDataError:
            ledger.close()
            raise
        return ledger

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def commit(self, batch: Batch) -> int:
        """Write a batch in one transaction; results are on disk when it returns.

        Returns:
            The sequence number of the commit, or of the last one if the batch holds no results.

        Raises:
            LocalStorageError: The disk is full; the transaction is rolled back and nothing
                that was committed before is affected.
        """
        # A commit on disk must not name rows that are not.
        for path in dict.fromkeys(blob.path for blob in batch.blobs):
            self._sync_blob(path)
        sequence = self._write(lambda txn: self._put(txn, batch))
        if batch.durable:
            self._sync()
        return sequence

    def _sync(self) -> None:
        try:
            failpoint("ledger.before_sync")
            self._env.sync(True)
            failpoint("ledger.after_commit")
        except (OSError, lmdb.Error) as error:
            raise _disk_error(self.path, error) from error

    def _sync_blob(self, path: str) -> None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise _disk_error(path, error) from error

    def _put(self, txn: lmdb.Transaction, batch: Batch) -> int:
        cursor = txn.cursor(self._commits)
        sequence = self._sequence(cursor.key()) if cursor.last() else self._released(txn)
        if batch.durable:
            sequence += 1
            key = _KEY.pack(sequence)
            txn.put(key, _seal(key, _encode_commit(batch)), append=True, db=self._commits)
        for chunk, sources in batch.mark.items():
            key = _KEY.pack(chunk)
            txn.put(key, _seal(key, sources), db=self._in_flight)
        for chunk in batch.unmark:
            txn.delete(_KEY.pack(chunk), db=self._in_flight)
        if batch.state is not None:
            data = msgspec.msgpack.encode(batch.state)
            txn.put(b"state", _seal(b"state", data), db=self._state)
        return sequence

    def _released(self, txn: lmdb.Transaction) -> int:
        value = txn.get(b"released", db=self._state)
        return self._sequence(self._unseal(b"released", value)) if value else 0

    def _sequence(self, key: bytes | memoryview[int]) -> int:
        if len(key) != _KEY.size:
            raise _damaged(self.path, f"a commit's key has {len(key)} bytes")
        return int(_KEY.unpack(key)[0])

    def _unseal(self, key: bytes, value: bytes | memoryview[int]) -> bytes:
        # The engine reads a flipped bit without noticing (its own check is of structure only).
        data = bytes(value[_CRC.size :])
        if value[: _CRC.size] != _checksum(key, data):
            raise _damaged(self.path, f"the value of {key!r} fails its CRC")
        return data

    def release(self, last: int) -> None:
        """Delete the commits up to ``last``, which are published."""

        def delete(txn: lmdb.Transaction) -> None:
            cursor = txn.cursor(self._commits)
            while cursor.first() and self._sequence(cursor.key()) <= last:
                cursor.delete()
            released = _KEY.pack(max(last, self._released(txn)))
            txn.put(b"released", _seal(b"released", released), db=self._state)

        self._write(delete)

    def _write(self, action: Callable[[lmdb.Transaction], ResultT]) -> ResultT:
        while True:
            try:
                with self._env.begin(write=True) as txn:
                    return action(txn)
            except lmdb.MapFullError:
                self._grow()
            except lmdb.MapResizedError:
                self._env.set_mapsize(0)
            except lmdb.Error as error:
                # A full disk is reported as EIO; the transaction was rolled back.
                raise _disk_error(self.path, error) from error

    def _grow(self) -> None:
        size = self._env.info()["map_size"]
        free = shutil.disk_usage(self.path).free
        if free < min(size, INITIAL_MAP_BYTES):
            raise LocalStorageError(
                f"the ledger in {self.path} needs to grow beyond {size >> 20} MiB and its disk "
                f"has {free >> 20} MiB left. Committed work is published; this task stops. "
                "Free space on the node, or give another directory with --local-dir.",
                path=self.path,
                free=free,
            )
        self._env.set_mapsize(size * 2)

    def identity(self) -> LedgerIdentity:
        """Return whose ledger it is.

        Raises:
            CorruptDataError: It does not say.
        """
        data = self._read(lambda txn: txn.get(b"identity", db=self._state))
        try:
            data = self._unseal(b"identity", data or b"")
            return msgspec.json.decode(data, type=LedgerIdentity)
        except DECODE_ERRORS as error:
            raise _damaged(self.path, "it does not say whose it is") from error

    def state(self) -> LedgerState:
        """Return counters and progress as of the last commit."""
        data = self._read(lambda txn: txn.get(b"state", db=self._state))
        if not data:
            return LedgerState()
        try:
            return msgspec.msgpack.decode(self._unseal(b"state", data), type=LedgerState)
        except DECODE_ERRORS as error:
            raise _damaged(self.path, f"its counters cannot be decoded ({error})") from error

    def last_sequence(self) -> int:
        """Return the sequence number of the last commit, published or not."""

        def last(txn: lmdb.Transaction) -> int:
            cursor = txn.cursor(self._commits)
            return self._sequence(cursor.key()) if cursor.last() else self._released(txn)

        return self._read(last)

    def pending(
        self, *, after: int = 0, limit_bytes: int = 1 << 62
    ) -> Iterator[tuple[int, Commit]]:
        """Yield unpublished commits in order, in short read transactions.

        A long read transaction would keep the writer from reusing the pages it frees.

        Raises:
            CorruptDataError: A commit fails its CRC.
        """
        taken = 0
        while taken < limit_bytes:
            found = self._read(partial(self._some, after=after, limit=limit_bytes - taken))
            if not found:
                return
            for sequence, data in found:
                yield sequence, self._decode(sequence, data)
                after, taken = sequence, taken + len(data)

    def _some(self, txn: lmdb.Transaction, *, after: int, limit: int) -> list[tuple[int, bytes]]:
        found, taken = [], 0
        cursor = txn.cursor(self._commits)
        positioned = cursor.set_range(_KEY.pack(after + 1))
        while positioned and taken < min(limit, _READ_BYTES):
            value = bytes(cursor.value())
            found.append((self._sequence(cursor.key()), value))
            taken += len(value)
            positioned = cursor.next()
        return found

    def _decode(self, sequence: int, data: bytes) -> Commit:
        try:
            return _COMMIT.decode(self._unseal(_KEY.pack(sequence), data))
        except DECODE_ERRORS as error:
            raise _damaged(self.path, f"commit {sequence} cannot be decoded") from error

    def in_flight(self) -> list[InFlight]:
        """Return the calls that workers held when the last mark was written, oldest first."""

        def read(txn: lmdb.Transaction) -> list[bytes]:
            return [
                self._unseal(bytes(key), bytes(value)) for key, value in txn.cursor(self._in_flight)
            ]

        return [InFlight.decode(data, what=self.path) for data in self._read(read)]

    def _read(self, action: Callable[[lmdb.Transaction], ResultT]) -> ResultT:
        while True:
            try:
                with self._env.begin() as txn:
                    return action(txn)
            except lmdb.MapResizedError:
                self._env.set_mapsize(0)


def _seal(key: bytes, data: bytes) -> bytes:
    """Return a value as it is stored: the CRC-32C of key and data, then the data."""
    return _checksum(key, data) + data


def _checksum(key: bytes, data: bytes) -> bytes:
    return _CRC.pack(google_crc32c.extend(google_crc32c.value(key), data))


def _encode_commit(batch: Batch) -> bytes:
    try:
        return msgspec.msgpack.encode(Commit(batch.frames, batch.failures))
    except UnicodeEncodeError:
        # User code may raise with a file name that is not UTF-8 in its message.
        return msgspec.msgpack.encode(Commit(batch.frames, list(map(_printable, batch.failures))))


def _printable(failure: Failure) -> Failure:
    texts = {
        name: value.encode("utf-8", "backslashreplace").decode()
        for name, value in msgspec.structs.asdict(failure).items()
        if isinstance(value, str)
    }
    return msgspec.structs.replace(failure, **texts)


def set_aside(path: str) -> str:
    """Rename a damaged ledger's directory so that nothing opens it again; return the new name."""
    target = f"{path}.damaged"
    with contextlib.suppress(OSError):
        os.rename(path, target)
    return target


def _damaged(path: str, why: str) -> CorruptDataError:
    return CorruptDataError(
        f"the ledger in {path} is damaged: {why}. "
        "It is set aside; what was published is kept, the rest is computed again.",
        path=path,
        why=why,
    )


def _disk_error(path: str, error: Exception) -> LocalStorageError:
    return LocalStorageError(
        f"the node-local disk refused the ledger in {path}: {error}. "
        "It is full or failing. What was committed is published and this task stops. "
        "Free space on the node, or give another directory with --local-dir.",
        path=path,
    )
