"""What the time loops of :mod:`scan` have in common: what they are made of, and the segments that their chunks make.

The parts of a chunk are described in :mod:`lookahead`. Where the state is fed back into the memory, its chunks come one after the
other, as each starts where the last one ended; here is the loop over them, forwards and backwards. The compiled time loop does a
whole segment in one call instead: with few rows the calls that surround the steps of a chunk would take longer than the steps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .by_system import (
    chain,
    fold_rows,
    fold_sequence,
    fold_state,
    product,
    starts_at_once,
    unfold_rows,
    unfold_sequence,
    unfold_state,
)
from .compiled import add_matmul, matmul
from .folding import ChunkOperators
from .gates import Pointwise
from .precision import full_float32

State = tuple[Tensor, ...]


class Encoding(NamedTuple):
    """How u comes of the state before it where it is no linear function of it, or not the same one in each row.

    Attributes:
        encoder: h -> u (H, D).
        direct: u -> the gates of its own step (D, G).
        mask: what multiplies h on its way to u (B, H), or None.
        activation: of u, a key of ``GATES`` with f' known from f.
        u: the u of all steps (B, T, D), as the steps compute it.
    """

    encoder: Tensor
    direct: Tensor
    mask: Tensor | None
    activation: str
    u: Tensor


class TimeLoop:
    """The steps of the chunks of one sequence. An object goes one way, forwards or backwards; subclasses do the steps.

    Args:
        cell: what a step makes of its sums.
        step: [u of the chunk so far, h] -> sums, ((C - 1) * D + H, W).
        chunk: steps per chunk C.
        dims: D, 0 for a loop without memory.
        states: hidden state tensors before the first step, (B, H) each.
        kept: what ``cell.allocate`` made.
        encoding: how u comes of h, where ``step`` does not say it.
    """

    language: str

    def __init__(
        self,
        cell: Pointwise,
        step: Tensor,
        chunk: int,
        dims: int,
        states: State,
        kept: State,
        *,
        encoding: Encoding | None = None,
    ):
        self.cell, self.step, self.chunk, self.dims = cell, step, chunk, dims
        self.states, self.kept, self.encoding = states, kept, encoding

    def forward(self, first: int, count: int, known: Tensor, u: Tensor) -> None:
        """Runs ``count`` steps from step ``first`` on; calls go on where the one before ended.

        Args:
            first: the first step; with D > 0, where a chunk starts.
            count: number of steps; with D > 0, at most C.
            known: what is known of their sums in advance (B, count or more, W).
            u: where their u goes, (B, T, D); hidden states go to ``kept``.
        """
        raise NotImplementedError

    def start_backward(self, grads: State, last: Sequence[Tensor | None]) -> None:
        """Receives what reaches the states from outside, before the first call of :meth:`backward`.

        Args:
            grads: gradients of the state sequences, (B, T, H) each. Their first features may be missing, which says that nothing
                reaches these: all, or those of m where the first state is [m, h].
            last: gradients of the states after the last step, (B, H) each, or None; see :func:`carried`.
        """
        raise NotImplementedError

    def backward(self, first: int, count: int, grad_u: Tensor, grad_sums: Tensor) -> None:
        """The adjoint of :meth:`forward`; calls come last to first.

        Args:
            first: the first step.
            count: number of steps.
            grad_u: gradients that reach the u of these steps from elsewhere (B, count or more, D); overwritten.
            grad_sums: where the gradients of the sums of these steps go (B, count or more, W).
        """
        raise NotImplementedError

    def initial_gradients(self) -> State:
        """Gradients of the initial states, after the last :meth:`backward`."""
        raise NotImplementedError

    def folded_forward(self, first: int, count: int, known: Tensor, starts: Tensor, operators: ChunkOperators) -> None:
        """Runs steps whose u is known in advance, of a loop without memory, for which it is folded into their sums.

        Args:
            first: the first step, where a chunk starts.
            count: number of steps.
            known: what inputs and u contribute to the sums (B, L, W), L a multiple of C; overwritten.
            starts: the memory at the start of each of these chunks (B, L / C, D * N).
            operators: the matrices of a chunk.
        """
        assert operators.fold is not None
        with full_float32(known):
            add_matmul(known.view(starts.shape[:2].numel(), -1), starts.flatten(0, 1), operators.fold)
        self.forward(first, count, known, known[..., :0])

    def folded_backward(
        self, first: int, count: int, grad_sums: Tensor, to_starts: Tensor, operators: ChunkOperators
    ) -> None:
        """The adjoint of :meth:`folded_forward`, but for the gradients of the operators; calls come last to first.

        Args:
            first: the first step.
            count: number of steps.
            grad_sums: where the gradients of the sums go (B, L, W), zero past ``count``.
            to_starts: where those of ``starts`` go (B, L / C, D * N).
            operators: the matrices of a chunk.
        """
        assert operators.fold is not None
        self.backward(first, count, grad_sums[..., :0], grad_sums)
        with full_float32(grad_sums):
            matmul(grad_sums.view(to_starts.shape[:2].numel(), -1), operators.fold.mT, to_starts.flatten(0, 1))

    def reads(self, given: Tensor, weight: Tensor, bias: Tensor | None, operators: ChunkOperators) -> bool:
        """Asks :meth:`feedback_forward` to compute by itself what the inputs contribute to the sums; returns whether it will.

        Args:
            given: inputs of all steps (B, T, I), with contiguous features.
            weight: (I, W).
            bias: (W,) or None.
            operators: the matrices of a chunk.
        """
        return False

    def adds_up(
        self,
        given: Tensor,
        weight: Tensor,
        u: Tensor,
        grad_given: Tensor | None,
        grad_matrix: Tensor | None,
        operators: ChunkOperators,
    ) -> bool:
        """Asks :meth:`feedback_backward` for the gradients of inputs, step matrix, weight and bias; returns whether it will.

        Args:
            given: as above.
            weight: as above.
            u: the memory's input (B, K * C, D).
            grad_given: where the gradient of ``given`` goes, or None.
            grad_matrix: to what those of [step, weight, bias if there is one], one below the other, are added, or None.
            operators: as above.
        """
        return False

    def feedback_forward(
        self, first: int, known: Tensor, u: Tensor, starts: Tensor, memory: Tensor, operators: ChunkOperators
    ) -> Tensor:
        """Runs the chunks of a segment, after those before it.

        Args:
            first: the first step of the segment.
            known: what the inputs contribute to the sums (B, L, W), L a multiple of C; overwritten. Without features where the
                loop :meth:`reads` them.
            u: where the memory's input goes (B, K * C, D), all K chunks of the sequence.
            starts: where the memory at the start of each chunk goes (B, K, D * N).
            memory: m before the segment (B, D, N).
            operators: the matrices of a chunk.

        Returns:
            m at the start of the segment's last chunk, or, if it is not the last of the sequence, at its end.
        """
        assert operators.fold is not None
        chunk, steps, batch = operators.chunk, self.kept[0].shape[1], len(known)
        begun = starts.unbind(1)
        if first == 0:
            begun[0].copy_(memory.flatten(1))
        for at, part in zip(range(first, steps, chunk), known.unflatten(1, (-1, chunk)).unbind(1), strict=False):
            index = at // chunk
            with full_float32(known):
                part.view(batch, -1).addmm_(begun[index], operators.fold)
            after = begun[index + 1] if at + chunk < steps else None
            memory = self.chunk_forward(at, part, u, memory, begun[index], after, operators)
        return memory

    def chunk_forward(
        self,
        first: int,
        known: Tensor,
        u: Tensor,
        memory: Tensor,
        start: Tensor,
        after: Tensor | None,
        operators: ChunkOperators,
    ) -> Tensor:
        """The steps of one chunk of :meth:`feedback_forward`, and the way of the memory to the next.

        Args:
            first: the first step of the chunk.
            known: what the inputs and the memory contribute to the sums (B, C, W).
            u: where the memory's input goes (B, K * C, D), all chunks of the sequence.
            memory: m before the chunk (B, D, N).
            start: the same where the starts of the chunks lie (B, D * N).
            after: where m after the chunk goes (B, D * N); None if there is no chunk after it.
            operators: the matrices of a chunk.

        Returns:
            m after the chunk (B, D, N); without ``after``, m before it.
        """
        self.forward(first, min(self.chunk, self.kept[0].shape[1] - first), known, u)
        if after is None:
            return memory
        memory = advance(memory, u[:, first : first + self.chunk], operators)
        after.copy_(memory.flatten(1))
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
        assert operators.fold is not None
        chunk, batch, fold = operators.chunk, len(grad_u), operators.fold.mT
        places, parts = arrived.unbind(1), grad_sums.unflatten(1, (-1, chunk)).unbind(1)
        inputs = grad_u.unflatten(1, (-1, chunk)).unbind(1)
        after = places[-1]
        for index, part in reversed(list(enumerate(parts))):
            at, place = first + index * chunk, places[index]
            after = self.chunk_backward(at, inputs[at // chunk], part, after, place, operators)
            with full_float32(fold):
                after.addmm_(part.view(batch, -1), fold)
            if grad_starts is not None:
                after += grad_starts[:, at // chunk]
            place.copy_(after)  # nothing, if it is there

    def chunk_backward(
        self, first: int, grad_u: Tensor, grad_sums: Tensor, after: Tensor, place: Tensor, operators: ChunkOperators
    ) -> Tensor:
        """The adjoint of :meth:`chunk_forward`.

        Args:
            first: the first step of the chunk.
            grad_u: gradients that reach the u of the chunk from elsewhere (B, C, D); overwritten.
            grad_sums: where the gradients of the sums of its steps go (B, C, W).
            after: gradient of the memory after the chunk (B, D * N).
            place: where that of the memory before it may be returned (B, D * N).
            operators: the matrices of a chunk.

        Returns:
            What reaches the memory before the chunk from that after it (B, D * N).
        """
        # What the memory at the end of the chunk sends back, to the u of the chunk and to the memory at its start.
        power, response = operators.advance
        rows = fold_state(after.view(*grad_u.shape[::2], -1), len(power))
        with full_float32(power):
            grad_u += unfold_rows(product(rows, response.mT), len(grad_u))
            before = unfold_state(product(rows, power), grad_u.shape).flatten(1)
        self.backward(first, min(self.chunk, self.kept[0].shape[1] - first), grad_u, grad_sums)
        return before


def with_zeros(grads: State, states: State) -> State:
    """The gradients of :meth:`TimeLoop.start_backward`, with zeros for the features that are missing."""
    pairs = ((grad, state.shape[1] - grad.shape[2]) for grad, state in zip(grads, states, strict=True))
    return tuple(F.pad(grad, (missing, 0)) if missing else grad for grad, missing in pairs)


def carried(last: Sequence[Tensor | None], states: Sequence[Tensor]) -> list[Tensor]:
    """What a backward pass begins with: the gradients of the states after the last step, or zeros. It may write to them."""
    return [
        torch.zeros_like(state) if grad is None else grad.clone(memory_format=torch.contiguous_format)
        for grad, state in zip(last, states, strict=True)
    ]


def advance(memory: Tensor, u: Tensor, operators: ChunkOperators) -> Tensor:
    """The memory a chunk later: m (B, D, N), u (B, C, D)."""
    power, response = operators.advance
    rows, states = fold_rows(u, len(power)), fold_state(memory, len(power))
    with full_float32(memory):
        after = product(rows, response)
        if len(power) == 1:
            after[0].addmm_(states[0], power[0].mT)
        else:
            after.baddbmm_(states, power.mT)
    return unfold_state(after, memory.shape)


def start_all(memory: Tensor, u: Tensor, starts: Tensor, operators: ChunkOperators, *, further: bool) -> Tensor:
    """Writes the memory at the start of each chunk of a segment, and returns it at its end.

    Args:
        memory: m before the segment (B, D, N).
        u: of the segment (B, L, D).
        starts: (B, L / C, D * N).
        operators: the matrices of a chunk.
        further: there are segments after this one; otherwise nobody asks for the memory at its end, which may be left out.
    """
    power, response = operators.advance
    if not starts_at_once(power):
        inputs, count = u.unflatten(1, (-1, operators.chunk)), starts.shape[1]
        for index in range(count):
            starts[:, index] = memory.flatten(1)
            if further or index + 1 < count:
                memory = advance(memory, inputs[:, index], operators)
        return memory
    rows = fold_rows(u, len(power)).unflatten(2, (-1, operators.chunk))
    with full_float32(power):
        states = chain(fold_state(memory, len(power)), rows @ response[:, None], power.mT)
    by_chunk = unfold_sequence(states, (len(u), states.shape[2], u.shape[2]))
    starts.copy_(by_chunk[:, :-1].flatten(2))
    return by_chunk[:, -1]


def send_back(grad_u: Tensor, to_starts: Tensor, arrived: Tensor, operators: ChunkOperators) -> None:
    """The adjoint of a segment's :func:`advance`: adds what the memory at the end of each chunk sends back to u (B, L, D).

    ``to_starts`` (M, D * N) is what reaches the memory at the start of each chunk from within it; ``arrived`` (B, L / C + 1,
    D * N) takes all that reaches it, and holds in its last place what reaches the end of the segment.
    """
    power, response = operators.advance
    batch, places, _ = arrived.shape
    to_starts = to_starts.reshape(batch, places - 1, -1)
    states = arrived.unflatten(2, (-1, power.shape[1]))
    with full_float32(power):
        if starts_at_once(power):
            newest_first = fold_sequence(to_starts.flip(1).unflatten(2, (-1, power.shape[1])), len(power))
            sent = chain(fold_state(states[:, -1], len(power)), newest_first, power)
            states.copy_(unfold_sequence(sent, states.shape[:3]).flip(1))
        else:
            for index in reversed(range(places - 1)):
                sent = unfold_state(fold_state(states[:, index + 1], len(power)) @ power, states[:, 0].shape)
                torch.add(to_starts[:, index], sent.flatten(1), out=arrived[:, index])
        ends = states[:, 1:].flatten(0, 1)
        sent = unfold_rows(fold_state(ends, len(power)) @ response.mT, len(ends))
        grad_u += sent.reshape(grad_u.shape)
