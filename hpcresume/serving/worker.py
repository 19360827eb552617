"""What a user writes: the worker that serves a state, and the exporter that has new ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from hpcresume.serving.errors import StateError
from hpcresume.serving.state import Part

PauseMode = Literal["drain", "abort", "keep"]


class StatefulWorker:
    """A worker of a pool: a plain class whose other methods answer requests.

    The pool makes one in a process of its own, gives it a state, and calls its hooks in this
    order: ``pause``, ``release``, ``prepare``, ``stage`` (or ``apply``), ``commit``,
    ``finalize``, ``restore``, ``resume``.  Where ``release`` is not overridden the pause comes
    later: before ``commit``, or before ``apply``.  While it is paused it is given no request.
    The hooks of one worker run one at a time; requests run beside those before the pause.

    Attributes:
        in_place: :meth:`apply` overwrites the state that is served.  What it has touched
            serves again only after a whole, verified push.
        concurrency: Requests that one worker answers at once, each in a thread.
        version: Version of the state that it serves, None before the first.
        state: The parts of that state by name, where :meth:`commit` is not overridden.
    """

    in_place: ClassVar[bool] = False
    concurrency: ClassVar[int] = 1

    version: int | None = None
    state: dict[str, Any]
    _staged: dict[str, Any] | None = None

    def pause(self, mode: PauseMode) -> None:
        """Stop the engine; no request comes in any more.

        With ``drain`` and ``abort`` none is in flight either.  With ``keep`` those in flight
        must stand still from when this returns until :meth:`resume`, and then go on with
        the state that is served by then.
        """

    def abort(self) -> None:
        """Make the requests in flight end soon; they are answered as retryable."""

    def release(self) -> None:
        """Free caches, so that a second state fits."""

    def prepare(self, version: int) -> None:
        """Take what receiving a version needs: buffers, connections."""

    def stage(self, version: int, parts: Iterator[Part]) -> None:
        """Keep a version's state beside the one that is served, which stays untouched."""
        del version
        self._staged = {part.name: part for part in parts}

    def apply(self, version: int, parts: Iterator[Part]) -> None:
        """Overwrite the state that is served, part by part; only with ``in_place``."""
        raise NotImplementedError(f"{type(self).__name__} is in_place and overrides no apply()")

    def commit(self, version: int) -> None:
        """Serve what is staged from now on; may be called again after it has failed."""
        del version
        if self._staged is None:
            raise StateError("nothing is staged")
        self.state = self._staged

    def finalize(self, version: int) -> None:
        """Give back what :meth:`prepare` and :meth:`stage` took; after success and failure."""
        del version
        self._staged = None

    def restore(self) -> None:
        """Make the caches again that :meth:`release` freed."""

    def resume(self) -> None:
        """Start the engine again; requests come in once this has returned."""


class StateExporter:
    """The side that has new versions: a trainer, or what watches a directory for them.

    The pool makes one in a process of its own.
    """

    def newest_version(self) -> int:
        """Return the number of the newest version there is; it never goes back."""
        raise NotImplementedError(f"{type(self).__name__} does not say which version is newest")

    def prepare(self, version: int) -> None:
        """Take what sending a version needs."""

    def export(self, version: int) -> Any:
        """Return a version's state: a mapping, or pairs, of names and contiguous buffers.

        Nothing of it may change until :meth:`finalize`.
        """
        raise NotImplementedError(f"{type(self).__name__} overrides no export()")

    def finalize(self, version: int) -> None:
        """Give back what :meth:`prepare` and :meth:`export` took; after success and failure."""
