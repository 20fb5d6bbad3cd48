"""The memory folded into the weights that read it, so that no step needs the memory itself.

What reads the memory, a hidden cell's gates or the feedback into u, does so through one matrix K. In a chunk of C steps that
starts at m0 and is driven by u[0..C-1],

    m[j] K = m0 A^(j+1) K + sum_{i<=j} u[i] H[j-i] K,     H[lag] = A^lag B

so with A^i K and H[lag] K computed once, all that is needed of the memory is its value at the start of each chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .legendre import DelaySystem
from .memory import linear_memory
from .precision import exact_matmul

if TYPE_CHECKING:
    from .lmu_cell import LMUCell


class ChunkOperators(NamedTuple):
    """The constant matrices of a chunk.

    Attributes:
        step: [u of the chunk so far, h] -> sums, ((C - 1) * D + H, W), or (H, W) where u is known in advance.
        power: A^C (S, N, N).
        response: A^(C-1-i) B (S, C, N).
        fold: the memory at the start of a chunk -> its part of the chunk's sums (D * N, C * W).
        from_u: the u of a chunk -> their part (C * D, C * W), beside ``fold`` where u is known in advance.
        states: :meth:`DelaySystem.chunk_operator`, [memory at the start, u] -> memory after each step (S, N + C, C * N); with
            ``read`` in place of ``fold`` and ``from_u``.
        read: memory after a step -> its part of the sums of the step (D * N, W).
        encoder: h -> u (H, D), where u is no linear function of h, or not the same one in each row. ``step`` then has zeros in
            its place, and neither it nor ``fold`` knows what the u of a step contributes to its own gates, which is ``direct``.
        direct: u -> the gates of its own step (D, G), beside ``encoder``.
        mask: what multiplies h on its way to u (B, H), beside ``encoder`` or None; has no gradient.
    """

    step: Tensor
    power: Tensor | None = None
    response: Tensor | None = None
    fold: Tensor | None = None
    from_u: Tensor | None = None
    states: Tensor | None = None
    read: Tensor | None = None
    encoder: Tensor | None = None
    direct: Tensor | None = None
    mask: Tensor | None = None

    @property
    def chunk(self) -> int:
        """Steps per chunk C."""
        assert self.response is not None
        return self.response.shape[1]

    @property
    def advance(self) -> tuple[Tensor, Tensor]:
        """``power`` and ``response``, of operators that have them: what advances the memory by a chunk."""
        assert self.power is not None
        assert self.response is not None
        return self.power, self.response


def applied_powers(weight: Tensor, system: DelaySystem, memory_d: int, count: int) -> Tensor:
    """(A^T)^i K for i = 0 .. count, (count + 1, D, N, W), for a weight K (D * N, W). Differentiable in K and theta."""
    by_dimension = weight.view(memory_d, system.order, -1)
    # (S, N, i, D / S, W): the dimensions that share a system are columns of one product.
    applied = by_dimension.transpose(0, 1)[None, :, None] if system.scales == 1 else by_dimension[:, :, None, None]
    while applied.shape[2] <= count:
        # Doubling: as many products as count has binary digits.
        held = applied.shape[2]
        more = applied[:, :, : count + 1 - held]
        power = system.power(held, weight.dtype, weight.device).mT
        applied = torch.cat([applied, exact_matmul(power, more.flatten(2)).unflatten(2, more.shape[2:])], dim=2)
    return applied[0].permute(1, 2, 0, 3) if system.scales == 1 else applied[:, :, :, 0].permute(2, 0, 1, 3)


def short_kernel(powers: Tensor, system: DelaySystem) -> Tensor:
    """B^T (A^T)^i K, what an input i steps back contributes: (count + 1, D, W)."""
    _, Bd = system.matrices(powers.dtype, powers.device)
    rows = powers.permute(1, 0, 3, 2).flatten(1, 2)  # (D, i * W, N)
    kernel = exact_matmul(rows, Bd.expand(len(rows), -1)[..., None])
    return kernel.view(len(rows), len(powers), -1).transpose(0, 1)


def feedback_operators(
    cell: LMUCell, input_weight: Tensor, hidden_weight: Tensor | None, system: DelaySystem, chunk: int, *, u_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The matrices of a chunk whose u depends on the state, differentiable in the weights. W = D + G.

    Args:
        cell: the cell.
        input_weight: K, [m, x] -> gates, (D * N or more, G).
        hidden_weight: h -> gates (H, G), or None.
        system: the delay system.
        chunk: steps per chunk C.
        u_first: the u of a step has to be known before its gates.

    Returns:
        fold (D * N, C * W): the memory at the start of the chunk -> its part of the chunk's u and gates; step
        ((C - 1) * D + H, W): [u of the chunk so far, h] -> its part of the next u and gates; direct (D, G): u -> the gates of
        its own step; and encoder (H, D): h -> u. The last two are already contained in the others, unless ``u_first``.
    """
    dims, order = cell.memory_d, cell.order
    memory_weight = input_weight[: dims * order]
    recurrent = memory_weight.new_zeros(dims * order, dims)
    if cell.recurrent_kernel is not None:
        recurrent = cell.recurrent_kernel.to(memory_weight.dtype)
    powers = applied_powers(torch.cat([recurrent, memory_weight], dim=1), system, dims, chunk)
    short = short_kernel(powers, system)
    direct = short[0, :, dims:]

    # u sees the memory before the step, the gates the one after it, to which the u of the step has contributed.
    to_u, to_gates = powers[:chunk, ..., :dims], powers[1:, ..., dims:]
    kernel_u, kernel_gates = short[: chunk - 1, :, :dims], short[1:chunk, :, dims:]
    # Of h; without hidden_to_memory there are no such rows, and no h.
    encoder = encoder_matrix(cell, memory_weight)[cell.input_size :]
    hidden_to_u, hidden_to_gates = encoder, hidden_weight
    if u_first:
        hidden_to_u = torch.zeros_like(encoder)
    else:
        to_gates, kernel_gates = to_gates + to_u @ direct, kernel_gates + kernel_u @ direct
        through_u = encoder @ direct
        hidden_to_gates = through_u if hidden_weight is None else hidden_weight + through_u
    if hidden_to_gates is None:
        hidden_to_gates = direct.new_zeros(len(encoder), direct.shape[1])
    fold = torch.cat([to_u, to_gates], dim=-1).permute(1, 2, 0, 3).contiguous().view(dims * order, -1)
    kernel = torch.cat([kernel_u, kernel_gates], dim=-1).flip(0).flatten(0, 1)
    return fold, torch.cat([kernel, torch.cat([hidden_to_u, hidden_to_gates], dim=1)]), direct, encoder


