"""Compare a site's settings with what the live Slurm answers.

Slurm is asked for its configuration, its partitions, the user's limits where there is
accounting, and by ``sbatch --test-only`` whether it would take the jobs that hpcresume
submits.  Nothing is submitted.  What no question answers is reported as unknown with the
reason, never as right.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpcresume import slurm
from hpcresume.config import Resolved, identify_site
from hpcresume.config.sites import GENERIC
from hpcresume.errors import ConfigError, SlurmRefusedError
from hpcresume.launch.live import Live
from hpcresume.launch.rendering import ArrayJob, MergeJob, render_array, render_merge

State = Literal["ok", "wrong", "unknown"]

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
            value=live.drain_s,
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
        if site.memory_max:
            yield self._memory_max()
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

    def _memory_max(self) -> Finding:
        key, most = "site.memory_max", self._site.memory_max
        if self._site.memory_style == "none" or "mem" in self._site.forbidden:
            return self._found(key, "ok", "memory is not asked for")
        if not self._usable:
            return self._found(key, "unknown", self._why)
        refused = self._probe(f"--mem={most}")
        said = f"--mem={most} is refused: {refused}" if refused else f"--mem={most} is taken"
        return self._compare(key, most, right=not refused, said=said, value="")

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
