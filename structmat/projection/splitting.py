"""Blocks of the product of two Kronecker-sparse factors, the product itself, and bases of many small matrices.

A factor of pattern (a, b, c, d) is a tensor of values (*batch, a, b, c, d): entry (A, o, i, D) stands in row
(A b + o) d + D and column (A c + i) d + D. The product of two neighbours of rank r falls into blocks (A, alpha, delta,
D), with alpha < a' / a and delta < d / d', that share no entry and no parameter, and each is any matrix of rank r.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from structmat._checks import check_tensor
from structmat.chain import Pattern, unchainable
from structmat.projection.truncated import truncated_svd

# Entries taken at a time, so that what is computed on the way stays in the cache; a GPU is kept busy instead.
_CHUNK = {"cpu": 1 << 19}
_CHUNK_ELSEWHERE = 1 << 28
# A block whose rows are combinations of r of them up to this share of its norm is taken to have rank r.
_EXACT = 1e-14


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


# ---------------------------------------------------------------- bases of many small matrices
def norm_over(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """The norm over negative dims; on a CPU that of complex numbers is 40 times slower than that of their parts."""
    if x.is_complex():
        x, dim = torch.view_as_real(x.conj() if x.is_conj() else x), (*(d - 1 for d in dim), -1)
    return torch.linalg.vector_norm(x, dim=dim)


def norm2_over(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """The square of the norm over negative dims."""
    return norm_over(x, dim).square()


def _unit(x: Tensor) -> Tensor:
    """X over its norm along the last dimension, and zero where it is zero."""
    norm = norm_over(x, (-1,)).unsqueeze(-1)
    return x / norm.masked_fill(norm == 0, 1)


def _pad(x: Tensor, size: int, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size - shape[dim]
    return torch.cat((x, x.new_zeros(shape)), dim) if shape[dim] else x


def by_chunks(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor, inner: int) -> tuple[Tensor, ...]:
    """``function`` of many independent matrices, some at a time: all but the last ``inner`` dimensions are batch."""
    lead, size = inputs[0].shape[:-inner], inputs[0].numel()
    limit = _CHUNK.get(inputs[0].device.type, _CHUNK_ELSEWHERE)
    if size <= limit or max(lead) == 1:
        return function(*inputs)
    dim = lead.index(max(lead))
    step = max(1, lead[dim] * limit // size)
    parts = [function(*part) for part in zip(*(x.split(step, dim) for x in inputs), strict=True)]
    return tuple(torch.cat(part, dim) for part in zip(*parts, strict=True))


def apply_adjoint(basis: Tensor, blocks: Tensor) -> Tensor:
    """``basis.mH @ blocks``."""
    return by_chunks(lambda u, m: (u.mH @ m,), basis, blocks, inner=2)[0]


def _pivots(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the rank rows that Gram-Schmidt with pivoting picks, and the square of what is lost."""
    rest, basis = M, M.new_zeros(*M.shape[:-2], 0, M.shape[-1])
    floor = _EXACT / (2 * math.sqrt(M.shape[-2])) * norm_over(M, (-2, -1)).unsqueeze(-1)
    short = torch.zeros_like(floor, dtype=torch.bool)
    for k in range(rank):
        norms = norm_over(rest, (-1,))
        pivot = norms.argmax(-1)[..., None, None].expand(*M.shape[:-2], 1, M.shape[-1])
        row = rest.gather(-2, pivot)
        short = norms.amax(-1, keepdim=True) <= floor
        row = _unit(row.masked_fill(short.unsqueeze(-1), 0))
        for _ in range(3 if k else 0):
            row = _unit(row - (row @ basis.mH) @ basis)
        basis = torch.cat((basis, row), -2)
        rest = rest - (rest @ row.mH) * row
    if short.any():  # of a smaller rank: any orthonormal rows will do
        basis = torch.linalg.qr(basis.mH)[0].mH
    return basis, norm2_over(rest, (-2, -1))


