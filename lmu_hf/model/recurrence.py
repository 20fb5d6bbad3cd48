"""The recurrences that cannot be written as one filter, step by step.

:func:`naive_recurrence` is the whole layer as the 2019 paper defines it, one call of the cell per step. It serves the
coupled layers (``hidden_to_memory`` or ``memory_to_memory``: the memory's input depends on the state) and is the
reference for everything else. :func:`naive_scan` runs a hidden cell alone over inputs that are known in advance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .state import Dropout, LMUState

if TYPE_CHECKING:
    from .legendre import DelaySystem
    from .lmu_cell import LMUCell

State = tuple[Tensor, ...]


def naive_recurrence(
    cell: LMUCell,
    x: Tensor,
    state: LMUState,
    lengths: Tensor | None,
    system: DelaySystem,
    dropout: Dropout,
    *,
    return_sequence: bool,
) -> tuple[Tensor, LMUState]:
    """Runs an LMU cell over a sequence.

    Args:
        cell: the cell.
        x: inputs (B, T, input_size), valid steps first.
        state: the state before the first step.
        lengths: number of valid steps per row (B,), or None for all. Later steps change nothing.
        system: the delay system of this run.
        dropout: the dropout masks of these sequences.
        return_sequence: return the outputs of all steps rather than the last valid one.

    Returns:
        Outputs (B, T, output_size), zero past a row's length, or the last valid one (B, output_size), zero in rows without
        valid steps; and the state after each row's last valid step.
    """

    def step(t: int, flat: State) -> tuple[Tensor, State]:
        output, new_state = cell.step(x[:, t], LMUState.of(flat), system, dropout)
        return output, new_state.tensors()

    output, flat = _loop(step, x.shape[1], state.tensors(), lengths, return_sequence)
    return output, LMUState.of(flat)


def naive_scan(
    cell: nn.Module, z: Tensor, state: State, lengths: Tensor | None, *, return_sequence: bool
) -> tuple[Tensor, State]:
    """Runs a hidden cell over inputs ``z`` (B, T, features). Otherwise like :func:`naive_recurrence`."""
    return _loop(lambda t, state: cell(z[:, t], state), z.shape[1], state, lengths, return_sequence)


def _loop(
    step: Callable[[int, State], tuple[Tensor, State]],
    steps: int,
    state: State,
    lengths: Tensor | None,
    return_sequence: bool,
) -> tuple[Tensor, State]:
    outputs: list[Tensor] = []
    last: Tensor | None = None
    for t in range(steps):
        output, new_state = step(t, state)
        if lengths is not None:
            valid = (t < lengths)[:, None]
            previous = torch.zeros_like(output) if return_sequence or last is None else last
            output = torch.where(valid, output, previous)
            new_state = tuple(
                torch.where(valid.view(-1, *[1] * (new.ndim - 1)), new, old)
                for new, old in zip(new_state, state, strict=True)
            )
        state, last = new_state, output
        if return_sequence:
            outputs.append(output)
    assert last is not None
    return (torch.stack(outputs, dim=1) if return_sequence else last), state
