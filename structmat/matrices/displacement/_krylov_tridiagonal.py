"""Krylov products of tridiagonal operators with corners: ``sum_k c_k A^k g`` and its transpose, in chunks of powers.

With k = q CHUNK + p: the vectors ``A^p g`` are made once (baby steps), and ``A^CHUNK`` is applied by Horner's rule to
sums of them (giant steps), as a matrix of bands: multiplied out in blocks that overlap. No basis of polynomials other
than the powers is used and nothing is divided, so that errors are those of multiplying by A.

Shapes: bands (*batch, 3, m) with entries ``A[i + 1, i]``, ``A[i, i]``, ``A[i, i + 1]`` of i, indices modulo m; g
(*batch, r, m), c (*batch, tokens, r, count), count <= m.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: How many powers are taken together; a power of two.
CHUNK = 32


def transposed(bands: Tensor) -> Tensor:
    """The bands of the transpose."""
    return bands.flip(-2)


def _near(bands: Tensor, g: Tensor, count: int) -> Tensor:
    """``A^p g`` for p < count: shape (*batch, r, count, m)."""
    sub, main, sup = (b.unsqueeze(-2) for b in bands.unbind(-2))
    powers = [g.expand(*torch.broadcast_shapes(g.shape[:-2], bands.shape[:-2]), *g.shape[-2:])]
    for _ in range(count - 1):
        v = powers[-1]
        powers.append(main * v + (sub * v).roll(1, -1) + sup * v.roll(-1, -1))
    return torch.stack(powers, -2)


def _windows(t: Tensor) -> Tensor:
    """Blocks of CHUNK with their neighbours, periodic: (*batch, blocks, 3 CHUNK)."""
    m = t.shape[-1]
    size = -(-m // CHUNK) * CHUNK + 2 * CHUNK
    blocks = torch.cat([t[..., m - CHUNK :], t, t, t], -1)[..., :size].unflatten(-1, (-1, CHUNK))
    return torch.cat([blocks[..., :-2, :], blocks[..., 1:-1, :], blocks[..., 2:, :]], -1)


def _power(bands: Tensor) -> Tensor:
    """``A^CHUNK`` in blocks of rows, (*batch, blocks, CHUNK, 3 CHUNK): CHUNK steps do not leave the neighbours."""
    sub, main, sup = _windows(bands).unbind(-3)
    power = main.diag_embed() + sub[..., :-1].diag_embed(-1) + sup[..., :-1].diag_embed(1)
    steps = 1
    while 2 * steps < CHUNK:
        power, steps = power @ power, 2 * steps
    return power[..., CHUNK : 2 * CHUNK, :] @ power


def _apply(power: Tensor, x: Tensor) -> Tensor:
    """``A^CHUNK x`` over the last dimension."""
    return torch.einsum("...tbw,...bcw->...tbc", _windows(x), power).flatten(-2)[..., : x.shape[-1]]


def krylov_sum(bands: Tensor, g: Tensor, c: Tensor) -> Tensor:
    """``sum_j,k c[j, k] A^k g_j``: shape (*batch, tokens, m)."""
    count = c.shape[-1]
    chunk = min(CHUNK, count)
    near = _near(bands, g, chunk)
    pieces = F.pad(c, (0, -count % chunk)).split(chunk, -1)
    y = torch.einsum("...trk,...rkm->...tm", pieces[-1], near)
    power = _power(bands) if len(pieces) > 1 else near
    for piece in reversed(pieces[:-1]):
        y = _apply(power, y) + torch.einsum("...trk,...rkm->...tm", piece, near)
    return y


def krylov_coefficients(bands: Tensor, h: Tensor, x: Tensor, count: int) -> Tensor:
    """``h_j^T A^k x`` for k < count and x of shape (*batch, tokens, m): shape (*batch, tokens, r, count)."""
    chunk = min(CHUNK, count)
    near = _near(transposed(bands), h, chunk)
    power = _power(bands) if count > chunk else near
    pieces = [torch.einsum("...tm,...rkm->...trk", x, near)]
    for _ in range(-(-count // chunk) - 1):
        x = _apply(power, x)
        pieces.append(torch.einsum("...tm,...rkm->...trk", x, near))
    return torch.cat(pieces, -1)[..., :count]


def krylov_flops(m: int, r: int, count: int) -> int:
    """Operations of either function for one vector, the powers included."""
    chunk = min(CHUNK, count)
    chunks, blocks = -(-count // chunk), -(-m // CHUNK)
    total = r * chunk * m * (2 * chunks + 5)
    if chunks > 1:
        squares = CHUNK.bit_length() - 2 + 1 / 3  # of the last one, a third of the rows
        total += blocks * CHUNK**2 * (6 * (chunks - 1) + int(54 * CHUNK * squares))
    return total
