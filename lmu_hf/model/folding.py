"""The memory folded into the weights that read it, so that no step needs the memory itself.

What reads the memory, a hidden cell's gates or the feedback into u, does so through one matrix K. In a chunk of C steps that
starts at m0 and is driven by u[0..C-1],

    m[j] K = m0 A^(j+1) K + sum_{i<=j} u[i] H[j-i] K,     H[lag] = A^lag B

so with A^i K and H[lag] K computed once, all that is needed of the memory is its value at the start of each chunk. What this
takes is few products, of matrices that are kept: small layers spend more time here than in their steps.
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
    from .state import Dropout


# Numbers of a stack of powers that is kept: 16 MiB in float32.
_STACKED = 1 << 22


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


def applied_powers(weight: Tensor, system: DelaySystem, count: int) -> Tensor:
    """(A^T)^i K for i = 0 .. count - 1, (D, N, count, W), for a weight K (D, N, W). Differentiable in K and theta."""
    if _stacked(system, count):
        powers = system.powers(count, weight.dtype, weight.device)
        return by_dimension(powers, weight).unflatten(1, (system.order, count))
    # (S, N, i, D / S, W): the dimensions that share a system are columns of one product.
    applied = weight.transpose(0, 1)[None, :, None] if system.scales == 1 else weight[:, :, None, None]
    while applied.shape[2] < count:
        # Doubling: as many products as count has binary digits.
        held = applied.shape[2]
        more = applied[:, :, : count - held]
        power = system.power(held, weight.dtype, weight.device).mT
        applied = torch.cat([applied, exact_matmul(power, more.flatten(2)).unflatten(2, more.shape[2:])], dim=2)
    return applied[0].permute(2, 0, 1, 3) if system.scales == 1 else applied[:, :, :, 0]


def _stacked(system: DelaySystem, count: int) -> bool:
    """Whether so many powers are kept side by side."""
    return system.shared and system.scales * count * system.order**2 <= _STACKED


def by_dimension(stack: Tensor, weight: Tensor) -> Tensor:
    """stack (S, R, N) @ K of each memory dimension (D, N, W): (D, R, W)."""
    if len(weight) == 1:  # no stack of products, and no slice, whose gradient would be filled up with zeros
        return exact_matmul(stack.squeeze(0), weight.squeeze(0)).unsqueeze(0)
    return exact_matmul(stack, weight)


def one_step_on(weight: Tensor, system: DelaySystem) -> tuple[Tensor, Tensor]:
    """What a weight K (D, N, W) of the memory after a step is for what the step begins with: A^T K (D, N, W), of the memory
    before it, and B^T K (D, W), of its u."""
    # [m, u] -> m after the step, (S, N + 1, N).
    of_step = system.chunk_operator(1, weight.dtype, weight.device)
    of_memory, of_u = by_dimension(of_step, weight).split([system.order, 1], dim=1)
    return of_memory, of_u[:, 0]


def feedback_weights(
    cell: LMUCell,
    memory_weight: Tensor,
    encoder: Tensor,
    hidden_weight: Tensor | None,
    system: DelaySystem,
    *,
    u_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a step whose u depends on the state makes its sums of, differentiable in the weights. W = D + G.

    Args:
        cell: the cell.
        memory_weight: K, m -> gates (D * N, G).
        encoder: h -> u (H, D); without hidden_to_memory there are no such rows, and no h.
        hidden_weight: h -> gates (H, G), or None.
        system: the delay system.
        u_first: the u of a step has to be known before its gates: what h contributes through u is left out.

    Returns:
        The memory before the step -> sums (D, N, W); h -> sums (H, W); and u -> the gates of its own step (D, G).
    """
    dims, order = cell.memory_d, cell.order
    given = cell.recurrent_kernel
    recurrent = memory_weight.new_zeros(dims * order, dims) if given is None else given.to(memory_weight.dtype)

    # u sees the memory before the step, the gates the one after it, to which the u of the step has contributed. Of the memory
    # before the step, then, all sums of the step are one product.
    before, direct = one_step_on(memory_weight.view(dims, order, -1), system)
    to_gates, hidden_to_u = before.flatten(0, 1), encoder
    hidden_to_gates = direct.new_zeros(len(encoder), direct.shape[1]) if hidden_weight is None else hidden_weight
    if u_first:
        hidden_to_u = torch.zeros_like(encoder)
    else:
        to_gates = torch.addmm(to_gates, recurrent, direct)
        hidden_to_gates = torch.addmm(hidden_to_gates.mT, direct.mT, encoder.mT).mT
    to_sums = torch.cat([recurrent, to_gates], dim=1).view(dims, order, -1)
    # As the parameters lie, and then transposed: large ones are not rearranged here, nor are their gradients.
    return to_sums, torch.cat([hidden_to_u.mT, hidden_to_gates.mT]).mT, direct


