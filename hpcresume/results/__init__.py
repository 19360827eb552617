"""The rows of a run.  Called, this package is the public ``hr.results``.

The package and the public function have one name: whichever an import leaves under it works.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, run: str | os.PathLike[str]) -> Any:
        from hpcresume.results.sources import results

        return results(run)


sys.modules[__name__].__class__ = _Callable
