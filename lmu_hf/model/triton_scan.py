"""The time loop of :mod:`scan` for CUDA: all steps of a chunk, or of a segment without feedback, in one Triton kernel.

A program takes a few rows of the batch through all steps without meeting the others. What limits a step is not its arithmetic:
the matrix R of h, (H, W), has to pass through the processor once per step, however few the rows, and the threads have to wait for
each other at each sum. So:

- Few rows per program, one where the batch does not fill the device, and products as plain multiply-adds in float32: tensor
  cores would take sixteen rows or nothing, and round them to tf32 or bf16.
- Where R fits the registers it stays there for all steps. Where not, it is read in tiles, each step anew, from the L1 or the L2
  cache, with the loads of two or more tiles under way and those of all that is known before the first sum.

h and u pass from step to step through the tensors that keep them; a barrier of the program's own threads lies between the steps.

On an H200 a step of 100 rows, H = 212, takes 3.4 us forwards and 3.6 us backwards with one memory dimension in chunks of 32, and
2.6 us either way without memory. What did not help there: to keep half of R, or a quarter, in registers; R in bfloat16, which is
converted for longer than its loads save (4.7 and 4.6 us); 4 or 16 warps.

With feedback a chunk is one launch beside some five small ones, so that with few rows it is the launches that cost: a CUDA graph
of a layer (``torch.cuda.make_graphed_callables``) took 8.8 ms where the calls from Python took 17.8. Nothing of that kind is done
here, since a graph fixes all shapes.

The kernels are compared with :class:`scan.NaiveScan` under Triton's interpreter, compiled for sm_80 and sm_90, and where there is
a CUDA device, run on it.

Names as in :mod:`chunked_scan`: B batch, T time, C steps per chunk, D memory dimensions, H hidden size, W width of a step's sums.
"""

# Only scan.py imports this file, and only where it is used; `try` tells transformers that a checkpoint does not need Triton. The
# file is not called kernels.py because in the folder of a checkpoint that would be taken for the package of this name.
try:
    import triton
    import triton.language as tl
except ImportError:
    raise

import contextlib
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .time_loop import State, TimeLoop
from .triton_parts import (
    ALIGNED,
    activation,
    add_product,
    arriving,
    backward_sizes,
    block_sizes,
    derivative,
    gate,
    hold,
    read,
    rows_per_program,
    sigmoid,
    tanh,
    write,
)

# The pointwise steps that the kernels know; keys of GATES.
KINDS = ("tanh", "sigmoid", "relu", "linear", "lstm", "gru")


