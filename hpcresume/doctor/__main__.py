"""The children of `doctor`, which do what may hang or end them: storage, ray, across."""

from __future__ import annotations

import sys

from hpcresume.doctor.across import take_part
from hpcresume.doctor.ray_head import keep_head
from hpcresume.doctor.storage import probe_storage

{"storage": probe_storage, "ray": keep_head, "across": take_part}[sys.argv[1]](sys.argv[2])
