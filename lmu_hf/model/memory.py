"""The linear memory over a whole sequence: m[t] = Ad m[t-1] + Bd u[t] for every memory dimension.

One pure function, :func:`linear_memory`, and five algorithms that give the same numbers:

=========  ============================================================  =======================================
name       how                                                           good for
=========  ============================================================  =======================================
naive      one step after the other                                      the reference
chunked    C steps at once by one product with a constant operator       all states, on a GPU and where it begins full
fft        product of spectra with the impulse response                  all states, long sequences, high order
final      one product with the reversed impulse response                the last state only
scan       one step after the other, compiled                            low order, on the CPU
=========  ============================================================  =======================================

The parallel ones follow Chilkuri & Eliasmith 2021 (eq. 22-26), extended by an initial state, by rows of different
lengths and by one theta per memory dimension.

Axes: ``B T D N`` are batch, time, memory dimension, order. ``S`` is 1 when all dimensions share one theta, else D; inside
the algorithms the D (or 0) dimensions that share a system are folded into the batch: (S, R, ...) with S * R = B * D.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .by_system import chain, fold_rows, fold_state, product, product_back, starts_at_once, unfold_sequence, unfold_state
from .compiled import LARGEST_ORDER, available, contiguous, empty
from .convolution import causal_convolution
from .costs import MANY_ROWS, memory_algorithm, memory_chunk
from .legendre import DelaySystem
from .precision import exact_matmul, full_float32
from .ragged import blank, check_lengths, last_valid, to_end, where_started
from .traced import digits_that_matter, traced_final, traced_states

ALGORITHMS = ("naive", "chunked", "fft", "final", "scan")

# Time steps that the last-state product takes at once; bounds its operator at long T.
_FINAL_SEGMENT = 4096


def linear_memory(
    u: Tensor,
    system: DelaySystem,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    return_sequence: bool = True,
    algorithm: str = "auto",
) -> tuple[Tensor | None, Tensor]:
    """Runs the memory over a sequence.

    Computes in float32, or in float64 for float64 inputs, whatever autocast says: in half precision the state would
    drift.

    Args:
        u: memory input (B, T, D), T >= 1.
        system: the delay system, with one scale or one per memory dimension.
        initial_state: memory before the first step (B, D, N); zeros when None.
        lengths: number of valid steps per row (B,), an integer tensor. Later steps leave the state of the row as it is, and
            their values of ``u`` are never read. All steps are valid when None.
        return_sequence: also return the state after each step.
        algorithm: "naive", "chunked", "fft", "final", "scan" or "auto", which chooses by the sizes. All agree to rounding.

    Returns:
        The states after each step (B, T, D, N), zero past the length of a row, or None without ``return_sequence``; and
        the state after each row's last valid step (B, D, N).

    Raises:
        ValueError: a shape does not fit, or the named algorithm cannot do what is asked.
    """
    if u.ndim != 3 or u.shape[1] == 0:
        raise ValueError(f"u: expected (batch, time >= 1, memory_d), found {tuple(u.shape)}")
    batch, steps, dims = u.shape
    if system.scales not in (1, dims):
        raise ValueError(f"system: expected 1 or memory_d={dims} values of theta, found {system.scales}")
    expected = (batch, dims, system.order)
    if initial_state is not None and tuple(initial_state.shape) != expected:
        raise ValueError(f"initial_state: expected (batch, memory_d, order)={expected}, found {tuple(initial_state.shape)}")
    if not u.is_floating_point():
        raise ValueError(f"u: expected floating point numbers, found {u.dtype}; use u.float()")
    if lengths is not None:
        lengths = check_lengths(lengths, batch, steps, u.device)
    if algorithm == "auto":
        algorithm = _choose(u, initial_state, system, return_sequence)
    if algorithm not in _IMPLEMENTATIONS:
        raise ValueError(f"algorithm: expected 'auto' or one of {list(ALGORITHMS)}, found {algorithm!r}")
    if algorithm == "final" and return_sequence:
        raise ValueError(
            "algorithm: 'final' computes the last state only and cannot return the sequence; use 'chunked', 'fft', 'naive' "
            "or 'auto', or return_sequence=False"
        )
    with torch.autocast(u.device.type, enabled=False):
        dtype = torch.promote_types(u.dtype, torch.float32)
        u = blank(u.to(dtype), lengths)
        if initial_state is not None:
            initial_state = initial_state.to(dtype)
        states, final = _IMPLEMENTATIONS[algorithm](u, system, initial_state, lengths)
        return (states if return_sequence else None), final


def naive_linear_memory(
    u: Tensor, system: DelaySystem, initial_state: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, step by step. Same arguments and results as the other algorithms."""
    Ad, Bd = system.matrices(u.dtype, u.device)
    memory = _zero_state(u, system) if initial_state is None else initial_state
    states = []
    for t in range(u.shape[1]):
        updated = memory_step(memory, u[:, t], Ad, Bd)
        if lengths is not None:
            valid = (t < lengths)[:, None, None]
            states.append(updated.masked_fill(~valid, 0.0))
            updated = torch.where(valid, updated, memory)
        else:
            states.append(updated)
        memory = updated
    return torch.stack(states, dim=1), memory


