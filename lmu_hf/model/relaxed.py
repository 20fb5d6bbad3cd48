"""Coupled LMUs by a relaxed convolution: neither the memory nor what advances it is ever computed.

Where the memory begins empty, the sums of a step, its u and its gates, take from the past

    sum_lag u[t - lag] G[lag],     G[lag] = A^(lag - 1) B K,     lag from 1 on

with K what reads the memory. That is a convolution, but of a signal that comes out of its own result: only what lies before a
step is known. Time is cut into blocks of C steps. Before block i, with 2^p the largest power of two in i, the last 2^p blocks
of u are transformed and contribute all that they ever will to the next 2^p blocks of sums. So any two blocks meet exactly once,
in time, and a sum costs log2(T)^2 operations in place of the N of a fold. Inside a block the u so far go through a short kernel,
as in :mod:`lookahead`. The adjoint goes the same way back, and its spectra make the gradient of G as well. (Fischer & Stockmeyer
1974; Hairer, Lubich & Schlichte 1985; van der Hoeven 2002.)

Compiled loops only: blocks are many, and short. Names: B batch, T time, C steps of a block, D memory dimensions, H hidden size, I
inputs; W = D + G is the width of a step's sums.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .compiled import MOST_NUMBERS, PANEL, add_matmul, available, empty, with_rows, zeros
from .folding import below
from .gates import Pointwise
from .memory import wants_gradient
from .ragged import Trajectory
from .scan import CompiledScan
from .scratch import add_step_gradient, arriving, before_each, first_derivative, gradients_of, of_steps, results_of
from .time_loop import State

# Numbers of the gradients of the sums of some rows that are kept for products: 128 MiB in float32.
_NUMBERS = 1 << 25


def relaxed_scan(
    cell: Pointwise,
    given: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel: Tensor,
    hidden_weight: Tensor,
    states: State,
    block: int,
    *,
    last: bool = True,
) -> tuple[Tensor, Trajectory]:
    """Runs the recurrence from an empty memory on. All tensors have one dtype, float32 or float64; there is no second derivative.

    Args:
        cell: what a step makes of its sums.
        given: inputs of all steps (B, T, I).
        weight: inputs -> their part of the sums (I, W).
        bias: (W,) or None.
        kernel: what the sums receive of u, by memory dimension and lag, from 1 on (D, T - 1, W).
        hidden_weight: h -> sums of the next step (H, W).
        states: hidden state tensors before the first step, (B, H) each.
        block: C, see :func:`convolution.block_size`.
        last: the states after the last step are wanted by themselves.

    Returns:
        u (B, T, D), and the hidden states.
    """
    assert available(given)
    inputs = (given, weight, bias, kernel, hidden_weight, *states)
    u, *results = _RelaxedScan.apply(_Settings(cell, block, last, wants_gradient(*inputs)), *inputs)
    return u, Trajectory.of(results, len(states) * last)


class _Settings(NamedTuple):
    """What is no tensor; see :func:`relaxed_scan`."""

    cell: Pointwise
    block: int
    last: bool
    backward: bool


class _RelaxedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: _Settings, *inputs: Any) -> tuple[Tensor, ...]:
        given, weight, bias, kernel, hidden_weight, *states = inputs
        u = empty(given, *given.shape[:2], len(kernel))
        kept = settings.cell.allocate(tuple(states), u.shape[1], backward=settings.backward)
        given = with_rows(given)
        loop, spectra = _prepare(settings, kernel, hidden_weight, u, tuple(states), kept)
        loop.relaxed_forward(given, weight, bias, u, spectra)
        ctx.save_for_backward(given, *inputs[1:], u, *kept)
        ctx.settings, ctx.states, ctx.device_type = settings, len(states), u.device.type
        ctx.set_materialize_grads(False)
        return u, *results_of(kept[: len(states)], last=settings.last)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_u: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given, weight, bias, kernel, hidden_weight, *rest = ctx.saved_tensors
        states, u, kept = tuple(rest[: ctx.states]), rest[ctx.states], tuple(rest[ctx.states + 1 :])
        wants_given, wants_weight, wants_bias, wants_kernel, wants_hidden, *_ = ctx.needs_input_grad[1:]
        loop, spectra = _prepare(ctx.settings, kernel, hidden_weight, u, states, kept)
        of_sequences, of_last = gradients_of(grads, states, last=ctx.settings.last)
        loop.start_backward(arriving(of_sequences, states, kept), of_last)
        to_u = zeros(u, *u.shape) if grad_u is None else grad_u.clone(memory_format=torch.contiguous_format)
        to_given = empty(given, *given.shape) if wants_given else None
        to_kernel = zeros(kernel, *kernel.shape) if wants_kernel else None
        # Of the u of the block so far, h, inputs and 1, one below the other.
        rows = [len(loop.step) - len(hidden_weight), len(hidden_weight), len(weight), int(bias is not None)]
        wanted = wants_weight or wants_bias or wants_kernel or wants_hidden
        shape = sum(rows), kernel.shape[2]
        ways = (given, weight, u, to_u, spectra, to_given)
        matrix: Tensor | None
        if wanted and math.prod(shape) > MOST_NUMBERS:
            # Each thread would have one of its own: it is made by products instead. Transposed, as large parameters come.
            matrix = empty(kernel, *reversed(shape)).mT
            for first, grad in _tiles(u, shape[1], loop.chunk):
                loop.relaxed_backward(*ways, None, to_kernel, first, grad)
                _add_gradients(matrix, grad, first, given, u, states[0], kept[0], loop.chunk)
        else:
            matrix = zeros(kernel, *shape) if wanted else None
            loop.relaxed_backward(*ways, matrix, to_kernel)
        short, to_hidden, to_weight, to_bias = [None] * 4 if matrix is None else matrix.split(rows)
        if to_kernel is not None and short is not None:
            lags = min(loop.chunk, u.shape[1]) - 1
            to_kernel[:, :lags] += short.unflatten(0, (-1, len(kernel))).flip(0)[:lags].transpose(0, 1)
        return (
            None,
            to_given,
            to_weight if wants_weight else None,
            to_bias[0] if wants_bias and to_bias is not None else None,
            to_kernel,
            to_hidden if wants_hidden else None,
            *loop.initial_gradients(),
        )


def _prepare(
    settings: _Settings, kernel: Tensor, hidden_weight: Tensor, u: Tensor, states: State, kept: State
) -> tuple[CompiledScan, list[Tensor]]:
    """The loop over blocks, and the spectra of the kernel for 1, 2, 4, .. of them."""
    cell, block, steps, kernel = settings.cell, settings.block, u.shape[1], kernel.contiguous()
    short = F.pad(kernel[:, : block - 1], (0, 0, 0, max(block - steps, 0)))
    step = below(short.flip(1).transpose(0, 1).flatten(0, 1), hidden_weight)
    lengths = [block << level for level in range((-(-steps // block) - 1).bit_length())]
    spectra = [torch.ops.lmu_hf.convolution_spectrum(kernel, 2 * length, 1) for length in lengths]
    return CompiledScan(cell, step, block, len(kernel), states, kept), spectra


def _tiles(u: Tensor, width: int, block: int) -> Iterator[tuple[int, Tensor]]:
    """Which rows go together, each time the first of them, with room for the gradients of their sums (rows, K * C, W), zero past
    the last step."""
    batch, steps = u.shape[:2]
    whole, stride = -(-steps // block) * block, -(-width // PANEL) * PANEL
    count = -(-batch * whole * stride // _NUMBERS)
    room = empty(u, -(-batch // count), whole, stride)
    room[:, steps:] = 0
    room[..., width:] = 0  # vectors reach there
    for first in range(0, batch, len(room)):
        yield first, room[: batch - first, :, :width]


def _add_gradients(
    matrix: Tensor, grad: Tensor, first_row: int, given: Tensor, u: Tensor, initial: Tensor, hidden: Tensor, block: int
) -> None:
    """Writes the gradient of [step, inputs, 1] -> sums that some rows make, or, where rows came before, adds it to theirs."""
    rows, length, beta = slice(first_row, first_row + len(grad)), grad.shape[1], int(first_row > 0)
    of_step = (block - 1) * u.shape[2] + hidden.shape[2]
    of_inputs, of_one = matrix[of_step:].tensor_split([given.shape[2]])
    flat, before = grad.flatten(0, 1), before_each(initial[rows], hidden[rows], 0, length)
    add_step_gradient(matrix[:of_step], flat, of_steps(u[rows], 0, length), before, block, beta)
    add_matmul(of_inputs, of_steps(given[rows], 0, length).flatten(0, 1).mT, flat, beta=beta)
    if len(of_one):
        total = flat.sum(0)
        of_one[0] = total + of_one[0] if beta else total
