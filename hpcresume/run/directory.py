"""The run directory: names, creation, and what is allocated in it by exclusive create.

::

    RUN/
      run.json                     what the run is; written once
      CACHEDIR.TAG                 tells `clean` and backup tools that this is a run directory
      code/0001/                   snapshot of the pipeline's files; a new one for each edit
      manifest/part-000001         the ordered sources; growth adds a part
      restarts/                    where reading the gzip files of hr.chunks can begin
      rounds/0000/plan             the shards of a round
      rounds/0000/claim            the one job array that works on the round; claim-00012 where
                                   another request's tasks begin
      rounds/0000/jobs/*.json      what was submitted for it
      rounds/0000/submit/          the launcher's script and pickle
      rounds/0000/logs/            output of the array tasks and of the merge job
      rounds/0000/tasks/00000/e001/  one attempt: attempt.json, segments and parts, files/,
                                   outcome.json
      merge/gen-000001             what is done, as of one merge
      merge/pack-000001            many small segments in one file
      merge/removed                tells that segments which packs hold were removed
      control/0001-stop            stop and resume marks; the highest number counts
      control/ended-000007         the end that generation 7 recorded has been told of
      control/accepted-0001        a fingerprint that replaces run.json's, as the user accepted
      schema                       of Parquet parts, where none was given; the first one counts
      finish/                      what Pipeline(finish=...) made

Nothing here is ever overwritten or appended.  Every file has one writer.  Order never
comes from a clock: epochs, generations and marks are numbered by exclusive create.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from hpcresume.errors import CorruptDataError, HpcResumeError, RunDirError, SharedStorageError
from hpcresume.fs import (
    POSIX,
    SHARED_MODE,
    TEMPORARY_PREFIX,
    FileSystem,
    Receipt,
    ensure_directory,
    list_names,
    publish,
    reading,
    storage_errors,
)
from hpcresume.ids import Epoch, RoundIndex, TaskIndex
from hpcresume.segment.container import DECODE_ERRORS

FORMAT_VERSION = 2
TAG_NAME = "CACHEDIR.TAG"
TAG = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# hpcresume run directory: hpcresume status DIR, hpcresume clean DIR\n"
)
_PROBE_PREFIX = ".probe-"
_ATTEMPT = re.compile(r"e(\d+)")
OUTCOME = "outcome.json"
_SEGMENT = re.compile(r"seg-(\d+)-[0-9a-f]{16}")
_GENERATION = re.compile(r"gen-(\d+)")
_PACK = re.compile(r"pack-(\d+)")
_PART = re.compile(r"part-(\d+)")
_MARK = re.compile(r"(\d+)-(stop|resume)")
_NUMBER = re.compile(r"(\d+)")
_ACCEPTED = re.compile(r"accepted-(\d+)")

CLOSED = "a later round"
"""Who owns a round that no job array claimed before the next one was planned."""

RecordT = TypeVar("RecordT", bound=msgspec.Struct)


class RunInfo(msgspec.Struct, frozen=True):
    """What a run is; ``run.json``.

    Attributes:
        format: Version of the run directory's format.
        run_id: 16 random hexadecimal digits.
        name: The pipeline's name.
        target: The pipeline as the user named it.
        created_at: ISO 8601 time, for people.
        version: Version of hpcresume that created the run.
        fingerprint: What must not change silently: stages, sink, sources, parameters.
    """

    format: int
    run_id: str
    name: str
    target: str
    created_at: str
    version: str
    fingerprint: dict[str, Any]


class _Accepted(msgspec.Struct, frozen=True):
    fingerprint: dict[str, Any]


class AttemptInfo(msgspec.Struct, frozen=True):
    """Who runs an attempt; ``attempt.json``.  Nothing is ordered by what it says."""

    nonce: str
    host: str
    boot_id: str
    pid: int
    started_at: str
    cpus: int
    job_id: str | None = None
    array_job_id: str | None = None
    node: str | None = None
    restart_count: int = 0
    memory_mib: int = 0


class Outcome(msgspec.Struct, frozen=True):
    """How an attempt ended; ``outcome.json``.

    Attributes:
        state: ``done`` (its shard holds nothing more to do), ``saved`` (stopped early,
            all committed work published), ``lost`` (some committed work could not be
            published), ``broken`` (cannot run here: see reason), ``superseded``.
        reason: Why it ended, for people.
        kind: Machine-readable reason: ``finished``, ``time-limit``, ``preempted``,
            ``cancelled``, ``requeued`` (by Slurm or an administrator), ``terminated``
            (a signal whose reason Slurm did not tell), ``driver-died``, ``out-of-memory``
            (of the driver), ``pool-unrecoverable``, ``stage-broken``, ``stage-start``,
            ``ray-start``, ``storage``, ``stopped``, ``superseded``.
        stage: The stage that is broken, for ``stage-broken``, ``stage-start`` and
            ``pool-unrecoverable``.
        completed: Sources this attempt completed.
        elapsed_s: How long it ran.
        usable_s: Seconds that its time limit left for work on sources, had it not been changed;
            0 where that is not known.
    """

    state: str
    reason: str
    kind: str
    stage: str = ""
    completed: int = 0
    elapsed_s: float = 0.0
    usable_s: float = 0.0


class JobRecord(msgspec.Struct, frozen=True):
    """What was submitted for a round; one file in ``jobs/`` for each submission.

    ``array`` names its job arrays, or its single jobs, with commas between them; of a round on
    one machine the process that drives it, and ``has_ended`` that it does so no more.
    """

    cluster: str
    array: str
    merge: str = ""
    twin: str = ""
    job_name: str = ""
    tasks: int = 0
    submitted_at: str = ""
    has_ended: bool = False

    @property
    def job_ids(self) -> list[str]:
        """Slurm's ids of everything submitted: merge job, its twin, arrays or single jobs."""
        ids = [self.merge, self.twin, *self.array.split(",")] if self.cluster == "slurm" else []
        return [job_id for job_id in ids if job_id]


