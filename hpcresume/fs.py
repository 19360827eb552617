"""The file-system seam, and how a file gets into the run directory.

Contract of :func:`publish`: when it returns a :class:`Receipt`, any node can read the file
whole after this process, this node or the file server restarts.  Published files are
write-once: a name never changes content, and nothing is appended or overwritten.

Order of events, and what a kill between two of them leaves behind:

  1. create a random temporary name in the same directory  -> garbage
  2. write everything                                      -> garbage
  3. fsync the file, which is where a quota is reported    -> garbage
  4. close it, which is where NFS reports write errors     -> garbage
  5. rename to the final name, or link where the name must be new -> a whole file or none
  6. fsync the directory                                   -> a whole file without a receipt
  7. read it back by name and compare the digest           -> a whole file without a receipt
  8. return the receipt

The read-back is not decoration: a file server that restarts between 5 and 6 loses the name,
and only reading the file by that name tells.  An error in 5 may come after the effect (a
lost reply), so the final name is looked at before the error counts.

Not promised: that a file without a receipt is absent.  Readers take the union of what they
find and verify, so publishing twice is harmless and a late writer can only add.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from typing import Protocol

import msgspec

from hpcresume.errors import CorruptDataError, SharedStorageError
from hpcresume.failpoints import failpoint

READ_BYTES = 1 << 20
TEMPORARY_PREFIX = ".tmp-"
SHARED_MODE = 0o2750
"""Mode of a directory that a group may read, and everything published below it."""


class WriteHandle(Protocol):
    """A file being written once."""

    def write(self, data: bytes) -> None:
        """Append all of ``data``."""

    def sync(self) -> None:
        """Make what was written durable; a full disk or quota may be reported here."""

    def close(self) -> None:
        """Close the file; a network file system may report write errors here."""


class Readable(Protocol):
    """The calls that reading needs; a file system, or a part of a file."""

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return up to ``length`` bytes from ``offset`` on (all of them by default)."""

    def pieces(self, path: str) -> Iterator[bytes]:
        """Yield the content in order, in pieces of up to 1 MiB; the file is opened once."""

    def size(self, path: str) -> int:
        """Return the size of a file in bytes."""


class FileSystem(Readable, Protocol):
    """The calls that everything durable goes through; every method may raise OSError.

    Attributes:
        readers: How many files are worth opening at the same time.
    """

    readers: int

    def create(self, path: str) -> WriteHandle:
        """Create a file that must not exist, readable by its owner only."""

    def rename(self, source: str, target: str) -> None:
        """Rename a file, replacing ``target``."""

    def link(self, source: str, target: str) -> None:
        """Give a file a second name that must not exist."""

    def unlink(self, path: str) -> None:
        """Remove a name."""

    def mkdir(self, path: str) -> None:
        """Create a directory that must not exist, usable by its owner only."""

    def listdir(self, path: str) -> list[str]:
        """Return the names in a directory, unsorted, possibly out of date."""

    def exists(self, path: str) -> bool:
        """Tell whether a name exists."""

    def sync_directory(self, path: str) -> None:
        """Make a directory's names durable."""

    def drop_cache(self, path: str) -> None:
        """Ask that the next read comes from storage; a hint, never an error."""


