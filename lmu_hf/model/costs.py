"""What the algorithms of a memory cost: the models by which ``auto`` chooses; those of layers are in :mod:`layer_costs`.

Nanoseconds of a forward pass, or of forward and backward, on a CPU. The forms follow from the algorithms; the factors were fitted
to measurements on two cores of a server processor with vectors of 512 bits, those of loops in Python and of layers also of one
with 256. Only the ratios of those that are compared matter, and these are alike on other processors. On other devices than CPUs,
and in traced graphs, which serve many sizes, the choices are reasoned, not measured.
"""

import math
from functools import partial
from typing import NamedTuple

import torch

from .compiled import LARGEST_ORDER
from .convolution import transform_size

CHUNKS = (1, 2, 4, 8, 16, 32, 64, 128)

# Steps per chunk where nothing was measured: few, large products, since launching them is what costs.
DEFAULT_CHUNK = 32

# Numbers of a tensor that stay in a cache: those beyond cost more.
_CACHED = 8 << 20
# Numbers beyond which torch takes a tensor from the system anew each time, so that touching it costs more than computing it.
_LARGE = 4 << 20

# Of a vector, and so columns of a kernel that go together.
LANES = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
# What a loop whose numbers fill half of such a vector takes, beside products that gained from its width.
_HALF_FULL = 1.15


class _Factors(NamedTuple):
    """Nanoseconds: of a call, of a chunk or step, per multiply-add, per number written, per number beyond a cache, per number of
    a chunk's operator, where the starts of the chunks come first, of what makes one start of the last, and per number of u;
    and per chunk whose start comes first."""

    call: float
    part: float
    product: float
    number: float
    large: float
    operator: float = 0.0
    start: float = 0.0
    signal: float = 0.0
    begun: float = 0.0


# Without and with a backward pass.
_SCAN = (
    _Factors(90.7e3, 2.22, 0.0173, 0.0, 0.551, signal=1.97),
    _Factors(190e3, 10.0, 0.0504, 0.0, 0.545, signal=7.1),
)
_CHUNKED = (
    _Factors(115e3, 16.1e3, 0.00492, 0.0674, 0.395, 0.12, 0.0533, 1.05, 7.5e3),
    _Factors(222e3, 66e3, 0.0147, 0.111, 0.96, 0.252, 0.108, 3.67, 22.9e3),
)
# Where nothing is compiled: measured on another day, to be compared with each other alone.
_CHUNKED_IN_PYTHON = (
    _Factors(184e3, 46.9e3, 0.0129, 0.1, 2.06, 0.476, 0.163, 0.0, 23.3e3),
    _Factors(498e3, 216e3, 0.0271, 0.589, 9.25, 3.9, 0.0, 1.89, 172e3),
)
_FFT_IN_PYTHON = (_Factors(431e3, 0.0, 0.08, 0.51, 3.4), _Factors(780e3, 0.0, 0.244, 1.12, 7.2))

# Rows of a chunk's product from which it has full speed; with fewer, the starts of the chunks come first and then all at once.
MANY_ROWS = 64


