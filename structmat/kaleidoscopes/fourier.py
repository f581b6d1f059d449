"""Fourier, cosine and sine transforms as kaleidoscope matrices."""

from __future__ import annotations

import math
from typing import Any

import torch

from structmat._checks import check_int
from structmat.kaleidoscopes._build import kaleidoscope, kernel
from structmat.matrices.kaleidoscope import Kaleidoscope
from structmat.transforms._build import choice, complex_dtype, norm_scale, turns

_INVERSE = {1: 1, 2: 3, 3: 2, 4: 4}
# Angles are pi (k + s) (m + t) / L: 2 s and 2 t of types 1 to 4, and L - n of type 1.
_SHIFTS = {"dct": ((0, 0), (0, 1), (1, 0), (1, 1)), "dst": ((2, 2), (2, 1), (1, 2), (1, 1))}
_LONGER = {"dct": -1, "dst": 1}


def dft(n: int, norm: str | None = None, *, dtype: torch.dtype | None = None, device: Any = None) -> Kaleidoscope:
    """The discrete Fourier transform, ``y[k] = sum_m exp(-2 pi i k m / n) x[m]``, as ``scipy.fft.fft``.

    Width 1, expansion 1, where n has no prime factor above 7: 4 p n numbers for every prime factor p. The order of the
    outputs needs no permutation of its own: where p^2 divides n, the first and last factors exchange a digit as they
    transform it (a self-sorting transform, Temperton 1991); where p divides n once, residues separate (Good 1958).
    Other n: a chirp convolution (Bluestein 1970), width 1 and expansion 2.13 at most.

    Args:
        n: size.
        norm: None or "backward" for no scaling, "forward" for 1/n, "ortho" for 1/sqrt(n): a unitary matrix.
        dtype: a complex dtype, by default the complex one of torch's default dtype.
        device: the default device if None.

    Returns:
        A :class:`~structmat.Kaleidoscope` of shape (n, n).

    Raises:
        TypeError: if n is not an integer.
        ValueError: if n < 1, norm is unknown or dtype is not complex.

    Example:
        >>> import torch
        >>> from structmat import kaleidoscopes
        >>> F = kaleidoscopes.dft(1000, dtype=torch.complex128)
        >>> x = torch.randn(1000, dtype=torch.complex128)
        >>> torch.allclose(F @ x, torch.fft.fft(x)), F.width, F.expansion
        (True, 1, 1.0)
    """
    return _dft(n, norm, False, dtype, device)


def idft(n: int, norm: str | None = None, *, dtype: torch.dtype | None = None, device: Any = None) -> Kaleidoscope:
    """The inverse of :func:`dft` of the same norm, as ``scipy.fft.ifft``: of the same width and expansion.

    Args:
        n: size.
        norm: None or "backward" for 1/n, "forward" for no scaling, "ortho" for 1/sqrt(n).
        dtype: see :func:`dft`.
        device: see :func:`dft`.

    Returns:
        A :class:`~structmat.Kaleidoscope` of shape (n, n).

    Raises:
        TypeError: if n is not an integer.
        ValueError: if n < 1, norm is unknown or dtype is not complex.
    """
    return _dft(n, norm, True, dtype, device)


def _dft(n: int, norm: str | None, inverse: bool, dtype: torch.dtype | None, device: Any) -> Kaleidoscope:
    scale = torch.full((check_int("n", n),), norm_scale(norm, n, inverse), dtype=torch.complex128)
    return kaleidoscope(kernel(n, n, n, scale, conj=inverse), complex_dtype(dtype), device, n, n)


def dct(
    n: int, type: int = 2, norm: str | None = None, *, dtype: torch.dtype | None = None, device: Any = None
) -> Kaleidoscope:
    """The discrete cosine transform of type 1, 2, 3 or 4, as ``scipy.fft.dct``: a real matrix of complex factors.

    Width 1, expansion 4.4 at most, 4 where n has no prime factor above 7 (type 1: less where n - 1 has none): a cosine
    is the sum of a Fourier kernel of size 2 n, with twiddles on both sides, and its conjugate. Real factors has
    :func:`structmat.transforms.dct`, a butterfly of rank 2, at a quarter of the cost.

    Args:
        n: size, at least 2 for type 1.
        type: 1, 2, 3 or 4.
        norm: None or "backward" for no scaling, "forward" for the inverse's 1/(2n) (type 1: 1/(2n-2)), or "ortho" for
            an orthogonal matrix.
        dtype: a complex dtype, by default the complex one of torch's default dtype.
        device: the default device if None.

    Returns:
        A :class:`~structmat.Kaleidoscope` of shape (n, n), whose entries have imaginary parts of rounding errors.

    Raises:
        TypeError: if n is not an integer.
        ValueError: if n is too small, type or norm is unknown, or dtype is not complex.

    Example:
        >>> import scipy.fft, torch
        >>> from structmat import kaleidoscopes
        >>> C, x = kaleidoscopes.dct(100, dtype=torch.complex128), torch.randn(100, dtype=torch.float64)
        >>> torch.allclose((C @ x.to(C.dtype)).real, torch.from_numpy(scipy.fft.dct(x.numpy())))
        True
        >>> C.width, C.expansion
        (1, 4.0)
    """
    return _trigonometric("dct", n, type, norm, False, dtype, device)


