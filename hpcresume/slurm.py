"""Slurm's commands as typed calls; the only place that runs them.

Every call has a time limit and one of three failures, each with its own remedy:
:class:`~hpcresume.errors.SlurmMissingError` (no such command here),
:class:`~hpcresume.errors.SlurmUnreachableError` (no answer: what was asked may still take
effect minutes later) and :class:`~hpcresume.errors.SlurmRefusedError` (Slurm said no).

Commands run in the caller's environment without the variables that change what they do:
inside a job ``SBATCH_*`` and ``SLURM_*`` would override the options of a batch script.
Only spellings that Slurm 22.05 to 26.05 share are used.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, NewType

import msgspec

from hpcresume.errors import SlurmMissingError, SlurmRefusedError, SlurmUnreachableError

JobId = NewType("JobId", str)
"""What Slurm calls a job: ``123``, or ``123_4`` for one element of an array."""

DEFAULT_TIMEOUT_S = 20.0

_SCRUBBED = ("SBATCH_", "SQUEUE_", "SCANCEL_", "SALLOC_", "SACCT_", "SINFO_", "SLURM_")
# SLURM_CONF says which cluster to talk to and SLURM_JWT who asks.
_KEPT = frozenset({"SLURM_CONF", "SLURM_JWT"})
_NO_ANSWER = re.compile(
    r"unable to contact|socket timed out|connection (refused|timed out|reset)|"
    r"zero bytes were transmitted|communication (connection )?failure|communications? error|"
    r"standby mode|transport endpoint is not connected|unable to establish",
    re.IGNORECASE,
)
_NOT_CONFIGURED = re.compile(
    r"could not establish a configuration source|unable to process configuration file",
    re.IGNORECASE,
)
_NO_ACCOUNTING = re.compile(
    r"accounting storage is disabled|problem talking to the database|slurmdbd",
    re.IGNORECASE,
)
_NO_SUCH_JOB = "Invalid job id specified"
_ALREADY_OVER = re.compile(
    rf"{_NO_SUCH_JOB}|already completing or completed|already finished", re.IGNORECASE
)
_ENDED = frozenset(
    {
        "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL",
        "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT",
    }
)  # fmt: skip
_NOTHING = frozenset({"", "(null)", "None", "N/A", "Unknown", "NONE"})
_CHANGED_OR_LATE = re.compile(rf"No error|no longer pending|{_ALREADY_OVER.pattern}", re.IGNORECASE)


class AccountingUnavailableError(SlurmUnreachableError):
    """This cluster keeps no accounting, or its slurmdbd does not answer."""


class QueueEntry(msgspec.Struct, frozen=True):
    """One job, or one element of an array, as ``squeue`` lists it."""

    job_id: JobId
    """``123`` or ``123_4``: what the other calls take."""
    array_job_id: str
    array_task: int | None
    name: str
    state: str
    """``PENDING``, ``RUNNING``, ``COMPLETING``, ``COMPLETED``, ..."""
    reason: str | None
    node: str | None
    dependency: str | None = None
    """What it still waits for, as Slurm spells it: ``afterany:7_*(unfulfilled)``."""

    @property
    def waits_in_vain(self) -> bool:
        """Whether it waits for something that cannot happen any more."""
        return self.state == "PENDING" and self.reason == "DependencyNeverSatisfied"

    def waits_for(self, job: str) -> bool:
        """Tell whether it waits for a job."""
        return bool(re.search(rf"(?<!\d){re.escape(job)}(?!\d)", self.dependency or ""))

    @property
    def ended(self) -> bool:
        """Whether Slurm is done with it: it will not run, nor run again."""
        return self.state.split(" ")[0] in _ENDED


class JobInfo(msgspec.Struct, frozen=True):
    """One record of ``scontrol show job``; what the record lacks is None."""

    job_id: JobId
    state: str
    name: str | None = None
    array_job_id: str | None = None
    array_task: str | None = None
    """The element's index, or for what is still unsplit a list such as ``3-7%2``."""
    reason: str | None = None
    restarts: int | None = None
    end_time: float | None = None
    """Unix seconds; of a running job the moment its time limit ends."""
    start_time: float | None = None
    preempt_time: float | None = None
    """Unix seconds; set from the start of the grace period of a preemption."""
    run_time_s: float | None = None
    time_limit_s: float | None = None
    """None also where the job has no limit."""
    node_list: str | None = None
    exit_code: str | None = None
    step_exit_code: str | None = None
    """The highest of its steps', which is lost in the job's own; only where asked for."""


