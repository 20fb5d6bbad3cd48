"""Coupled LMUs without the large products in the time loop.

The feedback enters the memory only through its input u, which has memory_d numbers. Take a chunk of C steps that starts at
the memory m0. With E the recurrent kernel, K the input weight of the hidden cell's gates and H[lag] = A^lag B, what step j
needs of the memory is

    m[j-1] E = m0 A^(j-1) E + sum_{i<j}  u[i] H[j-1-i] E
    m[j] K   = m0 A^j K     + sum_{i<=j} u[i] H[j-i] K

The m0 terms of all C steps are one product; the sums run over at most C inputs of memory_d numbers with a short kernel. What
is left per step is one product of [u[1..j-1], h] with a matrix of C * memory_d + hidden_size rows, in place of those of order
x order, order x hidden_size and hidden_size x hidden_size. The backward pass is the same recurrence transposed; the gradients
of all weights are collected and computed as a few large products at the end. With memory_d = 0 nothing of the memory is left
and it is a plain recurrent scan, which serves uncoupled layers, whose memory is known in advance.

Names: W = D + G is the width of a step's result, its u (D) and its gates (G); F folds m0 into the results of a chunk; P and Q
advance the memory by a chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .folding import applied_powers, final_memory, short_kernel
from .gates import GATES, GateWeights
from .legendre import DelaySystem
from .memory import fold_rows, fold_state, unfold_rows, unfold_state
from .ragged import blank, last_valid, where_started
from .state import Dropout, LMUState

if TYPE_CHECKING:
    from .lmu_cell import LMUCell

State = tuple[Tensor, ...]


def unsupported(cell: LMUCell, weights: GateWeights | None, dropout: Dropout) -> str | None:
    """Why a coupled layer, whose hidden cell has the gate form ``weights``, cannot run in this way; None if it can."""
    if cell.encoder_act != "linear":
        return "encoder_act makes u a non-linear function of the state"
    if dropout.recurrent is not None or (dropout.encoder is not None and cell.hidden_to_memory):
        return "the dropout of what is fed back differs from row to row"
    if cell.hidden_to_memory and weights is None:
        return "the hidden cell that is fed back has no form as affine gates"
    return None


def lookahead_recurrence(
    cell: LMUCell,
    weights: GateWeights,
    x: Tensor,
    state: LMUState,
    lengths: Tensor | None,
    system: DelaySystem,
    dropout: Dropout,
    *,
    return_sequence: bool,
) -> tuple[Tensor, LMUState]:
    """Runs an LMU with ``hidden_to_memory``. Equals ``naive_recurrence`` to rounding, with the same results and arguments but
    for ``weights``, the gate form of the hidden cell.

    Computes in float32 or better. Its gradient cannot be differentiated again.
    """
    with torch.autocast(x.device.type, enabled=False):
        u, starts, sequences = _run(cell, x, state.memory, state.hidden, weights, system, dropout)
        memory = final_memory(u, starts, system, x.shape[1], lengths)
    output, hidden = _finish(sequences, state.hidden, lengths, return_sequence)
    return output.to(x.dtype), LMUState.of((memory, *hidden))


def lookahead_input(cell: LMUCell, x: Tensor, memory: Tensor, system: DelaySystem, dropout: Dropout) -> Tensor:
    """The memory's input u (B, T, D) of an LMU with ``memory_to_memory`` only, for which no hidden state is needed."""
    empty = x.new_zeros(0, 0)
    weights = GateWeights("linear", x.new_zeros(cell.memory_d * cell.order, 0), empty, None)
    with torch.autocast(x.device.type, enabled=False):
        u, *_ = _run(cell, x, memory, (x.new_zeros(x.shape[0], 0),), weights, system, dropout)
    return u[:, : x.shape[1]]


