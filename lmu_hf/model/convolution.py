"""Causal convolutions by products of spectra: what a memory of high order is for all steps at once.

A memory that begins empty is u convolved with its impulse response, and so is whatever reads it through a matrix K:

    m[t] = sum_lag u[t - lag] H[lag]        m[t] K = sum_lag u[t - lag] (H[lag] K)

Transforms make of the sum over lags a product per frequency: log2(T) operations for each number in place of N or more (Chilkuri
& Eliasmith 2021, section 3.3). Signals are filled up with zeros, so that nothing comes round. Each number is rounded in
proportion to the largest of its row, also those before that; rows do not touch each other.

Axes: B batch, T time, D signals of a row, W columns of the kernel.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .compiled import available, with_rows, zeros


def causal_convolution(u: Tensor, kernel: Tensor) -> Tensor:
    """z[b, t, w] = sum over d and lag <= t of u[b, t - lag, d] kernel[d, lag, w]. Differentiable, twice too.

    Args:
        u: signals (B, T, D).
        kernel: the response to each (D, T, W).

    Returns:
        z (B, T, W).
    """
    return (_CompiledConvolution.apply if available(u) else spectral_convolution)(u, kernel)


def naive_causal_convolution(u: Tensor, kernel: Tensor) -> Tensor:
    """The definition, lag by lag. Same arguments and result as :func:`causal_convolution`."""
    steps = u.shape[1]
    return sum(torch.einsum("btd,dw->btw", F.pad(u, (0, 0, lag, 0))[:, :steps], kernel[:, lag]) for lag in range(steps))  # type: ignore[return-value]


def spectral_convolution(u: Tensor, kernel: Tensor) -> Tensor:
    """The same by torch's transforms, for devices and tracers that the compiled ones do not take."""
    steps = u.shape[1]
    size = transform_size(2 * steps - 1)
    # Along the last axis, where torch's transforms are fastest.
    signals, responses = torch.fft.rfft(u.mT, n=size), torch.fft.rfft(kernel.mT, n=size)
    # No product of matrices, which might be rounded to tf32.
    spectrum = sum(signals[:, d, None] * responses[d] for d in range(len(kernel)))
    return torch.fft.irfft(spectrum, n=size)[..., :steps].mT


def transform_size(least: int) -> int:
    """The smallest even size from ``least`` on whose transform is fast: without prime factors above 5."""
    size = least + least % 2
    while True:
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 2


# Half of the steps that meet by products in a relaxed convolution, at most.
_HALF_BLOCK = 16


def block_size(steps: int) -> int:
    """Steps of a block of a relaxed convolution, see :mod:`relaxed`, of so many steps in all: up to 32.

    A power of two of blocks is to be little more than all steps, and as many points have to transform well.
    """
    blocks = 1
    while steps > 2 * blocks * _HALF_BLOCK:
        blocks *= 2
    return transform_size(2 * -(-steps // blocks)) // 2


class _CompiledConvolution(torch.autograd.Function):
    """:func:`causal_convolution` on the CPU. Keeps its inputs only: spectra are many times as large, and quickly made anew."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(u, kernel)
        out = zeros(u, *u.shape[:2], kernel.shape[2])
        convolve(kernel)(u, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, wanted = ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled():
            # Somebody wants a second derivative, which the plain operations have.
            needed = [tensor for tensor, asked in zip(inputs, wanted, strict=True) if asked]
            found = iter(torch.autograd.grad(spectral_convolution(*inputs), needed, grad, create_graph=True))
            return tuple(next(found) if asked else None for asked in wanted)
        u, kernel = inputs
        grads = tuple(zeros(tensor, *tensor.shape) if asked else None for tensor, asked in zip(inputs, wanted, strict=True))
        convolve_back(kernel)(u, grad, *grads)
        return grads


def convolve(kernel: Tensor) -> Callable[[Tensor, Tensor], None]:
    """A function that adds to a tensor (B, T, W), its second argument, the convolution of its first, u (B, T, D), with the kernel
    (D, T, W). No gradients."""
    if not available(kernel):

        def by_torch(u: Tensor, out: Tensor) -> None:
            out += spectral_convolution(u, kernel)

        return by_torch
    spectrum = _spectrum(kernel)

    def compiled(u: Tensor, out: Tensor) -> None:
        torch.ops.lmu_hf.convolution_forward(with_rows(u), spectrum, out)

    return compiled


def convolve_back(kernel: Tensor) -> Callable[[Tensor, Tensor, Tensor | None, Tensor | None], None]:
    """The adjoint of :func:`convolve`: a function of u (B, T, D) and the gradient of its convolution (B, T, W) that adds the
    gradient of u to its third argument and that of the kernel to its fourth, where these are not None."""
    spectrum = _spectrum(kernel) if available(kernel) else None

    def back(u: Tensor, grad: Tensor, to_u: Tensor | None, to_kernel: Tensor | None) -> None:
        if spectrum is not None:
            torch.ops.lmu_hf.convolution_backward(with_rows(u), spectrum, with_rows(grad), to_u, to_kernel)
            return
        with torch.enable_grad():
            given = (u.detach().requires_grad_(), kernel.detach().requires_grad_())
            of_u, of_kernel = torch.autograd.grad(spectral_convolution(*given), given, grad)
        if to_u is not None:
            to_u += of_u
        if to_kernel is not None:
            to_kernel += of_kernel

    return back


def _spectrum(kernel: Tensor) -> Tensor:
    kernel = with_rows(kernel)
    return torch.ops.lmu_hf.convolution_spectrum(kernel, transform_size(2 * kernel.shape[1] - 1), 0)
