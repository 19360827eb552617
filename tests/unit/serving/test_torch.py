"""States of torch tensors; skipped where torch is not installed."""

from __future__ import annotations

import pytest

from hpcresume.serving import StateError, StateExporter, StatefulWorker
from hpcresume.serving.transport import get_transport
from tests.support.serving import pool_of, run

torch = pytest.importorskip("torch")


def test_tensors_arrive_as_they_were() -> None:
    """Type, shape and every bit, also of bfloat16, scalars, views and empty tensors."""
    transport = get_transport("torch")
    given = {
        "bf16": torch.randn(3, 4, dtype=torch.bfloat16),
        "f32": torch.randn(4, 6)[:, ::2],
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 7, dtype=torch.int64),
        "grad": torch.nn.Linear(2, 3).weight,
    }
    package = transport.pack(1, given, "s")
    parts = [
        part
        for number in range(len(package.chunks))
        for part in transport.unpack(package.manifest, number, transport.chunk(package, number))
    ]

    assert list(given) == [part.name for part in parts]
    for part, tensor in zip(parts, given.values(), strict=True):
        arrived = part.tensor()
        assert (tensor.dtype, tensor.shape) == (arrived.dtype, arrived.shape)
        assert torch.equal(tensor, arrived)
    with pytest.raises(StateError):
        transport.pack(1, {"a": object()}, "s")


def _on_a_pool(tmp_path, device: str) -> None:
    class Net(StatefulWorker):
        def __init__(self, faults):
            self.net = torch.nn.Linear(4, 2).to(device)

        def commit(self, version):
            self.net.load_state_dict({n: p.tensor() for n, p in self._staged.items()})

        def look(self):
            return self.net(torch.ones(4, device=device)).sum().item()

    class Trained(StateExporter):
        def export(self, version):
            net = torch.nn.Linear(4, 2).to(device)
            for parameter in net.parameters():
                torch.nn.init.constant_(parameter, version)
            return net.state_dict()

    async def case() -> None:
        async with pool_of(tmp_path, n=2, kind=Net, exporter=Trained, transport="torch") as case:
            assert (1, 10.0) == ((served := await case.pool.call("look")).version, served.value)
            await case.pool.update(2)
            assert (2, 20.0) == ((served := await case.pool.call("look")).version, served.value)

    run(case())


def test_a_pool_of_models(tmp_path) -> None:
    """Workers load a state_dict that the exporter hands over, and answer with it."""
    _on_a_pool(tmp_path, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_pool_of_models_on_a_gpu(tmp_path) -> None:
    """The same with tensors on a GPU, on both sides."""
    _on_a_pool(tmp_path, "cuda")
