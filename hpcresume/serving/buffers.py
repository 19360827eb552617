"""Memory that travels between processes without being copied on the way in or out."""

from __future__ import annotations

import pickle
from typing import Any

import google_crc32c

_STEP_BYTES = 1 << 18


class Buffer:
    """Contiguous bytes; pickled out of band, so that Ray maps them instead of copying.

    Attributes:
        view: The bytes.
    """

    __slots__ = ("view",)

    def __init__(self, data: Any) -> None:
        view = memoryview(data)
        # A view with a zero in its shape cannot be cast.
        self.view = view.cast("B") if view.nbytes else memoryview(b"")

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return Buffer, (pickle.PickleBuffer(self.view) if protocol >= 5 else bytes(self.view),)


def checksum(view: memoryview) -> int:
    """Return the CRC32C of some bytes."""
    crc = 0
    # The checksum takes bytes only; pieces that fit the cache cost next to nothing to copy.
    for start in range(0, view.nbytes, _STEP_BYTES):
        crc = google_crc32c.extend(crc, bytes(view[start : start + _STEP_BYTES]))
    return crc