class AccountingEntry(msgspec.Struct, frozen=True):
    """One run of a job or element in the accounting; a requeued one has several."""

    job_id: JobId
    state: str
    """First word only: ``CANCELLED``, not ``CANCELLED by 1000``."""
    exit_code: str
    restarts: int
    """Runs of the same job before this one; counted, as old versions have no such column."""
    end_time: float | None


class NodeEntry(msgspec.Struct, frozen=True):
    """One node as ``sinfo`` lists it."""

    name: str
    state: str
    """``idle``, ``mixed``, ``allocated``, ``down``, ...; ``*`` after it: not responding."""


class Partition(msgspec.Struct, frozen=True):
    """One partition as ``scontrol show partition`` shows it; what it lacks is None."""

    name: str
    default: bool
    state: str
    max_time: str
    """As Slurm spells it: ``1-00:00:00`` or ``UNLIMITED``."""
    default_time: str | None
    preempt_mode: str | None
    grace_s: int | None
    qos: str | None
    exclusive: bool
    """A job gets whole nodes, whatever it asks for."""
    submitters: str
    """The nodes from which jobs may be submitted to it, ``ALL`` or a list."""


class Qos(msgspec.Struct, frozen=True):
    """One quality of service; a limit that it does not set is None."""

    name: str
    max_submit: int | None
    """Jobs that one user may have in the queue, running ones included."""
    grace_s: int | None


class Association(msgspec.Struct, frozen=True):
    """What the accounting lets a user do with one account, in one partition where one is named."""

    account: str
    partition: str | None
    qos: tuple[str, ...]
    default_qos: str | None
    max_submit: int | None


