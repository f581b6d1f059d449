"""Fourier transforms: DFT in one and more dimensions, Hartley, chirp-z and fractional."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structmat._checks import check_int
from structmat.base import StructuredMatrix
from structmat.lazy import Kronecker
from structmat.transforms._build import (
    butterfly,
    chirp_factors,
    complex_dtype,
    fourier_block,
    norm_scale,
    real_dtype,
    scale_columns,
    turns,
)


def _constant(n: int, value: complex) -> Tensor | None:
    return None if value == 1 else torch.full((n,), value, dtype=torch.complex128)


def dft(n: int, norm: str | None = None, *, dtype: torch.dtype | None = None, device: Any = None) -> StructuredMatrix:
    """The discrete Fourier transform, ``y[k] = sum_m exp(-2 pi i k m / n) x[m]``, as ``scipy.fft.fft``.

    For any n. Where prime factors are at most 128 it is a mixed-radix :class:`Butterfly` (Cooley and Tukey 1965) times
    a digit reversal: n sum(p) complex parameters over the prime factors p of n. Other sizes go through a chirp
    convolution (Bluestein 1970) of a size N < 8/3 n with factors 2, 3 and 5: one cropped Butterfly of at most
    4 N log2 N parameters. Factors are exact to rounding: angles are reduced as integers, then rounded to the dtype.

    Args:
        n: size.
        norm: None or "backward" for no scaling, "forward" for 1/n, "ortho" for 1/sqrt(n): a unitary matrix.
        dtype: a complex dtype, by default the complex one of torch's default dtype.
        device: the default device if None.

    Returns:
        A :class:`~structmat.Product` of a Butterfly and a Permutation, or a Butterfly; shape (n, n).

    Raises:
        TypeError: if n is not an integer.
        ValueError: if n < 1, norm is unknown or dtype is not complex.

    Example:
        >>> import torch
        >>> from structmat.transforms import dft
        >>> F = dft(1000, dtype=torch.complex128)
        >>> x = torch.arange(1000.0).to(torch.complex128)
        >>> torch.allclose(F @ x, torch.fft.fft(x)), F.num_params
        (True, 21000)
    """
    return _dft(n, norm, dtype, device, inverse=False)


def idft(n: int, norm: str | None = None, *, dtype: torch.dtype | None = None, device: Any = None) -> StructuredMatrix:
    """The inverse DFT, ``y[k] = 1/n sum_m exp(2 pi i k m / n) x[m]``, as ``scipy.fft.ifft``.

    It is the inverse of :func:`dft` of the same norm, at the same cost.

    Args:
        n: size.
        norm: None or "backward" for 1/n, "forward" for no scaling, "ortho" for 1/sqrt(n).
        dtype: see :func:`dft`.
        device: see :func:`dft`.

    Returns:
        What :func:`dft` returns.

    Raises:
        TypeError: if n is not an integer.
        ValueError: if n < 1, norm is unknown or dtype is not complex.
    """
    return _dft(n, norm, dtype, device, inverse=True)


def _dft(n: int, norm: str | None, dtype: torch.dtype | None, device: Any, inverse: bool) -> StructuredMatrix:
    scale = norm_scale(norm, check_int("n", n), inverse)
    F = fourier_block(n, complex_dtype(dtype), device, real=False, left=_constant(n, scale))
    return F._map_children(_conjugate) if inverse else F


def _conjugate(child: Any) -> Any:
    """The conjugate in memory: factors are plain tensors, not views that conjugate lazily."""
    return child._map(_conjugate) if isinstance(child, StructuredMatrix) else child.conj().resolve_conj()


def dft2(
    shape: Sequence[int], norm: str | None = None, *, dtype: torch.dtype | None = None, device: Any = None
) -> Kronecker:
    """The two-dimensional DFT of arrays that are flattened row by row, as ``scipy.fft.fft2``; more dimensions too.

    Args:
        shape: sizes (rows, columns) of the arrays, any number of dimensions.
        norm: see :func:`dft`; the scaling is that of the product of the sizes.
        dtype: see :func:`dft`.
        device: see :func:`dft`.

    Returns:
        The :class:`~structmat.Kronecker` product of a :func:`dft` for every dimension.

    Raises:
        TypeError: if shape is no sequence of integers.
        ValueError: if a size is below 1, norm is unknown or dtype is not complex.

    Example:
        >>> import torch
        >>> from structmat.transforms import dft2
        >>> x = torch.arange(12.0).view(3, 4).to(torch.complex64)
        >>> torch.allclose((dft2((3, 4)) @ x.flatten()).view(3, 4), torch.fft.fft2(x), atol=1e-4)
        True
    """
    return Kronecker(tuple(dft(n, norm, dtype=dtype, device=device) for n in _sizes(shape)))


def idft2(
    shape: Sequence[int], norm: str | None = None, *, dtype: torch.dtype | None = None, device: Any = None
) -> Kronecker:
    """The inverse of :func:`dft2` of the same norm, as ``scipy.fft.ifft2``.

    Args:
        shape: sizes of the arrays.
        norm: see :func:`idft`.
        dtype: see :func:`dft`.
        device: see :func:`dft`.

    Returns:
        The :class:`~structmat.Kronecker` product of an :func:`idft` for every dimension.
    """
    return Kronecker(tuple(idft(n, norm, dtype=dtype, device=device) for n in _sizes(shape)))


def _sizes(shape: Any) -> tuple[int, ...]:
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Sequence) or not len(shape):
        raise TypeError(f"shape must be a non-empty sequence of integers, as (rows, columns), got {shape!r}")
    return tuple(check_int("a size of shape", n) for n in shape)


def hartley(
    n: int, norm: str | None = None, *, dtype: torch.dtype | None = None, device: Any = None
) -> StructuredMatrix:
    """The discrete Hartley transform, ``y[k] = sum_m (cos t + sin t) x[m]`` with t = 2 pi k m / n: real and symmetric.

    Re((1 + i) DFT) as a real butterfly of rank 2 (Bracewell 1983 for the transform), for any n; see :func:`dct` for the
    cost.

    Args:
        n: size.
        norm: None or "backward" for no scaling, "forward" for 1/n, "ortho" for 1/sqrt(n): orthogonal, its own inverse.
        dtype: floating point or complex, torch's default dtype if None.
        device: the default device if None.

    Returns:
        A :class:`~structmat.Product` of a real Butterfly and a Permutation, or a Butterfly; shape (n, n).

    Raises:
        TypeError: if n is not an integer.
        ValueError: if n < 1 or norm is unknown.

    Example:
        >>> import torch
        >>> from structmat.transforms import hartley
        >>> H, x = hartley(6, "ortho"), torch.arange(6.0)
        >>> torch.allclose(H @ (H @ x), x, atol=1e-5)
        True
    """
    scale = norm_scale(norm, check_int("n", n))
    return fourier_block(n, real_dtype(dtype), device, real=True, left=_constant(n, scale * (1 + 1j)))


def czt(
    n: int,
    m: int | None = None,
    w: complex | None = None,
    a: complex = 1 + 0j,
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> StructuredMatrix:
    """The chirp z-transform, ``y[k] = sum_j x[j] z_k^-j`` at the points z_k = a w^-k, as ``scipy.signal.czt``.

    One cropped :class:`Butterfly`: a convolution of a size N < 4/3 (n + m) (Rabiner, Schafer, Rader 1969) of at most
    4 N log2 N parameters. Away from the unit circle it is as accurate as powers of w up to max(n, m)^2 / 2 allow.

    Args:
        n: size of the input.
        m: number of points, n if None.
        w: ratio between points, ``exp(-2 pi i / m)`` if None.
        a: the first point.
        dtype: a complex dtype, by default the complex one of torch's default dtype.
        device: the default device if None.

    Returns:
        A matrix of shape (m, n).

    Raises:
        TypeError: if n or m is not an integer.
        ValueError: if n or m is below 1, w or a is zero or not finite, or dtype is not complex.

    Example:
        >>> import torch
        >>> from structmat.transforms import czt
        >>> zoom = czt(64, 16, w=torch.exp(torch.tensor(-0.01j)).item())  # 16 frequencies from 0 to 0.15
        >>> zoom.shape
        torch.Size([16, 64])
    """
    check_int("n", n)
    m = n if m is None else check_int("m", m)
    dtype = complex_dtype(dtype)
    for name, value in (("w", w), ("a", a)):
        if value is not None and not (value != 0 and np.isfinite(value)):
            raise ValueError(f"{name} must be a finite number other than zero, got {value!r}")
    right = None if a == 1 else torch.as_tensor(_powers(complex(a), -np.arange(n)))
    if w is None:
        return fourier_block(m, dtype, device, real=False, right=right, rows=m, columns=n)
    ratio = complex(w)
    factors = chirp_factors(m, n, lambda k: torch.as_tensor(_powers(ratio, k.cpu().numpy() ** 2, 2)))
    if right is not None:
        size = factors[-1].shape[0] * factors[-1].shape[2] * factors[-1].shape[3]
        factors = scale_columns(factors, torch.cat([right, right.new_zeros(size - n)]))
    return butterfly(factors, dtype, device, False, m, n)


def _powers(w: complex, exponent: np.ndarray, half: int = 1) -> np.ndarray:
    """``w^(exponent / half)`` in double precision; angles in NumPy's longest format, for exponents are large."""
    long = np.longdouble
    angle = np.arctan2(long(w.imag), long(w.real)) * exponent.astype(long) / half
    size = np.log(np.hypot(long(w.real), long(w.imag))) * exponent.astype(long) / half
    size = np.exp(size)
    return (size * np.cos(angle)).astype(np.float64) + 1j * (size * np.sin(angle)).astype(np.float64)


