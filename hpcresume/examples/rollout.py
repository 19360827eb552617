"""Rollouts of a policy that is trained meanwhile: `hpcresume submit hpcresume.examples.rollout`.

A toy policy with numpy, a matrix of scores, plays episodes on a pool of workers.  A trainer
makes a better one every few seconds; the pool takes it over between two episodes.  Every row
names the one version that played it.  With ``-P chaos_s=3`` workers and trainer are killed
with SIGKILL every few seconds, at random, and the run ends complete all the same.

The trainer keeps its versions in ``directory``, so another one goes on where it was killed.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import hpcresume as hr
from hpcresume.serving import StateExporter, StatefulWorker, UpdatePolicy

STATES, ACTIONS, STEPS = 16, 4, 50


def best_action(state: int) -> int:
    """Return the action that is rewarded in a state; what there is to learn."""
    return state * 7 % ACTIONS


class Policy(StatefulWorker):
    """Plays episodes with the scores that it serves.

    Args:
        chaos_s: Kill this process about so often; 0: never.
    """

    def __init__(self, chaos_s: float = 0) -> None:
        self._episodes = 0
        _live_dangerously(chaos_s)

    def rollout(self, episode: int) -> dict[str, Any]:
        """Play one episode and return what came of it."""
        import numpy as np

        scores = self.state["scores"].array()
        rng = np.random.default_rng(episode)
        state, reward = 0, 0
        for _ in range(STEPS):
            chances = np.exp(scores[state] - scores[state].max())
            action = int(rng.choice(ACTIONS, p=chances / chances.sum()))
            reward += action == best_action(state)
            state = int(rng.integers(STATES))
        self._episodes += 1
        return {
            "episode": episode,
            "reward": reward / STEPS,
            "worker": os.getpid(),
            "turn": self._episodes,
        }


class Trainer(StateExporter):
    """Makes a better policy every few seconds, and keeps them as files.

    Args:
        directory: Where.
        every_s: How often.
        chaos_s: Kill this process about so often; 0: never.
    """

    def __init__(self, directory: str, every_s: float, chaos_s: float = 0) -> None:
        self._directory, self._every_s = Path(directory), every_s
        self._directory.mkdir(parents=True, exist_ok=True)
        if self.newest_version() == 0:
            self._train(1)
        threading.Thread(target=self._go_on, daemon=True).start()
        _live_dangerously(chaos_s)

    def newest_version(self) -> int:
        """Return the number of the newest file."""
        return max((int(path.stem) for path in self._directory.glob("*.npy")), default=0)

    def export(self, version: int) -> dict[str, Any]:
        """Return a version's scores."""
        import numpy as np

        return {"scores": np.load(self._path(version))}

    def _path(self, version: int) -> Path:
        return self._directory / f"{version:06d}.npy"

    def _go_on(self) -> None:
        pause = threading.Event()
        while not pause.wait(self._every_s):
            self._train(self.newest_version() + 1)

    def _train(self, version: int) -> None:
        import numpy as np

        scores = np.zeros((STATES, ACTIONS))
        if version > 1:
            scores = np.load(self._path(version - 1))
        for state in range(STATES):
            scores[state, best_action(state)] += 0.5
        temporary = self._directory / f"new-{os.getpid()}"
        with temporary.open("wb") as file:
            np.save(file, scores)
        temporary.replace(self._path(version))


def _live_dangerously(chaos_s: float) -> None:
    if chaos_s:
        wait_s = chaos_s + random.expovariate(1 / chaos_s)  # not for secrets
        timer = threading.Timer(wait_s, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()


def pipeline(
    episodes: int = 2000,
    workers: int = 2,
    every_s: float = 2.0,
    chaos_s: float = 0.0,
    directory: str = "rollout-policies",
) -> hr.Pipeline:
    """Return the pipeline: one source per episode."""
    return hr.Pipeline(
        name="rollout",
        sources=hr.indexed(episodes),
        stages=[
            hr.ServingStage(
                Policy,
                workers,
                method="rollout",
                exporter=Trainer,
                refresh_every_s=every_s,
                policy=UpdatePolicy(replacements=100 if chaos_s else 3),
                worker_args=((chaos_s,), {}),
                exporter_args=((os.path.abspath(directory), every_s, chaos_s), {}),
                name="rollout",
            )
        ],
    )
