"""The leading eigenvector of many small Gram matrices, with a proof of each; no decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

# Of the 2^7-th power of a matrix nothing is left in single precision but of eigenvalues within 8% of the leading one.
_SQUARINGS = 7
# Of mere bounds.
_ROUGH = 4
# What may be missing of an eigenvalue, as a share of the sum of all others.
_TOLERANCE = 1e-12
# Below, LAPACK is as fast; above, decompositions take less work than powers.
_SIZES = range(5, 257)


def trace_of(x: Tensor) -> Tensor:
    """The traces, real, of Hermitian matrices."""
    return x.diagonal(dim1=-2, dim2=-1).sum(-1).real


def low_precision(gram: Tensor) -> torch.dtype:
    """Of the powers: single on a CPU, where it is twice as fast, unless single is set to be less than that."""
    plain = not torch.is_autocast_enabled("cpu") and torch.get_float32_matmul_precision() == "highest"
    if gram.device.type != "cpu" or not plain:
        return gram.dtype
    return torch.complex64 if gram.is_complex() else torch.float32


def _unit(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
    return x / norm.masked_fill(norm == 0, 1)


def _pivot_columns(power: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two steps of Cholesky with pivoting: the columns (N, k, 2), and the traces of what one and both leave."""
    columns, rests = [], []
    diagonal = power.diagonal(dim1=-2, dim2=-1).real
    for _ in range(2):
        pivot, index = diagonal.max(-1, keepdim=True)
        column = power.gather(-1, index.unsqueeze(-2).expand(*power.shape[:-1], 1)).squeeze(-1)
        for c in columns:
            column = column - c * c.gather(-1, index).conj()
        column = column / pivot.clamp_min(torch.finfo(power.dtype).eps).sqrt()
        diagonal = (diagonal - (column * column.conj()).real).clamp_min(0)
        columns.append(column)
        rests.append(diagonal.sum(-1))
    return torch.stack(columns, -1), rests[0], rests[1]


