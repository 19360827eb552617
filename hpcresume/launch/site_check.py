"""Compare a site's settings with what the live Slurm answers, and write a first site file.

Slurm is asked for its configuration, its partitions, the user's limits where there is
accounting, and by ``sbatch --test-only`` whether it would take the jobs that hpcresume
submits.  Nothing is submitted.  What no question answers is reported as unknown with the
reason, never as right.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpcresume import slurm
from hpcresume.config import Resolved, identify_site
from hpcresume.config.sites import GENERIC
from hpcresume.errors import ConfigError, SlurmRefusedError
from hpcresume.launch.rendering import ArrayJob, MergeJob, render_array, render_merge

State = Literal["ok", "wrong", "unknown"]
FILE_NAME = "site.toml"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NUMBER = re.compile(r"\d+")
_TASK_LIMIT = re.compile(r"\bmax_array_tasks=(\d+)")
_PROBES = {
    "mem": "--mem=1M",
    "mem-per-cpu": "--mem-per-cpu=1M",
    "export": "--export=ALL",
    "exclusive": "--exclusive",
    "gres": "--gres=none",
    "gpus-per-task": "--gpus-per-task=0",
}
"""Harmless values of options that a centre may forbid."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What Slurm says about one setting.

    Attributes:
        key: ``section.key`` of the setting, or ``job array`` and ``merge job`` for the whole.
        state: ``ok``, ``wrong`` or ``unknown``.
        value: What the setting says.
        origin: Where it says so; empty for a whole job.
        reason: What Slurm answered, or why it cannot answer.
        write: The line for ``site.toml`` that would be right; empty where nothing is wrong,
            or where it is the user who has to choose.
    """

    key: str
    state: State
    value: Any
    origin: str
    reason: str
    write: str = ""


@dataclass(frozen=True, slots=True)
class Live:
    """What Slurm answered.

    Attributes:
        config: Its settings, as ``scontrol show config`` names them.
        partitions: The partitions that this user can see.
        qualities: The qualities of service; empty without accounting.
        associations: What this user may submit under; empty without accounting.
        no_accounting: Why the two are empty, or the empty string.
    """

    config: Mapping[str, str]
    partitions: tuple[slurm.Partition, ...]
    qualities: tuple[slurm.Qos, ...]
    associations: tuple[slurm.Association, ...]
    no_accounting: str

    @property
    def cluster_name(self) -> str:
        """Slurm's ClusterName."""
        return self.config.get("ClusterName", "")

    @property
    def max_array_size(self) -> int:
        """The largest index of an array plus one, or the largest count if that is less."""
        tasks = _TASK_LIMIT.search(self.config.get("SchedulerParameters", ""))
        size = _number(self.config.get("MaxArraySize"), default=1001)
        return min(size, int(tasks[1])) if tasks else size

    @property
    def kill_wait_s(self) -> int:
        """Seconds from SIGTERM to SIGKILL; Slurm waits five at least."""
        return max(5, _number(self.config.get("KillWait"), default=30))

    @property
    def default_partition(self) -> slurm.Partition | None:
        """The partition of jobs that name none."""
        return next((partition for partition in self.partitions if partition.default), None)

    @property
    def enforced(self) -> frozenset[str]:
        """What of the accounting holds for jobs: ``associations``, ``limits``, ``qos``, ..."""
        return frozenset(self.config.get("AccountingStorageEnforce", "").split(","))

    def submit_limit(self, *, account: str, partition: str, qos: str) -> tuple[int, str] | None:
        """Return how many jobs this user may have in the queue and what says so, or None."""
        mine = [
            one
            for one in self.associations
            if account in {"", one.account} and one.partition in {None, partition}
        ]
        chosen = next((one for one in self.partitions if one.name == partition), None)
        names = {qos} if qos else {one.default_qos for one in mine}
        names |= {chosen.qos} if chosen else set()
        found = [
            *((one.max_submit, f"QOS {one.name}") for one in self.qualities if one.name in names),
            *((one.max_submit, f"account {one.account}") for one in mine),
        ]
        limits = [(limit, where) for limit, where in found if limit is not None]
        return min(limits) if limits and "limits" in self.enforced else None


