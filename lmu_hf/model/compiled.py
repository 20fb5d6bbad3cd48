"""Whether the operators of :mod:`lmu_hf.native` are there, memory that they keep, and products, where BLAS is slower than theirs.

A checkpoint that carries this file along runs without them.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

# Largest order that the compiled loop of the memory takes, and up to which it beats products also where these fill the machine.
LARGEST_ORDER = 32
SMALL_ORDER = 8

# Numbers of a matrix up to which the compiled loop reads inputs and adds up gradients itself: beyond, BLAS does that faster.
MOST_NUMBERS = 1 << 18

# Columns of a panel, as in products.h.
PANEL = 16

# Bytes of a tensor from which on the C library asks the system for each, as in allocator.h.
_LARGE = 1 << 17

# Multiply-adds from which a product in matrices.h is worth its call, and rows, columns and terms of one that is no thinner.
_LARGE_PRODUCT = 1 << 19
_THIN = 8

_load: Callable[[], bool] | None = None


def offer(load: Callable[[], bool] | None) -> None:
    """Makes compiled operators known: ``load`` registers them on first use and tells whether they are there."""
    global _load
    _load = load


def available(like: Tensor) -> bool:
    """Whether compiled operators take tensors like this one: plain float32 or float64 ones on the CPU."""
    # Subclasses are tracers' stand-ins without memory behind them.
    plain = type(like) in (Tensor, torch.nn.Parameter) and like.device.type == "cpu"
    if not plain or like.dtype not in (torch.float32, torch.float64) or torch.compiler.is_compiling():
        return False
    return _load is not None and _load()


def with_rows(tensor: Tensor) -> Tensor:
    """The tensor with its last axis in one piece, as the compiled loops want sequences."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else contiguous(tensor)


def contiguous(tensor: Tensor) -> Tensor:
    """``tensor.contiguous()`` by :func:`empty`: gradients of sums come as one number for all."""
    return tensor if tensor.is_contiguous() else empty(tensor, *tensor.shape).copy_(tensor)


def empty(like: Tensor, *shape: int) -> Tensor:
    """``like.new_empty(*shape)``. Where that is large, its memory was another's before and will be the next one's: taken from the
    system each time, it would cost more than the loops that write it. :func:`native.release_memory` gives it back."""
    if math.prod(shape) * like.element_size() < _LARGE or not available(like):
        return like.new_empty(shape)
    return torch.ops.lmu_hf.empty(shape, like.dtype)


def zeros(like: Tensor, *shape: int) -> Tensor:
    """``like.new_zeros(*shape)`` by :func:`empty`."""
    return empty(like, *shape).zero_()


def panels(matrix: Tensor) -> Tensor:
    """A matrix (..., K, W) as the compiled loops want it: (..., P, K, 16), cut into panels of columns, filled up with zeros."""
    return torch.ops.lmu_hf.panels(matrix)


def gradient_of(weight: Tensor) -> Tensor:
    """Room for the gradient of a weight, not initialised.

    Contiguous, since cuBLAS refuses the strides of a view with one row. But on a CPU that of a matrix lies as the parameter does
    whose transpose it is: autograd hands such a gradient on as it is, and rearranges others, which takes as long as some steps.
    """
    if weight.device.type == "cpu" and weight.ndim == 2 and min(weight.shape) > 1 and weight.stride() == (1, len(weight)):
        return empty(weight, *reversed(weight.shape)).mT
    return empty(weight, *weight.shape)


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a (M, K) @ b (K, N), into ``out`` if it is given; of no derivative."""
    return add_matmul(empty(a, len(a), b.shape[1]) if out is None else out, a, b, beta=0)


def add_matmul(total: Tensor, a: Tensor, b: Tensor, *, beta: int = 1) -> Tensor:
    """total (M, N) = beta * total + a (M, K) @ b (K, N), in place, for a ``beta`` of 0 or 1; of no derivative."""
    if 1 not in total.stride() or not outdoes_blas(a, b):
        return total.addmm_(a, b, beta=beta)
    torch.ops.lmu_hf.add_product(total, a, b, beta == 1)
    return total


def outdoes_blas(a: Tensor, b: Tensor) -> bool:
    """Whether the product of two matrices is faster here than in BLAS."""
    rows, terms, columns = *a.shape, b.shape[1]
    if rows * terms * columns < _LARGE_PRODUCT or min(rows, terms, columns) < _THIN:
        return False
    return available(a) and _wide()


@cache
def _wide() -> bool:
    return torch.ops.lmu_hf.outdoes_blas()
