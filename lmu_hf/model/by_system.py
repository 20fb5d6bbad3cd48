"""Memories by delay system, as products take them.

Memory dimensions that share a window share their matrices, so that their rows lie side by side in one product. A stack
(S, R, ...) holds for each of S systems the rows R that it drives: all B * D of them with one system, or B with one for each
dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .compiled import matmul
from .precision import exact_matmul, full_float32


def fold_rows(u: Tensor, scales: int) -> Tensor:
    """(B, T, D) -> (S, R, T)."""
    if scales == 1:
        return u.mT.reshape(1, -1, u.shape[1])
    return u.permute(2, 0, 1)


def unfold_rows(rows: Tensor, batch: int) -> Tensor:
    """The inverse of :func:`fold_rows`: (S, R, T) -> (B, T, D)."""
    if rows.shape[0] == 1:
        return rows.reshape(batch, -1, rows.shape[-1]).mT
    return rows.permute(1, 2, 0)


def fold_sequence(states: Tensor, scales: int) -> Tensor:
    """(B, T, D, N) -> (S, R, T, N)."""
    if scales == 1:
        return states.transpose(1, 2).reshape(1, -1, states.shape[1], states.shape[3])
    return states.permute(2, 0, 1, 3)


def unfold_sequence(states: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`fold_sequence`, given the shape (B, T, D)."""
    batch, steps, dims = shape
    if states.shape[0] == 1:
        return states.reshape(batch, dims, steps, -1).transpose(1, 2)
    return states.permute(1, 2, 0, 3)


def fold_state(memory: Tensor, scales: int) -> Tensor:
    """(B, D, N) -> (S, R, N)."""
    return memory.reshape(1, -1, memory.shape[-1]) if scales == 1 else memory.transpose(0, 1)


def unfold_state(memory: Tensor, shape: torch.Size) -> Tensor:
    """(S, R, N) -> (B, D, N), given any shape that starts with B."""
    if memory.shape[0] == 1:
        return memory.reshape(shape[0], -1, memory.shape[-1])
    return memory.transpose(0, 1)


def product(rows: Tensor, stack: Tensor, out: Tensor | None = None) -> Tensor:
    """rows (S, R, X) @ stack (S, X, Y), into ``out`` if it is given. Of a single matrix without the detour through a stack, which
    takes as long again on a GPU, where such products are so small that launching them is what costs."""
    if len(stack) == 1:
        return matmul(rows[0], stack[0], None if out is None else out[0])[None]
    return torch.bmm(rows, stack, out=out)


def product_back(rows: Tensor, stack: Tensor) -> Tensor:
    """The same in a backward pass, in full float32; differentiable where a second derivative is asked for."""
    if torch.is_grad_enabled():
        return exact_matmul(rows, stack)
    with full_float32(rows):
        return product(rows, stack)


def side_by_side(A: Tensor, B: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """The systems of D memory dimensions, A (S, N, N) and B (S, N), as one: m' = m @ A' + u @ B', m (rows, D * N), u (rows, D).

    Returns:
        A' (D * N, D * N) and B' (D, D * N), zero but for the block of each dimension.
    """
    ahead = A.mT.expand(dims, -1, -1).permute(1, 2, 0).diag_embed()
    driven = B.expand(dims, -1).mT.diag_embed()
    size = dims * A.shape[-1]
    return ahead.permute(2, 0, 3, 1).reshape(size, size), driven.permute(1, 2, 0).reshape(dims, size)


def starts_at_once(like: Tensor) -> bool:
    """Whether the memory at the start of all chunks is computed by :func:`chain` rather than chunk after chunk: on a GPU, where
    launching that many small products takes longer than they do."""
    return like.is_cuda


def chain(first: Tensor, added: Tensor, matrix: Tensor) -> Tensor:
    """x[0] = first, x[k] = x[k - 1] @ matrix + added[k - 1], by doubling: more arithmetic, but log2(K) products in place of K.

    Args:
        first: (S, R, N).
        added: (S, R, K, N).
        matrix: (S, N, N); of no gradient.

    Returns:
        x (S, R, K + 1, N).
    """
    x = torch.cat([first[:, :, None], added], dim=2)
    power, reach = matrix.double(), 1
    while reach < x.shape[2]:
        # Nothing in place: the same lines then serve a second derivative.
        earlier = x[:, :, :-reach]
        sent = exact_matmul(earlier.flatten(1, 2), power.to(x.dtype)).view(earlier.shape)
        x = torch.cat([x[:, :, :reach], x[:, :, reach:] + sent], dim=2)
        power, reach = power @ power, 2 * reach
    return x
