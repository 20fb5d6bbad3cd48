"""The memory folded into the weights that read it: ``memory @ weight`` for every step without ever writing the memory.

A hidden cell reads the memory through one matrix K. In a chunk of C steps that starts at m0 and is driven by u[1..C],

    m[j] K = m0 A^j K + sum_{i<=j} u[i] H[j-i] K,     H[lag] = A^lag B

so with A^j K and H[lag] K computed once, all steps of all chunks are two large products, and of the memory only its value at
the start of each chunk is needed. Orders above the hidden size save most.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .legendre import DelaySystem
from .memory import fold_rows, fold_state, linear_memory, unfold_state

_CHUNK = 16


def worth_folding(batch: int, steps: int, memory_d: int, order: int, width: int) -> bool:
    """Whether folding takes fewer operations than writing the memory; ``width`` is the number of columns of K."""
    if steps < 2 * _CHUNK:
        return False
    writes = batch * steps * memory_d * order * (_CHUNK + order)
    folds = batch * steps * memory_d * (_CHUNK * width + order * order / _CHUNK)
    # Forward and backward, twice; the operators themselves are built once forward and twice backward.
    build = _CHUNK * memory_d * order * order * width
    return folds + build < 0.8 * writes


def applied_powers(weight: Tensor, system: DelaySystem, memory_d: int, count: int) -> Tensor:
    """(A^T)^i K for i = 0 .. count, (count + 1, D, N, W), for a weight K (D * N, W). Differentiable in K and theta."""
    Ad, _ = system.matrices(weight.dtype, weight.device)
    applied = [weight.view(memory_d, system.order, -1)]
    for _ in range(count):
        applied.append(Ad.mT @ applied[-1])
    return torch.stack(applied)


def short_kernel(powers: Tensor, system: DelaySystem) -> Tensor:
    """B^T (A^T)^i K, what an input i steps back contributes: (count + 1, D, W)."""
    _, Bd = system.matrices(powers.dtype, powers.device)
    return torch.einsum("idnw,dn->idw", powers, Bd.expand(powers.shape[1], -1))


def folded_memory(
    u: Tensor, system: DelaySystem, weight: Tensor, memory: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``linear_memory(u)`` flattened, times ``weight``.

    Args:
        u: memory input (B, T, D), float32 or float64, zero past a row's length.
        system: the delay system.
        weight: K (D * N, W).
        memory: m before the first step (B, D, N).
        lengths: number of valid steps per row (B,), or None for all.

    Returns:
        (B, T, W), without meaning past a row's length, and the memory after each row's last valid step (B, D, N).
    """
    batch, steps, dims = u.shape
    chunks = -(-steps // _CHUNK)
    u = F.pad(u, (0, 0, 0, chunks * _CHUNK - steps))
    powers = applied_powers(weight, system, dims, _CHUNK)
    kernel = short_kernel(powers[:_CHUNK], system)
    lag = torch.arange(_CHUNK, device=u.device)[None, :] - torch.arange(_CHUNK, device=u.device)[:, None]
    # (C, D, C, W): input i of the chunk -> step j, zero for j < i.
    toeplitz = (kernel[lag.clamp(min=0)] * (lag >= 0)[..., None, None]).transpose(1, 2)
    from_memory = powers[1:].permute(1, 2, 0, 3).flatten(0, 1).flatten(1)

    starts = chunk_starts(u, system, memory)
    by_chunk = u.unflatten(1, (chunks, _CHUNK)).flatten(0, 1).flatten(1)
    result = torch.addmm(by_chunk @ toeplitz.flatten(0, 1).flatten(1), starts.flatten(0, 1), from_memory)
    final = final_memory(u, starts, system, steps, lengths)
    return result.view(batch, chunks * _CHUNK, -1)[:, :steps], final


def chunk_starts(u: Tensor, system: DelaySystem, memory: Tensor) -> Tensor:
    """The memory at the start of each chunk (B, K, D * N), for u (B, K * C, D)."""
    power = system.power(_CHUNK, u.dtype, u.device).mT
    response = system.impulse_response(_CHUNK, u.dtype, u.device).flip(1)
    # What each chunk adds, in one product; then one small product per chunk to carry it on.
    driven = fold_rows(u, system.scales).unflatten(2, (-1, _CHUNK)) @ response[:, None]
    state = fold_state(memory, system.scales)
    starts = [state]
    for index in range(driven.shape[2] - 1):
        state = torch.baddbmm(driven[:, :, index], state, power)
        starts.append(state)
    return torch.stack([unfold_state(state, memory.shape).flatten(1) for state in starts], dim=1)


def final_memory(u: Tensor, starts: Tensor, system: DelaySystem, steps: int, lengths: Tensor | None) -> Tensor:
    """The memory after each row's last valid step, from the start of the chunk that it lies in.

    Args:
        u: memory input (B, K * C, D).
        starts: memory at the start of each chunk (B, K, D * N).
        system: the delay system.
        steps: number of steps, at most K * C.
        lengths: number of valid steps per row (B,), or None for all.

    Returns:
        (B, D, N).
    """
    batch, chunks = starts.shape[:2]
    chunk, dims = u.shape[1] // chunks, u.shape[2]
    starts = starts.unflatten(2, (dims, -1))
    if lengths is None:
        rest = u[:, (chunks - 1) * chunk : steps]
        return linear_memory(rest, system, starts[:, -1], return_sequence=False)[1]
    rows = torch.arange(batch, device=u.device)
    index = ((lengths - 1).clamp(min=0) // chunk).to(rows.dtype)
    rest = u.unflatten(1, (chunks, chunk))[rows, index]
    return linear_memory(rest, system, starts[rows, index], lengths - index * chunk, return_sequence=False)[1]
