"""Orthonormal bases of many small matrices at once, and what they lose."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from structmat.projection.leading import leading_vectors
from structmat.projection.truncated import truncated_svd

# Entries taken at a time, so that what is computed on the way stays in the cache; a GPU is kept busy instead.
_CHUNK = {"cpu": 1 << 19}
_CHUNK_ELSEWHERE = 1 << 28
# Where many small decompositions cost little more than their operations.
_HAS_LAPACK = ("cpu",)
# A block whose rows are combinations of r of them up to this share of its norm is taken to have rank r.
_EXACT = 1e-14


def norm_over(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """The norm over negative dims; on a CPU that of complex numbers is 40 times slower than that of their parts."""
    if x.is_complex():
        x, dim = torch.view_as_real(x.conj() if x.is_conj() else x), (*(d - 1 for d in dim), -1)
    return torch.linalg.vector_norm(x, dim=dim)


def norm2_over(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """The square of the norm over negative dims."""
    return norm_over(x, dim).square()


def unit(x: Tensor) -> Tensor:
    """X over its norm along the last dimension, and zero where it is zero."""
    norm = norm_over(x, (-1,)).unsqueeze(-1)
    return x / norm.masked_fill(norm == 0, 1)


def pad(x: Tensor, size: int, dim: int) -> Tensor:
    """X with zeros behind, up to a size along a dimension."""
    shape = list(x.shape)
    shape[dim] = size - shape[dim]
    return torch.cat((x, x.new_zeros(shape)), dim) if shape[dim] else x


def thin_qr(M: Tensor) -> tuple[Tensor, Tensor]:
    """Q with orthonormal columns, or zero ones for those that depend on others, and R with ``M = Q R``.

    One column is a vector over its norm. A few are orthogonalised twice on a GPU, where a batch of decompositions is
    done one by one; on a CPU LAPACK does them.
    """
    columns = M.shape[-1]
    if columns > 1 and M.device.type in _HAS_LAPACK:
        return torch.linalg.qr(M)
    Q, R = torch.zeros_like(M), M.new_zeros(*M.shape[:-2], columns, columns)
    for k in range(columns):
        v = M[..., k : k + 1]
        for _ in range(2 if k else 0):
            share = Q[..., :k].mH @ v
            v = v - Q[..., :k] @ share
            R[..., :k, k : k + 1] += share
        norm = norm_over(v, (-2, -1))[..., None, None]
        floor = 8 * torch.finfo(M.dtype).eps * norm_over(M[..., k : k + 1], (-2, -1))[..., None, None]
        norm = norm.masked_fill(norm <= floor, 0)
        Q[..., k : k + 1] = torch.where(norm == 0, 0, v / norm.masked_fill(norm == 0, 1))
        if k == 0:  # what is zero gets a direction, in which alternating least squares can find something
            Q[..., :1, :1] += (norm == 0).to(M.dtype)
        R[..., k : k + 1, k : k + 1] = norm
    return Q, R


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
        row = unit(row.masked_fill(short.unsqueeze(-1), 0))
        for _ in range(3 if k else 0):
            row = unit(row - (row @ basis.mH) @ basis)
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
        basis = leading_vectors(M.mH @ M)[0].unsqueeze(-1).mH
    else:
        basis = unit(leading_vectors(M @ M.mH)[0].unsqueeze(-1).mH @ M)
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
        return pad(eye, rank, 0).expand(*M.shape[:-2], rank, c), lost
    if rank >= b:
        return torch.linalg.qr(pad(M, rank, -2).mH)[0].mH, lost
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
    u = unit(torch.stack((torch.where(up, t + h + (h == 0), g), torch.where(up, g.conj(), h - t)), -1))
    missed = torch.addcmul(second * u[..., :1], first, u[..., 1:], value=-1)
    return u, norm2_over(missed, (-1,))
