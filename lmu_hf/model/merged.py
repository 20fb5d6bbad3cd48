"""A small LMU as one recurrence of [m, h].

With x, m and h side by side, one product gives the next memory and, since m' is linear in all three, the gates that read it:

    m'    = [m, h, x] S                  S: what the encoder and the delay system make of them
    gates = m' K + [x, h] R  =  [m, h, x] (S K + [R])

The product of a step has (D * N + H) * (D * N + G) numbers, more than the chunks of :mod:`lookahead` need, but nothing else is to
be done: with few numbers the calls around the chunks would take longer than these do.

Names: D memory dimensions, N order, H hidden size, G gate numbers, I size of what comes in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .by_system import side_by_side
from .compiled import available
from .folding import encoder_matrix
from .gates import GateWeights, Pointwise
from .legendre import DelaySystem
from .precision import exact_matmul
from .ragged import Trajectory, blank, where_started
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
    return_state: bool = True,
) -> tuple[Tensor, LMUState | None]:
    """Runs an LMU with a hidden cell. Equals ``naive_recurrence`` to rounding, with the same results and arguments but for
    ``weights``, the gate form of the hidden cell, and the state, which is None unless wanted; as long as the hidden state is
    finite: in one product with the memory, infinite numbers become NaN there too, also where they are not fed back.

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
        alone = return_sequence or lengths is not None
        last = Trajectory.wants_last(lengths, return_sequence, return_state)
        ran = recurrent_scan(cells, given.to(dtype), matrix, states, constant=constant, alone=alone, last=last)
    if return_sequence:
        output = blank(ran.each[-1], lengths)
    else:
        output = ran.end(-1, lengths) if alone else ran.last[0][:, linear:].contiguous()
    output = output.to(x.dtype)
    if not return_state:
        return output, None
    final = [where_started(ran.end(index, lengths), old, lengths) for index, old in enumerate(states)]
    # Of their own, as states are saved.
    memory, first = (part.clone(memory_format=torch.contiguous_format) for part in final[0].tensor_split([linear], dim=1))
    after = (part.to(old.dtype) for part, old in zip((first, *final[1:]), state.hidden, strict=True))
    return output, LMUState.of((memory.view_as(state.memory), *after))


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
    _, weight, hidden, bias = weights
    dims, linear, dtype = cell.memory_d, cell.memory_d * cell.order, weight.dtype
    kernel = torch.eye(dims, dtype=dtype, device=weight.device) if known else encoder_matrix(cell, weight)
    recurrent = None if cell.recurrent_kernel is None else cell.recurrent_kernel.to(dtype)
    u_bias = None if known or cell.bias is None else cell.bias.to(dtype)
    parts = _Parts(kernel, recurrent, u_bias, weight, hidden, bias)
    entering, at_entering = (dims if known else cell.input_size), linear + cell.state_sizes[0]
    at_input = at_entering + dims * known
    constant = parts.u_bias is not None or bias is not None
    rows = max(at_entering + entering, at_input + len(weight) - linear) + constant
    layout = _Layout(linear, entering, at_entering, at_input, rows)
    A, B = system.matrices(dtype, weight.device)
    # One way for a cell, with and without gradients: a trained theta is the other's.
    if available(weight) and not cell.trainable_theta:
        return _MergedOperator.apply(layout, A, B, *parts), constant
    return naive_merged_operator(layout, A, B, parts), constant


class _Parts(NamedTuple):
    """What the matrix is made of: [what comes in, h] -> u (E + H, D), or without the rows of h; m -> u; 1 -> u; [m', x] -> gates
    (D * N + I, G), or without the rows of x; h -> gates; 1 -> gates."""

    kernel: Tensor
    recurrent: Tensor | None
    u_bias: Tensor | None
    weight: Tensor
    hidden: Tensor | None
    bias: Tensor | None


class _Layout(NamedTuple):
    """The rows of the matrix.

    Attributes:
        linear: those of m come first, and then those of h.
        entering: rows of the kernel that are of what comes in.
        at_entering: the first of these in the matrix.
        at_input: the first row of x as it goes to the gates.
        rows: all of them.
    """

    linear: int
    entering: int
    at_entering: int
    at_input: int
    rows: int


def naive_merged_operator(layout: _Layout, A: Tensor, B: Tensor, parts: _Parts) -> Tensor:
    """S and S K + R as above, for A (S, N, N) and B (S, N)."""
    linear, entering, at_entering, at_input, rows = layout
    kernel, recurrent, u_bias, weight, hidden, bias = parts

    def placed(*matrices: tuple[int, Tensor | None]) -> Tensor:
        there = [(row, part if part.ndim == 2 else part[None]) for row, part in matrices if part is not None]
        return sum(F.pad(part, (0, 0, row, rows - row - len(part))) for row, part in there)  # type: ignore[return-value]

    of_u = placed((0, recurrent), (linear, kernel[entering:]), (at_entering, kernel[:entering]), (rows - 1, u_bias))
    ahead, driven = side_by_side(A, B, kernel.shape[1])
    to_memory = exact_matmul(of_u, driven) + placed((0, ahead))
    to_gates = placed((linear, hidden), (at_input, weight[linear:]), (rows - 1, bias))
    return torch.cat([to_memory, to_gates + exact_matmul(to_memory, weight[:linear])], dim=1)


class _MergedOperator(torch.autograd.Function):
    """:func:`naive_merged_operator` in C++: its many small operations would take as long as dozens of steps."""

    @staticmethod
    def forward(ctx: Any, layout: _Layout, A: Tensor, B: Tensor, *parts: Tensor | None) -> Tensor:
        ctx.layout = layout
        ctx.save_for_backward(A, B, *parts)
        return torch.ops.lmu_hf.merged_operator(layout, A, B, *parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        A, B, *parts = ctx.saved_tensors
        grads = torch.ops.lmu_hf.merged_operator_backward(ctx.layout, grad.contiguous(), A, B, *parts)
        return None, None, None, *grads
