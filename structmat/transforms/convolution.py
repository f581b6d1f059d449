"""Circulant, Toeplitz and Hankel matrices, and convolutions of sequences, as butterflies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structmat._checks import check_int
from structmat.matrices.butterfly import Butterfly
from structmat.transforms._build import butterfly, choice, convolution_factors, fast_size, smooth


def operand(name: str, value: Any, dtype: torch.dtype | None, device: Any, ndims: tuple[int, ...] = (1,)) -> Tensor:
    """A tensor of the wanted dtype and device; integers become torch's default dtype."""
    found: Tensor = torch.as_tensor(value, device=device)
    inexact = found.is_floating_point() or found.is_complex()
    dtype = dtype or (found.dtype if inexact else torch.get_default_dtype())
    if not (dtype.is_floating_point or dtype.is_complex):
        raise ValueError(f"dtype must be floating point or complex, got {dtype}")
    if found.is_complex() and not dtype.is_complex:
        raise ValueError(f"dtype must be complex for a complex {name}, got {dtype}")
    if found.ndim not in ndims or 0 in found.shape:
        wanted = " or ".join(f"{d}-D" for d in ndims)
        raise ValueError(f"{name} must be a non-empty {wanted} array, got shape {tuple(found.shape)}")
    return found.to(dtype)


def _circular(column: Tensor, rows: int, columns: int, flip: bool = False) -> Butterfly:
    """The top left block of the circular convolution with a column of any good size."""
    spectrum = torch.fft.fft(column.to(torch.complex128))[:, None, None]
    factors = convolution_factors(spectrum, [len(column)], flip)
    return butterfly(factors, column.dtype, column.device, not column.is_complex(), rows, columns)


def _band(entries: Tensor, low: int, rows: int, columns: int) -> Butterfly:
    """``T[i, j] = entries[i - j - low]``, and zero outside of entries."""
    high = low + len(entries) - 1
    # Large enough that no entry comes around to where another one, or a zero, belongs.
    size = fast_size(max(high + columns, rows - low, rows, columns))
    place = torch.arange(low, high + 1, device=entries.device)
    used = (place > -columns) & (place < rows)
    column = entries.new_zeros(size).index_add(0, place[used] % size, entries[used])
    return _circular(column, rows, columns)


