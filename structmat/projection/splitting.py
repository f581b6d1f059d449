"""Blocks of the product of two Kronecker-sparse factors, and the product itself.

A factor of pattern (a, b, c, d) is a tensor of values (*batch, a, b, c, d): entry (A, o, i, D) stands in row
(A b + o) d + D and column (A c + i) d + D. The product of two neighbours of rank r falls into blocks (A, alpha, delta,
D), with alpha < a' / a and delta < d / d', that share no entry and no parameter, and each is any matrix of rank r.
"""

from __future__ import annotations

from torch import Tensor

from structmat._checks import check_tensor
from structmat.chain import Pattern, unchainable
from structmat.projection.bases import norm_over, pad, thin_qr


# ---------------------------------------------------------------- the blocks of a split
def split_blocks(values: Tensor, left: Pattern, right: Pattern) -> Tensor:
    """The blocks of a merged factor: (*batch, a, b, c, d) viewed as (*batch, A, alpha, delta, D, rows, columns)."""
    alpha, delta = right.a // left.a, left.d // right.d
    sizes = (left.a, left.b, delta, alpha, right.c, right.d)
    return values.reshape(*values.shape[:-4], *sizes).movedim((-3, -4, -1, -5, -2), (-5, -4, -3, -2, -1))


def left_blocks(values: Tensor, left: Pattern, right: Pattern) -> Tensor:
    """The left factor as blocks (*batch, A, alpha, delta, D, rows, rank) of the product."""
    alpha, delta = right.a // left.a, left.d // right.d
    sizes = (left.a, left.b, alpha, left.c // alpha, delta, right.d)
    return values.reshape(*values.shape[:-4], *sizes).movedim((-4, -2, -1, -5, -3), (-5, -4, -3, -2, -1))


def right_blocks(values: Tensor, left: Pattern, right: Pattern) -> Tensor:
    """The right factor as blocks (*batch, A, alpha, delta, D, rank, columns) of the product."""
    alpha, delta = right.a // left.a, left.d // right.d
    sizes = (left.a, alpha, right.b // delta, delta, right.c, right.d)
    return values.reshape(*values.shape[:-4], *sizes).movedim((-3, -1, -4, -2), (-4, -3, -2, -1))


def left_values(blocks: Tensor, left: Pattern) -> Tensor:
    """The inverse of :func:`left_blocks`."""
    return blocks.movedim((-5, -4, -3, -2, -1), (-4, -2, -1, -5, -3)).reshape(*blocks.shape[:-6], *left)


def right_values(blocks: Tensor, right: Pattern) -> Tensor:
    """The inverse of :func:`right_blocks`."""
    return blocks.movedim((-4, -3, -2, -1), (-3, -1, -4, -2)).reshape(*blocks.shape[:-6], *right)


def merge(left: Tensor, right: Tensor) -> Tensor:
    """The values of the product of two neighbours of a chain; exact, and differentiable.

    Args:
        left: shape (*batch, a, b, c, d).
        right: shape (*batch, a', b', c', d'), with the same batch or one that broadcasts.

    Returns:
        Shape (*batch, a, b d / d', a' c' / a, d'). Costs 2 flops for each of its entries and each rank.

    Raises:
        ValueError: if the two patterns cannot be chained.

    Source: Le, Zheng, Riccietti, Gribonval 2022, "Fast learning of fast transforms, with guarantees".

    Example:
        >>> import torch
        >>> from structmat.projection.splitting import merge
        >>> merge(torch.ones(1, 2, 2, 4), torch.ones(2, 2, 2, 2)).shape
        torch.Size([1, 4, 4, 2])
    """
    check_tensor("left", left, 4)
    check_tensor("right", right, 4)
    first, second = Pattern(*left.shape[-4:]), Pattern(*right.shape[-4:])
    rank = first.rank(second)
    if rank is None:
        raise ValueError(unchainable(first, second))
    ours, theirs = left_blocks(left, first, second), right_blocks(right, first, second)
    product = ours * theirs if rank == 1 else ours @ theirs  # (*batch, A, alpha, delta, D, rows, columns)
    whole = product.movedim((-5, -4, -3, -2, -1), (-3, -4, -1, -5, -2))
    return whole.reshape(*product.shape[:-6], *first.merge(second))


def merge_all(factors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """The values of the product of a chain, in a tree: neighbours first, so that the large ones are few."""
    level = list(factors)
    while len(level) > 1:
        pairs = [merge(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = pairs + level[2 * len(pairs) :]
    return level[0]


# ---------------------------------------------------------------- orthonormal factors
def orthonormalise(values: Tensor, left: Pattern, right: Pattern) -> tuple[Tensor, Tensor]:
    """The left factor with orthonormal columns in every block, and the blocks (*, rank, rank) that it is to be times.

    A block with fewer rows than columns gets zero columns: times its conjugate transpose it still is a projector.
    """
    blocks = left_blocks(values, left, right)
    q, r = thin_qr(blocks)
    return left_values(pad(q, blocks.shape[-1], -1), left), pad(r, blocks.shape[-1], -2)


def orthonormalise_rows(values: Tensor, left: Pattern, right: Pattern) -> tuple[Tensor, Tensor]:
    """The right factor with orthonormal rows in every block, and the blocks (*, rank, rank) to put before it."""
    blocks = right_blocks(values, left, right)
    q, r = thin_qr(blocks.mT)
    return right_values(pad(q, blocks.shape[-2], -1).mT, right), pad(r, blocks.shape[-2], -2).mT


# ---------------------------------------------------------------- dense matrices
def on_support(W: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """W's entries on the support of a pattern, (*batch, a, b, c, d), and the norm of the others, (*batch)."""
    a, b, c, d = pattern
    if a == d == 1:
        return W.unsqueeze(-1).unsqueeze(-4), W.new_zeros(W.shape[:-2], dtype=W.dtype.to_real())
    grid = W.unflatten(-1, (a, c, d)).unflatten(-4, (a, b, d))  # (*batch, a, b, d, a, c, d)
    inside = grid.diagonal(dim1=-6, dim2=-3).diagonal(dim1=-4, dim2=-2)  # (*batch, b, c, a, d)
    outside = grid.clone()
    outside.diagonal(dim1=-6, dim2=-3).diagonal(dim1=-4, dim2=-2).zero_()
    return inside.movedim(-2, -4).contiguous(), norm_over(outside.flatten(-6, -4).flatten(-3), (-2, -1))


def from_support(values: Tensor) -> Tensor:
    """The dense matrix (*batch, a b d, a c d) of a factor or of merged factors (*batch, a, b, c, d)."""
    a, b, c, d = values.shape[-4:]
    W = values.new_zeros(*values.shape[:-4], a, b, d, a, c, d)
    W.diagonal(dim1=-6, dim2=-3).diagonal(dim1=-4, dim2=-2).copy_(values.movedim(-4, -2))
    return W.reshape(*values.shape[:-4], a * b * d, a * c * d)