def _choose(u: Tensor, initial_state: Tensor | None, system: DelaySystem, return_sequence: bool) -> str:
    """The algorithm that ``auto`` takes here."""
    batch, steps, dims = u.shape
    algorithm, _ = memory_algorithm(
        batch * dims,
        steps,
        system.order,
        return_sequence=return_sequence,
        training=wants_gradient(u, initial_state, system.Ad),
        compiled=available(u.new_empty(0, dtype=torch.promote_types(u.dtype, torch.float32))),
        measured=measured(u),
        systems=system.scales,
        at_rest=initial_state is None,
    )
    return algorithm


def measured(like: Tensor) -> bool:
    """Whether the models of :mod:`costs` hold for tensors like this one."""
    return like.device.type == "cpu" and not torch.compiler.is_compiling()


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether what is computed from these tensors now has a backward pass."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def memory_step(memory: Tensor, u: Tensor, Ad: Tensor, Bd: Tensor) -> Tensor:
    """One step of the memory: m (B, D, N), u (B, D), Ad (S, N, N), Bd (S, N) -> (B, D, N), in the dtype of ``Ad``."""
    if torch.is_autocast_enabled(u.device.type):
        with torch.autocast(u.device.type, enabled=False):
            return memory_step(memory, u, Ad, Bd)
    memory, u = memory.to(Ad.dtype), u.to(Ad.dtype)
    if Ad.shape[0] == 1:
        return exact_matmul(memory, Ad[0].mT) + u[..., None] * Bd
    return exact_matmul(memory.transpose(0, 1), Ad.mT).transpose(0, 1) + u[..., None] * Bd