def memory_costs(
    rows: int, steps: int, order: int, *, training: bool, compiled: bool, systems: int = 1, at_rest: bool = True
) -> dict[tuple[str, int], float]:
    """What each algorithm of :func:`linear_memory` takes for all states: (name, steps per chunk or 0) -> nanoseconds.

    Args:
        rows: batch times memory dimensions.
        steps: T.
        order: N.
        training: a gradient is wanted.
        compiled: the compiled loop is there.
        systems: S, 1 or one for each memory dimension.
        at_rest: the memory begins empty; otherwise "fft" is left out, to which what it begins with is foreign.
    """
    costs: dict[tuple[str, int], float] = {}
    numbers = rows * steps * order
    if compiled and order <= LARGEST_ORDER:
        own = _SCAN[training]
        lanes = next(lanes for lanes in (8, 16, 32) if order <= lanes)
        parallel = min(rows, torch.get_num_threads())
        # States that fill no whole vectors are written in pieces.
        written = own.signal if order > 8 and order % 16 else 0.0
        each = rows * steps / parallel * (own.part + own.product * order * lanes + written)
        each *= _HALF_FULL if lanes < LANES else 1
        costs["scan", 0] = own.call + each + own.large * max(numbers - _CACHED, 0)
    if at_rest and compiled and (steps >= _TRANSFORMED or rows < MANY_ROWS):
        costs["fft", 0] = systems * transforms_cost(_COMPILED_FFT[training], rows // systems, steps, order)
    elif at_rest and not compiled:
        costs["fft", 0] = _torch_transforms_cost(rows, steps, order, training=training)
    own, near = (_CHUNKED[training], _CACHED) if compiled else (_CHUNKED_IN_PYTHON[training], _LARGE)
    for longest in CHUNKS[2:]:
        size = min(longest, max(steps, 1))
        chunks = -(-steps // size)
        inputs: float = order + size
        if rows < MANY_ROWS:
            read, start = 1, own.begun + own.start * order * (order + size)
        else:  # the state passes from chunk to chunk; a memory that began empty has all inputs so far in its place at first
            begun = min(order, steps)
            read, start = chunks, own.part + 3 * own.number * rows * order * (1 - begun / steps)
            inputs -= begun / steps * (inputs - (begun + size) / 2)
        work = numbers * (own.product * inputs + own.number) + own.operator * size * order * inputs * read
        work += own.signal * rows * steps + own.large * max(numbers - near, 0)
        costs["chunked", longest] = own.call + chunks * start + work
        if longest >= steps:
            break
    return costs


def _torch_transforms_cost(rows: int, steps: int, order: int, *, training: bool) -> float:
    """What :func:`spectral_convolution` takes for all states."""
    own, digits = _FFT_IN_PYTHON[training], (2 * steps - 1).bit_length()
    padded = rows * order << digits
    # Spectra are transposed on the way, which past 2^11 numbers each leaves the cache.
    scattered = min(max(2.0 ** (digits - 11), 1.0), 8.0)
    large = _LARGE // 2 if training else _LARGE
    return own.call + padded * (own.product * digits + own.number * scattered) + own.large * max(padded - large, 0)


class Transforms(NamedTuple):
    """Nanoseconds of compiled convolutions: per call; per point of a spectrum and stage, per point, and more where points leave a
    core's cache; for each further signal of a row; per point and stage of the kernel's spectrum; and per number beyond
    a cache."""

    call: float
    stage: float
    point: float
    far: float
    signal: float
    kernel: float
    large: float


# All states of a memory, without and with a backward pass.
_COMPILED_FFT = (
    Transforms(111e3, 0.0406, 0.0, 0.11, 0.0, 0.121, 0.494),
    Transforms(231e3, 0.126, 0.0, 0.23, 0.0, 0.231, 0.0248),
)
# Steps from which they are worth it for many rows: of fewer, one product does it all.
_TRANSFORMED = 32


def transforms_cost(own: Transforms, rows: int, steps: int, columns: int, signals: int = 1) -> float:
    """What :func:`causal_convolution` takes, compiled: for rows of some signals each, and the columns of their kernel."""
    size, threads = transform_size(2 * steps - 1), torch.get_num_threads()
    # Measured on two cores, as all others; groups of columns that are no multiple of the threads leave some of these idle.
    groups = -(-columns // (LANES * threads)) * threads
    stages, points = math.log2(size), size * groups * LANES / 2
    each = own.stage * stages + own.point + own.far * max(stages - 12, 0) + own.signal * (signals - 1)
    numbers = max(rows * steps * columns - _CACHED, 0)
    return own.call + points * (rows * each + own.kernel * stages * signals) + own.large * numbers


def _cheapest(costs: dict[tuple[str, int], float]) -> tuple[str, int]:
    return min(costs, key=costs.__getitem__)


def memory_algorithm(
    rows: int,
    steps: int,
    order: int,
    *,
    return_sequence: bool,
    training: bool,
    compiled: bool,
    measured: bool,
    systems: int = 1,
    at_rest: bool = True,
) -> tuple[str, int]:
    """The algorithm of :func:`linear_memory` for these sizes, and its steps per chunk, 0 where it has none.

    ``measured`` says whether the models hold; otherwise as :func:`memory_costs`.
    """
    if not return_sequence:
        return "final", 0
    if not measured:
        return "chunked", DEFAULT_CHUNK
    own, other = (
        partial(memory_costs, rows, steps, order, training=way, compiled=compiled, systems=systems, at_rest=at_rest)
        for way in (training, not training)
    )
    costs = own()
    transforms = ("fft", 0)
    if _cheapest(costs) == transforms and _cheapest(other()) != transforms:
        # Transforms round otherwise than products: a model whose gradients are wanted, or not, is to round alike.
        del costs[transforms]
    if steps < 4 and ("scan", 0) not in costs:
        return "naive", 0
    return _cheapest(costs)


def memory_chunk(rows: int, steps: int, order: int, *, training: bool, compiled: bool, measured: bool) -> int:
    """Steps per chunk where the algorithm is "chunked" by name."""
    if not measured:
        return DEFAULT_CHUNK
    costs = memory_costs(rows, steps, order, training=training, compiled=compiled)
    return min((size for name, size in costs if name == "chunked"), key=lambda size: costs["chunked", size])
