"""What the transforms are made of: exact twiddles, Cooley-Tukey factors, convolutions in the Fourier domain.

Everything here is computed in complex double precision; :func:`butterfly` rounds once, at the end. A factor is a tensor
of shape (a, b, c, d), the values of a Kronecker-sparse matrix, and lists of factors read from left to right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from structmat.base import StructuredMatrix
from structmat.lazy import compose
from structmat.matrices.butterfly import Butterfly
from structmat.matrices.kronecker_sparse import KroneckerSparse
from structmat.matrices.permutation import Permutation
from structmat.transforms.selection import Selection

#: Prime factors up to this size are dense blocks of a mixed-radix transform, larger ones go through a convolution.
LARGEST_RADIX = 128


# -------------------------------------------------------------------- arguments
def choice(name: str, value: Any, options: tuple[Any, ...]) -> Any:
    """Return value; raise unless it is one of the options."""
    if isinstance(value, bool) or value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def real_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a real transform: any floating-point or complex one."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        raise ValueError(f"dtype must be floating point or complex, got {dtype}")
    return dtype


def complex_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a complex transform."""
    dtype = torch.get_default_dtype().to_complex() if dtype is None else dtype
    if not dtype.is_complex:
        raise ValueError(f"dtype must be complex for a complex transform, as torch.complex64, got {dtype}")
    return dtype


def norm_scale(norm: str | None, length: int, inverse: bool = False) -> float:
    """What ``norm`` multiplies a transform by whose inverse is its unscaled inverse type over ``length``."""
    norm = choice("norm", norm, (None, "backward", "ortho", "forward"))
    if norm == "ortho":
        return 1 / math.sqrt(length)
    return 1 / length if (norm == "forward") != inverse else 1.0


# -------------------------------------------------------------------- numbers
def turns(num: Tensor, den: int) -> Tensor:
    """``exp(-2 pi i num / den)`` for integers, reduced exactly: to rounding for any size, exact at quarter turns."""
    num = num % den
    quarter = (8 * num + den) // (2 * den)
    angle = (4 * num - quarter * den).double() / den * (math.pi / 2)  # within an eighth of a turn
    cos, sin = angle.cos(), angle.sin()
    quarter = quarter % 4
    odd, back = quarter % 2 == 1, quarter >= 2
    real, imag = torch.where(odd, -sin, cos), torch.where(odd, -cos, -sin)
    return torch.complex(torch.where(back, -real, real), torch.where(back, -imag, imag))


def primes(n: int) -> list[int]:
    """Prime factors in increasing order, [1] of 1."""
    found, p, rest = [], 2, n
    while p * p <= rest:
        while rest % p == 0:
            found.append(p)
            rest //= p
        p += 1
    return [*found, rest] if rest > 1 or n == 1 else found


def smooth(n: int) -> bool:
    """Whether a mixed-radix transform of size n has small radices."""
    return primes(n)[-1] <= LARGEST_RADIX


