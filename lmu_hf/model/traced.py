"""The linear memory as torch.compile and torch.export see it: plain operations, of which no number depends on the length.

One graph then serves sequences of any length. Chunks of a fixed size run at once, each as if the memory began empty. What the
chunks before have left is summed up by doubling: with P the matrix that advances the memory by a chunk and e[k] what chunk k adds
to it, the sums over 2, 4, 8, ... neighbours

    s[k] = e[k] + P e[k-1],     s'[k] = s[k] + P^2 s[k-2],     ...

reach as far back as the sequence is long, or where that is not known, until nothing is left of the memory.

Axes as in :mod:`memory`: (S, R, T) inputs, with C steps per chunk and K chunks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .legendre import DelaySystem
from .precision import exact_matmul

# Steps per chunk where all states are wanted, and where only the last one is, whose operator is smaller.
_CHUNK, _LAST_CHUNK = 32, 1024

# Binary digits of the number of steps of any sequence.
_DIGITS = 40


def traced_states(inputs: Tensor, memory: Tensor | None, system: DelaySystem) -> Tensor:
    """The states after each step: inputs (S, R, T), memory before them (S, R, N) or None -> (S, R, T, N)."""
    steps, order = inputs.shape[2], system.order
    size = next((size for size in (1, 2, 4, 8, 16) if _known(steps <= size)), _CHUNK)
    operator = system.chunk_operator(size, inputs.dtype, inputs.device)
    if memory is None:
        memory = inputs.new_zeros(*inputs.shape[:2], order)
    if _known(steps <= size):
        row = exact_matmul(F.pad(inputs, (0, size - steps)), operator[:, order:])
        return (row + exact_matmul(memory, operator[:, :order])).unflatten(2, (size, order))[:, :, :steps]
    rows = inputs.shape[1]
    chunks, count = _cut(inputs, size)
    alone = exact_matmul(chunks, operator[:, order:]).unflatten(1, (rows, count))
    # What the memory is at the start of each chunk, so far with what its neighbour left only: (S, R, K, N).
    starts = torch.cat([memory[:, :, None], alone[:, :, :-1, -order:]], dim=2)
    for doubling in range(_doublings(steps, size, system)):
        reach = 1 << doubling
        moved = F.pad(starts, (0, 0, reach, 0))[:, :, :-reach].flatten(1, 2)
        power = system.power(size * reach, inputs.dtype, inputs.device)
        starts = starts + exact_matmul(moved, power.mT).unflatten(1, (rows, count))
    carried = exact_matmul(starts.flatten(1, 2), operator[:, :order]).unflatten(1, (rows, count))
    time = torch.arange(steps, device=inputs.device)
    return (alone + carried).unflatten(3, (size, order))[:, :, time // size, time % size]


def traced_final(inputs: Tensor, system: DelaySystem) -> Tensor:
    """The last state of a memory that began empty: inputs (S, R, T) -> (S, R, N)."""
    steps, dtype, device = inputs.shape[2], inputs.dtype, inputs.device
    newest_first = inputs.flip(2)
    size = next((1 << digits for digits in range(10) if _known(steps <= 1 << digits)), _LAST_CHUNK)
    response = system.impulse_response(size, dtype, device)
    if _known(steps <= size):
        return exact_matmul(F.pad(newest_first, (0, size - steps)), response)
    rows = newest_first.shape[1]
    chunks, count = _cut(newest_first, size)
    ends = exact_matmul(chunks, response).unflatten(1, (rows, count))
    for doubling in range(_doublings(steps, size, system)):
        reach = 1 << doubling
        moved = F.pad(ends, (0, 0, 0, reach))[:, :, reach:].flatten(1, 2)
        ends = ends + exact_matmul(moved, system.power(size * reach, dtype, device).mT).unflatten(1, (rows, count))
    return ends[:, :, 0]


def digits_that_matter(steps: int, system: DelaySystem) -> int:
    """How many of the lowest binary digits of a number up to ``steps`` tell what that many steps leave of a memory.

    Where ``steps`` is not known in a graph, and any higher digit is set, nothing is left of it.
    """
    settled = _settled(system)
    return next(d for d in range(_DIGITS + 1) if _known(steps < 1 << d) or d == _DIGITS or 1 << d >= settled)


def _known(condition: bool) -> bool:
    """Whether a condition on sizes holds for every length that a graph is for."""
    # Imported where a graph is traced: it takes a third of a second, which is half of what the layer's own import takes.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def _cut(inputs: Tensor, size: int) -> tuple[Tensor, int]:
    """(S, R, T) -> (S, R * K, C), zeros behind the end, and K.

    Taken by index: where a length is open, a tracer asks of a view whether it fits, and holds the graph to the example's answer.
    """
    count = (inputs.shape[2] + size - 1) // size
    if not (_known(count <= 2) or _known(count > 2)):
        count = count + 2  # it also asks of every axis whether it has but one entry; now none ever has
    index = torch.arange(count, device=inputs.device)[:, None] * size + torch.arange(size, device=inputs.device)
    return F.pad(inputs, (0, 3 * size))[:, :, index].flatten(1, 2), count


def _doublings(steps: int, size: int, system: DelaySystem) -> int:
    """How often sums over neighbouring chunks have to be doubled until they reach over ``steps``."""
    settled = _settled(system)
    return next(d for d in range(_DIGITS) if _known(steps <= size << d) or size << d >= settled)


def _settled(system: DelaySystem) -> float:
    """Steps after which nothing is left of a memory in any precision; as many as there can be where that is not known."""
    # The slowest mode of the continuous system falls by e per theta or faster, and e^-64 is 1.6e-28.
    return 2.0 ** (_DIGITS - 1) if system.longest is None else max(64 * system.longest, 1)
