"""Causal convolutions by transforms, compiled and by torch, against the sum over lags."""

import math

import pytest
import torch

from lmu_hf.model import convolution
from lmu_hf.model.convolution import causal_convolution, naive_causal_convolution, transform_size

# Rows are lanes of vectors on their way to spectra, columns behind these; neither 33 nor 40 are whole vectors of 16.
SIZES = [(1, 1, 1, 1), (2, 2, 1, 8), (3, 7, 2, 5), (4, 25, 1, 16), (17, 63, 3, 40), (33, 100, 1, 9), (5, 500, 1, 3)]


@pytest.fixture(params=["compiled", "torch"])
def transforms(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(convolution, "available", lambda like: False)
    elif not convolution.available(torch.zeros(1)):
        pytest.skip("no compiled operators")
    return request.param


def inputs(batch, steps, dims, width, dtype=torch.float64):
    made = torch.randn(batch, steps, dims, dtype=dtype), torch.randn(dims, steps, width, dtype=dtype)
    return tuple(tensor.requires_grad_() for tensor in made)


def everything(function, u, kernel, grad):
    output = function(u, kernel)
    return output, *torch.autograd.grad(output, (u, kernel), grad.to(output.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_naive(sizes, dtype, transforms):
    u, kernel = inputs(*sizes)
    grad = torch.randn(sizes[0], sizes[1], sizes[3], dtype=torch.float64)
    exact = everything(naive_causal_convolution, u, kernel, grad)
    rounded = (tensor.detach().to(dtype).requires_grad_() for tensor in (u, kernel))
    for ours, naive in zip(everything(causal_convolution, *rounded, grad), exact, strict=True):
        # Roundings add up like a random walk over log2(T) stages; the inputs themselves were rounded too.
        assert (ours - naive).norm() < 8 * torch.finfo(dtype).eps * naive.norm()


def test_second_derivative(transforms):
    torch.autograd.gradgradcheck(causal_convolution, inputs(3, 5, 2, 3))


def test_only_what_is_wanted(transforms):
    u, kernel = inputs(3, 9, 2, 5)
    grads = torch.autograd.grad(causal_convolution(u, kernel).sum(), (u, kernel))
    (of_u,) = torch.autograd.grad(causal_convolution(u, kernel.detach()).sum(), u)
    (of_kernel,) = torch.autograd.grad(causal_convolution(u.detach(), kernel).sum(), kernel)
    assert torch.equal(of_u, grads[0])
    assert torch.equal(of_kernel, grads[1])


def test_any_strides(transforms):
    u, kernel = torch.randn(2, 3, 9).mT, torch.randn(5, 9, 3).permute(2, 1, 0)
    grad = torch.randn(5, 9, 2).permute(2, 1, 0)
    strided = everything(causal_convolution, u.requires_grad_(), kernel.requires_grad_(), grad)
    plain = (tensor.detach().contiguous().requires_grad_() for tensor in (u, kernel))
    for one, other in zip(strided, everything(causal_convolution, *plain, grad.contiguous()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", [1e20, 1e-20, 0.0, 1e-40])
def test_rows_of_other_sizes(size, transforms):
    """Rows that are transformed together round as they do alone."""
    u, kernel = (tensor.detach() for tensor in inputs(4, 50, 1, 5, torch.float32))
    grad = torch.randn(4, 50, 5)
    u[1], u[2], grad[3] = u[1] * size, u[2] / max(size, 1e-15), grad[3] * min(size, 1e15)
    together = everything(causal_convolution, u.requires_grad_(), kernel.requires_grad_(), grad)
    for row in range(4):
        alone = u[row : row + 1].detach().requires_grad_()
        output, of_u, _ = everything(causal_convolution, alone, kernel, grad[row : row + 1])
        for ours, one in ((together[0][row], output[0]), (together[1][row], of_u[0])):
            # To rounding; 1e-40 itself has 17 binary digits left, and its size less of them.
            assert (ours - one).norm() <= (1e-3 if size == 1e-40 else 1e-6) * one.norm()


def test_columns_of_other_sizes(transforms):
    """So do columns: a gate of which little is asked learns from what there is."""
    u, kernel = (tensor.detach() for tensor in inputs(4, 50, 2, 5, torch.float32))
    sizes = torch.tensor([1.0, 1e-8, 1e8, 0.0, 1.0])
    grad = torch.randn(4, 50, 5) * sizes
    exact = everything(causal_convolution, u.double().requires_grad_(), kernel.double().requires_grad_(), grad)
    ours = everything(causal_convolution, u.requires_grad_(), kernel.requires_grad_(), grad)
    errors = (ours[2] - exact[2]).norm(dim=(0, 1)) <= 1e-6 * exact[2].norm(dim=(0, 1))
    assert errors.all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_row(bad, transforms):
    u, kernel = inputs(4, 20, 2, 5)
    grad = torch.randn(4, 20, 5, dtype=torch.float64)
    exact = everything(causal_convolution, u, kernel, grad)
    spoilt, spoilt_grad = u.detach().clone(), grad.clone()
    spoilt[1, 7, 0], spoilt_grad[2, 3, 1] = bad, bad
    output, of_u, _ = everything(causal_convolution, spoilt.requires_grad_(), kernel, spoilt_grad)
    *_, of_kernel = everything(causal_convolution, u, kernel, spoilt_grad)
    assert not output[1].isfinite().any()
    assert not of_u[2].isfinite().any()
    assert not of_kernel.isfinite().all()
    for ours, naive, row in ((output, exact[0], 1), (of_u, exact[1], 2)):
        others = [b for b in range(4) if b != row]
        assert (ours - naive)[others].abs().max() < 1e-12


def test_transform_sizes():
    assert [transform_size(least) for least in (1, 7, 11, 13, 49, 1567, 2047)] == [2, 8, 12, 16, 50, 1600, 2048]
