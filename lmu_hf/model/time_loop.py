"""The chunks of a segment whose state is fed back into the memory: one after the other, as each starts where the last one ended.

The parts of a chunk are described in :mod:`lookahead`; here is the loop over chunks, forwards and backwards. Every time loop of
:mod:`scan` inherits it. The compiled one does the whole segment in one call instead: with few rows the calls that surround the
steps of a chunk would take longer than the steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .folding import ChunkOperators
from .memory import fold_rows, fold_state, unfold_rows, unfold_state
from .precision import full_float32


class Feedback:
    """A time loop with the segments that its chunks make. Subclasses do the steps; see :class:`scan.NaiveScan`."""

    kept: Sequence[Tensor]

    def forward(self, first: int, count: int, known: Tensor, u: Tensor) -> None:
        """The steps of a chunk."""
        raise NotImplementedError

    def backward(self, first: int, count: int, grad_u: Tensor, grad_sums: Tensor) -> None:
        """Their adjoint."""
        raise NotImplementedError

    def feedback_forward(
        self, first: int, known: Tensor, u: Tensor, starts: Tensor, memory: Tensor, operators: ChunkOperators
    ) -> Tensor:
        """Runs the chunks of a segment, after those before it.

        Args:
            first: the first step of the segment.
            known: what the inputs contribute to the sums (B, L, W), L a multiple of C; overwritten.
            u: where the memory's input goes (B, K * C, D), all K chunks of the sequence.
            starts: where the memory at the start of each chunk goes (B, K, D * N).
            memory: m before the segment (B, D, N).
            operators: the matrices of a chunk.

        Returns:
            m at the start of the segment's last chunk, or, if it is not the last of the sequence, at its end.
        """
        assert operators.fold is not None
        chunk, steps, batch = operators.chunk, self.kept[0].shape[1], len(known)
        for at in range(first, first + known.shape[1], chunk):
            starts[:, at // chunk] = memory.flatten(1)
            part = known[:, at - first : at - first + chunk]
            with full_float32(known):
                part.view(batch, -1).addmm_(starts[:, at // chunk], operators.fold)
            self.forward(at, min(chunk, steps - at), part, u)
            if at + chunk < u.shape[1]:
                memory = advance(memory, u[:, at : at + chunk], operators)
        return memory

    def feedback_backward(
        self,
        first: int,
        grad_u: Tensor,
        grad_sums: Tensor,
        grad_starts: Tensor | None,
        arrived: Tensor,
        operators: ChunkOperators,
    ) -> None:
        """The adjoint of :meth:`feedback_forward`, but for the gradients of the operators; segments come last to first.

        Args:
            first: the first step of the segment.
            grad_u: gradients that reach u from elsewhere (B, K * C, D), all chunks of the sequence; overwritten.
            grad_sums: where the gradients of the sums of this segment go (B, L, W).
            grad_starts: gradients that reach ``starts`` from elsewhere (B, K, D * N), all chunks of the sequence, or None.
            arrived: where the gradients of the memory at the start of each chunk of this segment go (B, L / C + 1, D * N); its
                last place holds that of the memory after them.
            operators: the matrices of a chunk.
        """
        (power, response), fold = operators.advance, operators.fold
        assert fold is not None
        chunk, steps, batch = operators.chunk, self.kept[0].shape[1], len(grad_u)
        for index in reversed(range(arrived.shape[1] - 1)):
            at = first + index * chunk
            # What the memory at the end of the chunk sends back, to the u of the chunk and to the memory at its start.
            after = arrived[:, index + 1].unflatten(1, (grad_u.shape[2], -1))
            rows = fold_state(after, len(power))
            arriving = grad_u[:, at : at + chunk]
            with full_float32(power):
                arriving += unfold_rows(rows @ response.mT, batch)
                start = unfold_state(rows @ power, after.shape).flatten(1)
            part = grad_sums[:, at - first : at - first + chunk]
            self.backward(at, min(chunk, steps - at), arriving, part)
            with full_float32(power):
                start.addmm_(part.view(batch, -1), fold.mT)
            arrived[:, index] = start if grad_starts is None else start + grad_starts[:, at // chunk]


def advance(memory: Tensor, u: Tensor, operators: ChunkOperators) -> Tensor:
    """The memory a chunk later: m (B, D, N), u (B, C, D)."""
    power, response = operators.advance
    with full_float32(memory):
        driven = fold_rows(u, len(power)) @ response
        return unfold_state(torch.baddbmm(driven, fold_state(memory, len(power)), power.mT), memory.shape)
