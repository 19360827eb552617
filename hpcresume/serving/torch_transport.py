"""States of torch tensors, through Ray's object store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hpcresume.serving.state import Manifest, Package, Part, Values, pairs
from hpcresume.serving.transport import ObjectTransport


@dataclass(frozen=True, slots=True)
class TensorPart(Part):
    """A tensor of a state; ``dtype`` is torch's name of it, such as ``bfloat16``."""

    def tensor(self) -> torch.Tensor:
        """Return the tensor, in memory of its own on the CPU."""
        dtype = getattr(torch, self.dtype)
        if not self.data.nbytes:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(bytearray(self.data), dtype=dtype).reshape(self.shape)


@dataclass(frozen=True)
class TorchTransport(ObjectTransport):
    """For an exporter whose parts are tensors on any device: ``model.state_dict()``."""

    name: str = field(default="torch", init=False)

    def pack(self, version: int, parts: object, session: str) -> Package:
        """Copy what lies on a device to the CPU, and describe the tensors."""
        named = parts.items() if isinstance(parts, Mapping) else parts
        described = ((name, _values(value)) for name, value in pairs(named))
        # Explicit: a slotted generator has no super() of its own.
        return ObjectTransport.pack(self, version, described, session)

    def unpack(self, manifest: Manifest, number: int, chunk: Any) -> Iterator[TensorPart]:
        """Yield a chunk's tensors."""
        for part in ObjectTransport.unpack(self, manifest, number, chunk):
            yield TensorPart(part.name, part.dtype, part.shape, part.data)


def _values(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    flat = value.detach().to("cpu").contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return Values(data, str(value.dtype).removeprefix("torch."), tuple(value.shape))