def ask(*, conf: Path | None = None) -> Live:
    """Ask the live Slurm everything that the settings are compared with.

    Raises:
        SlurmMissingError: There is no Slurm here.
        SlurmUnreachableError: The controller does not answer.
        SlurmRefusedError: It refuses to show its configuration.
    """
    config = slurm.config(conf=conf)
    partitions = tuple(slurm.partitions(conf=conf))
    try:
        qualities = tuple(slurm.qualities(conf=conf))
        cluster = config.get("ClusterName", "")
        mine = tuple(slurm.associations(getpass.getuser(), cluster=cluster, conf=conf))
    except (slurm.AccountingUnavailableError, SlurmRefusedError) as error:
        return Live(config, partitions, (), (), no_accounting=str(error))
    return Live(config, partitions, qualities, mine, no_accounting="")


def check_site(resolved: Resolved, live: Live, *, conf: Path | None = None) -> list[Finding]:
    """Compare a site's settings with the live Slurm.

    Args:
        resolved: The settings, with the account and partition that this user's jobs take.
        live: What Slurm answered to :func:`ask`.
        conf: slurm.conf of the cluster; by default the one that the environment names.

    Raises:
        SlurmUnreachableError: The controller does not answer any more.
    """
    with tempfile.TemporaryDirectory(prefix="hpcresume-site-") as folder:
        check = _Check(resolved, live, Path(folder), conf)
        parts = (check.jobs, check.arrays, check.limits, check.spelling, check.request, check.node)
        return [finding for part in parts for finding in part()]


