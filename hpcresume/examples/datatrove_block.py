"""A filter of datatrove, or any of its blocks that takes documents, as a stage.

Needs ``pip install datatrove regex``.  ``kernel_docs`` is an example::

    stages=[read, Block("prose", lambda: GopherQualityFilter()), ...]

The items are dicts with ``text``, ``id`` and perhaps ``metadata``, as datatrove writes them.  A
block that looks at several documents at once, such as a deduplication, is none for a stage:
it would see one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import hpcresume as hr


class Block(hr.Stage):
    """A block of datatrove: it is given one document, and what it yields goes on.

    Args:
        name: Of the stage.
        make: Returns the block; called once per worker.
    """

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self.name, self.make = name, make

    def setup(self, worker: hr.Worker) -> None:
        """Make the block, which may load a model."""
        del worker
        self.block = self.make()

    def process(self, document: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the documents that the block makes of one."""
        from datatrove.data import Document

        for found in self.block(iter([Document(**document)])):
            yield {"text": found.text, "id": found.id, "metadata": found.metadata}


def words_at_spaces() -> Any:
    """Return a ``language=`` for blocks that splits words at white space.

    That of datatrove's English needs spaCy.
    """
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):  # type: ignore[misc]
        word_tokenize = staticmethod(str.split)

        def sent_tokenize(self, text: str) -> list[str]:
            raise NotImplementedError("no sentences")

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            raise NotImplementedError("no sentences")

    return Words()
