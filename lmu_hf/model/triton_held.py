"""The kernels of :mod:`triton_scan` for hidden cells of one gate whose whole step fits the registers of a multiprocessor.

A program takes one row of the batch through the steps of a chunk. What a step needs of the one before is y = [u, h], W = D + H
numbers, of which it makes the next ones by one square matrix, and of the u before that, for which the lags of the short kernel
are left. The square matrix stays in registers for all steps, but for its last rows where they do not fit; y stays in registers
and shared memory. So no step waits for the L2 cache, which is what limits the kernels of :mod:`triton_steps`.

Tensors of a program are (1, COLUMNS), one number of y to a thread, or (1, rows, COLUMNS), with the columns across the lanes of a
warp and the rows across warps, SHARE of them; a thread adds up its rows before it meets the other warps.

Names as in :mod:`triton_scan`.
"""

# Like triton_scan.py.
try:
    import triton
    import triton.language as tl
except ImportError:
    raise

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .triton_parts import activation, derivative

# The most columns: with so many, 192 rows of the matrix are held, 192 of the 255 registers that each of 256 threads can have.
_COLUMNS = 256
# As many threads as columns, four columns to a lane: so many warps or lanes are left to share the rows.
SHARE = tl.constexpr(4)


@triton.jit
def rows_of(matrix, first: tl.constexpr, end, COUNT: tl.constexpr, COLUMNS: tl.constexpr):
    """COUNT rows of a matrix with COLUMNS, (1, COUNT, COLUMNS), zero from row ``end`` on."""
    k = first + tl.arange(0, COUNT)[None, :, None]
    n = tl.arange(0, COLUMNS)[None, None, :]
    return tl.load(matrix + k * COLUMNS + n, mask=k < end, other=0.0)


@triton.jit
def by_warps(left, rows):
    """left (1, K) * rows (1, K, COLUMNS), summed up within the threads: (1, SHARE, COLUMNS)."""
    K: tl.constexpr = rows.shape[1]
    return tl.sum(tl.reshape(left[:, :, None] * rows, (1, K // SHARE, SHARE, rows.shape[2])), axis=1)


@triton.jit
def halves(x):
    """(1, N) -> its first and its second half."""
    HALF: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, (1, 2, HALF)), (0, 2, 1)))


@triton.jit
def across_warps(part):
    """The sum over the second axis of (1, SHARE, COLUMNS), such that each thread receives one column: the rest of a step is then
    done once, and not by each of the warps that shared the rows."""
    even, odd = tl.split(tl.reshape(tl.permute(part, (0, 2, 1)), (1, part.shape[2], 2, 2)))
    even, odd = tl.split(even + odd)
    return even + odd


