"""What the algorithms cost: the models by which ``auto`` chooses.

Nanoseconds of a forward pass, or of forward and backward, on a CPU. The forms follow from the algorithms; the factors were fitted
to measurements on two cores of a server processor. Only their ratios matter, and these are alike on other processors. On other
devices than CPUs, and in traced graphs, which serve many sizes, the choices are reasoned, not measured.
"""

from typing import NamedTuple

import torch

from .compiled import LARGEST_ORDER, SMALL_ORDER

CHUNKS = (1, 2, 4, 8, 16, 32, 64, 128)

# Steps per chunk where nothing was measured: few, large products, since launching them is what costs.
_DEFAULT_CHUNK = 32

# Numbers beyond which a tensor is taken from the system anew each time, so that touching it costs more than computing it.
_LARGE = 4 << 20


class _Factors(NamedTuple):
    """Nanoseconds: of a call, of a chunk or step, per multiply-add, per number written, per number of a large tensor, per number
    of a chunk's operator and, where the starts of the chunks come first, of what makes one start of the last."""

    call: float
    part: float
    product: float
    number: float
    large: float
    operator: float = 0.0
    start: float = 0.0


# Without and with a backward pass.
_SCAN = (_Factors(307e3, 10.2, 0.0357, 0.0, 1.9), _Factors(489e3, 25.0, 0.11, 0.0, 2.7))
_CHUNKED = (
    _Factors(396e3, 21.7e3, 0.0111, 0.64, 2.0, 0.37, 0.196),
    _Factors(583e3, 50.5e3, 0.0207, 1.91, 4.9, 1.0, 0.105),
)
_FFT = (_Factors(431e3, 0.0, 0.08, 0.51, 3.4), _Factors(780e3, 0.0, 0.244, 1.12, 7.2))

# Rows of a chunk's product from which it has full speed; with fewer, the starts of the chunks come first and then all at once.
MANY_ROWS = 64


def memory_costs(rows: int, steps: int, order: int, *, training: bool, compiled: bool) -> dict[tuple[str, int], float]:
    """What each algorithm of :func:`linear_memory` takes for all states: (name, steps per chunk or 0) -> nanoseconds.

    Args:
        rows: batch times memory dimensions.
        steps: T.
        order: N.
        training: a gradient is wanted.
        compiled: the compiled loop is there.
    """
    costs: dict[tuple[str, int], float] = {}
    numbers = rows * steps * order
    if compiled and order <= LARGEST_ORDER:
        own = _SCAN[training]
        lanes = next(lanes for lanes in (8, 16, 32) if order <= lanes)
        parallel = min(rows, torch.get_num_threads())
        each = rows * steps / parallel * (own.part + own.product * order * lanes)
        costs["scan", 0] = own.call + each + own.large * max(numbers - _LARGE, 0)
    own = _FFT[training]
    digits = (2 * steps - 1).bit_length()
    padded = rows * order << digits
    # Spectra are transposed on the way, which past 2^11 numbers each leaves the cache.
    scattered = min(max(2.0 ** (digits - 11), 1.0), 8.0)
    large = _LARGE // 2 if training else _LARGE
    costs["fft", 0] = (
        own.call + padded * (own.product * digits + own.number * scattered) + own.large * max(padded - large, 0)
    )
    own = _CHUNKED[training]
    for size in CHUNKS[2:]:
        chunks, operator = -(-steps // size), size * order * (order + size)
        if rows < MANY_ROWS:
            read, start = 1, own.start * order * (order + size)
        else:  # the state passes from chunk to chunk
            read, start = chunks, 3 * own.number * rows * order
        work = numbers * (own.product * (order + size) + own.number) + own.operator * operator * read
        costs["chunked", size] = own.call + chunks * (own.part + start) + work + own.large * max(numbers - _LARGE, 0)
        if size >= steps:
            break
    return costs


def memory_algorithm(
    rows: int, steps: int, order: int, *, return_sequence: bool, training: bool, compiled: bool, measured: bool
) -> tuple[str, int]:
    """The algorithm of :func:`linear_memory` for these sizes, and its steps per chunk, 0 where it has none.

    ``measured`` says whether the models hold; otherwise as :func:`memory_costs`.
    """
    if not return_sequence:
        return "final", 0
    if not measured:
        return "chunked", _DEFAULT_CHUNK
    costs = memory_costs(rows, steps, order, training=training, compiled=compiled)
    if steps < 4 and ("scan", 0) not in costs:
        return "naive", 0
    return min(costs, key=costs.__getitem__)


def memory_chunk(rows: int, steps: int, order: int, *, training: bool, measured: bool) -> int:
    """Steps per chunk where the algorithm is "chunked" by name."""
    if not measured:
        return _DEFAULT_CHUNK
    costs = memory_costs(rows, steps, order, training=training, compiled=False)
    return min((size for name, size in costs if name == "chunked"), key=lambda size: costs["chunked", size])


def coupled_chunk(
    batch: int, steps: int, memory_d: int, order: int, hidden_size: int, width: int, measured: bool = True
) -> int:
    """Steps per chunk of the look-ahead recurrence; ``width`` is that of a step's sums, memory_d and gates.

    Longer chunks mean fewer advances of the memory but a longer short kernel per step, and more operators to build. Where nothing
    was ``measured``, launches are what costs: long chunks, unless their short kernel outgrows the hidden state by far.
    """
    if not measured:
        longest = min(_DEFAULT_CHUNK, max(steps, 1), max(4 * hidden_size, 256) // memory_d)
        return max(size for size in CHUNKS if size <= max(longest, 1))

    def cost(size: int) -> float:
        per_step = batch * (hidden_size + size * memory_d / 2) * width
        per_chunk = batch * memory_d * order * order
        building = 12 * size * memory_d * order * width
        return 0.03 * (steps * per_step + steps / size * per_chunk) + 65e3 * steps / size + building

    return min((size for size in CHUNKS[:7] if size <= max(steps, 1)), key=cost)


def uncoupled_chunk(batch: int, steps: int, memory_d: int, order: int, width: int, *, compiled: bool) -> tuple[bool, int]:
    """Whether to fold the memory into the hidden cell's weights, rather than write it, and the steps per chunk.

    ``width`` is that of the gates.
    """

    def folded(size: int) -> float:
        products = batch * steps * memory_d * (size * width + order * width + order * order / size)
        return 0.03 * products + 65e3 * steps / size + 12 * size * memory_d * order * width

    def written(size: int) -> float:
        step_by_step = compiled and order <= SMALL_ORDER
        each = 8 if step_by_step else size + order + order / size
        # With few rows, reading the chunk's operator costs more than multiplying with it.
        reading = 0 if step_by_step else 0.1 * steps * (order + size) * order
        return batch * steps * memory_d * order * (0.03 * (each + width) + 1) + 65e3 * steps / size + reading

    sizes = [size for size in (8, 16, 32, 64) if size <= max(steps, 8)]
    best = {True: min(sizes, key=folded), False: min(sizes, key=written)}
    folds = folded(best[True]) < written(best[False])
    return folds, best[folds]
