"""What is measured: ours and the peers' on the same work, each checked against the same rows."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench import counts, ours, synthetic, watched
from tests.bench.environments import PEERS, Environment
from tests.bench.table import Case

Measured = tuple[float, dict[str, Any]]
SNAKEMAKE = Environment("snakemake", ("snakemake==9.27.1",))
DATATROVE = Environment("datatrove", ("datatrove[io,processing]==0.10.1", "orjson"))
HYPERQUEUE = Environment("hyperqueue", ("hyperqueue==0.27.0", "cloudpickle"))
PARALLEL = Environment(program=("parallel", "parallel"))
PARSL = Environment("parsl", ("parsl",))
RAY_DATA = Environment("ray-data", ("ray[data]==2.60.0", "orjson"))
CURATOR = Environment("curator", ("lmdb", "ray==2.60.0", "loguru"), alone=("nemo-curator==1.4.0",))
PEER_S = 900
TASKS = "one task per source"


@dataclass(frozen=True)
class Sizes:
    """How much work each line does.

    Attributes:
        many: Sources where one costs a microsecond.
        some: Sources where one costs a task of Ray.
        few: Sources where one costs a process.
        fan: Sources of ten rows each.
        slow: Sources of 10 ms of a core each.
        bulk: Sources of 20 KB.
        batches: Sources of one batch of 20,000 rows.
        union: Sources that 64 writers have completed.
        most: Sources that memory is watched over.
    """

    many: int = 2_000_000
    some: int = 10_000
    few: int = 500
    fan: int = 200_000
    slow: int = 12_000
    bulk: int = 20_000
    batches: int = 100
    union: int = 100_000_000
    most: int = 10_000_000


TINY = Sizes(4_000, 60, 6, 400, 40, 100, 3, 100_000, 200_000)


def expected(sources: int, fan: int = 0) -> str:
    """Return the digest of the rows that ``sources`` sources make, in any order."""

    def line(i: int, k: int) -> bytes:
        tail = b',"k":%d}' % k if fan else b"}"
        return b'{"i":%d,"y":%d' % (i, 2 * (i + 1)) + tail

    return digest(line(i, k) for i in range(sources) for k in range(fan or 1))


def digest(lines: Iterable[bytes]) -> str:
    """Return a digest that does not depend on the order of the lines."""
    total = 0
    for line in lines:
        total += int.from_bytes(hashlib.blake2b(line, digest_size=12).digest(), "big")
    return f"{total:x}"


def check(path: Path, wanted: str) -> None:
    """Compare a result with the rows that are expected.

    Raises:
        AssertionError: They differ.
    """
    with path.open("rb") as file:
        found = digest(line.rstrip(b"\n") for line in file)
    assert wanted == found, f"{path} holds other rows than expected"


def repeated(case: Case, against: str, target: str) -> Case:
    """Return a line that compares the figure of one before it with another one's."""

    def measure(_: Path) -> Measured:
        if not case.figures:
            raise RuntimeError(f"{case.name} was not measured")
        return case.figures[-1], {}

    name = f"{case.name}, to {against}"
    return Case(name, case.group, case.unit, measure, against, target)


