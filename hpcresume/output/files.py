"""Link the files of ``ctx.output`` that belong to completed sources into one directory.

Layout: ``DIR/<source>/<item>/<name>``.  ``<source>`` is the source's id, percent-encoded;
``<item>`` is the item's path (``root`` for the source itself), so that two items of a source
may each write a file of one name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from pathlib import Path
from urllib.parse import quote

from hpcresume.errors import SharedStorageError
from hpcresume.fs import TEMPORARY_PREFIX
from hpcresume.ids import source_digest
from hpcresume.output.rows import LoadedFrame, bad_segment
from hpcresume.run.directory import RunDir

_LONGEST_NAME = 180
_NO_LINKS_HERE = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)


def directory_name(source_id: str) -> str:
    """Return the directory name of a source: different for different ids, safe in any shell.

    Everything but letters, digits, ``_``, ``-`` and inner dots is percent-encoded.  A name
    that would be too long is cut and ends in ``~`` and the id's digest; ``~`` occurs in no
    other name.
    """
    name = quote(source_id, safe="", errors="surrogatepass").replace("~", "%7E")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if name and len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:_LONGEST_NAME]}~{source_digest(source_id).hex()}"


class FileLinker:
    """Links files, copying where the file system cannot link.

    Attributes:
        count: Files linked so far.
    """

    def __init__(self, run: RunDir, directory: Path) -> None:
        self._run, self._directory = run, directory
        self.count = 0

    def link(self, source_id: str, origin: LoadedFrame) -> None:
        """Link all files of one source.

        Raises:
            BadSegmentError: The segment lists a file that the run directory lacks.
            SharedStorageError: The directory cannot be written.
        """
        published = self._run.attempt_path(origin.segment.attempt, "files")
        for item, name in origin.files(source_id):
            below = os.path.join(item or "root", name)
            original = os.path.join(published, source_digest(source_id).hex(), below)
            if not os.path.isfile(original):
                why = f"the file {name!r} of source {source_id!r} is missing from {published}."
                raise bad_segment(self._run, origin.segment, why)
            _place(original, self._directory / directory_name(source_id) / below)
            self.count += 1


def _place(original: str, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renaming one link of a file onto another does nothing and leaves both names.
        if target.exists() and os.path.samefile(original, target):
            return
        temporary = target.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
        try:
            link_or_copy(original, temporary)
            os.replace(temporary, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    except OSError as error:
        raise SharedStorageError(
            f"cannot link {original} to {target}: {error.strerror or error}. "
            "The file is safe in the run directory. "
            "Check the directory given with --files and collect again.",
            path=str(target),
        ) from error


def link_or_copy(original: str, target: Path) -> None:
    """Give a file a second name, or copy it where the file system cannot."""
    try:
        os.link(original, target)
    except OSError as error:
        if error.errno not in _NO_LINKS_HERE:
            raise
        shutil.copyfile(original, target)
