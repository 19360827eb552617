"""Write a first site file from what the live Slurm answers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hpcresume import slurm
from hpcresume.config import identify_site
from hpcresume.config.sites import GENERIC
from hpcresume.errors import ConfigError
from hpcresume.launch.live import Live

FILE_NAME = "site.toml"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


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
        *(["[task]", f"drain_s = {live.drain_s}", ""] if live.kill_wait_s <= 20 else []),
        "[request]",
        f"partition = {json.dumps(default.name if default else '')}",
    ]
    return "\n".join(lines) + "\n"


def _describe(partition: slurm.Partition) -> str:
    words = [f"{partition.name}{'*' if partition.default else ''}", f"limit {partition.max_time}"]
    if partition.preempt_mode not in {None, "OFF"}:
        words.append(f"preemption {partition.preempt_mode}, grace {partition.grace_s or 0} s")
    words += ["whole nodes"] if partition.exclusive else []
    words += [f"state {partition.state}"] if partition.state != "UP" else []
    return re.sub(r"[^\x20-\x7e]", "?", ", ".join(words))


@contextmanager
def _new_file(path: Path) -> Iterator[int]:
    # Mode and not umask: a site file that a group can write is refused when it is read.
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        yield file
    finally:
        os.close(file)