class AttemptRef(msgspec.Struct, frozen=True):
    """Names one attempt."""

    round: RoundIndex
    task: TaskIndex
    epoch: Epoch


class SegmentName(msgspec.Struct, frozen=True):
    """Names one published segment."""

    attempt: AttemptRef
    name: str

    @property
    def seq(self) -> int:
        """Number of the segment within its attempt."""
        return _number(_SEGMENT, self.name)


def _number(pattern: re.Pattern[str], name: str) -> int:
    match = pattern.fullmatch(name)
    return int(match[1]) if match else -1


def _numbers(pattern: re.Pattern[str], names: list[str]) -> list[int]:
    return sorted(number for name in names if (number := _number(pattern, name)) >= 0)


class RunDir:
    """One run's directory, opened.

    Every path is text below ``path``; the file system may be the machine's or a simulated one.
    """

    def __init__(self, path: str, info: RunInfo, fs: FileSystem = POSIX) -> None:
        self.path, self.info, self.fs = path, info, fs

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self.info.run_id

    @classmethod
    def create(cls, path: str, info: RunInfo, fs: FileSystem = POSIX) -> RunDir:
        """Create a run directory, or open it where one is already.

        Raises:
            RunDirError: The directory cannot be created or written.
            CorruptDataError: Its ``run.json`` is damaged.
        """
        try:
            ensure_directory(fs, path)
            # First: it tells a run that is being created from somebody's own directory.
            _publish_new(fs, os.path.join(path, TAG_NAME), TAG)
            for name in ("code", "manifest", "rounds", "merge", "control"):
                ensure_directory(fs, os.path.join(path, name))
            _publish_new(fs, os.path.join(path, "run.json"), msgspec.json.encode(info))
        except (OSError, SharedStorageError) as error:
            raise RunDirError(
                f"cannot create the run directory {path}: {error}. "
                "Every result is written there. "
                "Give one that you may write with --run-dir.",
                path=path,
            ) from error
        # Of two processes that create at once, one gives the run its id.
        return cls.open(path, fs)

    @classmethod
    def open(cls, path: str, fs: FileSystem = POSIX) -> RunDir:
        """Open an existing run directory.

        Raises:
            RunDirError: Not a run directory, unreadable, or of a newer format.
        """
        name = os.path.join(path, "run.json")
        try:
            data = fs.read(name)
        except FileNotFoundError as error:
            raise RunDirError(
                f"{path} is not a run directory: it holds no run.json. "
                "`hpcresume submit` prints the directory of each run it starts.",
                path=path,
            ) from error
        except OSError as error:
            raise RunDirError(
                f"cannot read {name}: {error.strerror or error}. "
                "A run directory belongs to the user who created it. "
                "Use it as that user, or start your own run with --run-dir.",
                path=path,
            ) from error
        try:
            said = msgspec.json.decode(data, type=dict[str, Any])
            version = said.get("format", 0)
            if isinstance(version, int) and version > FORMAT_VERSION:
                raise RunDirError(
                    f"{path} has format {version}; this hpcresume reads up to {FORMAT_VERSION}. "
                    f"hpcresume {said.get('version', 'of a newer version')} made it. "
                    "Install that version or a newer one to go on.",
                    path=path,
                )
            return cls(path, msgspec.json.decode(data, type=RunInfo), fs)
        except DECODE_ERRORS as error:
            raise CorruptDataError(
                f"{name} cannot be decoded ({error}). The run directory is damaged. "
                "Restore the file from a backup, or submit to a new --run-dir.",
                path=path,
            ) from error

    def join(self, *names: str) -> str:
        """Return a path below the run directory."""
        return os.path.join(self.path, *names)

    def code_path(self, number: int) -> str:
        """Return the directory of a code snapshot."""
        return self.join("code", f"{number:04d}")

    def code_numbers(self) -> list[int]:
        """Return the numbers of the code snapshots."""
        return _numbers(_NUMBER, list_names(self.fs, self.join("code")))

    def part_path(self, number: int) -> str:
        """Return the path of a manifest part."""
        return self.join("manifest", f"part-{number:06d}")

    @property
    def restarts(self) -> str:
        """The directory with the restart points of gzip files."""
        return self.join("restarts")

    def part_numbers(self) -> list[int]:
        """Return the numbers of the manifest's parts."""
        return _numbers(_PART, list_names(self.fs, self.join("manifest")))

    def schema_path(self) -> str:
        """Return the path of the schema that parts of Parquet share."""
        return self.join("schema")

    def generation_path(self, number: int) -> str:
        """Return the path of a generation."""
        return self.join("merge", f"gen-{number:06d}")

    def generation_numbers(self) -> list[int]:
        """Return the numbers of the generations."""
        numbers = _numbers(_GENERATION, list_names(self.fs, self.join("merge")))
        # A listing may be out of date; a name that is looked up is less so.
        while self._exists(self.generation_path(newest := numbers[-1] + 1 if numbers else 1)):
            numbers.append(newest)
        return numbers

    def pack_path(self, number: int) -> str:
        """Return the path of a pack of small segments."""
        return self.join("merge", f"pack-{number:06d}")

    def pack_numbers(self) -> list[int]:
        """Return the numbers of the packs."""
        return _numbers(_PACK, list_names(self.fs, self.join("merge")))

    def note_removals(self) -> None:
        """Record that segments which packs hold are removed from now on.

        Packs and generations that are seen now are durable afterwards.

        Raises:
            SharedStorageError: The file system refused.
        """
        _publish_new(self.fs, self.join("merge", "removed"), b"see the packs\n")
        # A merge that was killed has left names that no sync has followed.
        with storage_errors("sync", self.join("merge")):
            self.fs.sync_directory(self.join("merge"))

    def has_removals(self) -> bool:
        """Tell whether segments may have been removed that packs hold."""
        return self._exists(self.join("merge", "removed"))

    def round_path(self, number: int, *names: str) -> str:
        """Return a path of a round."""
        return self.join("rounds", f"{number:04d}", *names)

    def plan_path(self, number: int) -> str:
        """Return the path of a round's plan."""
        return self.round_path(number, "plan")

    def rounds(self) -> list[RoundIndex]:
        """Return the rounds that have a plan."""
        numbers = _numbers(_NUMBER, list_names(self.fs, self.join("rounds")))
        return [RoundIndex(n) for n in numbers if self._exists(self.plan_path(n))]

    def task_path(self, round_: int, task: int) -> str:
        """Return the directory of an array task."""
        # One text: a look at 10,000 tasks makes 20,000 paths.
        return f"{self.path}/rounds/{round_:04d}/tasks/{task:05d}"

    def attempt_path(self, ref: AttemptRef, *names: str) -> str:
        """Return a path of an attempt."""
        return "/".join((self.task_path(ref.round, ref.task), f"e{ref.epoch:03d}", *names))

    def logs_path(self, round_: int, *names: str) -> str:
        """Return a path among a round's logs."""
        return self.round_path(round_, "logs", *names)

    def tasks(self, round_: int) -> list[TaskIndex]:
        """Return the array tasks of a round that have started at least once."""
        names = list_names(self.fs, self.round_path(round_, "tasks"))
        return [TaskIndex(n) for n in _numbers(_NUMBER, names)]

    def attempts(self, round_: int, task: int) -> list[AttemptRef]:
        """Return the attempts of an array task, oldest first."""
        names = list_names(self.fs, self.task_path(round_, task))
        return [
            AttemptRef(RoundIndex(round_), TaskIndex(task), Epoch(n))
            for n in _numbers(_ATTEMPT, names)
        ]

    def all_attempts(self) -> Iterator[AttemptRef]:
        """Yield every attempt of the run."""
        for round_ in _numbers(_NUMBER, list_names(self.fs, self.join("rounds"))):
            for task in self.tasks(round_):
                yield from self.attempts(round_, task)

    def published(self, ref: AttemptRef) -> list[str]:
        """Return the names of all that an attempt has published, sorted."""
        return list_names(self.fs, self.attempt_path(ref))

    def segments(self, ref: AttemptRef) -> list[SegmentName]:
        """Return an attempt's published segments, oldest first."""
        names = self.published(ref)
        return [SegmentName(ref, name) for name in names if _SEGMENT.fullmatch(name)]

    def segment_path(self, segment: SegmentName) -> str:
        """Return the path of a segment."""
        return self.attempt_path(segment.attempt, segment.name)

    def fingerprint(self) -> dict[str, Any]:
        """Return what must not change silently: as created, or as accepted last."""
        numbers = _numbers(_ACCEPTED, list_names(self.fs, self.join("control")))
        if not numbers:
            return self.info.fingerprint
        path = self.join("control", f"accepted-{numbers[-1]:04d}")
        accepted = self.read_record(path, _Accepted)
        return self.info.fingerprint if accepted is None else accepted.fingerprint

    def tolerated(self, total: int) -> int:
        """Return how many of ``total`` sources may end quarantined in a complete run."""
        # The tolerance is a decimal fraction: 0.07 of 100 must be 7, not 6.999 cut to 6.
        return int(float(self.fingerprint().get("tolerate", 0.0)) * total + 1e-9)

    def part_bytes(self) -> int | None:
        """Return the size at which a part of rows ends; None where the sink makes none."""
        sink = self.fingerprint().get("sink") or {}
        return int(sink["size"]) if sink.get("kind") == "parts" else None

    def part_format(self) -> str:
        """Return the format of its parts, empty where the sink makes none."""
        sink = self.fingerprint().get("sink") or {}
        return str(sink["format"]) if sink.get("kind") == "parts" else ""

    def accept_fingerprint(self, fingerprint: dict[str, Any]) -> None:
        """Record a fingerprint that replaces the one before."""
        while True:
            numbers = _numbers(_ACCEPTED, list_names(self.fs, self.join("control")))
            number = numbers[-1] + 1 if numbers else 1
            path = self.join("control", f"accepted-{number:04d}")
            with contextlib.suppress(FileExistsError):
                self.write_record(path, _Accepted(fingerprint), label="record")
                return

    def allocate_attempt(self, round_: int, task: int) -> AttemptRef:
        """Take the next epoch of an array task by exclusive create.

        A lost reply costs one number, nothing else: an epoch is ours only if the create
        succeeded here.

        Raises:
            SharedStorageError: The file system refused.
        """
        directory = self.task_path(round_, task)
        try:
            self.ensure(directory)
            known = self.attempts(round_, task)
            epoch = known[-1].epoch + 1 if known else 1
            while True:
                ref = AttemptRef(RoundIndex(round_), TaskIndex(task), Epoch(epoch))
                try:
                    self.fs.mkdir(self.attempt_path(ref))
                except FileExistsError:
                    epoch += 1
                    continue
                self.fs.sync_directory(directory)
                # A file server that restarted before the sync has lost the name.
                if self.fs.exists(self.attempt_path(ref)):
                    return ref
        except OSError as error:
            raise SharedStorageError(
                f"cannot allocate an attempt in {directory}: {error.strerror or error}. "
                "Nothing ran yet. Check the run directory's file system, then submit again.",
                path=directory,
            ) from error

    def newest_epoch(self, ref: AttemptRef) -> Epoch:
        """Return the newest epoch of an attempt's array task that is visible here."""
        return max((a.epoch for a in self.attempts(ref.round, ref.task)), default=ref.epoch)

    def ensure(self, path: str) -> None:
        """Create a directory below the run's where it is missing, but never the run's own.

        Raises:
            SharedStorageError: The file system refused, or somebody removed the run.
        """
        if not self._exists(self.join("run.json")):
            raise SharedStorageError(
                f"{self.path} is gone, or cannot be read. Nothing is written there, as nobody "
                "would find it; local data is intact. Put it back, then submit it again.",
                path=self.path,
            )
        ensure_directory(self.fs, path)

    def write_record(self, path: str, record: msgspec.Struct, *, label: str) -> Receipt:
        """Publish a small record under a new name as JSON.

        Raises:
            FileExistsError: The name is taken.
            SharedStorageError: The file system refused.
        """
        self.ensure(os.path.dirname(path))
        data = msgspec.json.format(msgspec.json.encode(record)) + b"\n"
        return publish(self.fs, path, [data], label=label, exclusive=True)

    def read_record(self, path: str, record_type: type[RecordT]) -> RecordT | None:
        """Return a small record; None where it does not exist or is not whole.

        Raises:
            SharedStorageError: The file system refused.
        """
        try:
            with reading(path):
                data = self.fs.read(path)
            return msgspec.json.decode(data, type=record_type)
        except (FileNotFoundError, *DECODE_ERRORS):
            return None

    def attempt_info(self, ref: AttemptRef) -> AttemptInfo | None:
        """Return who runs an attempt, once it has said so."""
        return self.read_record(self.attempt_path(ref, "attempt.json"), AttemptInfo)

    def outcome(self, ref: AttemptRef) -> Outcome | None:
        """Return how an attempt ended, once it has."""
        return self.read_record(self.attempt_path(ref, OUTCOME), Outcome)

    def job_records(self, round_: int) -> list[JobRecord]:
        """Return what was submitted for a round."""
        directory = self.round_path(round_, "jobs")
        found = (
            self.read_record(os.path.join(directory, name), JobRecord)
            for name in list_names(self.fs, directory)
        )
        return [record for record in found if record is not None]

    def claim_round(self, round_: int, owner: str, *, first: int = 0) -> str:
        """Claim the tasks of one request for a job array and return the array that owns them.

        The look-up by name before a second sbatch can be blind; this is not: the first
        array that starts owns these tasks, and elements of any other end at once.

        Args:
            round_: The round.
            owner: In whose name they are claimed.
            first: The first of the tasks.
        """
        path = self._claim_path(round_, first)
        try:
            publish(self.fs, path, [owner.encode()], label="claim", exclusive=True)
        except FileExistsError:
            with storage_errors("read", path):
                return self.fs.read(path).decode()
        return owner

    def round_owner(self, round_: int, *, first: int = 0) -> str | None:
        """Return who claimed the tasks of a request, None where nobody has."""
        path = self._claim_path(round_, first)
        try:
            with reading(path):
                return self.fs.read(path).decode()
        except FileNotFoundError:
            return None

    def was_submitted(self, round_: int) -> bool:
        """Tell whether anything shows that a planned round was submitted or replaced."""
        return bool(
            self.job_records(round_) or self.tasks(round_) or self.round_owner(round_) is not None
        )

    def _claim_path(self, round_: int, first: int) -> str:
        return self.round_path(round_, f"claim-{first:05d}" if first else "claim")

    def claim_end(self, generation: int) -> bool:
        """Claim to tell the user of the end that a generation recorded; False: another did.

        Raises:
            SharedStorageError: The file system refused.
        """
        path = self.join("control", f"ended-{generation:06d}")
        try:
            # A nonce: a file of the same content would count as this process's own.
            nonce = os.urandom(8).hex().encode()
            publish(self.fs, path, [nonce], label="record", exclusive=True)
        except FileExistsError:
            return False
        return True

    def marks(self) -> list[tuple[int, str]]:
        """Return the stop and resume marks, oldest first."""
        names = list_names(self.fs, self.join("control"))
        found = [match for name in names if (match := _MARK.fullmatch(name))]
        return sorted((int(match[1]), match[2]) for match in found)

    def stop_requested(self) -> bool:
        """Tell whether the newest mark says stop."""
        return self._newest_mark()[1] == "stop"

    def set_mark(self, kind: str) -> None:
        """Write a ``stop`` or ``resume`` mark, unless the newest one says so already.

        Raises:
            SharedStorageError: The file system refused.
        """
        while True:
            number, newest = self._newest_mark()
            if newest != kind:
                path = self._mark_path(number + 1, kind)
                with contextlib.suppress(FileExistsError):
                    publish(self.fs, path, [kind.encode()], label="mark", exclusive=True)
                    return
            # Another process has said the same, and may have died before it was durable.
            with storage_errors("sync", self.join("control")):
                self.fs.sync_directory(self.join("control"))
            if self._newest_mark()[1] == kind:
                return

    def _newest_mark(self) -> tuple[int, str]:
        marks = self.marks()
        number, newest = marks[-1] if marks else (0, "resume")
        # A listing may be out of date; names that are looked up are less so.  Of a stop and a
        # resume at one moment, stop counts.
        while found := [
            kind for kind in ("stop", "resume") if self._exists(self._mark_path(number + 1, kind))
        ]:
            number, newest = number + 1, found[0]
        return number, newest

    def _exists(self, path: str) -> bool:
        with storage_errors("look for", path):
            return self.fs.exists(path)

    def _mark_path(self, number: int, kind: str) -> str:
        return self.join("control", f"{number:04d}-{kind}")


