"""Matrices of low rank off their diagonal: the hierarchically off-diagonal low-rank (HODLR) form of Ambikasaran & Darve 2013.

The continuous A of the memory is semiseparable: each of its triangles has rank one. Its exponential therefore has blocks off the
diagonal that are, to the rounding of float32, of rank 5 to 15, and one step of a memory of order 256 and theta 784 reads 24
thousand numbers in place of 65 thousand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_LARGEST_LEAF = 64  # rows and columns of a block on the diagonal

# Up to this order, reading the matrix takes less time than finding one's way through its blocks.
_DENSE = 128


class HODLR(NamedTuple):
    """Stacked matrices (S, N, N) for products y = x @ matrix, in P leaves of L rows and columns each.

    Halves are divided in halves down to the leaves. What a leaf sends to the other half of level l is x @ ``inward``, R_l numbers
    per level; what the leaves of a half send is added up; and y of a leaf is [x of the leaf, what arrived on each level] @
    ``outward``.

    Attributes:
        inward: (S, P, L, R), R the sum of the ranks.
        outward: (S, P, L + R, L).
        ranks: of each level, from the halves of the whole to pairs of leaves.
    """

    inward: Tensor
    outward: Tensor
    ranks: list[int]


def dense(matrices: Tensor) -> HODLR:
    """Matrices (S, N, N) as they are: one leaf, to which nothing is sent."""
    return HODLR(matrices.new_empty(len(matrices), 1, matrices.shape[1], 0), matrices[:, None], [])


def hodlr(matrices: Tensor, dtype: torch.dtype) -> HODLR | None:
    """The HODLR form of matrices, as exact as a dtype is.

    Singular values of blocks are left out below a quarter of the dtype's epsilon, in shares of the largest of the whole matrix:
    the rounding of the matrix itself does as much.

    Args:
        matrices: (S, N, N), in more than the precision of ``dtype``.
        dtype: of the two parts.

    Returns:
        None where the form would have more than half of the numbers.
    """
    order = matrices.shape[-1]
    if order <= _DENSE or not matrices.isfinite().all():
        return None
    matrices = matrices.double()
    depth = (-(-order // _LARGEST_LEAF) - 1).bit_length()
    leaves = 1 << depth
    leaf = -(-order // (8 * leaves)) * 8  # whole vectors
    filled = matrices.new_zeros(len(matrices), leaves * leaf, leaves * leaf)
    filled[:, :order, :order] = matrices
    least = torch.finfo(dtype).eps / 4 * torch.linalg.matrix_norm(matrices, 2)
    inward, by_leaf = [], filled.unflatten(1, (leaves, leaf)).unflatten(3, (leaves, leaf))
    outward = [by_leaf.diagonal(dim1=1, dim2=3).movedim(3, 1)]
    ranks = []
    for level in range(depth):
        # The blocks (S, halves, rows of one half, columns of the other), a half and its neighbour in turn.
        halves = 2 << level
        blocks = filled.unflatten(1, (halves, -1)).unflatten(3, (halves, -1))
        index = torch.arange(halves)
        left, values, right = torch.linalg.svd(blocks[:, index, :, index ^ 1].movedim(1, 0), full_matrices=False)
        rank = int((values > least[:, None, None]).sum(-1).max())
        ranks.append(rank)
        inward.append(left[..., :rank].reshape(len(matrices), leaves, leaf, rank))
        arriving = (values[..., :rank, None] * right[..., :rank, :])[:, index ^ 1]
        arriving = arriving.unflatten(3, (-1, leaf)).movedim(3, 2)
        outward.append(arriving.reshape(len(matrices), leaves, rank, leaf))
    form = HODLR(torch.cat(inward, 3).to(dtype), torch.cat(outward, 2).to(dtype), ranks)
    return form if 2 * (form.inward.numel() + form.outward.numel()) < matrices.numel() else None
