"""Factors of Fourier matrices and convolutions in the order of a kaleidoscope: those of B, then those of B'^*.

Computed in complex double precision as in :mod:`structmat.transforms._build`; :func:`kaleidoscope` rounds once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structmat.matrices._kaleidoscope_radices import admissible_size, paired_primes, palindrome
from structmat.matrices.kaleidoscope import Kaleidoscope
from structmat.matrices.kronecker_sparse import KroneckerSparse
from structmat.transforms._build import scale_columns, scale_rows, turns


def kaleidoscope(
    factors: Sequence[Tensor], dtype: torch.dtype, device: Any, nrows: int | None = None, ncols: int | None = None
) -> Kaleidoscope:
    """The product of factors, rounded to a dtype."""
    copies = (f.to(device=device, dtype=dtype).clone(memory_format=torch.contiguous_format) for f in factors)
    return Kaleidoscope(tuple(map(KroneckerSparse, copies)), nrows, ncols)  # pyright: ignore[reportArgumentType]


def ones(radices: Sequence[int]) -> list[Tensor]:
    """The identity as the factors of a B."""
    found, size, before = [], math.prod(radices), 1
    for r in radices:
        after = size // before // r
        found.append(torch.eye(r, dtype=torch.complex128)[None, :, :, None].expand(before, r, r, after))
        before *= r
    return found


def cooley_tukey(radices: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Factors of B and a permutation with F = B P, F the DFT, decimated in time."""
    found, size, before = [], math.prod(radices), 1
    index = torch.arange(size).view(tuple(reversed(radices)))
    perm = index.permute(tuple(reversed(range(index.ndim)))).reshape(-1)
    for r in radices:
        rest = size // r
        out, inner, position = torch.arange(r)[:, None, None], torch.arange(r)[:, None], torch.arange(rest)
        found.append(turns((out * rest + position) * inner, size).expand(before, r, r, rest))
        before, size = before * r, rest
    return found, perm


def fourier(n: int) -> list[Tensor]:
    """Factors of the DFT of size n without any permutation: a kaleidoscope of width 1 with the radices of n.

    Where p^2 divides n, write k = k' p + k0 + i n / p for the output, m = m' p + m0 + j n / p for the input. The p x p
    matrix over (i, j) of the entries ``w^(k m)`` has rank 1: it is the outer product of a vector that depends on m0
    (and k) and one that depends on k0 (and m). Let c = m0 - k0 be the block that both meet in: then the outermost
    factors are ``w^(m0 K)`` and ``w^(k0 (M - m0))``, K and M the whole indices, and inside remains a DFT of size n /
    p^2 over k' and m', beside a shift of the last digit by c. It is Temperton's self-sorting transform, sorted by the
    blocks of the kaleidoscope. Where p divides n once, the residues modulo p and modulo n / p separate (Good 1958).

    Source: Temperton 1991, "Self-sorting in-place fast Fourier transforms"; Good 1958 for coprime factors.
    """
    pairs, single = paired_primes(n)
    left, right = [], []
    size, power = n, 1  # of the transform left over, which is that of the root w^power
    before, after = 1, 1  # its copies, and last digits of p that are split off

    def add(to: list[Tensor], values: Tensor) -> None:
        a, b, c, d = before, *values.shape[-3:]
        to.append(values.to(torch.complex128).repeat_interleave(after, -1).expand(a, b, c, d * after))

    for p in pairs:
        rest = size // p
        row, column, index = torch.arange(p)[:, None, None], torch.arange(p)[:, None], torch.arange(rest)
        add(left, turns(power * ((index + column) % p) * (row * rest + index), size))
        add(right, turns(power * ((index - row) % p) * (column * rest + index - index % p), size))
        size, before, after = rest // p, before * p, after * p
    for p in single or [1] * (n == 1):
        rest = size // p
        row, column, index = torch.arange(p)[:, None, None], torch.arange(p)[:, None], torch.arange(rest)
        add(left, turns(power * pow(rest, -1, p) * (row * rest + index) * column, p))
        add(right, (column * rest + index) % p == row)
        power, size, before = power * pow(p, -1, rest) % rest, rest, before * p
    for level, p in reversed(list(enumerate(pairs))):
        after //= p
        # The blocks' number holds c, the digits of all pairs.
        shift = torch.arange(before)[:, None, None, None] // (before // math.prod(pairs[: level + 1]))
        row, column = torch.arange(p)[:, None, None], torch.arange(p)[:, None]
        add(left, row == column)
        add(right, (row + shift) % p == column)
        before *= p
    return [*left, *reversed(right)]


def kernel(
    root: int, rows: int, columns: int, left: Tensor | None = None, right: Tensor | None = None, conj: bool = False
) -> list[Tensor]:
    """``left[k] exp(-2 pi i k m / root) right[m]`` in the top left corner, k < rows and m < columns.

    The Fourier matrix where its size is admissible and not too large, else a chirp convolution of the next size that is
    at least rows + columns - 1.

    Source: Bluestein 1970.
    """
    if admissible_size(root) == root and max(rows, columns) <= root <= admissible_size(rows + columns):
        factors = fourier(root)
    else:
        # w^(k m) = s(k) s(m) / s(k - m), where s(j) = w^(j^2 / 2).
        j = torch.arange(max(rows, columns))
        squares = turns(j * j, 2 * root)
        inverse = squares.conj().resolve_conj()
        factors = convolution(band(inverse[:rows], inverse[:columns]))
        left = squares[:rows] if left is None else squares[:rows] * left
        right = squares[:columns] if right is None else squares[:columns] * right
    factors = scaled(factors, left, right)
    return [f.conj().resolve_conj() for f in factors] if conj else factors


def band(column: Tensor, row: Tensor) -> Tensor:
    """The first column of a circulant matrix of an admissible size whose corner is Toeplitz."""
    gap = admissible_size(len(column) + len(row) - 1) - (len(column) + len(row) - 1)
    return torch.cat([column, column.new_zeros(gap), row[1:].flip(0)])


def convolution(column: Tensor, flip: bool = False) -> list[Tensor]:
    """Factors of the circulant matrix of an admissible size: conj(B) S B^T, where B P is the DFT and S diagonal.

    Args:
        column: its first column, complex double precision.
        flip: ``entry[i + j]`` in place of ``entry[i - j]``: conj(B) S conj(B)^T.
    """
    factors, perm = cooley_tukey(palindrome(len(column)))
    left = [f.conj().resolve_conj().to(column.device) for f in factors]
    right = [(f.conj().resolve_conj() if flip else f).to(column.device).transpose(1, 2) for f in reversed(factors)]
    spectrum = torch.fft.fft(column)[perm.to(column.device)] / len(column)
    return [*scale_columns(left, spectrum), *right]


def scaled(factors: list[Tensor], left: Tensor | None, right: Tensor | None) -> list[Tensor]:
    """``diag(left) A diag(right)``, where entries that are not given are zero."""
    a, b, _, d = factors[0].shape
    for values, scale in ((left, scale_rows), (right, scale_columns)):
        if values is not None:
            factors = scale(factors, torch.cat([values, values.new_zeros(a * b * d - len(values))]))
    return factors
