"""Imports from a run's copy of the code, whose directory is listed once."""

from __future__ import annotations

import os
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
)
from types import ModuleType


class CopyFinder:
    """Finds modules in a directory that never changes.

    It stands first in ``sys.path``.  Python's own finder asks for its time of modification at
    each import of whatever module; on a shared file system, from each worker of each array
    task, these are thousands of calls for one ``import torch``.
    """

    def __init__(self, directory: str) -> None:
        self._names = {name.partition(".")[0] for name in os.listdir(directory)}
        self._finder = FileFinder(
            directory,
            (ExtensionFileLoader, EXTENSION_SUFFIXES),
            (SourceFileLoader, SOURCE_SUFFIXES),
        )

    def find_spec(self, name: str, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return where a module is, None where it is not here."""
        if name.rpartition(".")[2] not in self._names:
            return None
        return self._finder.find_spec(name, target)

    def invalidate_caches(self) -> None:
        """Do nothing: what is here does not change."""
