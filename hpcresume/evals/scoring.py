"""The second pass: scorers over the stored rows, resumable by itself."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from hpcresume.evals.copies import located
from hpcresume.evals.layout import SCORING
from hpcresume.evals.rows import OK
from hpcresume.evals.settings import EvalSettings
from hpcresume.evals.table import read_table
from hpcresume.output.run import Run
from hpcresume.pipeline.payload import decode_payload
from hpcresume.pipeline.sources import Source, SourceList
from hpcresume.pipeline.target import parse_target
from hpcresume.run.directory import RunDir
from hpcresume.run.manifest import Manifest


@dataclass(frozen=True)
class ScoringSources(SourceList):
    """The good rows of an evaluation; a row that changes is another source.

    Attributes:
        settings: Those of the evaluation.
        run: Its run directory.
    """

    settings: EvalSettings
    run: Path

    def __iter__(self) -> Iterator[Source]:
        run = RunDir.open(str(self.run))
        manifest = Manifest.open(run)
        with read_table(run, self.settings) as table:
            for base, slot in table.slots.items():
                if slot.status != OK:
                    continue
                row = orjson.loads(table.row(slot))
                payload = {
                    "base": base,
                    "item": decode_payload(manifest.entry(slot.source).payload),
                    **{key: row[key] for key in ("output", "steps", "usage")},
                }
                yield Source(f"{base}@{slot.digest.hex()}", payload)

    def describe(self) -> dict[str, Any]:
        """Return the kind; the rows themselves are compared one by one."""
        return {"kind": "eval-rows"}


def scoring_directory(run: RunDir, settings: EvalSettings) -> Path:
    """Return the run directory of a scoring: one for these scorers as their files are."""
    digest = hashlib.blake2b(digest_size=6)
    copies = located(settings, Path(run.path)).scorers
    for target, copy in zip(settings.scorers, copies, strict=True):
        code = parse_target(copy, Path(settings.cwd)).path.read_bytes()
        digest.update(os.fsencode(target) + b"\0" + code)
    return Path(run.join(SCORING, digest.hexdigest()))


def read_scores(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a scoring by the item's base id."""
    return {
        found["source"].partition("@")[0]: found["row"]
        for found in Run(directory).rows(with_source=True)
    }