@triton.jit(do_not_specialize=["first", "count"])
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
    first,
    count,
    batch,
    steps,
    known_row,
    known_step,
    u_row,
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
):
    """:meth:`NaiveScan.forward`, BLOCK_N units and BLOCK_D numbers of u at a time, in tiles of BLOCK_K and BLOCK_R rows.

    ``to_u`` (D, (C - 1) * D + H) are the columns of the step matrix that make u, transposed. The others, each gate filled up to
    PADDED columns, are ``kernel`` ((C - 1) * D, ...), which multiplies the u of the chunk so far, and ``recurrent`` (H, ...).
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


@triton.jit(do_not_specialize=["first", "count"])
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
    first,
    count,
    batch,
    steps,
    grad_u_row,
    sums_row,
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
):
    """:meth:`NaiveScan.backward`, each gradient gathered from those of the later steps rather than added to by them.

    ``lags`` (D, (C - 1) * W) is what u contributes to the sums of the steps after it. ``transposed`` is R^T (W, PADDED), filled
    up with zeros. ``carry`` (B, H) passes what reaches h from one call to the next; ``carried`` (2, B, H) from step to step what
    reaches the cell state of an LSTM, or h past the gates of a GRU: even and odd steps take turns, so that no thread overwrites
    what another has yet to read. The gradients of a row's sums follow each other in ``grad_sums``.
    """
    GATES: tl.constexpr = 4 if KIND == "lstm" or KIND == "gru" else 1
    PADDED: tl.constexpr = (SIZE + ALIGNED - 1) // ALIGNED * ALIGNED
    WIDTH: tl.constexpr = DIMS + GATES * SIZE
    LATER: tl.constexpr = (CHUNK - 1) * WIDTH
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = row < batch
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


class TritonScan(TimeLoop):
    """:class:`scan.NaiveScan` for float32 tensors, with its loop in a kernel; no encoding, no memory in front of h."""

    language = "triton"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.batch, size = self.states[0].shape
        self.steps = self.kept[0].shape[1]
        self.past, self.recurrent = self.step.tensor_split([len(self.step) - size])  # of u ((C - 1) * D, W), of h (H, W)
        rows = rows_per_program(self.batch, self.step)
        self.sizes = block_sizes(self.cell.kind, size, self.dims, self.chunk, rows)
        self.states = tuple(state.contiguous() for state in self.states)
        # An argument that a kind has no use for still has to be some pointer.
        hidden, *further = self.kept
        self.kept = (hidden, further[0] if self.cell.kind == "lstm" else hidden, self.kept[-1])
        self.grid = (triton.cdiv(self.batch, self.sizes["BLOCK_B"]),)

    @cached_property
    def forwards(self) -> tuple[Tensor, Tensor, Tensor]:
        """The matrices as the kernel of this direction takes them."""
        return self.step[:, : self.dims].mT.contiguous(), self._by_gate(self.past), self._by_gate(self.recurrent)

    def forward(self, first: int, count: int, known: Tensor, u: Tensor) -> None:
        known = known if known.stride(2) == 1 else known.contiguous()
        with _on(known):
            forward_kernel[self.grid](
                known,
                *self.forwards,
                u,
                *self.kept,
                self.states[0],
                self.states[-1],
                first,
                count,
                self.batch,
                self.steps,
                *known.stride()[:2],
                u.stride(0),
                **self.sizes,
            )

    def _by_gate(self, matrix: Tensor) -> Tensor:
        """The columns of the gates, each gate filled up."""
        size = len(self.recurrent)
        of_gates = matrix[:, self.dims :]
        return _filled_up(of_gates.unflatten(1, (-1, size)) if size else of_gates.unsqueeze(1))

    def start_backward(self, grads: State) -> None:
        self.grads = [grad.contiguous() for grad in grads]
        self.sizes = backward_sizes(self.sizes)
        by_lag = self.past.unflatten(0, (-1, self.dims)) if self.dims else self.past.unsqueeze(1)
        self.lags = by_lag.flip(0).transpose(0, 1).contiguous()
        self.transposed = _filled_up(self.recurrent.mT)
        self.carry = torch.zeros_like(self.states[0])
        self.carried = self.carry.new_zeros(2, *self.carry.shape)

    def backward(self, first: int, count: int, grad_u: Tensor, grad_sums: Tensor) -> None:
        assert grad_sums.stride(1) == grad_sums.shape[2]
        assert not self.dims or grad_u.stride(1) == self.dims
        with _on(grad_sums):
            backward_kernel[self.grid](
                self.lags,
                self.transposed,
                grad_u,
                grad_sums,
                self.grads[0],
                self.grads[-1],
                *self.kept,
                self.states[0],
                self.states[-1],
                self.carry,
                self.carried,
                first,
                count,
                self.batch,
                self.steps,
                grad_u.stride(0),
                grad_sums.stride(0),
                **self.sizes,
            )

    def initial_gradients(self) -> State:
        return (self.carry, self.carried[0])[: len(self.states)]


def _filled_up(matrix: Tensor) -> Tensor:
    return F.pad(matrix, (0, -matrix.shape[-1] % ALIGNED)).contiguous()


def _on(like: Tensor) -> Any:
    """Triton launches on the current device, which need not be that of the tensors."""
    if not like.is_cuda or like.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(like.device)
