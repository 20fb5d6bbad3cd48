"""What the algorithms cost: the models by which ``auto`` chooses.

Nanoseconds of a forward pass, or of forward and backward, on a CPU. The forms follow from the algorithms; the factors were fitted
to measurements on two cores each of two server processors, with vectors of 256 and of 512 bits. Only their ratios matter, and
these are alike on other processors. On other devices than CPUs, and in traced graphs, which serve many sizes, the choices are
reasoned, not measured.
"""

import math
from functools import partial
from typing import NamedTuple

import torch

from .compiled import LARGEST_ORDER, MOST_NUMBERS, SMALL_ORDER
from .convolution import block_size, transform_size

CHUNKS = (1, 2, 4, 8, 16, 32, 64, 128)

# Steps per chunk where nothing was measured: few, large products, since launching them is what costs.
_DEFAULT_CHUNK = 32

# Numbers beyond which a tensor is taken from the system anew each time, so that touching it costs more than computing it.
_LARGE = 4 << 20


class _Factors(NamedTuple):
    """Nanoseconds: of a call, of a chunk or step, per multiply-add, per number written, per number of a large tensor, per number
    of a chunk's operator, where the starts of the chunks come first, of what makes one start of the last, and per number of u."""

    call: float
    part: float
    product: float
    number: float
    large: float
    operator: float = 0.0
    start: float = 0.0
    signal: float = 0.0


