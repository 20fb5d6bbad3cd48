"""What the ways to run a layer with a hidden cell in affine gates cost: models by which ``auto`` chooses, as in :mod:`costs`."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from .compiled import MOST_NUMBERS, PANEL, SMALL_ORDER
from .convolution import block_size
from .costs import CHUNKS, DEFAULT_CHUNK, LANES, Transforms, transforms_cost


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
    chunk's memory; per number of the steps' matrix that is read anew in each, of the power that a chunk reads, and of a fold that
    leaves the cache of a core; and per multiply-add that makes the operators."""

    call: float
    chunk: float
    product: float
    advance: float
    kernel: float
    number: float
    past: float
    memory: float
    matrix: float
    reading: float
    far: float
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

    transforms: Transforms
    making: float
    kernel: float
    product: float
    reading: float


class _Relaxed(NamedTuple):
    """Nanoseconds of a relaxed convolution: per call; per point of a spectrum and stage, per point, and for each further memory
    dimension; per point and stage of the kernel's spectra; per multiply-add that makes the kernel, and of the steps; per sum and
    hidden state; and per number of the steps' matrix, once and in each step where it is read anew."""

    call: float
    stage: float
    point: float
    signal: float
    kernel: float
    making: float
    product: float
    number: float
    building: float
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
    _LookAhead(1.69e6, 1.45e3, 0.0182, 0.00415, 0.00596, 0.612, 0.229, 3.58, 0.07, 0.168, 0.0375, 10.2),
    _LookAhead(3.67e6, 12.6e3, 0.0549, 0.00912, 0.0256, 1.47, 0.486, 6.99, 0.1, 0.424, 0.378, 23.2),
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
    _Convolved(Transforms(1.05e6, 0.14, 1.89, 0.0, 0.367, 0.599, 0.0), 0.00755, 0.0, 0.0134, 0.198),
    _Convolved(Transforms(2.92e6, 0.357, 2.4, 0.86, 1.67, 1.26, 0.0), 0.01, 0.38, 0.0336, 0.175),
)
_RELAXED = (
    _Relaxed(1.42e6, 0.0373, 0.996, 0.417, 0.215, 0.0197, 0.0197, 0.483, 0.0, 0.0535),
    _Relaxed(3.6e6, 0.193, 1.13, 1.55, 1.83, 0.0433, 0.036, 2.86, 12.0, 0.15),
)
_MERGED = (
    _Merged(732e3, 230, 0.021, 0.376, 5.0, 0.0742),
    _Merged(1.48e6, 609, 0.0427, 1.35, 10.0, 0.109),
)
# What a merged run without feedback takes, in shares of one with it.
_MERGED_ALONE = 0.95

# Those of loops in Python, measured with a backward pass only.
_FOLDED_IN_PYTHON = _InChunks(2.13e6, 80.5e3, 750, 0.03, 5.5, 0.0, 9.5, 0.0, 19.2, 34.4)
_WRITTEN_IN_PYTHON = _InChunks(1.71e6, 83.7e3, 755, 0.0275, 5.6, 0.0, 0.136)
# What a step of the look-ahead recurrence takes there beyond that of the merged one, without and with a backward pass: more
# calls. A cell alone has fewer than either.
_PYTHON_STEP = (22e3, 50e3)

# Numbers of a matrix that stay in the cache next to the processor; what more there is, is read anew in each step.
_NEAR = 1e5
# Numbers of a matrix that each of the threads that share a step has at least, beside a panel of units; as in team.h.
_SHARE = 1 << 13
# Numbers of a matrix from which on they share the steps of a row each, and from which on of so many rows each, as there.
_EACH = 1 << 16
_FAR, _FAR_ROWS = 1 << 21, 4
# Sums of a row, of which each thread keeps those of some rows: with more, chunks take less memory, and little more time.
_LONGEST = 1 << 21
# Numbers of the gradients of spectra for which there is room, 128 MiB in float32.
_MOST_OF_SPECTRA = 1 << 25
# Numbers of one that stay in a core's.
_CACHED = 1 << 18


