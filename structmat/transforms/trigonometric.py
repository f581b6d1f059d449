"""Cosine and sine transforms of types 1 to 4, and the Chebyshev transforms made of them: real butterflies."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from structmat._checks import check_int
from structmat.base import StructuredMatrix
from structmat.lazy import compose
from structmat.matrices.permutation import Permutation
from structmat.transforms._build import choice, fourier_block, norm_scale, real_dtype, turns
from structmat.transforms.permutations import even_odd

_INVERSE = {1: 1, 2: 3, 3: 2, 4: 4}


def dct(
    n: int, type: int = 2, norm: str | None = None, *, dtype: torch.dtype | None = None, device: Any = None
) -> StructuredMatrix:
    """The discrete cosine transform of type 1, 2, 3 or 4, as ``scipy.fft.dct``: a real matrix, for any n.

    Types 2 to 4 are the real part of a DFT of size n with twiddles on both sides, after the order even then reversed
    odd (Makhoul 1980): a real :class:`Butterfly` of rank 2 and a permutation or two. Its factors over the prime factors
    p of n hold 4 p n numbers each, at both ends half of that: O(n sum p) parameters and operations. For prime factors
    above 128 it is a chirp convolution, see :func:`dft`. Type 1 is cut from a DFT of size 2 (n - 1).

    Args:
        n: size, at least 2 for type 1.
        type: 1, 2, 3 or 4.
        norm: None or "backward" for no scaling, "forward" for the inverse's 1/(2n) (type 1: 1/(2n-2)), or "ortho" for
            an orthogonal matrix.
        dtype: floating point or complex, torch's default dtype if None.
        device: the default device if None.

    Returns:
        A :class:`~structmat.Product` (or Butterfly) of shape (n, n).

    Raises:
        TypeError: if n is not an integer.
        ValueError: if n is too small, or type or norm is unknown.

    Example:
        >>> import scipy.fft, torch
        >>> from structmat.transforms import dct
        >>> x = torch.linspace(0, 1, 1000, dtype=torch.float64)
        >>> C = dct(1000, norm="ortho", dtype=torch.float64)
        >>> torch.allclose(C @ x, torch.from_numpy(scipy.fft.dct(x.numpy(), norm="ortho")))
        True
    """
    return _trigonometric("dct", n, type, norm, False, dtype, device)


def idct(
    n: int, type: int = 2, norm: str | None = None, *, dtype: torch.dtype | None = None, device: Any = None
) -> StructuredMatrix:
    """The inverse of :func:`dct` of the same type and norm, as ``scipy.fft.idct``.

    Args:
        n: size, at least 2 for type 1.
        type: the type of the transform to invert; the inverse of type 2 is type 3 over 2n.
        norm: None or "backward" for 1/(2n) (type 1: 1/(2n-2)), "forward" for no scaling, or "ortho".
        dtype: see :func:`dct`.
        device: see :func:`dct`.

    Returns:
        What :func:`dct` returns.

    Raises:
        TypeError: if n is not an integer.
        ValueError: if n is too small, or type or norm is unknown.
    """
    return _trigonometric("dct", n, type, norm, True, dtype, device)


def dst(
    n: int, type: int = 2, norm: str | None = None, *, dtype: torch.dtype | None = None, device: Any = None
) -> StructuredMatrix:
    """The discrete sine transform of type 1, 2, 3 or 4, as ``scipy.fft.dst``: a real matrix, for any n.

    Built and priced as :func:`dct`; type 1 is cut from a DFT of size 2 (n + 1).

    Args:
        n: size.
        type: 1, 2, 3 or 4.
        norm: None or "backward" for no scaling, "forward" for the inverse's 1/(2n) (type 1: 1/(2n+2)), or "ortho" for
            an orthogonal matrix.
        dtype: floating point or complex, torch's default dtype if None.
        device: the default device if None.

    Returns:
        A :class:`~structmat.Product` (or Butterfly) of shape (n, n).

    Raises:
        TypeError: if n is not an integer.
        ValueError: if n < 1, or type or norm is unknown.

    Example:
        >>> import torch
        >>> from structmat.transforms import dst
        >>> dst(2, norm="ortho").to_dense()
        tensor([[ 0.7071,  0.7071],
                [ 0.7071, -0.7071]])
    """
    return _trigonometric("dst", n, type, norm, False, dtype, device)


def idst(
    n: int, type: int = 2, norm: str | None = None, *, dtype: torch.dtype | None = None, device: Any = None
) -> StructuredMatrix:
    """The inverse of :func:`dst` of the same type and norm, as ``scipy.fft.idst``.

    Args:
        n: size.
        type: the type of the transform to invert.
        norm: None or "backward" for 1/(2n) (type 1: 1/(2n+2)), "forward" for no scaling, or "ortho".
        dtype: see :func:`dst`.
        device: see :func:`dst`.

    Returns:
        What :func:`dst` returns.

    Raises:
        TypeError: if n is not an integer.
        ValueError: if n < 1, or type or norm is unknown.
    """
    return _trigonometric("dst", n, type, norm, True, dtype, device)


def _trigonometric(
    kind: str, n: int, type: int, norm: str | None, inverse: bool, dtype: torch.dtype | None, device: Any
) -> StructuredMatrix:
    check_int("n", n)
    choice("type", type, (1, 2, 3, 4))
    if kind == "dct" and type == 1 and n < 2:
        raise ValueError(f"n must be at least 2 for a dct of type 1, got {n}")
    type = _INVERSE[type] if inverse else type
    length = 2 * n if type > 1 else 2 * (n - 1 if kind == "dct" else n + 1)
    rows = torch.full((n,), norm_scale(norm, length, inverse), dtype=torch.float64)
    columns = torch.ones(n, dtype=torch.float64)
    half = math.sqrt(0.5)
    ends = {("dct", 1): [0, n - 1], ("dct", 2): [0], ("dct", 3): [0], ("dst", 2): [n - 1], ("dst", 3): [n - 1]}
    special = ends.get((kind, type), [])
    if norm == "ortho":  # the basis vectors at the ends are longer than the others
        if type != 3:
            rows[special] *= half
        if type != 2:
            columns[special] *= 1 / half
    if type in (1, 3):  # where they stand once in the sum, not twice
        columns[special] *= 0.5
    return _weighted(kind, n, type, 2 * rows, columns, real_dtype(dtype), device)


def _weighted(
    kind: str, n: int, type: int, rows: Tensor, columns: Tensor, dtype: torch.dtype, device: Any
) -> StructuredMatrix:
    """``rows[k] f(k, m) columns[m]``, where f is the cosine or sine of an angle.

    Type 1: pi k m / (n - 1) or pi (k + 1) (m + 1) / (n + 1), type 2: pi k (2 m + 1) / (2 n), type 3: its transpose,
    type 4: pi (2 k + 1) (2 m + 1) / (4 n), where for sines of types 2 and 3 the integer k (or m) starts at 1.
    """
    j = torch.arange(n)
    sine = kind == "dst"
    unit = 1j if sine else 1.0  # Re(exp(-it)) is a cosine, Re(i exp(-it)) a sine
    if type == 1:
        size = 2 * (n + 1 if sine else n - 1)
        shift = turns(j, size) if sine else torch.ones(n, dtype=torch.complex128)
        first = turns(j + 1, size) if sine else shift
        left, right = unit * rows * first, shift * columns
        return fourier_block(size, dtype, device, real=True, left=left, right=right, rows=n, columns=n)
    if type == 3:
        left, right = _inner(kind, n, 2), unit * columns * _outer(kind, n, 2)
        # The transpose of type 2: its order acts on the result, and so do the weights there.
        order = even_odd(n, reverse_odd=True, dtype=dtype, device=device)
        left = left * rows[even_odd(n, reverse_odd=True).perm.cpu()]
        return _ordered(order.mT, fourier_block(n, dtype, device, real=True, left=left, right=right), None)
    order = even_odd(n, reverse_odd=True, dtype=dtype, device=device)
    left = unit * rows * _outer(kind, n, type)
    right = _inner(kind, n, type) * columns[even_odd(n, reverse_odd=True).perm.cpu()]
    return _ordered(None, fourier_block(n, dtype, device, real=True, left=left, right=right), order)


def _ordered(left: Permutation | None, A: StructuredMatrix, right: Permutation | None) -> StructuredMatrix:
    if A.shape[-1] < 3:  # even then reversed odd changes nothing
        return A
    A = A if left is None else compose(left, A)
    return A if right is None else compose(A, right)


# With 2 m + 1 -> 4 j + 1, j = m / 2 for even m and n - (m + 1) / 2 for odd ones, all angles are 2 pi k j / n plus one
# that depends on k (outer) and one that depends on j (inner); of odd m the sign may change.
def _outer(kind: str, n: int, type: int) -> Tensor:
    k = torch.arange(n)
    if type == 4:
        return turns(2 * k + 1, 8 * n)
    return turns(k + 1 if kind == "dst" else k, 4 * n)


def _inner(kind: str, n: int, type: int) -> Tensor:
    j = torch.arange(n)
    if type == 4:
        phase, flips = turns(j, 2 * n), kind == "dct"
    elif kind == "dst":
        phase, flips = turns(j, n), True
    else:
        phase, flips = torch.ones(n, dtype=torch.complex128), False
    return torch.where(j >= (n + 1) // 2, -phase, phase) if flips else phase


# -------------------------------------------------------------------- Chebyshev
def chebyshev_values(
    n: int, kind: int = 1, *, dtype: torch.dtype | None = None, device: Any = None
) -> StructuredMatrix:
    """Values at n Chebyshev points from n Chebyshev coefficients: ``V[k, m] = T_m(x_k)``, as ``chebvander``.

    The points are those of ``numpy.polynomial.chebyshev``, in increasing order: ``chebpts1(n)``, the roots of T_n, or
    ``chebpts2(n)``, its extrema. A cosine transform of type 3 or 1 with other signs; see :func:`dct` for the cost.

    Args:
        n: number of points and coefficients, at least 2 for points of the second kind.
        kind: 1 or 2, the kind of the points.
        dtype: floating point or complex, torch's default dtype if None.
        device: the default device if None.

    Returns:
        A :class:`~structmat.Product` (or Butterfly) of shape (n, n).

    Raises:
        TypeError: if n is not an integer.
        ValueError: if n is too small, or kind is unknown.

    Example:
        >>> import torch
        >>> from structmat.transforms import chebyshev_values
        >>> chebyshev_values(3, kind=2) @ torch.tensor([0.0, 1.0, 0.0])  # T_1(x) = x: the points
        tensor([-1.,  0.,  1.])
    """
    signs = _chebyshev_signs(n, kind)
    ones = torch.ones_like(signs)
    return _weighted("dct", n, 3 if kind == 1 else 1, ones, signs, real_dtype(dtype), device)


def chebyshev_coefficients(
    n: int, kind: int = 1, *, dtype: torch.dtype | None = None, device: Any = None
) -> StructuredMatrix:
    """Chebyshev coefficients of the polynomial through n values at Chebyshev points: inverse of the other direction.

    Args:
        n: number of points and coefficients, at least 2 for points of the second kind.
        kind: 1 or 2, see :func:`chebyshev_values`.
        dtype: floating point or complex, torch's default dtype if None.
        device: the default device if None.

    Returns:
        A :class:`~structmat.Product` (or Butterfly) of shape (n, n).

    Raises:
        TypeError: if n is not an integer.
        ValueError: if n is too small, or kind is unknown.
    """
    signs = _chebyshev_signs(n, kind)
    columns = torch.ones_like(signs)
    if kind == 1:
        rows = signs * (2 / n)
        rows[0] /= 2
        return _weighted("dct", n, 2, rows, columns, real_dtype(dtype), device)
    rows = signs * (2 / (n - 1))
    for ends in (rows, columns):
        ends[[0, n - 1]] /= 2
    return _weighted("dct", n, 1, rows, columns, real_dtype(dtype), device)


def _chebyshev_signs(n: int, kind: int) -> Tensor:
    check_int("n", n)
    choice("kind", kind, (1, 2))
    if kind == 2 and n < 2:
        raise ValueError(f"n must be at least 2 for Chebyshev points of the second kind, got {n}")
    return 1.0 - 2.0 * (torch.arange(n, dtype=torch.float64) % 2)
