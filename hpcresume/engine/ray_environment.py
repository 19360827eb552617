"""Ray's environment: set before Ray is imported, which reads its settings then."""

from __future__ import annotations

import os
import secrets


def prepare_environment() -> None:
    """Remove what could lead Ray to another cluster, and set this attempt's own token."""
    for name in list(os.environ):
        if name.startswith("RAY_"):
            del os.environ[name]
    os.environ.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
        RAY_USAGE_STATS_ENABLED="0",
        # The node's memory is not the job's; the kernel's cgroup decides.
        RAY_memory_monitor_refresh_ms="0",
        RAY_enable_metrics_collection="0",
        # Most calls and frames are smaller than this, and cheaper to send than to share.
        RAY_max_direct_call_object_size=str(1 << 20),
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    )