def gated_scan(
    weights: GateWeights, base: Tensor, state: State, lengths: Tensor | None, *, return_sequence: bool
) -> tuple[Tensor, State]:
    """Runs a hidden cell over what its inputs contribute to its gates. Equals ``naive_scan`` to rounding.

    Computes in float32 or better. Its gradient cannot be differentiated again.

    Args:
        weights: the gate form of the cell, with recurrence.
        base: z @ input_weight + bias of every step (B, T, G).
        state: hidden state tensors before the first step.
        lengths: number of valid steps per row (B,), or None for all.
        return_sequence: return the outputs of all steps rather than the last valid one.

    Returns:
        Outputs and state like ``naive_scan``, in the dtype of ``state``.
    """
    assert weights.hidden_weight is not None
    dtype = torch.promote_types(base.dtype, torch.float32)
    with torch.autocast(base.device.type, enabled=False):
        none = base.new_zeros(base.shape[0], 0, 0, dtype=dtype)
        empty = none.new_zeros(0, 0, 0)
        _, _, *sequences = _Lookahead.apply(
            weights.kind,
            base.shape[1],
            base.to(dtype),
            none,
            none.new_zeros(0, base.shape[-1]),
            weights.hidden_weight.to(dtype),
            empty,
            empty,
            *(part.to(dtype) for part in state),
        )
    output, hidden = _finish(sequences, state, lengths, return_sequence)
    return output.to(state[0].dtype), hidden


def chunk_size(batch: int, steps: int, memory_d: int, order: int, hidden_size: int, width: int) -> int:
    """Steps per chunk with the least estimated work.

    Longer chunks mean fewer advances of the memory but a longer short kernel per step, and more operators to build.
    """

    def work(size: int) -> float:
        per_step = batch * (hidden_size + size * memory_d / 2) * width
        per_chunk = batch * memory_d * order * order + 2e6  # the constant: what some ten small calls cost, in products
        build = 2 * size * memory_d * order * order * width
        return steps * per_step + steps / size * per_chunk + build

    return min((size for size in (1, 2, 4, 8, 16, 32) if size <= max(steps, 1)), key=work)