def lookahead_costs(sizes: Recurrence, *, training: bool) -> dict[int, float]:
    """What :func:`lookahead_recurrence` takes, without or with a backward pass: steps per chunk -> nanoseconds.

    Longer chunks mean fewer advances of the memory but a longer short kernel per step, and more operators to build.
    """
    batch, steps, dims, order, hidden, gates = sizes
    own, rows, width = _LOOK_AHEAD[training], batch * steps, dims + gates
    matrix = own.matrix * steps * max((hidden + dims) * width - _NEAR, 0)
    costs = {}
    for size in (size for size in CHUNKS[:7] if size <= max(steps, 1)):
        products = own.product * (hidden + dims * order) * width + own.advance * dims * order * order / size
        numbers = own.number * (width + hidden) + own.past * dims * size + own.memory * dims * order / size
        kernel = own.kernel * size * dims * width
        fold = size * dims * order * width
        chunks = -(-steps // size) * (own.chunk + own.reading * order * order + own.far * max(fold - _CACHED, 0))
        costs[size] = own.call + rows * (products + numbers + kernel) + matrix + chunks + own.building * fold
    return costs


def relaxed_cost(sizes: Recurrence, *, training: bool) -> tuple[int, float]:
    """What :func:`relaxed_recurrence` takes, without or with a backward pass: steps per block, nanoseconds."""
    batch, steps, dims, order, hidden, gates = sizes
    own, width, block, threads = _RELAXED[training], dims + gates, block_size(steps), torch.get_num_threads()
    matrix = (hidden + (block - 1) * dims) * width
    # Of the gradients of all spectra, which each thread adds up by itself.
    spectra = 2 * steps * dims * width * min(threads, batch)
    if steps * width > _LONGEST or (training and spectra > _MOST_OF_SPECTRA):
        return block, math.inf
    blocks, signals, kernels = -(-steps // block), 0.0, 0.0
    for level in range((blocks - 1).bit_length()):
        stages = math.log2(2 * block << level)
        # Every other so many blocks.
        times = (blocks - 1 - (1 << level)) // (2 << level) + 1
        signals += times * (block << level) * (own.stage * stages + own.point + own.signal * (dims - 1))
        kernels += (block << level) * own.kernel * stages * dims
    rows = -(-batch // threads) * threads  # threads have rows of their own
    work = -(-width // LANES) * LANES * (rows * signals + kernels) + own.making * steps * dims * order * width
    products = own.product * (hidden + block / 2 * dims) * width + own.number * (width + hidden)
    reading = own.building * matrix + own.reading * steps * max(matrix - _NEAR, 0)
    return block, own.call + work + rows * steps * products + reading


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
        work += written.reading * steps * _read(sizes, recurrent) + written.signal * rows * dims
        costs["written", size] = written.call + written.chunk * chunks + written.step * steps + work
    if compiled and at_rest:
        own = _CONVOLVED[training]
        transforms = transforms_cost(own.transforms, batch, steps, gates, dims)
        kernel = steps * dims * gates * (own.making * order + own.kernel)
        cell = own.product * rows * recurrent + own.reading * steps * _read(sizes, recurrent)
        costs["convolved", 0] = transforms + kernel + cell
    return costs


def merged_cost(sizes: Recurrence, *, training: bool, feedback: bool) -> float:
    """What :func:`merged_recurrence` takes, without or with a backward pass, in nanoseconds."""
    batch, steps, dims, order, hidden, gates = sizes
    own, linear, rows = _MERGED[training], dims * order, batch * steps
    matrix = (linear + hidden) * (linear + gates)
    numbers = own.number * (linear + hidden + gates)
    reading = own.reading * steps * _read(sizes, matrix, alone=matrix > MOST_NUMBERS)
    once = own.call + own.step * steps + own.building * matrix + reading
    return (once + rows * (own.product * matrix + numbers)) * (1 if feedback else _MERGED_ALONE)


def _read(sizes: Recurrence, numbers: int, *, alone: bool = True) -> float:
    """How many numbers of a matrix a thread reads anew in each step, of all of them or of its part. ``alone``: what else the sums
    are made of lies in memory."""
    return max(numbers / _sharing(sizes, numbers, alone=alone) - _NEAR, 0)


def _sharing(sizes: Recurrence, numbers: int, *, alone: bool) -> int:
    """How many threads share the steps of few rows by a matrix of so many numbers, as in team.h."""
    threads = min(torch.get_num_threads(), -(-sizes.hidden_size // PANEL), numbers // _SHARE)
    rows = threads * _FAR_ROWS if numbers >= _FAR else threads if numbers >= _EACH and not alone else threads - 1
    return threads if rows >= sizes.batch else 1


def lookahead_chunk(sizes: Recurrence, *, training: bool, measured: bool) -> int:
    """Steps per chunk of the look-ahead recurrence, without or with a backward pass.

    Where nothing was ``measured``, launches are what costs: long chunks, unless their short kernel outgrows the hidden state.
    """
    if not measured:
        longest = min(DEFAULT_CHUNK, max(sizes.steps, 1), max(4 * sizes.hidden_size, 256) // sizes.memory_d)
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

    By cost alone, so that a run with gradients may round otherwise than one without.

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
    feedback = (hidden_to_memory, memory_to_memory)
    return _cheapest(sizes, torch.get_num_threads(), feedback, training, compiled, measured, merges, relaxes, at_rest)


@lru_cache(maxsize=1 << 12)  # layers meet the same sizes again and again
def _cheapest(
    sizes: Recurrence,
    threads: int,  # which the costs ask for themselves
    feedback: tuple[bool, bool],
    training: bool,
    compiled: bool,
    measured: bool,
    merges: bool,
    relaxes: bool,
    at_rest: bool,
) -> tuple[str, int]:
    hidden_to_memory, memory_to_memory = feedback
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
