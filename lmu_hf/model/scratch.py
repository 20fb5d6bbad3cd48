"""What surrounds the time loops of :mod:`recurrent_scan` and :mod:`chunked_scan`: memory for one segment of time after the other,
and what of the whole sequence a segment needs.

Names: B batch, T time, L steps of a segment, I inputs, W width of a step's sums, H hidden size.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
            part = self.parts[name] = self.like.new_empty(size)
        return part[:size].view(shape)


def known_sums(
    given: Tensor | None, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, int, int], scratch: Scratch
) -> Tensor:
    """What the inputs of a segment (B, L, I) contribute to its sums (B, L, W), by a weight (I, W); without one, they are it."""
    if given is not None and weight is None:
        return given  # only read
    known = scratch.take("known", *shape)
    if given is None or weight is None:
        return known.zero_() if bias is None else known.copy_(bias.expand(shape))
    flat = known.view(-1, shape[2])
    if bias is None:
        torch.mm(given.reshape(len(flat), -1), weight, out=flat)
    else:
        torch.addmm(bias, given.reshape(len(flat), -1), weight, out=flat)
    return known


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


def arriving(grads: tuple[Tensor | None, ...], sequences: State) -> State:
    """What :meth:`TimeLoop.start_backward` receives: of no features where there is no gradient."""
    return tuple(state[..., :0] if grad is None else grad for grad, state in zip(grads, sequences, strict=False))
