"""Probes of this node, of a run directory's file system, of Slurm and of Ray.

Each probe does what a run will do and says what came of it: ok, warning, or wrong with what
to do.
"""

from hpcresume.doctor.across import check_across
from hpcresume.doctor.check import Check
from hpcresume.doctor.cluster import check_slurm
from hpcresume.doctor.node import check_node
from hpcresume.doctor.ray_head import check_ray
from hpcresume.doctor.software import check_software
from hpcresume.doctor.storage import check_storage

__all__ = [
    "Check",
    "check_across",
    "check_node",
    "check_ray",
    "check_slurm",
    "check_software",
    "check_storage",
]