def encoder_matrix(cell: LMUCell, like: Tensor) -> Tensor:
    """The kernel, [x, h] -> u, in the dtype of ``like``; without one, what enters is u itself."""
    if cell.kernel is None:
        return torch.eye(cell.encoder_size, dtype=like.dtype, device=like.device)
    return cell.kernel.to(like.dtype)


def input_matrices(cell: LMUCell, input_weight: Tensor, encoder: Tensor, *, apart: bool) -> tuple[Tensor, Tensor]:
    """What comes in -> u, and -> the gates other than through u: (R, D) and (R, G).

    Args:
        cell: the cell.
        input_weight: [m, x] -> gates (D * N + I, G), or without the rows of x.
        encoder: the first rows that come in -> u.
        apart: x itself comes in behind them, where it goes to the gates, because they are something else. Otherwise they are x.
    """
    of_input = input_weight[cell.memory_d * cell.order :]
    if not len(of_input):
        return encoder, input_weight.new_zeros(len(encoder), input_weight.shape[1])
    if not apart:
        return encoder, of_input
    return F.pad(encoder, (0, 0, 0, len(of_input))), F.pad(of_input, (0, 0, len(encoder), 0))


def input_operators(memory_weight: Tensor, system: DelaySystem, memory_d: int, chunk: int) -> tuple[Tensor, Tensor]:
    """The matrices of a chunk whose u is known in advance, for K = ``memory_weight`` (D * N, G).

    Returns:
        fold (D * N, C * G): the memory at the start of the chunk -> its part of the chunk's gates; from_u (C * D, C * G): the u
        of the chunk -> theirs.
    """
    powers = applied_powers(memory_weight, system, memory_d, chunk)
    kernel = short_kernel(powers[:chunk], system)
    lag = torch.arange(chunk, device=kernel.device)[None, :] - torch.arange(chunk, device=kernel.device)[:, None]
    # (C, D, C, G): input i of the chunk -> step j, zero for j < i.
    toeplitz = (kernel[lag.clamp(min=0)] * (lag >= 0)[..., None, None]).transpose(1, 2)
    return powers[1:].permute(1, 2, 0, 3).flatten(0, 1).flatten(1), toeplitz.flatten(0, 1).flatten(1)


def final_memory(u: Tensor, starts: Tensor, system: DelaySystem, steps: int, lengths: Tensor | None) -> Tensor:
    """The memory after each row's last valid step, from the start of the chunk that it lies in.

    Args:
        u: memory input (B, K * C, D).
        starts: memory at the start of each chunk (B, K, D * N).
        system: the delay system.
        steps: number of steps, at most K * C.
        lengths: number of valid steps per row (B,), or None for all.

    Returns:
        (B, D, N).
    """
    batch, chunks = starts.shape[:2]
    chunk, dims = u.shape[1] // chunks, u.shape[2]
    starts = starts.unflatten(2, (dims, -1))
    if lengths is None:
        rest = u[:, (chunks - 1) * chunk : steps]
        return linear_memory(rest, system, starts[:, -1], return_sequence=False)[1]
    rows = torch.arange(batch, device=u.device)
    index = ((lengths - 1).clamp(min=0) // chunk).to(rows.dtype)
    rest = u.unflatten(1, (chunks, chunk))[rows, index]
    return linear_memory(rest, system, starts[rows, index], lengths - index * chunk, return_sequence=False)[1]
