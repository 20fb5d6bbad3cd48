"""LMUs whose memory is driven by the inputs alone: a linear filter, known in advance, in front of a recurrent cell.

In chunks of C steps the memory is folded into the weights that read it, or written a few chunks at a time; or, where it begins
empty, what reaches the gates of all steps is one convolution. What is left of each step is the cell's own recurrence, see
:mod:`recurrent_scan`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunked_scan import chunked_scan
from .convolved import convolved_scan
from .folding import ChunkOperators, by_dimension, final_memory, input_operators
from .gates import GateWeights, Pointwise
from .legendre import DelaySystem
from .memory import linear_memory
from .ragged import Trajectory, blank
from .recurrent_scan import recurrent_scan
from .state import LMUState

if TYPE_CHECKING:
    from .lmu_cell import LMUCell

State = tuple[Tensor, ...]


def uncoupled_recurrence(
    cell: LMUCell,
    weights: GateWeights,
    x: Tensor,
    u: Tensor,
    state: LMUState,
    lengths: Tensor | None,
    system: DelaySystem,
    chunk: int,
    *,
    folds: bool,
    return_sequence: bool,
    return_state: bool = True,
) -> tuple[Tensor, LMUState | None]:
    """Runs an LMU without feedback into the memory, whose input ``u`` (B, T, D) is known in advance.

    ``chunk`` steps at a time the memory is folded into the weights that read it, or else written. Otherwise like
    :func:`lookahead.lookahead_recurrence`.
    """
    dtype, steps, dims = torch.promote_types(x.dtype, torch.float32), x.shape[1], cell.memory_d
    with torch.autocast(x.device.type, enabled=False):
        kind, input_weight, hidden_weight, bias = weights.to(dtype)
        assert hidden_weight is not None
        of_memory, of_input = input_weight.tensor_split([dims * cell.order])
        operators = ChunkOperators(
            hidden_weight, system.power(chunk, dtype, x.device), system.newest_last(chunk, dtype, x.device)
        )
        if folds:
            fold, from_u = input_operators(of_memory, system, dims, chunk)
            operators = operators._replace(fold=fold, from_u=from_u)
        else:
            operators = operators._replace(states=system.chunk_operator(chunk, dtype, x.device), read=of_memory)
        u = F.pad(blank(u.to(dtype), lengths), (0, 0, 0, -steps % chunk))
        given: tuple[Tensor | None, Tensor | None] = (x.to(dtype), of_input) if cell.input_to_hidden else (None, None)
        hidden = tuple(part.to(dtype) for part in state.hidden)
        last = Trajectory.wants_last(lengths, return_sequence, return_state)
        memory = state.memory.to(dtype)
        _, starts, states = chunked_scan(Pointwise(kind), *given, bias, u, memory, operators, hidden, steps, last=last)
        assert starts is not None
        output = states.output(lengths, return_sequence).to(x.dtype)
        if not return_state:
            return output, None
        memory = final_memory(u, starts, system, x.shape[1], lengths)
        return output, LMUState(memory, states.final(state.hidden, lengths))


def convolved_recurrence(
    cell: LMUCell,
    weights: GateWeights,
    x: Tensor,
    u: Tensor,
    state: LMUState,
    lengths: Tensor | None,
    system: DelaySystem,
    *,
    return_sequence: bool,
    return_state: bool = True,
) -> tuple[Tensor, LMUState | None]:
    """Runs an LMU without feedback into a memory that begins empty: what the memory contributes to the gates of all steps is one
    convolution of u with its response to the gates. Otherwise like :func:`uncoupled_recurrence`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        own = weights.to(dtype)
        of_memory, of_input = own.input_weight.tensor_split([cell.memory_d * cell.order])
        response = system.impulse_response(x.shape[1], dtype, x.device)
        kernel = by_dimension(response, of_memory.view(cell.memory_d, cell.order, -1))
        u = blank(u.to(dtype), lengths)
        given: tuple[Tensor | None, Tensor | None] = (x.to(dtype), of_input) if cell.input_to_hidden else (None, None)
        assert own.hidden_weight is not None
        before = tuple(part.to(dtype) for part in state.hidden)
        last = Trajectory.wants_last(lengths, return_sequence, return_state)
        to_gates = (*given, own.bias, u, kernel)
        states = convolved_scan(Pointwise(own.kind), *to_gates, own.hidden_weight, before, last=last)
        output = states.output(lengths, return_sequence)
        if not return_state:
            return output.to(x.dtype), None
        memory = linear_memory(u, system, None, lengths, return_sequence=False)[1]
        return output.to(x.dtype), LMUState(memory, states.final(state.hidden, lengths))


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
    dtype = torch.promote_types(base.dtype, torch.float32)
    with torch.autocast(base.device.type, enabled=False):
        hidden_weight = weights.to(dtype).hidden_weight
        assert hidden_weight is not None
        hidden = tuple(part.to(dtype) for part in state)
        states = recurrent_scan(Pointwise(weights.kind), base.to(dtype), hidden_weight, hidden, last=lengths is None)
    return states.output(lengths, return_sequence).to(state[0].dtype), states.final(state, lengths)