def _publish_new(fs: FileSystem, path: str, data: bytes) -> None:
    with contextlib.suppress(FileExistsError):
        publish(fs, path, [data], label="record", exclusive=True)


def check_owner(path: str | Path) -> None:
    """Refuse a run directory that another user owns, can write, or could exchange.

    Raises:
        RunDirError: It belongs to somebody else, group or others may write it, or somebody
            may put another directory in its place.
    """
    status = os.stat(path)
    if status.st_uid != os.geteuid():
        raise RunDirError(
            f"{path} belongs to user {status.st_uid}, not to you ({os.geteuid()}). "
            "Code is loaded from a run directory, so only its owner may use it. "
            "Start your own run with --run-dir.",
            path=str(path),
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RunDirError(
            f"{path} can be written by other users. "
            "Code is loaded from a run directory, so they could run theirs as you. "
            f"Run: chmod go-w {path}",
            path=str(path),
        )
    _check_above(os.path.realpath(path))


def _check_above(path: str) -> None:
    above = os.path.dirname(path)
    status = os.stat(above)
    writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if _is_private_group(status):
        writable &= ~stat.S_IWGRP
    if status.st_uid in {os.geteuid(), 0} and (not writable or status.st_mode & stat.S_ISVTX):
        return
    raise RunDirError(
        f"{above} can be written by other users. They could put another directory in the place "
        f"of {path}, and code is loaded from a run directory. Use one below a directory of your "
        f"own, or run: chmod go-w {above}",
        path=path,
    )


def _is_private_group(status: os.stat_result) -> bool:
    """Tell whether the group is its owner's own, by the custom of giving it the same name."""
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(status.st_uid).pw_name == grp.getgrgid(status.st_gid).gr_name
    return False


def share_with_group(path: str | Path, group: str) -> None:
    """Let a group read what a new run directory will hold, and write nothing.

    What is published in it takes its directory's group and permission to read.

    Raises:
        RunDirError: No such group, or not one of this user's.
    """
    try:
        os.chown(path, -1, grp.getgrnam(group).gr_gid)
        os.chmod(path, SHARED_MODE)
    except (KeyError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else "no such group"
        raise RunDirError(
            f"cannot give {path} to group {group!r}: {why}. "
            "A run can be shared with a group that you are in. `id -Gn` lists them.",
            path=str(path),
        ) from error
    if stat.S_IMODE(os.stat(path).st_mode) != SHARED_MODE:
        raise RunDirError(
            f"the file system of {path} does not pass a directory's group on to what is made in "
            "it, so the group could not read results. Choose another --run-dir.",
            path=str(path),
        )


def is_foreign(path: str) -> bool:
    """Tell whether a directory holds something and neither is nor becomes a run directory."""
    names = [
        name for name in os.listdir(path) if not name.startswith((TEMPORARY_PREFIX, _PROBE_PREFIX))
    ]
    return bool(names) and not os.path.exists(os.path.join(path, TAG_NAME))


def probe_writable(path: str) -> None:
    """Judge a directory by a write, fsync and rename, as modes alone do not tell.

    Raises:
        RunDirError: One of them was refused.
    """
    probe = os.path.join(path, f"{_PROBE_PREFIX}{os.urandom(4).hex()}")
    try:
        publish(POSIX, probe, [b"probe"], label="probe")
        os.unlink(probe)
    except (OSError, HpcResumeError) as error:
        raise RunDirError(
            f"cannot write to {path}: {error}. Every result is published there. "
            "Check the directory's owner, mode, space and quota, or give another --run-dir.",
            path=path,
        ) from error


def fingerprint_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line per entry of a run's fingerprint that differs, by dotted name."""
    changes: list[str] = []
    _compare("", old, new, changes)
    return changes


def _compare(name: str, old: Any, new: Any, changes: list[str]) -> None:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            inner = f"{name}.{key}" if name else str(key)
            _compare(inner, old.get(key), new.get(key), changes)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (before, after) in enumerate(zip(old, new, strict=True)):
            _compare(f"{name}[{number}]", before, after, changes)
    elif old != new:
        changes.append(f"{name}: {_short(old)} -> {_short(new)}")


def _short(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(v, Mapping) and "name" in v for v in value):
        value = [v["name"] for v in value]
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else text[:77] + "..."