def _leading(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading right singular vectors of (N, b, c) as rows (N, rank, c), and the square of what is lost."""
    if rank > 1:
        right = truncated_svd(M, rank)[1]
        basis = torch.linalg.qr(right.mH)[0].mH
    elif M.shape[-1] <= M.shape[-2]:  # one vector of the Gram matrix is accurate whatever the other singular values
        basis = torch.linalg.eigh(M.mH @ M)[1][..., -1:].mH
    else:
        basis = _unit(torch.linalg.eigh(M @ M.mH)[1][..., -1:].mH @ M)
    return basis, norm2_over(M - (M @ basis.mH) @ basis, (-2, -1))


def row_basis(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Orthonormal rows (*batch, rank, c) nearest to the rows of (*batch, b, c), and the square of what is lost.

    Beyond c of them, the rows are zero.
    """
    basis, lost = by_chunks(lambda m: _row_basis(m, rank), M, inner=2)
    return basis, lost


def _row_basis(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    b, c = M.shape[-2:]
    lost = M.new_zeros(M.shape[:-2], dtype=M.dtype.to_real())
    if rank >= c:
        eye = torch.eye(c, dtype=M.dtype, device=M.device)
        return _pad(eye, rank, 0).expand(*M.shape[:-2], rank, c), lost
    if rank >= b:
        return torch.linalg.qr(_pad(M, rank, -2).mH)[0].mH, lost
    if rank == 1 and c == 2:
        turn, lost = _rotation(M[..., 0], M[..., 1])
        return turn.conj().unsqueeze(-2), lost
    batch, M = M.shape[:-2], M.flatten(0, -3)
    basis, lost = _pivots(M, rank)
    rough = lost > (_EXACT**2) * norm2_over(M, (-2, -1))
    if rough.all():
        basis, lost = _leading(M, rank)
    elif rough.any():
        index = rough.nonzero().squeeze(-1)
        basis[index], lost[index] = _leading(M[index], rank)
    return basis.reshape(*batch, rank, c), lost.reshape(batch)


def rotation(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The leading left singular vector of the two-row matrix (first, second), and the square of what it misses.

    Closed form through the Gram matrix: of the leading vector that loses nothing, and the rest is measured.
    """
    u, missed = by_chunks(_rotation, first, second, inner=1)
    return u, missed


def _rotation(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    p, q = norm2_over(first, (-1,)), norm2_over(second, (-1,))
    g = torch.linalg.vecdot(second, first)  # conj(second) first
    t = (p - q) / 2
    h = torch.hypot(t, g.abs())
    up = t >= 0
    u = _unit(torch.stack((torch.where(up, t + h + (h == 0), g), torch.where(up, g.conj(), h - t)), -1))
    missed = torch.addcmul(second * u[..., :1], first, u[..., 1:], value=-1)
    return u, norm2_over(missed, (-1,))


def orthonormalise(values: Tensor, left: Pattern, right: Pattern) -> tuple[Tensor, Tensor]:
    """The left factor with orthonormal columns in every block, and the blocks (*, rank, rank) that it is to be times.

    A block with fewer rows than columns gets zero columns: times its conjugate transpose it still is a projector.
    """
    blocks = left_blocks(values, left, right)
    q, r = torch.linalg.qr(blocks)
    return left_values(_pad(q, blocks.shape[-1], -1), left), _pad(r, blocks.shape[-1], -2)


def orthonormalise_rows(values: Tensor, left: Pattern, right: Pattern) -> tuple[Tensor, Tensor]:
    """The right factor with orthonormal rows in every block, and the blocks (*, rank, rank) to put before it."""
    blocks = right_blocks(values, left, right)
    q, r = torch.linalg.qr(blocks.mT)
    return right_values(_pad(q, blocks.shape[-2], -1).mT, right), _pad(r, blocks.shape[-2], -2).mT


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
