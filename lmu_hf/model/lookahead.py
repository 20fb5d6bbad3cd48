"""Coupled LMUs without the large products in the time loop.

The feedback enters the memory only through its input u, which has memory_d numbers. Take a chunk of C steps that starts at
the memory m0. With E the recurrent kernel, K the input weight of the hidden cell's gates and H[lag] = A^lag B, what step j
needs of the memory is

    m[j-1] E = m0 A^(j-1) E + sum_{i<j}  u[i] H[j-1-i] E
    m[j] K   = m0 A^j K     + sum_{i<=j} u[i] H[j-i] K

The m0 terms of all C steps are one product; the sums run over at most C inputs of memory_d numbers with a short kernel. What
is left per step is one product of [u[1..j-1], h] with a matrix of C * memory_d + hidden_size rows, in place of those of order
x order, order x hidden_size and hidden_size x hidden_size. The backward pass is the same recurrence transposed; the gradients
of all weights are collected and computed as a few large products at the end. Where the memory begins empty, there is another way
that needs no m0 at all, see :mod:`relaxed`.

Names: W = D + G is the width of a step's result, its u (D) and its gates (G); F folds m0 into the results of a chunk; P and Q
advance the memory by a chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunked_scan import chunked_scan
from .folding import (
    by_dimension,
    encoder_matrix,
    feedback_operators,
    feedback_weights,
    final_memory,
    input_matrices,
)
from .gates import GateWeights, Pointwise
from .layer_costs import Recurrence, lookahead_chunk
from .legendre import DelaySystem
from .memory import linear_memory, measured
from .ragged import Trajectory
from .relaxed import relaxed_scan
from .state import Dropout, LMUState

if TYPE_CHECKING:
    from .lmu_cell import LMUCell

State = tuple[Tensor, ...]


def lookahead_recurrence(
    cell: LMUCell,
    weights: GateWeights,
    x: Tensor,
    state: LMUState,
    lengths: Tensor | None,
    system: DelaySystem,
    dropout: Dropout,
    chunk: int,
    *,
    return_sequence: bool,
    return_state: bool = True,
) -> tuple[Tensor, LMUState | None]:
    """Runs an LMU with ``hidden_to_memory``, ``chunk`` steps at a time. Equals ``naive_recurrence`` to rounding, with the same
    results and arguments but for ``weights``, the gate form of the hidden cell, and ``return_state``: without it the state is
    None, which spares the way to it.

    Computes in float32 or better. Its gradient cannot be differentiated again.
    """
    with torch.autocast(x.device.type, enabled=False):
        last = Trajectory.wants_last(lengths, return_sequence, return_state)
        u, starts, states = _run(cell, x, state.memory, state.hidden, weights, system, dropout, chunk, last=last)
        output = states.output(lengths, return_sequence).to(x.dtype)
        if not return_state:
            return output, None
        memory = final_memory(u, starts, system, x.shape[1], lengths)
        return output, LMUState(memory, states.final(state.hidden, lengths))


def relaxed_recurrence(
    cell: LMUCell,
    weights: GateWeights,
    x: Tensor,
    state: LMUState,
    lengths: Tensor | None,
    system: DelaySystem,
    dropout: Dropout,
    block: int,
    *,
    return_sequence: bool,
    return_state: bool = True,
) -> tuple[Tensor, LMUState | None]:
    """Runs an LMU with ``hidden_to_memory`` whose memory begins empty by a relaxed convolution, for which it need not exist, in
    blocks of so many steps.

    Takes compiled loops, and a u that need not be known before the gates, see :func:`encodes_first`. Otherwise like
    :func:`lookahead_recurrence`.
    """
    assert not encodes_first(cell, dropout)
    with torch.autocast(x.device.type, enabled=False):
        own = _Feedback.of(cell, x, weights, system, dropout)
        dtype = own.x.dtype
        kernel = by_dimension(system.impulse_response(x.shape[1] - 1, dtype, x.device), own.to_sums)
        before = tuple(part.to(dtype) for part in state.hidden)
        last = Trajectory.wants_last(lengths, return_sequence, return_state)
        u, states = relaxed_scan(own.cell, own.x, own.weight, own.bias, kernel, own.hidden, before, block, last=last)
        output = states.output(lengths, return_sequence).to(x.dtype)
        if not return_state:
            return output, None
        memory = linear_memory(u, system, None, lengths, return_sequence=False)[1]
        return output, LMUState(memory, states.final(state.hidden, lengths))


def lookahead_input(
    cell: LMUCell, x: Tensor, memory: Tensor, system: DelaySystem, dropout: Dropout, *, training: bool
) -> Tensor:
    """The memory's input u (B, T, D) of an LMU with ``memory_to_memory`` only, for which no hidden state is needed; ``training``
    says that its gradient is wanted."""
    empty = x.new_zeros(0, 0)
    weights = GateWeights("linear", x.new_zeros(cell.memory_d * cell.order, 0), empty, None)
    sizes = Recurrence(x.shape[0], x.shape[1], cell.memory_d, cell.order, 0, 0)
    chunk = lookahead_chunk(sizes, training=training, measured=measured(x))
    with torch.autocast(x.device.type, enabled=False):
        u, *_ = _run(cell, x, memory, (x.new_zeros(x.shape[0], 0),), weights, system, dropout, chunk, last=False)
    return u[:, : x.shape[1]]


class _Feedback(NamedTuple):
    """What the steps of a layer with feedback are made of: inputs (B, T, I) -> sums by a weight (I, W) and a bias (W,) or None;
    what the memory before a step and h contribute to them, see :func:`feedback_weights`; and, where u has to be known before the
    gates, h -> u (H, D), u -> gates (D, G) and what multiplies h on its way to u (B, H), or Nones."""

    cell: Pointwise
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    to_sums: Tensor
    hidden: Tensor
    encoder: Tensor | None
    direct: Tensor | None
    mask: Tensor | None

    @classmethod
    def of(cls, cell: LMUCell, x: Tensor, weights: GateWeights, system: DelaySystem, dropout: Dropout) -> _Feedback:
        dtype = torch.promote_types(x.dtype, torch.float32)
        kind, input_weight, hidden_weight, bias = weights.to(dtype)
        u_first = encodes_first(cell, dropout)
        # Both are cut once, so that their gradients are joined once.
        of_memory, of_input = input_weight.tensor_split([cell.memory_d * cell.order])
        of_x, of_h = encoder_matrix(cell, input_weight).tensor_split([cell.input_size])
        to_sums, hidden, direct = feedback_weights(cell, of_memory, of_h, hidden_weight, system, u_first=u_first)

        # What the inputs contribute, in one product: x -> u, and x -> gates, directly and through u.
        x, mask = x.to(dtype), None
        # What goes straight to the gates is not dropped.
        apart = dropout.encoder is not None and bool(cell.hidden_to_memory and cell.input_to_hidden)
        if dropout.encoder is not None:
            dropped = x * dropout.encoder[:, None, : cell.input_size].to(dtype)
            x = torch.cat([dropped, x], dim=2) if apart else dropped
            if cell.hidden_to_memory:
                mask = dropout.encoder[:, cell.input_size :].to(dtype).contiguous()
        to_u, to_gates = input_matrices(of_x, of_input, apart=apart)
        if not u_first:
            to_gates = torch.addmm(to_gates, to_u, direct)
        constant = None if bias is None else F.pad(bias, (cell.memory_d, 0))
        if cell.bias is not None:
            of_u = cell.bias.to(dtype)
            of_gates = torch.zeros_like(direct[0]) if u_first else of_u @ direct
            constant = torch.cat([of_u, of_gates if bias is None else of_gates + bias])
        weight = torch.cat([to_u, to_gates], dim=1)
        encoding = (of_h, direct, mask) if u_first else (None, None, None)
        return cls(Pointwise(kind), x, weight, constant, to_sums, hidden, *encoding)


def _run(
    cell: LMUCell,
    x: Tensor,
    memory: Tensor,
    hidden: State,
    weights: GateWeights,
    system: DelaySystem,
    dropout: Dropout,
    chunk: int,
    *,
    last: bool,
) -> tuple[Tensor, Tensor, Trajectory]:
    """Returns u (B, K * C, D), the memory at the start of each chunk (B, K, D * N), and the hidden states."""
    own = _Feedback.of(cell, x, weights, system, dropout)
    operators = feedback_operators(own.to_sums, own.hidden, system, chunk)
    operators = operators._replace(encoder=own.encoder, direct=own.direct, mask=own.mask)
    dtype = own.x.dtype
    start = (None, memory.to(dtype), operators, tuple(part.to(dtype) for part in hidden), x.shape[1])
    u, starts, states = chunked_scan(own.cell, own.x, own.weight, own.bias, *start, activation=cell.encoder_act, last=last)
    assert u is not None
    assert starts is not None
    return u, starts, states


def encodes_first(cell: LMUCell, dropout: Dropout) -> bool:
    """Whether the u of a step has to be known before its gates: it is no linear function of what is fed back, or not the same one
    in each row."""
    return cell.coupled and (cell.encoder_act != "linear" or (dropout.encoder is not None and cell.hidden_to_memory))
