"""Where the shipped ``templates`` and ``site`` folders are: in the wheel, or in a checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from hpcresume.errors import InternalError

_PACKAGE = Path(__file__).resolve().parent.parent


def data_dir(name: Literal["templates", "site"], *, package: Path = _PACKAGE) -> Path:
    """Return a shipped folder of data.

    A wheel holds it below the package; an editable install and a checkout beside it.

    Raises:
        InternalError: The package was installed without its data.
    """
    candidates = (package / "_data" / name, package.parent / name)
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    looked_in = " and ".join(map(str, candidates))
    raise InternalError(
        f"the shipped folder {name!r} is missing: looked in {looked_in}. "
        "Without it no batch script can be written. Install hpcresume again"
    )
