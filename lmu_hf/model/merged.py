"""A small LMU as one recurrence of [m, h].

With x, m and h side by side, one product gives the next memory and, since m' is linear in all three, the gates that read it:

    m'    = [m, h, x] S                  S: what the encoder and the delay system make of them
    gates = m' K + [x, h] R  =  [m, h, x] (S K + [R])

The product of a step has (D * N + H) * (D * N + G) numbers, more than the chunks of :mod:`lookahead` need, but nothing else is to
be done: with few numbers the calls around the chunks would take longer than these do.

Names as in :mod:`chunked_scan`; I is the input size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .chunked_scan import chunked_scan
from .folding import ChunkOperators, encoder_matrix, input_matrices
from .gates import GateWeights, Pointwise
from .legendre import DelaySystem
from .precision import exact_matmul
from .ragged import blank, last_valid, where_started
from .state import Dropout, LMUState

if TYPE_CHECKING:
    from .lmu_cell import LMUCell


def merged_recurrence(
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
    """Runs an LMU with a hidden cell. Equals ``naive_recurrence`` to rounding, with the same results and arguments but for
    ``weights``, the gate form of the hidden cell, as long as the hidden state is finite: in one product with the memory, infinite
    numbers become NaN there too, also where they are not fed back.

    Computes in float32 or better. Its gradient cannot be differentiated again.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    linear = cell.memory_d * cell.order
    given = x
    known = cell.encoder_act != "linear" or dropout.encoder is not None
    if known:
        # u differs from x by more than a matrix, so it comes first.
        u = cell.encode(x, dropout=dropout)
        given = torch.cat([u, x], dim=2) if cell.input_to_hidden else u
    with torch.autocast(x.device.type, enabled=False):
        recurrent, of_input, bias = merged_operators(cell, weights.to(dtype), system, known=known)
        start = torch.cat([state.memory.to(dtype).flatten(1), state.hidden[0].to(dtype)], dim=1)
        states = (start, *(part.to(dtype) for part in state.hidden[1:]))
        operators, cells = ChunkOperators(recurrent), Pointwise(weights.kind, linear)
        inputs = (given.to(dtype), of_input, bias, None, None)
        _, _, (*sequences, hidden) = chunked_scan(cells, *inputs, operators, states, x.shape[1])
    last = tuple(last_valid(sequence, lengths) for sequence in sequences)
    output = blank(hidden, lengths) if return_sequence else last[0][:, linear:].clone(memory_format=torch.contiguous_format)
    final = [where_started(new, old, lengths) for new, old in zip(last, states, strict=True)]
    # Of their own, as states are saved.
    memory, first = (part.clone(memory_format=torch.contiguous_format) for part in final[0].tensor_split([linear], dim=1))
    after = (part.to(old.dtype) for part, old in zip((first, *final[1:]), state.hidden, strict=True))
    return output.to(x.dtype), LMUState.of((memory.view_as(state.memory), *after))


def merged_operators(
    cell: LMUCell, weights: GateWeights, system: DelaySystem, *, known: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The matrices of the recurrence, differentiable in the weights.

    Args:
        cell: the cell.
        weights: the gate form of its hidden cell.
        system: the delay system.
        known: what comes in is u, and x behind it with ``input_to_hidden``, rather than x alone.

    Returns:
        [m, h] -> [m', gates] (D * N + H, D * N + G); what comes in -> its part of them (I, D * N + G); and their bias or None.
    """
    _, input_weight, hidden_weight, bias = weights
    dims, linear, size = cell.memory_d, cell.memory_d * cell.order, cell.state_sizes[0]
    A, B = system.matrices(input_weight.dtype, input_weight.device)
    identity = torch.eye(dims, dtype=A.dtype, device=A.device)

    def to_memory(to_u: Tensor) -> Tensor:
        """What contributes to u (R, D) -> what it gives to m' (R, D * N)."""
        return (to_u.to(A.dtype)[:, :, None] * B).flatten(1)

    within = identity[:, None, :, None] * A.mT.expand(dims, -1, -1)[:, :, None]  # (D, N, D, N)
    within = within.flatten(2).flatten(0, 1)
    if cell.recurrent_kernel is not None:
        within = within + to_memory(cell.recurrent_kernel)
    of_memory, of_input = input_weight.tensor_split([linear])
    of_x, of_h = encoder_matrix(cell, input_weight).tensor_split([cell.input_size])
    to_u, to_gates = input_matrices(identity if known else of_x, of_input, apart=known)
    u_bias = None if known else cell.bias
    constant = u_bias is not None or bias is not None
    # Rows [m, h, what comes in, 1]: what they give to m', and to the gates other than through m'.
    memory = [within, to_memory(of_h) if cell.hidden_to_memory else within.new_zeros(size, linear), to_memory(to_u)]
    gates = [to_gates.new_zeros(linear, to_gates.shape[1])]
    gates += [to_gates.new_zeros(size, to_gates.shape[1]) if hidden_weight is None else hidden_weight, to_gates]
    if constant:
        memory.append(within.new_zeros(1, linear) if u_bias is None else to_memory(u_bias[None]))
        gates.append(torch.zeros_like(to_gates[:1]) if bias is None else bias[None])
    to_m = torch.cat(memory)
    joint = torch.cat([to_m, exact_matmul(to_m, of_memory) + torch.cat(gates)], dim=1)
    recurrent, incoming = joint.tensor_split([linear + size])
    return (recurrent, incoming[:-1], incoming[-1]) if constant else (recurrent, incoming, None)
