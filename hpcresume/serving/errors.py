"""What a pool says no with."""

from __future__ import annotations

from typing import Any

from hpcresume.errors import HpcResumeError


class ServingError(HpcResumeError):
    """A pool cannot do what it was asked; what it serves stays as it was."""

    exit_code = 18


class Retryable(ServingError):  # noqa: N818  # what to do, as callers test for it
    """A request was not answered, and may be asked again.

    Attributes:
        version: Version that the worker held, None where it held none.
        begun: Whether some of it may have been done.
    """

    def __init__(self, version: int | None, reason: str, *, begun: bool = True) -> None:
        self.version, self.begun = version, begun
        super().__init__(f"not answered: {reason}. Ask again.", reason=reason)

    def __reduce__(self) -> tuple[Any, ...]:
        return _retryable, (self.version, self.fields["reason"], self.begun)


def _retryable(version: int | None, reason: str, begun: bool) -> Retryable:  # noqa: FBT001
    return Retryable(version, reason, begun=begun)


class UpdateInProgress(ServingError):  # noqa: N818  # a state, as callers test for it
    """A second update was asked for while one runs."""


class UpdatesEndedError(ServingError):
    """The pool takes no more updates."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"no update is made any more: {reason}", reason=reason)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.fields["reason"],)


class PhaseFailedError(ServingError):
    """A phase of an update failed without an exception of the user's: a death, a hang.

    Attributes:
        fields: ``phase``, ``member``, ``version``, ``elapsed_s`` and ``reason``.
    """

    def __init__(
        self, phase: str, member: str, version: int, elapsed_s: float, reason: str
    ) -> None:
        super().__init__(
            f"update to version {version}: {member} {reason} in phase '{phase}' "
            f"after {elapsed_s:.1f} s",
            phase=str(phase),
            member=member,
            version=version,
            elapsed_s=elapsed_s,
            reason=reason,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        f = self.fields
        arguments = ("phase", "member", "version", "elapsed_s", "reason")
        return type(self), tuple(f[name] for name in arguments)


class StateError(ServingError):
    """A state that arrived is not the one that was sent, or cannot be sent."""