class _PosixHandle:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class PosixFileSystem:
    """The file system of this machine."""

    # A call to a busy metadata server takes milliseconds, and many are answered side by side.
    readers = 16

    def create(self, path: str) -> WriteHandle:
        """Create a file that must not exist, mode 0600, or 0640 in a shared directory."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(path, flags, 0o600)
        if _is_shared(os.path.dirname(path)):
            os.fchmod(fd, 0o640)
        return _PosixHandle(fd)

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return up to ``length`` bytes from ``offset`` on (all of them by default)."""
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            if length is None:
                return file.read()
            pieces = []
            while length > 0 and (piece := file.read(length)):
                pieces.append(piece)
                length -= len(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def pieces(self, path: str) -> Iterator[bytes]:
        """Yield the content in order; each opening is a call to a metadata server."""
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(READ_BYTES):
                yield piece

    def size(self, path: str) -> int:
        """Return the size of a file in bytes."""
        return os.stat(path).st_size

    def rename(self, source: str, target: str) -> None:
        """Rename a file, replacing ``target``."""
        os.rename(source, target)

    def link(self, source: str, target: str) -> None:
        """Give a file a second name that must not exist."""
        os.link(source, target)

    def unlink(self, path: str) -> None:
        """Remove a name."""
        os.unlink(path)

    def mkdir(self, path: str) -> None:
        """Create a directory that must not exist, mode 0700, or as its parent where shared."""
        os.mkdir(path, 0o700)
        if _is_shared(os.path.dirname(path)):
            os.chmod(path, SHARED_MODE)

    def listdir(self, path: str) -> list[str]:
        """Return the names in a directory."""
        return os.listdir(path)

    def exists(self, path: str) -> bool:
        """Tell whether a name exists."""
        try:
            os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def sync_directory(self, path: str) -> None:
        """Make a directory's names durable, where the file system can."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            # Some network and FUSE file systems cannot sync a directory; the read-back decides.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EROFS):
                raise
        finally:
            os.close(fd)

    def drop_cache(self, path: str) -> None:
        """Ask that the next read comes from storage."""
        with contextlib.suppress(OSError), open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _is_shared(directory: str) -> bool:
    return stat.S_IMODE(os.stat(directory or ".").st_mode) == SHARED_MODE


POSIX = PosixFileSystem()


class Receipt(msgspec.Struct, frozen=True):
    """Proof that a file is published.

    Attributes:
        path: Its final name.
        size_bytes: Its length.
        digest: SHA-256 of its content.
    """

    path: str
    size_bytes: int
    digest: bytes


class storage_errors:  # noqa: N801  # used as a function: `with storage_errors("read", path):`
    """Turn an OSError of the run directory's file system into a SharedStorageError.

    Args:
        what: What was tried, as a verb, for example ``read``.
        path: What it was tried on.
        missing: Whether FileNotFoundError and NotADirectoryError pass as they are.
    """

    __slots__ = ("_missing", "_path", "_what")

    def __init__(self, what: str, path: str, *, missing: bool = False) -> None:
        self._what, self._path, self._missing = what, path, missing

    def __enter__(self) -> None:
        """Nothing is needed."""

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Raise the typed error in place of an OSError."""
        if not isinstance(error, OSError):
            return
        if self._missing and isinstance(error, FileNotFoundError | NotADirectoryError):
            return
        raise SharedStorageError(
            f"cannot {self._what} {self._path}: {error.strerror or error}. "
            "The file system that holds the run directory refused it; local data is intact. "
            "Check space, quota and mount, then run the same command again.",
            path=self._path,
            errno=error.errno,
        ) from error


def reading(path: str) -> storage_errors:
    """Turn an OSError into a SharedStorageError, except that there is no such file.

    Args:
        path: What is read.
    """
    return storage_errors("read", path, missing=True)


def ensure_directory(fs: FileSystem, path: str) -> None:
    """Create a directory and its parents where they are missing, durably.

    A published file is only as durable as the names of the directories above it.

    Raises:
        SharedStorageError: The file system refused.
    """
    with storage_errors("look for", path):
        if not path or fs.exists(path):
            return
    parent = os.path.dirname(path)
    ensure_directory(fs, parent)
    with storage_errors("create", path):
        with contextlib.suppress(FileExistsError):
            fs.mkdir(path)
        fs.sync_directory(parent or ".")


def publish(
    fs: FileSystem, path: str, parts: Iterable[bytes], *, label: str, exclusive: bool = False
) -> Receipt:
    """Publish a file and return the proof; see the module's contract.

    Args:
        fs: File system that holds ``path``.
        path: Final name.  Its directory exists.
        parts: The content, in pieces.
        label: Prefix of the failpoints, for example ``segment``.
        exclusive: The name must be new.  Otherwise the caller guarantees that the name
            stands for this content alone (it holds the digest, or a nonce).

    Raises:
        FileExistsError: ``exclusive``, and the name holds something else.
        SharedStorageError: The file system refused or lost the file; try again later with
            a new call.  The same temporary file is never synced twice, since after a failed
            fsync the kernel may have dropped the data.
    """
    directory = os.path.dirname(path)
    temporary = os.path.join(directory, f"{TEMPORARY_PREFIX}{os.urandom(8).hex()}")
    try:
        digest, size = _write_temporary(fs, temporary, path, parts, label=label)
        _give_name(fs, temporary, path, digest, exclusive=exclusive)
        with storage_errors("sync the directory of", path):
            failpoint(f"{label}.after_rename")
            fs.sync_directory(directory)
            failpoint(f"{label}.after_directory_sync")
    except BaseException:
        with contextlib.suppress(OSError):
            fs.unlink(temporary)
        raise
    fs.drop_cache(path)
    with storage_errors("read back", path):
        found = digest_of(fs, path)
        failpoint(f"{label}.after_read_back")
    if found != digest:
        raise SharedStorageError(
            f"{path} reads back differently from what was written. "
            "The file system lost or changed it; local data is intact and is published again.",
            path=path,
        )
    return Receipt(path, size, digest)


def _write_temporary(
    fs: FileSystem, temporary: str, path: str, parts: Iterable[bytes], *, label: str
) -> tuple[bytes, int]:
    with storage_errors("write", path):
        handle = fs.create(temporary)
        failpoint(f"{label}.after_create")
    digest, size = hashlib.sha256(), 0
    try:
        # An error of whoever makes the parts is not the file system's, and passes as it is.
        for part in parts:
            with storage_errors("write", path):
                handle.write(part)
            digest.update(part)
            size += len(part)
        with storage_errors("write", path):
            failpoint(f"{label}.after_write")
            handle.sync()
            failpoint(f"{label}.after_sync")
    except BaseException:
        with contextlib.suppress(OSError):
            handle.close()
        raise
    with storage_errors("write", path):
        handle.close()
        failpoint(f"{label}.after_close")
    return digest.digest(), size


def _give_name(
    fs: FileSystem, temporary: str, path: str, digest: bytes, *, exclusive: bool
) -> None:
    try:
        if exclusive:
            _link_or_create(fs, temporary, path)
        else:
            fs.rename(temporary, path)
    except OSError as error:
        # The reply may have been lost after the effect: the name itself tells.
        if _holds(fs, path, digest):
            with contextlib.suppress(OSError):
                fs.unlink(temporary)
            return
        if exclusive and isinstance(error, FileExistsError):
            raise
        with storage_errors("name", path):
            raise


def _holds(fs: FileSystem, path: str, digest: bytes) -> bool:
    with storage_errors("look at", path, missing=True):
        try:
            return digest_of(fs, path) == digest
        except FileNotFoundError:
            return False


def _link_or_create(fs: FileSystem, temporary: str, path: str) -> None:
    try:
        fs.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        # No hard links here.  An exclusive create is as exclusive; a kill midway leaves a
        # torn file, which every reader detects by its digest.
        _copy_exclusively(fs, temporary, path)
    fs.unlink(temporary)


def _copy_exclusively(fs: FileSystem, source: str, target: str) -> None:
    handle = fs.create(target)
    try:
        try:
            handle.write(fs.read(source))
            handle.sync()
        finally:
            handle.close()
    except BaseException:
        # The name was created here, and half a file under it would block it for good.
        with contextlib.suppress(OSError):
            fs.unlink(target)
        raise


def digest_of(fs: Readable, path: str) -> bytes:
    """Return the SHA-256 of a file's content, read in pieces."""
    digest = hashlib.sha256()
    for piece in fs.pieces(path):
        digest.update(piece)
    return digest.digest()


def list_names(fs: FileSystem, path: str) -> list[str]:
    """Return the published names in a directory, sorted; none where it does not exist.

    Raises:
        SharedStorageError: The file system refused.
    """
    try:
        with reading(path):
            names = fs.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if not name.startswith("."))


def read_exact(fs: Readable, path: str, offset: int, length: int) -> bytes:
    """Return exactly ``length`` bytes.

    Raises:
        CorruptDataError: The file is shorter.
    """
    data = fs.read(path, offset, length)
    if len(data) != length:
        raise CorruptDataError(
            f"{path} ends at byte {offset + len(data)}, {length - len(data)} bytes too early. "
            "It is set aside and its sources are computed again.",
            path=path,
        )
    return data


def replace_file(path: str, data: bytes, *, mode: int = 0o600) -> None:
    """Give a file outside the run directory new content; a reader finds the old or the new one.

    Raises:
        OSError: The file system refused; the old content stays.
    """
    temporary = os.path.join(
        os.path.dirname(path), f"{TEMPORARY_PREFIX}{os.path.basename(path)}-{os.urandom(8).hex()}"
    )
    try:
        with open(temporary, "xb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
