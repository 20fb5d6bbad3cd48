"""The kernels of :mod:`triton_scan`: the steps of a chunk, forwards and backwards, and the way of the memory to the next one.

Names as there. Arguments called ``..._row`` and ``..._step`` are distances between rows of the batch and between steps.
"""

# Like triton_scan.py.
try:
    import triton
    import triton.language as tl
except ImportError:
    raise

from .triton_parts import (
    activation,
    add_product,
    advance,
    arriving,
    derivative,
    gate,
    hold,
    read,
    send_back,
    sigmoid,
    tanh,
    write,
)


@triton.jit(do_not_specialize=["first", "count", "system", "further"])
def forward_kernel(
    known,
    to_u,
    kernel,
    recurrent,
    u,
    hidden,
    cell,
    gates,
    initial,
    initial_cell,
    memory,
    after,
    power,
    response,
    first,
    count,
    batch,
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
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ALIGNED: tl.constexpr,
    HELD: tl.constexpr,
    UNROLL: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """:meth:`NaiveScan.forward`, BLOCK_N units and BLOCK_D numbers of u at a time, in tiles of BLOCK_K and BLOCK_R rows.

    ``to_u`` (D, (C - 1) * D + H) are the columns of the step matrix that make u, transposed. The others, each gate filled up to
    PADDED columns, are ``kernel`` ((C - 1) * D, ...), which multiplies the u of the chunk so far, and ``recurrent`` (H, ...).

    With ORDER > 0, and if there is ``further`` to go, then :func:`time_loop.advance` from ``memory`` to ``after``, both
    (B, D * N) with rows ``memory_row`` apart. ``power`` and ``response`` are the matrices of one system or, where ``system`` is
    1 and not 0, of one for each memory dimension.
    """
    GATES: tl.constexpr = 4 if KIND == "lstm" or KIND == "gru" else 1
    PADDED: tl.constexpr = (SIZE + ALIGNED - 1) // ALIGNED * ALIGNED
    PAST: tl.constexpr = (CHUNK - 1) * DIMS
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = row < batch
    held_0 = row
    held_1 = row
    held_2 = row
    held_3 = row
    if HELD:
        held_0 = hold(recurrent, GATES * PADDED, SIZE, PADDED, BLOCK_N)
        if GATES == 4:
            held_1 = hold(recurrent + PADDED, GATES * PADDED, SIZE, PADDED, BLOCK_N)
            held_2 = hold(recurrent + 2 * PADDED, GATES * PADDED, SIZE, PADDED, BLOCK_N)
            held_3 = hold(recurrent + 3 * PADDED, GATES * PADDED, SIZE, PADDED, BLOCK_N)
    for j in range(count):
        t = first + j
        now = known + row * known_row + j * known_step
        past = u + row * u_row + first * DIMS
        used = j * DIMS
        short = kernel + (PAST - used) * (GATES * PADDED)
        if t == 0:
            before = initial + row * SIZE
            cell_before = initial_cell + row * SIZE
        else:
            before = hidden + (row * steps + t - 1) * SIZE
            cell_before = cell + (row * steps + t - 1) * SIZE
        # Loads come before the sums, at which all threads wait for each other: those of u, used last, and of what is known.
        for start in tl.static_range(0, DIMS, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            inputs = read(now, d, live, d < DIMS)
            part = tl.full([BLOCK_B, BLOCK_R, BLOCK_D], 0.0, tl.float32)
            part = add_product(
                part, past, live, to_u + PAST - used, d, d < DIMS, used, 1, PAST + SIZE, BLOCK_R, PAST > BLOCK_R
            )
            part = add_product(part, before, live, to_u + PAST, d, d < DIMS, SIZE, 1, PAST + SIZE, BLOCK_R, SIZE > BLOCK_R)
            if DIMS > BLOCK_D:
                write(past + used, d, live, d < DIMS, inputs + tl.sum(part, axis=1))
        for start in range(0, SIZE, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            fits = n < SIZE
            sum_0 = read(now + DIMS, n, live, fits)
            if GATES == 4:
                sum_1 = read(now + DIMS + SIZE, n, live, fits)
                sum_2 = read(now + DIMS + 2 * SIZE, n, live, fits)
                sum_3 = read(now + DIMS + 3 * SIZE, n, live, fits)
                if KIND == "lstm":
                    state = read(cell_before, n, live, fits)
                else:
                    state = read(before, n, live, fits)
            sum_0 += gate(
                0, before, past, live, recurrent, short, held_0, n, used,
                SIZE, PADDED, GATES, PAST, BLOCK_B, BLOCK_N, BLOCK_K, HELD, UNROLL,
            )  # fmt: skip
            if GATES == 4:
                sum_1 += gate(
                    1, before, past, live, recurrent, short, held_1, n, used,
                    SIZE, PADDED, GATES, PAST, BLOCK_B, BLOCK_N, BLOCK_K, HELD, UNROLL,
                )  # fmt: skip
                sum_2 += gate(
                    2, before, past, live, recurrent, short, held_2, n, used,
                    SIZE, PADDED, GATES, PAST, BLOCK_B, BLOCK_N, BLOCK_K, HELD, UNROLL,
                )  # fmt: skip
                sum_3 += gate(
                    3, before, past, live, recurrent, short, held_3, n, used,
                    SIZE, PADDED, GATES, PAST, BLOCK_B, BLOCK_N, BLOCK_K, HELD, UNROLL,
                )  # fmt: skip
                kept = gates + (row * steps + t) * (4 * SIZE)
                if KIND == "lstm":
                    value_0 = sigmoid(sum_0)
                    value_1 = sigmoid(sum_1)
                    value_2 = tanh(sum_2)
                    value_3 = sigmoid(sum_3)
                    state = value_1 * state + value_0 * value_2
                    write(cell + (row * steps + t) * SIZE, n, live, fits, state)
                    output = value_3 * tanh(state)
                else:
                    value_0 = sigmoid(sum_0)
                    value_1 = sigmoid(sum_1)
                    value_2 = tanh(sum_2 + value_0 * sum_3)
                    value_3 = sum_3
                    output = value_2 + value_1 * (state - value_2)
                write(kept, n, live, fits, value_0)
                write(kept, n + SIZE, live, fits, value_1)
                write(kept, n + 2 * SIZE, live, fits, value_2)
                write(kept, n + 3 * SIZE, live, fits, value_3)
            else:
                output = activation(sum_0, KIND)
            write(hidden + (row * steps + t) * SIZE, n, live, fits, output)
        if DIMS > 0 and DIMS <= BLOCK_D:
            write(past + used, d, live, d < DIMS, inputs + tl.sum(part, axis=1))
        tl.debug_barrier()  # the next step reads what other threads wrote
    if ORDER > 0:  # noqa: SIM102, the compiler decides the one, the kernel the other
        if further != 0:
            of_chunk = u + row * u_row + first * DIMS
            advance(
                memory + row * memory_row, of_chunk, after + row * memory_row, live, power, response, system,
                ORDER, DIMS, CHUNK, BLOCK_B, BLOCK_M, BLOCK_L,
            )  # fmt: skip


@triton.jit(do_not_specialize=["first", "count", "system"])
def backward_kernel(
    lags,
    transposed,
    grad_u,
    grad_sums,
    grads,
    grads_cell,
    hidden,
    cell,
    gates,
    initial,
    initial_cell,
    carry,
    carried,
    after,
    arrived,
    power,
    response,
    first,
    count,
    batch,
    steps,
    grad_u_row,
    sums_row,
    arrived_row,
    system,
    KIND: tl.constexpr,
    SIZE: tl.constexpr,
    DIMS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ALIGNED: tl.constexpr,
    HELD: tl.constexpr,
    UNROLL: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """:meth:`NaiveScan.backward`, each gradient gathered from those of the later steps rather than added to by them.

    ``lags`` (D, (C - 1) * W) is what u contributes to the sums of the steps after it. ``transposed`` is R^T (W, PADDED), filled
    up with zeros. ``carry`` (B, H) passes what reaches h from one call to the next; ``carried`` (2, B, H) from step to step what
    reaches the cell state of an LSTM, or h past the gates of a GRU: even and odd steps take turns, so that no thread overwrites
    what another has yet to read. The gradients of a row's sums follow each other in ``grad_sums``.

    With ORDER > 0 the adjoint of :func:`time_loop.advance` comes first: from ``after`` (B, D * N), the gradient of the memory at
    the end of the chunk, to ``grad_u`` and to ``arrived``, where that of the memory at its start begins.
    """
    GATES: tl.constexpr = 4 if KIND == "lstm" or KIND == "gru" else 1
    PADDED: tl.constexpr = (SIZE + ALIGNED - 1) // ALIGNED * ALIGNED
    WIDTH: tl.constexpr = DIMS + GATES * SIZE
    LATER: tl.constexpr = (CHUNK - 1) * WIDTH
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = row < batch
    if ORDER > 0:
        send_back(
            after + row * arrived_row, grad_u + row * grad_u_row, arrived + row * arrived_row, live, power, response, system,
            ORDER, DIMS, CHUNK, BLOCK_B, BLOCK_M, BLOCK_L, BLOCK_C,
        )  # fmt: skip
        tl.debug_barrier()
    held_0 = row
    held_1 = row
    held_2 = row
    held_3 = row
    if HELD:
        held_0 = hold(transposed + DIMS * PADDED, PADDED, SIZE, PADDED, BLOCK_N)
        if GATES == 4:
            held_1 = hold(transposed + (DIMS + SIZE) * PADDED, PADDED, SIZE, PADDED, BLOCK_N)
            held_2 = hold(transposed + (DIMS + 2 * SIZE) * PADDED, PADDED, SIZE, PADDED, BLOCK_N)
            held_3 = hold(transposed + (DIMS + 3 * SIZE) * PADDED, PADDED, SIZE, PADDED, BLOCK_N)
    for back in range(count):
        j = count - 1 - back
        t = first + j
        now = grad_sums + row * sums_row + j * WIDTH
        carried_out = carried + ((t % 2) * batch + row) * SIZE
        carried_in = carried + (((t + 1) % 2) * batch + row) * SIZE
        for start in tl.static_range(0, DIMS, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            inputs = read(grad_u + row * grad_u_row + j * DIMS, d, live, d < DIMS)
            part = tl.full([BLOCK_B, BLOCK_R, BLOCK_D], 0.0, tl.float32)
            # The gradients of later steps' sums follow each other.
            part = add_product(part, now + WIDTH, live, lags, d, d < DIMS, back * WIDTH, 1, LATER, BLOCK_R, LATER > BLOCK_R)
            if DIMS > BLOCK_D:
                write(now, d, live, d < DIMS, inputs + tl.sum(part, axis=1))
        for start in range(0, SIZE, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            fits = n < SIZE
            here = (row * steps + t) * SIZE
            grad = read(grads + here, n, live, fits)
            if GATES == 1:
                output = read(hidden + here, n, live, fits)
            else:
                kept = gates + (row * steps + t) * (4 * SIZE)
                value_0 = read(kept, n, live, fits)
                value_1 = read(kept, n + SIZE, live, fits)
                value_2 = read(kept, n + 2 * SIZE, live, fits)
                value_3 = read(kept, n + 3 * SIZE, live, fits)
                if t == 0:
                    before = initial + row * SIZE
                    cell_before = initial_cell + row * SIZE
                else:
                    before = hidden + here - SIZE
                    cell_before = cell + here - SIZE
                if KIND == "lstm":
                    squashed = tanh(read(cell + here, n, live, fits))
                    state = read(grads_cell + here, n, live, fits) + read(carried_in, n, live, fits)
                    old = read(cell_before, n, live, fits)
                else:
                    old = read(before, n, live, fits)
            if back == 0:
                grad += read(carry + row * SIZE, n, live, fits)
            else:
                grad += arriving(
                    now + WIDTH, live, transposed, held_0, held_1, held_2, held_3, n,
                    SIZE, PADDED, GATES, DIMS, BLOCK_B, BLOCK_N, BLOCK_K, HELD, UNROLL,
                )  # fmt: skip
                if KIND == "gru":
                    grad += read(carried_in, n, live, fits)
            gate = now + DIMS
            if GATES == 4:
                if KIND == "lstm":
                    state += grad * value_3 * (1.0 - squashed * squashed)
                    grad_0 = state * value_2 * ((1.0 - value_0) * value_0)
                    grad_1 = state * old * ((1.0 - value_1) * value_1)
                    grad_2 = state * value_0 * (1.0 - value_2 * value_2)
                    grad_3 = grad * squashed * ((1.0 - value_3) * value_3)
                    write(carried_out, n, live, fits, state * value_1)
                else:
                    direct = grad * value_1
                    grad_1 = grad * (old - value_2) * ((1.0 - value_1) * value_1)
                    grad_2 = (grad - direct) * (1.0 - value_2 * value_2)
                    grad_0 = grad_2 * value_3 * ((1.0 - value_0) * value_0)
                    grad_3 = grad_2 * value_0
                    write(carried_out, n, live, fits, direct)
                write(gate, n, live, fits, grad_0)
                write(gate, n + SIZE, live, fits, grad_1)
                write(gate, n + 2 * SIZE, live, fits, grad_2)
                write(gate, n + 3 * SIZE, live, fits, grad_3)
            else:
                write(gate, n, live, fits, derivative(grad, output, KIND))
        if DIMS > 0 and DIMS <= BLOCK_D:
            write(now, d, live, d < DIMS, inputs + tl.sum(part, axis=1))
        tl.debug_barrier()
    earliest = grad_sums + row * sums_row
    for start in range(0, SIZE, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        fits = n < SIZE
        value = arriving(
            earliest, live, transposed, held_0, held_1, held_2, held_3, n,
            SIZE, PADDED, GATES, DIMS, BLOCK_B, BLOCK_N, BLOCK_K, HELD, UNROLL,
        )  # fmt: skip
        if KIND == "gru":
            value += read(carried + ((first % 2) * batch + row) * SIZE, n, live, fits)
        write(carry + row * SIZE, n, live, fits, value)
