"""A recurrence in chunks, as one differentiable function with a backward pass of its own.

What goes on in a chunk is described in :mod:`lookahead`, its matrices in :mod:`folding`, its time loop in :mod:`scan`. Here is
what surrounds the loop: large products. Several chunks make a segment, about as many as give products of full speed; nothing as
long as the sequence is written but u, the hidden states and, backwards, the gradient of the inputs. In particular the gradients
of all weights are added up segment by segment while the gradients of its sums are still in the cache.

Names: B batch, T time, C steps per chunk, K chunks, D memory dimensions, N order, H hidden size, G gates; W is the width of a
step's sums: D + G if u is computed in the loop, otherwise G.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .by_system import fold_rows, fold_state, product
from .compiled import SMALL_ORDER, add_matmul, available, empty, gradient_of, matmul, with_rows, zeros
from .folding import ChunkOperators
from .gates import Pointwise
from .memory import wants_gradient
from .precision import full_float32
from .ragged import Trajectory
from .scan import scan_class
from .scratch import (
    Scratch,
    add_step_gradient,
    arriving,
    before_each,
    first_derivative,
    gradients_of,
    known_sums,
    of_steps,
    results_of,
)
from .time_loop import Encoding, State, TimeLoop, send_back, start_all

# A segment has about this many rows, chunks times batch, for its products to run at full speed, but no more numbers in its
# largest part than stay in the cache.
_ROWS = 128
_NUMBERS = 1 << 20
# On CUDA a cache of that kind does not exist and what counts is how few kernels are launched: 128 MiB at a time.
_ROWS_CUDA = 1 << 14
_NUMBERS_CUDA = 1 << 25


def chunked_scan(
    cell: Pointwise,
    given: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    u: Tensor | None,
    memory: Tensor,
    operators: ChunkOperators,
    states: State,
    steps: int,
    *,
    activation: str = "linear",
    last: bool = True,
) -> tuple[Tensor | None, Tensor, Trajectory]:
    """Runs the recurrence. All tensors have one dtype, float32 or float64; there is no second derivative.

    Args:
        cell: what a step makes of its sums.
        given: inputs of all steps (B, T, I), or None.
        weight: inputs -> their part of the sums (I, W), or None.
        bias: (W,) or None.
        u: the memory's input (B, K * C, D), zero past T, if it is known in advance; otherwise None.
        memory: m before the first step (B, D, N).
        operators: the matrices of a chunk.
        states: hidden state tensors before the first step, (B, H) each.
        steps: T.
        activation: of u, with ``operators.encoder``; a key of ``GATES``.
        last: the states after the last step are wanted by themselves.

    Returns:
        u (B, K * C, D), zero past T, where it is computed here; the memory at the start of each chunk (B, K, D * N); and the
        hidden states.
    """
    inputs = (None if given is None else with_rows(given), weight, bias, u, memory, *operators, *states)
    u, starts, *results = _ChunkedScan.apply(_Settings(cell, steps, activation, last, wants_gradient(*inputs)), *inputs)
    return u, starts, Trajectory.of(results, len(states) * last)


class _Settings(NamedTuple):
    """What is no tensor; see :func:`chunked_scan`."""

    cell: Pointwise
    steps: int
    activation: str
    last: bool
    backward: bool


_OPERATORS = len(ChunkOperators._fields)
# Whose gradients are added up other than by products.
_SUMMED = ("bias", "power", "response", "states")


class _Sizes:
    """How a run is cut up."""

    def __init__(self, batch: int, steps: int, memory: Tensor, operators: ChunkOperators, *, feedback: bool):
        self.steps, self.dims, self.chunk = steps, memory.shape[-2], operators.chunk
        self.chunks = -(-steps // self.chunk)
        self.total = self.chunks * self.chunk
        width = operators.step.shape[1] if operators.read is None else max(operators.read.shape)
        rows, numbers = (_ROWS_CUDA, _NUMBERS_CUDA) if operators.step.is_cuda else (_ROWS, _NUMBERS)
        if not operators.step.is_cuda and (feedback or (operators.from_u is not None and available(operators.step))):
            rows *= 16  # no products of a chunk: what counts is how few calls there are, as far as the cache goes
        fitting = numbers // (batch * self.chunk * width)
        self.segment = max(1, min(-(-rows // batch), fitting)) * self.chunk

    def segments(self) -> list[tuple[int, int]]:
        """First step and number of steps of each segment."""
        return [(first, min(self.segment, self.total - first)) for first in range(0, self.total, self.segment)]

    def of_chunks(self, first: int, length: int) -> slice:
        return slice(first // self.chunk, (first + length) // self.chunk)


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: _Settings,
        given: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        u: Any,
        memory: Tensor,
        *tensors: Any,
    ) -> tuple[Tensor | None, ...]:
        operators, states = ChunkOperators(*tensors[:_OPERATORS]), tensors[_OPERATORS:]
        step, feedback = operators.step, u is None
        batch, width, steps = states[0].shape[0], step.shape[1], settings.steps
        sizes = _Sizes(batch, steps, memory, operators, feedback=feedback)
        dims, total = sizes.dims, sizes.total
        kept = settings.cell.allocate(states, steps, backward=settings.backward)
        starts = empty(step, batch, sizes.chunks, memory[0].numel())
        if u is None:
            u = empty(step, batch, total, dims)
            u[:, steps:] = 0
        ctx.settings, ctx.sizes, ctx.states, ctx.feedback = settings, sizes, len(states), feedback
        ctx.device_type = step.device.type
        scan = _make_scan(ctx, operators, u, states, kept)
        nothing = step.new_empty(batch, steps, 0)
        scratch = Scratch(step)
        reads = feedback and given is not None and weight is not None and scan.reads(given, weight, bias, operators)
        for first, length in sizes.segments():
            if reads:
                known = step.new_empty(batch, length, 0)
            else:
                known = scratch.take("known", batch, length, width)
                known_sums(of_steps(given, first, length), weight, bias, known)
            if feedback:
                memory = scan.feedback_forward(first, known, u, starts, memory, operators)
                continue
            begun, further = starts[:, sizes.of_chunks(first, length)], first + length < total
            memory = start_all(memory, u[:, first : first + length], begun, operators, further=further)
            u_of_chunks = u[:, first : first + length].reshape(begun.shape[:2].numel(), -1)
            if operators.from_u is not None:
                with full_float32(step):
                    add_matmul(known.view(len(u_of_chunks), -1), u_of_chunks, operators.from_u)
                scan.folded_forward(first, min(length, steps - first), known, begun, operators)
                continue
            memories = _write(begun.flatten(0, 1), u_of_chunks, operators, scratch)
            assert operators.read is not None
            add_matmul(known.view(-1, width), memories, operators.read)
            scan.forward(first, min(length, steps - first), known, nothing)
        saved = (given, weight, bias, u, starts, *operators, *states, *kept)
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return (u if feedback else None), starts, *results_of(kept[: len(states)], last=settings.last)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_u: Tensor | None, grad_starts: Tensor | None, *grad_states: Tensor | None) -> tuple:
        given, weight, bias, u, starts, *rest = ctx.saved_tensors
        operators, tensors, rest = ChunkOperators(*rest[:_OPERATORS]), rest[:_OPERATORS], rest[_OPERATORS:]
        states, kept = tuple(rest[: ctx.states]), tuple(rest[ctx.states :])
        sizes, feedback = ctx.sizes, ctx.feedback
        dims, chunk, steps = sizes.dims, sizes.chunk, sizes.steps
        step, power, _, _, from_u, *_ = tensors
        needed = dict(
            zip(("given", "weight", "bias", "u", "memory", *operators._fields), ctx.needs_input_grad[1:], strict=False)
        )
        batch, width = states[0].shape[0], step.shape[1]

        scan = _make_scan(ctx, operators, u, states, kept)
        of_sequences, of_last = gradients_of(grad_states, states, last=ctx.settings.last)
        scan.start_backward(arriving(of_sequences, states, kept), of_last)
        grad_given = empty(given, *given.shape) if needed["given"] else None
        weights = {"weight": weight, "bias": bias, **operators._asdict()}
        added: dict[str, Tensor] = {}  # what the loop adds up
        if feedback and given is not None:
            rows = {"step": len(step), "weight": len(weight), "bias": int(bias is not None)}
            wanted = any(needed[name] for name in rows)
            joined = step.new_empty(sum(rows.values()), width) if wanted else None
            if scan.adds_up(given, weight, u, grad_given, joined, operators):
                parts = () if joined is None else zip(rows, joined.zero_().split(list(rows.values())), strict=True)
                added = {name: part.view(weights[name].shape) for name, part in parts if needed[name]}
                needed.update(given=False, step=False, weight=False, bias=False)
        # Those that products add to are written by the first.
        grads = {name: gradient_of(tensor) for name, tensor in weights.items() if needed[name]}
        for name in _SUMMED:
            if name in grads:
                grads[name].zero_()
        # Gradient of u.
        inputs = zeros(u, *u.shape) if grad_u is None else grad_u.clone(memory_format=torch.contiguous_format)
        grad_memory: Tensor | None = None  # of the memory at the end of a segment
        nothing = step.new_empty(batch, steps, 0)
        to_starts: Any = None
        to_u: Any = None
        scratch = Scratch(step)
        for first, length in reversed(sizes.segments()):
            grad = scratch.take("grad", batch, length, width)
            grad[:, max(steps - first, 0) :] = 0
            beta = int(first + length < sizes.total)  # what the segments after this one have left counts, as in addmm
            segment = slice(first, first + length)
            chunks = sizes.of_chunks(first, length)
            # Of the memory at the start of each chunk, and at the end of the last.
            arrived = scratch.take("arrived", batch, chunks.stop - chunks.start + 1, starts.shape[2])
            arrived[:, -1] = 0 if grad_memory is None else grad_memory
            if feedback:
                scan.feedback_backward(first, inputs, grad, grad_starts, arrived, operators)
            elif from_u is not None:
                to_starts = scratch.take("to_starts", *starts[:, chunks].shape)
                scan.folded_backward(first, min(length, steps - first), grad, to_starts, operators)
                by_chunk = grad.view(to_starts.shape[:2].numel(), -1)
                with full_float32(step):
                    to_u = matmul(by_chunk, from_u.mT)
                if "from_u" in grads:
                    add_matmul(grads["from_u"], u[:, segment].reshape(len(by_chunk), -1).mT, by_chunk, beta=beta)
            else:
                scan.backward(first, min(length, steps - first), nothing, grad)
                of_chunks = starts[:, chunks].flatten(0, 1)
                u_of_chunks = u[:, segment].reshape(len(of_chunks), -1)
                flat = grad.view(-1, width)
                to_starts, to_u = _write_back(flat, of_chunks, u_of_chunks, operators, grads, beta, scratch)
            if not feedback:
                inputs[:, segment] += to_u.reshape(batch, length, dims)
                if grad_starts is not None:
                    to_starts = to_starts.reshape(batch, -1, starts.shape[2]) + grad_starts[:, chunks]
                send_back(inputs[:, segment], to_starts, arrived, operators)
            if "power" in grads:
                ends = fold_state(arrived[:, 1:].reshape(-1, dims, starts.shape[2] // dims), len(power))
                before = fold_state(starts[:, chunks].reshape(-1, dims, starts.shape[2] // dims), len(power))
                grads["power"] += ends.mT @ before
                grads["response"] += fold_rows(u[:, segment].reshape(-1, chunk, dims), len(power)).mT @ ends
            grad_memory = arrived[:, 0].clone()
            # The weights, while the gradient of the segment is at hand.
            flat, by_chunk = grad.view(-1, width), grad.view(-1, chunk * width)
            if "fold" in grads:
                add_matmul(grads["fold"], starts[:, chunks].flatten(0, 1).mT, by_chunk, beta=beta)
            if "step" in grads or "encoder" in grads:
                before = before_each(states[0], kept[0], first, length)
                if "step" in grads:
                    add_step_gradient(grads["step"], flat, u[:, segment] if feedback else None, before, chunk, beta)
                if "encoder" in grads:
                    seen = before if operators.mask is None else before * operators.mask[:, None]
                    add_matmul(grads["encoder"], seen.flatten(0, 1).mT, flat[:, :dims], beta=beta)
            if "direct" in grads:
                add_matmul(grads["direct"], u[:, segment].flatten(0, 1).mT, flat[:, dims:], beta=beta)
            if "bias" in grads:
                grads["bias"] += flat.sum(0)
            if "weight" in grads:
                add_matmul(grads["weight"], of_steps(given, first, length).flatten(0, 1).mT, flat, beta=beta)
            if grad_given is not None and needed["given"]:
                count = min(length, steps - first)
                grad_given[:, first : first + count] = matmul(flat, weight.mT).view(batch, length, -1)[:, :count]
        grads |= added
        return (
            None,
            grad_given,
            grads.get("weight"),
            grads.get("bias"),
            None if feedback else inputs,
            None if grad_memory is None else grad_memory.view(batch, dims, -1),
            *(grads.get(name) for name in operators._fields),
            *scan.initial_gradients(),
        )


def _make_scan(ctx: Any, operators: ChunkOperators, u: Tensor, states: State, kept: State) -> TimeLoop:
    settings: _Settings = ctx.settings
    encoding = None
    if operators.encoder is not None and operators.direct is not None:
        encoding = Encoding(operators.encoder, operators.direct, operators.mask, settings.activation, u)
    made = scan_class(operators.step, special=encoding is not None)
    dims = ctx.sizes.dims if ctx.feedback else 0
    arguments = (settings.cell, operators.step, ctx.sizes.chunk, dims, states, kept)
    return made(*arguments, encoding=encoding)


def _write(starts: Tensor, u: Tensor, operators: ChunkOperators, scratch: Scratch) -> Tensor:
    """The memory after each step of some chunks (M * C, D * N), from starts (M, D * N) and u (M, C * D)."""
    states, power = operators.states, operators.power
    assert states is not None
    assert power is not None
    order = power.shape[1]
    chunk = states.shape[1] - order
    if _step_by_step(order, u):
        memories = scratch.take("memories", len(u) * chunk, starts.shape[1])
        u = u.contiguous().view(len(u), chunk, -1)
        torch.ops.lmu_hf.memory_forward(starts.contiguous(), u, *_single_step(states, order), memories)
        return memories
    with full_float32(u):
        by_chunk = product(_rows(starts, u, power), states).unflatten(2, (chunk, order))  # (S, M * D / S, C, N)
    if len(by_chunk) == 1:
        by_chunk = by_chunk.view(len(starts), -1, chunk, order).transpose(1, 2)  # (M, C, D, N)
    else:
        by_chunk = by_chunk.permute(1, 2, 0, 3)
    return by_chunk.flatten(0, 1).flatten(1)


def _write_back(
    grad: Tensor,
    starts: Tensor,
    u: Tensor,
    operators: ChunkOperators,
    grads: dict[str, Tensor],
    beta: int,
    scratch: Scratch,
) -> tuple[Tensor, Tensor]:
    """The adjoint of :func:`_write` and the product with ``read`` after it: of starts and u, from grad (M * C, W)."""
    states, power, read = operators.states, operators.power, operators.read
    assert states is not None
    assert power is not None
    assert read is not None
    scales, order = power.shape[:2]
    chunk = states.shape[1] - order
    if "read" in grads:
        add_matmul(grads["read"], _write(starts, u, operators, scratch).mT, grad, beta=beta)
    grad = matmul(grad, read.mT, scratch.take("back", len(grad), len(read)))
    by_chunk = grad.view(len(starts), chunk, -1, order)  # (M, C, D, N)
    by_row: Any = None  # (S, M * D / S, C * N), where a product takes it
    if "states" in grads or not _step_by_step(order, u):
        by_row = (
            by_chunk.permute(2, 0, 1, 3).flatten(2) if scales > 1 else by_chunk.transpose(1, 2).reshape(1, -1, chunk * order)
        )
    if "states" in grads:
        grads["states"] += product(_rows(starts, u, power).mT, by_row)
    if _step_by_step(order, u):
        to_starts, to_u = empty(starts, *starts.shape), empty(u, *by_chunk.shape[:3])
        torch.ops.lmu_hf.memory_backward(grad, *_single_step(states, order), to_starts, to_u, None)
        return to_starts, to_u
    with full_float32(u):
        to_rows = product(by_row, states.mT)
    to_rows = to_rows.view(len(starts), -1, order + chunk) if scales == 1 else to_rows.transpose(0, 1)
    return to_rows[..., :order].flatten(1), to_rows[..., order:].mT.flatten(1)


def _step_by_step(order: int, like: Tensor) -> bool:
    """Whether the memory is so small that its steps cost less one by one, compiled, than in one product."""
    return order <= SMALL_ORDER and available(like)


def _single_step(states: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """A (S, N, N) and B (S, N): the operator's first step is the step itself."""
    return states[:, :order, :order].mT, states[:, order, :order]


def _rows(starts: Tensor, u: Tensor, power: Tensor) -> Tensor:
    """[memory at the start, u of the chunk] of each memory dimension (S, M * D / S, N + C)."""
    starts = starts.unflatten(1, (-1, power.shape[1]))  # (M, D, N)
    rows = torch.cat([starts, u.view(len(u), -1, starts.shape[1]).mT], dim=2)
    return rows.flatten(0, 1)[None] if len(power) == 1 else rows.transpose(0, 1)