class _Check:
    """One comparison; each method yields what it finds about some settings."""

    def __init__(self, resolved: Resolved, live: Live, folder: Path, conf: Path | None) -> None:
        self._resolved, self._live = resolved, live
        self._site = resolved.settings.site
        self._folder, self._conf = folder, conf
        self._script = ""
        self._complaint = ""

    def jobs(self) -> Iterator[Finding]:
        """Would Slurm take the job array and the merge job?"""
        try:
            self._script = render_array(self._array_job(), self._resolved)
            merge = render_merge(self._merge_job(), self._resolved)
        except ConfigError as error:
            self._complaint = str(error)
            yield Finding("job array", "unknown", None, "", self._complaint)
            return
        self._complaint = self._refusal(self._script)
        yield _job("job array", self._complaint)
        if self._site.submit_from_compute:
            # The array that it would wait for does not exist.
            yield _job("merge job", self._refusal(_without(merge, "dependency")))

    def arrays(self) -> Iterator[Finding]:
        """Arrays, and how large they may be."""
        site, live = self._site, self._live
        key, size = "site.arrays", live.max_array_size
        if size < 2:
            said = f"MaxArraySize is {size}: there are no arrays"
            yield self._compare(key, site.arrays, right=not site.arrays, said=said, value=False)
        elif not site.arrays:
            refused = self._probe("--array=0-1")
            yield (
                self._found(key, "ok", f"an array is refused: {refused}")
                if refused
                else self._found(key, "unknown", "Slurm takes arrays; the centre may forbid them")
            )
        elif self._complaint:
            yield self._found(key, "unknown", "the job array of this check was not taken")
        else:
            yield self._found(key, "ok", "an array is taken")
        yield self._compare(
            "site.max_array_size",
            site.max_array_size,
            right=site.max_array_size <= max(size, 1) or not site.arrays,
            said=f"the live limit is {size}",
            value=max(size, 1),
        )

    def limits(self) -> Iterator[Finding]:
        """How many jobs, how long a grace, and who may restart and submit."""
        site, live = self._site, self._live
        yield self._max_submit()
        wait = live.kill_wait_s
        yield self._compare(
            "site.kill_wait_s",
            site.kill_wait_s,
            right=site.kill_wait_s == wait,
            said=f"KillWait is {wait} s",
            value=wait,
        )
        drain = self._resolved.settings.task.drain_s
        yield self._compare(
            "task.drain_s",
            drain,
            right=drain < wait,
            said=f"{wait} s pass from SIGTERM to SIGKILL",
            value=_drain_s(live),
        )
        default = "" if live.config.get("JobRequeue") == "1" else ", where a job asks for it"
        said = f"Slurm may restart jobs{default}" if site.requeue else "never asked for"
        yield self._found("site.requeue", "ok", said)
        yield self._submit_from_compute()

    def spelling(self) -> Iterator[Finding]:
        """What is forbidden and required, and how memory and GPUs are asked for."""
        site = self._site
        for name in site.forbidden:
            yield self._forbidden(name)
        yield from self._required()
        yield self._memory_style()
        yield self._gpu_style()

    def request(self) -> Iterator[Finding]:
        """Partition, account and quality of service of the array and of the merge job."""
        settings = self._resolved.settings
        for section, asked in (("request", settings.request), ("merge", settings.merge)):
            partitions = [one.name for one in self._live.partitions]
            for name in filter(None, asked.partition.split(",")):
                yield self._one_of(f"{section}.partition", name, partitions, "the partitions are")
            mine = self._live.associations
            if not mine or "associations" not in self._live.enforced:
                continue
            if asked.account:
                accounts = sorted({one.account for one in mine})
                yield self._one_of(f"{section}.account", asked.account, accounts, "yours are")
            if asked.qos:
                qualities = sorted({qos for one in mine for qos in one.qos})
                yield self._one_of(f"{section}.qos", asked.qos, qualities, "you may use")

    def node(self) -> Iterator[Finding]:
        """What only a node of the cluster knows, and how the site is recognised."""
        site = self._site
        yield self._found(
            "site.node_local", "unknown", "only a node can tell: srun hpcresume doctor"
        )
        yield from self._shell(site.setup, site.python)
        yield self._identify()

    # -- single settings --------------------------------------------------------------------

    def _max_submit(self) -> Finding:
        key, value = "site.max_submit", self._site.max_submit
        if self._live.no_accounting:
            return self._found(key, "unknown", self._live.no_accounting)
        request = self._resolved.settings.request
        default = self._live.default_partition
        limit = self._live.submit_limit(
            account=request.account,
            partition=request.partition or (default.name if default else ""),
            qos=request.qos,
        )
        if limit is not None:
            count, where = limit
            return self._compare(
                key, value, right=0 < value <= count, said=f"{where} allows {count}", value=count
            )
        if value == 0:
            return self._found(key, "ok", "no limit is enforced by the accounting")
        return self._found(
            key, "unknown", "the accounting enforces none; the centre may, by other means"
        )

    def _submit_from_compute(self) -> Finding:
        key = "site.submit_from_compute"
        if not self._site.submit_from_compute:
            return self._found(key, "ok", "never tried")
        if "SLURM_JOB_ID" in os.environ and not self._complaint:
            return self._found(key, "ok", "a job was taken from within this one")
        name = self._resolved.settings.request.partition
        closed = [
            f"{one.name} only from {one.submitters}"
            for one in self._live.partitions
            if one.submitters != "ALL" and (one.name == name if name else one.default)
        ]
        why = "; ".join(closed) or f"only a job can tell: srun hpcresume site check {self._name}"
        return self._found(key, "unknown", why)

    def _forbidden(self, name: str) -> Finding:
        key, probe = "site.forbidden", _PROBES.get(name)
        if probe is None:
            return self._found(key, "unknown", f"--{name} is not tried", value=name)
        refused = self._probe(probe)
        if refused:
            return self._found(key, "ok", f"--{name} is refused: {refused}", value=name)
        why = f"Slurm takes {probe}; the centre may drop it later" if self._usable else self._why
        return self._found(key, "unknown", why, value=name)

    def _required(self) -> Iterator[Finding]:
        key, names = "site.required", self._site.required
        if not self._usable:
            yield self._found(key, "unknown", self._why)
            return
        if not names:
            yield self._found(key, "ok", "a job without further options is taken")
        for name in names:
            refused = self._refusal(_without(self._script, name))
            why = f"Slurm takes a job without --{name}; the centre may want it all the same"
            yield (
                self._found(key, "ok", f"without --{name}: {refused}", value=name)
                if refused
                else self._found(key, "unknown", why, value=name)
            )

    def _gpu_style(self) -> Finding:
        key, style = "site.gpu_style", self._site.gpu_style
        if "gpu" not in self._live.config.get("GresTypes", ""):
            return self._found(key, "ok", "this Slurm hands out no GPUs")
        if style in {"gres", "none"} or "cons_tres" in self._live.config.get("SelectType", ""):
            return self._found(key, "ok", "taken where a partition has GPUs")
        said = f"--{style} needs select/cons_tres"
        return self._compare(key, style, right=False, said=said, value="gres")

    def _memory_style(self) -> Finding:
        key, style = "site.memory_style", self._site.memory_style
        if style == "none":
            return self._found(key, "ok", "memory is not asked for")
        if not self._usable:
            return self._found(key, "unknown", self._why)
        refused = self._probe(f"--{style}=1M")
        said = f"--{style} is refused: {refused}" if refused else f"--{style} is taken"
        return self._compare(key, style, right=not refused, said=said, value="none")

    def _shell(self, setup: Iterable[str], python: str) -> Iterator[Finding]:
        lines = "\n".join(setup)
        if lines:
            done = subprocess.run(
                ["bash", "-n"], input=lines, text=True, capture_output=True, check=False
            )
            wrong = done.stderr.strip()
            why = wrong or "valid bash; what the lines do shows in a job only"
            yield self._found("site.setup", "wrong" if wrong else "unknown", why)
        if python:
            command = shlex.split(python)[0]
            found = shutil.which(command)
            why = found or f"{command} is not on the path here; site.setup may put it there"
            yield self._found("site.python", "ok" if found else "unknown", why)

    def _identify(self) -> Finding:
        cluster = self._live.cluster_name
        try:
            name, how = identify_site(os.environ, cluster_name=cluster)
        except ConfigError as error:
            return Finding("site.identify", "wrong", None, "", str(error))
        if name == self._name:
            return Finding("site.identify", "ok", None, "", how)
        if self._name == GENERIC:
            said = f"this machine is recognised as {name}: {how}"
            return Finding("site.identify", "unknown", None, "", said)
        said = f"this machine is recognised as {name!r} ({how}), so the site needs --site"
        write = f"site.identify.cluster_name = {json.dumps(cluster)}"
        return Finding("site.identify", "wrong", None, "", said, write)

    def _one_of(self, key: str, value: str, known: list[str], lead: str) -> Finding:
        said = f"{lead} {', '.join(known) or 'none'}"
        if value in known:
            return self._found(key, "ok", said)
        write = f"{key} = {json.dumps(known[0])}" if len(known) == 1 else ""
        return Finding(key, "wrong", value, self._resolved.origins[key], said, write)

    # -- asking and wording -----------------------------------------------------------------

    @property
    def _name(self) -> str:
        return self._resolved.site_name

    @property
    def _usable(self) -> bool:
        """Whether the job of this check is taken as it is, so that a change to it tells."""
        return bool(self._script) and not self._complaint

    @property
    def _why(self) -> str:
        return f"it shows only with a job that Slurm takes: {self._complaint}"

    def _probe(self, option: str) -> str:
        """Return why Slurm refuses the job with one more option; empty if it does not."""
        return self._refusal(self._script, option) if self._usable else ""

    def _refusal(self, text: str, *argv: str) -> str:
        path = self._folder / "job.sh"
        path.write_text(text, encoding="utf-8")
        try:
            slurm.would_accept(argv, script=path, conf=self._conf)
        except SlurmRefusedError as error:
            return _last_line(error.fields["stderr"])
        return ""

    def _array_job(self) -> ArrayJob:
        return ArrayJob(
            name="hpcresume-site-check",
            run_dir=self._folder,
            folder=self._folder,
            log_dir=self._folder,
            tasks=2 if self._live.max_array_size > 1 and self._site.arrays else 1,
            index=None if self._site.arrays else 0,
        )

    def _merge_job(self) -> MergeJob:
        return MergeJob(
            name="hpcresume-site-check",
            run_dir=self._folder,
            log_dir=self._folder,
            dependency="afterany:1",
        )

    def _found(self, key: str, state: State, reason: str, *, value: Any = None) -> Finding:
        section, _, name = key.partition(".")
        said = getattr(getattr(self._resolved.settings, section), name) if value is None else value
        return Finding(key, state, said, self._resolved.origins[key], reason)

    def _compare(self, key: str, said_value: Any, *, right: bool, said: str, value: Any) -> Finding:
        origin = self._resolved.origins[key]
        if right:
            return Finding(key, "ok", said_value, origin, said)
        return Finding(key, "wrong", said_value, origin, said, f"{key} = {json.dumps(value)}")