# Without and with a backward pass.
_SCAN = (_Factors(259e3, 6.42, 0.0357, 0.0, 1.9), _Factors(535e3, 30.7, 0.146, 0.0, 0.0))
_CHUNKED = (
    _Factors(360e3, 35.2e3, 0.0098, 0.288, 3.71, 0.814, 0.0882),
    _Factors(559e3, 149e3, 0.0183, 1.41, 11.9, 3.21, 0.0, 2.0),
)
_FFT = (_Factors(431e3, 0.0, 0.08, 0.51, 3.4), _Factors(780e3, 0.0, 0.244, 1.12, 7.2))

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
        each = rows * steps / parallel * (own.part + own.product * order * lanes)
        costs["scan", 0] = own.call + each + own.large * max(numbers - _LARGE, 0)
    if at_rest and compiled and (steps >= _TRANSFORMED or rows < MANY_ROWS):
        costs["fft", 0] = systems * _transforms_cost(_COMPILED_FFT[training], rows // systems, steps, order)
    elif at_rest and not compiled:
        costs["fft", 0] = _torch_transforms_cost(rows, steps, order, training=training)
    own = _CHUNKED[training]
    for size in CHUNKS[2:]:
        chunks = -(-steps // size)
        inputs: float = order + size
        if rows < MANY_ROWS:
            read, start = 1, own.start * order * (order + size)
        else:  # the state passes from chunk to chunk; a memory that began empty has all inputs so far in its place at first
            begun = min(order, steps)
            read, start = chunks, 3 * own.number * rows * order * (1 - begun / steps)
            inputs -= begun / steps * (inputs - (begun + size) / 2)
        work = numbers * (own.product * inputs + own.number) + own.operator * size * order * inputs * read
        work += own.signal * rows * steps + own.large * max(numbers - _LARGE, 0)
        costs["chunked", size] = own.call + chunks * (own.part + start) + work
        if size >= steps:
            break
    return costs


def _torch_transforms_cost(rows: int, steps: int, order: int, *, training: bool) -> float:
    """What :func:`spectral_convolution` takes for all states."""
    own, digits = _FFT[training], (2 * steps - 1).bit_length()
    padded = rows * order << digits
    # Spectra are transposed on the way, which past 2^11 numbers each leaves the cache.
    scattered = min(max(2.0 ** (digits - 11), 1.0), 8.0)
    large = _LARGE // 2 if training else _LARGE
    return own.call + padded * (own.product * digits + own.number * scattered) + own.large * max(padded - large, 0)


class _Transforms(NamedTuple):
    """Nanoseconds of compiled convolutions: per call; per point of a spectrum and stage, per point, and more where points leave a
    core's cache; for each further signal of a row; per point and stage of the kernel's spectrum; and per number that the system
    has to provide."""

    call: float
    stage: float
    point: float
    far: float
    signal: float
    kernel: float
    large: float


# All states of a memory, without and with a backward pass.
_COMPILED_FFT = (
    _Transforms(400e3, 0.112, 0.264, 0.0, 0.0, 0.488, 2.0),
    _Transforms(748e3, 0.505, 0.053, 0.0, 0.0, 1.45, 4.15),
)
# Steps from which they are worth it for many rows: of fewer, one product does it all.
_TRANSFORMED = 32
# Of a vector, and so columns of a kernel that go together.
_LANES = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


def _transforms_cost(own: _Transforms, rows: int, steps: int, columns: int, signals: int = 1) -> float:
    """What :func:`causal_convolution` takes, compiled: for rows of some signals each, and the columns of their kernel."""
    size, threads = transform_size(2 * steps - 1), torch.get_num_threads()
    # Measured on two cores, as all others; groups of columns that are no multiple of the threads leave some of these idle.
    groups = -(-columns // (_LANES * threads)) * threads
    stages, points = math.log2(size), size * groups * _LANES / 2
    each = own.stage * stages + own.point + own.far * max(stages - 12, 0) + own.signal * (signals - 1)
    numbers = max(rows * steps * columns - _LARGE, 0)
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
        return "chunked", _DEFAULT_CHUNK
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


def memory_chunk(rows: int, steps: int, order: int, *, training: bool, measured: bool) -> int:
    """Steps per chunk where the algorithm is "chunked" by name."""
    if not measured:
        return _DEFAULT_CHUNK
    costs = memory_costs(rows, steps, order, training=training, compiled=False)
    return min((size for name, size in costs if name == "chunked"), key=lambda size: costs["chunked", size])


class Recurrence(NamedTuple):
    """The sizes of a run whose steps depend on each other: B, T, D, N, the hidden size H and the width G of its gates."""

    batch: int
    steps: int
    memory_d: int
    order: int
    hidden_size: int
    gates: int


class _LookAhead(NamedTuple):
    """Nanoseconds of a look-ahead recurrence: per call, and per chunk; per multiply-add of the steps and of the fold, of the
    memory's advance, and of the short kernel; per sum and hidden state, per u that the short kernel reads, and per number of a
    chunk's memory; per number of the power that a chunk reads, and per multiply-add that makes the operators."""

    call: float
    chunk: float
    product: float
    advance: float
    kernel: float
    number: float
    past: float
    memory: float
    reading: float
    building: float


class _InChunks(NamedTuple):
    """Nanoseconds of a cell behind a memory that is known in advance, in chunks: per call, chunk and step, per multiply-add, per
    number, per number of a matrix that is read anew in each step, per multiply-add that makes a chunk's operators, or number of
    one that each step reads, and what each of these takes more where they leave the cache; per u, and per number of the memory at
    the start of a chunk."""

    call: float
    chunk: float
    step: float
    product: float
    number: float
    reading: float
    operator: float
    large: float = 0.0
    signal: float = 0.0
    start: float = 0.0


class _Convolved(NamedTuple):
    """What the transforms take; and nanoseconds per multiply-add that makes the kernel, per number of it, per multiply-add of the
    cell, and per number of its matrix that is read anew in each step."""

    transforms: _Transforms
    making: float
    kernel: float
    product: float
    reading: float


class _Relaxed(NamedTuple):
    """Nanoseconds of a relaxed convolution: per call; per point of a spectrum and stage, per point, and for each further memory
    dimension; per point and stage of the kernel's spectra; per multiply-add that makes the kernel, and of the steps; per sum and
    hidden state; and per number of the steps' matrix that is read anew in each."""

    call: float
    stage: float
    point: float
    signal: float
    kernel: float
    making: float
    product: float
    number: float
    reading: float


class _Merged(NamedTuple):
    """Nanoseconds of one product a step: per call and step, per multiply-add and per number; per number of the matrix once, and
    in each step where it is read anew."""

    call: float
    step: float
    product: float
    number: float
    building: float
    reading: float


# Without and with a backward pass.
_LOOK_AHEAD = (
    _LookAhead(1.97e6, 1.63e3, 0.02, 0.0045, 0.00581, 1.17, 0.145, 1.86, 0.0654, 7.97),
    _LookAhead(3.92e6, 6.7e3, 0.0528, 0.0223, 0.0336, 1.67, 0.311, 7.0, 0.282, 19.9),
)
_FOLDED = (
    _InChunks(1.3e6, 100e3, 469, 0.0218, 1.15, 0.0651, 4.13),
    _InChunks(3.95e6, 89.6e3, 1.22e3, 0.0675, 2.28, 0.09, 10.8, 1.19),
)
_WRITTEN = (
    _InChunks(1.32e6, 66.1e3, 86.7, 0.0208, 1.71, 0.0983, 0.078, 0.0, 2.25),
    _InChunks(3.62e6, 83.8e3, 0.0, 0.0455, 4.45, 0.192, 0.119, 0.0, 15.3),
)
_CONVOLVED = (
    _Convolved(_Transforms(1.05e6, 0.14, 1.89, 0.0, 0.367, 0.599, 0.0), 0.00755, 0.0, 0.0134, 0.198),
    _Convolved(_Transforms(2.92e6, 0.357, 2.4, 0.86, 1.67, 1.26, 0.0), 0.01, 0.38, 0.0336, 0.175),
)
_RELAXED = (
    _Relaxed(1.0e6, 0.1, 1.0, 0.5, 0.5, 0.01, 0.02, 1.2, 0.1),
    _Relaxed(3.0e6, 0.3, 2.0, 1.5, 1.2, 0.01, 0.05, 1.7, 0.2),
)
_MERGED = (
    _Merged(732e3, 230, 0.021, 0.376, 7.68, 0.0742),
    _Merged(1.48e6, 609, 0.0427, 1.35, 22.2, 0.109),
)
# What a merged run without feedback takes, in shares of one with it.
_MERGED_ALONE = 0.9

# Those of loops in Python, measured with a backward pass only.
_FOLDED_IN_PYTHON = _InChunks(2.13e6, 80.5e3, 750, 0.03, 5.5, 0.0, 9.5, 0.0, 19.2, 34.4)
_WRITTEN_IN_PYTHON = _InChunks(1.71e6, 83.7e3, 755, 0.0275, 5.6, 0.0, 0.136)
# What a step of the look-ahead recurrence takes there beyond that of the merged one, without and with a backward pass: more
# calls. A cell alone has fewer than either.
_PYTHON_STEP = (22e3, 50e3)

# Numbers of a matrix that stay in the cache next to the processor; what more there is, is read anew in each step.
_NEAR = 1e5


def lookahead_costs(sizes: Recurrence, *, training: bool) -> dict[int, float]:
    """What :func:`lookahead_recurrence` takes, without or with a backward pass: steps per chunk -> nanoseconds.

    Longer chunks mean fewer advances of the memory but a longer short kernel per step, and more operators to build.
    """
    batch, steps, dims, order, hidden, gates = sizes
    own, rows, width = _LOOK_AHEAD[training], batch * steps, dims + gates
    costs = {}
    for size in (size for size in CHUNKS[:7] if size <= max(steps, 1)):
        products = own.product * (hidden + dims * order) * width + own.advance * dims * order * order / size
        numbers = own.number * (width + hidden) + own.past * dims * size + own.memory * dims * order / size
        kernel = own.kernel * size * dims * width
        chunks = -(-steps // size) * (own.chunk + own.reading * order * order)
        costs[size] = own.call + rows * (products + numbers + kernel) + chunks + own.building * size * dims * order * width
    return costs


def relaxed_cost(sizes: Recurrence, *, training: bool) -> tuple[int, float]:
    """What :func:`relaxed_recurrence` takes, without or with a backward pass: steps per block, nanoseconds."""
    batch, steps, dims, order, hidden, gates = sizes
    own, width, block, threads = _RELAXED[training], dims + gates, block_size(steps), torch.get_num_threads()
    matrix = (hidden + (block - 1) * dims) * width
    if matrix > MOST_NUMBERS:
        return block, math.inf
    blocks, signals, kernels = -(-steps // block), 0.0, 0.0
    for level in range((blocks - 1).bit_length()):
        stages = math.log2(2 * block << level)
        # Every other so many blocks.
        times = (blocks - 1 - (1 << level)) // (2 << level) + 1
        signals += times * (block << level) * (own.stage * stages + own.point + own.signal * (dims - 1))
        kernels += (block << level) * own.kernel * stages * dims
    rows = -(-batch // threads) * threads  # threads have rows of their own
    work = -(-width // _LANES) * _LANES * (rows * signals + kernels) + own.making * steps * dims * order * width
    products = own.product * (hidden + block / 2 * dims) * width + own.number * (width + hidden)
    return block, own.call + work + rows * steps * products + own.reading * steps * max(matrix - _NEAR, 0)


def uncoupled_costs(
    sizes: Recurrence, *, training: bool, compiled: bool, at_rest: bool = False
) -> dict[tuple[str, int], float]:
    """What an uncoupled layer with a recurrent cell takes, without or with a backward pass, in nanoseconds.

    Of :func:`uncoupled_recurrence`, ("folded" or "written", steps per chunk); with compiled loops and ``at_rest``, of
    :func:`convolved_recurrence`, ("convolved", 0).
    """
    batch, steps, dims, order, hidden, gates = sizes
    rows, recurrent, flat = batch * steps, hidden * gates, dims * order
    folded = _FOLDED[training] if compiled else _FOLDED_IN_PYTHON
    written = _WRITTEN[training] if compiled else _WRITTEN_IN_PYTHON
    step_by_step = compiled and order <= SMALL_ORDER
    costs = {}
    for size in (size for size in (8, 16, 32, 64) if size <= max(steps, 8)):
        chunks = -(-steps // size)
        work = folded.product * rows * (recurrent + dims * (size * gates + order * gates + order * order / size))
        work += folded.number * rows * (gates + hidden) + folded.reading * steps * max(recurrent + flat * gates - _NEAR, 0)
        work += rows * (folded.signal * dims + folded.start * flat / size)
        operators = size * dims * gates * (order + size)
        work += folded.operator * operators + folded.large * max(operators - 1e6, 0)
        costs["folded", size] = folded.call + folded.chunk * chunks + folded.step * steps + work

        each = 8 if step_by_step else size + order + order / size
        work = written.product * rows * (recurrent + flat * (each + gates)) + written.number * rows * (gates + hidden + flat)
        # With few rows, reading the chunk's operator costs more than multiplying with it.
        work += written.operator * (0 if step_by_step else steps * (size + order) * order)
        work += written.reading * steps * max(recurrent - _NEAR, 0) + written.signal * rows * dims
        costs["written", size] = written.call + written.chunk * chunks + written.step * steps + work
    if compiled and at_rest:
        own = _CONVOLVED[training]
        transforms = _transforms_cost(own.transforms, batch, steps, gates, dims)
        kernel = steps * dims * gates * (own.making * order + own.kernel)
        cell = own.product * rows * recurrent + own.reading * steps * max(recurrent - _NEAR, 0)
        costs["convolved", 0] = transforms + kernel + cell
    return costs


def merged_cost(sizes: Recurrence, *, training: bool, feedback: bool) -> float:
    """What :func:`merged_recurrence` takes, without or with a backward pass, in nanoseconds."""
    batch, steps, dims, order, hidden, gates = sizes
    own, linear, rows = _MERGED[training], dims * order, batch * steps
    matrix = (linear + hidden) * (linear + gates)
    numbers = own.number * (linear + hidden + gates)
    once = own.call + own.step * steps + own.building * matrix + own.reading * steps * max(matrix - _NEAR, 0)
    return (once + rows * (own.product * matrix + numbers)) * (1 if feedback else _MERGED_ALONE)


def lookahead_chunk(sizes: Recurrence, *, training: bool, measured: bool) -> int:
    """Steps per chunk of the look-ahead recurrence, without or with a backward pass.

    Where nothing was ``measured``, launches are what costs: long chunks, unless their short kernel outgrows the hidden state.
    """
    if not measured:
        longest = min(_DEFAULT_CHUNK, max(sizes.steps, 1), max(4 * sizes.hidden_size, 256) // sizes.memory_d)
        return max(size for size in CHUNKS if size <= max(longest, 1))
    costs = lookahead_costs(sizes, training=training)
    return min(costs, key=costs.__getitem__)


def recurrence_algorithm(
    sizes: Recurrence,
    *,
    hidden_to_memory: bool,
    memory_to_memory: bool,
    training: bool,
    compiled: bool,
    measured: bool,
    merges: bool = True,
    relaxes: bool = True,
    at_rest: bool = False,
) -> tuple[str, int]:
    """How to run a layer with a hidden cell in affine gates: ``Plan.memory`` and ``Plan.chunk``.

    Args:
        sizes: of the layer and of the run.
        hidden_to_memory: the hidden state is fed back into the memory.
        memory_to_memory: the memory is; without the hidden state, its input is computed first.
        training: a gradient is wanted.
        compiled: the compiled loops are there.
        measured: whether the models hold; "merged" is taken only where they do.
        merges: whether it may be taken at all.
        relaxes: whether "relaxed" may be.
        at_rest: the memory begins empty, which "convolved" and "relaxed" ask for.
    """
    costs: dict[tuple[str, int], float]
    if hidden_to_memory:
        if not measured:
            return "lookahead", lookahead_chunk(sizes, training=training, measured=False)
        costs = {("lookahead", size): cost for size, cost in lookahead_costs(sizes, training=training).items()}
        if relaxes and compiled and at_rest:
            block, cost = relaxed_cost(sizes, training=training)
            costs["relaxed", block] = cost
    else:
        alone = sizes._replace(hidden_size=0, gates=0)
        first = min(lookahead_costs(alone, training=training).values()) if memory_to_memory else 0.0
        own = uncoupled_costs(sizes, training=training, compiled=compiled, at_rest=at_rest)
        costs = {way: first + cost for way, cost in own.items()}
    if measured and merges and (compiled or hidden_to_memory):
        merged = merged_cost(sizes, training=training, feedback=hidden_to_memory)
        costs["merged", 0] = merged - (0 if compiled else sizes.steps * _PYTHON_STEP[training])
    return min(costs, key=costs.__getitem__)
