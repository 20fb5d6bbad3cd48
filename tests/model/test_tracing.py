"""torch.compile and torch.export see through the layers, and leave nothing behind that is not real."""

import pytest
import torch

from lmu_hf.model import legendre
from lmu_hf.model.layer import LMU

CONFIGS = {
    "memory": {"return_sequences": True},
    "last": {"hidden_cell": "dense", "hidden_size": 4},
    "scales": {"theta": [20.0, 30.0], "hidden_cell": "readout", "return_sequences": True},
}


@pytest.fixture(autouse=True)
def _cold():
    """As in a fresh process: nothing is cached and nothing is compiled."""
    for cache in (legendre.delay_system, legendre.continuous_system, legendre._eigenvalues):
        cache.cache_clear()
    torch._dynamo.reset()


def build(name):
    return LMU(2, 2, 7, **{"theta": 20.0, **CONFIGS[name]})


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("strict", [False, True])
def test_export(name, strict):
    layer, x = build(name), torch.randn(3, 9, 2)
    exported = torch.export.export(layer, (x,), strict=strict).module()
    output = layer(x)
    assert type(output) is torch.Tensor
    assert torch.allclose(exported(x), output, rtol=0, atol=1e-6)
    assert type(build(name)(x)) is torch.Tensor


@pytest.mark.parametrize("name", CONFIGS)
def test_compile_fullgraph(name):
    layer, x = build(name), torch.randn(3, 9, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), layer(x), rtol=0, atol=1e-6)
    mask = torch.ones(3, 9)
    mask[0, 4:] = 0
    assert torch.allclose(compiled(x, mask=mask), layer(x, mask=mask), rtol=0, atol=1e-6)


def test_export_of_a_step():
    cell, x = build("memory").cell, torch.randn(3, 2)
    exported = torch.export.export(cell, (x,)).module()
    assert torch.allclose(exported(x)[0], cell(x)[0], rtol=0, atol=1e-6)
