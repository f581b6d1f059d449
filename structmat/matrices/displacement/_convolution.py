"""Convolutions over the last dimension by FFT: what products with Toeplitz and related matrices are made of.

Batch dimensions broadcast. Real operands take real transforms. float16 and bfloat16 are computed in float32 and rounded
once, at the end. Every function can be differentiated twice, mapped and compiled, and none but :func:`toeplitz` of a
small matrix does a matrix product, so that an autocast region changes nothing in it. Products of many vectors with
one Toeplitz matrix go through the kernels of structmat_kernels.fft_conv where these run.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from structmat.matrices.displacement._kernels import convolved, kernels_take

#: A matrix of at most this many entries is multiplied out. On a CPU (AVX-512, 1 to 4096 vectors, real, forward and
#: backward) that takes about 0.7 times as long as the transforms at 64 x 64, as long at 181 x 181, longer beyond.
DENSE_ENTRIES = 2**15


#: From this size on two single vectors are transformed together: on a CPU one transform runs on one thread only.
PAIRED_SIZE = 2**16

#: What torch.linalg raises for a singular matrix.
LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]

# Of torch.func; without it nothing is known, and values are left alone.
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def _smooth_numbers(limit: int) -> tuple[int, ...]:
    found = [2]
    for p in (2, 3, 5, 7):
        for n in found:  # which grows while it is read
            if n * p <= limit:
                found.append(n * p)
    return tuple(sorted(set(found)))


_SMOOTH = _smooth_numbers(2**32)


def good_size(n: int) -> int:
    """The smallest even 2^a 3^b 5^c 7^d that is at least n (n up to 2^32): a size whose FFT is fast."""
    low, high = 0, len(_SMOOTH) - 1
    while low < high:  # by hand: torch.compile does not trace bisect
        middle = (low + high) // 2
        if _SMOOTH[middle] < n:
            low = middle + 1
        else:
            high = middle
    if _SMOOTH[low] < n:
        raise ValueError(f"transforms have at most {_SMOOTH[-1]} entries, got {n}")
    return _SMOOTH[low]


def working(x: Tensor) -> Tensor:
    """x, in float32 if it is float16 or bfloat16."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def values_visible(x: Tensor) -> bool:
    """Whether a check of x's values is possible and free: not when traced or mapped, not on a GPU (it would wait)."""
    return not (torch.compiler.is_compiling() or x.device.type != "cpu" or _transforms_active())


def transform(x: Tensor, size: int) -> Tensor:
    """The FFT of x with zeros up to ``size``: all frequencies of a complex x, the first size // 2 + 1 of a real one."""
    x = working(x)
    if x.numel() == 0:  # which MKL refuses
        count = size if x.is_complex() else size // 2 + 1
        zeros = F.pad(x, (0, count - x.shape[-1]))
        return zeros if x.is_complex() else torch.complex(zeros, torch.zeros_like(zeros))
    return torch.fft.fft(x, size) if x.is_complex() else torch.fft.rfft(x, size)


