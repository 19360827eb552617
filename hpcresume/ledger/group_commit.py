"""Group commit: one thread turns what the driver adds into few transactions.

Results wait until 8 MiB or 100 ms have come together, so that one sync serves many chunks;
in-flight marks are written at once.  The thread is the only writer of the ledger.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from hpcresume.errors import HpcResumeError, InternalError, describe
from hpcresume.ledger.parts import BlobFiles
from hpcresume.ledger.store import Batch, Ledger, LedgerState, StoredBlob
from hpcresume.segment.segment import Failure

OnCommit = Callable[[Sequence[bytes], Sequence[Failure]], None]
"""Called with the frames and failures of a commit once it is on disk; must not block."""


class GroupCommitter:
    """Commits to a ledger from a thread of its own.

    Attributes:
        committed_seq: Sequence number of the last commit that is on disk.
        committed_sources: Completed sources in the commits so far.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        max_bytes: int = 8 << 20,
        max_delay_s: float = 0.1,
        on_commit: OnCommit | None = None,
    ) -> None:
        self._on_commit = on_commit
        self._ledger, self._max_bytes, self._max_delay_s = ledger, max_bytes, max_delay_s
        self._condition = threading.Condition()
        self._batch, self._batch_bytes, self._batch_sources = Batch(), 0, 0
        self._oldest: float | None = None
        self._notes = Batch()
        self._release = 0
        self._added = self._done = self._marked = 0
        self._urgent = self._noted = self._closing = False
        self._error: HpcResumeError | None = None
        self._files = BlobFiles()
        self.committed_seq = ledger.last_sequence()
        self.committed_sources = 0
        self._thread = threading.Thread(target=self._run, name="group-commit", daemon=True)
        self._thread.start()

    def add(
        self,
        *,
        frame: bytes | None = None,
        blob: StoredBlob | None = None,
        sources: int = 0,
        failures: list[Failure] | None = None,
        unmark: int | None = None,
        state: LedgerState | None = None,
    ) -> None:
        """Add results to the next commit; blocks while two commits' worth are waiting.

        Args:
            frame: A chunk of completed sources.
            blob: Where its rows lie, if they are not in the frame.
            sources: How many sources are completed.
            failures: Failed tries.
            unmark: A call that is over.
            state: Counters and progress.

        Raises:
            HpcResumeError: An earlier commit failed; nothing more is accepted.
        """
        with self._condition:
            self._condition.wait_for(
                lambda: self._error is not None or self._batch_bytes < 2 * self._max_bytes
            )
            self._accept()
            if frame is not None:
                self._batch.frames.append(frame)
                self._batch_bytes += len(frame)
                if blob is not None:
                    self._batch.blobs.append(blob)
                    self._batch_bytes += blob.length
                self._batch_sources += sources
            if failures:
                self._batch.failures.extend(failures)
            if unmark is not None:
                # With the results it led to: until they are on disk, it is in flight.
                self._batch.unmark.append(unmark)
            if state is not None:
                self._notes.state, self._noted = state, True
            wakes = state is not None or self._batch_bytes >= self._max_bytes
            if self._oldest is None and state is None:
                self._oldest, wakes = time.monotonic(), True
            self._added += 1
            if wakes:  # otherwise it looks in time by itself
                self._condition.notify_all()

    def mark(self, chunk: int, sources: bytes, *, wait: bool = False) -> None:
        """Record that a worker holds a call, numbered anew each; at once.

        Args:
            chunk: The call's number.
            sources: What it holds.
            wait: Return when the mark would survive this process, not before: for a call
                that this process runs itself, and may die of before the thread gets its turn.
        """
        with self._condition:
            self._accept()
            self._notes.mark[chunk], self._noted = sources, True
            self._added += 1
            target = self._added
            self._condition.notify_all()
            if wait:
                self._condition.wait_for(lambda: self._error or self._marked >= target)
                self._check()

    def release(self, last: int) -> None:
        """Delete the commits up to ``last`` soon; they are published."""
        with self._condition:
            self._release, self._noted = max(self._release, last), True
            self._added += 1
            self._condition.notify_all()

    def flush(self) -> int:
        """Wait until everything added is on disk and return the last sequence number.

        Raises:
            HpcResumeError: A commit failed.
        """
        with self._condition:
            target, self._urgent = self._added, True
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._error is not None or self._done >= target)
            self._check()
            return self.committed_seq

    def close(self) -> None:
        """Commit what is left and end the thread.

        Raises:
            HpcResumeError: A commit failed, so not everything that was added is on disk.
        """
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._thread.join()
        self._check()

    def _accept(self) -> None:
        self._check()
        if self._closing:
            raise InternalError("the ledger's group commit was closed before this was added")

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _due(self) -> bool:
        """Tell whether results are to be committed now."""
        if self._closing or self._urgent or self._batch_bytes >= self._max_bytes:
            return True
        return self._oldest is not None and self._wait_s() <= 0

    def _wait_s(self) -> float:
        assert self._oldest is not None
        return self._oldest + self._max_delay_s - time.monotonic()

    def _run(self) -> None:
        try:
            while not self._turn():
                pass
        except HpcResumeError as error:
            self._fail(error)
        except Exception as error:
            # Whoever waits for this thread must learn that it is gone.
            self._fail(InternalError(f"group commit failed: {describe(error)}"))

    def _turn(self) -> bool:
        """Write what has come together; return whether that was all and the end."""
        with self._condition:
            while not (self._noted or self._due()):
                self._condition.wait(None if self._oldest is None else self._wait_s())
            notes, self._notes, self._noted = self._notes, Batch(), False
            release, self._release = self._release, 0
            due, closing, added = self._due(), self._closing, self._added
            batch, sources = (self._batch, self._batch_sources) if due else (Batch(), 0)
            if due:
                self._batch, self._batch_bytes, self._batch_sources = Batch(), 0, 0
                self._oldest, self._urgent = None, False
                self._condition.notify_all()
        if release:
            self._ledger.release(release)
            self._files.release(release)
        # Notes do not wait for results, nor for the disk: only a death of ours reads them.
        if notes.mark or notes.state is not None:
            self._ledger.commit(notes)
            with self._condition:
                self._marked = added
                self._condition.notify_all()
        if due:
            sequence = self._ledger.commit(batch)
            self._files.committed(sequence, batch.blobs)
            with self._condition:
                self.committed_seq, self._done = sequence, added
                self.committed_sources += sources
                self._condition.notify_all()
            if self._on_commit is not None and (batch.frames or batch.failures):
                self._on_commit(batch.frames, batch.failures)
        return closing and self._added == added

    def _fail(self, error: HpcResumeError) -> None:
        with self._condition:
            self._error = error
            self._condition.notify_all()