def _chunked(u: Tensor, system: DelaySystem, initial_state: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    inputs = fold_rows(u, system.scales)
    rows, steps = inputs.shape[0] * inputs.shape[1], inputs.shape[2]
    memory = None if initial_state is None else fold_state(initial_state, system.scales)
    if torch.compiler.is_compiling():  # tracers follow plain operations only
        return _finish(unfold_sequence(traced_states(inputs, memory, system), u.shape), initial_state, lengths)
    training = wants_gradient(inputs, initial_state, system.Ad)
    how = {"training": training, "compiled": available(u), "measured": measured(u)}
    size = min(steps, memory_chunk(rows, steps, system.order, **how))
    operator = system.chunk_operator(size, u.dtype, u.device)
    if (inputs.shape[1] < MANY_ROWS or starts_at_once(inputs)) and not operator.requires_grad:
        states = _ChunksAtOnce.apply(inputs, memory, operator, size)
    else:
        window, begun = None, -(-min(steps, system.order) // size)
        if memory is None and not operator.requires_grad:
            own = operator[:, system.order :]
            window = system.window_operator(size, begun, u.dtype, u.device) if begun > 1 else own
        states = _Chunks.apply(inputs, memory, operator, window, size)
    return _finish(unfold_sequence(states, u.shape), initial_state, lengths)


class _Chunks(torch.autograd.Function):
    """inputs (S, R, T), memory before them (S, R, N) or None, the operator of ``size`` steps, the window operator of some chunks
    or None, ``size`` -> states (S, R, T, N).

    Chunk after chunk, [m_start, u_chunk] @ operator, written straight to its place and differentiated by hand: the backward pass
    is the forward pass transposed and needs no states, where autograd would keep, cut and sum up tensors as large as all states.
    Where the memory began empty, fewer inputs have come at first than it has numbers: as long as ``window`` reaches, these inputs
    are what a chunk starts from.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, memory: Tensor | None, operator: Tensor, window: Tensor | None, size: int
    ) -> Tensor:
        scales, rows, steps = inputs.shape
        order = operator.shape[1] - size
        states = empty(inputs, scales, rows, steps * order)
        row = inputs.new_zeros(scales, rows, order + size)
        if memory is not None:
            row[..., :order] = memory
        for start in range(0, steps, size):
            stop = min(start + size, steps)
            count = stop - start
            chunk = states[..., start * order : stop * order]
            if (within := _of_window(window, start, stop, size, order)) is not None:
                given, used = inputs[..., :stop], within
            else:
                if start > 0:
                    row[..., :order] = states[..., (start - 1) * order : start * order]
                row[..., order : order + count] = inputs[..., start:stop]
                given, used = row[..., : order + count], operator[:, : order + count, : count * order]
            with full_float32(row):
                product(given, used, out=chunk)
        states = states.unflatten(2, (steps, order))
        # Only the gradient of the operator, which a trained theta asks for, looks at the states again.
        ctx.save_for_backward(operator, window, *((inputs, memory, states) if ctx.needs_input_grad[2] else ()))
        ctx.size, ctx.order = size, order
        return states

    @staticmethod
    def backward(ctx: Any, grad_states: Tensor) -> tuple:
        operator, window, *saved = ctx.saved_tensors
        size, order = ctx.size, ctx.order
        steps = grad_states.shape[2]
        grad_inputs, carry, grad_operator, grad_begun = [], None, None, None
        # Nothing in place: the same lines then serve a second derivative.
        for start in reversed(range(0, steps, size)):
            stop = min(start + size, steps)
            count = stop - start
            grad = grad_states[:, :, start:stop].flatten(2)
            within = _of_window(window, start, stop, size, order)
            used = operator[:, : order + count, : count * order] if within is None else within
            grad_row = product_back(grad, used.mT)
            if carry is not None:
                grad_row = grad_row + product_back(carry, used[..., -order:].mT)
            if within is not None:
                if grad_begun is not None:
                    grad_row = grad_begun + F.pad(grad_row, (0, grad_begun.shape[2] - stop))
                carry, grad_begun = None, grad_row
                continue
            if saved:
                inputs, memory, states = saved
                before = memory if start == 0 else states[:, :, start - 1]
                before = torch.zeros_like(states[:, :, 0]) if before is None else before
                row = torch.cat([before, inputs[..., start:stop]], dim=2)
                full = grad if carry is None else torch.cat([grad[..., :-order], grad[..., -order:] + carry], dim=2)
                part = F.pad(row.mT @ full, (0, (size - count) * order, 0, size - count))
                grad_operator = part if grad_operator is None else grad_operator + part
            carry = grad_row[..., :order]
            grad_inputs.append(grad_row[..., order:])
        if grad_begun is not None:
            grad_inputs.append(grad_begun)
        grad_memory = carry if ctx.needs_input_grad[1] else None
        return torch.cat(grad_inputs[::-1], dim=2), grad_memory, grad_operator, None, None


def _of_window(window: Tensor | None, start: int, stop: int, size: int, order: int) -> Tensor | None:
    """The part of a window operator that makes the states of steps ``start`` to ``stop``; None where it does not reach."""
    if window is None or start + size > window.shape[1]:
        return None
    return window[:, window.shape[1] - size - start :][:, :stop, : (stop - start) * order]


class _ChunksAtOnce(torch.autograd.Function):
    """:class:`_Chunks` for few rows, where reading the operator anew for each chunk takes longer than the products with it, and
    for GPUs, where launching a product per chunk does.

    The memory at the start of each chunk comes first, by the part of the operator that makes a chunk's last state: chunk after
    chunk, as it stays in the cache, or by :func:`chain`. Then all chunks are rows of one product. The operator is a constant.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, memory: Tensor | None, operator: Tensor, size: int) -> Tensor:
        scales, count, steps = inputs.shape
        order = operator.shape[1] - size
        last = operator[..., -order:].contiguous()
        chunks = -(-steps // size)
        rows = empty(inputs, scales, count, chunks, order + size)
        rows[..., order:] = F.pad(inputs, (0, chunks * size - steps)).unflatten(2, (chunks, size))
        rows[:, :, 0, :order] = 0 if memory is None else memory
        states = empty(inputs, scales, count * chunks, size * order)
        with full_float32(rows):
            if starts_at_once(rows):
                added = (rows[:, :, :-1, order:].flatten(1, 2) @ last[:, order:]).view(scales, count, chunks - 1, order)
                rows[..., :order] = chain(rows[:, :, 0, :order], added, last[:, :order])
            else:
                for index in range(1, chunks):
                    rows[:, :, index, :order] = rows[:, :, index - 1] @ last
            product(rows.flatten(1, 2), operator, out=states)
        ctx.save_for_backward(operator)
        ctx.size = size
        return states.view(scales, count, chunks * size, order)[:, :, :steps]

    @staticmethod
    def backward(ctx: Any, grad_states: Tensor) -> tuple:
        (operator,) = ctx.saved_tensors
        scales, count, steps, order = grad_states.shape
        size, chunks = ctx.size, -(-steps // ctx.size)
        # Nothing in place: the same lines then serve a second derivative.
        grad = F.pad(grad_states, (0, 0, 0, chunks * size - steps)) if steps % size else grad_states
        from_chunk = product_back(grad.reshape(scales, count * chunks, size * order), operator.mT).unflatten(
            1, (count, chunks)
        )
        last = operator[..., -order:].mT.contiguous()  # the end of a chunk -> [m_start, u_chunk]
        if starts_at_once(grad):
            # What reaches the end of each chunk but the last, the newest first.
            newest_first = from_chunk.flip(2)
            ends = chain(newest_first[:, :, 0, :order], newest_first[:, :, 1:, :order], last[..., :order])
            sent = exact_matmul(ends[:, :, :-1].flatten(1, 2), last[..., order:]).view(scales, count, chunks - 1, size)
            newest_first = torch.cat([newest_first[:, :, :1, order:], newest_first[:, :, 1:, order:] + sent], dim=2)
            grad_memory = ends[:, :, -1] if ctx.needs_input_grad[1] else None
            return newest_first.flip(2).flatten(2)[..., :steps], grad_memory, None, None
        carry, grad_inputs = from_chunk[:, :, -1, :order], [from_chunk[:, :, -1, order:]]
        for index in reversed(range(chunks - 1)):
            grad_row = from_chunk[:, :, index] + exact_matmul(carry, last)
            carry = grad_row[..., :order]
            grad_inputs.append(grad_row[..., order:])
        return torch.cat(grad_inputs[::-1], dim=2)[..., :steps], (carry if ctx.needs_input_grad[1] else None), None, None


def _scan(u: Tensor, system: DelaySystem, initial_state: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    if system.order > LARGEST_ORDER or not available(u):
        reason = (
            f"an order of at most {LARGEST_ORDER}, found {system.order}" if available(u) else "the compiled loop and a CPU"
        )
        raise ValueError(f"algorithm: 'scan' needs {reason}; use 'chunked' or 'auto'")
    memory = _zero_state(u, system) if initial_state is None else initial_state
    return _finish(_Scan.apply(u, memory, *system.matrices(u.dtype, u.device)), initial_state, lengths)


class _Scan(torch.autograd.Function):
    """u (B, T, D), memory before it (B, D, N), Ad (S, N, N), Bd (S, N) -> states (B, T, D, N)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, memory: Tensor, Ad: Tensor, Bd: Tensor) -> Tensor:
        memory = memory.contiguous()
        states = empty(u, *u.shape, Bd.shape[1])
        torch.ops.lmu_hf.memory_forward(memory, u.contiguous(), Ad, Bd, states)
        # Only the gradient of the system, which a trained theta asks for, looks at the states again.
        trained = any(ctx.needs_input_grad[2:])
        ctx.save_for_backward(u, memory, Ad, Bd, *((states,) if trained else ()))
        return states

    @staticmethod
    def backward(ctx: Any, grad_states: Tensor) -> tuple:
        u, memory, Ad, Bd, *states = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Somebody wants a second derivative, which the plain operations have.
            steps = []
            state = memory
            for t in range(u.shape[1]):
                state = memory_step(state, u[:, t], Ad, Bd)
                steps.append(state)
            needed = [tensor for tensor, wanted in zip((u, memory, Ad, Bd), ctx.needs_input_grad, strict=True) if wanted]
            grads = iter(torch.autograd.grad(torch.stack(steps, dim=1), needed, grad_states, create_graph=True))
            return tuple(next(grads) if wanted else None for wanted in ctx.needs_input_grad)
        grad_memory, grad_u = empty(memory, *memory.shape), empty(u, *u.shape)
        arriving = empty(states[0], *states[0].shape) if states else None
        torch.ops.lmu_hf.memory_backward(contiguous(grad_states), Ad, Bd, grad_memory, grad_u, arriving)
        grad_Ad = grad_Bd = None
        if arriving is not None:
            before = torch.cat([memory[:, None], states[0][:, :-1]], dim=1)
            by_scale = "btdi,btdj->ij" if len(Ad) == 1 else "btdi,btdj->dij"
            grad_Ad = torch.einsum(by_scale, arriving, before).view_as(Ad)
            grad_Bd = torch.einsum("btdi,btd->i" if len(Bd) == 1 else "btdi,btd->di", arriving, u).view_as(Bd)
        return grad_u, grad_memory, grad_Ad, grad_Bd


def _fft(u: Tensor, system: DelaySystem, initial_state: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    inputs = fold_rows(u, system.scales)
    steps = inputs.shape[2]
    responses = system.impulse_response(steps, u.dtype, u.device)
    by_system = [
        causal_convolution(rows[..., None], response[None]) for rows, response in zip(inputs, responses, strict=True)
    ]
    states = by_system[0][None] if len(by_system) == 1 else torch.stack(by_system)
    if initial_state is not None:
        states = states + _free_response(fold_state(initial_state, system.scales), system, steps)
    return _finish(unfold_sequence(states, u.shape), initial_state, lengths)


def _final(u: Tensor, system: DelaySystem, initial_state: Tensor | None, lengths: Tensor | None) -> tuple[None, Tensor]:
    # Each row's last step last: m_T = sum_k H[k] u[T-1-k], and rows that are shorter just begin with zeros.
    inputs = fold_rows(to_end(u, lengths), system.scales)
    run = traced_final if torch.compiler.is_compiling() else _final_of
    final = unfold_state(run(inputs, system), u.shape)
    if initial_state is not None:
        final = final + _advance(initial_state, system, u.shape[1], lengths)
    return None, final


def _final_of(inputs: Tensor, system: DelaySystem) -> Tensor:
    """The last state of a memory that began empty: inputs (S, R, T) -> (S, R, N)."""
    steps, dtype, device = inputs.shape[2], inputs.dtype, inputs.device
    memory: Tensor | None = None
    first = steps % _FINAL_SEGMENT or _FINAL_SEGMENT
    for segment in inputs.tensor_split(list(range(first, steps, _FINAL_SEGMENT)), dim=2):
        length = segment.shape[2]
        # Kept at the next power of two, as responses are.
        response = system.newest_last(1 << (length - 1).bit_length(), dtype, device)[:, -length:]
        # Squeezed where there is one scale: a stack of one product takes half as long again.
        update = exact_matmul(segment.squeeze(0), response.squeeze(0)).view(system.scales, -1, system.order)
        if memory is not None:
            update = update + exact_matmul(memory, system.power(length, dtype, device).mT)
        memory = update
    assert memory is not None
    return memory


_IMPLEMENTATIONS = {"naive": naive_linear_memory, "chunked": _chunked, "fft": _fft, "final": _final, "scan": _scan}


def _advance(memory: Tensor, system: DelaySystem, steps: int, lengths: Tensor | None) -> Tensor:
    """Ad^steps m, or Ad^length m per row: binary powers, so that any mix of lengths costs log2(T) products."""
    traced = torch.compiler.is_compiling()
    if lengths is None and not traced:
        power = system.power(steps, memory.dtype, memory.device)
        return unfold_state(exact_matmul(fold_state(memory, system.scales), power.mT), memory.shape)
    if lengths is None:  # in a graph the number of steps may be open
        lengths = torch.full((memory.shape[0],), steps, device=memory.device)
    digits = digits_that_matter(steps, system) if traced else steps.bit_length()
    for bit in range(digits):
        power = system.power(1 << bit, memory.dtype, memory.device)
        advanced = unfold_state(exact_matmul(fold_state(memory, system.scales), power.mT), memory.shape)
        memory = torch.where((lengths >> bit & 1).bool()[:, None, None], advanced, memory)
    return memory.masked_fill((lengths >> digits > 0)[:, None, None], 0) if traced else memory


def _free_response(memory: Tensor, system: DelaySystem, steps: int) -> Tensor:
    """Ad^(t+1) m for t = 0 .. steps-1 by doubling: (S, R, N) -> (S, R, steps, N)."""
    states = exact_matmul(memory, system.power(1, memory.dtype, memory.device).mT)[:, :, None]
    while states.shape[2] < steps:
        count = states.shape[2]
        power = system.power(count, memory.dtype, memory.device)
        states = torch.cat([states, exact_matmul(states, power.mT[:, None])], dim=2)
    return states[:, :, :steps]


def _zero_state(u: Tensor, system: DelaySystem) -> Tensor:
    return u.new_zeros(u.shape[0], u.shape[2], system.order)


def _finish(states: Tensor, initial_state: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Takes each row's final state out of the sequence and blanks the steps past its length."""
    final = last_valid(states, lengths)
    if initial_state is not None:
        final = where_started(final, initial_state, lengths)
    return blank(states, lengths), final
