"""Adversarial training: the loss of each batch, and that of the same rows moved a little to where it grows fastest.

After Goodfellow, Shlens & Szegedy, "Explaining and Harnessing Adversarial Examples" (ICLR 2015), with steps of equal length
(Miyato, Dai & Goodfellow, ICLR 2017) rather than of equal change per number: x' = x + r g / |g|, g the gradient of the loss
with respect to the row x. It is the strongest regularizer known where nothing can be said about which changes of an input are
harmless, as for pixels in a random order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from .errors import InputError

SIGNAL = "input_values"


@dataclass
class LMUTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments and what :class:`lmu_hf.trainer.LMUTrainer` can do beside.

    Raises:
        ValueError: a value is out of its range, or two exclude each other.
    """

    adversarial_radius: float = field(
        default=0.0,
        metadata={"help": "Length of the step by which each row is moved, in the units of the inputs; 0: not at all."},
    )
    adversarial_weight: float = field(
        default=0.5, metadata={"help": "Share of the loss of the moved rows in the whole, in (0, 1]; 1: of these alone."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        radius, weight = self.adversarial_radius, self.adversarial_weight
        if not 0 <= radius < math.inf:
            raise ValueError(f"adversarial_radius: expected a number >= 0, found {radius!r}")
        if not 0 < weight <= 1:
            raise ValueError(f"adversarial_weight: expected a number in (0, 1], found {weight!r}")
        if radius and self.torch_compile:
            raise ValueError(
                "adversarial_radius: goes back through the same graph twice, which compiled models do not keep; leave out "
                "torch_compile"
            )


def signal_of(inputs: dict[str, Any]) -> Tensor:
    """The part of a batch that is moved.

    Raises:
        InputError: the batch holds tokens, which cannot be moved a little.
    """
    if not isinstance(signal := inputs.get(SIGNAL), Tensor):
        raise InputError(
            f"training.adversarial_radius: expected signals ({SIGNAL}), found {sorted(inputs)}; tokens cannot be moved, leave it "
            "out"
        )
    return signal


def steepest_step(loss: Tensor, signal: Tensor, radius: float, keep_graph: bool) -> Tensor:
    """The step of each row along the gradient of the loss.

    Args:
        loss: of the batch, or one per device.
        signal: what it was computed from (batch, ...), with gradients.
        radius: length of the step over all numbers of a row (L2), in the units of ``signal``.
        keep_graph: the loss will be differentiated once more.

    Returns:
        Of the shape of ``signal``; zero for a row without gradient, and where a row is padded.
    """
    (gradient,) = torch.autograd.grad(loss.sum(), signal, retain_graph=keep_graph)
    # By the largest number first: the squares of the gradients of rows that are already right would underflow.
    largest = gradient.flatten(1).abs().amax(1).clamp(min=torch.finfo(gradient.dtype).tiny)
    gradient = gradient / largest.view(-1, *[1] * (gradient.ndim - 1))
    length = gradient.flatten(1).norm(dim=1).clamp(min=torch.finfo(gradient.dtype).tiny)
    return gradient * (radius / length).view(-1, *[1] * (gradient.ndim - 1))