def untransform(spectrum: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`transform`, ``size`` entries of ``dtype``, which says whether they are real."""
    if spectrum.numel() == 0:
        spectrum = F.pad(spectrum, (0, size - spectrum.shape[-1]))
        return spectrum.to(dtype) if dtype.is_complex else spectrum.real.to(dtype)
    if dtype.is_complex:
        return torch.fft.ifft(spectrum, size).to(dtype)
    return torch.fft.irfft(spectrum, size).to(dtype)


def convolve(a: Tensor, b: Tensor, size: int, start: int = 0) -> Tensor:
    """Entries ``start``, ..., ``start + size - 1`` of the linear convolution of a and b.

    ``y[i] = sum_j a[start + i - j] b[j]``, entries outside of a and b being zero. One transform of each, of about
    max(start + size, len(a) + len(b) - 1 - start) numbers: entries that are not asked for may overlap.

    Args:
        a: shape (*batch, p).
        b: shape (*batch, q), dtype and device of a.
        size: how many entries, at least 1.
        start: the first of them.

    Returns:
        Shape (*batch, size).
    """
    a, b = a[..., : start + size], b[..., : start + size]
    n = good_size(max(start + size, a.shape[-1] + b.shape[-1] - 1 - start))
    if n >= PAIRED_SIZE and a.shape.numel() == a.shape[-1] and b.shape.numel() == b.shape[-1]:
        zeros = [v.new_zeros(n - v.shape[-1]) for v in (a, b)]
        pair = transform(torch.cat([a.flatten(), zeros[0], b.flatten(), zeros[1]]).view(2, n), n)
        spectrum = pair[0].view(*a.shape[:-1], -1) * pair[1].view(*b.shape[:-1], -1)
    else:
        spectrum = transform(a, n) * transform(b, n)
    return untransform(spectrum, n, a.dtype)[..., start : start + size]


def correlate(a: Tensor, b: Tensor, size: int) -> Tensor:
    """``y[i] = sum_j a[i + j] b[j]`` for i < size, without conjugates: the transpose of ``convolve(., b)``.

    Args:
        a: shape (*batch, p).
        b: shape (*batch, q), dtype and device of a.
        size: how many entries, at least 1.

    Returns:
        Shape (*batch, size).
    """
    return convolve(a, b.flip(-1), size, b.shape[-1] - 1)


def toeplitz(diagonals: Tensor, x: Tensor, nrows: int) -> Tensor:
    """``y[i] = sum_j diagonals[i - j + n - 1] x[j]``: the product of a Toeplitz matrix of nrows x n with x.

    By three transforms of m + n - 1 numbers, or for at most ``DENSE_ENTRIES`` entries by the matrix itself (which an
    autocast region casts: for products that are asked for, not for solves).

    Args:
        diagonals: shape (*batch, nrows + n - 1), from the top right corner to the bottom left one.
        x: shape (*batch, tokens, n), dtype and device of the diagonals.
        nrows: m.

    Returns:
        Shape (*batch, tokens, nrows).
    """
    n = x.shape[-1]
    if nrows * n <= DENSE_ENTRIES:
        return hankel(diagonals, x.flip(-1), nrows)
    if kernels_take(x, nrows):
        return convolved(x, diagonals[..., n - 1 :], diagonals[..., : n - 1].flip(-1), nrows)
    return convolve(diagonals.unsqueeze(-2), x, nrows, n - 1)


def hankel(entries: Tensor, x: Tensor, nrows: int) -> Tensor:
    """``y[i] = sum_j entries[i + j] x[j]``: :func:`toeplitz` of the reversed x, with the same arguments and cost."""
    n, count = x.shape[-1], entries.shape[-1]
    if nrows * n <= DENSE_ENTRIES:
        # The entries again and again, cut into rows of one more: each begins one entry later. (vmap has no rule for the
        # gradient of unfold.)
        repeated = entries.unsqueeze(-2).expand(*entries.shape[:-1], nrows + 1, count).flatten(-2)
        return x @ repeated[..., : nrows * (count + 1)].unflatten(-1, (nrows, count + 1))[..., :n].mT
    return toeplitz(entries, x.flip(-1), nrows)


def hankel_dense(entries: Tensor, ncols: int) -> Tensor:
    """``H[i, j] = entries[i + j]``, shape (*batch, len(entries) - ncols + 1, ncols): overlapping, do not write."""
    return entries.unfold(-1, ncols, 1)


def convolution_flops(size: int, complex: bool) -> int:
    """Operations of a circular convolution: three transforms, 5 N log2 N real operations each for complex numbers."""
    # Of complex numbers, complex operations: a quarter of the real ones. A real transform does half of a complex one.
    return int(3 * (1.25 if complex else 2.5) * size * math.log2(size)) + (size if complex else 3 * size)


def toeplitz_flops(nrows: int, ncols: int, complex: bool) -> int:
    """Operations of :func:`toeplitz` for one vector."""
    if nrows * ncols <= DENSE_ENTRIES:
        return 2 * nrows * ncols
    return convolution_flops(good_size(nrows + ncols - 1), complex)


def f_circulant_diagonals(v: Tensor, f: complex) -> Tensor:
    """The diagonals of Z_f(v) from the top right corner to the bottom left one, shape (*batch, 2 n - 1)."""
    if isinstance(f, complex) and not v.is_complex():
        raise TypeError(f"f = {f} is complex but the column has dtype {v.dtype}; convert it with .to(torch.complex128)")
    return torch.cat([f * v[..., 1:], v], -1)


def f_circulant(v: Tensor, x: Tensor, f: complex) -> Tensor:
    """``Z_f(v) x``; the f-circulant Z_f(v) has v[i - j] on and below the diagonal and f v[n + i - j] above it.

    A polynomial in the shift Z_f, which moves entries down and brings the last one to the top times f. Computed as the
    Toeplitz matrix that it is: no powers of f, hence stable for every f, 0 included.

    Args:
        v: shape (*batch, n).
        x: shape (*batch, n), dtype and device of v.
        f: a Python number; complex for complex v only.

    Returns:
        Shape (*batch, n).
    """
    n = v.shape[-1]
    if f == 1 and n == good_size(n):
        return untransform(transform(v, n) * transform(x, n), n, v.dtype)
    if f == 0:
        return convolve(v, x, n)
    return convolve(f_circulant_diagonals(v, f), x, n, n - 1)


def power_series_inverse(column: Tensor, size: int) -> Tensor:
    """The first ``size`` coefficients of 1 / c(z), c(z) = sum_k column[k] z^k, by Newton's iteration.

    About six transforms of 2 size numbers. Errors are relative to the largest coefficients of the result: those of
    a series that grows (c has a root within the unit circle) are lost in its last ones.
    Source: Kung 1974, "On computing reciprocals of power series".

    Args:
        column: shape (*batch, p), p >= 1; coefficients beyond p are zero.
        size: at least 1.

    Returns:
        Shape (*batch, size).

    Raises:
        LinAlgError: (of torch.linalg) if a column[0] is 0, seen on the CPU outside of compilation and vmap; elsewhere
            nothing waits for the values and the result is not finite.
    """
    if values_visible(column) and bool((column[..., 0] == 0).any()):
        raise LinAlgError("column[..., 0] is 0: the power series has no inverse, the matrix is singular")
    c = working(column)
    inverse = c[..., :1].reciprocal()
    known = 1
    while known < size:
        wanted = min(2 * known, size)
        # c g = 1 + z^known e + ..., hence 1 / c = g - z^known e g + O(z^(2 known)).
        error = convolve(c[..., :wanted], inverse, wanted - known, known)
        inverse = torch.cat([inverse, -convolve(error, inverse, wanted - known)], -1)
        known = wanted
    return inverse.to(column.dtype)