def fractional_dft(n: int, alpha: float, *, dtype: torch.dtype | None = None, device: Any = None) -> StructuredMatrix:
    """The fractional Fourier transform ``y[k] = sum_m exp(-2 pi i k m alpha) x[m]`` (Bailey and Swarztrauber 1991).

    ``alpha = 1 / n`` is :func:`dft`. A cropped :class:`Butterfly` as of :func:`czt`; phases are computed from alpha as
    the exact binary fraction it is.

    Args:
        n: size.
        alpha: any finite number.
        dtype: a complex dtype, by default the complex one of torch's default dtype.
        device: the default device if None.

    Returns:
        A :class:`Butterfly` of shape (n, n), symmetric.

    Raises:
        TypeError: if n is not an integer.
        ValueError: if n < 1, alpha is not finite or dtype is not complex.
    """
    check_int("n", n)
    if not np.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number, got {alpha!r}")
    num, den = float(alpha).as_integer_ratio()

    def square(j: Tensor) -> Tensor:
        # exp(-pi i alpha j^2): the fraction of a turn, alpha j^2 / 2 modulo 1, as an integer of 2^-60.
        parts = [((v * v * num % (2 * den)) << 60) // (2 * den) for v in j.tolist()]
        return turns(torch.tensor(parts) >> 2, 1 << 58)

    return butterfly(chirp_factors(n, n, square), complex_dtype(dtype), device, False, n, n)