def circulant(c: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> Butterfly:
    """The circulant matrix with first column c, ``C[i, j] = c[(i - j) mod n]``, as ``scipy.linalg.circulant``.

    ``conj(B) D B^T`` with the Cooley-Tukey butterfly B of the DFT, one Butterfly without any permutation, of size n, or
    of a size up to 8/3 n with small factors where n has a prime factor above 128. At most 4 p n numbers for each of two
    factors over every prime factor p of that size, twice as many operations: O(n log n). Real c gives real factors.
    c's gradient flows through them.

    Args:
        c: shape (n,), a tensor or an array; integers become torch's default dtype.
        dtype: floating point or complex, that of c by default.
        device: that of c by default.

    Returns:
        A :class:`Butterfly` of shape (n, n).

    Raises:
        ValueError: if c is not a non-empty vector, or complex and dtype is not.

    Example:
        >>> import torch
        >>> from structmat.transforms import circulant
        >>> circulant([1.0, 2.0, 3.0]).to_dense().round(decimals=4)
        tensor([[1., 3., 2.],
                [2., 1., 3.],
                [3., 2., 1.]])
    """
    c = operand("c", c, dtype, device)
    n = len(c)
    return _circular(c, n, n) if smooth(n) else _band(torch.cat([c[1:], c]), 1 - n, n, n)


def toeplitz(c: Any, r: Any = None, *, dtype: torch.dtype | None = None, device: Any = None) -> Butterfly:
    """The Toeplitz matrix with first column c and first row r, as ``scipy.linalg.toeplitz``.

    ``T[i, j] = c[i - j]`` for i >= j, else ``r[j - i]``; r[0] is ignored. The corner of a circulant matrix of a size
    N < 4/3 (m + n) that is 1, 3 or 5 times a power of two: a cropped Butterfly, priced as :func:`circulant` of size N.

    Args:
        c: first column, shape (m,), a tensor or an array.
        r: first row, shape (n,); the conjugate of c if None.
        dtype: floating point or complex, by default the common one of c and r.
        device: that of c by default.

    Returns:
        A :class:`Butterfly` of shape (m, n).

    Raises:
        ValueError: if c or r is not a non-empty vector, or complex and dtype is not.

    Example:
        >>> from structmat.transforms import toeplitz
        >>> toeplitz([1.0, 2.0, 3.0], [1.0, 4.0]).to_dense().round(decimals=4)
        tensor([[1., 4.],
                [2., 1.],
                [3., 2.]])
    """
    c, r = _pair(c, r, dtype, device)
    r = c.conj().resolve_conj() if r is None else r
    m, n = len(c), len(r)
    return _band(torch.cat([r[1:].flip(0), c]), 1 - n, m, n)


def hankel(c: Any, r: Any = None, *, dtype: torch.dtype | None = None, device: Any = None) -> Butterfly:
    """The Hankel matrix with first column c and last row r, as ``scipy.linalg.hankel``.

    ``H[i, j] = h[i + j]`` where h is c followed by r[1:]; r[0] is ignored. ``conj(B) D conj(B)^T`` of a size N as of
    :func:`toeplitz`, at the same cost.

    Args:
        c: first column, shape (m,), a tensor or an array.
        r: last row, shape (n,); zeros as many as c has entries if None.
        dtype: floating point or complex, by default the common one of c and r.
        device: that of c by default.

    Returns:
        A :class:`Butterfly` of shape (m, n).

    Raises:
        ValueError: if c or r is not a non-empty vector, or complex and dtype is not.

    Example:
        >>> from structmat.transforms import hankel
        >>> hankel([1.0, 2.0], [2.0, 3.0, 4.0]).to_dense().round(decimals=4)
        tensor([[1., 2., 3.],
                [2., 3., 4.]])
    """
    c, r = _pair(c, r, dtype, device)
    r = torch.zeros_like(c) if r is None else r
    m, n = len(c), len(r)
    column = c.new_zeros(fast_size(m + n - 1))
    column = torch.cat([c, r[1:], column[m + n - 1 :]])
    return _circular(column, m, n, flip=True)


def _pair(c: Any, r: Any, dtype: torch.dtype | None, device: Any) -> tuple[Tensor, Tensor | None]:
    c = operand("c", c, dtype, device)
    if r is None:
        return c, None
    r = operand("r", r, dtype, c.device)
    common = torch.promote_types(c.dtype, r.dtype)
    return c.to(common), r.to(common)


def convolution(
    n: int, kernel: Any, mode: str = "full", *, dtype: torch.dtype | None = None, device: Any = None
) -> Butterfly:
    """Convolution of a sequence of length n with a kernel, as ``numpy.convolve(x, kernel, mode)``, or circular.

    ``y[i] = sum_j kernel[i - j] x[j]``; "same" is the middle max(n, k) entries of that, "valid" those where both
    overlap completely, "circular" takes i - j modulo n (a kernel longer than n wraps around). Cropped butterflies,
    see :func:`toeplitz`.

    Args:
        n: length of the input.
        kernel: shape (k,), a tensor or an array.
        mode: "full", "same", "valid" or "circular".
        dtype: floating point or complex, that of the kernel by default.
        device: that of the kernel by default.

    Returns:
        A :class:`Butterfly` of n + k - 1, max(n, k), max(n, k) - min(n, k) + 1 or n rows, and n columns.

    Raises:
        TypeError: if n is not an integer.
        ValueError: if n < 1, the mode is unknown, or kernel is not a non-empty vector, or complex and dtype is not.

    Example:
        >>> import torch
        >>> from structmat.transforms import convolution
        >>> (convolution(3, [1.0, -1.0], "valid") @ torch.tensor([1.0, 3.0, 6.0])).round(decimals=4)
        tensor([2., 3.])
    """
    check_int("n", n)
    choice("mode", mode, ("full", "same", "valid", "circular"))
    kernel = operand("kernel", kernel, dtype, device)
    k = len(kernel)
    if mode == "circular":
        wrapped = kernel.new_zeros(n).index_add(0, torch.arange(k, device=kernel.device) % n, kernel)
        return circulant(wrapped)
    short, long = min(n, k), max(n, k)
    start, rows = {"full": (0, n + k - 1), "same": ((short - 1) // 2, long), "valid": (short - 1, long - short + 1)}[
        mode
    ]
    return _band(kernel, -start, rows, n)