def new_site(
    name: str, directory: Path, live: Live, *, environ: Mapping[str, str] = os.environ
) -> Path:
    """Write a first ``site.toml`` from what Slurm answers and return its path.

    Args:
        name: Name of the site, which is that of its folder.
        directory: Folder of sites, one that ``HPCRESUME_SITE_PATH`` names.
        live: What Slurm answered.
        environ: Where it is seen whether a site of this cluster exists; the new one extends it.

    Raises:
        ConfigError: The name cannot be a folder's, the file exists, or cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be the name of a site: it is a folder's. Use letters, digits, "
            "dots, dashes and underscores",
            site=name,
        )
    existing, _ = identify_site(environ, cluster_name=live.cluster_name)
    text = site_text(live, extends="" if existing in {GENERIC, name} else existing)
    path = directory.expanduser().absolute() / name / FILE_NAME
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with _new_file(path) as file:
            os.write(file, text.encode())
    except FileExistsError as error:
        raise ConfigError(
            f"{path} exists. It may hold what somebody found out by hand, so it is kept. "
            f"Compare it with Slurm: hpcresume site check {name}",
            path=str(path),
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}). Give another --dir", path=str(path)
        ) from error
    return path


def site_text(live: Live, *, extends: str = "") -> str:
    """Return the content of a site file as Slurm's answers give it."""
    cluster, version = live.cluster_name, live.config.get("SLURM_VERSION", "?")
    default = live.default_partition
    limit = live.submit_limit(account="", partition=default.name if default else "", qos="")
    lines = [
        f"description = {json.dumps(f'{cluster}, as its Slurm {version} answered')}",
        *([f"extends = {json.dumps(extends)}"] if extends else []),
        "",
        "# What Slurm cannot tell is left at its default: memory_style, gpu_style, node_local,",
        "# required, forbidden, submit_from_compute.  See: hpcresume site show generic",
        "# Partitions, the default one with a star:",
        *(f"#   {_describe(partition)}" for partition in live.partitions),
        "",
        "[site]",
        f"max_array_size = {max(1, live.max_array_size)}",
        *(["arrays = false"] if live.max_array_size < 2 else []),
        *([f"max_submit = {limit[0]}  # {limit[1]}"] if limit else []),
        f"kill_wait_s = {live.kill_wait_s}",
        # What JobRequeue says holds for jobs that do not ask; ours ask.
        f"requeue = true  # JobRequeue = {live.config.get('JobRequeue', '?')}",
        "",
        "[site.identify]",
        f"cluster_name = {json.dumps(cluster)}",
        "",
        *(["[task]", f"drain_s = {_drain_s(live)}", ""] if live.kill_wait_s <= 20 else []),
        "[request]",
        f"partition = {json.dumps(default.name if default else '')}",
    ]
    return "\n".join(lines) + "\n"


