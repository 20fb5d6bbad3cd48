"""A recurrence without memory beside it, as one differentiable function with a backward pass of its own.

    sums[t] = [h[t-1], x[t], 1] M,      h[t] = what the cell makes of its sums

It serves hidden cells whose inputs are known, and small LMUs as recurrences of [m, h]. Where M is not large, the compiled loop
reads x itself and adds up the gradient of M while it goes back. Otherwise what x contributes to the sums comes first, and the
gradients of M last, as products for a segment of time: nothing as long as the sequence is written but the states and what the
cell keeps.

Names: B batch, T time, H size of the first state, I inputs, W width of a step's sums.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .compiled import MOST_NUMBERS, add_matmul, available, contiguous, empty, matmul, with_rows
from .gates import Pointwise
from .memory import wants_gradient
from .precision import full_float32
from .ragged import Trajectory
from .scan import scan_class
from .scratch import Scratch, arriving, before_each, first_derivative, gradients_of, known_sums, results_of
from .time_loop import State, TimeLoop, carried

# A segment has about so many rows, steps times batch, for its products to run at full speed, but no more numbers than stay in the
# cache; on CUDA what counts is how few kernels are launched.
_ROWS, _NUMBERS = 1 << 13, 1 << 20
_ROWS_CUDA, _NUMBERS_CUDA = 1 << 20, 1 << 25


def recurrent_scan(
    cell: Pointwise,
    given: Tensor,
    matrix: Tensor,
    states: State,
    *,
    constant: bool = False,
    alone: bool = True,
    last: bool = True,
) -> Trajectory:
    """Runs the recurrence. All tensors have one dtype, float32 or float64; there is no second derivative.

    Args:
        cell: what a step makes of its sums. With ``linear`` numbers of memory the first state is [m, h]; the sums then begin with
            the next m.
        given: x of all steps (B, T, I); or, where ``matrix`` has no rows for it, its part of the sums (B, T, W).
        matrix: M (H [+ I [+ 1]], W).
        states: hidden state tensors before the first step; the first is (B, H).
        constant: the last row of ``matrix`` is a bias, behind those for x.
        alone: where the first state is [m, h], h of each step is wanted by itself.
        last: the states after the last step are, too.

    Returns:
        The states. With ``alone`` h comes once more after those of each step, so that its gradient need not be filled up to that
        of [m, h].
    """
    given = with_rows(given)
    settings = _Settings(cell, constant, alone and cell.linear > 0, last, wants_gradient(given, matrix, *states))
    return Trajectory.of(_RecurrentScan.apply(settings, given, matrix, *states), len(states) * last)


class _Settings(NamedTuple):
    """What is no tensor; see :func:`recurrent_scan`."""

    cell: Pointwise
    constant: bool
    alone: bool
    last: bool
    backward: bool


class _Parts(NamedTuple):
    """The rows of M, or of its gradient: of h (H, W), of x (I, W) or None, and the bias (W,) or None."""

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, matrix: Tensor, size: int, *, constant: bool) -> _Parts:
        end = len(matrix) - constant
        return cls(matrix[:size], matrix[size:end] if end > size else None, matrix[-1] if constant else None)


class _RecurrentScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: _Settings, given: Tensor, matrix: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        cell, linear = settings.cell, settings.cell.linear
        states = tuple(state.contiguous() for state in states)
        kept = cell.allocate(states, given.shape[1], backward=settings.backward)
        if _in_one_call(given, matrix):
            alone = empty(matrix, *given.shape[:2], states[0].shape[1] - linear) if settings.alone else None
            torch.ops.lmu_hf.recurrent_forward(*cell, given, matrix, states, kept, alone)
        else:
            scan, parts = _prepare(settings, matrix, states, kept)
            scratch, width = Scratch(matrix), matrix.shape[1]
            for first, length in _segments(given, width):
                part = given[:, first : first + length]
                if parts.weight is not None:
                    known = scratch.take("known", len(part), length, width)
                    with full_float32(matrix) if linear else nullcontext():  # then it is part of the memory
                        part = known_sums(part, parts.weight, parts.bias, known)
                scan.forward(first, length, part, part[..., :0])
            alone = kept[0][..., linear:].clone(memory_format=torch.contiguous_format) if settings.alone else None
        ctx.save_for_backward(given, matrix, *states, *kept)
        ctx.settings, ctx.states, ctx.device_type = settings, len(states), matrix.device.type
        ctx.set_materialize_grads(False)
        return results_of(kept[: len(states)], *(() if alone is None else (alone,)), last=settings.last)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        return None, *_backward(ctx, grads)


def _backward(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    given, matrix, *rest = ctx.saved_tensors
    states, kept, settings = tuple(rest[: ctx.states]), tuple(rest[ctx.states :]), ctx.settings
    wants_given, wants_matrix = ctx.needs_input_grad[1:3]
    of_sequences, of_last = gradients_of(grads, states, last=settings.last)
    arrived = arriving(_joined(of_sequences, settings), states, kept)
    grad_given = empty(given, *given.shape) if wants_given else None
    grad_matrix = empty(matrix, *matrix.shape) if wants_matrix else None
    if _in_one_call(given, matrix):
        carries = carried(of_last, states)
        outer = [contiguous(grad) for grad in arrived]
        ways = (outer, carries[0], carries[-1], grad_given, grad_matrix)
        torch.ops.lmu_hf.recurrent_backward(*settings.cell, given, matrix, states, kept, *ways)
        return grad_given, grad_matrix, *carries
    scan, parts = _prepare(settings, matrix, states, kept)
    scan.start_backward(arrived, of_last)
    made = None if grad_matrix is None else _Parts.of(grad_matrix, states[0].shape[1], constant=settings.constant)
    scratch, width = Scratch(matrix), matrix.shape[1]
    segments = _segments(given, width)
    for first, length in reversed(segments):
        part = slice(first, first + length)
        # Where the inputs are the sums, the gradient of the sums is theirs.
        if grad_given is not None and parts.weight is None:
            grad = grad_given[:, part]
        else:
            grad = scratch.take("grad", len(given), length, width)
        scan.backward(first, length, grad[..., :0], grad)
        flat = grad.reshape(-1, width)
        if made is not None:
            beta = int((first, length) != segments[-1])  # what later segments have left counts, as in addmm
            before = before_each(states[0], kept[0], first, length)
            add_matmul(made.hidden, before.flatten(0, 1).mT, flat, beta=beta)
            if made.weight is not None:
                add_matmul(made.weight, given[:, part].flatten(0, 1).mT, flat, beta=beta)
            if made.bias is not None:
                torch.sum(flat, 0, out=made.bias) if not beta else made.bias.add_(flat.sum(0))
        if grad_given is not None and parts.weight is not None:
            grad_given[:, part] = matmul(flat, parts.weight.mT).view(len(given), length, -1)
    return grad_given, grad_matrix, *scan.initial_gradients()


def _in_one_call(given: Tensor, matrix: Tensor) -> bool:
    """Whether the compiled loop does all that belongs to the steps."""
    return matrix.numel() <= MOST_NUMBERS and available(matrix)


def _prepare(settings: _Settings, matrix: Tensor, states: State, kept: State) -> tuple[TimeLoop, _Parts]:
    parts = _Parts.of(matrix, states[0].shape[1], constant=settings.constant)
    made = scan_class(matrix, special=settings.cell.linear > 0)
    return made(settings.cell, parts.hidden, 1, 0, states, kept), parts


def _segments(given: Tensor, width: int) -> list[tuple[int, int]]:
    """First step and number of steps of each segment."""
    batch, steps = given.shape[:2]
    rows, numbers = (_ROWS_CUDA, _NUMBERS_CUDA) if given.is_cuda else (_ROWS, _NUMBERS)
    longest = max(min(rows // batch, numbers // (batch * width)), 16)
    return [(first, min(longest, steps - first)) for first in range(0, steps, longest)]


def _joined(grads: tuple[Tensor | None, ...], settings: _Settings) -> tuple[Tensor | None, ...]:
    """The gradients of the states alone: where the first is [m, h], with that of h, which came once more."""
    if not settings.alone:
        return grads
    first, *others, alone = grads
    if alone is not None:
        # m may be left out: nothing reaches it then.
        first = alone if first is None else first + F.pad(alone, (settings.cell.linear, 0))
    return first, *others
