"""Fixtures of the end-to-end tests: real Slurm clusters, shared by the session."""

from tests.support.cluster import (
    cgroup_cluster,
    each_cluster,
    limited_cluster,
    linuxproc_cluster,
    shared_cgroup_cluster,
    shared_linuxproc_cluster,
    slurm_cluster,
)

__all__ = [
    "cgroup_cluster",
    "each_cluster",
    "limited_cluster",
    "linuxproc_cluster",
    "shared_cgroup_cluster",
    "shared_linuxproc_cluster",
    "slurm_cluster",
]
