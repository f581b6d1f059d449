"""The DFT of a tile as products with small matrices and twiddles, in float32 grade.

M = N1 N2 N3 points (N3 = 1 in order 2), t = (t1 N2 + t2) N3 + t3 and f = k1 + N1 (k2 + N2 k3). A tile holds P
transforms side by side, first with rows (p, t2, t3) and columns t1, at the end with rows (p, k1, k2) and columns k3
(order 2: rows (p, k1), columns k2). Frequencies stay in that order: the inverse takes them as they come.

Between the products a complex number is two neighbouring entries, and a DFT of N points a real product with 2N x 2N
entries. Products of float32 numbers are three of TF32 parts.

Source: Cooley and Tukey 1965; as products with matrices, Li et al. 2021, "tcFFT"; Fu et al. 2023, "FlashFFTConv".
"""

# The language of kernels is not the Python that type checkers know.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Radices by the number of points. N1 / 2 is the depth of the first product, whose second half is zeros; 8 at least.
RADICES = {
    256: (16, 16, 1),
    512: (32, 16, 1),
    1024: (32, 32, 1),
    2048: (64, 32, 1),
    4096: (16, 16, 16),
    8192: (32, 16, 16),
}


def _turns(rows: int, columns: int, period: int) -> Tensor:
    """``exp(-2 pi i r c / period)``, shape (rows, columns); angles are reduced as integers."""
    turns = torch.outer(torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu")) % period
    return torch.polar(torch.ones_like(turns, dtype=torch.float64), turns.double() * (-2 * math.pi / period))


def _matrix(n: int, inverse: bool) -> Tensor:
    """The DFT or its inverse as a real (2 n, 2 n) matrix for rows of neighbouring real and imaginary parts."""
    F = _turns(n, n, n)
    F = F.conj() / n if inverse else F
    return torch.stack([torch.view_as_real(F), torch.view_as_real(1j * F)], 1).view(2 * n, 2 * n)


@functools.cache
def tables(points: int, device: torch.device) -> Tensor:
    """All constants of a size one after the other: the matrices of N1, N2, N3, those of their inverses, the twiddles.

    T1 = exp(-2 pi i k1 (t2 N3 + t3) / M) as [(k1, t3), t2] and as [(t2, t3), k1], T2 = exp(-2 pi i k2 t3 / (N2 N3)) as
    [k2, t3] and as [t3, k2]: as the forward and as the inverse transform meet them. (Reading one table in both places
    would keep it in registers in between.)
    """
    radices = RADICES[points]
    n1, n2, n3 = radices
    parts = [_matrix(n, inverse) for inverse in (False, True) for n in radices]
    first, second = _turns(n2 * n3, n1, points), _turns(n3, n2, n2 * n3)
    turns = (first.view(n2, n3, n1).permute(2, 1, 0), first, second.mT, second)
    parts += [torch.view_as_real(t.contiguous()) for t in turns]
    return torch.cat([p.flatten() for p in parts]).to(device, torch.float32)


@triton.jit
def _stage(x, matrix, IN: tl.constexpr, OUT: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """The first IN rows and OUT columns of a matrix of N points, applied to rows of pairs: both parts, float32."""
    at = tl.arange(0, 2 * IN)[:, None] * (2 * N) + tl.arange(0, 2 * OUT)[None, :]
    y = tl.dot(x, tl.load(matrix + at), input_precision=PRECISION)
    return tl.split(tl.reshape(y, (x.shape[0], OUT, 2)))


@triton.jit
def _turned(x, twiddles, ROWS: tl.constexpr, N: tl.constexpr, CONJUGATE: tl.constexpr):
    """Rows of N pairs times the entries of a table of ROWS x N, again and again."""
    row = tl.arange(0, x.shape[0]) % ROWS
    ar, ai = tl.split(tl.reshape(x, (x.shape[0], N, 2)))
    at = (row[:, None] * N + tl.arange(0, N)[None, :])[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    tr, ti = tl.split(tl.load(twiddles + at))
    if CONJUGATE:
        ti = -ti
    return pairs(ar * tr - ai * ti, ar * ti + ai * tr)


@triton.jit
def pairs(ar, ai):
    """Rows of pairs of both parts, (R, N) each to (R, 2 N)."""
    return tl.reshape(tl.join(ar, ai), (ar.shape[0], 2 * ar.shape[1]))


@triton.jit
def forward(
    x, table, FULL: tl.constexpr,
    P: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The DFT of pairs (P N2 N3, 2 N1), or of the first half of their columns: both parts, float32.

    Of shape (P N1 N2, N3), in order 2 (P N1, N2).
    """
    IN: tl.constexpr = N1 if FULL else N1 // 2
    M: tl.constexpr = N1 * N2 * N3
    M1: tl.constexpr = 4 * N1 * N1
    M2: tl.constexpr = 4 * N2 * N2
    TWIDDLES: tl.constexpr = 2 * (M1 + M2 + 4 * N3 * N3)
    ar, ai = _stage(x, table, IN, N1, N1, PRECISION)
    x = tl.permute(tl.reshape(pairs(ar, ai), (P, N2, N3, N1, 2)), (0, 3, 2, 1, 4))
    x = _turned(tl.reshape(x, (P * N1 * N3, 2 * N2)), table + TWIDDLES, N1 * N3, N2, False)
    ar, ai = _stage(x, table + M1, N2, N2, N2, PRECISION)
    if N3 > 1:
        x = tl.permute(tl.reshape(pairs(ar, ai), (P * N1, N3, N2, 2)), (0, 2, 1, 3))
        x = _turned(tl.reshape(x, (P * N1 * N2, 2 * N3)), table + TWIDDLES + 4 * M, N2, N3, False)
        ar, ai = _stage(x, table + M1 + M2, N3, N3, N3, PRECISION)
    return ar, ai


@triton.jit
def inverse(
    ar, ai, table, FULL: tl.constexpr,
    P: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The inverse DFT of what :func:`forward` gives, or only the first half of its columns t1."""
    R: tl.constexpr = N2 * N3
    M: tl.constexpr = N1 * R
    OUT: tl.constexpr = N1 if FULL else N1 // 2
    M1: tl.constexpr = 4 * N1 * N1
    M2: tl.constexpr = 4 * N2 * N2
    INVERSE: tl.constexpr = M1 + M2 + 4 * N3 * N3
    TWIDDLES: tl.constexpr = 2 * INVERSE
    x = pairs(ar, ai)
    if N3 > 1:
        ar, ai = _stage(x, table + INVERSE + M1 + M2, N3, N3, N3, PRECISION)
        x = tl.permute(tl.reshape(pairs(ar, ai), (P * N1, N2, N3, 2)), (0, 2, 1, 3))
        x = _turned(tl.reshape(x, (P * N1 * N3, 2 * N2)), table + TWIDDLES + 4 * M + 2 * R, N3, N2, True)
    ar, ai = _stage(x, table + INVERSE + M1, N2, N2, N2, PRECISION)
    x = tl.permute(tl.reshape(pairs(ar, ai), (P, N1, N3, N2, 2)), (0, 3, 2, 1, 4))
    x = _turned(tl.reshape(x, (P * R, 2 * N1)), table + TWIDDLES + 2 * M, R, N1, True)
    return _stage(x, table + INVERSE, N1, OUT, N1, PRECISION)