def _run(
    cell: LMUCell, x: Tensor, memory: Tensor, hidden: State, weights: GateWeights, system: DelaySystem, dropout: Dropout
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns u (B, K * C, D), the memory at the start of each chunk (B, K, D * N), and the state sequences (B, T, H)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, batch, steps = x.to(dtype), x.shape[0], x.shape[1]
    kind, input_weight, hidden_weight, bias = weights
    size, gates = hidden[0].shape[1], input_weight.shape[1]
    chunk = chunk_size(batch, steps, cell.memory_d, cell.order, size, cell.memory_d + gates)
    chunks = -(-steps // chunk)
    fold, step, direct = _operators(cell, input_weight.to(dtype), hidden_weight, size, system, chunk)

    # What the inputs contribute, in one product: x -> u, and x -> gates, directly and through u.
    to_u = _encoder(cell, dtype, x.device)[: cell.input_size]
    to_gates = to_u @ direct
    if cell.input_to_hidden and gates:
        to_gates = to_gates + input_weight[cell.memory_d * cell.order :].to(dtype)
    constant = None
    if cell.bias is not None or bias is not None:
        u_bias = to_u.new_zeros(cell.memory_d) if cell.bias is None else cell.bias.to(dtype)
        gate_bias = u_bias @ direct
        constant = torch.cat([u_bias, gate_bias if bias is None else gate_bias + bias.to(dtype)])
    x = x if dropout.encoder is None else x * dropout.encoder[:, None]
    x = F.pad(x, (0, 0, 0, chunks * chunk - steps))
    base = F.linear(x, torch.cat([to_u, to_gates], dim=1).mT, constant)
    power = system.power(chunk, dtype, x.device)
    response = system.impulse_response(chunk, dtype, x.device).flip(1)
    u, starts, *sequences = _Lookahead.apply(
        kind, steps, base, memory.to(dtype), fold, step, power, response, *(part.to(dtype) for part in hidden)
    )
    return u, starts, [sequence[:, :steps] for sequence in sequences]


def _operators(
    cell: LMUCell, input_weight: Tensor, hidden_weight: Tensor | None, size: int, system: DelaySystem, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices of the time loop, differentiable in the weights.

    Returns:
        fold (D * N, C * W): the memory at the start of a chunk -> its part of the chunk's results; step ((C - 1) * D + H, W):
        [u of the chunk so far, h] -> its part of the next result; direct (D, G): u -> the gates of its own step, which is
        already contained in the other two.
    """
    dims, order = cell.memory_d, cell.order
    dtype, device = input_weight.dtype, input_weight.device
    memory_weight = input_weight[: dims * order]
    recurrent = memory_weight.new_zeros(dims * order, dims)
    if cell.recurrent_kernel is not None:
        recurrent = cell.recurrent_kernel.to(dtype)
    powers = applied_powers(torch.cat([recurrent, memory_weight], dim=1), system, dims, chunk)
    short = short_kernel(powers, system)
    direct = short[0, :, dims:]

    to_u = powers[:chunk, ..., :dims]
    to_gates = powers[1:, ..., dims:] + to_u @ direct
    fold = torch.cat([to_u, to_gates], dim=-1).permute(1, 2, 0, 3).reshape(dims * order, -1)
    kernel_u = short[: chunk - 1, :, :dims]
    kernel_gates = short[1:chunk, :, dims:] + kernel_u @ direct
    kernel = torch.cat([kernel_u, kernel_gates], dim=-1).flip(0).flatten(0, 1)
    encoder = _encoder(cell, dtype, device)[cell.input_size :]  # of h; empty without hidden_to_memory, where size is 0
    from_hidden = encoder @ direct if hidden_weight is None else hidden_weight.to(dtype) + encoder @ direct
    return fold, torch.cat([kernel, torch.cat([encoder, from_hidden], dim=1)]), direct


def _encoder(cell: LMUCell, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The kernel, [x, h] -> u; without one, what enters is u itself."""
    if cell.kernel is None:
        return torch.eye(cell.encoder_size, dtype=dtype, device=device)
    return cell.kernel.to(dtype)


def _finish(sequences: list[Tensor], before: State, lengths: Tensor | None, return_sequence: bool) -> tuple[Tensor, State]:
    last = tuple(last_valid(sequence, lengths) for sequence in sequences)
    output = blank(sequences[0], lengths) if return_sequence else last[0]
    final = tuple(where_started(new, old, lengths).to(old.dtype) for new, old in zip(last, before, strict=True))
    return output, final


class _Lookahead(torch.autograd.Function):
    """The time loop and its adjoint.

    Args:
        kind: the pointwise step of the hidden cell, a key of ``GATES``.
        steps: number of steps T; the tensors have K * C >= T.
        base: what is known in advance of each result (B, K * C, W).
        memory: m before the first step (B, D, N).
        fold, step, power, response: the operators; power is P (S, N, N), A^C, and response Q (S, C, N), A^(C-1-i) B.
        states: hidden state tensors before the first step, (B, H) each.

    Returns:
        u (B, K * C, D), the memory at the start of each chunk (B, K, D * N), and each state tensor after every step
        (B, K * C, H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        kind: str,
        steps: int,
        base: Tensor,
        memory: Tensor,
        fold: Tensor,
        step: Tensor,
        power: Tensor,
        response: Tensor,
        *states: Tensor,
    ) -> tuple[Tensor, ...]:
        batch, total, width = base.shape
        dims, size = memory.shape[1], states[0].shape[1]
        chunk = response.shape[1] if dims else total
        kept = GATES[kind].allocate(states, total)
        gates = GATES[kind](states, kept)
        u = base.new_zeros(batch, total, dims)
        starts = base.new_empty(batch, total // chunk, dims * memory.shape[2])
        # One row per sequence: the u of the chunk so far, then h.
        row = base.new_empty(batch, chunk * dims + size)
        row[:, :size] = output = states[0]
        matrices = [step[(chunk - 1 - j) * dims :] for j in range(chunk)] if dims else []
        for index, first in enumerate(range(0, total, chunk)):
            count = min(chunk, steps - first)
            result = base[:, first : first + chunk]
            if dims:
                starts[:, index] = memory.flatten(1)
                result = torch.addmm(result.flatten(1), starts[:, index], fold).view(batch, chunk, width)
            for j in range(count):
                if not dims:
                    output = gates.step(first + j, torch.addmm(result[:, j], output, step))
                    continue
                now = torch.addmm(result[:, j], row[:, : j * dims + size], matrices[j])
                output = gates.step(first + j, now[:, dims:])
                row[:, j * dims : (j + 1) * dims] = now[:, :dims]
                row[:, (j + 1) * dims : (j + 1) * dims + size] = output
            if dims:
                u[:, first : first + count] = row[:, : count * dims].view(batch, count, dims)
                if first + chunk < total:
                    memory = _advance(memory, u[:, first : first + chunk], power, response)
                    row[:, :size] = output
        ctx.save_for_backward(fold, step, power, response, u, starts, *states, *kept)
        ctx.kind, ctx.steps, ctx.states = kind, steps, len(states)
        return u, starts, *kept[: len(states)]

    @staticmethod
    def backward(ctx: Any, grad_u: Tensor, grad_starts: Tensor, *grad_sequences: Tensor) -> tuple:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the look-ahead recurrence has no second derivative; set algorithm='naive' on the layer for create_graph=True"
            )
        fold, step, power, response, u, starts, *rest = ctx.saved_tensors
        states, kept = tuple(rest[: ctx.states]), tuple(rest[ctx.states :])
        gates = GATES[ctx.kind](states, kept)
        gates.load_gradients(grad_sequences)
        batch, total, dims = u.shape
        size, width = states[0].shape[1], step.shape[1]
        chunk = response.shape[1] if dims else total
        order = power.shape[-1]
        grad_base = u.new_zeros(batch, total, width)
        grad_power, grad_response = torch.zeros_like(power), torch.zeros_like(response)
        grad_memory: Tensor | None = None  # of the memory at the end of the chunk
        carry = u.new_zeros(batch, size)
        matrices = [step[(chunk - 1 - j) * dims :].mT for j in range(chunk)] if dims else []
        for index in reversed(range(total // chunk)):
            first = index * chunk
            inputs = grad_u[:, first : first + chunk].flatten(1).clone()
            if grad_memory is not None:
                # What the memory at the end of the chunk sends back to the u of the chunk.
                sent = fold_state(grad_memory, len(response)) @ response.mT
                inputs += unfold_rows(sent, batch).flatten(1)
            for j in reversed(range(min(chunk, ctx.steps - first))):
                now = grad_base[:, first + j]
                direct = gates.back(first + j, grad_sequences[0][:, first + j] + carry, now[:, dims:])
                if dims:
                    now[:, :dims] = inputs[:, j * dims : (j + 1) * dims]
                    past = now @ matrices[j]
                    inputs[:, : j * dims] += past[:, : j * dims]
                    carry = past[:, j * dims :]
                else:
                    carry = now @ step.mT
                if direct is not None:
                    carry = carry + direct
            if dims:
                start = torch.addmm(grad_starts[:, index], grad_base[:, first : first + chunk].flatten(1), fold.mT)
                start = start.view(batch, dims, order)
                if grad_memory is not None:
                    rows = fold_state(grad_memory, len(power))
                    start = start + unfold_state(rows @ power, start.shape)
                    if ctx.needs_input_grad[6]:
                        grad_power += rows.mT @ fold_state(starts[:, index].view_as(start), len(power))
                        grad_response += fold_rows(u[:, first : first + chunk], len(power)).mT @ rows
                grad_memory = start
        grad_fold = None
        if dims and ctx.needs_input_grad[4]:
            grad_fold = starts.flatten(0, 1).mT @ grad_base.view(-1, chunk * width)
        grad_step = _step_gradient(u, states[0], kept[0], grad_base, chunk) if ctx.needs_input_grad[5] else None
        if grad_memory is None:
            grad_memory = u.new_zeros(batch, dims, order)
        return (
            None,
            None,
            grad_base,
            grad_memory,
            grad_fold,
            grad_step,
            grad_power if ctx.needs_input_grad[6] else None,
            grad_response if ctx.needs_input_grad[7] else None,
            *gates.initial_gradients(carry),
        )


def _advance(memory: Tensor, u: Tensor, power: Tensor, response: Tensor) -> Tensor:
    """The memory a chunk later: m (B, D, N), u (B, C, D)."""
    driven = fold_rows(u, len(power)) @ response
    return unfold_state(torch.baddbmm(driven, fold_state(memory, len(power)), power.mT), memory.shape)


def _step_gradient(u: Tensor, before: Tensor, hidden: Tensor, grad_base: Tensor, chunk: int) -> Tensor:
    """Gradient of the step matrix from all steps at once."""
    earlier = [before[:, None]] if hidden.shape[1] == 1 else [before[:, None], hidden[:, :-1]]
    past = [torch.cat(earlier, dim=1)]
    if u.shape[2]:
        by_chunk = u.unflatten(1, (-1, chunk))
        # The u of each lag, none before the chunk. Shifting these few numbers spares a copy of the gradients per lag.
        past = [F.pad(by_chunk[:, :, :-lag], (0, 0, lag, 0)).flatten(1, 2) for lag in range(chunk - 1, 0, -1)] + past
    return torch.cat(past, dim=2).flatten(0, 1).mT @ grad_base.flatten(0, 1)
