"""A pipeline that serves from a pool whose update goes wrong as a test says."""

from __future__ import annotations

import json
from pathlib import Path

SERVE = '''
import os
import time

import hpcresume as hr
from hpcresume.serving import StateExporter, StatefulWorker


class Model(StatefulWorker):
    """Dies of the push of version 2, or cannot commit it; counts its answers in ``calls``."""

    def __init__(self, calls, dies):
        self.calls, self.dies = calls, dies

    def stage(self, version, parts):
        if version == 2 and self.dies:
            os._exit(9)
        super().stage(version, parts)

    def commit(self, version):
        if version == 2:
            raise OSError("half of it is swapped")
        super().commit(version)

    def process(self, i):
        fd = os.open(self.calls, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, b"%d\\\\n" % i)
        os.close(fd)
        time.sleep(0.02)
        return {"i": i, "made_by": bytes(self.state["name"]).decode()}


class Trainer(StateExporter):
    def newest_version(self):
        return 1

    def export(self, version):
        return {"name": b"version %d" % version}


class Serve(hr.ServingStage):
    """Asks for version 2 at one item, the first time or every time."""

    fatal, always, flag = 0, False, ""

    async def process(self, i):
        if i == self.fatal and (self.always or not os.path.exists(self.flag)):
            with open(self.flag, "a") as file:
                file.write("x")
            await self.refresh(2)
        return await self.serve(i)


def pipeline(n: int = 60, fatal: int = 30, always: bool = False, dies: bool = True,
             place: str = "."):
    stage = Serve(Model, 2, exporter=Trainer, worker_args=((f"{place}/calls", dies), {}),
                  max_concurrency=1)
    stage.fatal, stage.always, stage.flag = fatal, always, f"{place}/flag"
    return hr.Pipeline(name="serve", sources=hr.indexed(n), stages=[stage])
'''


PUSH = '''
import os
import time

import hpcresume as hr
from hpcresume.serving import StateExporter, StatefulWorker, UpdatePolicy


def note(path, what):
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, f"{what}\\n".encode())
    os.close(fd)


class Model(StatefulWorker):
    """Is paused for a push, and hangs in the first one of version 2, once in the run."""

    def __init__(self, place):
        self.place = place

    def release(self):
        pass

    def stage(self, version, parts):
        if version == 2:
            try:
                open(f"{self.place}/hangs", "x").close()
            except FileExistsError:
                pass
            else:
                while True:
                    time.sleep(0.05)
        super().stage(version, parts)

    def finalize(self, version):
        super().finalize(version)
        note(f"{self.place}/events", f"finalize-{version}")

    def restore(self):
        note(f"{self.place}/events", f"restore-{self.version}")

    def resume(self):
        note(f"{self.place}/events", f"resume-{self.version}")

    def process(self, i):
        note(f"{self.place}/calls", i)
        time.sleep(0.02)
        return {"i": i, "made_by": bytes(self.state["name"]).decode()}


class Trainer(StateExporter):
    """Has version 2 once 30 items were answered."""

    def __init__(self, place):
        self.place = place

    def newest_version(self):
        try:
            with open(f"{self.place}/calls") as file:
                return 1 + (len(file.readlines()) >= 30)
        except FileNotFoundError:
            return 1

    def export(self, version):
        return {"name": b"version %d" % version}

    def finalize(self, version):
        note(f"{self.place}/events", f"trainer-{version}")


def pipeline(place: str, n: int = 200):
    arguments = ((place,), {})
    stage = hr.ServingStage(Model, 2, exporter=Trainer, worker_args=arguments,
                            exporter_args=arguments, refresh_every_s=0.1,
                            policy=UpdatePolicy(cancel_s=3), name="serve")
    return hr.Pipeline(name="push", sources=hr.indexed(n), stages=[stage])
'''


def write_push(directory: Path) -> Path:
    """Write the pipeline whose push hangs and return its path."""
    path = directory / "push.py"
    path.write_text(PUSH)
    return path


def write_serve(directory: Path) -> Path:
    """Write the pipeline and return its path."""
    path = directory / "serve.py"
    path.write_text(SERVE.replace("\\\\n", "\\n"))
    return path


def serve_result(n: int = 60) -> bytes:
    """Return what collecting it over ``n`` sources gives, each answered by version 1."""
    rows = ({"i": i, "made_by": "version 1", "version": 1} for i in range(n))
    return b"".join(json.dumps(row, separators=(",", ":")).encode() + b"\n" for row in rows)
