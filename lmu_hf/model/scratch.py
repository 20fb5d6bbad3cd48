"""What surrounds the time loops of :mod:`recurrent_scan`, :mod:`chunked_scan`, :mod:`convolved` and :mod:`relaxed`: memory for
one segment of time after the other, what of the whole sequence a segment needs, and what holds for each backward pass.

Names: B batch, T time, L steps of a segment, I inputs, W width of a step's sums, H hidden size.
"""

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .compiled import add_matmul, empty, matmul
from .time_loop import State


class Scratch:
    """Memory that one segment after the other uses: taken anew each time, it would cost more than the products in it."""

    def __init__(self, like: Tensor):
        self.like, self.parts = like, {}  # type: ignore[var-annotated]

    def take(self, name: str, *shape: int) -> Tensor:
        """Numbers of this shape, not initialised, valid until the next call with this name."""
        size = math.prod(shape)
        part = self.parts.get(name)
        if part is None or part.numel() < size:
            part = self.parts[name] = empty(self.like, size)
        return part[:size].view(shape)


def first_derivative(backward: Callable) -> Callable:
    """The backward pass of an autograd function that cannot be differentiated again, run as its forward pass, whoever calls it:
    without autocast on ``ctx.device_type``."""

    @wraps(backward)
    def checked(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "this recurrence has no second derivative; set algorithm='naive' on the layer for create_graph=True"
            )
        with torch.autocast(ctx.device_type, enabled=False):
            return backward(ctx, *grads)

    return checked


def known_sums(given: Tensor | None, weight: Tensor | None, bias: Tensor | None, out: Tensor) -> Tensor:
    """Writes to ``out`` (B, L, W), and returns, what inputs (B, L, I) contribute to sums by a weight (I, W), and a bias (W,)."""
    if given is None or weight is None:
        return out.zero_() if bias is None else out.copy_(bias)
    flat, inputs = out.view(-1, out.shape[2]), given.reshape(-1, given.shape[2])
    if bias is None:
        matmul(inputs, weight, flat)
    else:
        add_matmul(flat.copy_(bias), inputs, weight)
    return out


def of_steps(tensor: Any, first: int, length: int) -> Any:
    """The steps of a segment of (B, T, ...), filled up with zeros past the end."""
    if tensor is None:
        return None
    part = tensor[:, first : first + length]
    missing = length - part.shape[1]
    return F.pad(part, (0, 0, 0, missing)) if missing else part


def before_each(initial: Tensor, hidden: Tensor, first: int, length: int) -> Tensor:
    """The hidden state before each step of a segment (B, L, H), zero past the end."""
    before = of_steps(hidden, max(first - 1, 0), length - (first == 0))
    return before if first else torch.cat([initial[:, None], before], dim=1)


def add_step_gradient(total: Tensor, grad: Tensor, u: Tensor | None, before: Tensor, chunk: int, beta: int) -> None:
    """Adds a segment's part of the gradient of the step matrix to ``beta`` times what there is: grad (B * length, W), u
    (B, length, D), before (B, length, H)."""
    of_u = len(total) - before.shape[2]
    add_matmul(total[of_u:], before.flatten(0, 1).mT, grad, beta=beta)
    if u is None or not of_u:
        return
    dims = u.shape[2]
    if dims >= chunk:
        inputs, by_chunk = u.reshape(-1, chunk * dims), grad.unflatten(0, (-1, chunk))
        if not beta:
            total[:of_u] = 0
        for j in range(1, chunk):
            add_matmul(total[of_u - j * dims : of_u], inputs[:, : j * dims].mT, by_chunk[:, j])
        return
    # The u of each lag, none before the chunk: windows over these few numbers spare a product for each step of a chunk.
    by_chunk = F.pad(u.unflatten(1, (-1, chunk)), (0, 0, chunk - 1, 0))
    lags = by_chunk.unfold(2, chunk - 1, 1)[:, :, :chunk].mT.reshape(len(grad), -1)
    add_matmul(total[:of_u], lags.mT, grad, beta=beta)


def results_of(sequences: State, *others: Tensor, last: bool) -> State:
    """State sequences (B, T, H) and others, and, if it is wanted, what the former end with, (B, H) each: copies, as whoever keeps
    a state must not keep the sequence."""
    return *sequences, *others, *(sequence[:, -1].clone() for sequence in sequences if last)


def gradients_of(
    grads: Sequence[Tensor | None], states: Sequence[Tensor], *, last: bool
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """The gradients of what :func:`results_of` returned: of sequences and others, and of the states after the last step."""
    cut = len(grads) - len(states) * last
    return tuple(grads[:cut]), tuple(grads[cut:]) or (None,) * len(states)


def arriving(grads: Sequence[Tensor | None], states: Sequence[Tensor], sequences: State) -> State:
    """The gradients of the sequences of these states as :meth:`TimeLoop.start_backward` receives them: of no features where there
    is none."""
    pairs = zip(grads[: len(states)], sequences, strict=False)
    return tuple(sequence[..., :0] if grad is None else grad for grad, sequence in pairs)
