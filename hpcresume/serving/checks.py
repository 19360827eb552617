"""What cannot be a pool is refused before anything is started."""

from __future__ import annotations

from hpcresume.errors import ConfigError
from hpcresume.serving.policy import UpdatePolicy
from hpcresume.serving.worker import StateExporter, StatefulWorker


def check_pool(
    worker: type[StatefulWorker],
    n: int,
    exporter: type[StateExporter] | None,
    policy: UpdatePolicy,
    request_timeout_s: float | None,
) -> None:
    """Refuse a pool that cannot work; see :class:`ServingPool` for the arguments.

    Raises:
        ConfigError: Says which argument is wrong and what to do.
    """
    if not (isinstance(worker, type) and issubclass(worker, StatefulWorker)):
        raise ConfigError(f"worker={worker!r} is no StatefulWorker class. Derive one from it.")
    if exporter is not None and not (
        isinstance(exporter, type) and issubclass(exporter, StateExporter)
    ):
        raise ConfigError(f"exporter={exporter!r} is no StateExporter class. Derive one from it.")
    if n < 1 or policy.min_serving > n:
        raise ConfigError(
            f"a pool of {n} workers cannot keep min_serving={policy.min_serving} of them."
        )
    if policy.pause == "keep" and worker.pause is StatefulWorker.pause:
        raise ConfigError(
            f"{worker.__name__} overrides no pause(), which would have to hold the requests in "
            "flight. Override it and resume(), or set pause='drain' or 'abort'."
        )
    if policy.overlap and worker.in_place:
        raise ConfigError(
            f"{worker.__name__} is in_place: it cannot be overwritten while it serves. "
            "Set overlap=False, or stage the state."
        )
    if request_timeout_s is not None and request_timeout_s <= 0:
        raise ConfigError(f"request_timeout_s={request_timeout_s!r}; it has to be above 0.")