def command_environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return ``base`` (the process's environment) without what would change Slurm's answers."""
    base = os.environ if base is None else base
    kept = {
        name: value
        for name, value in base.items()
        if name in _KEPT or not name.startswith(_SCRUBBED)
    }
    # Unix seconds need no time zone, and daylight saving makes no hour ambiguous.
    kept["SLURM_TIME_FORMAT"] = "%s"
    return kept


def available() -> bool:
    """Return whether jobs can be submitted from here: ``sbatch`` is on the path."""
    return shutil.which("sbatch") is not None


def sbatch(
    argv: Sequence[str],
    *,
    script: Path,
    conf: Path | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> JobId:
    """Submit a batch script and return its job id (of an array: the array's).

    Args:
        argv: Options for sbatch, without the command, ``--parsable`` and the script.
        script: Batch script; Slurm copies it before this returns.
        conf: slurm.conf of the cluster; by default the one that ``SLURM_CONF`` or the
            installation names.
        timeout_s: Give up waiting after this many seconds.

    Raises:
        SlurmMissingError: There is no sbatch here.
        SlurmUnreachableError: No answer came; the job may still appear later.
        SlurmRefusedError: Slurm refused the options or a limit is reached.
    """
    command = ["sbatch", "--parsable", *argv, str(script)]
    return parse_sbatch(_run(command, conf=conf, timeout_s=timeout_s))


def would_accept(
    argv: Sequence[str] = (),
    *,
    script: Path,
    conf: Path | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> None:
    """Ask whether Slurm would take a batch script, without submitting it.

    Args:
        argv: Options that count more than those of the script.
        script: As for :func:`sbatch`.
        conf: As for :func:`sbatch`.
        timeout_s: As for :func:`sbatch`.

    Raises:
        SlurmMissingError: There is no sbatch here.
        SlurmUnreachableError: No answer came.
        SlurmRefusedError: It would be refused; ``stderr`` says why.
    """
    _run(["sbatch", "--test-only", *argv, str(script)], conf=conf, timeout_s=timeout_s)


def srun(
    options: Sequence[str],
    command: Sequence[str],
    *,
    errors: IO[bytes],
    conf: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start a job of its own that runs a command, and return its srun.

    Its standard input reaches every task, its standard output is theirs.

    Args:
        options: Options for srun.
        command: What each task runs.
        errors: Where srun's messages and the tasks' standard error go.
        conf: As for :func:`sbatch`.

    Raises:
        SlurmMissingError: There is no srun here.
    """
    environment = command_environment()
    if conf is not None:
        environment["SLURM_CONF"] = str(conf)
    try:
        return subprocess.Popen(
            ["srun", "--input=all", "--kill-on-bad-exit=1", *options, *command],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    except FileNotFoundError as error:
        raise _missing("srun") from error


def parse_sbatch(stdout: str) -> JobId:
    """Return the job id from what ``sbatch --parsable`` printed: last line, ``id[;cluster]``.

    Raises:
        SlurmRefusedError: There is no job id; some sites replace sbatch by a wrapper.
    """
    lines = stdout.strip().splitlines()
    job = lines[-1].partition(";")[0].strip() if lines else ""
    if not job.isdigit():
        raise SlurmRefusedError(
            f"sbatch ended without an error but named no job: {stdout.strip()[-500:]!r}. "
            "Nothing can be said about what was submitted. "
            "Look for the job with: squeue --me",
            stdout=stdout,
        )
    return JobId(job)


def queue(
    jobs: Iterable[str] = (),
    *,
    name: str | None = None,
    user: int | None = None,
    conf: Path | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> list[QueueEntry]:
    """List jobs in every state that the controller still remembers, elements one by one.

    Args:
        jobs: Job ids; an array's id lists all its elements.  None given: all jobs of ``user``.
        name: Only jobs of this name, or of these names with commas between them.
        user: User id, by default this process's; not asked for where ``jobs`` is given.
        conf: As for :func:`sbatch`.
        timeout_s: As for :func:`sbatch`.

    Returns:
        Entries in squeue's order; empty where no such job is remembered.

    Raises:
        SlurmMissingError: There is no squeue here.
        SlurmUnreachableError: No answer came.
        SlurmRefusedError: Slurm refused.
    """
    wanted = list(jobs)
    # The name comes last: it alone may hold the separator.
    command = ["squeue", "-h", "-r", "-t", "all", "-o", "%i|%F|%K|%T|%N|%r|%E|%j"]
    command += (
        ["-j", ",".join(wanted)] if wanted else ["-u", str(os.getuid() if user is None else user)]
    )
    command += ["--name", name] if name is not None else []
    try:
        stdout = _run(command, conf=conf, timeout_s=timeout_s)
    except SlurmRefusedError as error:
        if _NO_SUCH_JOB in error.fields["stderr"]:
            return []
        raise
    return [_queue_entry(line) for line in stdout.splitlines() if line.count("|") >= 7]


def _queue_entry(line: str) -> QueueEntry:
    job, array, task, state, node, reason, dependency, name = line.split("|", 7)
    return QueueEntry(
        job_id=JobId(job.strip()),
        array_job_id=array,
        array_task=int(task) if task.isdigit() else None,
        name=name,
        state=state,
        reason=_text(reason),
        node=_text(node),
        dependency=_text(dependency),
    )


def show_job(
    job: str,
    *,
    details: bool = False,
    conf: Path | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> list[JobInfo]:
    """Return what the controller knows of a job: one record, or one per part of an array.

    Empty where the controller has forgotten the job (some minutes after its end).

    Args:
        job: Its id, or one element's.
        details: Ask for the steps' exit code too.
        conf: As for :func:`sbatch`.
        timeout_s: As for :func:`sbatch`.

    Raises:
        SlurmMissingError: There is no scontrol here.
        SlurmUnreachableError: No answer came.
        SlurmRefusedError: Slurm refused.
    """
    try:
        command = ["scontrol", "show", "job", "-o", *(["-d"] if details else []), job]
        stdout = _run(command, conf=conf, timeout_s=timeout_s)
    except SlurmRefusedError as error:
        if _NO_SUCH_JOB in error.fields["stderr"]:
            return []
        raise
    return parse_jobs(stdout)


_NAME = re.compile(r" JobName=(?P<name>.*?) (?=UserId=\S*\(\d+\) GroupId=)")
_FIELD = re.compile(r"(?:^|\s)([A-Za-z][\w/:]*)=(.*?)(?=\s+[A-Za-z][\w/:]*=|\s*$)")


def parse_jobs(stdout: str) -> list[JobInfo]:
    """Parse the one-line records of ``scontrol show job -o``."""
    records = (line for line in stdout.splitlines() if line.startswith("JobId="))
    return [_job_info(line) for line in records]


def _job_info(line: str) -> JobInfo:
    name = _NAME.search(line)
    fields: dict[str, str] = {}
    # A job's name may look like fields; of the others the first counts, since what a user
    # chooses (Command, WorkDir, Comment) follows.
    for match in _FIELD.finditer(_NAME.sub(" ", line, count=1)):
        fields.setdefault(match[1], match[2])
    array, task = _text(fields.get("ArrayJobId")), _text(fields.get("ArrayTaskId"))
    return JobInfo(
        job_id=JobId(f"{array}_{task}" if array and task and task.isdigit() else fields["JobId"]),
        state=fields.get("JobState", "UNKNOWN"),
        name=name["name"] if name else _text(fields.get("JobName")),
        array_job_id=array,
        array_task=task,
        reason=_text(fields.get("Reason")),
        restarts=_integer(fields.get("Restarts")),
        end_time=parse_time(fields.get("EndTime")),
        start_time=parse_time(fields.get("StartTime")),
        preempt_time=parse_time(fields.get("PreemptTime")),
        run_time_s=parse_duration(fields.get("RunTime")),
        time_limit_s=parse_duration(fields.get("TimeLimit")),
        node_list=_text(fields.get("NodeList")),
        exit_code=_text(fields.get("ExitCode")),
        step_exit_code=_text(fields.get("DerivedExitCode")),
    )


def requeue(job: str, *, conf: Path | None = None, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
    """Put a running or ended job, or one element ``array_index``, back into the queue.

    A job that is pending already counts as done.  Never pass an array's bare id for one
    element: Slurm then requeues all of them.

    Raises:
        SlurmMissingError: There is no scontrol here.
        SlurmUnreachableError: No answer came; the requeue may still take effect.
        SlurmRefusedError: Slurm refused (requeuing is off, or no such job).
    """
    try:
        _run(["scontrol", "requeue", job], conf=conf, timeout_s=timeout_s)
    except SlurmRefusedError as error:
        if "pending execution" not in error.fields["stderr"]:
            raise


def cancel(
    jobs: Iterable[str],
    *,
    signal: str | None = None,
    conf: Path | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> None:
    """Cancel jobs, or send their steps a signal; ended and unknown jobs count as done.

    Raises:
        SlurmMissingError: There is no scancel here.
        SlurmUnreachableError: No answer came; the request may still take effect.
        SlurmRefusedError: Slurm refused (someone else's job).
    """
    wanted = list(jobs)
    if not wanted:
        return
    options = ["-s", signal] if signal is not None else []
    try:
        _run(["scancel", *options, *wanted], conf=conf, timeout_s=timeout_s)
    except SlurmRefusedError as error:
        complaints = error.fields["stderr"].splitlines()
        if not all(_ALREADY_OVER.search(line) for line in complaints if line.strip()):
            raise


def update(
    fields: Sequence[str], *, conf: Path | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
) -> None:
    """Change a job, node or partition: ``["JobId=7", "TimeLimit=10"]``.

    Raises:
        SlurmMissingError: There is no scontrol here.
        SlurmUnreachableError: No answer came; the change may still take effect.
        SlurmRefusedError: Slurm refused.
    """
    _run(["scontrol", "update", *fields], conf=conf, timeout_s=timeout_s)


def exclude_nodes(
    array: str, nodes: str, *, conf: Path | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
) -> None:
    """Keep the pending elements of an array away from nodes; running ones stay as they are.

    Args:
        array: Id of the array.
        nodes: Every node to keep away from, as ``--exclude`` takes them; replaces what was set.
        conf: As for :func:`sbatch`.
        timeout_s: As for :func:`sbatch`.

    Raises:
        SlurmMissingError: There is no scontrol here.
        SlurmUnreachableError: No answer came; the change may still take effect.
        SlurmRefusedError: Slurm refused it for a pending element.
    """
    try:
        update([f"JobId={array}", f"ExcNodeList={nodes}"], conf=conf, timeout_s=timeout_s)
    except SlurmRefusedError as error:
        # One line for each group of elements: those that run are refused, the others changed.
        complaints = [line for line in error.fields["stderr"].splitlines() if line.strip()]
        if not all(_CHANGED_OR_LATE.search(line) for line in complaints):
            raise


def config(*, conf: Path | None = None, timeout_s: float = DEFAULT_TIMEOUT_S) -> dict[str, str]:
    """Return the live settings of ``scontrol show config``, names as Slurm spells them.

    Raises:
        SlurmMissingError: There is no scontrol here.
        SlurmUnreachableError: No answer came.
        SlurmRefusedError: Slurm refused.
    """
    stdout = _run(["scontrol", "show", "config"], conf=conf, timeout_s=timeout_s)
    pairs = (line.partition("=") for line in stdout.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def partitions(
    *, conf: Path | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
) -> list[Partition]:
    """Return the partitions that this user can see.

    Raises:
        SlurmMissingError: There is no scontrol here.
        SlurmUnreachableError: No answer came.
        SlurmRefusedError: Slurm refused.
    """
    stdout = _run(["scontrol", "show", "partition", "-o"], conf=conf, timeout_s=timeout_s)
    lines = (line for line in stdout.splitlines() if line.startswith("PartitionName="))
    return [_partition(dict(_FIELD.findall(line))) for line in lines]


def _partition(fields: Mapping[str, str]) -> Partition:
    return Partition(
        name=fields["PartitionName"],
        default=fields.get("Default") == "YES",
        state=fields.get("State", "UNKNOWN"),
        max_time=fields.get("MaxTime", "UNLIMITED"),
        default_time=_text(fields.get("DefaultTime")),
        preempt_mode=_text(fields.get("PreemptMode")),
        grace_s=_integer(fields.get("GraceTime")),
        qos=_text(fields.get("QoS")),
        exclusive=fields.get("OverSubscribe") == "EXCLUSIVE",
        submitters=fields.get("AllocNodes", "ALL"),
    )


def nodes(*, conf: Path | None = None, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[NodeEntry]:
    """Return every node once with its state.

    Raises:
        SlurmMissingError: There is no sinfo here.
        SlurmUnreachableError: No answer came.
        SlurmRefusedError: Slurm refused.
    """
    stdout = _run(["sinfo", "-h", "-N", "-o", "%N|%T"], conf=conf, timeout_s=timeout_s)
    pairs = dict(line.strip().split("|", 1) for line in stdout.splitlines() if "|" in line)
    return [NodeEntry(name, state) for name, state in pairs.items()]


def ping(*, conf: Path | None = None, timeout_s: float = DEFAULT_TIMEOUT_S) -> bool:
    """Return whether the controller answers.

    Raises:
        SlurmMissingError: There is no scontrol here.
    """
    try:
        stdout = _run(["scontrol", "ping"], conf=conf, timeout_s=timeout_s)
    except (SlurmUnreachableError, SlurmRefusedError):
        return False
    return "is UP" in stdout


def change_accounting(
    words: Sequence[str], *, conf: Path | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
) -> None:
    """Change clusters, accounts, users or limits in slurmdbd: ``["add", "cluster", "c1"]``.

    Raises:
        SlurmMissingError: There is no sacctmgr here.
        SlurmUnreachableError: slurmdbd does not answer.
        SlurmRefusedError: slurmdbd refused.
    """
    _run(["sacctmgr", "-i", *words], conf=conf, timeout_s=timeout_s)


def accounting(
    job: str, *, conf: Path | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
) -> list[AccountingEntry]:
    """Return every run of a job, or of each element of an array, oldest first.

    Records arrive some seconds after the events; this is for single questions after an
    end, never for polling.

    Raises:
        SlurmMissingError: There is no sacct here.
        AccountingUnavailableError: The cluster has no accounting, or slurmdbd is away.
        SlurmUnreachableError: No answer came in time.
        SlurmRefusedError: Slurm refused.
    """
    columns = "JobID,State,ExitCode,Start,End"
    command = ["sacct", "-X", "-D", "-P", "-n", "-j", job, "-o", columns]
    return _accounting_entries(_ask_accounting(command, conf=conf, timeout_s=timeout_s))


def qualities(*, conf: Path | None = None, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[Qos]:
    """Return every quality of service with its limits.

    Raises:
        SlurmMissingError: There is no sacctmgr here.
        AccountingUnavailableError: The cluster has no accounting, or slurmdbd is away.
        SlurmUnreachableError: No answer came in time.
        SlurmRefusedError: Slurm refused.
    """
    command = ["sacctmgr", "-nP", "show", "qos", "format=Name,MaxSubmitPU,GraceTime"]
    stdout = _ask_accounting(command, conf=conf, timeout_s=timeout_s)
    rows = [line.split("|") for line in stdout.splitlines() if line.count("|") == 2]
    return [Qos(name, _integer(limit), _seconds(grace)) for name, limit, grace in rows]


def associations(
    user: str,
    *,
    cluster: str,
    conf: Path | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> list[Association]:
    """Return what a user may submit under on a cluster; empty where nobody registered them.

    Raises:
        SlurmMissingError: There is no sacctmgr here.
        AccountingUnavailableError: The cluster has no accounting, or slurmdbd is away.
        SlurmUnreachableError: No answer came in time.
        SlurmRefusedError: Slurm refused.
    """
    columns = "format=Account,Partition,QOS,DefaultQOS,MaxSubmitJobs"
    named = [f"user={user}", f"cluster={cluster}"]
    command = ["sacctmgr", "-nP", "show", "assoc", *named, columns]
    stdout = _ask_accounting(command, conf=conf, timeout_s=timeout_s)
    rows = [line.split("|") for line in stdout.splitlines() if line.count("|") == 4]
    return [
        Association(
            account=account,
            partition=_text(partition),
            qos=tuple(filter(None, qos.split(","))),
            default_qos=_text(default),
            max_submit=_integer(limit),
        )
        for account, partition, qos, default, limit in rows
    ]


def _ask_accounting(command: list[str], *, conf: Path | None, timeout_s: float) -> str:
    try:
        return _run(command, conf=conf, timeout_s=timeout_s)
    except (SlurmRefusedError, SlurmUnreachableError) as error:
        if not _NO_ACCOUNTING.search(error.fields.get("stderr", "")):
            raise
        raise AccountingUnavailableError(
            f"this cluster's accounting does not answer: {error.fields['stderr'].strip()}. "
            "How ended jobs ended can then be asked of squeue only, for some minutes. "
            "Ask the centre whether slurmdbd is configured",
            **error.fields,
        ) from error


def _accounting_entries(stdout: str) -> list[AccountingEntry]:
    rows = [line.split("|") for line in stdout.splitlines() if line.count("|") == 4]
    # A run that has not started yet is the newest.
    rows.sort(key=lambda row: parse_time(row[3]) or float("inf"))
    runs: Counter[str] = Counter()
    entries = []
    for job, state, exit_code, _, end in rows:
        first_word = state.split(" ", 1)[0]
        entries.append(
            AccountingEntry(JobId(job), first_word, exit_code, runs[job], parse_time(end))
        )
        runs[job] += 1
    return entries


def parse_time(text: str | None) -> float | None:
    """Return unix seconds from a time of Slurm's, None where it is unknown or absent.

    Takes unix seconds (what :func:`command_environment` asks for) and, since some sites
    wrap the commands, local ISO time.
    """
    if text is None or text in _NOTHING:
        return None
    if text.isdigit():
        return float(text)
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


_DURATION = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)(?:\.\d+)?")


def parse_duration(text: str | None) -> float | None:
    """Return seconds from ``[days-][hours:]minutes:seconds``, None for ``UNLIMITED`` and such."""
    match = _DURATION.fullmatch(text or "")
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _text(value: str | None) -> str | None:
    return None if value is None or value in _NOTHING else value


def _seconds(text: str) -> int | None:
    """Return whole seconds from a number of them or from a duration; None for none or 0."""
    seconds = _integer(text) or parse_duration(text)
    return int(seconds) if seconds else None


def _integer(value: str | None) -> int | None:
    return int(value) if value is not None and value.isdigit() else None


def _run(command: list[str], *, conf: Path | None, timeout_s: float) -> str:
    environment = command_environment()
    if conf is not None:
        environment["SLURM_CONF"] = str(conf)
    named = environment.get("SLURM_CONF")
    if named is not None and not os.path.exists(named):
        # The commands would look for it again for a minute.
        raise _not_configured("no such file", named)
    try:
        done = subprocess.run(
            command,
            env=environment,
            timeout=timeout_s,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except FileNotFoundError as error:
        raise _missing(command[0]) from error
    except subprocess.TimeoutExpired as error:
        raise _unreachable(command, f"no answer within {timeout_s:g} s") from error
    if done.returncode == 0:
        return done.stdout
    # Some commands complain on stdout: sacct, sacctmgr.
    complaint = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
    if _NOT_CONFIGURED.search(complaint):
        raise _not_configured(complaint, environment.get("SLURM_CONF"))
    if _NO_ANSWER.search(complaint):
        raise _unreachable(command, complaint)
    raise SlurmRefusedError(
        f"Slurm refused `{_shown(command)}`: {complaint}{_remedy(command, complaint)}",
        command=command,
        stderr=complaint,
        returncode=done.returncode,
    )


_REMEDIES = {
    r"account": "Give one of yours with -A: sacctmgr show associations user=$USER format=account",
    r"partition": "Give another with -p: sinfo --summarize lists them",
    r"qos": "Give another with -q: sacctmgr show associations user=$USER format=qos",
    r"time limit": "Give a shorter one with -t: sinfo -o '%P %l' lists the longest",
    r"node configuration|memory|cpu": "Ask for what a node has: sinfo -o '%P %c %m %G' lists it",
}
"""What to do about what sbatch refuses, by a word of its complaint."""


def _remedy(command: list[str], complaint: str) -> str:
    if not command[0].endswith("sbatch"):
        return ""
    found = next(
        (text for word, text in _REMEDIES.items() if re.search(word, complaint, re.IGNORECASE)),
        "Ask for something else, or ask the centre's support",
    )
    dot = "" if complaint.endswith(".") else "."
    return f"{dot} Nothing is lost. {found}. Then submit again."


def _shown(command: list[str]) -> str:
    return " ".join(command)


def _missing(name: str) -> SlurmMissingError:
    return SlurmMissingError(
        f"the command {name} is not on the path. Without Slurm's commands no job can be "
        "submitted or asked about from this machine. Log in where sbatch works, load the "
        "centre's slurm module, or use --cluster local",
        command=name,
    )


def _not_configured(complaint: str, conf: str | None) -> SlurmMissingError:
    return SlurmMissingError(
        f"Slurm's commands are installed but know of no cluster (SLURM_CONF={conf or ''}): "
        f"{complaint.splitlines()[-1]}. Nothing can be submitted or asked about. "
        "Set SLURM_CONF to the cluster's slurm.conf, or use --cluster local",
        conf=conf,
        stderr=complaint,
    )


def _unreachable(command: list[str], complaint: str) -> SlurmUnreachableError:
    return SlurmUnreachableError(
        f"Slurm did not answer `{_shown(command)}`: {complaint}. "
        "What was asked may still take effect later, so it must not simply be asked again. "
        "Look at the queue when the controller is back: scontrol ping; squeue --me",
        command=command,
        stderr=complaint,
    )
