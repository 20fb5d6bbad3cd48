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

from .triton_parts import ALIGNED, activation, advance, derivative, memory_sizes, send_back

# The most columns: with so many, 192 rows of the matrix are held, 192 of the 255 registers that each of 256 threads can have.
_COLUMNS = 256


@triton.jit
def rows_of(matrix, first: tl.constexpr, end, COUNT: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    """COUNT rows of a matrix, (1, COUNT, COLUMNS), zero from row ``end`` on."""
    k = first + tl.arange(0, COUNT)[None, :, None]
    n = tl.arange(0, COLUMNS)[None, None, :]
    return tl.load(matrix + k * STRIDE + n, mask=(k < end) & (n < STRIDE), other=0.0)


@triton.jit
def by_warps(left, rows, SHARE: tl.constexpr):
    """left (1, K) * rows (1, K, COLUMNS), summed up within the threads: (1, SHARE, COLUMNS) or fewer."""
    K: tl.constexpr = rows.shape[1]
    APART: tl.constexpr = SHARE if SHARE < K else K
    return tl.sum(tl.reshape(left[:, :, None] * rows, (1, K // APART, APART, rows.shape[2])), axis=1)


@triton.jit
def halves(x):
    """(1, N) -> its first and its second half."""
    HALF: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, (1, 2, HALF)), (0, 2, 1)))


@triton.jit
def across_warps(part):
    """The sum over the second axis, such that each thread receives one column: the rest of a step is then done once, and not by
    each of the warps that shared the rows."""
    COLUMNS: tl.constexpr = part.shape[2]
    total = tl.permute(part, (0, 2, 1))
    for _ in tl.static_range(6):
        if total.shape[2] > 1:
            even, odd = tl.split(tl.reshape(total, (1, COLUMNS, total.shape[2] // 2, 2)))
            total = even + odd
    return tl.reshape(total, (1, COLUMNS))


@triton.jit
def by_square(y, square, held_0, held_1, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr, SHARE: tl.constexpr):
    """y (1, COLUMNS), the first WIDTH numbers of it, @ square (WIDTH, STRIDE), as :func:`by_warps`."""
    if COLUMNS < 256:
        part = by_warps(y, held_0, SHARE)
    else:
        low, high = halves(y)
        part = by_warps(low, held_0, SHARE)
        if WIDTH > 128:
            third, fourth = halves(high)
            part += by_warps(third, held_1, SHARE)
            if WIDTH > 192:
                seventh, eighth = halves(fourth)
                part += by_warps(seventh, rows_of(square, 192, WIDTH, 32, COLUMNS, STRIDE), SHARE)
                if WIDTH > 224:
                    part += by_warps(eighth, rows_of(square, 224, WIDTH, 32, COLUMNS, STRIDE), SHARE)
    return part


@triton.jit(do_not_specialize=["first", "count", "system", "further"])
def held_forward_kernel(
    known,
    matrix,
    square,
    u,
    hidden,
    initial,
    memory,
    after,
    power,
    response,
    first,
    count,
    steps,
    known_row,
    known_step,
    u_row,
    memory_row,
    system,
    further,
    KIND: tl.constexpr,
    SIZE: tl.constexpr,
    DIMS: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARE: tl.constexpr,
    LAGS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """:meth:`NaiveScan.forward` for one row; ``matrix`` is the step matrix with its rows filled up to a multiple of ALIGNED,
    ``square`` (W, the same) its last W rows. With ORDER > 0 :func:`time_loop.advance` follows, as in :mod:`triton_steps`."""
    WIDTH: tl.constexpr = DIMS + SIZE
    STRIDE: tl.constexpr = (WIDTH + ALIGNED - 1) // ALIGNED * ALIGNED
    OLDER: tl.constexpr = (CHUNK - 2) * DIMS if CHUNK > 2 else 0
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, COLUMNS)[None, :]
    of_hidden = (n >= DIMS) & (n < WIDTH)
    held_0 = rows_of(square, 0, WIDTH, 128 if COLUMNS == 256 else COLUMNS, COLUMNS, STRIDE)
    held_1 = held_0
    if COLUMNS == 256 and WIDTH > 128:
        held_1 = rows_of(square, 128, WIDTH, 64, COLUMNS, STRIDE)
    past = u + row * u_row + first * DIMS
    out = hidden + (row * steps + first) * SIZE - DIMS + n
    if first == 0:
        y = tl.load(initial + row * SIZE - DIMS + n, mask=of_hidden, other=0.0)
    else:
        y = tl.load(out - SIZE, mask=of_hidden, other=0.0)
    for j in range(count):
        now = tl.load(known + row * known_row + j * known_step + n, mask=n < WIDTH, other=0.0)
        part = by_square(y, square, held_0, held_1, WIDTH, COLUMNS, STRIDE, SHARE)
        # So many numbers of the u before, those of the last step being in y.
        older = (j - 1) * DIMS
        if OLDER > 0:
            for start in tl.range(0, older, LAGS):
                k = start + tl.arange(0, LAGS)
                before = tl.load(past + k[None, :], mask=k[None, :] < older, other=0.0)
                of_lags = matrix + (OLDER - older + k[None, :, None]) * STRIDE + n[:, None, :]
                fits = (k[None, :, None] < older) & (n < STRIDE)[:, None, :]
                part += by_warps(before, tl.load(of_lags, mask=fits, other=0.0), SHARE)
        sums = now + across_warps(part)
        y = tl.where(n < DIMS, sums, activation(sums, KIND))
        tl.store(out + j * SIZE, y, mask=of_hidden)
        if DIMS > 0:
            tl.store(past + j * DIMS + n, y, mask=n < DIMS)
            tl.debug_barrier()  # the next step reads what other threads wrote
    if ORDER > 0:  # noqa: SIM102, the compiler decides the one, the kernel the other
        if further != 0:
            tl.debug_barrier()
            rows = row + tl.arange(0, 1)
            advance(
                memory + rows * memory_row, u + rows * u_row + first * DIMS, after + rows * memory_row, rows >= 0,
                power, response, system, ORDER, DIMS, CHUNK, 1, BLOCK_M, BLOCK_L,
            )  # fmt: skip


@triton.jit(do_not_specialize=["first", "count", "system"])
def held_backward_kernel(
    square,
    grad_u,
    grad_sums,
    grads,
    hidden,
    carry,
    after,
    arrived,
    power,
    response,
    first,
    count,
    steps,
    grad_u_row,
    sums_row,
    arrived_row,
    system,
    KIND: tl.constexpr,
    SIZE: tl.constexpr,
    DIMS: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """:meth:`NaiveScan.backward` for one row.

    ``square`` (W, filled up) is the transposed one, [y before, the u of the steps before that], oldest first: what a step sends
    to these is added to ``grad_u``, from where it is read when their turn comes. ``carry`` (B, H) passes what reaches h from one
    call to the next. With ORDER > 0 the adjoint of :func:`time_loop.advance` comes first, as in :mod:`triton_steps`.
    """
    WIDTH: tl.constexpr = DIMS + SIZE
    OLDER: tl.constexpr = (CHUNK - 2) * DIMS if CHUNK > 2 else 0
    STRIDE: tl.constexpr = (WIDTH + OLDER + ALIGNED - 1) // ALIGNED * ALIGNED
    row = tl.program_id(0).to(tl.int64)
    if ORDER > 0:
        rows = row + tl.arange(0, 1)
        send_back(
            after + rows * arrived_row, grad_u + rows * grad_u_row, arrived + rows * arrived_row, rows >= 0, power, response,
            system, ORDER, DIMS, CHUNK, 1, BLOCK_M, BLOCK_L, BLOCK_C,
        )  # fmt: skip
        tl.debug_barrier()
    n = tl.arange(0, COLUMNS)[None, :]
    of_hidden = (n >= DIMS) & (n < WIDTH)
    held_0 = rows_of(square, 0, WIDTH, 128 if COLUMNS == 256 else COLUMNS, COLUMNS, STRIDE)
    held_1 = held_0
    if COLUMNS == 256 and WIDTH > 128:
        held_1 = rows_of(square, 128, WIDTH, 64, COLUMNS, STRIDE)
    of_u = grad_u + row * grad_u_row
    here = (row * steps + first) * SIZE - DIMS + n
    carried = carry + row * SIZE - DIMS + n
    # Where the gradients lie that reach y and, two steps and more before it, the u of a chunk.
    places = tl.where(n < DIMS, of_u + n, grads + here)
    steps_apart = tl.where(n < DIMS, DIMS, SIZE)
    last = count - 1
    grad = tl.load(places + last * steps_apart, mask=n < WIDTH, other=0.0)
    grad += tl.load(carried, mask=of_hidden, other=0.0)
    output = tl.load(hidden + here + last * SIZE, mask=of_hidden, other=0.0)
    for back in range(count):
        j = last - back
        sums = tl.where(n < DIMS, grad, derivative(grad, output, KIND))
        sums = tl.where(n < WIDTH, sums, 0.0)
        tl.store(grad_sums + row * sums_row + j * WIDTH + n, sums, mask=n < WIDTH)
        # Loads come before the product, which takes about as long as they do.
        there = tl.load(places + (j - 1) * steps_apart, mask=(n < WIDTH) & (j > 0), other=0.0)
        output = tl.load(hidden + here + (j - 1) * SIZE, mask=of_hidden & (j > 0), other=0.0)
        if OLDER > 0:
            oldest = (j - 1) * DIMS - OLDER + n - WIDTH
            sent_to = (n >= WIDTH) & (n < WIDTH + OLDER) & (oldest >= 0)
            there += tl.load(of_u + oldest, mask=sent_to, other=0.0)
        grad = there + across_warps(by_square(sums, square, held_0, held_1, WIDTH, COLUMNS, STRIDE, SHARE))
        if OLDER > 0:
            tl.store(of_u + oldest, grad, mask=sent_to)
            tl.debug_barrier()  # the next step reads what other threads wrote
    tl.store(carried, grad, mask=of_hidden)


def holds(kind: str, size: int, dims: int, chunk: int) -> bool:
    """Whether these kernels take such a step."""
    return kind not in ("lstm", "gru") and 0 < size and size + dims + max(chunk - 2, 0) * dims <= _COLUMNS


def held_sizes(kind: str, size: int, dims: int, chunk: int, order: int = 0) -> dict[str, Any]:
    """The constants of both kernels, and their number of warps; ``order`` is 0 where they leave the memory alone."""
    return {
        "KIND": kind,
        "SIZE": size,
        "DIMS": dims,
        "CHUNK": chunk,
        **_shared(size + dims),
        "LAGS": min(max(triton.next_power_of_2(max(chunk - 2, 0) * dims), 4), 16),
        "ALIGNED": ALIGNED,
        **memory_sizes(order, 1),
        "num_stages": 1,
    }


def held_backward_sizes(sizes: dict[str, Any]) -> dict[str, Any]:
    """What the backward kernel takes: columns for the u of a chunk too."""
    size, dims, chunk = sizes["SIZE"], sizes["DIMS"], sizes["CHUNK"]
    of_chunk = size + dims + max(chunk - 2, 0) * dims
    sizes = {name: size for name, size in sizes.items() if name != "LAGS"}
    return {**sizes, **_shared(of_chunk), "BLOCK_C": max(triton.next_power_of_2(chunk), 16)}


def _shared(width: int) -> dict[str, int]:
    """As many threads as columns, and four columns to a lane, so that four warps or lanes share the rows."""
    columns = max(triton.next_power_of_2(width), 32)
    return {"COLUMNS": columns, "SHARE": 4, "num_warps": columns // 32}
