"""Orthogonal wavelet transforms: Haar and Daubechies, periodised."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structmat._checks import check_int
from structmat.base import StructuredMatrix
from structmat.lazy import compose
from structmat.matrices.permutation import Permutation
from structmat.transforms._build import butterfly, real_dtype

#: Up to here NumPy's roots are good starting points for those in fixed point.
_LARGEST_ORDER = 20


def haar(
    n: int, levels: int | None = None, *, dtype: torch.dtype | None = None, device: Any = None
) -> StructuredMatrix:
    """The orthonormal Haar transform: the Daubechies wavelet of order 1, see :func:`daubechies`.

    A permutation times a dyadic Butterfly with a factor of 2 n numbers for every level.

    Args:
        n: size, a multiple of 2^levels.
        levels: number of levels; as many as n allows if None, log2 n of a power of two.
        dtype: floating point or complex, torch's default dtype if None.
        device: the default device if None.

    Returns:
        A :class:`~structmat.Product` of a Permutation and a Butterfly, or a Butterfly; shape (n, n).

    Raises:
        TypeError: if n or levels is not an integer.
        ValueError: if 2^levels does not divide n.

    Example:
        >>> from structmat.transforms import haar
        >>> haar(4).to_dense().round(decimals=4)
        tensor([[ 0.5000,  0.5000,  0.5000,  0.5000],
                [ 0.5000,  0.5000, -0.5000, -0.5000],
                [ 0.7071, -0.7071,  0.0000,  0.0000],
                [ 0.0000,  0.0000,  0.7071, -0.7071]])
    """
    levels = _levels(n, levels)
    dtype = real_dtype(dtype)
    factors = [_in_place(n, l, _HAAR) for l in reversed(range(levels))]
    factors = factors or [torch.ones(n, 1, 1, 1, dtype=torch.float64)]
    return _sorted(butterfly(factors, dtype, device, real=False), n, levels)


def daubechies(
    n: int, order: int, levels: int | None = None, *, dtype: torch.dtype | None = None, device: Any = None
) -> StructuredMatrix:
    """The orthogonal discrete wavelet transform with Daubechies' filters of 2 ``order`` taps, periodised.

    One level on m entries gives m / 2 averages ``sum_t h[t] x[(2 k + t) mod m]`` and m / 2 details with
    ``g[t] = (-1)^t h[2 order - 1 - t]``; the next level transforms the averages. Outputs are the last averages, then
    details from the coarsest to the finest level. Orthogonal for every size, for filters longer than m too.

    A level is a lattice of ``order`` rotations of pairs with shifts between (Vaidyanathan 1993): about 4 n
    operations times order times levels, as a product of Kronecker-sparse matrices and permutations.

    Args:
        n: size, a multiple of 2^levels.
        order: number of vanishing moments N of dbN, 1 (Haar) to 20.
        levels: number of levels; as many as n allows if None.
        dtype: floating point or complex, torch's default dtype if None.
        device: the default device if None.

    Returns:
        A :class:`~structmat.Product` of Butterfly and Permutation matrices, shape (n, n).

    Raises:
        TypeError: if n, order or levels is not an integer.
        ValueError: if order is out of range or 2^levels does not divide n.

    Example:
        >>> import torch
        >>> from structmat.transforms import daubechies
        >>> W = daubechies(96, order=2, levels=3)
        >>> torch.allclose(W.mT @ (W @ torch.ones(96)), torch.ones(96), atol=1e-5)
        True
    """
    check_int("order", order)
    if order > _LARGEST_ORDER:
        raise ValueError(f"order must be at most {_LARGEST_ORDER}, got {order}")
    if order == 1:
        return haar(n, levels, dtype=dtype, device=device)
    levels, dtype = _levels(n, levels), real_dtype(dtype)
    if not levels:
        return haar(n, 0, dtype=dtype, device=device)
    A: StructuredMatrix | None = None
    for level in range(levels):
        for place, rotation in enumerate(_lattice(order)):
            R = butterfly([_in_place(n, level, rotation)], dtype, device, real=False)
            if place:
                R = compose(R, Permutation(_shift(n, level).to(R.device), dtype))
            A = R if A is None else compose(R, A)
    assert A is not None
    return _sorted(A, n, levels)


def daubechies_filter(order: int) -> np.ndarray:
    """The 2 ``order`` taps of Daubechies' averaging filter of extremal phase, of sum sqrt(2), in double precision.

    By spectral factorisation of the half-band polynomial (Daubechies 1988): the roots of
    ``sum_k C(order - 1 + k, k) y^k`` with y = (2 - z - 1/z) / 4, those inside of the unit circle, and ``order`` zeros
    at z = -1. NumPy's roots are polished in fixed point: taps are correct to rounding for every order.

    Args:
        order: number of vanishing moments, 1 to 20.

    Raises:
        TypeError: if order is not an integer.
        ValueError: if order is out of range.

    Example:
        >>> from structmat.transforms import daubechies_filter
        >>> daubechies_filter(2).round(6)
        array([ 0.482963,  0.836516,  0.224144, -0.12941 ])
    """
    if check_int("order", order) > _LARGEST_ORDER:
        raise ValueError(f"order must be at most {_LARGEST_ORDER}, got {order}")
    return np.array(_filter(order))


# -------------------------------------------------------------------- in fixed point: integers times 2^-_BITS
_BITS = 256
_Complex = tuple[int, int]


def _times(a: _Complex, b: _Complex) -> _Complex:
    return (a[0] * b[0] - a[1] * b[1]) >> _BITS, (a[0] * b[1] + a[1] * b[0]) >> _BITS


def _over(a: _Complex, b: _Complex) -> _Complex:
    size = b[0] * b[0] + b[1] * b[1]
    return ((a[0] * b[0] + a[1] * b[1]) << _BITS) // size, ((a[1] * b[0] - a[0] * b[1]) << _BITS) // size


def _polished(root: complex, coefficients: list[int]) -> _Complex:
    """Newton's method for a simple root of a polynomial with integer coefficients, the highest first."""
    z = int(root.real * 2.0**60) << (_BITS - 60), int(root.imag * 2.0**60) << (_BITS - 60)
    for _ in range(8):  # from six digits or more to more than sixty
        value, slope = (0, 0), (0, 0)
        for c in coefficients:
            x, y = _times(slope, z)
            slope = x + value[0], y + value[1]
            x, y = _times(value, z)
            value = x + (c << _BITS), y
        x, y = _over(value, slope)
        z = z[0] - x, z[1] - y
    return z


