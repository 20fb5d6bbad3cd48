"""A small LMU as one recurrence of [m, h].

With x, m and h side by side, one product gives the next memory and, since m' is linear in all three, the gates that read it:

    m'    = [m, h, x] S                  S: what the encoder and the delay system make of them
    gates = m' K + [x, h] R  =  [m, h, x] (S K + [R])

The product of a step has (D * N + H) * (D * N + G) numbers, more than the chunks of :mod:`lookahead` need, but nothing else is to
be done: with few numbers the calls around the chunks would take longer than these do.

Names: D memory dimensions, N order, H hidden size, G gate numbers, I size of what comes in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .folding import encoder_matrix, input_matrices
from .gates import GateWeights, Pointwise
from .legendre import DelaySystem
from .precision import exact_matmul
from .ragged import blank, last_valid, where_started
from .recurrent_scan import recurrent_scan
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
        matrix, constant = merged_operator(cell, weights.to(dtype), system, known=known)
        start = torch.cat([state.memory.to(dtype).flatten(1), state.hidden[0].to(dtype)], dim=1)
        states = (start, *(part.to(dtype) for part in state.hidden[1:]))
        cells = Pointwise(weights.kind, linear)
        *sequences, hidden = recurrent_scan(cells, given.to(dtype), matrix, states, constant=constant)
    last = tuple(last_valid(sequence, lengths) for sequence in sequences)
    output = blank(hidden, lengths) if return_sequence else last[0][:, linear:].clone(memory_format=torch.contiguous_format)
    final = [where_started(new, old, lengths) for new, old in zip(last, states, strict=True)]
    # Of their own, as states are saved.
    memory, first = (part.clone(memory_format=torch.contiguous_format) for part in final[0].tensor_split([linear], dim=1))
    after = (part.to(old.dtype) for part, old in zip((first, *final[1:]), state.hidden, strict=True))
    return output.to(x.dtype), LMUState.of((memory.view_as(state.memory), *after))


def merged_operator(cell: LMUCell, weights: GateWeights, system: DelaySystem, *, known: bool) -> tuple[Tensor, bool]:
    """The matrix of the recurrence, differentiable in the weights.

    Args:
        cell: the cell.
        weights: the gate form of its hidden cell.
        system: the delay system.
        known: what comes in is u, and x behind it with ``input_to_hidden``, rather than x alone.

    Returns:
        [m, h, what comes in, 1] -> [m', gates] (D * N + H + I + 1, D * N + G), and whether it has the last row.
    """
    _, input_weight, hidden_weight, bias = weights
    dims, linear, size = cell.memory_d, cell.memory_d * cell.order, cell.state_sizes[0]
    dtype, width = input_weight.dtype, input_weight.shape[1]
    of_memory, of_input = input_weight.tensor_split([linear])
    of_x, of_h = encoder_matrix(cell, input_weight).tensor_split([cell.input_size])
    if known:
        of_x = torch.eye(dims, dtype=dtype, device=of_x.device)
    to_u, to_gates = input_matrices(of_x, of_input, apart=known)
    # What the rows give to u, and to the gates other than through m'.
    zeros = of_x.new_zeros
    recurrent, u_bias = cell.recurrent_kernel, None if known else cell.bias
    of_u = [
        zeros(linear, dims) if recurrent is None else recurrent.to(dtype),
        of_h if cell.hidden_to_memory else zeros(size, dims),
        to_u,
    ]
    gates = [zeros(linear + (size if hidden_weight is None else 0), width), to_gates]
    if hidden_weight is not None:
        gates.insert(1, hidden_weight)
    constant = u_bias is not None or bias is not None
    if constant:
        of_u.append(zeros(1, dims) if u_bias is None else u_bias.to(dtype)[None])
        gates.append(zeros(1, width) if bias is None else bias[None])
    A, B = system.matrices(dtype, input_weight.device)
    to_memory = (torch.cat(of_u)[:, :, None] * B).flatten(1)
    within = torch.block_diag(*A.mT.expand(dims, -1, -1))
    to_memory = to_memory + F.pad(within, (0, 0, 0, len(to_memory) - linear))
    # The gates read m'.
    return torch.cat([to_memory, torch.cat(gates) + exact_matmul(to_memory, of_memory)], dim=1), constant