class Bench:
    """Makes the lines of the table.

    Args:
        sizes: How much work.
        cores: For everybody.
        environments: Where the peers are installed.
    """

    def __init__(self, sizes: Sizes, cores: int, environments: Path) -> None:
        self.sizes, self.cores, self.root = sizes, cores, environments
        self._expected: dict[tuple[int, int], str] = {}

    def _wanted(self, sources: int, fan: int = 0) -> str:
        key = (sources, fan)
        if key not in self._expected:
            self._expected[key] = expected(sources, fan)
        return self._expected[key]

    def _peer(
        self,
        script: str,
        sources: int,
        *arguments: str,
        environment: Environment | None = None,
        value: Callable[[dict[str, Any]], float] = lambda v: v["sources"] / v["run_s"],
        fan: int = 0,
    ) -> Callable[[Path], Measured]:
        def measure(directory: Path) -> Measured:
            python = (environment or Environment()).python(self.root)
            out = directory / "out.jsonl"
            command = [python, str(PEERS / f"{script}.py"), str(sources), str(out), *arguments]
            # Parsl starts programs of its own by their names.
            path = os.pathsep.join([os.path.dirname(python), os.environ["PATH"]])
            variables = {**os.environ, "BENCH_CORES": str(self.cores), "PATH": path}
            start = time.time()
            done = subprocess.run(
                command, capture_output=True, text=True, env=variables, timeout=PEER_S, check=False
            )
            if done.returncode:
                last = (done.stderr.strip() or "no message").splitlines()[-1]
                raise RuntimeError(f"it ended with {done.returncode}: {last[:160]}")
            check(out, self._wanted(sources, fan))
            values = json.loads(done.stdout.strip().splitlines()[-1]) | {"started": start}
            return value(values), values

        return measure

    def _ours(
        self, sources: int, *options: str, fan: int = 0, **params: Any
    ) -> Callable[[Path], Measured]:
        def measure(directory: Path) -> Measured:
            slow_sync = params.get("slow_sync", False)
            rest = {k: v for k, v in params.items() if k != "slow_sync"}
            ended = ours.submit(
                directory, self.cores, *options, slow_sync=slow_sync, n=sources, **rest
            )
            ours.collect(ended)
            check(directory / "out.jsonl", self._wanted(sources, fan))
            return sources / ended.work_s, {"work_s": ended.work_s}

        return measure

    def cases(self) -> list[Case]:
        """Return all lines."""
        return [
            *self._cost(), *self._fan_out(), *self._handover(), *self._resumable(),
            *self._start(), *self._others(), *self._left(), *self._traces(), *self._bulk(),
            *self._collect(), *self._drain(), *self._memory(),
        ]  # fmt: skip

    def _cost(self) -> list[Case]:
        group, rate, many = "cost per source", "sources/s", self.sizes.many
        cases = [
            Case("Ray, " + TASKS, group, rate, self._peer("ray_tasks", self.sizes.some)),
            Case("Ray pool, Python rows", group, rate, self._peer("ray_pool", many, "rows")),
            Case("Ray pool, packed rows", group, rate, self._peer("ray_pool", many, "packed")),
            Case("hpcresume", group, rate, self._ours(many), "Ray pool, packed rows", ">= 0.8"),
            Case(
                "hpcresume, 10 ms more per fsync", group, rate, self._ours(many, slow_sync=True),
                "hpcresume", ">= 0.8",
            ),
        ]  # fmt: skip
        return [*cases, repeated(cases[3], "Ray, " + TASKS, ">= 100")]

    def _fan_out(self) -> list[Case]:
        group, rate, n = "fan-out of 10", "sources/s", self.sizes.fan
        tasks = self._peer("ray_tasks", self.sizes.some, "fan", fan=10)
        cases = [
            Case("Ray, " + TASKS, group, rate, tasks),
            Case("Ray pool, packed rows", group, rate, self._peer("ray_pool", n, "fan", fan=10)),
            Case(
                "hpcresume", group, rate, self._ours(n, form="fan", fan=10),
                "Ray pool, packed rows", ">= 0.7",
            ),
        ]  # fmt: skip
        return [*cases, repeated(cases[2], "Ray, " + TASKS, ">= 50")]

    def _handover(self) -> list[Case]:
        group, rate, n = "unfused second stage", "sources/s", self.sizes.many
        return [
            Case("Ray pools, one to the other", group, rate, self._peer("ray_pool", n, "handover")),
            Case(
                "hpcresume", group, rate, self._ours(n, form="unfused"),
                "Ray pools, one to the other", ">= 0.6",
            ),
        ]  # fmt: skip

    def _resumable(self) -> list[Case]:
        group, n = "sources of 10 ms of a core", self.sizes.slow
        ideal = n * 0.01 / self.cores

        def of_ideal(measured: Callable[[Path], Measured]) -> Callable[[Path], Measured]:
            def measure(directory: Path) -> Measured:
                rate, values = measured(directory)
                return ideal * rate / n, values

            return measure

        unit, plain, pool = "of cores x time", "plain processes", "Ray pool, recording nothing"
        ours = of_ideal(self._ours(n, form="slow"))
        cases = [
            Case(plain, group, unit, of_ideal(self._peer("processes", n))),
            Case(pool, group, unit, of_ideal(self._peer("ray_pool", n, "slow"))),
            Case("hpcresume", group, unit, ours, plain, ">= 0.97"),
        ]
        return [*cases, repeated(cases[2], pool, ">= 0.98")]

    def _start(self) -> list[Case]:
        group = "time to first result"

        def bare(directory: Path) -> Measured:
            start = time.time()
            _, values = self._peer("ray_start", 1)(directory)
            return values["answered"] - start, values

        def measure(directory: Path) -> Measured:
            ended = ours.submit(directory, self.cores, n=1, form="first")
            return ended.first_s, {}

        return [
            Case("ray.init and one actor call", group, "s", bare),
            Case(
                "hpcresume, array task",
                group,
                "s",
                measure,
                "ray.init and one actor call",
                "<= 1.25",
            ),
            *self._commands(),
        ]

    def _commands(self) -> list[Case]:
        """Return the lines of commands that read a small run."""

        def command(*words: str) -> Callable[[Path], Measured]:
            def measure(directory: Path) -> Measured:
                ours.submit(directory, self.cores, "--engine", "inline", n=1000)
                line = [sys.executable, "-m", "hpcresume", *words]
                start = time.perf_counter()
                subprocess.run(line, cwd=directory, check=True, capture_output=True)
                return time.perf_counter() - start, {}

            return measure

        return [
            Case(f"hpcresume {' '.join(words)}", "commands", "s", command(*words), target="<= 0.3")
            for words in (("--help",), ("status", "run"), ("merge", "run"))
        ]

    def _others(self) -> list[Case]:
        """Return the peers that schedule one process or call per source."""
        group, rate, sizes = "peers", "sources/s", self.sizes

        def line(name: str, script: str, sources: int, where: Environment | None = None) -> Case:
            return Case(name, group, rate, self._peer(script, sources, environment=where))

        return [
            line("concurrent.futures", "futures", sizes.some),
            line("Parsl", "parsl_local", sizes.few, PARSL),
            line("HyperQueue", "hyperqueue_local", sizes.few, HYPERQUEUE),
            line("GNU parallel", "gnu_parallel", sizes.few, PARALLEL),
            line("datatrove", "datatrove_local", sizes.few, DATATROVE),
            line("Snakemake", "snakemake_local", sizes.few, SNAKEMAKE),
            line("Ray Data, checkpoint", "ray_data", sizes.some, RAY_DATA),
            Case("hpcresume", group, rate, self._ours(sizes.many)),
        ]

    def _left(self) -> list[Case]:
        """Return the lines about asking what is left."""
        group, sizes = "asking what is left", self.sizes

        def union(directory: Path) -> Measured:
            return synthetic.union_s(directory, sizes.union)

        def cold(directory: Path) -> Measured:
            return synthetic.union_s(directory, sizes.union, is_cold=True)

        def again(directory: Path) -> Measured:
            ours.submit(directory, self.cores, n=sizes.many)
            start = time.perf_counter()
            ours.submit(directory, self.cores, n=sizes.many)
            seconds = time.perf_counter() - start
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", "pass"], check=True)
            interpreter_s = time.perf_counter() - start
            return seconds - interpreter_s, {"interpreter_s": interpreter_s}

        def plan(directory: Path) -> Measured:
            start = time.perf_counter()
            options = ("--cluster", "slurm", "--array", "1000", "--dry-run")
            with ours.start(directory, self.cores, *options, n=10**9) as process:
                process.wait()
            if process.returncode:
                raise RuntimeError(f"{process.args} ended with {process.returncode}")
            return time.perf_counter() - start, {}

        def peer(name: str, script: str, sources: int, where: Environment) -> Case:
            measure = self._peer(
                script, sources, environment=where, value=lambda values: values["noop_s"]
            )
            return Case(f"{name}, {sources:,} done", group, "s", measure)

        return [
            Case(f"hpcresume, union and remainder of {sizes.union:,}", group, "s", union,
                 target="<= 0.5"),
            Case("the same, nothing of it in memory", group, "s", cold, target="<= 1.0"),
            Case(f"hpcresume, the same command again, {sizes.many:,} done, less the interpreter",
                 group, "s", again, target="<= 0.2"),
            Case("hpcresume, planning 1,000,000,000", group, "s", plan, target="<= 5"),
            peer("NeMo Curator's union", "curator_union", sizes.fan, CURATOR),
            peer("Snakemake", "snakemake_local", sizes.few, SNAKEMAKE),
            peer("datatrove", "datatrove_local", sizes.few, DATATROVE),
        ]  # fmt: skip

    def _traces(self) -> list[Case]:
        """Return the lines about what a task leaves and asks for; they do not depend on load."""
        few, many = self.sizes.some, self.sizes.many
        calls, left = "calls on the run directory", "left in the run directory"

        def task(
            sources: int, publications: int = 0, workers: int = 1
        ) -> Callable[[Path], Measured]:
            def measure(directory: Path) -> Measured:
                rows = -(-sources // publications) if publications else 0
                found = counts.count(
                    directory, sources, engine="ray", workers=workers, max_records=rows
                )
                files = counts.attempt_files(directory / "run")
                segments = sum(path.name.startswith("seg-") for path in files)
                return float(sum(found.values())), {"calls": dict(found), "segments": segments}

            return measure

        def each(directory: Path) -> Measured:
            one, _ = task(many)(directory / "one")
            more, values = task(many, 10)(directory / "more")
            return (more - one) / (values["segments"] - 1), values

        def worker(directory: Path) -> Measured:
            one, _ = task(few)(directory / "one")
            two, values = task(few, workers=2)(directory / "two")
            return two - one, values

        def files(directory: Path) -> Measured:
            ended = ours.submit(directory, self.cores, n=many)
            found = counts.attempt_files(ended.run)
            return len(found) - ended.work_s / 60, {"names": sorted(p.name for p in found)}

        def state(directory: Path) -> Measured:
            ended = ours.submit(directory, self.cores, n=many)
            found = counts.attempt_files(ended.run)
            size = sum(path.stat().st_size for path in found if path.name.startswith("seg-"))
            ours.collect(ended)
            rows = (directory / "out.jsonl").stat().st_size
            return (size - rows) / many, {"published_bytes": size, "row_bytes": rows}

        small = f"few sources, {few:,}"
        return [
            Case(small, calls, "calls", task(few)),
            Case(f"many sources, {many:,}", calls, "calls", task(many), small, "<= 1.0"),
            Case("each further worker", calls, "calls", worker),
            Case("each further publication", calls, "calls", each, target="<= 20"),
            Case("files, less one a minute", left, "files", files, target="<= 6"),
            Case("beyond its row", left, "bytes/source", state, target="<= 10"),
        ]

    def _bulk(self) -> list[Case]:
        group, sizes = "bulk results", self.sizes

        def plain(directory: Path) -> Measured:
            return synthetic.plain_parquet(directory, sizes.batches), {}

        def parts(sink: str) -> Callable[[Path], Measured]:
            def measure(directory: Path) -> Measured:
                ended = ours.submit(directory, self.cores, n=sizes.batches, form="batch", sink=sink)
                ours.collect(ended, "--layout", "parts", name="parts")
                synthetic.check_batches(directory / "parts", sizes.batches)
                return sizes.batches / ended.work_s, {"work_s": ended.work_s}

            return measure

        def text(sink: str, kb: int) -> Callable[[Path], Measured]:
            def measure(directory: Path) -> Measured:
                ended = ours.submit(
                    directory, self.cores, n=sizes.bulk, form="text", sink=sink, kb=kb
                )
                return sizes.bulk * kb / 1024 / ended.work_s, {"work_s": ended.work_s}

            return measure

        lines = [
            Case("pyarrow alone, one process", group, "batches/s", plain),
            Case("Parts('parquet')", group, "batches/s", parts("parquet"),
                 "pyarrow alone, one process", ">= 0.6"),
        ]  # fmt: skip
        for kb in (2, 20):
            lines += [
                Case(f"Rows, {kb} KB", group, "MB/s", text("rows", kb)),
                Case(f"Parts('jsonl'), {kb} KB", group, "MB/s", text("jsonl", kb),
                     f"Rows, {kb} KB", ">= 1.5"),
            ]  # fmt: skip
        return lines

    def _collect(self) -> list[Case]:
        group, n = "collecting", self.sizes.many

        def measure(directory: Path) -> Measured:
            ended = ours.submit(directory, self.cores, n=n)
            return n / ours.collect(ended), {}

        def copy(directory: Path) -> Measured:
            source, target = directory / "in.jsonl", directory / "out.jsonl"
            with source.open("w") as out:
                out.writelines(f'{{"i":{i},"y":{2 * (i + 1)}}}\n' for i in range(n))
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", synthetic.COPY, source, target], check=True)
            return n / (time.perf_counter() - start), {}

        return [
            Case("a copy line by line in Python", group, "rows/s", copy),
            Case("hpcresume collect", group, "rows/s", measure,
                 "a copy line by line in Python", ">= 0.6"),
        ]  # fmt: skip

    def _drain(self) -> list[Case]:
        """Return the lines about stopping with a million completed sources."""
        group = "from SIGTERM to the end of the task"

        def keeping_up(directory: Path) -> Measured:
            return watched.drain(directory, self.cores, published=True)

        def nothing(directory: Path) -> Measured:
            seconds, values = watched.drain(directory, self.cores, published=False)
            plain_s = watched.plain_copy_s(directory, values["rest"])
            return seconds - 2 * plain_s, {**values, "seconds": seconds, "plain_s": plain_s}

        return [
            Case("publisher keeping up", group, "s", keeping_up, target="<= 0.3"),
            Case("nothing published, less twice a plain write, sync and read", group, "s", nothing,
                 target="<= 0.3"),
        ]  # fmt: skip

    def _memory(self) -> list[Case]:
        """Return the lines about memory; the first of them runs, the others tell of it."""
        group, most = f"memory over {self.sizes.most:,} sources", self.sizes.most
        last: list[watched.Memory] = []

        def beyond(directory: Path) -> Measured:
            last[:] = [watched.memory(directory, self.cores, most)]
            points = [
                (round(done), held)
                for done, held in last[0].driver[:: max(1, len(last[0].driver) // 50)]
            ]
            return last[0].beyond_mb, {"after_start": last[0].after_start, "driver": points}

        def of_last(figure: Callable[[watched.Memory], float]) -> Callable[[Path], Measured]:
            def measure(_: Path) -> Measured:
                if not last:
                    raise RuntimeError("the driver was not measured")
                return figure(last[0]), {}

            return measure

        growth = of_last(lambda memory: memory.at(most) / memory.at(most / 2))
        supervisor = of_last(lambda memory: memory.supervisor / watched.MB)

        return [
            Case("driver, beyond its start", group, "MB", beyond, target="<= 100"),
            Case("driver, all to half of the sources", group, "of it", growth, target="<= 1.1"),
            Case("supervisor", group, "MB", supervisor, target="<= 60"),
        ]