@functools.lru_cache
def _exact_filter(order: int) -> tuple[int, ...]:
    """The filter in fixed point, up to a factor."""
    y_poly = [math.comb(order - 1 + k, k) for k in reversed(range(order))]
    middle = 1 - 2 * np.roots(y_poly)
    starts = middle + np.sqrt(middle * middle - 1)
    # The same polynomial in z, times (4 z)^(order - 1): y = -(z - 1)^2 / (4 z).
    z_poly = [0] * (2 * order - 1)
    for k in range(order):
        scale = math.comb(order - 1 + k, k) * (-1) ** k * 4 ** (order - 1 - k)
        for i in range(2 * k + 1):
            z_poly[order - 1 - k + i] += scale * (-1) ** i * math.comb(2 * k, i)
    taps: list[_Complex] = [(1 << _BITS, 0)]
    for start in starts:
        root = _polished(complex(start if abs(start) < 1 else 1 / start), z_poly)
        moved = [_times(t, root) for t in taps]
        taps = [(a[0] - b[0], a[1] - b[1]) for a, b in zip([*taps, (0, 0)], [(0, 0), *moved], strict=True)]
    real = [t[0] for t in taps]  # roots come in conjugate pairs
    for _ in range(order):
        real = [a + b for a, b in zip([*real, 0], [0, *real], strict=True)]
    return tuple(real)


@functools.lru_cache
def _filter(order: int) -> tuple[float, ...]:
    taps = _exact_filter(order)
    total = sum(taps)
    return tuple(math.sqrt(2) * (t / total) for t in taps)


_Block = tuple[tuple[float, float], tuple[float, float]]
_HAAR: _Block = ((math.sqrt(0.5), math.sqrt(0.5)), (math.sqrt(0.5), -math.sqrt(0.5)))


@functools.lru_cache
def _lattice(order: int) -> tuple[_Block, ...]:
    """Orthogonal 2 x 2 blocks, the first to be applied first: between them the second of the pair moves by one.

    Peeled off from the outside: the constant terms of both rows (h, g) are parallel, so that a reflection makes that of
    the second row zero.
    """
    low = list(_exact_filter(order))
    high = [t if i % 2 == 0 else -t for i, t in enumerate(reversed(low))]
    blocks: list[_Block] = []
    for _ in range(order - 1):
        tan = (high[0] << _BITS) // low[0]
        cos = 1 / math.hypot(1, tan / (1 << _BITS))
        sin = cos * (tan / (1 << _BITS))
        blocks.append(((cos, sin), (sin, -cos)))
        mixed = [a + (tan * b >> _BITS) for a, b in zip(low, high, strict=True)]
        high = [(tan * a >> _BITS) - b for a, b in zip(low, high, strict=True)][2:]
        low = mixed[:-2]
    ratio = low[1] / low[0]
    cos = math.copysign(1 / math.hypot(1, ratio), low[0])
    sin = cos * ratio
    sign = math.copysign(1, high[0] * sin) if sin else 1.0
    blocks.append(((cos, sin), (sign * sin, -sign * cos)))
    return tuple(reversed(blocks))


# -------------------------------------------------------------------- levels, in place
def _levels(n: int, levels: int | None) -> int:
    check_int("n", n)
    most = (n & -n).bit_length() - 1
    if levels is None:
        return most
    if check_int("levels", levels, 0) > most:
        raise ValueError(f"levels must be at most {most} for n = {n}, which 2^levels must divide, got {levels}")
    return levels


def _in_place(n: int, level: int, block: _Block) -> Tensor:
    """A block on neighbouring averages, which stand 2^level apart; details stay."""
    values = torch.eye(2, dtype=torch.float64)[..., None].repeat(n >> (level + 1), 1, 1, 1 << level)
    values[..., 0] = torch.tensor(block, dtype=torch.float64)
    return values


def _shift(n: int, level: int) -> Tensor:
    """Every second one of the averages reads the next but one, around the end."""
    perm = torch.arange(n)
    odd = torch.arange(1 << level, n, 2 << level)
    perm[odd] = odd.roll(-1)
    return perm


def _sorted(A: StructuredMatrix, n: int, levels: int) -> StructuredMatrix:
    parts = [torch.arange(0, n, 1 << levels)]
    parts += [torch.arange(1 << l, n, 2 << l) for l in reversed(range(levels))]
    perm = torch.cat(parts)
    if torch.equal(perm, torch.arange(n)):
        return A
    return compose(Permutation(perm.to(A.device), A.dtype), A)