def fast_size(n: int) -> int:
    """The smallest of 2^k, 3 2^k, 5 2^k that is at least n."""
    return min(m << max(0, (-(-n // m) - 1).bit_length()) for m in (1, 3, 5))


def reversed_digits(radices: Sequence[int]) -> Tensor:
    """``perm[i]``: the digits of i, the first radix's most significant, read backwards."""
    index = torch.arange(math.prod(radices)).view(*reversed(radices))
    return index.permute(*reversed(range(len(radices)))).reshape(-1)


# -------------------------------------------------------------------- factors
def fourier_factors(axes: Sequence[int], channels: int = 1) -> tuple[list[Tensor], Tensor]:
    """Factors B and a permutation with F = B P, F the DFT over all axes of an array (*axes, channels).

    The permutation is of the axes alone. Source: Cooley and Tukey 1965, decimation in time.
    """
    factors, before, total = [], 1, math.prod(axes)
    perm = torch.zeros(1, dtype=torch.int64)
    for n in axes:
        after = total // before // n * channels
        size, radices = n, primes(n)
        for r in radices:
            rest = size // r
            o, i, position = torch.arange(r)[:, None, None], torch.arange(r)[:, None], torch.arange(rest)
            values = turns((o * rest + position) * i, size).repeat_interleave(after, -1)
            factors.append(values.expand(before * n // size, *values.shape))
            size = rest
        perm = (perm[:, None] * n + reversed_digits(radices)).reshape(-1)
        before *= n
    return factors, perm


def scale_rows(factors: list[Tensor], scale: Tensor) -> list[Tensor]:
    """``diag(scale)`` times the product."""
    a, b, _, d = factors[0].shape
    return [factors[0] * scale.view(a, b, 1, d), *factors[1:]]


def scale_columns(factors: list[Tensor], scale: Tensor) -> list[Tensor]:
    """The product times ``diag(scale)``."""
    a, _, c, d = factors[-1].shape
    return [*factors[:-1], factors[-1] * scale.view(a, 1, c, d)]


def convolution_factors(spectrum: Tensor, axes: Sequence[int], flip: bool = False) -> list[Tensor]:
    """Factors of the circular convolution ``F^-1 S F`` over all axes, S block-diagonal: a matrix a frequency.

    F is symmetric: with F = B P it is also P^T B^T, so that F^-1 S F = conj(B) (P S P^T) B^T / n needs no permutation
    (a kaleidoscope matrix, Dao et al. 2020).

    Args:
        spectrum: shape (n, out, in), complex, n the product of the axes.
        axes: sizes; the vectors are arrays (*axes, channels).
        flip: ``F^-1 S conj(F)`` instead: entry (i, j) of the matrix depends on i + j, not on i - j.
    """
    n, rows, columns = spectrum.shape
    device = spectrum.device
    left, perm = fourier_factors(axes, rows)
    right = left if rows == columns else fourier_factors(axes, columns)[0]
    left = [f.conj().resolve_conj().to(device) for f in left]
    right = [(f.conj().resolve_conj() if flip else f).to(device).transpose(1, 2) for f in reversed(right)]
    middle = spectrum[perm.to(device)] / n
    if rows == columns == 1:  # the innermost three have one pattern (a, b, b, 1)
        joined = scale_columns(left, middle)[-1][..., 0] @ right[0][..., 0]
        return [*left[:-1], joined.unsqueeze(-1), *right[1:]]
    return [*left, middle.unsqueeze(-1), *right]


def chirp_factors(rows: int, columns: int, square: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Factors whose top left block is ``w^(k m)``, k < rows and m < columns, from ``square(j) = w^(j^2 / 2)``.

    Source: Bluestein 1970; Rabiner, Schafer, Rader 1969, "The chirp z-transform algorithm".
    """
    size = fast_size(rows + columns - 1)
    offsets = torch.arange(1 - columns, rows)
    chirp = torch.zeros(size, dtype=torch.complex128)
    chirp[offsets % size] = square(offsets).reciprocal()
    factors = convolution_factors(torch.fft.fft(chirp)[:, None, None], [size])
    inside = [torch.arange(size) < count for count in (rows, columns)]
    weights = [torch.where(i, square(torch.arange(size)), 0) for i in inside]
    return scale_columns(scale_rows(factors, weights[0]), weights[1])


def real_part(factors: list[Tensor]) -> list[Tensor]:
    """Real factors of the real part of a product of complex ones.

    Every number x + i y becomes [[x, -y], [y, x]]; between two factors the pair of real and imaginary part sits where
    the blocks of both touch, so that a chain of rank 1 becomes one of rank 2 (Chaumette, Gribonval, Riccietti).
    """
    last, result, inner_rows = len(factors) - 1, [], False
    for place, values in enumerate(factors):
        a, _, c, d = values.shape
        x, y = values.real, values.imag
        pairs = torch.stack([torch.stack([x, -y], 3), torch.stack([y, x], 3)], 1)  # (a, 2, b, c, 2, d)
        if place == 0:
            pairs = pairs[:, :1]
        elif inner_rows:
            pairs = pairs.transpose(1, 2)
        if place == last:
            pairs = pairs[..., :1, :]
        else:
            right = factors[place + 1]
            inner_rows = not (a * c == right.shape[0] and d == right.shape[1] * right.shape[3])  # strides grow
            pairs = pairs.transpose(3, 4) if inner_rows else pairs
        result.append(pairs.flatten(3, 4).flatten(1, 2))
    return result


# -------------------------------------------------------------------- matrices
def butterfly(
    factors: list[Tensor],
    dtype: torch.dtype,
    device: Any,
    real: bool,
    nrows: int | None = None,
    ncols: int | None = None,
) -> Butterfly:
    """The product of factors, or its real part, rounded to a dtype."""
    factors = real_part(factors) if real else factors
    copies = (f.to(device=device, dtype=dtype).clone(memory_format=torch.contiguous_format) for f in factors)
    return Butterfly(tuple(map(KroneckerSparse, copies)), nrows, ncols)  # pyright: ignore[reportArgumentType]


def then(A: StructuredMatrix, B: StructuredMatrix | None) -> StructuredMatrix:
    """``A @ B``, where no B is the identity."""
    return A if B is None else compose(A, B)


def select(index: Tensor, ncols: int, dtype: torch.dtype, device: Any) -> StructuredMatrix | None:
    """The matrix that takes entries ``index``, where ncols means zero; None for the identity."""
    if torch.equal(index, torch.arange(ncols)):
        return None
    index = index.to(torch.get_default_device() if device is None else device)
    if len(index) == ncols and not (index == ncols).any():
        return Permutation(index, dtype)
    return Selection(index, ncols, dtype)


def fourier_block(
    n: int,
    dtype: torch.dtype,
    device: Any,
    *,
    real: bool,
    left: Tensor | None = None,
    right: Tensor | None = None,
    rows: int | None = None,
    columns: int | None = None,
) -> StructuredMatrix:
    """``left[k] exp(-2 pi i k m / n) right[m]`` for k < rows and m < columns, or the real part of that.

    A mixed-radix butterfly of size n and a permutation where n has small prime factors, else a chirp convolution.
    """
    rows, columns = rows or n, columns or n
    if smooth(n) and rows <= n and columns <= n:
        factors, perm = fourier_factors([n])
        crop = rows, n
        after = select(perm if columns == n else torch.where(perm < columns, perm, columns), columns, dtype, device)
    else:
        factors = chirp_factors(rows, columns, lambda j: turns(j * j, 2 * n))
        perm = torch.arange(factors[0].shape[0] * factors[0].shape[1] * factors[0].shape[3])
        crop, after = (rows, columns), None
    if left is not None:
        factors = scale_rows(factors, _padded(left, len(perm)))
    if right is not None:
        factors = scale_columns(factors, _padded(right, len(perm))[perm])
    return then(butterfly(factors, dtype, device, real, *crop), after)


def _padded(values: Tensor, size: int) -> Tensor:
    return torch.cat([values, values.new_zeros(size - len(values))])