def _drain_s(live: Live) -> float:
    """Return what can be spent on draining, so that publishing and requeuing still fit."""
    return round(live.kill_wait_s * 0.6, 1)


def _describe(partition: slurm.Partition) -> str:
    words = [f"{partition.name}{'*' if partition.default else ''}", f"limit {partition.max_time}"]
    if partition.preempt_mode not in {None, "OFF"}:
        words.append(f"preemption {partition.preempt_mode}, grace {partition.grace_s or 0} s")
    words += ["whole nodes"] if partition.exclusive else []
    words += [f"state {partition.state}"] if partition.state != "UP" else []
    return re.sub(r"[^\x20-\x7e]", "?", ", ".join(words))


def _job(key: str, refusal: str) -> Finding:
    state: State = "wrong" if refusal else "ok"
    return Finding(key, state, None, "", refusal or "Slurm would take it")


def _without(script: str, option: str) -> str:
    """Return a batch script without the line of one of its options."""
    prefix = (f"#SBATCH --{option}=", f"#SBATCH --{option}\n")
    return "".join(line for line in script.splitlines(keepends=True) if not line.startswith(prefix))


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return re.sub(r"^sbatch: (error: )?", "", lines[-1]) if lines else "no reason given"


def _number(text: str | None, *, default: int) -> int:
    match = _NUMBER.match(text or "")
    return int(match[0]) if match else default


@contextmanager
def _new_file(path: Path) -> Iterator[int]:
    # Mode and not umask: a site file that a group can write is refused when it is read.
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        yield file
    finally:
        os.close(file)
