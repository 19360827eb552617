"""What an update costs beside the least it could: `python -m tests.measure_serving`.

The floor moves the same bytes with one ``ray.put`` and one ``ray.get`` per worker, and checks
nothing: no worker looks at a byte.  The second floor has every worker read every byte once, as
whoever verifies a state must.  Prints one JSON object; seconds are medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import tempfile
import time
from typing import Any

import numpy as np

from tests.support.places import REPOSITORY

PART_BYTES = 32 << 20


def state(size_mib: int, version: int) -> dict[str, Any]:
    """Return a state of that size: matrices as a model has them."""
    count = max(1, (size_mib << 20) // PART_BYTES)
    return {
        f"layer-{i}": np.full((size_mib << 20) // count // 4, version, "f4") for i in range(count)
    }


def measure_floor(size_mib: int, workers: int, rounds: int, *, read: bool) -> float:
    """Return the seconds from putting the bytes until every worker has got, or read, them."""
    import ray

    @ray.remote(num_cpus=0)
    class Sink:
        def get(self, refs: list[Any]) -> int:
            got = ray.get(refs[0])
            if read:
                return max(int(part.view("u8").max()) for part in got.values())
            return len(got)

    sinks = [Sink.remote() for _ in range(workers)]
    ray.get([sink.get.remote([ray.put(state(1, 0))]) for sink in sinks])
    times = []
    for version in range(rounds):
        given = state(size_mib, version)
        begun = time.perf_counter()
        ref = ray.put(given)
        ray.get([sink.get.remote([ref]) for sink in sinks])
        times.append(time.perf_counter() - begun)
        del ref
    for sink in sinks:
        ray.kill(sink)
    return statistics.median(times)


def measure_updates(
    size_mib: int, workers: int, rounds: int, *, overlap: bool | None, frees: bool = False
) -> dict[str, float]:
    """Return total, service gap and commit of updates, in seconds.

    Args:
        size_mib: Size of the state.
        workers: How many.
        rounds: How many updates.
        overlap: As in the policy.
        frees: The workers free caches, and are paused before anything is made.
    """
    from hpcresume.serving import ServingPool, StateExporter, StatefulWorker, UpdatePolicy

    class Frees(StatefulWorker):
        def release(self) -> None:
            """Have none."""

    class Exporter(StateExporter):
        def __init__(self) -> None:
            self.kept: dict[int, Any] = {}

        def prepare(self, version: int) -> None:
            # Making the numbers is no part of moving them.
            self.kept = {version: state(size_mib, version)}

        def export(self, version: int) -> Any:
            return self.kept[version]

    async def run() -> list[tuple[float, float, dict[str, float]]]:
        policy = UpdatePolicy(overlap=overlap)
        kind = Frees if frees else StatefulWorker
        async with ServingPool(kind, workers, exporter=Exporter, policy=policy) as pool:
            await pool.update(1)
            found = []
            for version in range(2, 2 + rounds):
                begun = time.perf_counter()
                report = await pool.update(version)
                total = time.perf_counter() - begun
                made = report.phases_s["prepare"]
                found.append(
                    (
                        total - made,
                        report.gap_s - (made if frees else 0),
                        report.phases_s,
                    )
                )
            return found

    found = asyncio.run(run())
    medians = {"total_s": statistics.median(f[0] for f in found),
               "gap_s": statistics.median(f[1] for f in found)}  # fmt: skip
    for phase in ("build", "transfer", "commit"):
        medians[f"{phase}_s"] = statistics.median(f[2][phase] for f in found)
    return {name: round(value, 4) for name, value in medians.items()}


def _beside(found: dict[str, float], floor: float, read: float) -> dict[str, float]:
    gap = found["gap_s"]
    of = {"gap_of_floor": round(gap / floor, 2), "gap_of_read_floor": round(gap / read, 2)}
    return {**found, **of}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-mib", type=int, default=256)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    os.environ["RAY_AUTH_MODE"] = "disabled"
    from hpcresume.engine.head import HeadResources, RayHead

    temp = tempfile.mkdtemp(prefix="hpcr-")
    memory = max(8 << 30, 8 * 4 * (given.size_mib << 20))
    head = RayHead(temp, HeadResources(cpus=2, gpus=0, memory_bytes=memory))
    try:
        sizes = (given.size_mib, given.workers, given.rounds)
        floor = measure_floor(*sizes, read=False)
        read = measure_floor(*sizes, read=True)
        paused = measure_updates(*sizes, overlap=None, frees=True)
        in_push = measure_updates(*sizes, overlap=False)
        overlapped = measure_updates(*sizes, overlap=None)
    finally:
        head.close()
        shutil.rmtree(temp, ignore_errors=True)
    print(
        json.dumps(
            {
                "size_mib": given.size_mib,
                "workers": given.workers,
                "floor_s": round(floor, 4),
                "floor_read_s": round(read, 4),
                "paused_first": _beside(paused, floor, read),
                "paused_for_the_push": _beside(in_push, floor, read),
                "default": _beside(overlapped, floor, read),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
