"""Rounds in as few array tasks as Slurm takes at once.

The number of shards that the user asks for is packed into what the site's limits allow:
:func:`capacity`.  A limit that nobody has written down shows when sbatch refuses.  It is then
asked of the live Slurm, and the round is dealt anew; where Slurm does not say either, half as
many tasks are tried.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Mapping

import msgspec

from hpcresume import slurm
from hpcresume.config import Resolved
from hpcresume.config.settings import SiteSettings
from hpcresume.errors import HpcResumeError, SlurmRefusedError
from hpcresume.launch import live

_ARRAY = re.compile(r"invalid job array specification", re.IGNORECASE)
_SUBMIT = re.compile(r"job submit limit|MaxSubmitJob|SubmitJobsLimit", re.IGNORECASE)
_TWIN_FROM = 6
"""Jobs in the queue from which on the merge job gets a twin; below they are for the work."""

_SCONTROL = "scontrol show config"


def has_twin(site: SiteSettings) -> bool:
    """Tell whether the merge job gets a twin, which needs room in the queue too."""
    return not site.max_submit or site.max_submit >= _TWIN_FROM


def capacity(site: SiteSettings) -> int:
    """Return how many array tasks a site takes at once; shards are packed into these.

    A round is submitted by the merge job of the one before it.  That job and the new one
    count too, each with its twin.
    """
    limits = [site.max_array_size] if site.arrays else []
    beside = 4 if has_twin(site) else 2
    limits += [max(1, site.max_submit - beside)] if site.max_submit else []
    return min(limits, default=sys.maxsize)


def with_live_limits(resolved: Resolved, config: Mapping[str, str]) -> Resolved:
    """Return settings that ask for no larger arrays than the live Slurm takes.

    Args:
        resolved: The settings.
        config: What ``scontrol show config`` says; empty where Slurm did not answer.
    """
    site = resolved.settings.site
    size = live.max_array_size(config) if config else site.max_array_size
    if not site.arrays or size >= site.max_array_size:
        return resolved
    if size < 2:
        return _changed(resolved, _SCONTROL, arrays=False)
    return _changed(resolved, _SCONTROL, max_array_size=size)


class Learned(msgspec.Struct, frozen=True):
    """What a refusal has taught.

    Attributes:
        resolved: Settings that keep to the limit.
        most: The most array tasks that Slurm takes now; other jobs of the user count too.
        note: What was learned, and what to write into the site file, for people.
    """

    resolved: Resolved
    most: int
    note: str


def learn(refusal: SlurmRefusedError, resolved: Resolved, *, tasks: int) -> Learned:
    """Return what can be submitted instead of an array that Slurm refused.

    Args:
        refusal: What sbatch said.
        resolved: The settings that it was submitted with.
        tasks: Number of its tasks.

    Raises:
        SlurmRefusedError: The refusal is about something else, or fewer tasks would not help.
    """
    text = refusal.fields.get("stderr", "")
    if _ARRAY.search(text):
        learned = _learn_array_size(resolved, tasks=tasks)
    elif _SUBMIT.search(text):
        learned = _learn_submit_limit(resolved, tasks=tasks)
    else:
        raise refusal
    new_kind = resolved.settings.site.arrays and not learned.resolved.settings.site.arrays
    if learned.most >= tasks and not new_kind:
        # What Slurm enforces is not what it was asked about.
        learned = msgspec.structs.replace(learned, most=tasks // 2)
    if learned.most < 1:
        raise SlurmRefusedError(
            f"{refusal}. Fewer array tasks would not help: {learned.note}. "
            "Wait until other jobs of yours have ended and submit again; where the limit is "
            "below 3 jobs, give `submit --array 1` and go on with: hpcresume drive RUN",
            **refusal.fields,
        ) from refusal
    return learned


def foresee(resolved: Resolved, *, tasks: int) -> Learned | None:
    """Return what can be submitted of a round of single jobs, None where all of it can.

    Slurm would take some of them before it refuses one, and they would be at work by then.
    """
    site = resolved.settings.site
    if site.arrays or site.max_submit or tasks == 1:
        return None
    learned = _learn_submit_limit(resolved, tasks=tasks)
    known = learned.resolved.settings.site.max_submit
    return learned if known and 1 <= learned.most < tasks else None


def _learn_array_size(resolved: Resolved, *, tasks: int) -> Learned:
    fitted = with_live_limits(resolved, slurm.config())
    site = fitted.settings.site
    if not site.arrays:
        return Learned(fitted, tasks, "this Slurm has no arrays: site.arrays = false")
    note = f"this Slurm takes no larger arrays: site.max_array_size = {site.max_array_size}"
    return Learned(fitted, site.max_array_size, note)


def _learn_submit_limit(resolved: Resolved, *, tasks: int) -> Learned:
    request = resolved.settings.request
    limit = queued = None
    with contextlib.suppress(HpcResumeError):
        answers = live.ask()
        default = answers.default_partition
        limit = answers.submit_limit(
            account=request.account,
            partition=request.partition or (default.name if default else ""),
            qos=request.qos,
        )
        queued = sum(not entry.ended for entry in slurm.queue())
    if limit is None or queued is None:
        note = f"Slurm refused {tasks} jobs and does not say how many it takes: site.max_submit"
        return Learned(resolved, tasks // 2, note)
    count, where = limit
    fitted = _changed(resolved, where, max_submit=count)
    beside = 2 if has_twin(fitted.settings.site) else 1
    most = min(capacity(fitted.settings.site), count - queued - beside)
    note = f"{where} takes {count} jobs, {queued} are queued: site.max_submit = {count}"
    return Learned(fitted, most, note)


def _changed(resolved: Resolved, origin: str, **values: int | bool) -> Resolved:
    site = msgspec.structs.replace(resolved.settings.site, **values)
    settings = msgspec.structs.replace(resolved.settings, site=site)
    origins = {**resolved.origins, **{f"site.{key}": origin for key in values}}
    return msgspec.structs.replace(resolved, settings=settings, origins=origins)
