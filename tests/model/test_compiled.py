"""Products of the compiled operators against those of PyTorch, whatever BLAS does here."""

import pytest
import torch

from lmu_hf.model import compiled
from lmu_hf.model.compiled import add_matmul, available, matmul

# Rows, terms, columns: single ones, primes, and around the tiles of matrices.h.
SHAPES = [(1, 1, 1), (7, 5, 3), (8, 8, 16), (13, 300, 17), (257, 31, 130), (100, 257, 129), (600, 3, 33), (3, 600, 255)]


@pytest.fixture(autouse=True)
def ours(monkeypatch):
    if not available(torch.zeros(1)):
        pytest.skip("no compiled loop here")
    monkeypatch.setattr(compiled, "_LARGE_PRODUCT", 0)
    monkeypatch.setattr(compiled, "_THIN", 0)
    monkeypatch.setattr(compiled, "_wide", lambda: True)


def strided(rows, columns, layout, dtype):
    if layout == "transposed":
        return torch.randn(columns, rows, dtype=dtype).mT
    if layout == "part":
        return torch.randn(rows + 2, columns + 3, dtype=dtype)[1:-1, 2:-1]
    if layout == "every_other":
        return torch.randn(rows, 2 * columns, dtype=dtype)[:, ::2]
    return torch.randn(rows, columns, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "part", "every_other"])
@pytest.mark.parametrize("total_layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch(shape, total_layout, layout, dtype):
    rows, terms, columns = shape
    a, b = strided(rows, terms, layout, dtype), strided(terms, columns, layout, dtype)
    around = strided(rows + 2, columns + 5, total_layout, dtype)
    before, total = around.clone(), around[1:-1, 2:-3]
    expected = a.double() @ b.double()
    # Sums round by their terms; those of the total, which may be larger, by its numbers too.
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype] * (a.double().abs() @ b.double().abs()).max()
    assert (matmul(a, b) - expected).abs().max() <= tolerance
    assert (add_matmul(total, a, b) - before[1:-1, 2:-3] - expected).abs().max() <= tolerance + 1e-6 * (
        dtype == torch.float32
    )
    total.fill_(torch.nan)
    assert (add_matmul(total, a, b, beta=0) - expected).abs().max() <= tolerance
    around[1:-1, 2:-3] = before[1:-1, 2:-3]
    assert torch.equal(around, before)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads(threads, set_threads):
    """Any number of them shares the work, and equal runs give equal bits."""
    a, b = torch.randn(301, 70), torch.randn(70, 300)
    set_threads(threads)
    result = matmul(a, b)
    assert torch.equal(matmul(a, b), result)
    # 70 terms of some units each, in float32.
    assert (result - a.double() @ b.double()).abs().max() < 1e-4


def test_refuses_what_does_not_fit():
    for a, b in (((3, 4), (5, 6)), ((2, 4), (4, 6))):
        with pytest.raises(RuntimeError, match="expected matrices that fit"):
            torch.ops.lmu_hf.add_product(torch.zeros(3, 6), torch.zeros(a), torch.zeros(b), True)


def test_nothing_to_add_up():
    total = torch.ones(3, 4)
    assert torch.equal(add_matmul(total, torch.zeros(3, 0), torch.zeros(0, 4)), torch.ones(3, 4))
    assert torch.equal(add_matmul(total, torch.zeros(3, 0), torch.zeros(0, 4), beta=0), torch.zeros(3, 4))
    assert matmul(torch.zeros(0, 3), torch.zeros(3, 4)).shape == (0, 4)


def test_what_is_not_finite_stays_in_its_place():
    a, b = torch.randn(40, 30), torch.randn(30, 50)
    a[3, 7] = torch.inf
    b[11, 20] = torch.nan
    result = matmul(a, b).isfinite()
    assert not result[3].any()
    assert not result[:, 20].any()
    result[3] = result[:, 20] = True
    assert result.all()
