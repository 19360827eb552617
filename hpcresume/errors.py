"""The exception tree: one class per remedy, each with the exit code that a script can test.

HpcResumeError                     70
├── UsageError                      2   the command line cannot be right
├── PipelineError                  10   the pipeline's file cannot be loaded or is not a pipeline
├── NotResumableError              11   a stage whose output belongs to no single source
├── SourcesError                   13   the sources cannot be listed (duplicate ids, bad rows)
├── ChangedRunError                14   the run was made with other settings
├── ConfigError                    15   a setting, a site file or a template is wrong
├── RunDirError                    16   not a run directory, or not usable by this user or version
├── LocalStorageError              17   node-local disk full, missing or of the wrong kind
├── StageStartError                18   a stage cannot start, or its file not load, on the node
├── RowError                       19   a row that JSON cannot hold
├── SharedStorageError             20   the run directory's file system refused or did not answer
├── CorruptDataError               22   a published file fails its own digest
├── SlurmMissingError              30   no Slurm commands here
├── SlurmUnreachableError          31   the controller does not answer
├── SlurmRefusedError              32   Slurm refused the request
├── TestbedError                   33   the testbed cannot be brought up
├── PoolUnrecoverable              85   a pool's workers hold an unknown state; start the task again
└── InternalError                  70   a bug in hpcresume
"""

from __future__ import annotations

from typing import Any

EXIT_COMPLETE = 0
EXIT_INCOMPLETE = 1
EXIT_SAVED = 85
"""Saved, restart me (HTCondor's documented choice for a self-checkpointing job)."""
EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


class HpcResumeError(Exception):
    """Base of every error that hpcresume raises on purpose.

    Subclasses keep their constructor's arguments in ``fields`` so that they survive
    pickling between Ray workers, the driver and the supervisor.
    """

    exit_code = 70

    def __init__(self, message: str, **fields: Any) -> None:
        self.fields = fields
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), str(self), self.fields)


def _rebuild(cls: type[HpcResumeError], message: str, fields: dict[str, Any]) -> HpcResumeError:
    error = cls.__new__(cls)
    HpcResumeError.__init__(error, message, **fields)
    return error


class UsageError(HpcResumeError):
    """The command line cannot be right."""

    exit_code = 2


class PipelineError(HpcResumeError):
    """The pipeline's file cannot be loaded, or what it holds is not a pipeline."""

    exit_code = 10


class NotResumableError(HpcResumeError):
    """A stage's output cannot be attributed to one source."""

    exit_code = 11


class SourcesError(HpcResumeError):
    """The sources cannot be listed: a duplicate id, an unreadable file, a bad row."""

    exit_code = 13


class ChangedRunError(HpcResumeError):
    """The run directory was made with other settings than those given now."""

    exit_code = 14


class ConfigError(HpcResumeError):
    """A setting, a site file or a template is wrong."""

    exit_code = 15


class RunDirError(HpcResumeError):
    """Not a run directory, or one that this user or this version cannot use."""

    exit_code = 16


class LocalStorageError(HpcResumeError):
    """The node-local disk is full, missing, or of a kind that LMDB must not be used on."""

    exit_code = 17


class StageStartError(HpcResumeError):
    """A stage's set-up fails, or the pipeline does not import on the node."""

    exit_code = 18


class RowError(HpcResumeError):
    """A stage produced a row that JSON cannot hold."""

    exit_code = 19


class SharedStorageError(HpcResumeError):
    """The run directory's file system refused an operation; local data is intact."""

    exit_code = 20


class CorruptDataError(HpcResumeError):
    """A published file or a ledger fails its own digest or structure."""

    exit_code = 22


class SlurmMissingError(HpcResumeError):
    """Slurm's commands are not installed here."""

    exit_code = 30


class SlurmUnreachableError(HpcResumeError):
    """Slurm's controller does not answer; a request may still take effect later."""

    exit_code = 31


class SlurmRefusedError(HpcResumeError):
    """Slurm answered and refused the request."""

    exit_code = 32


class TestbedError(HpcResumeError):
    """The testbed cannot be brought up or driven."""

    __test__ = False  # the name starts with "Test"; pytest must not collect it
    exit_code = 33


class PoolUnrecoverable(HpcResumeError):  # noqa: N818  # a verdict, as callers test for it
    """Too few workers of a pool hold a state that is known; it serves nothing any more.

    Raised in a stage it ends the attempt: what is committed is published, and the array task
    starts again with new workers.
    """

    exit_code = EXIT_SAVED


class InternalError(HpcResumeError):
    """This should never happen; it is a bug in hpcresume."""

    exit_code = 70


def describe(error: BaseException) -> str:
    """Return ``type: message`` of an exception, never empty."""
    text = str(error).strip()
    name = type(error).__name__
    return f"{name}: {text}" if text else name
