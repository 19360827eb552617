"""Pools of stateful workers whose state is replaced while they serve.

:class:`ServingPool` makes the workers and replaces their state; :class:`StatefulWorker` and
:class:`StateExporter` are what a user derives from; ``hpcresume.ServingStage`` serves the
items of a pipeline from a pool.  Nothing here imports Ray before a pool is started.
"""

from __future__ import annotations

from hpcresume.errors import PoolUnrecoverable
from hpcresume.serving.blocking import BlockingPool
from hpcresume.serving.errors import (
    PhaseFailedError,
    Retryable,
    ServingError,
    StateError,
    UpdateInProgress,
    UpdatesEndedError,
)
from hpcresume.serving.host import WorkerHealth
from hpcresume.serving.policy import Outcome, Phase, UpdatePolicy, UpdateReport, WorkerState
from hpcresume.serving.pool import ServingPool
from hpcresume.serving.requests import Lease
from hpcresume.serving.seats import PoolState, Served
from hpcresume.serving.state import Part
from hpcresume.serving.transport import (
    FileTransport,
    ObjectTransport,
    StateTransport,
    get_transport,
    register_transport,
)
from hpcresume.serving.worker import StateExporter, StatefulWorker
from hpcresume.updates import Journal, UpdateStep

__all__ = [
    "BlockingPool",
    "FileTransport",
    "Journal",
    "Lease",
    "ObjectTransport",
    "Outcome",
    "Part",
    "Phase",
    "PhaseFailedError",
    "PoolState",
    "PoolUnrecoverable",
    "Retryable",
    "Served",
    "ServingError",
    "ServingPool",
    "StateError",
    "StateExporter",
    "StateTransport",
    "StatefulWorker",
    "UpdateInProgress",
    "UpdatePolicy",
    "UpdateReport",
    "UpdateStep",
    "UpdatesEndedError",
    "WorkerHealth",
    "WorkerState",
    "get_transport",
    "register_transport",
]
