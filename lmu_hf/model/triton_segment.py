"""The kernels of :mod:`triton_scan` for all chunks of a segment whose state is fed back into the memory, in one launch.

Between the chunks lie products that all rows of the batch share, with the matrix that folds the memory into the sums of a chunk.
Launched one by one, they and the steps keep the host busier than the device. So as many programs as there are multiprocessors
stay for the whole segment, and wait for each other twice a chunk: some take the rows through their steps, as in
:mod:`triton_held`, and on to the next chunk; then each makes some tiles of the product. They are launched cooperatively, which
makes sure that all of them run.

Names as in :mod:`triton_scan`; M rows of the memory, D * N, and S sums of a chunk, C * W.
"""

# Like triton_scan.py.
try:
    import triton
    import triton.language as tl
except ImportError:
    raise

from typing import Any

from .triton_held import held_sizes, run_backwards, run_forwards
from .triton_parts import advance, memory_sizes, send_back

# Programs that share the rows of the long product backwards, each with a sum of its own for the next chunk to add up.
SPLITS = 16


@triton.jit
def meet(counter, arrived):
    """Waits until all programs are here and what they wrote can be read; ``arrived`` is how often they will have met."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(counter, 0, sem="acq_rel", scope="gpu") < arrived * tl.num_programs(0):
        pass
    tl.debug_barrier()


@triton.jit
def add_tile(
    total, left, right, row, column, batch, left_row, first, apart,
    DEPTH: tl.constexpr, ACROSS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Adds to ``total`` the rows ``row`` and columns ``column`` of left (B, DEPTH) @ right (DEPTH, ACROSS), of whose DEPTH every
    INNER numbers from ``first`` on, ``apart`` from each other."""
    for start in tl.range(first, DEPTH, apart, num_stages=3):
        k = start + tl.arange(0, INNER)
        of_left = tl.load(left + row * left_row + k[None, :], mask=(row < batch) & (k[None, :] < DEPTH), other=0.0)
        of_right = tl.load(right + k[:, None] * ACROSS + column, mask=(k[:, None] < DEPTH) & (column < ACROSS), other=0.0)
        total = tl.dot(of_left, of_right, total, input_precision="ieee")
    return total


