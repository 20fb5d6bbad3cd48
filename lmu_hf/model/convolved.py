"""A recurrent cell behind a memory that begins empty and whose input is known, as one differentiable function.

What the memory contributes to the gates of all steps is a convolution, see :mod:`convolution`; then comes the time loop of
:mod:`scan`. Rows never meet in either, so some at a time go through both: their sums, as long as the sequence, and the gradients
of these exist for them only, and stay in the cache between convolution and loop.

Names: B batch, T time, D memory dimensions, H hidden size, G gates, I inputs.
"""

from typing import Any

import torch
from torch import Tensor

from .compiled import add_matmul, empty, gradient_of, matmul, zeros
from .convolution import convolve, convolve_back
from .gates import Pointwise
from .memory import wants_gradient
from .ragged import Trajectory
from .scan import scan_class
from .scratch import arriving, first_derivative, gradients_of, known_sums, results_of
from .time_loop import State, TimeLoop

# Numbers of the sums of some rows, which a cache that threads share is to hold. But rows enough for full products, or, where that
# is most of the batch, at least for half of their speed.
_NUMBERS = 1 << 22
_ROWS, _FEW_ROWS = 12, 4  # per thread


def convolved_scan(
    cell: Pointwise,
    given: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    u: Tensor,
    kernel: Tensor,
    hidden_weight: Tensor,
    states: State,
    *,
    last: bool = True,
) -> Trajectory:
    """Runs the recurrence. All tensors have one dtype, float32 or float64; there is no second derivative.

    Args:
        cell: what a step makes of its gates.
        given: what goes to the gates beside the memory (B, T, I), or None.
        weight: its way there (I, G), or None.
        bias: (G,) or None.
        u: the memory's input (B, T, D).
        kernel: what the gates receive of an impulse, by memory dimension and lag (D, T, G).
        hidden_weight: h -> gates (H, G).
        states: hidden state tensors before the first step, (B, H) each.
        last: the states after the last step are wanted by themselves.

    Returns:
        The hidden states.
    """
    inputs = (given, weight, bias, u, kernel, hidden_weight, *states)
    return Trajectory.of(_ConvolvedScan.apply(cell, last, wants_gradient(*inputs), *inputs), len(states) * last)


class _ConvolvedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cell: Pointwise, last: bool, wanted: bool, *inputs: Any) -> tuple[Tensor, ...]:
        given, weight, bias, u, kernel, hidden_weight, *states = inputs
        kept = cell.allocate(tuple(states), u.shape[1], backward=wanted)
        width = hidden_weight.shape[1]
        convolution = convolve(kernel)
        sums: Any = None
        for rows in _tiles(u, width):
            sums = _room(sums, u[rows], width)
            known_sums(None if given is None else given[rows], weight, bias, sums)
            convolution(u[rows], sums)
            loop = _loop(cell, hidden_weight, states, kept, rows)
            loop.forward(0, u.shape[1], sums, sums[..., :0])
        ctx.save_for_backward(*inputs, *kept)
        ctx.cell, ctx.last, ctx.states, ctx.device_type = cell, last, len(states), u.device.type
        ctx.set_materialize_grads(False)
        return results_of(kept[: len(states)], last=last)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, None, *_backward(ctx, grads)


def _backward(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    given, weight, bias, u, kernel, hidden_weight, *rest = ctx.saved_tensors
    states, kept = rest[: ctx.states], tuple(rest[ctx.states :])
    names = ("given", "weight", "bias", "u", "kernel", "hidden_weight")
    wanted = dict(zip(names, ctx.needs_input_grad[3:], strict=False))
    steps, width = u.shape[1], hidden_weight.shape[1]
    # Those that are added to begin with zeros; that of the largest matrix is written by its first product.
    made = {
        "given": empty(given, *given.shape) if wanted["given"] else None,
        **{
            name: zeros(tensor, *tensor.shape) if wanted[name] else None
            for name, tensor in (
                ("weight", weight),
                ("bias", bias),
                ("u", u),
                ("kernel", kernel),
            )
        },
        "hidden_weight": gradient_of(hidden_weight) if wanted["hidden_weight"] else None,
    }
    correlation = convolve_back(kernel)
    of_states: list[State] = []
    sums: Any = None
    for rows in _tiles(u, width):
        sums = _room(sums, u[rows], width)
        loop = _loop(ctx.cell, hidden_weight, states, kept, rows)
        of_rows = tuple(None if grad is None else grad[rows] for grad in grads)
        of_sequences, of_last = gradients_of(of_rows, states, last=ctx.last)
        loop.start_backward(arriving(of_sequences, states, tuple(tensor[rows] for tensor in kept)), of_last)
        loop.backward(0, steps, sums[..., :0], sums)
        of_states.append(loop.initial_gradients())
        flat = sums.view(-1, width)
        if made["given"] is not None:
            matmul(flat, weight.mT, made["given"][rows].view(len(flat), -1))
        if made["weight"] is not None:
            add_matmul(made["weight"], given[rows].reshape(len(flat), -1).mT, flat)
        if made["bias"] is not None:
            made["bias"] += flat.sum(0)
        if made["u"] is not None or made["kernel"] is not None:
            correlation(u[rows], sums, None if made["u"] is None else made["u"][rows], made["kernel"])
        if made["hidden_weight"] is not None:
            # Against the h before each step. All rows in one product: only their first steps do not follow in it.
            add_matmul(made["hidden_weight"], states[0][rows].mT, sums[:, 0], beta=int(rows.start > 0))
            sums[:, 0] = 0
            add_matmul(made["hidden_weight"], kept[0][rows].view(len(flat), -1)[:-1].mT, flat[1:])
    return *(made[name] for name in names), *(torch.cat(parts) for parts in zip(*of_states, strict=True))


def _tiles(u: Tensor, width: int) -> list[slice]:
    """Which rows go together."""
    batch, threads = len(u), torch.get_num_threads()
    if u.is_cuda:
        return [slice(0, batch)]
    least = min(_ROWS * threads, max(_FEW_ROWS * threads, batch // 4))
    count = -(-batch // max(_NUMBERS // (u.shape[1] * width), least))
    size = -(-batch // count)
    return [slice(first, min(first + size, batch)) for first in range(0, batch, size)]


def _room(sums: Tensor | None, u: Tensor, width: int) -> Tensor:
    """(B, T, G) for these rows, which the ones after them use again."""
    return empty(u, *u.shape[:2], width) if sums is None else sums[: len(u)]


def _loop(cell: Pointwise, hidden_weight: Tensor, states: Any, kept: State, rows: slice) -> TimeLoop:
    own = tuple(state[rows] for state in states), tuple(tensor[rows] for tensor in kept)
    return scan_class(hidden_weight)(cell, hidden_weight, 1, 0, *own)
