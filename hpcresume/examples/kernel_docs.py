"""Clean the kernel's documentation as one cleans a crawl, and find its near-duplicates.

Once Debian's ``linux-doc`` is installed (``apt-get install linux-doc``)::

    hpcresume submit hpcresume.examples.kernel_docs --array 8 --collect documents.jsonl

Each source is one file, decompressed and stripped of markup; a language filter and quality
filters drop what is no English prose, and what is left gets a MinHash signature.  At the end
``finish/duplicates.jsonl`` in the run directory groups the documents whose signatures agree
in a band.

Measured on 2 cores that were busy with other work (load 20 to 40): 15,134 files of linux-doc
6.1 in 522 s; 9,283 documents kept, 2 binary files quarantined, which is tolerated.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hpcresume as hr

DOCS = Path("/usr/share/doc/linux-doc-6.1")
_NO_TEXT = ["**/*.svg*", "**/*.png", "**/*.woff*", "**/*.ttf*", "**/*.js", "**/*.css", "**/*.dot*"]
_HIDDEN = re.compile(r"(?is)<(script|style|head|nav)\b.*?</\1>|<[^>]+>")
_STOP = frozenset(["the", "be", "to", "of", "and", "that", "have", "with", "is", "in", "for", "a"])
_BINS, _ROWS = 64, 4  # 16 bands of 4: documents alike in 60 % of their shingles mostly meet


@hr.stage
def read(path: Path, ctx: hr.Context) -> dict[str, Any]:
    """Return id and text of a file, without HTML's tags; UnicodeDecodeError for binary ones."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = data.decode("utf-8", "strict" if b"\0" in data else "replace")
    if ".html" in path.suffixes:
        text = html.unescape(_HIDDEN.sub(" ", text))
    return {"id": ctx.source_id, "text": text}


@hr.stage
def english(document: dict[str, Any]) -> dict[str, Any] | None:
    """Drop what has few of English's commonest words."""
    words = re.findall(r"[a-z]+", document["text"].lower())
    return document if sum(word in _STOP for word in words) >= 0.1 * len(words) > 0 else None


@hr.stage
def quality(document: dict[str, Any]) -> dict[str, Any] | None:
    """Drop very short and very long documents, lists, tables, and long or symbol-rich words."""
    words, lines = document["text"].split(), document["text"].splitlines()
    bullets = sum(line.lstrip().startswith(("-", "*", "+")) for line in lines)
    alphabetic = sum(any(c.isalpha() for c in word) for word in words)
    good = (
        50 <= len(words) <= 100_000
        and 3 <= sum(map(len, words)) / len(words) <= 10
        and alphabetic >= 0.7 * len(words)
        and bullets <= 0.5 * len(lines)
    )
    return document if good else None


@hr.stage
def signature(document: dict[str, Any]) -> dict[str, Any]:
    """Return the row: id, words, and the least hash of the 5-word shingles in each of 64 bins."""
    words = re.findall(r"\w+", document["text"].lower())
    bins = [2**32 - 1] * _BINS
    for shingle in {" ".join(words[n : n + 5]) for n in range(max(1, len(words) - 4))}:
        value = int.from_bytes(hashlib.blake2b(shingle.encode(), digest_size=8).digest(), "big")
        bins[value % _BINS] = min(bins[value % _BINS], value >> 32)
    return {"id": document["id"], "words": len(words), "signature": bins}


def duplicates(rows: Iterator[dict[str, Any]], out: Path) -> None:
    """Write the groups of documents that share a band of their signatures."""
    bands: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for row in rows:
        for at in range(0, _BINS, _ROWS):
            bands[at, *row["signature"][at : at + _ROWS]].append(row["id"])
    groups = sorted({tuple(ids) for ids in bands.values() if len(ids) > 1})
    lines = (json.dumps(group) + "\n" for group in groups)
    (out / "duplicates.jsonl").write_text("".join(lines))


def pipeline(root: Path = DOCS) -> hr.Pipeline:
    """Return the pipeline over the files under ``root``."""
    return hr.Pipeline(
        name="kernel_docs",
        sources=hr.files(root, exclude=_NO_TEXT),
        stages=[read, english, quality, signature],
        finish=duplicates,
        tolerate=0.01,
    )