@triton.jit
def add_fold(
    known, starts, fold, batch, known_row, starts_row,
    MEMORY: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, SUMS_AT_ONCE: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """known (B, S) += starts (B, M) @ fold (M, S), some tiles of it."""
    across = (SUMS + SUMS_AT_ONCE - 1) // SUMS_AT_ONCE
    tiles = (batch + ROWS - 1) // ROWS * across
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = (tile // across * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        column = tile % across * SUMS_AT_ONCE + tl.arange(0, SUMS_AT_ONCE)[None, :]
        place = known + row * known_row + column
        fits = (row < batch) & (column < SUMS)
        total = tl.load(place, mask=fits, other=0.0)
        total = add_tile(total, starts, fold, row, column, batch, starts_row, 0, INNER, MEMORY, SUMS, INNER)
        tl.store(place, total, mask=fits)


@triton.jit
def send_to_starts(
    sums, parts, unfold, batch, sums_row,
    MEMORY: tl.constexpr, SUMS: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, MEMORY_AT_ONCE: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """parts (SPLITS, B, M), which add up to sums (B, S) @ unfold (S, M), some tiles of some of them."""
    across = (MEMORY + MEMORY_AT_ONCE - 1) // MEMORY_AT_ONCE
    tiles = (batch + ROWS - 1) // ROWS * across
    for item in range(tl.program_id(0), tiles * SPLITS, tl.num_programs(0)):
        tile = item // SPLITS
        split = item % SPLITS
        row = (tile // across * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        column = tile % across * MEMORY_AT_ONCE + tl.arange(0, MEMORY_AT_ONCE)[None, :]
        total = tl.full([ROWS, MEMORY_AT_ONCE], 0.0, tl.float32)
        first, apart = split * INNER, SPLITS * INNER
        total = add_tile(total, sums, unfold, row, column, batch, sums_row, first, apart, SUMS, MEMORY, INNER)
        tl.store(parts + (split * batch + row) * MEMORY + column, total, mask=(row < batch) & (column < MEMORY))


@triton.jit(do_not_specialize=["first", "chunks", "system", "further"])
def segment_forward_kernel(
    known, matrix, u, hidden, initial, starts, fold, power, response, counter,
    first, chunks, batch, steps, known_row, u_row, starts_row, system, further,
    KIND: tl.constexpr, SIZE: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr, HISTORY: tl.constexpr,
    ORDER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
    ROWS: tl.constexpr, SUMS_AT_ONCE: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """:meth:`TimeLoop.feedback_forward`: ``chunks`` chunks from step ``first`` on.

    ``known`` is of the segment, ``u`` and ``starts`` are of all chunks; the first of the segment has its memory there.
    ``power`` and ``response`` are the matrices of one system or, where ``system`` is 1 and not 0, of one for each memory
    dimension. With ``further`` to go after the segment, the memory at its end is written too.
    """
    WIDTH: tl.constexpr = DIMS + SIZE
    MEMORY: tl.constexpr = DIMS * ORDER
    for index in range(chunks):
        at = first + index * CHUNK
        place = starts + at // CHUNK * MEMORY
        add_fold(
            known + index * (CHUNK * WIDTH), place, fold, batch, known_row, starts_row,
            MEMORY, CHUNK * WIDTH, ROWS, SUMS_AT_ONCE, INNER,
        )  # fmt: skip
        meet(counter, 2 * index + 1)
        for program in range(tl.program_id(0), batch, tl.num_programs(0)):
            row = tl.full([], program, tl.int64)
            past = u + row * u_row + at * DIMS
            run_forwards(
                known + row * known_row + index * (CHUNK * WIDTH), WIDTH, matrix, past, hidden, initial, row,
                at, tl.minimum(CHUNK, steps - at), steps, KIND, SIZE, DIMS, CHUNK, COLUMNS, HISTORY,
            )  # fmt: skip
            if (index + 1 < chunks) | (further != 0):
                tl.debug_barrier()
                rows = row + tl.arange(0, 1)
                start = place + rows * starts_row
                advance(
                    start, u + rows * u_row + at * DIMS, start + MEMORY, rows >= 0, power, response, system,
                    ORDER, DIMS, CHUNK, 1, BLOCK_M, BLOCK_L,
                )  # fmt: skip
        if index + 1 < chunks:
            meet(counter, 2 * index + 2)


@triton.jit(do_not_specialize=["first", "chunks", "system"])
def segment_backward_kernel(
    square, grad_u, grad_sums, grads, hidden, carry, arrived, grad_starts, parts, unfold, power, response, counter,
    first, chunks, batch, steps, grad_u_row, sums_row, arrived_row, grad_starts_row, system,
    KIND: tl.constexpr, SIZE: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ORDER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, MEMORY_AT_ONCE: tl.constexpr, INNER: tl.constexpr, SPLITS: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    """:meth:`TimeLoop.feedback_backward`. ``grad_sums`` and ``arrived`` are of the segment, ``grad_u`` and ``grad_starts``, which
    is read only with STARTS, of all chunks; ``parts`` (SPLITS, B, M) takes what a chunk sends to the memory at its start, by
    ``unfold`` (S, M), the transposed fold."""
    WIDTH: tl.constexpr = DIMS + SIZE
    MEMORY: tl.constexpr = DIMS * ORDER
    n = tl.arange(0, WHOLE)[None, :]
    for back in range(chunks + 1):
        index = chunks - 1 - back
        at = first + index * CHUNK
        for program in range(tl.program_id(0), batch, tl.num_programs(0)):
            row = tl.full([], program, tl.int64)
            after = arrived + row * arrived_row + (index + 1) * MEMORY
            if back > 0:
                # What the steps of the chunk after sent back, and what came from elsewhere.
                total = tl.load(after + n, mask=n < MEMORY, other=0.0)
                for split in range(SPLITS):
                    total += tl.load(parts + (split * batch + row) * MEMORY + n, mask=n < MEMORY, other=0.0)
                if STARTS:
                    of_chunk = grad_starts + row * grad_starts_row + (at // CHUNK + 1) * MEMORY
                    total += tl.load(of_chunk + n, mask=n < MEMORY, other=0.0)
                tl.store(after + n, total, mask=n < MEMORY)
                tl.debug_barrier()
            if index >= 0:
                rows = row + tl.arange(0, 1)
                there = arrived + rows * arrived_row + index * MEMORY
                send_back(
                    there + MEMORY, grad_u + rows * grad_u_row + at * DIMS, there, rows >= 0, power, response, system,
                    ORDER, DIMS, CHUNK, 1, BLOCK_M, BLOCK_L, BLOCK_C,
                )  # fmt: skip
                tl.debug_barrier()
                run_backwards(
                    square, grad_u + row * grad_u_row + at * DIMS, grad_sums + row * sums_row + index * (CHUNK * WIDTH),
                    grads, hidden, carry, row, at, tl.minimum(CHUNK, steps - at), steps,
                    KIND, SIZE, DIMS, CHUNK, COLUMNS,
                )  # fmt: skip
                tl.debug_barrier()
        if index >= 0:
            meet(counter, 2 * back + 1)
            send_to_starts(
                grad_sums + index * (CHUNK * WIDTH), parts, unfold, batch, sums_row,
                MEMORY, CHUNK * WIDTH, SPLITS, ROWS, MEMORY_AT_ONCE, INNER,
            )  # fmt: skip
            meet(counter, 2 * back + 2)


def segment_sizes(kind: str, size: int, dims: int, chunk: int, order: int, batch: int) -> dict[str, Any]:
    """The constants of the forward kernel, and its number of warps."""
    tile = {"ROWS": min(max(triton.next_power_of_2(batch), 16), 64), "SUMS_AT_ONCE": 128, "INNER": 32}
    return {**held_sizes(kind, size, dims, chunk), **memory_sizes(order, 1), **tile}


def segment_backward_sizes(sizes: dict[str, Any]) -> dict[str, Any]:
    """What the backward kernel takes."""
    sizes = {**sizes, "MEMORY_AT_ONCE": 64, "SPLITS": SPLITS}
    sizes["BLOCK_C"] = max(triton.next_power_of_2(sizes["CHUNK"]), 16)
    sizes["WHOLE"] = triton.next_power_of_2(sizes["DIMS"] * sizes["ORDER"])
    return sizes