@triton.jit
def held_rows(square, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows of a square matrix (WIDTH, COLUMNS) that stay in registers: 128 or all of them, and 64 more where there are."""
    first = rows_of(square, 0, WIDTH, 128 if COLUMNS == 256 else COLUMNS, COLUMNS)
    further = first
    if COLUMNS == 256 and WIDTH > 128:
        further = rows_of(square, 128, WIDTH, 64, COLUMNS)
    return first, further


@triton.jit
def by_square(y, square, held_0, held_1, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """y (1, COLUMNS), the first WIDTH numbers of it, @ square (WIDTH, COLUMNS), as :func:`by_warps`. The ``held_...`` are what
    :func:`held_rows` gave."""
    if COLUMNS < 256:
        part = by_warps(y, held_0)
    else:
        low, high = halves(y)
        part = by_warps(low, held_0)
        if WIDTH > 128:
            third, fourth = halves(high)
            part += by_warps(third, held_1)
            if WIDTH > 192:
                seventh, eighth = halves(fourth)
                part += by_warps(seventh, rows_of(square, 192, WIDTH, 32, COLUMNS))
                if WIDTH > 224:
                    part += by_warps(eighth, rows_of(square, 224, WIDTH, 32, COLUMNS))
    return part


@triton.jit
def last_of(x, COUNT: tl.constexpr):
    """The last COUNT numbers of x (1, N)."""
    for _ in tl.static_range(8):
        if x.shape[1] > COUNT:
            _first, x = halves(x)
    return x


@triton.jit
def run_forwards(
    known, known_step, matrix, past, hidden, initial, row, first, count, steps,
    KIND: tl.constexpr, SIZE: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr, HISTORY: tl.constexpr,
):  # fmt: skip
    """``count`` steps of a row from step ``first`` on, which a chunk starts with if there are memory dimensions.

    ``known`` points at what is known of the first of them, ``past`` at where its u goes. ``matrix`` is the step matrix, its rows
    filled up to COLUMNS; the last HISTORY of these make the u of the step once more, so that each number of the u of the chunk
    has a thread that keeps it.
    """
    WIDTH: tl.constexpr = DIMS + SIZE
    OLDER: tl.constexpr = (CHUNK - 2) * DIMS if CHUNK > 2 else 0
    n = tl.arange(0, COLUMNS)[None, :]
    of_hidden = (n >= DIMS) & (n < WIDTH)
    square = matrix + OLDER * COLUMNS  # what y is multiplied with
    held_0, held_1 = held_rows(square, WIDTH, COLUMNS)
    number = n - (COLUMNS - HISTORY)  # of the u of the chunk
    column = n
    if HISTORY > 0:
        column = tl.where(number >= 0, number % DIMS, n)
    out = hidden + (row * steps + first) * SIZE - DIMS + n
    if first == 0:
        y = tl.load(initial + row * SIZE - DIMS + n, mask=of_hidden, other=0.0)
    else:
        y = tl.load(out - SIZE, mask=of_hidden, other=0.0)
    for j in range(count):
        now = tl.load(known + j * known_step + column, mask=column < WIDTH, other=0.0)
        part = by_square(y, square, held_0, held_1, WIDTH, COLUMNS)
        if HISTORY > 0:
            # So many numbers of the u before, those of the last step being in y once more.
            older = (j - 1) * DIMS
            lags = matrix + (OLDER - older) * COLUMNS
            if HISTORY > 16:
                early, late = halves(last_of(y, HISTORY))
                part += by_warps(early, rows_of(lags, 0, older, HISTORY // 2, COLUMNS))
                if older > HISTORY // 2:
                    part += by_warps(late, rows_of(lags, HISTORY // 2, older, HISTORY // 2, COLUMNS))
            else:
                part += by_warps(last_of(y, HISTORY), rows_of(lags, 0, older, HISTORY, COLUMNS))
        sums = now + across_warps(part)
        new = tl.where(n < DIMS, sums, activation(sums, KIND))
        if HISTORY > 0:
            new = tl.where(number >= 0, tl.where(number // DIMS == j, sums, y), new)
        y = new
        tl.store(out + j * SIZE, y, mask=of_hidden)
        if DIMS > 0:
            tl.store(past + j * DIMS + n, y, mask=n < DIMS)


@triton.jit
def run_backwards(
    square, grad_u, grad_sums, grads, hidden, carry, row, first, count, steps,
    KIND: tl.constexpr, SIZE: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The adjoint of :func:`run_forwards`.

    ``grad_u`` and ``grad_sums`` point at those of the first step. ``square`` (W, COLUMNS) is the transposed one, [y before, the
    u of the steps before that], oldest first: what a step sends to these is added to ``grad_u``, from where it is read when their
    turn comes. ``carry`` (B, H) passes what reaches h from one call to the next.
    """
    WIDTH: tl.constexpr = DIMS + SIZE
    OLDER: tl.constexpr = (CHUNK - 2) * DIMS if CHUNK > 2 else 0
    n = tl.arange(0, COLUMNS)[None, :]
    of_hidden = (n >= DIMS) & (n < WIDTH)
    held_0, held_1 = held_rows(square, WIDTH, COLUMNS)
    here = (row * steps + first) * SIZE - DIMS + n
    carried = carry + row * SIZE - DIMS + n
    # Where the gradients that reach y lie, and how far those of the next step.
    places = tl.where(n < DIMS, grad_u + n, grads + here)
    apart = tl.where(n < DIMS, DIMS, SIZE)
    last = count - 1
    grad = tl.load(places + last * apart, mask=n < WIDTH, other=0.0)
    grad += tl.load(carried, mask=of_hidden, other=0.0)
    output = tl.load(hidden + here + last * SIZE, mask=of_hidden, other=0.0)
    for back in range(count):
        j = last - back
        sums = tl.where(n < DIMS, grad, derivative(grad, output, KIND))
        sums = tl.where(n < WIDTH, sums, 0.0)
        tl.store(grad_sums + j * WIDTH + n, sums, mask=n < WIDTH)
        # Loads come before the product, which takes about as long as they do.
        there = tl.load(places + (j - 1) * apart, mask=(n < WIDTH) & (j > 0), other=0.0)
        output = tl.load(hidden + here + (j - 1) * SIZE, mask=of_hidden & (j > 0), other=0.0)
        if OLDER > 0:
            oldest = (j - 1) * DIMS - OLDER + n - WIDTH
            sent_to = (n >= WIDTH) & (n < WIDTH + OLDER) & (oldest >= 0)
            there += tl.load(grad_u + oldest, mask=sent_to, other=0.0)
        grad = there + across_warps(by_square(sums, square, held_0, held_1, WIDTH, COLUMNS))
        if OLDER > 0:
            tl.store(grad_u + oldest, grad, mask=sent_to)
            tl.debug_barrier()  # the next step reads what other threads wrote
    tl.store(carried, grad, mask=of_hidden)


@triton.jit(do_not_specialize=["first", "count"])
def held_forward_kernel(
    known, matrix, u, hidden, initial, first, count, steps, known_row, known_step, u_row,
    KIND: tl.constexpr, SIZE: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr, HISTORY: tl.constexpr,
):  # fmt: skip
    """:meth:`NaiveScan.forward` for one row."""
    row = tl.program_id(0).to(tl.int64)
    run_forwards(
        known + row * known_row, known_step, matrix, u + row * u_row + first * DIMS, hidden, initial, row,
        first, count, steps, KIND, SIZE, DIMS, CHUNK, COLUMNS, HISTORY,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first", "count"])
def held_backward_kernel(
    square, grad_u, grad_sums, grads, hidden, carry, first, count, steps, grad_u_row, sums_row,
    KIND: tl.constexpr, SIZE: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """:meth:`NaiveScan.backward` for one row."""
    row = tl.program_id(0).to(tl.int64)
    run_backwards(
        square, grad_u + row * grad_u_row, grad_sums + row * sums_row, grads, hidden, carry, row, first, count, steps,
        KIND, SIZE, DIMS, CHUNK, COLUMNS,
    )  # fmt: skip


def holds(kind: str, size: int, dims: int, chunk: int) -> bool:
    """Whether these kernels take such a step."""
    return kind not in ("lstm", "gru") and size > 0 and size + dims + _history(dims, chunk) <= _COLUMNS


def held_sizes(kind: str, size: int, dims: int, chunk: int) -> dict[str, Any]:
    """The constants of both kernels, and their number of warps."""
    history = _history(dims, chunk)
    columns = max(triton.next_power_of_2(size + dims + history), 32)
    step = {"KIND": kind, "SIZE": size, "DIMS": dims, "CHUNK": chunk}
    return {**step, "COLUMNS": columns, "HISTORY": history, "num_warps": columns // 32, "num_stages": 1}


def with_history(matrix: Tensor, dims: int, columns: int, history: int) -> Tensor:
    """A step matrix as :func:`run_forwards` takes it."""
    rest = columns - history - matrix.shape[1]
    again = matrix[:, :dims].repeat(1, -(-history // dims))[:, :history] if history else matrix[:, :0]
    return torch.cat([F.pad(matrix, (0, rest)) if rest else matrix, again], dim=1)


def _history(dims: int, chunk: int) -> int:
    """Columns for the u of a chunk that are read two steps later, or after that."""
    return triton.next_power_of_2(max((chunk - 2) * dims, 4)) if chunk > 2 and dims else 0
