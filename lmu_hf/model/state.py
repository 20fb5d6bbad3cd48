"""What an LMU carries from step to step."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LMUState(NamedTuple):
    """The state of an LMU between two steps.

    Attributes:
        memory: Legendre coefficients (batch, memory_d, order), float32 or float64.
        hidden: state tensors (batch, size) of the hidden cell; the first is its output. Empty without a hidden cell.
    """

    memory: Tensor
    hidden: tuple[Tensor, ...] = ()

    def tensors(self) -> tuple[Tensor, ...]:
        """[m, hidden states...], as the reference implementation orders them."""
        return (self.memory, *self.hidden)

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...]) -> "LMUState":
        """The inverse of :meth:`tensors`."""
        return cls(tensors[0], tuple(tensors[1:]))


class BidirectionalState(NamedTuple):
    """The states of both directions of a bidirectional LMU.

    Attributes:
        forward: state after the last step.
        backward: state after the first step, reached last by the direction that runs from the end.
    """

    forward: LMUState
    backward: LMUState


class Dropout(NamedTuple):
    """Inverted dropout masks, constant over a sequence: of the encoder's input (B, enc_d), of m (B, memory_d * order)."""

    encoder: Tensor | None = None
    recurrent: Tensor | None = None


def forget_(tensors: tuple[Tensor, ...], rows: Tensor | Sequence[int]) -> None:
    """Zeroes the given rows of state tensors in place.

    Args:
        tensors: (batch, ...) each.
        rows: an index or boolean tensor or list.

    Raises:
        ValueError: ``rows`` are neither whole numbers nor booleans.
    """
    index = torch.as_tensor(rows, device=tensors[0].device)
    if index.is_floating_point():
        raise ValueError(f"rows: expected row numbers or a boolean per row, found {rows!r}")
    for tensor in tensors:
        tensor[index] = 0