def idct(
    n: int, type: int = 2, norm: str | None = None, *, dtype: torch.dtype | None = None, device: Any = None
) -> Kaleidoscope:
    """The inverse of :func:`dct` of the same type and norm, as ``scipy.fft.idct``; built as it is.

    Args:
        n: size, at least 2 for type 1.
        type: the type of the transform to invert.
        norm: as in :func:`structmat.transforms.idct`.
        dtype: see :func:`dct`.
        device: see :func:`dct`.

    Returns:
        A :class:`~structmat.Kaleidoscope` of shape (n, n).

    Raises:
        TypeError: if n is not an integer.
        ValueError: if n is too small, type or norm is unknown, or dtype is not complex.
    """
    return _trigonometric("dct", n, type, norm, True, dtype, device)


def dst(
    n: int, type: int = 2, norm: str | None = None, *, dtype: torch.dtype | None = None, device: Any = None
) -> Kaleidoscope:
    """The discrete sine transform of type 1, 2, 3 or 4, as ``scipy.fft.dst``: a real matrix of complex factors.

    Built and priced as :func:`dct`; real factors has :func:`structmat.transforms.dst`.

    Args:
        n: size.
        type: 1, 2, 3 or 4.
        norm: None or "backward" for no scaling, "forward" for the inverse's 1/(2n) (type 1: 1/(2n+2)), or "ortho".
        dtype: see :func:`dct`.
        device: see :func:`dct`.

    Returns:
        A :class:`~structmat.Kaleidoscope` of shape (n, n).

    Raises:
        TypeError: if n is not an integer.
        ValueError: if n < 1, type or norm is unknown, or dtype is not complex.
    """
    return _trigonometric("dst", n, type, norm, False, dtype, device)


def idst(
    n: int, type: int = 2, norm: str | None = None, *, dtype: torch.dtype | None = None, device: Any = None
) -> Kaleidoscope:
    """The inverse of :func:`dst` of the same type and norm, as ``scipy.fft.idst``; built as :func:`dct`.

    Args:
        n: size.
        type: the type of the transform to invert.
        norm: as in :func:`structmat.transforms.idst`.
        dtype: see :func:`dct`.
        device: see :func:`dct`.

    Returns:
        A :class:`~structmat.Kaleidoscope` of shape (n, n).

    Raises:
        TypeError: if n is not an integer.
        ValueError: if n < 1, type or norm is unknown, or dtype is not complex.
    """
    return _trigonometric("dst", n, type, norm, True, dtype, device)


def _trigonometric(
    kind: str, n: int, type: int, norm: str | None, inverse: bool, dtype: torch.dtype | None, device: Any
) -> Kaleidoscope:
    check_int("n", n)
    choice("type", type, (1, 2, 3, 4))
    if kind == "dct" and type == 1 and n < 2:
        raise ValueError(f"n must be at least 2 for a dct of type 1, got {n}")
    type = _INVERSE[type] if inverse else type
    length = n + _LONGER[kind] if type == 1 else n
    rows = torch.full((n,), norm_scale(norm, 2 * length, inverse), dtype=torch.float64)
    columns = torch.ones(n, dtype=torch.float64)
    ends = {("dct", 1): [0, n - 1], ("dct", 2): [0], ("dct", 3): [0], ("dst", 2): [n - 1], ("dst", 3): [n - 1]}
    special = ends.get((kind, type), [])
    if norm == "ortho":  # the basis vectors at the ends are longer than the others
        if type != 3:
            rows[special] *= math.sqrt(0.5)
        if type != 2:
            columns[special] *= math.sqrt(2)
    if type in (1, 3):  # where they stand once in the sum, not twice
        columns[special] *= 0.5
    s, t = _SHIFTS[kind][type - 1]
    k = torch.arange(n)
    unit = 1 if kind == "dct" else 1j  # exp(-i a) + exp(i a) is twice the cosine, i exp(-i a) - i exp(i a) the sine
    left = unit * rows * turns(2 * k * t + s * t, 8 * length)
    right = columns * turns(2 * k * s, 8 * length)
    double = torch.complex128
    parts = [kaleidoscope(kernel(2 * length, n, n, left, right, c), double, "cpu", n, n) for c in (False, True)]
    return Kaleidoscope.sum(parts).to(torch.get_default_device() if device is None else device, complex_dtype(dtype))
