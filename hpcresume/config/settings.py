"""The typed settings: what each section holds and which values each key takes.

There are no defaults here: ``templates/default.toml`` is the one place that has them.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=0, description="an integer from 0")]
Positive = Annotated[int, Meta(ge=1, description="an integer from 1")]
Seconds = Annotated[float, Meta(gt=0, description="seconds, more than 0")]
WholeSeconds = Annotated[int, Meta(ge=1, le=65535, description="whole seconds, 1 to 65535")]
TimeLimit = Annotated[
    str,
    Meta(
        pattern=r"^(|\d+|\d+:\d+(:\d+)?|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE)$",
        description="a time as sbatch spells it: minutes, 02:00:00 or 1-12:00:00",
    ),
]
Memory = Annotated[
    str,
    Meta(
        pattern=r"^(|\d+([KMGTkmgt][Bb]?)?)$",
        description="a size as sbatch spells it: 4000 (MB), 512M or 16G",
    ),
]
RawOption = Annotated[
    str,
    Meta(
        pattern=r"^--[a-z][a-z0-9-]*(=.*)?$",
        description="an sbatch option in its long spelling, --name or --name=value",
    ),
]
OptionName = Annotated[
    str,
    Meta(pattern=r"^[a-z][a-z0-9-]*$", description="an sbatch option's name without its dashes"),
]
Factor = Annotated[float, Meta(ge=1, le=16, description="a factor, 1 to 16")]


class RunSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[run]``: how long a run keeps trying."""

    max_attempts: Positive
    max_rounds: Count
    max_no_progress_rounds: Positive
    min_task_s: Annotated[float, Meta(ge=0, description="seconds, from 0")]
    # The plans of older runs hold no such key.
    on_end: str = ""


class SyncSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[sync]``: when committed records are published to the run directory."""

    max_age_s: Seconds
    max_records: Count
    max_bytes: Positive
    first_age_s: Seconds


class TaskSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[task]``: how one array task works on its shard."""

    local_dir: str
    env_file: str
    workers: Count
    drain_s: Seconds
    signal_lead_s: WholeSeconds
    engine: Literal["ray", "inline"]
    chunk_target_s: Seconds
    chunk_max_sources: Positive
    start_timeout_s: Seconds
    backoff_s: WholeSeconds


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[request]``: what one array task asks Slurm for, spelled as sbatch does."""

    account: str
    partition: str
    qos: str
    constraint: str
    reservation: str
    time: TimeLimit
    cpus_per_task: Count
    mem: Memory
    gpus_per_task: Count
    exclude: str
    nodelist: str
    extra: list[RawOption]


class MergeSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[merge]``: what the merge job asks for; an empty value is that of ``[request]``."""

    account: str
    partition: str
    qos: str
    constraint: str
    time: TimeLimit
    cpus_per_task: Positive
    mem: Memory
    extra: list[RawOption]
    patience_s: Seconds


class Identify(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[site.identify]`` of a site file: how the site is recognised.

    Every entry given has to match; ``*`` and ``?`` are wildcards.  It belongs to its own
    file: a site that extends another does not inherit it.
    """

    env: dict[str, str] = {}
    cluster_name: str = ""


class SiteSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[site]``: what one centre's Slurm allows and how it wants things spelled."""

    name: str
    forbidden: list[OptionName]
    required: list[OptionName]
    arrays: bool
    max_array_size: Positive
    max_submit: Count
    submit_from_compute: bool
    memory_style: Literal["mem", "mem-per-cpu", "none"]
    memory_step: Factor
    memory_max: Memory
    gpu_style: Literal["gpus-per-task", "gres", "gpus-per-node", "none"]
    node_local: list[str]
    python: str
    setup: list[str]
    kill_wait_s: WholeSeconds
    requeue: bool


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every setting of a run, resolved."""

    run: RunSettings
    sync: SyncSettings
    task: TaskSettings
    request: Request
    merge: MergeSettings
    site: SiteSettings
