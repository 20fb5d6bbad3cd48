"""Coupled LMUs by a relaxed convolution: neither the memory nor what advances it is ever computed.

Where the memory begins empty, the sums of a step, its u and its gates, take from the past

    sum_lag u[t - lag] G[lag],     G[lag] = A^(lag - 1) B K

with K what reads the memory, lag from 1 on. That is a convolution, but one whose signal comes out of its own result: only what
lies before a step is known. Time is cut into blocks of C steps. After block i, with 2^p the largest power of two in i, the last
2^p blocks of u are transformed and contribute all that they ever will to the next 2^p blocks of sums. So each pair of steps
meets exactly once, in time, and a step costs log2(T)^2 operations per sum in place of the N of a fold. Inside a block the u so far
go through a short kernel, as in :mod:`lookahead`. The adjoint goes the same way back; its spectra are those of the gradient of G
as well. (Fischer & Stockmeyer 1974; Hairer, Lubich & Schlichte 1985; van der Hoeven 2002.)

Compiled loops only: the blocks are many, and short. Names: B batch, T time, C steps of a block, D memory dimensions, H hidden size,
I inputs; W = D + G is the width of a step's sums.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .compiled import add_matmul, available, matmul
from .convolution import transform_size
from .convolved import row_tiles
from .gates import Pointwise
from .scan import CompiledScan
from .scratch import arriving, before_each, first_derivative, known_sums
from .time_loop import Encoding, State

# Steps of a block: up to twice as many.
_LEAST = 12


def block_steps(steps: int) -> int:
    """Steps of a block C for so many steps: a size that transforms well, and of which T is little less than a power of two."""
    power = 1
    while -(-steps // (2 * power)) > _LEAST:
        power *= 2
    return transform_size(2 * -(-steps // power)) // 2


class RelaxedOperators(NamedTuple):
    """What a relaxed convolution takes of the weights.

    Attributes:
        kernel: u -> the sums of the steps after it, by lag from 1 on (D, T - 1, W).
        hidden: h -> sums of the next step (H, W).
        encoder: h -> u, direct: u -> gates of its own step, mask: of h; as in :class:`ChunkOperators`.
    """

    kernel: Tensor
    hidden: Tensor
    encoder: Tensor | None = None
    direct: Tensor | None = None
    mask: Tensor | None = None


def relaxed_scan(
    cell: Pointwise,
    given: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    operators: RelaxedOperators,
    states: State,
    *,
    activation: str = "linear",
) -> tuple[Tensor, State]:
    """Runs the recurrence from an empty memory on. All tensors have one dtype, float32 or float64; there is no second derivative.

    Args:
        cell: what a step makes of its sums.
        given: inputs of all steps (B, T, I).
        weight: inputs -> their part of the sums (I, W).
        bias: (W,) or None.
        operators: what u and h contribute to them.
        states: hidden state tensors before the first step, (B, H) each.
        activation: of u, with ``operators.encoder``; a key of ``GATES``.

    Returns:
        u (B, T, D), and each state tensor after every step (B, T, H).
    """
    assert available(given)
    u, *sequences = _RelaxedScan.apply(_Settings(cell, activation), given, weight, bias, *operators, *states)
    return u, tuple(sequences)


class _Settings(NamedTuple):
    """What is no tensor; see :func:`relaxed_scan`."""

    cell: Pointwise
    activation: str


_NAMES = ("given", "weight", "bias", *RelaxedOperators._fields)


class _RelaxedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: _Settings, *inputs: Any) -> tuple[Tensor, ...]:
        given, weight, bias, *rest = inputs
        operators, states = RelaxedOperators(*rest[: len(_NAMES) - 3]), tuple(rest[len(_NAMES) - 3 :])
        batch, steps, _ = given.shape
        dims, _, width = operators.kernel.shape
        u, kept = given.new_empty(batch, steps, dims), settings.cell.allocate(states, steps)
        run = _Run(settings, operators, steps, u, states, kept)
        sums: Any = None
        for rows in row_tiles(given, width):
            sums = given.new_empty(rows.stop - rows.start, steps, width) if sums is None else sums[: rows.stop - rows.start]
            known_sums(given[rows], weight, bias, sums)
            run.loop(rows).relaxed_forward(sums, u[rows], run.spectra)
        ctx.save_for_backward(*inputs, u, *kept)
        ctx.settings, ctx.inputs, ctx.states, ctx.device_type = settings, len(inputs), len(states), u.device.type
        ctx.set_materialize_grads(False)
        return u, *kept[: len(states)]

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_u: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, (u, *kept) = ctx.saved_tensors[: ctx.inputs], ctx.saved_tensors[ctx.inputs :]
        saved = dict(zip(_NAMES, tensors, strict=False))
        states = tuple(tensors[len(_NAMES) :])
        operators = RelaxedOperators(*(saved[name] for name in RelaxedOperators._fields))
        (batch, steps, dims), width = u.shape, operators.kernel.shape[2]
        # All but that of the inputs are added to.
        made = {
            name: torch.zeros_like(tensor, memory_format=torch.contiguous_format)
            for (name, tensor), wanted in zip(saved.items(), ctx.needs_input_grad[1:], strict=False)
            if wanted
        }
        inputs = torch.zeros_like(u) if grad_u is None else grad_u.clone(memory_format=torch.contiguous_format)
        run = _Run(ctx.settings, operators, steps, u, states, tuple(kept))
        of_states: list[State] = []
        sums: Any = None
        for rows in row_tiles(u, width):
            sums = u.new_empty(rows.stop - rows.start, steps, width) if sums is None else sums[: rows.stop - rows.start]
            loop = run.loop(rows)
            of_rows = tuple(None if grad is None else grad[rows] for grad in grads)
            loop.start_backward(arriving(of_rows, tuple(tensor[rows] for tensor in kept)))
            loop.relaxed_backward(u[rows], inputs[rows], sums, run.spectra, made.get("kernel"))
            of_states.append(loop.initial_gradients())
            flat = sums.view(-1, width)
            if "given" in made:
                matmul(flat, saved["weight"].mT, made["given"][rows].view(len(flat), -1))
            if "weight" in made:
                add_matmul(made["weight"], saved["given"][rows].reshape(len(flat), -1).mT, flat)
            if "bias" in made:
                made["bias"] += flat.sum(0)
            if "kernel" in made:
                _add_short_lags(made["kernel"], u[rows], flat, run.block)
            if "encoder" in made:
                before = before_each(states[0][rows], kept[0][rows], 0, steps)
                seen = before if operators.mask is None else before * operators.mask[rows, None]
                add_matmul(made["encoder"], seen.flatten(0, 1).mT, flat[:, :dims])
            if "direct" in made:
                add_matmul(made["direct"], u[rows].reshape(len(flat), -1).mT, flat[:, dims:])
            if "hidden" in made:
                # Against the h before each step. All rows in one product: only their first steps do not follow in it.
                add_matmul(made["hidden"], states[0][rows].mT, sums[:, 0])
                sums[:, 0] = 0
                add_matmul(made["hidden"], kept[0][rows].view(len(flat), -1)[:-1].mT, flat[1:])
        of_initial = (torch.cat(parts) for parts in zip(*of_states, strict=True))
        return None, *(made.get(name) for name in _NAMES), *of_initial


class _Run:
    """What the rows of a run have in common, forwards or backwards."""

    def __init__(
        self, settings: _Settings, operators: RelaxedOperators, steps: int, u: Tensor, states: State, kept: State
    ):
        self.settings, self.operators, self.u, self.states, self.kept = settings, operators, u, states, kept
        self.block = block_steps(steps)
        kernel = operators.kernel.contiguous()
        short = kernel[:, : self.block - 1].flip(1)
        if short.shape[1] < self.block - 1:
            short = F.pad(short, (0, 0, self.block - 1 - short.shape[1], 0))
        self.step = torch.cat([short.transpose(0, 1).flatten(0, 1), operators.hidden])
        self.spectra = []
        length = self.block
        while length < steps:
            self.spectra.append(torch.ops.lmu_hf.convolution_spectrum(kernel, 2 * length, 1))
            length *= 2

    def loop(self, rows: slice) -> CompiledScan:
        operators, encoding = self.operators, None
        if operators.encoder is not None and operators.direct is not None:
            mask = None if operators.mask is None else operators.mask[rows]
            encoding = Encoding(operators.encoder, operators.direct, mask, self.settings.activation, self.u[rows])
        own = tuple(state[rows] for state in self.states), tuple(tensor[rows] for tensor in self.kept)
        return CompiledScan(self.settings.cell, self.step, self.block, self.u.shape[2], *own, encoding=encoding)


def _add_short_lags(total: Tensor, u: Tensor, grad: Tensor, block: int) -> None:
    """Adds to the gradient of the kernel (D, T - 1, W) what comes about inside of blocks: of u (B, T, D), and grad (B * T, W)."""
    batch, steps, dims = u.shape
    lags = min(block, steps) - 1
    if not lags:
        return
    by_block = F.pad(F.pad(u, (0, 0, 0, -steps % block)).unflatten(1, (-1, block)), (0, 0, block - 1, 0))
    # The u of each step's last lags, newest first, none before its block: (B, K, C, D, C - 1).
    windows = by_block.unfold(2, block - 1, 1)[:, :, :block].flip(-1)
    before = windows.flatten(1, 2)[:, :steps, :, :lags].reshape(batch * steps, -1)
    total[:, :lags] += matmul(before.mT, grad).view(dims, lags, -1)
