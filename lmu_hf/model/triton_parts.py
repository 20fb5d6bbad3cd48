"""What the kernels of :mod:`triton_scan` are made of: pointwise functions, loads and stores of rows, products; and the sizes of
their tiles.

Tensors of a program: rows of the batch (BLOCK_B), units or numbers of u (BLOCK_N). ``live`` tells which rows exist.
"""

# Like triton_scan.py.
try:
    import triton
    import triton.language as tl
except ImportError:
    raise

from typing import Any

import torch
from torch import Tensor

# Numbers of R that a program keeps in registers: a quarter of the 64 K registers of a multiprocessor.
_HELD = 1 << 14
# Rows of the matrices are filled up to a multiple of this, for loads of 16 bytes, the longest there are.
ALIGNED = 8
# Numbers of a tile, so many that a thread has 32 loads under way.
_TILE = 1 << 13


@triton.jit
def tanh(x):
    size = tl.abs(x)
    square = x * x
    # Near 0, where 1 - 2 / (exp(2 x) + 1) cancels: x + x^3 p(x^2), p fitted to a relative error of 6e-9 for |x| < 0.6.
    series = -0.005905871279537678 * square + 0.02080538682639599
    series = series * square - 0.053786683827638626
    series = series * square + 0.13331958651542664
    series = series * square - 0.33333298563957214
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.6, x + x * square * series, tl.where(x < 0, -far, far))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activation(x, KIND: tl.constexpr):
    if KIND == "tanh":
        x = tanh(x)
    elif KIND == "sigmoid":
        x = sigmoid(x)
    elif KIND == "relu":
        x = tl.where(x <= 0, 0.0, x)  # NaN stays NaN
    return x


@triton.jit
def derivative(grad, y, KIND: tl.constexpr):
    """f' from f."""
    if KIND == "tanh":
        grad = grad * (1.0 - y * y)
    elif KIND == "sigmoid":
        grad = grad * ((1.0 - y) * y)
    elif KIND == "relu":
        grad = tl.where(y <= 0, 0.0, grad)
    return grad


@triton.jit
def read(tensor, column, live, fits):
    """(BLOCK_B, BLOCK_N) of the rows at ``tensor``, float32."""
    return tl.load(tensor[:, None] + column[None, :], mask=live[:, None] & fits[None, :], other=0.0)


@triton.jit
def write(tensor, column, live, fits, value):
    tl.store(tensor[:, None] + column[None, :], value, mask=live[:, None] & fits[None, :])