def feedback_operators(to_sums: Tensor, hidden: Tensor, system: DelaySystem, chunk: int) -> ChunkOperators:
    """The matrices of a chunk of C steps whose u depends on the state, without ``encoder``, ``direct`` and ``mask``: of
    :func:`feedback_weights`, the memory before a step -> sums (D, N, W), and h -> sums (H, W)."""
    dtype, device = to_sums.dtype, to_sums.device
    response = system.newest_last(chunk, dtype, device)
    kernel = by_dimension(response[:, 1:], to_sums).transpose(0, 1).flatten(0, 1)
    return ChunkOperators(
        step=below(kernel, hidden),
        power=system.power(chunk, dtype, device),
        response=response,
        fold=applied_powers(to_sums, system, chunk).flatten(0, 1).flatten(1),
    )


def below(kernel: Tensor, hidden: Tensor) -> Tensor:
    """A short kernel (R, W), and what h contributes (H, W) below it; transposed, as :func:`feedback_weights` returns these."""
    return torch.cat([kernel.mT, hidden.mT], dim=1).mT


def encoder_matrix(cell: LMUCell, like: Tensor) -> Tensor:
    """The kernel, [x, h] -> u, in the dtype of ``like``; without one, what enters is u itself."""
    if cell.kernel is None:
        return torch.eye(cell.encoder_size, dtype=like.dtype, device=like.device)
    return cell.kernel.to(like.dtype)


def input_matrices(encoder: Tensor, of_input: Tensor, *, apart: bool) -> tuple[Tensor, Tensor]:
    """What comes in -> u, and -> the gates other than through u: (R, D) and (R, G).

    Args:
        encoder: the first rows that come in -> u.
        of_input: x -> gates (I, G), or no rows.
        apart: x itself comes in behind them, where it goes to the gates, because they are something else. Otherwise they are x.
    """
    if not len(of_input):
        return encoder, of_input.new_zeros(len(encoder), of_input.shape[1])
    if not apart:
        return encoder, of_input
    return F.pad(encoder, (0, 0, 0, len(of_input))), F.pad(of_input, (0, 0, len(encoder), 0))


def input_operators(memory_weight: Tensor, system: DelaySystem, memory_d: int, chunk: int) -> tuple[Tensor, Tensor]:
    """The matrices of a chunk whose u is known in advance, for K = ``memory_weight`` (D * N, G).

    Returns:
        fold (D * N, C * G): the memory at the start of the chunk -> its part of the chunk's gates; from_u (C * D, C * G): the u
        of the chunk -> theirs.
    """
    weight = memory_weight.view(memory_d, system.order, -1)
    dtype, device, stacked = weight.dtype, weight.device, _stacked(system, chunk)
    # [m, u of the chunk] -> m after each of its steps, one below the other, (S, (N + C) * C, N); or of u alone.
    operator = system.chunk_operator(chunk, dtype, device) if stacked else system.window_operator(chunk, 1, dtype, device)
    to_memory = operator.unflatten(2, (chunk, system.order)).flatten(1, 2)
    fold, from_u = by_dimension(to_memory, weight).unflatten(1, (-1, chunk)).tensor_split([-chunk], dim=1)
    if not stacked:
        fold = applied_powers(one_step_on(weight, system)[0], system, chunk)
    return fold.reshape(len(memory_weight), -1), from_u.transpose(0, 1).reshape(chunk * memory_d, -1)


def encodes_last(cell: LMUCell, system: DelaySystem) -> bool:
    """Whether the last state is better encoded than the inputs: a linear encoder of few inputs, the same in all dimensions."""
    inputs = cell.input_size + (cell.bias is not None)
    linear = cell.encoder_act == "linear" and not cell.coupled and cell.kernel is not None
    return linear and system.scales == 1 and inputs <= cell.memory_d and not torch.compiler.is_compiling()


def encoded_last(cell: LMUCell, x: Tensor, system: DelaySystem, lengths: Tensor | None, dropout: Dropout) -> Tensor:
    """The last state (B, D, N) of a memory that begins empty, where :func:`encodes_last`: the memory of x, encoded.

    Equals the memory of the encoded x, since both are linear. The gradient of the encoder needs no pass through time then.
    """
    if dropout.encoder is not None:
        x = x * dropout.encoder[:, None]
    if cell.bias is not None:
        x = F.pad(x, (0, 1), value=1.0)
    memory = linear_memory(x, system, None, lengths, return_sequence=False, algorithm="final")[1]
    with torch.autocast(x.device.type, enabled=False):
        assert cell.kernel is not None
        encoder = cell.kernel if cell.bias is None else torch.cat([cell.kernel, cell.bias[None]])
        encoder = encoder.to(memory.dtype)
        return memory * encoder[0, :, None] if len(encoder) == 1 else exact_matmul(encoder.mT, memory)


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