def leading(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors (N, k) near the leading eigenvectors of positive semidefinite (N, k, k), and proofs.

    The matrix G, squared seven times over in low precision, is P = G^p, of trace 1. Two columns c of it, by Cholesky
    with pivoting, times G in full precision span a plane; x in it has the largest Rayleigh quotient t, y the other, u.
    How near t is to the leading eigenvalue is proved, for every matrix by itself. Rests of Cholesky's are positive
    semidefinite, below their traces s; by convexity, and with G's norm as the unit, for unit vectors z

    - orthogonal to the plane, (z' G z)^(p + 2) <= z' G P G z / |P| <= 2 s / (1 - s), of both columns;
    - orthogonal to x, (z' G z)^(p + 2) <= s / (1 - s) + sin², of one column and its angle to x; or z' G z is at most
      the larger eigenvalue of u and the line before, with the norm of G y - u y beside the diagonal.

    With m the smaller of both the leading eigenvalue is at most t + |G x - t x|² / (t - m). Errors of P are small
    beside its trace; s is increased by more than they can be. Nothing is proved where three eigenvalues are within 8%
    of each other at the top; of Gaussian blocks these are few.

    Returns:
        The vectors; the trace less the leading eigenvalue, not above its exact value (N); and whether both are proved
        to 12 digits, or to the rounding of the trace (N).
    """
    k, low, eps = gram.shape[-1], low_precision(gram), torch.finfo(gram.dtype).eps
    trace = trace_of(gram)
    unit = gram * (1 / trace.masked_fill(trace == 0, 1))[:, None, None]  # squares of its entries do not underflow
    power = unit.to(low)
    for i in range(_SQUARINGS):
        power = power @ power
        if i % 3 == 0:  # of trace 1 again: three squarings of such leave at least 1 / k^7
            power *= (1 / trace_of(power).clamp_min(torch.finfo(low).tiny))[:, None, None]
    columns, one, both = _pivot_columns(power)
    noise = 2 * k * torch.finfo(low).eps
    first, second = (unit @ columns.to(gram.dtype)).split(1, -1)
    first = _unit(first)
    for _ in range(2):
        second = _unit(second - first * (first.mH @ second))
    plane = torch.cat((first, second), -1)
    image = unit @ plane
    small = plane.mH @ image
    a, d, off = small[:, 0, 0].real, small[:, 1, 1].real, small[:, 0, 1]
    t, h = (a - d) / 2, torch.hypot((a - d) / 2, off.abs())
    value, other = (a + d) / 2 + h, (a + d) / 2 - h
    up = t >= 0
    turn = _unit(torch.stack((torch.where(up, t + h, off.abs()), torch.where(up, off.abs(), h - t)), -1)[..., None])
    turn = torch.where((h == 0)[:, None, None], torch.eye(2, 1, dtype=turn.dtype, device=turn.device), turn)
    phase = torch.where(off == 0, torch.ones_like(off), off.sgn().conj())
    c, s = turn.unbind(1)
    x_in = torch.stack((c.to(off.dtype), s * phase.unsqueeze(-1)), 1)
    y_in = torch.stack((-s * phase.conj().unsqueeze(-1), c.to(off.dtype)), 1)
    x = plane @ x_in
    missed = torch.linalg.vector_norm(image @ x_in - value[:, None, None] * x, dim=(-2, -1))
    beside = torch.linalg.vector_norm(image @ y_in - other[:, None, None] * (plane @ y_in), dim=(-2, -1))
    one, both, root = one.to(trace.dtype) + noise, both.to(trace.dtype) + noise, 1 / (2**_SQUARINGS + 2)
    # Beside P's leading eigenvalue, which is at least the norm of one column, and half the trace of two.
    off_x = value * (one / (1 - one).clamp_min(eps) + s.squeeze(-1).square()).pow(root)
    off_plane = value * (2 * both / (1 - both).clamp_min(eps)).pow(root)
    off_x = torch.minimum(off_x, (other + off_plane) / 2 + torch.hypot((other - off_plane) / 2, beside))
    gap, missed2, tail = value - off_x, missed.square(), 1 - value
    proved = ((missed2 <= (_TOLERANCE * tail + eps / 4) * gap) & (gap > 0)) | (trace == 0)
    return x.squeeze(-1), trace * (tail - missed2 / gap.masked_fill(gap <= 0, 1)).clamp_min(0), proved


def leading_vectors(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors (N, k) of positive semidefinite (N, k, k), and the sum of all other eigenvalues (N)."""
    if gram.shape[-1] not in _SIZES:
        values, vectors = torch.linalg.eigh(gram)
        return vectors[..., -1], values[..., :-1].sum(-1)
    v, tail, proved = leading(gram)
    index = (~proved).nonzero().squeeze(-1)
    if index.numel():
        values, vectors = torch.linalg.eigh(gram[index])
        v[index], tail[index] = vectors[..., -1], values[..., :-1].sum(-1)
    return v, tail


def leading_bounds(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of the leading eigenvalues of positive semidefinite (N, k, k), of any precision, from below and above.

    With the p-th power P of the matrix over its trace they are a Rayleigh quotient at a column of P, and the root of
    order 2 p of |P|². Sums over Gaussian blocks are off by some 1e-4.
    """
    trace = trace_of(gram)
    tiny = torch.finfo(trace.dtype).tiny
    power, log = gram * (1 / trace.clamp_min(tiny))[:, None, None], torch.zeros_like(trace)
    squarings = _ROUGH + 2 * (gram.shape[-1] <= 8)  # cheap, and flat blocks have singular values near to each other
    for i in range(squarings):
        power = power @ power
        log = 2 * log
        if i % 2:  # of trace 1 again
            scale = trace_of(power).clamp_min(tiny)
            power *= (1 / scale)[:, None, None]
            log += scale.log()
    norm2 = torch.linalg.vector_norm(power, dim=(-2, -1)).square()
    above = trace * ((2 * log + norm2.clamp_min(tiny).log()) / 2 ** (squarings + 1)).exp()
    index = power.diagonal(dim1=-2, dim2=-1).real.argmax(-1)
    v = _unit(power.gather(-1, index[:, None, None].expand(*power.shape[:-1], 1)))
    below = (v.mH @ (gram @ v)).real.flatten()
    return below, torch.where(trace > 0, above, 0)


def trailing_sum(gram: Tensor, rank: int) -> Tensor:
    """The sum of all but the rank largest eigenvalues of positive semidefinite (N, k, k)."""
    k = gram.shape[-1]
    if rank >= k:
        return gram.new_zeros(gram.shape[0], dtype=gram.dtype.to_real())
    if rank == 1 and k == 2:
        p, q = gram[:, 0, 0].real, gram[:, 1, 1].real
        return (p + q) / 2 - torch.hypot((p - q) / 2, gram[:, 0, 1].abs())
    if rank > 1 or k not in _SIZES:
        return torch.linalg.eigvalsh(gram)[:, :-rank].sum(-1)
    _, tail, proved = leading(gram)
    index = (~proved).nonzero().squeeze(-1)
    if index.numel():
        tail[index] = torch.linalg.eigvalsh(gram[index])[:, :-1].sum(-1)
    return tail