@triton.jit
def hold(matrix, stride: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """(SIZE, PADDED) numbers of a matrix, (1, BLOCK, BLOCK)."""
    k = tl.arange(0, BLOCK)[None, :, None]
    n = tl.arange(0, BLOCK)[None, None, :]
    return tl.load(matrix + k * stride + n, mask=(k < SIZE) & (n < PADDED), other=0.0)


@triton.jit
def by_held(row, live, held, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """row (BLOCK_B, SIZE) @ what :func:`hold` gave."""
    k = tl.arange(0, BLOCK)[None, :, None]
    left = tl.load(row[:, None, None] + k, mask=live[:, None, None] & (k < SIZE), other=0.0)
    return tl.sum(left * held, axis=1)


@triton.jit
def add_product(
    part,
    row,
    live,
    matrix,
    column,
    fits,
    inner,
    k_stride,
    n_stride,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
    APART: tl.constexpr = 1,
):
    """Adds to ``part`` (BLOCK_B, BLOCK_K, BLOCK_N) what summed over its second axis is row (BLOCK_B, inner) @ matrix[:, column].
    The numbers of a row are APART from each other.

    Several products are summed up once: each sum has all threads wait for each other. Three axes from the start, because then
    the numbers of a tile stay in the threads that loaded them. The loads of UNROLL tiles are under way together; of 0, there is
    only one tile, and no loop.
    """
    if UNROLL == 0:
        part += tile(row, live, matrix, column, fits, 0, inner, k_stride, n_stride, BLOCK_K, APART)
    else:
        for start in tl.range(0, inner, BLOCK_K, loop_unroll_factor=UNROLL):
            part += tile(row, live, matrix, column, fits, start, inner, k_stride, n_stride, BLOCK_K, APART)
    return part


@triton.jit
def tile(row, live, matrix, column, fits, start, inner, k_stride, n_stride, BLOCK_K: tl.constexpr, APART: tl.constexpr = 1):
    """Rows ``start`` to ``start`` + BLOCK_K of a product, not yet summed up."""
    k = start + tl.arange(0, BLOCK_K)[None, :, None]
    left = tl.load(row[:, None, None] + k * APART, mask=live[:, None, None] & (k < inner), other=0.0)
    n = column[None, None, :]
    right = tl.load(matrix + k * k_stride + n * n_stride, mask=(k < inner) & fits[None, None, :], other=0.0)
    return left * right


@triton.jit
def gate(
    number: tl.constexpr,
    before,
    past,
    live,
    recurrent,
    kernel,
    held,
    n,
    used,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    GATES: tl.constexpr,
    PAST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HELD: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """h @ R + [u of the chunk so far] @ G of some units' gate."""
    stride: tl.constexpr = GATES * PADDED
    column = number * PADDED + n
    fits = n < PADDED
    part = tl.full([BLOCK_B, BLOCK_K, BLOCK_N], 0.0, tl.float32)
    if PAST > 0:
        part = add_product(part, past, live, kernel, column, fits, used, stride, 1, BLOCK_K, PAST > BLOCK_K)
    if not HELD:
        part = add_product(part, before, live, recurrent, column, fits, SIZE, stride, 1, BLOCK_K, UNROLL)
    total = tl.sum(part, axis=1)
    if HELD:
        total += by_held(before, live, held, SIZE, BLOCK_N)
    return total


@triton.jit
def arriving(
    later,
    live,
    transposed,
    held_0,
    held_1,
    held_2,
    held_3,
    n,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    GATES: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HELD: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Gradients of the sums of the step after @ R^T: what reaches some units of h."""
    fits = n < PADDED
    part = tl.full([BLOCK_B, BLOCK_K, BLOCK_N], 0.0, tl.float32)
    inner: tl.constexpr = DIMS if HELD else DIMS + GATES * SIZE
    if inner > 0:
        part = add_product(part, later, live, transposed, n, fits, inner, PADDED, 1, BLOCK_K, UNROLL)
    total = tl.sum(part, axis=1)
    if HELD:
        total += by_held(later + DIMS, live, held_0, SIZE, BLOCK_N)
        if GATES == 4:
            total += by_held(later + DIMS + SIZE, live, held_1, SIZE, BLOCK_N)
            total += by_held(later + DIMS + 2 * SIZE, live, held_2, SIZE, BLOCK_N)
            total += by_held(later + DIMS + 3 * SIZE, live, held_3, SIZE, BLOCK_N)
    return total


@triton.jit
def advance(
    memory, u, after, live, power, response, system,
    ORDER: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """The memory of some rows a chunk later: m (D, N) @ power^T + u (C, D) @ response, one memory dimension at a time."""
    for d in range(0, DIMS):
        of_d = power + d * system * (ORDER * ORDER)
        by_lag = response + d * system * (CHUNK * ORDER)
        for start in range(0, ORDER, BLOCK_M):
            n = start + tl.arange(0, BLOCK_M)
            fits = n < ORDER
            part = tl.full([BLOCK_B, BLOCK_L, BLOCK_M], 0.0, tl.float32)
            part = add_product(part, u + d, live, by_lag, n, fits, CHUNK, ORDER, 1, BLOCK_L, 1, DIMS)
            part = add_product(part, memory + d * ORDER, live, of_d, n, fits, ORDER, 1, ORDER, BLOCK_L, 2)
            write(after + d * ORDER, n, live, fits, tl.sum(part, axis=1))


@triton.jit
def send_back(
    after, grad_u, arrived, live, power, response, system,
    ORDER: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The adjoint of :func:`advance`: adds ``after`` @ response^T to the gradient of u, and writes ``after`` @ power."""
    # The same number of products in a tile, fewer of them columns: a chunk is shorter than a memory.
    BLOCK_J: tl.constexpr = BLOCK_M if BLOCK_M < BLOCK_C else BLOCK_C
    BLOCK_I: tl.constexpr = BLOCK_L * (BLOCK_M // BLOCK_J)
    for d in range(0, DIMS):
        of_d = power + d * system * (ORDER * ORDER)
        by_lag = response + d * system * (CHUNK * ORDER)
        for start in range(0, CHUNK, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            part = tl.full([BLOCK_B, BLOCK_I, BLOCK_J], 0.0, tl.float32)
            part = add_product(part, after + d * ORDER, live, by_lag, j, j < CHUNK, ORDER, 1, ORDER, BLOCK_I, 1)
            there = read(grad_u + d, j * DIMS, live, j < CHUNK)
            write(grad_u + d, j * DIMS, live, j < CHUNK, there + tl.sum(part, axis=1))
        for start in range(0, ORDER, BLOCK_M):
            n = start + tl.arange(0, BLOCK_M)
            fits = n < ORDER
            part = tl.full([BLOCK_B, BLOCK_L, BLOCK_M], 0.0, tl.float32)
            part = add_product(part, after + d * ORDER, live, of_d, n, fits, ORDER, ORDER, 1, BLOCK_L, 2)
            write(arrived + d * ORDER, n, live, fits, tl.sum(part, axis=1))


def takes_memory(dims: int, order: int) -> bool:
    """Whether the way of the memory from chunk to chunk belongs into the kernels: each program reads all of its matrices, for its
    few rows, which saves three launches and is worth it while they are of the size of R."""
    return 0 < dims <= 8 and dims * order * order <= 1 << 17


def block_sizes(kind: str, size: int, dims: int, chunk: int, rows: int, order: int = 0) -> dict[str, Any]:
    """The constants of both kernels for so many rows per program, and their number of warps; ``order`` is 0 where they leave
    the memory alone."""
    width = min(max(triton.next_power_of_2(max(size, 1)), 16), 256)
    gates = 4 if kind in ("lstm", "gru") else 1
    held = rows == 1 and 0 < size <= width and gates * width * width <= _HELD
    tile = _TILE // rows
    dims_at_once = min(triton.next_power_of_2(max(dims, 1)), 64)
    longest = triton.next_power_of_2(max(size, chunk * dims, 16))
    return {
        "KIND": kind,
        "SIZE": size,
        "DIMS": dims,
        "CHUNK": chunk,
        "BLOCK_B": rows,
        "BLOCK_N": width,
        "BLOCK_K": min(max(tile // width, 8), 64),
        "BLOCK_D": dims_at_once,
        "BLOCK_R": min(max(tile // dims_at_once, 16), longest, 1024),
        "ALIGNED": ALIGNED,
        "HELD": held,
        "UNROLL": 2,
        **memory_sizes(order, rows),
        "num_warps": 16 if held and gates * width * width > _TILE else 8,
        "num_stages": 1,  # no load is moved across steps
    }


def memory_sizes(order: int, rows: int) -> dict[str, Any]:
    """Those of :func:`block_sizes` that concern the memory."""
    coefficients = min(max(triton.next_power_of_2(max(order, 1)), 16), 256)
    return {"ORDER": order, "BLOCK_M": coefficients, "BLOCK_L": min(max(_TILE // rows // coefficients, 8), 64)}


def backward_sizes(sizes: dict[str, Any]) -> dict[str, Any]:
    """What the backward kernel takes otherwise: longer tiles of the sums that u had a part in, which are those of a chunk; and
    with one row, and one gate, more of smaller tiles of R."""
    longest = max(min(_TILE // sizes["BLOCK_B"] // 2, 2048) // sizes["BLOCK_D"], 16)
    sizes = {**sizes, "BLOCK_R": longest, "BLOCK_C": max(triton.next_power_of_2(sizes["CHUNK"]), 16)}
    if sizes["BLOCK_B"] > 1 or sizes["KIND"] in ("lstm", "gru") or sizes["BLOCK_K"] < 32:
        return sizes
    return {**sizes, "BLOCK_K": 16, "UNROLL": 4}


def rows_per_program(batch: int, like: Tensor) -> int:
    """One, two or four: the fewest that leave no program waiting for a processor, each of which has registers for one of them;
    with so many rows that all leave some, four."""
    return next((rows for rows in (1, 2) if batch <= rows * processors(like)), 4)


def processors(like: Tensor) -> int:
    """Multiprocessors of the device; 1 under the interpreter, which runs one program after the other."""
    return torch.cuda.get_device_properties(like.device).multi_processor_count if like.is_cuda else 1
