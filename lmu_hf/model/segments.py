"""Training over sequences whose activations do not fit into memory: only the states between segments of time are kept.

Backwards each segment is computed again from the state that it began with (Chen et al. 2016, arXiv:1604.06174), so that what a
layer keeps of a segment exists for one segment at a time. It costs one more forward pass.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .state import LMUState

Run = Callable[[Tensor, LMUState, Tensor | None], tuple[Tensor, LMUState]]


def in_segments(
    run: Run, x: Tensor, state: LMUState, lengths: Tensor | None, steps: int, *, return_sequence: bool
) -> tuple[Tensor, LMUState]:
    """Calls ``run`` for ``steps`` time steps after the other, each in a checkpoint of its own.

    Args:
        run: (x (B, C, input_size), state before it, lengths (B,) or None) -> outputs and the state after each row's last valid
            step. A row without valid steps keeps its state.
        x: inputs (B, T, input_size), valid steps first.
        state: the state before the first step.
        lengths: number of valid steps per row (B,), or None for all.
        steps: steps per segment C.
        return_sequence: ``run`` returns the outputs of all steps (B, C, output_size) rather than the last valid one.

    Returns:
        What one call of ``run`` with all of it would return.
    """
    outputs: list[Tensor] = []
    for first in range(0, x.shape[1], steps):
        part = x[:, first : first + steps]
        own = None if lengths is None else (lengths - first).clamp(0, part.shape[1])
        output, state = checkpoint(run, part, state, own, use_reentrant=False)
        if outputs and not return_sequence:
            # A row that ended before this segment keeps the output that it had.
            output = output if lengths is None else torch.where((lengths > first)[:, None], output, outputs[0])
            outputs = []
        outputs.append(output)
    return torch.cat(outputs, dim=1) if return_sequence else outputs[0], state
